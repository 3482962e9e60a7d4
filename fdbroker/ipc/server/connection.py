"""The server's record of one client connection: its channel, its peer, and what it is doing.

    HANDSHAKE    -> READY            its HELLO was answered, it has a session
    READY        -> WORKING          its request is with a worker    -> READY when that is back
    READY        -> AWAITING_READ    a grant waits until the client has read the message before it;
                                     nothing more is received        -> READY when it has
    any          -> ENDED            hung up, and its loan is back

Only a READY connection may ask for something.  (Whether its session waits for a grant, or for a
close, is the lender's to know.)  The slot of a session is free as soon as its connection has ENDED,
also while a worker has its request.

A connection that may put is received from by a worker, never by the loop: `receiving` is that job.
So is one that was made before the kernel could be told to refuse its descriptors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.lender.accounting import Account
from fdbroker.lender.model import FREE, Peer, Session

if TYPE_CHECKING:
    from fdbroker.ipc.server.event_loop import Timer
    from fdbroker.ipc.server.jobs import Receive, Reopen
    from fdbroker.ipc.transport import Channel
    from fdbroker.lender.accounting import Accounting, Charge
    from fdbroker.lender.rules import Rights

HANDSHAKE, READY, WORKING, AWAITING_READ, ENDED = range(5)

NO_SESSION = Session(-1, 0, Peer(-1, -1, 0), memoryview(b""), Account(-1))
NO_SESSION.state = FREE


class Fresh(NamedTuple):
    """Descriptors that were opened for one message of a read-only loan, and the charge for them,
    which lasts until they are closed.  They belong to whoever has this."""

    fds: list[int]
    charge: Charge


class PendingGrant(NamedTuple):
    """A message with descriptors that waits until the client has read the one before it.

    `offset` is where in the loan it begins; `fresh` is what was opened for it, if anything.
    """

    seq: int
    offset: int
    fresh: Fresh | None


class ServerConnection:
    """One client connection.  It has a session once its HELLO was answered."""

    __slots__ = (
        *("account", "arrival", "bytes_charge", "channel", "in_flight_charge", "interest", "job"),
        *(
            "by_worker",
            "peer",
            "pending_grant",
            "receiving",
            "repeated",
            "rights",
            "serve",
            "session",
        ),
        *("session_charge", "state", "timer"),
    )

    def __init__(
        self, channel: Channel, peer: Peer, rights: Rights, accounting: Accounting
    ) -> None:
        self.channel = channel
        self.peer = peer
        self.account = accounting.account(peer.uid)
        self.state = HANDSHAKE
        self.session = NO_SESSION
        # The peer's, by the rules of now.
        self.rights = rights
        # Whether a worker receives from it, since its messages may bring descriptors.
        self.by_worker = channel.predates_refusal
        # What the port was told of the channel last.
        self.interest: Callable[..., None] | None = None
        # Serves one message of it; also the item that stands for it in the fair queue.
        self.serve: Callable[[], None] = _serve_nothing
        # While WORKING, and if it ENDED meanwhile.
        self.job: Reopen | None = None
        # What a worker receives, and what it has received of the message at hand.
        self.receiving: Receive | None = None
        self.arrival: Receive | None = None
        # While AWAITING_READ.
        self.pending_grant: PendingGrant | None = None
        # Whether it ever asked again for a grant that it may have had already.
        self.repeated = False
        # Ends the connection unless it sends its HELLO, or reads, before.
        self.timer: Timer | None = None
        self.session_charge = accounting.charge(self.account, "sessions")
        self.bytes_charge = accounting.charge(self.account, "bytes", 0)
        self.in_flight_charge = accounting.charge(self.account, "inflight", 0)

    def release_charges(self) -> None:
        """Nothing is left of the connection that its user could be charged for."""
        self.bytes_charge.release()
        self.in_flight_charge.release()
        self.session_charge.release()

    def __str__(self) -> str:
        return f"pid={self.peer.pid} uid={self.peer.uid}"


def _serve_nothing() -> None:
    """Do nothing, for a connection that nobody serves yet."""
