"""What the broker sends: answers, and the descriptors of loans.

It never waits for a client.  A message that cannot be sent at once ends the session, and so does an
answer to one whose uid leaves too much unread.

The kernel counts descriptors in flight, sent and not received, by the uid of the sender (unix(7),
ETOOMANYREFS): clients that read nothing would use up what there is for the others.  So a message
with descriptors is only sent when the client has read the one before it, and within the quota of
its uid.  What we hang up on keeps its charge until that was read, or the client is gone (door.py).

Nor for what a client sends: descriptors that get no number are closed by the kernel, where they are
received, and SO_LINGER can make that take long.  So where as many as one message can bring might
not all fit, or be more than its uid may have, a worker receives it (`Receive`): of each uid one
message at a time, and one descriptor of it, as a put needs.
"""

from __future__ import annotations

import logging
import select
from abc import abstractmethod
from collections import deque
from fcntl import ioctl
from time import monotonic_ns
from typing import TYPE_CHECKING

from fdbroker.errors import FDBrokerError, QuotaExceeded, TooManyInFlight
from fdbroker.ipc.protocol.messages import (
    DESCRIPTORS,
    GRANTED,
    ONE_OF_ONE,
    encode_error,
    encode_grant,
    pack_grant,
)
from fdbroker.ipc.server.acceptor import Door
from fdbroker.ipc.server.connection import ENDED, READY, UNREAD, Connection, Unsent
from fdbroker.ipc.server.event_loop import READABLE, Action
from fdbroker.ipc.server.jobs import Discard, Receive, Reopen
from fdbroker.ipc.server.policy import log_refusal
from fdbroker.ipc.transport import unix
from fdbroker.ipc.transport.unix import LEAST_QUEUED, QUEUED, SEND_NOW, SIOCOUTQ, queued
from fdbroker.lender.model import SECOND

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.ipc.server.jobs import Request
    from fdbroker.ipc.transport.listener import Listener
    from fdbroker.lender import Lender
    from fdbroker.lender.accounting import Account
    from fdbroker.lender.model import Entry

GONE = int(select.EPOLLHUP | select.EPOLLERR)
REST_OF_LOOKS = 16  # times as long as the looks at all sessions take, the loop does other things,
SAVED = SECOND // 10  # and has done them before in so much of the time
NOTHING = int(select.EPOLLET)  # but that it is gone, once
EMPTIED = int(select.EPOLLOUT | select.EPOLLET)  # an edge each time the peer has read a message

log = logging.getLogger("fdbroker")


