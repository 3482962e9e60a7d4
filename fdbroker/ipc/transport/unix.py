"""The broker's half of AF_UNIX sockets: how they are asked, what messages bring, how they end.

The rules for both ends are in unix_socket.py.  Received descriptors are owned by an `Inbox`, in a
process whose signal handlers raise nothing.
"""

from __future__ import annotations

import _socket
import errno
import os
import struct
from collections.abc import Iterator
from contextlib import suppress

from fdbroker.ipc.transport.unix_socket import ANCILLARY_BYTES as ANCILLARY_BYTES
from fdbroker.ipc.transport.unix_socket import INT as INT
from fdbroker.ipc.transport.unix_socket import LOST as LOST
from fdbroker.ipc.transport.unix_socket import RECEIVE_NOW as RECEIVE_NOW
from fdbroker.ipc.transport.unix_socket import SCM_RIGHTS as SCM_RIGHTS
from fdbroker.ipc.transport.unix_socket import SEND as SEND
from fdbroker.ipc.transport.unix_socket import SEND_NOW as SEND_NOW
from fdbroker.ipc.transport.unix_socket import SOL_SOCKET as SOL_SOCKET
from fdbroker.ipc.transport.unix_socket import rights as rights
from fdbroker.ipc.transport.unix_socket import shut_down as shut_down

CREDENTIALS_BYTES = _socket.CMSG_SPACE(struct.calcsize("3i"))  # struct ucred, unix(7)
# ``ioctl(number, SIOCOUTQ, QUEUED)``, and queued[0] are the bytes sent that the peer has not read
SIOCOUTQ = 0x5411  # asm-generic/ioctls.h, TIOCOUTQ; unix(7)
# less than any unread message counts (its sk_buff alone is larger).  Not 0: the kernel wakes us
# when it has taken all but one byte of a freed message off the count (sock_wfree, net/core/sock.c)
LEAST_QUEUED = 256
SO_PASSRIGHTS = 83  # asm-generic/socket.h
SO_PEERGROUPS = 59  # the same
FEW_GROUPS = 256  # all that socket.getsockopt takes
MANY_GROUPS = 65_536  # NGROUPS_MAX, linux/limits.h
ALL_IDS = 2**32 - 1  # -1 is none (user_namespaces(7))
OVERFLOW_ID = 65_534  # kernel.overflowuid and overflowgid, if nobody has set them

QUEUED = bytearray(INT.size)  # for the one thread that asks: to be given one takes twice as long
queued = memoryview(QUEUED).cast("i")


