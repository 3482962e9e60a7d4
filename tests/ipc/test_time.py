"""Who takes long is put off: what others see of it, and what becomes of what it is owed."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest
from ruled import ALICE, BOB, Ruled, ask_as, put, rule, session_as
from support import (
    BORROW,
    CANCEL,
    MORE,
    PUT,
    RETURN,
    SHARED,
    Raw,
    cpu_seconds,
    in_fork,
    stopped,
    wait_until,
)

import fdbroker
from fdbroker.ipc import turns
from fdbroker.lender.rules import VERBS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs other uids")

MANY = 4000  # names
EXCLUSIVE = [1, None, ""]
ONCE = 60  # times as long as it takes: in which a test can look, and which ends within it
FOR_EVER = 10**9


def ruled_with(others: int) -> Iterator[Ruled]:
    def plant() -> None:
        turns.OTHERS = others

    with Ruled(plant=plant) as ruled:
        everything = [rule(*VERBS, uid=uid, names=("*", "")) for uid in (ALICE, BOB)]
        ruled.set_rules(*everything)
        ruled.put("x", "y")
        yield ruled
        with fdbroker.Client(ruled.address) as client:
            wait_until(lambda: client.stats()["loans"] == 0)


@pytest.fixture
def patient() -> Iterator[Ruled]:
    """A broker with the entries x and y, where who has taken long once is served no more."""
    yield from ruled_with(FOR_EVER)


@pytest.fixture
def ruled() -> Iterator[Ruled]:
    """One where it is served again."""
    yield from ruled_with(ONCE)


def take_long(raw: Raw, seq: int = 1) -> None:
    """Ask for more than a millisecond's work, and get it."""
    raw.send(BORROW, seq, ["x"] * MANY, *SHARED)
    has_all(raw, seq)


def has_all(raw: Raw, seq: int) -> None:
    """The first part of that has come."""
    message, numbers = raw.receive()
    for number in numbers:
        os.close(number)
    assert message is not None
    assert message[:3] == [0, seq, MANY]


def is_lent(raw: Raw, seq: int) -> None:
    message, (number,) = raw.receive()
    os.close(number)
    assert message is not None
    assert message[:4] == [0, seq, 1, 1]


def test_no_session_of_its_uid_is_served_and_all_others_are(patient: Ruled) -> None:
    with (
        session_as(patient.address, ALICE) as one,
        session_as(patient.address, ALICE) as other,
        session_as(patient.address, BOB) as bobs,
    ):
        take_long(one)
        one.send(MORE, 2, 253)
        other.send(BORROW, 1, "y", *SHARED)
        assert one.is_silent(patient.client)
        os.close(bobs.borrow(1, "x"))
        assert one.is_silent(patient.client)
        assert other.is_silent(patient.client)


def test_it_is_served_again(ruled: Ruled) -> None:
    with (
        session_as(ruled.address, ALICE) as one,
        session_as(ruled.address, ALICE) as other,
        session_as(ruled.address, BOB, hello=False) as newcomer,  # who will be shown out, but later
    ):
        for turn in range(3):
            with session_as(ruled.address, ALICE) as gone:
                take_long(one, 2 * turn + 1)
                for raw in (other, gone):
                    raw.send(BORROW, 2 * turn + 1 if raw is other else 1, "y", *SHARED)
                assert other.is_silent(ruled.client)
            is_lent(other, 2 * turn + 1)
            assert newcomer.is_silent(ruled.client)
            for raw in (one, other):
                raw.send(RETURN, 2 * turn + 2)


def test_what_a_worker_has_received_meanwhile(ruled: Ruled) -> None:
    """It is taken up later, also if nothing more comes."""
    ruled.set_rules(rule(*VERBS, uid=ALICE, names=("*", ""))._replace(quota=(("closes", 2),)))
    with (
        session_as(ruled.address, ALICE) as one,
        session_as(ruled.address, ALICE, puts=True) as puts,
        open(os.devnull) as file,
    ):
        with stopped(ruled.pid):  # so that the worker is not done before the long one is begun
            puts.send(PUT, 1, "new", 0, fds=[file.fileno()])
            one.send(BORROW, 1, ["x"] * MANY, *SHARED)
        message, _ = puts.receive()
        assert message is not None
        assert message[:2] == [0, 1]
        has_all(one, 1)


