"""Shared and exclusive between processes, and the waiting for a turn."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import IO

import pytest
from support import Peer, give_back, hold, let_go, stopped, wait_until

import fdbroker
from fdbroker.errors import BorrowTimeout, BrokerGone, EntryRetired, WouldDeadlock

SIOCOUTQ = 0x5411  # asm-generic/ioctls.h: what the peer has not read


@pytest.fixture
def other() -> Iterator[Peer]:
    with Peer() as process:
        yield process


@pytest.fixture(autouse=True)
def entry(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file)


def waiting(broker: fdbroker.Client) -> int:
    return broker.stats()["waiting"]


def test_shared_loans_run_together(broker: fdbroker.Broker, peer: Peer) -> None:
    peer.call(hold, broker.address, "data")
    with broker.borrow("data", timeout=0):
        assert sorted(loan.pid for loan in broker.loans()) == sorted([os.getpid(), peer.pid])
    peer.call(let_go)


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (True, True)])
def test_an_exclusive_loan_runs_alone(
    broker: fdbroker.Broker, peer: Peer, first: bool, second: bool
) -> None:
    peer.call(hold, broker.address, "data", first)
    before = time.monotonic()
    with pytest.raises(BorrowTimeout) as caught:
        broker.borrow("data", exclusive=second, timeout=0)
    assert time.monotonic() - before < 1
    ((pid, uid, held, exclusive),) = caught.value.holders
    assert (pid, uid, exclusive) == (peer.pid, os.getuid(), first)
    assert 0 <= held < 20
    assert f"held by pid {peer.pid}" in str(caught.value)
    peer.call(let_go)
    broker.borrow("data", exclusive=second, timeout=5).close()


def test_the_timeout_is_kept(broker: fdbroker.Broker, peer: Peer) -> None:
    peer.call(hold, broker.address, "data", True)
    before = time.monotonic()
    with pytest.raises(BorrowTimeout, match=r"is busy after 0\.2") as caught:
        broker.borrow("data", timeout=0.2)
    assert 0.2 <= time.monotonic() - before < 1.5
    assert 0.2 <= caught.value.seconds < 1.5
    assert isinstance(caught.value, TimeoutError)
    assert waiting(broker) == 0
    peer.call(let_go)


def test_a_turn_that_comes_in_time_is_taken(broker: fdbroker.Broker, peer: Peer) -> None:
    with broker.borrow("data"):
        peer.start(hold, broker.address, "data", True, 30.0)
        wait_until(lambda: waiting(broker) == 1)
        assert not peer.is_done()
    peer.result()
    (loan,) = broker.loans()
    assert (loan.pid, loan.exclusive) == (peer.pid, True)
    peer.call(let_go)


def test_turns_come_in_order(broker: fdbroker.Broker, peer: Peer, other: Peer) -> None:
    """An exclusive one who waits holds back a shared one who came later."""
    first = broker.borrow("data")
    peer.start(hold, broker.address, "data", True)
    wait_until(lambda: waiting(broker) == 1)
    other.start(hold, broker.address, "data", False)
    wait_until(lambda: waiting(broker) == 2)
    with pytest.raises(BorrowTimeout):
        broker.borrow("data", timeout=0)
    first.close()
    peer.result()
    assert not other.is_done()
    peer.call(give_back)
    other.result()
    assert [loan.pid for loan in broker.loans()] == [other.pid]
    other.call(let_go)


def test_death_is_a_return(broker: fdbroker.Broker, peer: Peer, other: Peer) -> None:
    peer.call(hold, broker.address, "data", True)
    other.start(hold, broker.address, "data", True)
    wait_until(lambda: waiting(broker) == 1)
    peer.kill()
    other.result()
    other.call(let_go)


def test_who_dies_waiting_holds_up_nobody(broker: fdbroker.Broker, peer: Peer, other: Peer) -> None:
    with broker.borrow("data"):
        peer.start(hold, broker.address, "data", True)
        wait_until(lambda: waiting(broker) == 1)
        other.start(hold, broker.address, "data")
        wait_until(lambda: waiting(broker) == 2)
        peer.kill()
        other.result()
    other.call(let_go)


def test_waiting_for_oneself_is_refused(broker: fdbroker.Broker) -> None:
    with broker.borrow("data", exclusive=True):
        for exclusive in (True, False):
            with pytest.raises(WouldDeadlock) as caught:
                broker.borrow("data", exclusive=exclusive)
            assert caught.value.data == ("data", os.getpid())
    broker.borrow("data", exclusive=True).close()


def test_several_at_once_or_none(broker: fdbroker.Broker, peer: Peer, data_file: IO[bytes]) -> None:
    broker.put("more", data_file)
    peer.call(hold, broker.address, "more", True)
    with pytest.raises(BorrowTimeout) as caught:
        broker.borrow_all(["data", "more"], exclusive=True, timeout=0)
    assert caught.value.name == "more"
    broker.borrow("data", exclusive=True, timeout=5).close()
    peer.call(let_go)
    broker.borrow_all(["data", "more"], exclusive=True, timeout=5).close()


def test_retired_while_it_was_waited_for(broker: fdbroker.Broker, peer: Peer) -> None:
    with broker.borrow("data"):
        peer.start(hold, broker.address, "data", True)
        wait_until(lambda: waiting(broker) == 1)
        broker.retire("data")
        with pytest.raises(EntryRetired) as caught:
            peer.result()
        assert caught.value.data == ("data",)


def test_a_stopped_broker_is_given_up(
    broker: fdbroker.Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's own timer: CANCEL after the deadline and a grace, then it ends the session."""
    monkeypatch.setattr("fdbroker.ipc.client.connection.GRACE_SECONDS", 0.2)
    broker.stats()
    with stopped(broker.pid):
        before = time.monotonic()
        with pytest.raises((BrokerGone, BorrowTimeout)):
            broker.borrow("data", timeout=0.1)
        assert 0.1 < time.monotonic() - before < 5
    wait_until(lambda: broker.stats()["loans"] == 0)
    broker.borrow("data", exclusive=True, timeout=5).close()


