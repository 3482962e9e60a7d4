"""The broker's end of a session: a socket, who is there, and what is still to be sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import socket

    from fdbroker.ipc.unix import Inbox
    from fdbroker.ipc.workers import Job
    from fdbroker.lender.parts import Peer, Session


class Unsent(NamedTuple):
    """A message with descriptors that waits until the one before it was read."""

    seq: int
    offset: int
    fresh: list[int] | None


class Connection:
    """One client connection.  It has a session once its hello was answered."""

    __slots__ = ("ended", "greeted", "inbox", "job", "number", "peer", "session", "sock", "unsent")

    session: Session

    def __init__(self, sock: socket.socket, peer: Peer) -> None:
        self.sock = sock
        self.number = sock.fileno()
        self.peer = peer
        self.greeted = False
        self.ended = False
        self.inbox: Inbox | None = None  # the descriptors of the request at hand
        self.job: Job | None = None  # its request is with a worker
        self.unsent: Unsent | None = None

    def __str__(self) -> str:
        return f"pid={self.peer.pid} uid={self.peer.uid}"
