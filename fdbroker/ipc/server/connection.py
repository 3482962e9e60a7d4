"""The broker's end of a session: a socket, who is there, and what it is doing.

    GREETING -> READY       its hello was answered, it has a session
    READY    -> LADEN       the message at hand came with descriptors       -> READY
    READY    -> WORKING     its request is with a worker            -> READY when that is back
    READY    -> UNREAD      a message with descriptors waits until the client has read the one
                            before it; nothing more is received     -> READY when it has
    any      -> ENDED       hung up, its loan is back; while a worker has its request, the session
                            keeps its slot

Only a READY one may ask for something.  (Whether its session waits for a turn, or for a close, is
the lender's to know.)

In whichever state, a worker may be receiving from it (`apart`): nothing else does meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from fcntl import ioctl
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.ipc.protocol.messages import DESCRIPTORS, MESSAGE_BYTES
from fdbroker.ipc.transport import unix
from fdbroker.ipc.transport.unix import LEAST_QUEUED, QUEUED, SIOCOUTQ, queued
from fdbroker.lender.accounting import Account
from fdbroker.lender.model import FREE, Peer, Session
from fdbroker.lender.rules import NO_RIGHTS

if TYPE_CHECKING:
    import socket

    from fdbroker.ipc.protocol.messages import Known
    from fdbroker.ipc.server.jobs import Receive, Request
    from fdbroker.ipc.transport.unix import Inbox
    from fdbroker.lender.accounting import Accounting

MESSAGE = bytearray(MESSAGE_BYTES + 1)
"""The message at hand, of whichever connection, for the one thread that serves: to make room for
each takes longer than to receive it.  One byte more than a message has, so that what is too long is
not taken for one that was cut to size."""

GREETING, READY, LADEN, WORKING, UNREAD, ENDED = range(6)

NOBODY = Session(-1, 0, Peer(-1, -1, 0), memoryview(b""), Account(-1))  # who has none yet
NOBODY.state = FREE


class NoRoom(Exception):
    """The next message may have more descriptors than there is room for: see `Answers`."""


class Unsent(NamedTuple):
    """A message with descriptors that waits until the one before it was read."""

    seq: int
    offset: int
    fresh: list[int] | None


class Connection:
    """One client connection.  It has a session once its hello was answered."""

    __slots__ = (
        "account",
        "apart",
        "brings_descriptors",
        "inbox",
        "inflight",
        "job",
        "known",
        "number",
        "peer",
        "quotas",
        "receive",
        "repeated",
        "rights",
        "send_message",
        "session",
        "sock",
        "state",
        "unread",
        "unsent",
    )

    def __init__(self, sock: socket.socket, peer: Peer, quotas: Accounting) -> None:
        sock.setblocking(False)  # `recv_into` must not wait; a flag each time takes longer
        self.sock = sock
        self.number = sock.fileno()
        self.send_message = sock.sendmsg
        self.peer = peer
        self.quotas = quotas
        self.account = quotas.account(peer.uid)
        self.state = GREETING
        self.session = NOBODY
        self.rights = NO_RIGHTS  # of the peer, by the rules of now
        self.known: Known = OrderedDict()  # requests that it may make, see messages.py
        self.inbox: Inbox | None = None  # the descriptors of the request at hand
        self.job: Request | None = None  # while WORKING, or ENDED meanwhile
        self.apart: Receive | None = None  # until the message that it brings is taken up
        self.unsent: Unsent | None = None  # while UNREAD
        self.unread = 0  # bytes of answers that it had not read when it got the last one
        self.inflight = 0  # descriptors of the last message, unless all was read since
        self.repeated = False  # whether it ever asked for a grant again that it may have had
        self.receive: Callable[[bytearray], int] = self._receive_with_descriptors
        self.brings_descriptors = True
        if unix.refuse_descriptors(sock):
            # nothing but bytes can come, and to receive no more than these takes half the time
            self.brings_descriptors = False
            self.receive = sock.recv_into

    def accept_descriptors(self) -> None:
        """From now on the client may send descriptors."""
        unix.accept_descriptors(self.sock)
        self.brings_descriptors = True
        self.receive = self._receive_with_descriptors

    def _receive_with_descriptors(self, buffer: bytearray) -> int:
        if self.apart is not None:
            job, self.apart = self.apart, None
            size, self.inbox = job.take(buffer)
        elif self.quotas.has_room(self.account, DESCRIPTORS):
            size, self.inbox = unix.receive_into(self.sock, buffer)
            if self.inbox is not None:
                self.quotas.add(self.account, "closes", len(self.inbox.fds))
        else:
            raise NoRoom
        if self.inbox is not None and self.state == READY:
            self.state = LADEN
        return size

    def unread_bytes(self) -> int:
        """How much of what it was sent it has not read, as the kernel says now."""
        ioctl(self.number, SIOCOUTQ, QUEUED)
        return queued[0] if queued[0] >= LEAST_QUEUED else 0

    def __str__(self) -> str:
        return f"pid={self.peer.pid} uid={self.peer.uid}"
