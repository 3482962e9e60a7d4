"""The end of an entry: retire, retire and wait, replace, ephemeral."""

from __future__ import annotations

import os
import signal
import time
from typing import IO

import pytest
from support import Peer, hold, kept, let_go, wait_until

import fdbroker
from fdbroker.errors import (
    ClosedClientError,
    NameTaken,
    RetireTimeout,
    UnknownEntry,
    WouldDeadlock,
)


def names(broker: fdbroker.Client) -> list[str]:
    return [entry.name for entry in broker.entries()]


def is_at_end(reader: int) -> bool:
    """Whether nobody has the write end any more."""
    os.set_blocking(reader, False)
    try:
        return os.read(reader, 1) == b""
    except BlockingIOError:
        return False


def put_pipe(broker: fdbroker.Client, name: str) -> int:
    """An entry whose close can be seen: the read end of its pipe."""
    reader, writer = os.pipe()
    broker.put(name, writer)
    os.close(writer)
    return reader


def test_without_loans_it_closes_at_once(broker: fdbroker.Broker) -> None:
    reader = put_pipe(broker, "pipe")
    assert not is_at_end(reader)
    broker.retire("pipe")
    with pytest.raises(UnknownEntry):
        broker.borrow("pipe")
    wait_until(lambda: is_at_end(reader))
    wait_until(lambda: names(broker) == [])
    os.close(reader)


def test_the_last_return_closes(broker: fdbroker.Broker) -> None:
    reader = put_pipe(broker, "pipe")
    one, other = broker.borrow("pipe"), broker.borrow("pipe")
    broker.retire("pipe")
    with pytest.raises(UnknownEntry):
        broker.borrow("pipe")
    assert [(entry.name, entry.loans) for entry in broker.entries()] == [("pipe", 2)]
    assert len(broker.loans("pipe")) == 2
    one.close()
    assert [entry.loans for entry in broker.entries()] == [1]
    os.write(other.fileno(), b"still")
    assert os.read(reader, 9) == b"still"
    assert not is_at_end(reader)
    other.close()
    wait_until(lambda: is_at_end(reader))
    os.close(reader)


def retire(address: str, timeout: float | None = None) -> None:
    with fdbroker.Client(address) as client:
        client.retire("pipe", wait=True, timeout=timeout)


def test_with_wait_it_comes_back_after_the_close(broker: fdbroker.Broker, peer: Peer) -> None:
    reader = put_pipe(broker, "pipe")
    loan = broker.borrow("pipe")
    peer.start(retire, broker.address)
    wait_until(lambda: _is_retired(broker))
    assert not peer.is_done()
    loan.close()
    peer.result()
    assert is_at_end(reader)
    os.close(reader)


def _is_retired(broker: fdbroker.Client) -> bool:
    try:
        broker.borrow("pipe", timeout=0).close()
    except UnknownEntry:
        return True
    return False


def test_with_wait_and_without_loans_it_is_closed_then(broker: fdbroker.Broker) -> None:
    for _ in range(20):
        reader = put_pipe(broker, "pipe")
        broker.retire("pipe", wait=True)
        assert is_at_end(reader)
        os.close(reader)


def test_waiting_for_ones_own_loan_is_refused(broker: fdbroker.Broker) -> None:
    reader = put_pipe(broker, "pipe")
    with broker.borrow("pipe"):
        with pytest.raises(WouldDeadlock):
            broker.retire("pipe", wait=True)
        broker.borrow("pipe").close()  # nothing was changed
    broker.retire("pipe", wait=True)
    os.close(reader)


def test_the_wait_has_a_timeout(broker: fdbroker.Broker, peer: Peer) -> None:
    reader = put_pipe(broker, "pipe")
    peer.call(hold, broker.address, "pipe")
    for timeout in (0, 0.1):
        before = time.monotonic()
        if not _is_retired(broker):
            with pytest.raises(RetireTimeout) as caught:
                broker.retire("pipe", wait=True, timeout=timeout)
            assert (caught.value.name, caught.value.loans) == ("pipe", 1)
            assert timeout <= time.monotonic() - before < 2
        assert _is_retired(broker)
        assert not is_at_end(reader)
    peer.call(let_go)
    wait_until(lambda: is_at_end(reader))
    os.close(reader)


