"""Loans, finalizers and a client's end in the hands of several threads."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import IO, Any

import pytest
from places import Tracer, every_place
from support import PATIENCE, targets, wait_until

import fdbroker
from fdbroker.errors import ClosedLoanError
from fdbroker.ipc.client import fork
from fdbroker.ipc.client import loan as loan_module
from fdbroker.ipc.client.pool import disconnect_all


def is_waiting(thread: threading.Thread) -> bool:
    """Whether it sleeps in the kernel: here, for the gate (proc_pid_stat(5))."""
    try:
        with open(f"/proc/self/task/{thread.native_id}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "S"
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return False


def has_ended(thread: threading.Thread) -> bool:
    """Also for the kernel."""
    return not os.path.exists(f"/proc/self/task/{thread.native_id}")


@contextlib.contextmanager
def closed_meanwhile(loan: fdbroker.Loan, verb: Callable[[], Any]) -> Iterator[list[Any]]:
    """`verb` of another thread waits for the gate while the loan is closed, and its number is a
    stranger's: what it returned or raised, after the block."""
    said: list[Any] = []

    def call() -> None:
        try:
            said.append(verb())
        except Exception as error:
            said.append(error)

    with tempfile.TemporaryFile() as stranger:
        stranger.write(b"stranger" * 512)
        stranger.flush()
        thread = threading.Thread(target=call)
        with fork.deferred_cleanup, fork.FORK_LOCK:
            thread.start()
            wait_until(lambda: is_waiting(thread))
            number = loan.fileno()
            loan.close()
            assert os.dup2(stranger.fileno(), number, inheritable=False) == number
        thread.join()
        yield said
        os.close(number)


@pytest.mark.parametrize("verb", ["mmap", "open", "as_socket", "pass_fds", "detach"])
def test_a_verb_that_another_thread_closes_meanwhile(
    broker: fdbroker.Broker, data_file: IO[bytes], verb: str
) -> None:
    broker.put("data", data_file)
    loan = broker.borrow("data")
    with closed_meanwhile(loan, getattr(loan, verb)) as said:
        assert [type(one) for one in said] == [ClosedLoanError]