class Answers(Door):
    """A door whose connections can be answered."""

    def __init__(self, listener: Listener, lender: Lender) -> None:
        super().__init__(listener, lender)
        self._connections: dict[int, Connection] = {}  # by socket number
        self._look_again_at = 0  # at all of them
        self._apart: dict[Account, deque[Receive]] = {}  # of each the first has begun

    @abstractmethod
    def serving(self, connection: Connection) -> Action:
        """What to do when it can be received from."""

    @abstractmethod
    def start_job(self, connection: Connection, job: Request) -> None:
        """Have a worker do the slow part of this connection's request."""

    def reply(self, connection: Connection, data: bytes) -> None:
        """Send a message without descriptors, now or never."""
        if connection.state == ENDED:
            return
        unread = connection.unread_bytes()
        self._note_unread(connection, unread + len(data))
        if not unread:
            self._note_inflight(connection, 0)
        elif self._reads_too_little(connection.account):
            log.warning("event=ended %s reason=its-uid-reads-too-little", connection)
            self.end(connection)
            return
        try:
            connection.sock.send(data, SEND_NOW)
        except BlockingIOError:
            log.warning("event=ended %s reason=it-does-not-read", connection)
            self.end(connection)
        except OSError:
            self.end(connection)

    def _note_unread(self, connection: Connection, size: int) -> None:
        """So much lies unread at it, as far as we know."""
        self.lender.accounting.add(connection.account, "bytes", size - connection.unread)
        connection.unread = size

    def _reads_too_little(self, account: Account) -> bool:
        """Whether its uid has more answers unread than it may; the kernel is asked only then."""
        quotas = self.lender.accounting
        if account.bytes <= quotas.limit(account, "bytes"):
            return False
        self._look_at_unread(account)
        # well below it, so that not each answer from now on has us ask again
        return account.bytes > quotas.limit(account, "bytes") * 3 // 4

    def look_at_all(self) -> None:
        """Ask all sessions how much of what was sent is unread.  Where these are so many, and are
        asked so often, that it has taken too much time, what is known has to do."""
        if self.now >= self._look_again_at:
            begun = monotonic_ns()
            self._look_at_unread()
            rest = REST_OF_LOOKS * (monotonic_ns() - begun)
            self._look_again_at = max(self._look_again_at, self.now - SAVED) + rest

    def _look_at_unread(self, account: Account | None = None) -> None:
        """Those of one account, or all of them."""
        for connection in self._connections.values():
            if (connection.unread or connection.inflight) and account in (None, connection.account):
                unread = connection.unread_bytes()
                self._note_unread(connection, unread)
                if not unread:
                    self._note_inflight(connection, 0)

    def _note_inflight(self, connection: Connection, count: int) -> None:
        """So many descriptors are in flight to it, as far as we know."""
        if count != connection.inflight:
            self.lender.accounting.add(connection.account, "inflight", count - connection.inflight)
            connection.inflight = count

    def _check_inflight(self, connection: Connection, count: int) -> None:
        """May it be sent so many, since it has received all that it was sent?  `QuotaExceeded`.

        What it and others have received since they were last asked is only looked at if not.
        """
        quotas, more = self.lender.accounting, count - connection.inflight
        try:
            quotas.check(connection.account, "inflight", more)
        except QuotaExceeded:
            self.look_at_all()
            quotas.check(connection.account, "inflight", count)

    def hand_over(
        self, connection: Connection, seq: int, offset: int = 0, fresh: list[int] | None = None
    ) -> None:
        """Send the descriptors of a loan, which is on the ledger, from `offset` on.

        Those of a read-only loan are opened for it first (`fresh`), and closed afterwards.
        """
        session = connection.session
        ioctl(connection.number, SIOCOUTQ, QUEUED)  # `unread_bytes`; a call of ours is slower
        if queued[0] >= LEAST_QUEUED:
            self._wait_until_read(connection, Unsent(seq, offset, fresh))
            return
        if session.request.single:
            data = pack_grant(GRANTED, seq, ONE_OF_ONE, session.since)
            count, rights = 1, session.entries[0].ancillary
        else:
            entries = session.entries[offset : offset + DESCRIPTORS]
            sysfds = fresh or [entry.sysfd for entry in entries]
            if session.request.readonly and fresh is None:
                self._reopen(connection, seq, offset, entries)
                return
            data = encode_grant(seq, len(session.entries), len(sysfds), session.since)
            count, rights = len(sysfds), unix.rights(sysfds)
        try:
            if count != connection.inflight:
                self._check_inflight(connection, count)
                self._note_inflight(connection, count)
            connection.send_message((data,), rights, SEND_NOW)
        except QuotaExceeded as error:
            self.take_back(connection, seq, offset, error)
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            self.end(connection)
        except OSError as error:
            self._note_inflight(connection, 0)
            log.warning('event=not-sent %s reason="%s"', connection, error.strerror)
            self.take_back(connection, seq, offset, TooManyInFlight())
        if fresh:
            self.workers.submit(Discard(fresh, connection.account))

    def _reopen(
        self, connection: Connection, seq: int, offset: int, entries: Sequence[Entry]
    ) -> None:
        """Have a worker open read-only descriptions of these, to be handed over then."""
        try:
            self.lender.accounting.check(connection.account, "closes", len(entries))
        except FDBrokerError as error:
            self.take_back(connection, seq, offset, error)
            return
        self.lender.accounting.add(connection.account, "closes", len(entries))
        self.lender.pin(entries)
        self.start_job(connection, Reopen(connection, seq, offset, entries))

    def take_back(
        self, connection: Connection, seq: int, offset: int, error: FDBrokerError
    ) -> None:
        """The descriptors from `offset` on cannot be sent; the client is told why.

        If it has none of the loan yet, that ends here.  Else only the client knows when it has
        closed them, and returns the loan.
        """
        if isinstance(error, QuotaExceeded):
            log_refusal(connection, error)
        if offset == 0 and not connection.repeated:
            self.lender.roll_back_grant(connection.session, self.now)
        self.reply(connection, encode_error(seq, error))

    def _wait_until_read(self, connection: Connection, unsent: Unsent) -> None:
        connection.state, connection.unsent = UNREAD, unsent
        self.rewatch(connection.number, EMPTIED, self._send_unsent, connection)
        self.wait_for(connection)

    def _send_unsent(self, connection: Connection, events: int) -> None:
        """The client has read a message, or is gone; then what it sent before is received."""
        unsent = connection.unsent
        assert unsent is not None
        if not events & GONE and connection.unread_bytes():
            return
        connection.state = READY
        self.has_come(connection)
        self.listen(connection)
        if events & GONE:
            self._drop_unsent(connection)
        else:
            connection.unsent = None
            self.hand_over(connection, *unsent)
        self._take_up(connection)

    def _drop_unsent(self, connection: Connection) -> None:
        unsent, connection.unsent = connection.unsent, None
        if unsent is not None and unsent.fresh:
            self.workers.submit(Discard(unsent.fresh, connection.account))

    # --- what a worker receives ---

    def receive_apart(self, connection: Connection) -> None:
        """Have a worker receive the next message; until that is taken up, nothing else is."""
        job = connection.apart = Receive(connection)
        self.listen(connection)
        jobs = self._apart.setdefault(connection.account, deque())
        jobs.append(job)
        if len(jobs) == 1:
            self._begin_next(connection.account)

    def _begin_next(self, account: Account) -> None:
        """Its next one, if there is any; who may have nothing more in hand is told so."""
        jobs, quotas = self._apart[account], self.lender.accounting
        while jobs:
            job = jobs[0]
            if job.connection.state != ENDED:
                try:
                    quotas.check_receive(account)
                except QuotaExceeded as error:
                    job.error, job.done = error, True
                    self._take_up(job.connection)
                else:
                    job.most = int(quotas.free_descriptors > 0)
                    quotas.add(account, "closes", job.most)
                    job.begun = True
                    self.workers.submit(job)
                    return
            jobs.popleft()
        del self._apart[account]

    def received(self, job: Receive) -> None:
        """It is back: act upon what it brings."""
        connection, account = job.connection, job.account
        job.begun, job.done = False, True
        self._apart[account].popleft()
        self._begin_next(account)
        if connection.state == ENDED or job.failure:
            if job.inbox is not None:
                self.workers.submit(Discard(job.inbox.give_away(), account))
            if connection.state != ENDED:
                self.end(connection)
            elif not connection.brings_descriptors:  # any more
                self.part(connection)
        else:
            self.listen(connection)
            self._take_up(connection)

    def listen(self, connection: Connection) -> None:
        """Serve it when it can be received from, which it cannot be while a worker does."""
        if connection.state == UNREAD:  # not before it has read
            return
        if connection.apart is None or connection.apart.done:
            self.rewatch(connection.number, READABLE, self.serving(connection), connection)
        else:
            self.rewatch(connection.number, NOTHING, self._leave, connection)

    @abstractmethod
    def _leave(self, connection: Connection, events: int) -> None:
        """If it is gone, its loan need not wait for what it sent last."""

    def _drop_received(self, connection: Connection) -> None:
        """What a worker has received from it, and nobody took up."""
        apart = connection.apart
        if apart is not None and apart.done and apart.inbox is not None:
            inbox, apart.inbox = apart.inbox, None
            self.workers.submit(Discard(inbox.give_away(), connection.account))

    def _take_up(self, connection: Connection) -> None:
        """Serve it, if a worker has received something from it, and it may ask on."""
        apart = connection.apart
        if apart is not None and apart.done and connection.state not in (UNREAD, ENDED):
            self.serving(connection)(connection, 0)