def test_what_it_is_granted_meanwhile_it_gets_later(ruled: Ruled) -> None:
    with (
        session_as(ruled.address, ALICE) as one,
        session_as(ruled.address, ALICE) as other,
        session_as(ruled.address, BOB) as bobs,
    ):
        bobs.send(BORROW, 1, "y", *EXCLUSIVE)
        is_lent(bobs, 1)
        other.send(BORROW, 1, "y", *EXCLUSIVE)
        wait_until(lambda: ruled.client.stats()["waiting"])
        take_long(one)
        bobs.send(RETURN, 2)
        wait_until(lambda: not ruled.client.stats()["waiting"])
        assert other.is_silent(ruled.client)
        is_lent(other, 1)


def test_who_goes_before_it_is_told_has_returned_its_loan(patient: Ruled) -> None:
    with session_as(patient.address, ALICE) as one, session_as(patient.address, BOB) as bobs:
        with session_as(patient.address, ALICE) as other:
            bobs.send(BORROW, 1, "y", *EXCLUSIVE)
            is_lent(bobs, 1)
            other.send(BORROW, 1, "y", *EXCLUSIVE)
            wait_until(lambda: patient.client.stats()["waiting"])
            take_long(one)
            bobs.send(RETURN, 2)
            wait_until(lambda: not patient.client.stats()["waiting"])
            assert patient.client.loans("y")[0].uid == ALICE
        wait_until(lambda: not patient.client.loans("y"))


def test_death_is_a_return_also_then(patient: Ruled) -> None:
    with session_as(patient.address, ALICE) as other:
        with session_as(patient.address, ALICE) as one:
            take_long(one)
            one.send(RETURN, 2)  # which nobody hears
            assert patient.client.stats()["loans"] == 1
        wait_until(lambda: patient.client.stats()["loans"] == 0)
        assert other.is_silent(patient.client)


def test_a_cancel_that_came_meanwhile(ruled: Ruled) -> None:
    with session_as(ruled.address, ALICE) as one, session_as(ruled.address, ALICE) as other:
        with ruled.client.borrow("y", exclusive=True):
            other.send(BORROW, 1, "y", *EXCLUSIVE)
            wait_until(lambda: ruled.client.stats()["waiting"])
            take_long(one)
            other.send(CANCEL, 2)
            assert other.is_silent(ruled.client)
            assert ruled.client.stats()["waiting"] == 1
            message, _ = other.receive()
            assert message is not None
            assert message[0] == fdbroker.errors.BorrowTimeout.code
        os.close(other.borrow(3, "y"))


def test_what_it_puts_is_entered_later(ruled: Ruled) -> None:
    with (
        session_as(ruled.address, ALICE) as one,
        session_as(ruled.address, ALICE, puts=True) as puts,
        open(os.devnull) as file,
    ):
        take_long(one)
        puts.send(PUT, 1, "new", 0, fds=[file.fileno()])
        assert puts.is_silent(ruled.client)
        message, _ = puts.receive()
        assert message is not None
        assert message[:2] == [0, 1]


def test_who_is_alone_is_put_off_for_nobody(patient: Ruled) -> None:
    patient.client.close()

    def ask() -> None:
        with session_as(patient.address, ALICE) as raw:
            for turn in range(3):
                take_long(raw, 2 * turn + 1)
                raw.send(RETURN, 2 * turn + 2)

    in_fork(ask)


def test_new_rules_are_no_way_to_be_served_sooner(patient: Ruled) -> None:
    with session_as(patient.address, ALICE) as one, session_as(patient.address, ALICE) as other:
        take_long(one)
        other.send(BORROW, 1, "y", *SHARED)
        assert other.is_silent(patient.client)
        patient.set_rules(rule(*VERBS, uid=ALICE), rule("borrow", uid=BOB))
        assert other.is_silent(patient.client)
        assert ask_as(patient.address, lambda client: client.borrow("x").close(), BOB) is None
        assert other.is_silent(patient.client)
        put(patient.client, "z")


def test_nothing_turns_while_it_waits(patient: Ruled) -> None:
    """What cannot be heard makes no events."""
    with session_as(patient.address, ALICE) as one, session_as(patient.address, ALICE) as other:
        take_long(one)
        for raw in (one, other):
            raw.send(CANCEL, 9)
        assert other.is_silent(patient.client)
        before = cpu_seconds(patient.pid)
        select.select([one.sock, other.sock], [], [], 0.5)
        assert cpu_seconds(patient.pid) - before < 0.1