def test_two_threads_close_one_loan(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file)
    for _ in range(50):
        loan, other = broker.borrow("data"), broker.borrow("data")
        barrier = threading.Barrier(2)

        def close(loan: fdbroker.Loan = loan, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            loan.close()

        threads = [threading.Thread(target=close) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.fstat(other.fileno())
        assert broker.stats()["loans"] == 1
        other.close()


def test_what_a_finalizer_left_fails_in_no_other_call(
    broker: fdbroker.Broker, data_file: IO[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: ignored.append(found.exc_value))
    done: list[str] = []

    def fail() -> None:
        raise ZeroDivisionError

    broker.put("data", data_file)
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with fork.deferred_cleanup, fork.FORK_LOCK:
            held.set()
            fork.FORK_LOCK.acquire()  # so it is not left when this thread catches up
            go.wait()
        fork.FORK_LOCK.release()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    fork.run_or_defer(fail)
    fork.run_or_defer(lambda: done.append("the next one"))
    assert done == []
    go.set()
    thread.join()
    broker.borrow("data").close()
    assert [type(error) for error in ignored] == [ZeroDivisionError]
    assert done == ["the next one"]


def test_a_dropped_loan_that_is_long_to_flush_holds_up_nobody(broker: fdbroker.Broker) -> None:
    """Its file has more buffered than the pipe takes; the others need the gate meanwhile."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    broker.put("pipe", writer)
    os.write(writer, bytes(4096))
    os.close(writer)
    warnings.simplefilter("ignore", ResourceWarning)
    kept: list[IO[bytes]] = []

    def drop() -> None:
        loan = broker.borrow("pipe")
        kept.append(loan.open("wb"))
        kept[0].write(b"last")

    thread = threading.Thread(target=drop)
    thread.start()
    wait_until(lambda: kept and is_waiting(thread))
    broker.borrow("pipe").close()
    assert thread.is_alive()
    got = b""
    while not got.endswith(b"last"):
        got += os.read(reader, 4096)
    thread.join()
    assert kept[0].closed
    # its session has ended, but another one can be served before that is seen
    wait_until(lambda: broker.stats()["loans"] == 0)
    os.close(reader)


def test_a_session_given_back_while_its_client_closes_ends(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    before = targets()["socket"]
    client = fdbroker.Client(broker.address)

    class Late(deque[Any]):
        def append(self, session: Any) -> None:
            client.close()  # another thread does so, just now
            super().append(session)

    loan = client.borrow("data")
    client._pool.idle = Late()
    loan.close()
    assert targets()["socket"] == before


def test_what_a_long_loan_made_and_closed_is_forgotten(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    with broker.borrow("data") as loan:
        for _ in range(100):
            loan.open("rb").close()
            loan.mmap().close()
        made = loan._session.wrappers
        assert made is not None
        assert len(made._sockets) == len(made._files) == len(made._mappings) == 0


def test_a_file_made_of_a_socket_does_not_keep_it_open(broker: fdbroker.Broker) -> None:
    """`socket.close` leaves the close to the last file of `makefile`; the loan does not wait."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = socket.create_connection(server.getsockname())
        here, _ = server.accept()
    with here:
        broker.put("connection", here)
    with broker.borrow("connection") as loan:
        file = loan.as_socket().makefile("rb")
    broker.retire("connection", wait=True)
    there.settimeout(20)
    assert there.recv(1) == b""
    there.close()
    file.close()


def test_the_owners_own_loans_do_not_hold_up_the_end_of_its_broker(data_file: IO[bytes]) -> None:
    with fdbroker.Broker(drain=1000) as private:
        private.put("data", data_file)
        loan, mapped = private.borrow("data"), private.borrow("data")
        mapping = mapped.mmap()
        mapped.close()
    assert os.pread(loan.fileno(), 1, 7) == b"\7"
    loan.close()
    assert mapping[7] == 7
    mapping.close()


def test_what_a_broker_ends_with_is_listed_under_the_gate(broker: fdbroker.Broker) -> None:
    """Else another thread may add a session to the list meanwhile."""
    thread = threading.Thread(target=disconnect_all, args=("/nowhere",))
    with fork.deferred_cleanup, fork.FORK_LOCK:
        thread.start()
        wait_until(lambda: is_waiting(thread))
    thread.join()


def test_a_loan_that_outlives_its_broker(data_file: IO[bytes]) -> None:
    with fdbroker.Broker() as private:
        private.put("data", data_file)
        loan = private.borrow("data")
    with loan:
        assert loan.pass_fds() == (loan.fileno(),)
        assert os.pread(loan.fileno(), 3, 0) == b"\0\1\2"


def test_a_loan_can_be_shown_while_another_thread_closes_it(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)

    def act(tracer: Tracer) -> None:
        loan = broker.borrow("data")
        tracer.when, tracer.at, tracer.meanwhile = tracer.at, -1, loan.close
        with tracer.running():
            assert repr(loan).startswith("<Loan of data, ")
        loan.close()
        tracer.raised = tracer.acted

    assert every_place(loan_module.__file__, act) >= 10


def test_a_socket_that_is_made_while_another_thread_closes_the_loan_is_closed_too(
    broker: fdbroker.Broker,
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        broker.put("socket", made)

    def act(tracer: Tracer) -> None:
        loan = broker.borrow("socket")
        thread = threading.Thread(target=loan.close)

        def close() -> None:
            thread.start()
            wait_until(lambda: has_ended(thread) or is_waiting(thread))

        tracer.when, tracer.at, tracer.meanwhile = tracer.at, -1, close
        made: list[socket.socket] = []
        with contextlib.suppress(ClosedLoanError), tracer.running():
            made.append(loan.as_socket())
        if tracer.acted:
            thread.join()
        loan.close()
        assert [sock.fileno() for sock in made] in ([], [-1])
        tracer.raised = tracer.acted

    assert every_place(loan_module.__file__, act) >= 10


THREADS_BEHIND = """
import os, sys, threading
go_on = threading.Event()
def start_one():
    threading.Thread(target=go_on.wait, daemon=True).start()
if sys.argv[1] == "hook":  # which comes before ours, as it is there before
    os.register_at_fork(after_in_child=start_one)
import fdbroker
from fdbroker.ipc.client import fork
idle = [threading.Thread(target=go_on.wait, daemon=True) for _ in range(3)]
for thread in idle:
    thread.start()
assert fork.other_threads() == 3
if pid := os.fork():
    assert os.waitpid(pid, 0)[1] == 0
    assert fork.other_threads() == 3
else:
    hooked = sys.argv[1] == "hook"
    assert (fork.other_threads() > 0) == hooked, fork.other_threads()
    if not hooked:
        thread = threading.Thread(target=go_on.wait, daemon=True)
        thread.start()
        while not fork.other_threads():
            pass
        if pid := os.fork():
            assert os.waitpid(pid, 0)[1] == 0
            go_on.set()
            thread.join()
            while fork.other_threads():
                pass
        else:
            assert fork.other_threads() == 0
            os._exit(0)
    os._exit(0)
go_on.set()
"""


@pytest.mark.parametrize("case", ["", "hook"])
def test_threads_that_stayed_with_the_parent_are_not_the_childs(case: str) -> None:
    """Which borrows as a process with one thread does, unless it has started others."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", THREADS_BEHIND, case]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
