"""The one owner of received descriptors: it has a list that `recvmsg` itself fills, within C.

    received.messages.extend(starmap(sock.recvmsg, recvmsg_arguments(size, max_fds, flags)))

A signal handler may raise between any two bytecodes.  It finds a message either not yet received
or in the list already, and so it finds no descriptor without an owner.

A message that was taken apart is replaced in the list, in one step, by its *closer*: an iterator
that closes one run of consecutive numbers each time it is advanced (close_range(2)).  It is
advanced in C too, so neither a signal nor a second thread can come between the taking of the right
to close a number and its close, and closing a second time closes nothing.

Both ends of a session use this class, and nothing else parses SCM_RIGHTS.  A client keeps one
`ReceivedFDs` per session, for several messages; a broker makes one for each message that brings
descriptors (`receive_with`), also in a worker thread.

For speed, the fast path of a borrow (client/borrow.py) replaces a message of the usual form by its
closer itself, and the fast path of `Loan.close` empties the list itself.
"""

from __future__ import annotations

import _socket
import os
import struct
from _operator import sub  # `operator` would add to the start of `fdbroker exec`
from collections.abc import Iterator
from itertools import count, groupby, starmap

from fdbroker.ipc.transport.unix_socket import INT, LOST, SCM_RIGHTS, SOL_SOCKET

TYPE_CHECKING = False  # importing `typing` would add to the start of `fdbroker exec`
if TYPE_CHECKING:
    from typing import Any

    Message = tuple[bytes, list[tuple[int, int, bytes]], int, Any]  # what recvmsg returns
    Closer = Iterator[object]

Arguments = tuple[tuple[int, int, int]]


def recvmsg_arguments(size: int, max_fds: int, flags: int) -> Arguments:
    """Return the arguments of recvmsg, ready for `starmap`.

    They receive a message of at most `size` bytes, and at least `max_fds` descriptors: the space
    of an odd number has room for one more.
    """
    return ((size, _socket.CMSG_SPACE(max_fds * INT.size), flags),)


def exact_room(max_fds: int) -> int:
    """Return how many bytes of ancillary data have room for no more than `max_fds` descriptors."""
    return _socket.CMSG_LEN(max_fds * INT.size) if max_fds else 0


def closer(fds: tuple[int, ...]) -> Closer:
    """Return an iterator that closes `fds` as it is advanced, one run of numbers at each step."""
    if fds and fds == tuple(range(fds[0], fds[0] + len(fds))):
        # Nearly always they are one run, and this test is faster than the search for runs.
        return starmap(os.closerange, ((fds[0], fds[-1] + 1),))
    runs, start = [], 0
    for _, run in groupby(map(sub, fds, count())):  # the difference is constant within a run
        end = start + len(list(run))
        runs.append((fds[start], fds[end - 1] + 1))
        start = end
    return starmap(os.closerange, runs)


class ReceivedFDs:
    """Owns the descriptors of received messages until they are closed or detached.

    When it is dropped it closes what it still owns, whatever became of the session.

    messages: what is owned, each as recvmsg returned it, or the closer in its place.
    fds, truncated: of the message that `receive_with` received, while it is owned.
    """

    __slots__ = ("fds", "messages", "truncated")

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.fds: tuple[int, ...] = ()
        self.truncated = False

    def receive_with(self, sock: _socket.socket, size: int, max_fds: int, flags: int) -> bytes:
        """Receive one message of at most `size` bytes and own its descriptors, `fds`.

        No more than `max_fds` of them get numbers.  The kernel closes the others during the call,
        which can take long, and then `truncated` is true.  Returns the bytes; raises OSError,
        BlockingIOError among it, if nothing was received.
        """
        data, _ = self.receive_exactly(sock, size, exact_room(max_fds), flags)
        return data

    def receive_exactly(
        self, sock: _socket.socket, size: int, room: int, flags: int
    ) -> tuple[bytes, bool]:
        """Receive as `receive_with` does, with so many bytes of room for ancillary data.

        Returns the bytes, and whether there was ancillary data of any kind.
        """
        self.messages.extend(starmap(sock.recvmsg, ((size, room, flags),)))
        brought = bool(self.messages[-1][1])
        data, self.fds, self.truncated = self.parse_last()
        return data, brought

    def parse_last(self) -> tuple[bytes, tuple[int, ...], bool]:
        """Take apart the message that came last; its descriptors stay owned.

        Returns its bytes, its descriptors, and whether others were lost on the way (MSG_CTRUNC).
        """
        message: Message = self.messages[-1]
        data, ancillary, flags, _ = message
        fds = _fds_in(ancillary)
        self.messages[-1] = closer(fds)
        return data, fds, bool(flags & LOST)

    def close(self, start: int = 0) -> None:
        """Close what came with the messages from index `start` on, each number once.

        Those messages are removed from the list.  A number that something else has closed already
        is passed over.
        """
        messages = self.messages
        for place in range(start, len(messages)):
            if isinstance(messages[place], tuple):
                messages[place] = closer(_fds_in(messages[place][1]))
            while True:
                try:
                    any(messages[place])
                    break
                except OSError:
                    # This number is gone (close(2): never retry), so go on with the next one.
                    continue
        del messages[start:]
        self.fds, self.truncated = (), False

    def detach(self) -> tuple[int, ...]:
        """Give up the ownership of everything; returns `fds`, which the caller must close."""
        fds = self.fds
        self.messages.clear()
        self.fds, self.truncated = (), False
        return fds

    def __del__(self) -> None:
        if getattr(self, "messages", None):  # an interrupted constructor may not have set it
            self.close()


def _fds_in(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, ...]:
    return tuple(
        fd
        for level, kind, data in ancillary
        if level == SOL_SOCKET and kind == SCM_RIGHTS
        for (fd,) in struct.iter_unpack(INT.format, data[: len(data) // INT.size * INT.size])
    )
