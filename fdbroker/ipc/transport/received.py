"""Who owns received descriptors: a list that `recvmsg` itself fills, within one call into C.

    owned.extend(starmap(sock.recvmsg, ONE_MESSAGE))

A signal handler that raises finds a message either not received or in the list.  Once looked at,
a message is replaced there, in one step, by an iterator that closes one of its descriptors each
time it is advanced, or a run of numbers that follow each other (close_range(2)).  It is advanced in
C: so neither a signal nor a second thread can come between the taking of a right to close and the
close, and to close again closes nothing.
"""

from __future__ import annotations

import _socket
import os
import struct
from _operator import sub  # of `operator`, which costs too much at a start
from collections.abc import Iterator
from itertools import count, groupby, starmap

from fdbroker.ipc.protocol.messages import MESSAGE_BYTES, REPLY_BYTES
from fdbroker.ipc.transport.unix import ANCILLARY_BYTES, INT, LOST, RECEIVE, RECEIVE_NOW, SCM_RIGHTS
from fdbroker.ipc.transport.unix import SOL_SOCKET as SOCKET

TYPE_CHECKING = False  # as a type checker knows it: `typing` costs too much at a start
if TYPE_CHECKING:
    from typing import Any

    Message = tuple[bytes, list[tuple[int, int, bytes]], int, Any]  # as recvmsg returns it
    Closing = Iterator[object]
    Owned = list[Any]  # of Message, or Closing in its place

# the arguments of recvmsg, ready for `starmap`
Arguments = tuple[tuple[int, int, int]]
ONE_MESSAGE = ((REPLY_BYTES, ANCILLARY_BYTES, RECEIVE),)
ONE_MESSAGE_NOW = ((REPLY_BYTES, ANCILLARY_BYTES, RECEIVE_NOW),)
ONE_PAGE = ((MESSAGE_BYTES, ANCILLARY_BYTES, RECEIVE),)
ONE_PAGE_NOW = ((MESSAGE_BYTES, ANCILLARY_BYTES, RECEIVE_NOW),)


class Numbers(list):  # type: ignore[type-arg]  # of anything: it is an `Owned`
    """An `Owned` that closes what is left in it when it goes, whatever became of its session."""

    __slots__ = ()

    def __del__(self) -> None:
        close(self)


def message_with(descriptors: int) -> Arguments:
    """The same for a message that brings so many descriptors: more are lost on the way."""
    return ((REPLY_BYTES, _socket.CMSG_SPACE(descriptors * INT.size), RECEIVE),)


def look_at_last(owned: Owned) -> tuple[bytes, tuple[int, ...], bool]:
    """The message that came last: its bytes, its descriptors, whether any was lost on the way."""
    message: Message = owned[-1]
    data, _, flags, _ = message
    owned[-1], numbers = _rights(message)
    return data, numbers, bool(flags & LOST)


def closing(numbers: tuple[int, ...]) -> Closing:
    """What closes them as it is advanced, each run at once: 32 in a third of the time."""
    if numbers and numbers == tuple(range(numbers[0], numbers[0] + len(numbers))):
        # one run, as nearly always: to see that at once takes half as long as to look for runs
        return starmap(os.closerange, ((numbers[0], numbers[-1] + 1),))
    runs, start = [], 0
    for _, run in groupby(map(sub, numbers, count())):  # alike where they follow each other
        end = start + len(list(run))
        runs.append((numbers[start], numbers[end - 1] + 1))
        start = end
    return starmap(os.closerange, runs)


def _rights(message: Message) -> tuple[Closing, tuple[int, ...]]:
    numbers = tuple(
        number
        for level, kind, data in message[1]
        if level == SOCKET and kind == SCM_RIGHTS
        for (number,) in struct.iter_unpack(INT.format, data[: len(data) // INT.size * INT.size])
    )
    return closing(numbers), numbers


def close(owned: Owned, start: int = 0) -> None:
    """Close what is owned from that place on, each number once; the list ends there then.

    A number that somebody else closed is passed over.
    """
    for place in range(start, len(owned)):
        if isinstance(owned[place], tuple):
            owned[place], _ = _rights(owned[place])
        while True:
            try:
                any(owned[place])
                break
            except OSError:  # that one is gone (close(2): never retry), go on with the others
                continue
    del owned[start:]


def give_away(owned: Owned) -> None:
    """The numbers are the caller's from now on."""
    owned.clear()


class ReceivedFDs:
    """Temporary: replaced at the merge."""

    def __init__(self) -> None:
        from fdbroker.ipc.transport.unix import Inbox

        self._inbox: Any = Inbox()

    def receive(self, sock: Any, size: int, most: int) -> bytes:
        from fdbroker.ipc.transport import unix

        buffer = bytearray(size)
        got, inbox = unix.receive_into(sock, buffer, unix.room_for(most))
        if inbox is not None:
            self._inbox = inbox
        return bytes(buffer[:got])

    @property
    def fds(self) -> list[int]:
        return list(self._inbox.fds)

    @property
    def truncated(self) -> bool:
        return bool(self._inbox.truncated)

    def detach(self) -> list[int]:
        return list(self._inbox.give_away())

    def close(self) -> None:
        self._inbox.close()
