"""Received descriptors: each is closed once, and nothing else is."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.ipc.transport import received as owned

NUMBERS = range(300, 312)


@pytest.fixture(scope="module")
def null() -> Iterator[int]:
    number = os.open(os.devnull, os.O_RDONLY)
    yield number
    os.close(number)


def still_open() -> set[int]:
    found = set()
    for number in NUMBERS:
        try:
            os.fstat(number)
        except OSError:
            continue
        found.add(number)
    return found


@given(st.data())
def test_all_that_are_ours_are_closed_and_no_other(null: int, data: st.DataObject) -> None:
    """In whatever order they came, and whichever of them somebody has closed."""
    numbers = tuple(data.draw(st.lists(st.sampled_from(NUMBERS), unique=True)))
    gone = data.draw(st.sets(st.sampled_from(numbers))) if numbers else set()
    strangers = data.draw(st.sets(st.sampled_from(NUMBERS))) - set(numbers)
    for number in {*numbers, *strangers} - gone:
        os.dup2(null, number)
    try:
        owned.close([owned.closing(numbers)])
        assert still_open() == strangers
    finally:
        for number in still_open():
            os.close(number)


def test_what_was_closed_is_not_closed_again(null: int) -> None:
    for number in NUMBERS:
        os.dup2(null, number)
    closing = owned.closing(tuple(NUMBERS))
    owned.close([closing])
    os.dup2(null, NUMBERS[3])
    owned.close([closing])
    assert still_open() == {NUMBERS[3]}
    os.close(NUMBERS[3])


def test_a_message_that_nobody_has_looked_at(null: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        before = os.listdir("/proc/self/fd")
        socket.send_fds(theirs, [b"x"], [null] * 20)
        received = [*itertools.starmap(ours.recvmsg, owned.ONE_MESSAGE_NOW)]
        assert len(os.listdir("/proc/self/fd")) == len(before) + 20
        owned.close(received)
        assert os.listdir("/proc/self/fd") == before
        assert received == []


def test_who_has_given_them_away_closes_none(null: int) -> None:
    for number in NUMBERS:
        os.dup2(null, number)
    received = owned.Numbers([owned.closing(tuple(NUMBERS))])
    owned.give_away(received)
    del received
    assert still_open() == set(NUMBERS)
    os.closerange(NUMBERS[0], NUMBERS[-1] + 1)
