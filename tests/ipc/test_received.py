"""Received descriptors: each is closed once, and nothing else is."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.ipc.transport.received import ReceivedFDs, closer
from fdbroker.ipc.transport.unix_socket import RECEIVE_NOW

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


def owner_of(message: object) -> ReceivedFDs:
    received = ReceivedFDs()
    received.messages.append(message)
    return received


@given(st.data())
def test_all_that_are_ours_are_closed_and_no_other(null: int, data: st.DataObject) -> None:
    """In whatever order they came, and whichever of them somebody has closed."""
    numbers = tuple(data.draw(st.lists(st.sampled_from(NUMBERS), unique=True)))
    gone = data.draw(st.sets(st.sampled_from(numbers))) if numbers else set()
    strangers = data.draw(st.sets(st.sampled_from(NUMBERS))) - set(numbers)
    for number in {*numbers, *strangers} - gone:
        os.dup2(null, number)
    try:
        owner_of(closer(numbers)).close()
        assert still_open() == strangers
    finally:
        for number in still_open():
            os.close(number)


def test_what_was_closed_is_not_closed_again(null: int) -> None:
    for number in NUMBERS:
        os.dup2(null, number)
    first = closer(tuple(NUMBERS))
    owner_of(first).close()
    os.dup2(null, NUMBERS[3])
    owner_of(first).close()
    assert still_open() == {NUMBERS[3]}
    os.close(NUMBERS[3])


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


Pair = tuple[socket.socket, socket.socket]


def test_message_not_parsed_is_closed(null: int, pair: Pair) -> None:
    ours, theirs = pair
    before = os.listdir("/proc/self/fd")
    socket.send_fds(theirs, [b"x"], [null] * 20)
    received = ReceivedFDs()
    received.messages.append(ours.recvmsg(1, 1000, RECEIVE_NOW))
    assert len(os.listdir("/proc/self/fd")) == len(before) + 20
    received.close()
    assert os.listdir("/proc/self/fd") == before
    assert received.messages == []


def test_detached_descriptors_stay_open(null: int) -> None:
    for number in NUMBERS:
        os.dup2(null, number)
    received = owner_of(closer(tuple(NUMBERS)))
    received.detach()
    del received
    assert still_open() == set(NUMBERS)
    os.closerange(NUMBERS[0], NUMBERS[-1] + 1)


@pytest.mark.parametrize("most", [0, 1, 2, 3, 253])
def test_receive_with_gives_numbers_to_no_more_than_allowed(
    null: int, pair: Pair, most: int
) -> None:
    """In a worker thread, as a broker receives; the other descriptors are lost, and it says so."""
    ours, theirs = pair
    before = os.listdir("/proc/self/fd")
    socket.send_fds(theirs, [b"some"], [null] * 3)
    received = ReceivedFDs()
    with ThreadPoolExecutor(1) as worker:
        data = worker.submit(received.receive_with, ours, 100, most, RECEIVE_NOW).result()
    assert data == b"some"
    assert len(received.fds) == min(most, 3)
    assert received.truncated == (most < 3)
    assert all(not os.get_inheritable(number) for number in received.fds)
    assert len(os.listdir("/proc/self/fd")) == len(before) + len(received.fds)
    received.close()
    assert (received.fds, received.truncated) == ((), False)
    assert os.listdir("/proc/self/fd") == before


def test_receive_with_hands_over_its_descriptors(null: int, pair: Pair) -> None:
    ours, theirs = pair
    socket.send_fds(theirs, [b"some"], [null] * 3)
    received = ReceivedFDs()
    with pytest.raises(BlockingIOError):
        received.receive_with(theirs, 100, 253, RECEIVE_NOW)
    received.receive_with(ours, 100, 253, RECEIVE_NOW)
    numbers = received.detach()
    assert len(numbers) == 3
    assert received.fds == ()
    del received
    for number in numbers:
        os.close(number)