def test_the_name_is_free_at_once(broker: fdbroker.Broker) -> None:
    old = put_pipe(broker, "pipe")
    with broker.borrow("pipe") as loan:
        broker.retire("pipe")
        new = put_pipe(broker, "pipe")
        assert [entry.name for entry in broker.entries()] == ["pipe", "pipe"]
        assert not is_at_end(old)
        os.fstat(loan.fileno())
    wait_until(lambda: is_at_end(old))
    assert not is_at_end(new)
    os.close(old)
    os.close(new)


def test_replace(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    first = put_pipe(broker, "name")
    with pytest.raises(NameTaken) as caught:
        broker.put("name", data_file)
    assert caught.value.data == ("name",)
    with broker.borrow("name") as old:
        generation = broker.put("name", data_file, replace=True)
        assert generation > 1
        with broker.borrow("name") as new:
            assert os.path.sameopenfile(new.fileno(), data_file.fileno())
        os.write(old.fileno(), b"x")
        os.read(first, 1)
        assert not is_at_end(first)
    wait_until(lambda: is_at_end(first))
    # The broker learns a little later that its worker has closed the pipe.
    wait_until(lambda: [entry.generation for entry in broker.entries()] == [generation])
    os.close(first)


def put_ephemeral(address: str, close: bool) -> None:
    client = fdbroker.Client(address)
    reader, writer = os.pipe()
    client.put("mine", writer, ephemeral=True)
    os.close(writer)
    os.close(reader)
    if close:
        client.close()
    else:
        kept["client"] = client


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("kill", [False, True])
def test_ephemeral_ends_with_the_process_that_put_it(
    broker: fdbroker.Broker, close: bool, kill: bool
) -> None:
    with Peer() as peer:
        peer.call(put_ephemeral, broker.address, close)
        assert names(broker) == ["mine"]
        broker.borrow("mine").close()
        if kill:
            peer.kill()
    wait_until(lambda: names(broker) == [])


def test_ephemeral_does_not_live_on_in_a_forked_child(broker: fdbroker.Broker, peer: Peer) -> None:
    child = peer.call(put_and_fork, broker.address)
    assert names(broker) == ["mine"]
    peer.kill()
    try:
        wait_until(lambda: names(broker) == [])
    finally:
        os.kill(child, signal.SIGKILL)


def put_and_fork(address: str) -> int:
    put_ephemeral(address, False)
    pid = os.fork()
    while pid == 0:
        signal.pause()
    return pid


def test_a_closed_client_says_so(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    client = fdbroker.Client(broker.address)
    broker.put("data", data_file)
    loan = client.borrow("data")
    client.close()
    for verb in (
        lambda: client.put("x", data_file),
        lambda: client.borrow("data"),
        lambda: client.share(data_file),
        client.entries,
        client.stats,
    ):
        with pytest.raises(ClosedClientError):
            verb()
    os.fstat(loan.fileno())
    loan.close()
    wait_until(lambda: broker.stats()["loans"] == 0)
    client.close()


def test_a_retired_entry_is_told_from_the_one_that_replaced_it(broker: fdbroker.Broker) -> None:
    os.close(put_pipe(broker, "pipe"))
    with broker.borrow("pipe"):
        (old,) = broker.entries()
        reader, writer = os.pipe()
        new = broker.put("pipe", writer, replace=True)
        os.close(writer)
        with broker.borrow("pipe"):
            told = {entry.generation: entry.retired for entry in broker.entries()}
            assert told == {old.generation: True, new: False}
            assert [loan.generation for loan in broker.loans("pipe")] == [old.generation, new]
    broker.retire("pipe")
    os.close(reader)