def test_a_grant_that_crosses_a_cancel_stands(
    broker: fdbroker.Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fdbroker.ipc.client.connection.GRACE_SECONDS", 0.5)
    broker.stats()
    link = broker._pool.idle[-1].link  # the one that the borrow will take

    def unread() -> int:
        return int(struct.unpack("i", fcntl.ioctl(link, SIOCOUTQ, bytes(4)))[0])

    with stopped(broker.pid):
        found: list[fdbroker.Loan] = []
        thread = threading.Thread(target=lambda: found.append(broker.borrow("data", timeout=0.0)))
        thread.start()
        one = wait_until(unread)
        wait_until(lambda: unread() == 2 * one)  # the borrow and its cancel
    thread.join()
    with found.pop() as loan:
        os.fstat(loan.fileno())
        assert broker.stats()["loans"] == 1
    wait_until(lambda: broker.stats()["loans"] == 0)


def test_a_return_never_waits_for_a_stopped_broker(broker: fdbroker.Broker) -> None:
    held = [broker.borrow("data") for _ in range(3)]
    full = held[0]._session.link
    with stopped(broker.pid):
        with contextlib.suppress(BlockingIOError):
            while True:  # until its queue is full of messages, [RETURN, 0], that will be ignored
                full.send(b"\x92\x03\x00", socket.MSG_DONTWAIT)
        before = time.monotonic()
        for loan in held:
            loan.close()
        assert time.monotonic() - before < 2
    wait_until(lambda: broker.stats()["loans"] == 0)


def test_the_purpose_is_shown(broker: fdbroker.Broker) -> None:
    with broker.borrow("data", purpose="to see whether it is"):
        (loan,) = broker.loans("data")
        assert loan.purpose == "to see whether it is"
        assert loan.process
        assert abs(loan.since - time.time()) < 20