class Inbox:
    """Owns the descriptors that one message brought, until they are closed or given away.

    What the kernel returned is put into `raw`; `sort` only looks at it.  The right to close each
    number is handed out by one iterator, once, and `map` takes it and closes in C: neither a
    signal nor a second thread can come between the two.
    """

    __slots__ = ("_rights", "fds", "raw")

    def __init__(self) -> None:
        self.raw: list[tuple[int, list[tuple[int, int, bytes]], int, object]] = []
        self.fds: list[int] = []
        self._rights: Iterator[int] | None = None

    def sort(self) -> int:
        """How many bytes the message has; `fds` are the descriptors that came."""
        ((size, ancillary, _, _),) = self.raw
        if ancillary:
            self.fds = [
                number
                for level, kind, data in ancillary
                if level == SOL_SOCKET and kind == SCM_RIGHTS
                for (number,) in INT.iter_unpack(data[: len(data) // 4 * 4])
            ]
            self._rights = iter(self.fds)
        return size

    @property
    def truncated(self) -> bool:
        """Whether descriptors were lost on the way (MSG_CTRUNC)."""
        return bool(self.raw and self.raw[0][2] & LOST)

    def close(self) -> None:
        """Close what is still owned, each number once, and be empty again.

        A number that somebody else closed is passed over.
        """
        if self._rights is None and self.raw:
            self.sort()
        while self._rights is not None:
            try:
                for _ in map(os.close, self._rights):
                    pass
                break
            except OSError:
                continue  # that one is gone (close(2): never retry), go on with the others
        self.raw.clear()
        self.fds = []
        self._rights = None

    def give_away(self) -> list[int]:
        """The numbers, which are the caller's from now on."""
        return list(self._rights or ())

    def __del__(self) -> None:
        if getattr(self, "raw", None):  # an interrupted constructor has set none
            self.close()


def receive_into(
    sock: _socket.socket, buffer: bytearray, room: int = ANCILLARY_BYTES
) -> tuple[int, Inbox | None]:
    """Take one message if there is one, else BlockingIOError: its size, and what came with it.

    Descriptors for which there is no `room`, or no number, the kernel closes here: that may take
    long.  For a process whose signal handlers raise nothing: the inbox is made afterwards, if at
    all.
    """
    received = sock.recvmsg_into((buffer,), room, RECEIVE_NOW)
    size, ancillary, flags, _ = received
    if not ancillary and not flags & LOST:
        return size, None
    inbox = Inbox()
    inbox.raw.append(received)
    inbox.sort()
    return size, inbox


def room_for(most: int) -> int:
    """For no more than so many descriptors (CMSG_SPACE would be for one more, at times)."""
    return _socket.CMSG_LEN(most * INT.size) if most else 0


def refuse_descriptors(sock: _socket.socket) -> bool:
    """Have the kernel refuse every descriptor that the peer sends (EPERM, there).

    False where it cannot (SO_PASSRIGHTS, Linux 6.16): then whatever is sent must be received.
    """
    try:
        sock.setsockopt(_socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True


def accept_descriptors(sock: _socket.socket) -> None:
    """The opposite."""
    with suppress(OSError):
        sock.setsockopt(_socket.SOL_SOCKET, SO_PASSRIGHTS, 1)


def end(sock: _socket.socket) -> None:
    """End the session for good, whoever else holds a copy of the socket, and close it."""
    shut_down(sock)
    sock.close()


def drain(sock: _socket.socket) -> None:
    """Take what is left in a socket that was shut down, and can have no descriptors in it: else
    the peer would be told that its messages were lost, before it is told what we sent last."""
    with suppress(OSError):
        while sock.recv(1, RECEIVE_NOW):
            pass


def never_read(sock: _socket.socket, most: int) -> Iterator[list[int]]:
    """What is left in a socket that was shut down: message by message its descriptors, which are
    the caller's.  Of each message no more than `most` are given numbers.

    The others the kernel closes here, as close(2) would all that is left: that may take long.
    """
    # a message has credentials now, however empty it is, and the end has none
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)
    room = CREDENTIALS_BYTES + room_for(most)
    while True:
        inbox = Inbox()
        with suppress(ConnectionResetError):  # said once, what is left comes after it
            inbox.raw.append(sock.recvmsg_into((bytearray(1),), room, RECEIVE_NOW))
            inbox.sort()
            if not inbox.raw[0][1]:
                return
            yield inbox.give_away()


def credentials(sock: _socket.socket) -> tuple[int, int, int]:
    """(uid, gid, pid) of the peer as it was when it connected (SO_PEERCRED, unix(7))."""
    pid, uid, gid = struct.unpack(
        "3i", sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return uid & 0xFFFFFFFF, gid & 0xFFFFFFFF, pid


def groups_among(wanted: frozenset[int], sock: _socket.socket) -> frozenset[int]:
    """Which of these are supplementary groups of the peer, as they were when it connected.

    It may be in 65,536: a set of all would take milliseconds more.
    """
    try:
        data = sock.getsockopt(_socket.SOL_SOCKET, SO_PEERGROUPS, FEW_GROUPS * INT.size)
    except OSError as error:
        if error.errno != errno.ERANGE:  # Linux before 4.13
            return frozenset()
        data = _many_groups(sock)
    return wanted.intersection(memoryview(data).cast("I"))


def _many_groups(sock: _socket.socket) -> bytes:
    """The same where they are more than Python's getsockopt has room for."""
    import ctypes

    buffer = ctypes.create_string_buffer(MANY_GROUPS * INT.size)
    size = ctypes.c_uint32(len(buffer))
    getsockopt = ctypes.CDLL(None, use_errno=True).getsockopt
    if getsockopt(sock.fileno(), SOL_SOCKET, SO_PEERGROUPS, buffer, ctypes.byref(size)) != 0:
        return b""
    return buffer.raw[: size.value]


def unknown_ids() -> tuple[int | None, int | None]:
    """The uid and the gid that stand for all that this process's user namespace does not map
    (user_namespaces(7)); None where it maps every one, as the initial namespace does."""
    return _unknown_id("uid"), _unknown_id("gid")


def _unknown_id(kind: str) -> int | None:
    overflow = OVERFLOW_ID
    try:
        with open(f"/proc/sys/kernel/overflow{kind}") as file:
            overflow = int(file.read())
        with open(f"/proc/self/{kind}_map") as file:
            mapped = sum(int(line.split()[2]) for line in file)
    except OSError:  # no /proc
        mapped = 0
    return None if mapped >= ALL_IDS else overflow
