"""The ways of an answer to its client, and of a grant that cannot be sent yet or at all.

A grant whose client has not read the message before it waits: the connection is AWAITING_READ, and
nothing is received from it meanwhile.  A read-only loan takes fresh descriptions, which a worker
opens: the connection is WORKING.  A grant that cannot be sent is rolled back, as far as the client
has nothing of the loan yet; else only the client knows when it has closed what it has, and returns
the loan.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from fdbroker.errors import FDBrokerError, QuotaExceeded
from fdbroker.ipc.protocol.codec import encode_error
from fdbroker.ipc.server.connection import AWAITING_READ, ENDED, READY, WORKING, Fresh, PendingGrant
from fdbroker.ipc.server.jobs import Discard, Reopen
from fdbroker.ipc.server.log import log_refusal
from fdbroker.ipc.server.sender import BLOCKED, CLOSED, SENT
from fdbroker.ipc.transport import SCM_MAX_FD

if TYPE_CHECKING:
    from fdbroker.ipc.server.connection import ServerConnection
    from fdbroker.ipc.server.event_loop import EventLoop
    from fdbroker.ipc.server.scheduler import FairScheduler
    from fdbroker.ipc.server.sender import Sender
    from fdbroker.ipc.server.worker_pool import WorkerPool
    from fdbroker.lender import Lender
    from fdbroker.lender.accounting import Charge
    from fdbroker.lender.model import Entry

OnConnection = Callable[["ServerConnection"], None]


class Delivery:
    """Delivers replies and grants.

    `end` ends a connection.  `rearm` has the port report what comes next of one whose state has
    changed.
    """

    def __init__(
        self,
        loop: EventLoop,
        lender: Lender,
        sender: Sender,
        pool: WorkerPool,
        scheduler: FairScheduler,
        *,
        end: OnConnection,
        rearm: OnConnection,
    ) -> None:
        self._loop = loop
        self._lender = lender
        self._sender = sender
        self._pool = pool
        self._scheduler = scheduler
        self._end = end
        self._rearm = rearm

    def reply(self, connection: ServerConnection, data: bytes) -> None:
        """Send a message without descriptors; the connection ends if that cannot be done now."""
        if connection.state != ENDED and self._sender.send(connection, data) != SENT:
            self._end(connection)

    def grant(
        self,
        connection: ServerConnection,
        seq: int,
        offset: int = 0,
        fresh: Fresh | None = None,
    ) -> None:
        """Send the session's loan from `offset` on, now or when the client has read.

        `fresh` is what was opened for it; it is closed afterwards.
        """
        if connection.session.request.readonly and fresh is None:
            # What the broker has itself is never sent for a read-only loan.
            if connection.channel.unread():
                self.not_sent(connection, BLOCKED, seq, offset)
            else:
                self._reopen(connection, seq, offset)
            return
        fds = None if fresh is None else fresh.fds
        outcome = self._sender.send_grant(connection, seq, offset, fds)
        if outcome:
            self.not_sent(connection, outcome, seq, offset, fresh)
        if fresh is not None and outcome != BLOCKED:
            self._discard(fresh)

    def not_sent(
        self,
        connection: ServerConnection,
        outcome: int | FDBrokerError,
        seq: int,
        offset: int = 0,
        fresh: Fresh | None = None,
    ) -> None:
        """A grant was not sent, for the reason that `Sender.send_grant` has returned."""
        if outcome == BLOCKED:
            connection.pending_grant = PendingGrant(seq, offset, fresh)
            connection.state = AWAITING_READ
            self._rearm(connection)
        elif outcome == CLOSED:
            self._end(connection)
        else:
            assert isinstance(outcome, FDBrokerError)
            self._roll_back(connection, seq, offset, outcome)

    def resume(self, connection: ServerConnection) -> None:
        """The client has read: send the grant that waited for that."""
        pending, connection.pending_grant = connection.pending_grant, None
        assert pending is not None
        connection.state = READY
        self.grant(connection, *pending)

    def drop_pending(self, connection: ServerConnection) -> None:
        """The grant that waits is never sent: close what was opened for it."""
        pending, connection.pending_grant = connection.pending_grant, None
        if pending is not None and pending.fresh is not None:
            self._discard(pending.fresh)

    def _roll_back(
        self, connection: ServerConnection, seq: int, offset: int, error: FDBrokerError
    ) -> None:
        """Tell the client why the descriptors from `offset` on cannot be sent."""
        if isinstance(error, QuotaExceeded):
            log_refusal(connection, error)
        if offset == 0 and not connection.repeated:
            self._lender.roll_back_grant(connection.session, self._loop.now)
        self.reply(connection, encode_error(seq, error))

    # --- read-only loans ---

    def _reopen(self, connection: ServerConnection, seq: int, offset: int) -> None:
        """Have a worker open what one message can bring."""
        entries = connection.session.entries[offset : offset + SCM_MAX_FD]
        accounting, account = self._lender.accounting, connection.account
        try:
            accounting.check(account, "closes", len(entries))
        except FDBrokerError as error:
            self._roll_back(connection, seq, offset, error)
            return
        charge = accounting.charge(account, "closes", len(entries))
        self._lender.pin(entries)
        job = Reopen([entry.sysfd for entry in entries], account)
        connection.state, connection.job = WORKING, job
        self._pool.submit(job, partial(self._reopened, connection, seq, offset, entries, charge))

    def _reopened(
        self,
        connection: ServerConnection,
        seq: int,
        offset: int,
        entries: Sequence[Entry],
        charge: Charge,
    ) -> None:
        """The worker is done.  What is not sent is closed."""
        job, connection.job = connection.job, None
        assert job is not None
        self._lender.unpin(entries)
        self._scheduler.charge(connection.account.uid, job.took)
        fresh = Fresh(job.detach_fds(), charge)
        charge.set(len(fresh.fds))
        if connection.state != WORKING or job.crash:
            self._discard(fresh)
            self._end(connection)
            return
        connection.state = READY
        if job.error is None:
            self.grant(connection, seq, offset, fresh)
        else:
            self._discard(fresh)
            self._roll_back(connection, seq, offset, job.error)
        if job.cancelled and connection.state != ENDED:
            self._lender.advance(connection.session, job.cancelled)

    def _discard(self, fresh: Fresh) -> None:
        if fresh.fds:
            discard(self._pool, fresh.charge, fresh.fds)


def discard(pool: WorkerPool, charge: Charge, fds: list[int]) -> None:
    """Have a worker close descriptors, and release what is charged for them then."""
    user: Hashable = charge.account
    pool.submit(Discard(fds, user), charge.release)
