"""What the broker sends: replies, and the descriptors of loans.  It never waits for a client.

`send` and `send_grant` report SENT, BLOCKED (the client must read first) or CLOSED (the session is
over), and leave what follows to their caller.  SENT is false, and the others are true.  A reply
that cannot be sent at once ends the session; so does one to a user who leaves too many bytes of
replies unread.

A grant is sent only when the client has read the message before it, and while its user is within
the quota of descriptors in flight.  The kernel tells nobody what was read, so what is known is
brought up to date (`refresh_unread`) before a user is refused for it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from fdbroker.errors import FDBrokerError, QuotaExceeded, TooManyInFlight
from fdbroker.ipc.protocol.codec import GRANTED, ONE_OF_ONE, encode_grant, pack_grant
from fdbroker.ipc.transport import SCM_MAX_FD, parcel

if TYPE_CHECKING:
    from fdbroker.ipc.server.connection import ServerConnection
    from fdbroker.ipc.server.event_loop import EventLoop
    from fdbroker.ipc.server.tuning import Tuning
    from fdbroker.lender.accounting import Account, Accounting
    from fdbroker.lender.model import Session

SENT, BLOCKED, CLOSED = range(3)

log = logging.getLogger("fdbroker")


class Sender:
    """Sends to `connections`, which are all there are, and charges what they leave unread."""

    def __init__(
        self,
        loop: EventLoop,
        accounting: Accounting,
        connections: Collection[ServerConnection],
        tuning: Tuning,
    ) -> None:
        self._loop = loop
        self._accounting = accounting
        self._connections = connections
        self._tuning = tuning
        self._refresh_at = 0

    def send(self, connection: ServerConnection, data: bytes) -> int:
        """Send a message without descriptors, now or never."""
        try:
            unread = connection.channel.send(data)
        except BlockingIOError:
            log.warning("event=ended %s reason=it-does-not-read", connection)
            return BLOCKED
        except OSError:
            return CLOSED
        connection.bytes_charge.set(unread + len(data))
        if not unread:
            _note_in_flight(connection, 0)
        elif self._reads_too_little(connection.account):
            log.warning("event=ended %s reason=its-uid-reads-too-little", connection)
            return BLOCKED
        return SENT

    def send_grant(
        self,
        connection: ServerConnection,
        seq: int,
        offset: int = 0,
        fresh: list[int] | None = None,
    ) -> int | FDBrokerError:
        """Send the descriptors of the session's loan, which is on the ledger, from `offset` on.

        `fresh` are sent in their place for a read-only loan, and stay the caller's.  BLOCKED:
        nothing was sent, the client must read the message before it first.  An error: nothing was
        sent, and the client is to be told why.
        """
        channel, session = connection.channel, connection.session
        try:
            if session.request.single and channel.in_flight == 1:
                # The fast path, which does what the rest of this method does for one entry.
                data = pack_grant(GRANTED, seq, ONE_OF_ONE, session.since)
                return SENT if channel.lend_one(data, session.entries[0].parcel) else BLOCKED
            data, parcels = _general_grant(session, seq, offset, fresh)
            if len(parcels) != channel.in_flight:
                if channel.unread():
                    return BLOCKED
                self._charge_in_flight(connection, len(parcels))
            return SENT if channel.lend(data, parcels) else BLOCKED
        except QuotaExceeded as error:
            return error
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            return CLOSED
        except OSError as error:
            _note_in_flight(connection, 0)
            log.warning('event=not-sent %s reason="%s"', connection, error.strerror)
            return TooManyInFlight()

    def _charge_in_flight(self, connection: ServerConnection, count: int) -> None:
        """Have so many in flight to the connection; `QuotaExceeded` if its user may not."""
        accounting, account = self._accounting, connection.account
        try:
            accounting.check(account, "inflight", count - connection.channel.in_flight)
        except QuotaExceeded:
            self.refresh_unread()
            accounting.check(account, "inflight", count - connection.channel.in_flight)
        _note_in_flight(connection, count)

    def _reads_too_little(self, account: Account) -> bool:
        """Whether the user has more bytes unread than it may; the kernel is asked only then."""
        if account.bytes <= self._accounting.limit(account, "bytes"):
            return False
        self._refresh(account)
        # Well below the limit, so that not each reply from now on asks the kernel again.
        return account.bytes > self._accounting.limit(account, "bytes") * 3 // 4

    def refresh_unread(self) -> None:
        """Ask the kernel about all sessions; if that was done too often, what is known must do."""
        if self._loop.now >= self._refresh_at:
            begun = monotonic_ns()
            self._refresh(None)
            rest = self._tuning.refresh_rest * (monotonic_ns() - begun)
            since = max(self._refresh_at, self._loop.now - self._tuning.refresh_burst)
            self._refresh_at = since + rest

    def _refresh(self, account: Account | None) -> None:
        """Ask about the sessions of one account, or of all."""
        for connection in self._connections:
            if account is None or account is connection.account:
                refresh_connection(connection)


def _general_grant(
    session: Session, seq: int, offset: int, fresh: list[int] | None
) -> tuple[bytes, Sequence[Any]]:
    """The message, and what it lends, of a part of any loan."""
    assert fresh or not session.request.readonly
    entries = session.entries[offset : offset + SCM_MAX_FD]
    parcels = [parcel(sysfd) for sysfd in fresh] if fresh else [entry.parcel for entry in entries]
    return encode_grant(seq, len(session.entries), len(parcels), session.since), parcels


def refresh_connection(connection: ServerConnection) -> bool:
    """Bring up to date what a connection is charged for.  Returns whether anything is unread."""
    if not connection.bytes_charge.count and not connection.channel.in_flight:
        return False
    unread = connection.channel.unread()
    connection.bytes_charge.set(unread)
    if not unread:
        _note_in_flight(connection, 0)
    return bool(unread)


def _note_in_flight(connection: ServerConnection, count: int) -> None:
    if connection.channel.in_flight != count:
        connection.channel.in_flight = count
        connection.in_flight_charge.set(count)
