"""The broker's end of a session on Linux: a SOCK_SEQPACKET socket, and what the kernel says of it.

Three hazards of the kernel are kept in here.

**Receiving may block.**  recvmsg(2) closes every descriptor that it cannot or may not install, and
closing a lingering socket takes seconds.  From Linux 6.16 on SO_PASSRIGHTS=0 has the kernel refuse
descriptors at the sender, so the event loop receives nothing but bytes.  Only a session that may
put accepts descriptors, and only a worker receives from it.  Before Linux 6.16 descriptors that
nobody asked for are closed by the kernel in the loop's thread, and end the session.

**Descriptors in flight** are counted by the kernel against the uid of the sender until they are
received (unix(7), ETOOMANYREFS), so one client that reads nothing could use up what there is for
all.  A message with descriptors is sent only when the client has read the one before: SIOCOUTQ
counts what was sent and not read.

**An end may block.**  Closing a socket closes the descriptors that wait in it.  After `shut_down` a
worker takes those out with `drain_descriptors`, and the caller closes the socket then.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from fcntl import ioctl
from typing import Any

from fdbroker.errors import ProtocolError
from fdbroker.ipc.transport import unix_peer
from fdbroker.ipc.transport.received import ReceivedFDs, exact_room
from fdbroker.ipc.transport.unix_port import Handler, ignore
from fdbroker.ipc.transport.unix_socket import (
    INT,
    LOST,
    RECEIVE_NOW,
    SCM_RIGHTS,
    SEND_NOW,
    SOL_SOCKET,
    shut_down,
)

SO_PASSRIGHTS = 83  # asm-generic/socket.h
# What a message has beside its descriptors once SO_PASSCRED is on: struct ucred (unix(7)).
CREDENTIALS_BYTES = socket.CMSG_SPACE(unix_peer.UCRED.size)
# ``ioctl(number, SIOCOUTQ, QUEUED)``, then `queued[0]` are the bytes that the client has not read
# (TIOCOUTQ of asm-generic/ioctls.h; unix(7)).  One buffer serves the one thread that asks.
SIOCOUTQ = 0x5411
QUEUED = bytearray(INT.size)
queued = memoryview(QUEUED).cast("i")
# Less than any unread message counts, since its sk_buff alone is larger.  It is not 0 because the
# kernel wakes us when it has taken all but one byte of a freed message off the count (sock_wfree,
# net/core/sock.c).
LEAST_QUEUED = 256

Parcel = tuple[tuple[int, int, bytes]]


def parcel(sysfd: int) -> Parcel:
    """Make what `Channel.lend` sends of a descriptor, once for each entry; `sysfd` stays open."""
    return ((SOL_SOCKET, SCM_RIGHTS, INT.pack(sysfd)),)


class Channel:
    """One session's socket, which this owns.  `peer` is (uid, gid, pid) as of the connect."""

    __slots__ = (
        *("_send_message", "_sock", "handler", "in_flight", "may_hold_descriptors", "number"),
        *("peer", "predates_refusal", "receive", "subject"),
    )

    def __init__(self, sock: socket.socket, *, predates_refusal: bool = False) -> None:
        """Own `sock`.  predates_refusal: it may have been connected, and may hold descriptors,
        before the listener refused them; so a worker has to receive from it."""
        # `recv_into` must not wait, and a flag at each call takes longer.
        sock.setblocking(False)
        self._sock = sock
        self.number = sock.fileno()
        self.handler: Handler = ignore
        self.subject: Any = None
        self.peer = unix_peer.credentials(sock)
        # How many descriptors the last message had, unless all was read since.
        self.in_flight = 0
        self._send_message = sock.sendmsg
        # Whether the socket may have descriptors in it that nobody received.
        refused = refuse_descriptors(sock)
        self.predates_refusal = predates_refusal
        self.may_hold_descriptors = predates_refusal or not refused
        self.receive: Callable[[bytearray], int] = (
            self._receive_checked if self.may_hold_descriptors else sock.recv_into
        )
        """Receive one message into a buffer: its size, 0 at the end of the session.
        BlockingIOError: there is none.  ProtocolError: it came with descriptors."""

    def groups_among(self, wanted: frozenset[int]) -> frozenset[int]:
        """Which of these are supplementary groups of the peer, as of the connect."""
        return unix_peer.groups_among(wanted, self._sock)

    def _receive_checked(self, buffer: bytearray) -> int:
        size, _, flags, _ = self._sock.recvmsg_into((buffer,), 0, RECEIVE_NOW)
        if flags & LOST:
            raise ProtocolError("client", "it sent descriptors that nobody asked for")
        return size

    def accept_descriptors(self) -> None:
        """Let the client send descriptors from now on; a worker must receive them."""
        accept_descriptors(self._sock)
        self.may_hold_descriptors = True

    def receive_with_descriptors(self, size: int, most: int) -> tuple[bytes, ReceivedFDs]:
        """Receive one message of at most `size` bytes, in a worker: it, and what came with it.

        No more than `most` descriptors are installed; they are the caller's.  The kernel closes all
        others before this returns.  BlockingIOError: there is no message.
        """
        received = ReceivedFDs()
        data = received.receive_with(self._sock, size, most, RECEIVE_NOW)
        return data, received

    def unread(self) -> int:
        """How many bytes of what was sent the client has not read, as the kernel counts now."""
        ioctl(self.number, SIOCOUTQ, QUEUED)
        return queued[0] if queued[0] >= LEAST_QUEUED else 0

    def send(self, data: bytes) -> int:
        """Send a message now or never.  Returns how many bytes were unread before it.

        BlockingIOError: the client reads too little.  OSError: it has gone.
        """
        unread = self.unread()
        self._sock.send(data, SEND_NOW)
        return unread

    def lend(self, data: bytes, parcels: Sequence[Parcel]) -> bool:
        """Send a message with copies of these descriptors, now or never, all of it or nothing.

        False: nothing was sent, since the client has to read what it was sent before.
        BlockingIOError, BrokenPipeError, ConnectionResetError as for `send`.  OSError
        (ETOOMANYREFS): too many descriptors of this process's uid are in flight.
        """
        numbers = b"".join([number for ((_, _, number),) in parcels])
        return self.lend_one(data, ((SOL_SOCKET, SCM_RIGHTS, numbers),))

    def lend_one(self, data: bytes, parcel: Parcel) -> bool:
        """As `lend`, of one descriptor."""
        # `unread`, without the call.
        ioctl(self.number, SIOCOUTQ, QUEUED)
        if queued[0] >= LEAST_QUEUED:
            return False
        self._send_message((data,), parcel, SEND_NOW)
        return True

    # --- the end ---

    def shut_down(self) -> None:
        """End the session for good, whoever holds a copy of the client's end.

        What the client sent last is taken out where it cannot bring descriptors: else the kernel
        would tell the client that it was lost, before it tells what we sent last.
        """
        shut_down(self._sock)
        if not self.may_hold_descriptors:
            with suppress(OSError):
                while self._sock.recv(1, RECEIVE_NOW):
                    pass

    def drain_descriptors(self, most: int) -> Iterator[tuple[int, ...]]:
        """Take out what the client sent and nobody received, in a worker, after `shut_down`.

        Yields the descriptors of one message at a time, which are the caller's, no more than `most`
        of each: the kernel closes the others.
        """
        try:
            # A message has credentials now, however empty it is, and the end has none.
            self._sock.setsockopt(SOL_SOCKET, socket.SO_PASSCRED, 1)
            room = CREDENTIALS_BYTES + exact_room(most)
            while True:
                received = ReceivedFDs()
                # A reset is reported once, and what is left comes after it.
                with suppress(ConnectionResetError):
                    _, brought = received.receive_exactly(self._sock, 1, room, RECEIVE_NOW)
                    if not brought:
                        return
                    yield received.detach()
        finally:
            # Also after a mistake, or nobody would ask about this channel again.
            self.may_hold_descriptors = False

    def close(self) -> None:
        """Close the socket.  It may block while `may_hold_descriptors`."""
        with suppress(OSError):
            self._sock.close()


def accept_descriptors(sock: socket.socket) -> None:
    """Let the peer send descriptors, as every socket does before `refuse_descriptors`."""
    with suppress(OSError):
        sock.setsockopt(SOL_SOCKET, SO_PASSRIGHTS, 1)


def refuse_descriptors(sock: socket.socket) -> bool:
    """Have the kernel refuse every descriptor that the peer sends, with EPERM there.

    Returns False where it cannot (SO_PASSRIGHTS is of Linux 6.16).  Accepted sockets inherit it.
    """
    try:
        sock.setsockopt(SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True
