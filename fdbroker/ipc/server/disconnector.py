"""The end of connections: from hanging up on a client until its socket is closed.

A session ends with a shutdown, whoever holds copies of the client's end.  Two things can keep the
socket open after that.  It may hold descriptors that nobody received: closing it would close them,
which can block, so a worker takes them out first.  And descriptors that the client was sent may be
in flight still: the kernel counts them until the client receives them or is gone, and once the
socket is closed nobody could ask.  The connection's charges are released when the socket is closed.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from fdbroker.errors import FDBrokerError
from fdbroker.ipc.server.jobs import DrainChannel
from fdbroker.ipc.server.sender import refresh_connection
from fdbroker.lender.accounting import GRACE

if TYPE_CHECKING:
    from fdbroker.ipc.server.connection import ServerConnection
    from fdbroker.ipc.server.event_loop import EventLoop, Timer
    from fdbroker.ipc.server.scheduler import FairScheduler
    from fdbroker.ipc.server.tuning import Tuning
    from fdbroker.ipc.server.worker_pool import WorkerPool
    from fdbroker.lender.accounting import Accounting, Charge


class Disconnector:
    """Hangs up, and closes what can be closed."""

    def __init__(
        self,
        loop: EventLoop,
        pool: WorkerPool,
        scheduler: FairScheduler,
        accounting: Accounting,
        tuning: Tuning,
    ) -> None:
        self._loop = loop
        self._pool = pool
        self._scheduler = scheduler
        self._accounting = accounting
        self._tuning = tuning
        self._closing: set[ServerConnection] = set()
        # Those of them that a worker still receives from.
        self._in_use: set[ServerConnection] = set()
        self._recheck: Timer | None = None

    def hang_up(self, connection: ServerConnection) -> None:
        """End the session now, for both ends.  The socket is closed as soon as may be."""
        self._closing.add(connection)
        self._loop.unwatch(connection.channel)
        connection.channel.shut_down()
        # A worker that receives from the channel has it to itself; `worker_is_done` follows.
        if connection.receiving is not None and connection.receiving.uses_channel:
            self._in_use.add(connection)
        else:
            self._take_apart(connection)

    def worker_is_done(self, connection: ServerConnection) -> None:
        """No worker receives from the channel any more, which was hung up on meanwhile."""
        if connection in self._in_use:
            self._in_use.discard(connection)
            self._take_apart(connection)

    def _take_apart(self, connection: ServerConnection) -> None:
        if connection.channel.may_hold_descriptors:
            self._drain(connection)
        else:
            self._close_if_read(connection)

    def _drain(self, connection: ServerConnection) -> None:
        """Have a worker take out what was not received.  Of each message a few descriptors get
        numbers, if there is room for them, so that they can be kept from lingering."""
        account, rights = connection.account, connection.rights
        most = GRACE if rights.admitted else 0
        try:
            self._accounting.check(account, "closes", 2 * most)
        except FDBrokerError:
            most = 0
        charge = self._accounting.charge(account, "closes", most)
        rest = 0 if rights.unlimited else self._tuning.close_rest
        job = DrainChannel(connection.channel, account, most, rest)
        self._pool.submit(job, partial(self._drained, connection, job, charge))

    def _drained(self, connection: ServerConnection, job: DrainChannel, charge: Charge) -> None:
        charge.release()
        self._scheduler.charge(connection.account.uid, job.took)
        self._close_if_read(connection)

    def _close_if_read(self, connection: ServerConnection) -> None:
        """Close the socket, unless descriptors are in flight to the client: then ask again later.

        The channel is not watched meanwhile, since its client could make events as it likes.
        """
        if connection.channel.in_flight and refresh_connection(connection):
            if self._recheck is None:
                when = self._loop.now + self._tuning.recheck_read
                self._recheck = self._loop.call_at(when, self._ask_again)
            return
        self._closing.discard(connection)
        connection.channel.close()
        connection.release_charges()

    def _ask_again(self) -> None:
        self._recheck = None
        for connection in list(self._closing):
            if not connection.channel.may_hold_descriptors:
                self._close_if_read(connection)

    def close(self, *, workers_ended: bool) -> None:
        """Close every socket, at the end of the broker.  One that a stuck worker may use ends with
        the process."""
        for connection in self._closing:
            if workers_ended or not connection.channel.may_hold_descriptors:
                connection.channel.close()
