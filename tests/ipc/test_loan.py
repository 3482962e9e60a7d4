"""What a borrower does with one loan, and when it ends."""

from __future__ import annotations

import copy
import errno
import fcntl
import gc
import mmap
import os
import pickle
import socket
import subprocess
import sys
import time
from typing import IO

import pytest
import support

import fdbroker
from fdbroker.errors import ClosedLoanError


def loans(broker: fdbroker.Client) -> int:
    return broker.stats()["loans"]


def test_the_descriptor_is_the_one_that_was_put(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    with broker.borrow("data") as loan:
        number = loan.fileno()
        assert number != data_file.fileno()
        assert os.path.sameopenfile(number, data_file.fileno())
        assert os.pread(number, 3, 10) == bytes([10, 11, 12])
        assert loans(broker) == 1
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        os.fstat(number)
    assert caught.value.errno == errno.EBADF
    assert loans(broker) == 0


def test_what_is_received_is_close_on_exec(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    for name in "abc":
        broker.put(name, data_file)
    with broker.borrow_all(["a", "b", "c"]) as loan, broker.borrow("a", mode="r") as read_only:
        for number in [*map(loan.fileno, "abc"), read_only.fileno()]:
            assert fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_entry_entries_and_since(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("a", data_file)
    broker.put("b", data_file)
    before = time.time()
    with broker.borrow_all(("b", "a")) as loan:
        assert (loan.entry, loan.entries) == ("b", ("b", "a"))
        assert before - 0.01 <= loan.since <= time.time() + 0.01
        with pytest.raises(LookupError, match='no "c"'):
            loan.fileno("c")


def test_names_of_several_lead_to_their_own_files(broker: fdbroker.Broker) -> None:
    pipes = {name: os.pipe() for name in "xyz"}
    for name, (reader, _) in pipes.items():
        broker.put(name, reader)
    with broker.borrow_all(["y", "x", "y", "z"]) as loan:
        for name, (_, writer) in pipes.items():
            os.write(writer, name.encode())
            assert os.read(loan.fileno(name), 9) == name.encode()
    for pair in pipes.values():
        os.close(pair[0])
        os.close(pair[1])


def test_as_socket(broker: fdbroker.Broker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        broker.put("web", server)
        with broker.borrow("web") as loan:
            borrowed = loan.as_socket()
            assert borrowed.getsockname() == server.getsockname()
            assert borrowed.fileno() != loan.fileno()
            assert not borrowed.get_inheritable()
            with socket.create_connection(server.getsockname()) as there:
                here, _ = borrowed.accept()
                with here:
                    here.sendall(b"hello")
                    assert there.recv(9) == b"hello"
        assert borrowed.fileno() == -1


def test_as_socket_of_a_file_fails_and_leaks_nothing(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    with broker.borrow("data") as loan:
        before = support.open_files()
        with pytest.raises(OSError, match="non-socket"):
            loan.as_socket()
        assert support.open_files() == before


def test_open(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file)
    with broker.borrow("data") as loan:
        file = loan.open("r+b")
        file.write(b"new")
        number = file.fileno()
        assert number != loan.fileno()
    assert file.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    assert os.pread(data_file.fileno(), 3, 0) == b"new"


def test_mmap(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file)
    with broker.borrow("data") as loan, loan.mmap() as mapping:
        assert mapping[:3] == bytes([0, 1, 2])
        mapping[0] = 77
    assert os.pread(data_file.fileno(), 1, 0) == b"M"
    assert loans(broker) == 0


def test_mmap_of_a_read_only_loan_reads(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file)
    with broker.borrow("data", mode="r") as loan, loan.mmap() as mapping:
        with pytest.raises(TypeError):
            mapping[0] = 1
        with pytest.raises(PermissionError):
            loan.mmap(access=mmap.ACCESS_WRITE)
    assert loans(broker) == 0


def test_closing_twice_returns_once(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file)
    loan, other = broker.borrow("data"), broker.borrow("data")
    loan.close()
    loan.close()
    with loan:
        pass
    assert loans(broker) == 1
    with pytest.raises(ClosedLoanError):
        loan.fileno()
    other.close()


def test_every_verb_of_a_returned_loan_says_so(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    with broker.borrow("data") as loan:
        pass
    for verb in (loan.fileno, loan.as_socket, loan.open, loan.mmap, loan.detach, loan.pass_fds):
        with pytest.raises(ClosedLoanError):
            verb()


def test_dropped_unclosed_it_is_returned_with_a_warning(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    loan = broker.borrow("data")
    number = loan.fileno()
    with pytest.warns(ResourceWarning, match="unclosed <Loan of data, fd"):
        del loan
    assert loans(broker) == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def detached(address: str) -> int:
    client = support.kept["client"] = fdbroker.Client(address)
    number = client.borrow("data").detach()
    client.close()
    os.fstat(number)
    return number


def test_detached_it_stays_out_until_the_process_ends(
    broker: fdbroker.Broker, data_file: IO[bytes], peer: support.Peer
) -> None:
    broker.put("data", data_file)
    number = peer.call(detached, broker.address)
    assert [loan.pid for loan in broker.loans("data")] == [peer.pid]
    peer.call(os.close, number)
    assert loans(broker) == 1
    peer.kill()
    support.wait_until(lambda: loans(broker) == 0)


def test_several_cannot_be_detached(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file)
    with broker.borrow_all(["data", "data"]) as loan:
        with pytest.raises(TypeError, match="several"):
            loan.detach()
        assert len({loan.fileno()}) == 1


@pytest.mark.parametrize("parent_first", [True, False])
def test_pass_fds_lasts_until_both_are_done(broker: fdbroker.Broker, parent_first: bool) -> None:
    reader, writer = os.pipe()
    broker.put("pipe", writer)
    with broker.borrow("pipe") as loan:
        numbers = loan.pass_fds()
        child = subprocess.Popen(
            [
                *(sys.executable, "-c", "import os,sys; os.write(int(sys.argv[1]), b'x'); input()"),
                str(numbers[0]),
            ],
            stdin=subprocess.PIPE,
            pass_fds=numbers,
        )
        assert os.read(reader, 9) == b"x"
        if not parent_first:
            child.communicate(b"\n")
            assert loans(broker) == 1
    if parent_first:
        assert loans(broker) == 1
        child.communicate(b"\n")
    assert child.returncode == 0
    support.wait_until(lambda: loans(broker) == 0)
    os.close(reader)
    os.close(writer)


def test_when_the_broker_counts_zero_it_is_zero(
    broker: fdbroker.Broker, peer: support.Peer
) -> None:
    """Wrappers close before the descriptor, the descriptor before the return."""
    for _ in range(20):
        reader, writer = os.pipe()
        broker.put("pipe", writer, replace=True)
        os.close(writer)
        peer.call(borrow_and_wrap, broker.address)
        broker.retire("pipe")
        peer.start(give_back)
        support.wait_until(lambda: loans(broker) == 0)
        os.set_blocking(reader, False)
        support.wait_until(lambda: not broker.stats()["entries"])
        assert os.read(reader, 9) == b"last"
        assert os.read(reader, 9) == b"", "somebody has it open still"
        os.close(reader)
        peer.result()


def borrow_and_wrap(address: str) -> None:
    client = support.kept["client"] = fdbroker.Client(address)
    loan = support.kept["loan"] = client.borrow("pipe")
    file = support.kept["file"] = loan.open("wb")
    file.write(b"last")


def give_back() -> None:
    support.kept.pop("loan").close()
    support.kept.pop("client").close()
    support.kept.clear()


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_a_flush_that_fails_raises_after_the_return(broker: fdbroker.Broker, mode: str) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        broker.put("full", full)
    loan = broker.borrow("full")
    file = loan.open(mode)
    file.write("x" if mode == "w" else b"x")
    with pytest.raises(OSError, match="No space") as caught:
        loan.close()
    assert caught.value.errno == errno.ENOSPC
    assert file.closed
    assert loans(broker) == 0
    del file, caught


def test_an_error_in_the_with_block_is_what_comes_out(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    with pytest.raises(ZeroDivisionError), broker.borrow("data"):
        raise ZeroDivisionError
    assert loans(broker) == 0


def test_a_detached_text_wrapper_does_not_hinder_the_return(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    """The user took the buffer out of the file object: its end is the user's then."""
    broker.put("data", data_file)
    with broker.borrow("data") as loan:
        text = loan.open("r")
        taken = text.detach()
    assert loans(broker) == 0
    taken.close()


def test_an_unflushed_wrapper_can_be_closed_by_the_user(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    with broker.borrow("data") as loan, loan.open("r+b") as file:
        file.write(b"abc")
    assert os.pread(data_file.fileno(), 3, 0) == b"abc"
    assert loans(broker) == 0


def test_an_array_over_a_mapping_outlives_the_with(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    numpy = pytest.importorskip("numpy")
    broker.put("data", data_file)
    with broker.borrow("data") as loan:
        array = numpy.frombuffer(loan.mmap(), dtype="u1")
        number = loan.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    assert int(array[10]) == 10
    assert [found.entry for found in broker.loans()] == ["data"]
    del array
    assert broker.loans() == []


def test_the_last_of_several_mappings_ends_the_loan(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    with broker.borrow("data") as loan:
        one, other = loan.mmap(), loan.mmap(10)
    one.close()
    one.close()
    assert loans(broker) == 1
    view = memoryview(other)
    with pytest.raises(BufferError):
        other.close()
    assert loans(broker) == 1
    view.release()
    other.close()
    assert loans(broker) == 0


def test_a_mapping_in_a_cycle_with_its_view_ends_the_loan(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    with broker.borrow("data") as loan:
        mapping = loan.mmap()
    cycle: list[object] = [mapping, memoryview(mapping)]
    cycle.append(cycle)
    mapping.cycle = cycle  # type: ignore[attr-defined]
    del mapping, cycle
    assert loans(broker) == 1
    gc.collect()
    support.wait_until(lambda: loans(broker) == 0)  # its session has ended: seen, not told


def test_a_mapping_that_fails_counts_for_nothing(broker: fdbroker.Broker) -> None:
    reader, writer = os.pipe()
    broker.put("pipe", reader)
    with broker.borrow("pipe") as loan, pytest.raises((OSError, ValueError)):
        loan.mmap(10)
    assert loans(broker) == 0
    os.close(reader)
    os.close(writer)


def test_a_mapping_closed_before_its_loan(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file)
    with broker.borrow("data") as loan:
        loan.mmap().close()
        assert loans(broker) == 1
    assert loans(broker) == 0


def test_a_socket_closed_by_the_user_closes_no_stranger(broker: fdbroker.Broker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        broker.put("web", server)
        with broker.borrow("web") as loan:
            borrowed = loan.as_socket()
            number = borrowed.fileno()
            borrowed.close()
            stranger = os.dup2(0, number)
        os.close(stranger)


@pytest.mark.parametrize("taken_again", [True, False])
def test_a_number_closed_behind_its_socket_closes_no_stranger(
    broker: fdbroker.Broker, taken_again: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        broker.put("web", server)
        with broker.borrow("web") as loan:
            borrowed = loan.as_socket()
            number = borrowed.fileno()
            os.close(number)
            if taken_again:
                os.dup2(0, number)
        assert borrowed.fileno() == -1
    if taken_again:
        os.close(number)
    assert loans(broker) == 0


def test_a_loan_closed_behind_its_back_closes_no_number_twice(broker: fdbroker.Broker) -> None:
    """os.close() of the loan's own number is a mistake, but the loan still comes back."""
    reader, writer = os.pipe()
    broker.put("pipe", reader)
    with broker.borrow("pipe") as loan:
        os.close(loan.fileno())
    assert loans(broker) == 0
    os.close(reader)
    os.close(writer)


def test_a_timeout_that_is_none_is_refused_here(broker, tmp_path):
    with (tmp_path / "file").open("w") as file:
        broker.put("timeout", file)
    for timeout in (-1, float("nan"), -float("inf")):
        with pytest.raises(ValueError, match="at least 0"):
            broker.borrow("timeout", timeout=timeout)
        with pytest.raises(ValueError, match="at least 0"):
            broker.retire("timeout", wait=True, timeout=timeout)
    broker.borrow("timeout", timeout=float("inf")).close()
    broker.retire("timeout", wait=True, timeout=1e300)


def test_a_loan_cannot_be_copied(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    """Two would own one descriptor."""
    broker.put("data", data_file)
    with broker.borrow("data") as loan:
        for way in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied"):
                way(loan)
        os.fstat(loan.fileno())
