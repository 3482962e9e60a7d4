"""Descriptors that were sent and not received: the kernel counts them against the broker's uid."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ruled import ALICE, BOB, Ruled, rule, session_as
from support import BORROW, PUT, RETURN, SHARED, Raw, stopped, wait_until

from fdbroker.ipc.server.connection import ServerConnection
from fdbroker.ipc.server.event_loop import SECOND
from fdbroker.ipc.server.sender import Sender
from fdbroker.ipc.server.tuning import TUNING
from fdbroker.lender.accounting import Accounting

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs other uids")

CAROL = 65_000
LIMIT = 100  # of descriptors of the broker, and so of those in flight
HALF = LIMIT // 2
EXCEEDED = 35
LOOK = 0.01  # seconds that one takes


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, LIMIT))


@contextlib.contextmanager
def keeper() -> Iterator[Ruled]:
    """A broker that is not root: the kernel has it send no more than its limit."""
    with Ruled(own_uid=BOB, plant=limited) as broker:
        broker.put("a")
        broker.set_rules(rule("borrow", uid=ALICE), rule("borrow", uid=CAROL))
        yield broker


@pytest.fixture
def ruled() -> Iterator[Ruled]:
    with keeper() as broker:
        yield broker


def in_flight(ruled: Ruled, uid: int = ALICE) -> int:
    return sum(usage.used["inflight"] for usage in ruled.client.usage() if usage.uid == uid)


def borrow(raw: Raw, seq: int, count: int) -> None:
    """Send it, and wait for the answer without reading it."""
    raw.send(BORROW, seq, ["a"] * count, *SHARED)
    assert select.select([raw.sock], [], [], 10)[0]


def receive(raw: Raw, seq: int) -> int:
    """How many descriptors the answer brings; they are closed."""
    message, fds = raw.receive()
    assert message is not None
    for number in fds:
        os.close(number)
    assert message[:2] == [0 if fds else EXCEEDED, seq]
    return len(fds)


def test_who_receives_nothing_has_a_half_at_most(ruled: Ruled) -> None:
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(session_as(ruled.address, ALICE)) for _ in range(8)]
        good = stack.enter_context(session_as(ruled.address, CAROL))
        for place, raw in enumerate(crowd):
            borrow(raw, 1, 20)
            os.close(good.borrow(2 * place + 1, "a"))  # every time
            good.send(RETURN, 2 * place + 2)
        assert in_flight(ruled) == 40
        message, _ = crowd[2].receive()
        assert message == [EXCEEDED, 1, "inflight", 40, HALF]
        assert len(ruled.client.loans()) == 40  # who was refused has nothing on loan
        refused = [line for line in ruled.refusals() if line.startswith(f"{ALICE} ")]
        assert len(refused) == 6
        assert "inflight" in refused[0]
        receive(crowd[0], 1)
        borrow(crowd[2], 2, 20)  # there is room again
        assert receive(crowd[2], 2) == 20
    wait_until(lambda: not ruled.client.loans())
    assert not in_flight(ruled)


def test_what_was_received_is_not_in_flight_though_more_is_unread(ruled: Ruled) -> None:
    with session_as(ruled.address, ALICE) as offender, session_as(ruled.address, ALICE) as other:
        borrow(offender, 1, 40)
        assert receive(offender, 1) == 40
        offender.sock.send(b"\xc1")
        wait_until(lambda: not ruled.client.loans())
        borrow(other, 1, 20)
        assert receive(other, 1) == 20
        assert in_flight(ruled) == 0
        other.send(RETURN, 2)


class Crowd:
    """Connections, of which there are so many that to look at all of them takes time."""

    def __init__(self) -> None:
        self.looks = 0

    def __iter__(self) -> Iterator[ServerConnection]:
        self.looks += 1
        end = time.monotonic() + LOOK
        while time.monotonic() < end:
            pass
        return iter(())


def test_looks_at_what_is_unread_take_a_small_part_of_the_time() -> None:
    """A client that is refused again and again has the broker look at the sessions of all."""
    crowd, loop = Crowd(), SimpleNamespace(now=0)
    sender = Sender(cast(Any, loop), Accounting(8, 8, 8), cast(Any, crowd), TUNING)
    begun = time.monotonic_ns()
    while (took := time.monotonic_ns() - begun) < 100 * LOOK * SECOND:
        loop.now = begun + took
        sender.refresh_unread()
    burst = TUNING.refresh_burst / (TUNING.refresh_rest * LOOK * SECOND)
    assert 1 <= crowd.looks <= 2 + burst + took / (TUNING.refresh_rest * LOOK * SECOND)


def test_it_stays_on_the_account_of_who_was_hung_up_on(ruled: Ruled) -> None:
    with session_as(ruled.address, ALICE) as offender, session_as(ruled.address, ALICE) as other:
        borrow(offender, 1, 40)
        offender.sock.send(b"\xc1")
        wait_until(lambda: any("event=fault" in line for line in ruled.log()))
        wait_until(lambda: not ruled.client.loans())
        assert in_flight(ruled) == 40
        borrow(other, 1, 20)
        assert receive(other, 1) == 0
        assert receive(offender, 1) == 40  # what was sent, it may have
        assert offender.receive()[0] is not None  # why it was hung up on
        wait_until(lambda: in_flight(ruled) == 0)
        borrow(other, 2, 20)
        assert receive(other, 2) == 20
        other.send(RETURN, 3)
        borrow(other, 4, 40)
        other.sock.send(b"\xc1")
        wait_until(lambda: not ruled.client.loans())
        assert in_flight(ruled) == 40
    wait_until(lambda: ALICE not in {usage.uid for usage in ruled.client.usage()})


def test_who_was_hung_up_on_sent_its_own_end(ruled: Ruled) -> None:
    """It is in the broker's queue, and the client is gone: nothing else ends it."""
    ruled.set_rules(rule("borrow", "put", uid=ALICE))
    with session_as(ruled.address, ALICE, puts=True) as offender:
        borrow(offender, 1, 40)
        with stopped(ruled.pid):  # else it might be shut down before the second is sent
            offender.sock.send(b"\xc1")
            offender.send(PUT, 2, "b", 0, fds=[offender.sock.fileno()])
    wait_until(lambda: ALICE not in {usage.uid for usage in ruled.client.usage()})


def test_a_broker_ends_though_something_is_in_flight() -> None:
    with keeper() as ruled:
        raw = session_as(ruled.address, ALICE)
        borrow(raw, 1, 40)
        raw.sock.send(b"\xc1")
        wait_until(lambda: not ruled.client.loans())
    with raw:
        assert receive(raw, 1) == 40
