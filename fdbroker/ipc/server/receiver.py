"""How the next message of a connection is received: by which thread, and in whose turn.

* A peer that may do everything is served by the loop as soon as it has sent something.
* The messages of everybody else are items of the scheduler: one message is one item.  While the
  item waits, the port reports nothing but the end of the connection.
* A connection that may put is received from by a worker, since its messages may bring descriptors
  (see the channel's module).  The worker also inspects what came, then the loop acts on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from time import thread_time_ns
from typing import TYPE_CHECKING

from fdbroker.errors import QuotaExceeded
from fdbroker.ipc.server.connection import AWAITING_READ, ENDED, ServerConnection
from fdbroker.ipc.server.delivery import discard
from fdbroker.ipc.server.jobs import Receive
from fdbroker.ipc.transport import GONE, Handler

if TYPE_CHECKING:
    from fdbroker.ipc.server.delivery import Delivery
    from fdbroker.ipc.server.dispatcher import Dispatcher
    from fdbroker.ipc.server.event_loop import EventLoop
    from fdbroker.ipc.server.scheduler import FairScheduler
    from fdbroker.ipc.server.sessions import Sessions
    from fdbroker.ipc.server.worker_pool import WorkerPool
    from fdbroker.lender.accounting import Accounting, Charge

log = logging.getLogger("fdbroker")


class Receiver:
    """Has messages received, and gives them to `dispatcher`.  `end` ends a connection;
    `worker_is_done` is told when a worker is done with one that ended meanwhile."""

    def __init__(
        self,
        loop: EventLoop,
        accounting: Accounting,
        pool: WorkerPool,
        scheduler: FairScheduler,
        sessions: Sessions,
        dispatcher: Dispatcher,
        delivery: Delivery,
        *,
        end: Callable[[ServerConnection], None],
        worker_is_done: Callable[[ServerConnection], None],
    ) -> None:
        self._loop = loop
        self._accounting = accounting
        self._pool = pool
        self._scheduler = scheduler
        self._sessions = sessions
        self._dispatcher = dispatcher
        self._delivery = delivery
        self._end = end
        self._worker_is_done = worker_is_done

    def watch(self, connection: ServerConnection) -> None:
        """Begin to receive from a connection.  OSError: max_user_watches (epoll(7))."""
        connection.serve = partial(self._take_turn, connection)
        self._loop.watch(connection.channel, self._handler(connection), connection)
        connection.interest = self._loop.port.listen

    def _handler(self, connection: ServerConnection) -> Handler:
        if connection.by_worker:
            return self._on_put_event
        return self._dispatcher.serve if connection.rights.unlimited else self._on_event

    def arm(self, connection: ServerConnection) -> None:
        """Have the port report what comes next of a connection, by its state of now."""
        port = self._loop.port
        if connection.state == ENDED:
            return
        if connection.state == AWAITING_READ:
            self._sessions.expect_progress(connection)
            self._set_interest(connection, port.await_read, self._on_read)
        elif not connection.by_worker:
            self._set_interest(connection, port.listen, self._handler(connection))
        elif connection.receiving is None:
            connection.interest = None
            self._set_interest(connection, port.listen_once, self._on_put_event)

    def _set_interest(
        self,
        connection: ServerConnection,
        interest: Callable[..., None],
        handler: Handler,
    ) -> None:
        connection.channel.handler = handler
        if connection.interest != interest:
            interest(connection.channel)
            connection.interest = interest

    # --- in turn ---

    def _on_event(self, connection: ServerConnection, events: int) -> None:
        """A connection that waits for its turn, and does not put, has something."""
        if self._scheduler.admits(connection.account.uid, self._loop.now):
            self._dispatcher.serve(connection)
        else:
            self._scheduler.ready(connection.account.uid, connection.serve)
            self._set_interest(connection, self._loop.port.mute, _wait_for_turn)

    def _on_put_event(self, connection: ServerConnection, events: int) -> None:
        """A connection that puts has something, or has gone; the port reports that once."""
        if connection.receiving is None:
            uid, turn = connection.account.uid, self._loop.now
            if connection.rights.unlimited or self._scheduler.admits(uid, turn):
                self._receive_in_worker(connection)
            else:
                self._scheduler.ready(uid, connection.serve)
        elif events & GONE:
            # Its loan need not wait for what a worker receives.
            self._loop.unwatch(connection.channel)
            self._in_turn(connection, partial(self._end, connection))

    def _take_turn(self, connection: ServerConnection) -> None:
        """Serve one message of a connection that had to wait for its turn, unless it has ended or
        has to read first."""
        if connection.state in (ENDED, AWAITING_READ) or connection.receiving is not None:
            return
        if connection.by_worker:
            self._receive_in_worker(connection)
        else:
            self._dispatcher.serve(connection)
            self.arm(connection)

    def _on_read(self, connection: ServerConnection, events: int) -> None:
        """The client has read a message, or is gone; then what it sent before is received."""
        gone = bool(events & GONE)
        if gone or not connection.channel.unread():
            self._sessions.note_progress(connection)
            self._in_turn(connection, partial(self._resume, connection, gone))

    def _resume(self, connection: ServerConnection, gone: bool) -> None:
        if connection.state != AWAITING_READ:
            return
        if gone:
            self._end(connection)
        else:
            self._delivery.resume(connection)
            self.arm(connection)

    def _in_turn(self, connection: ServerConnection, item: Callable[[], None]) -> None:
        if connection.rights.unlimited:
            item()
        else:
            self._scheduler.submit(connection.account.uid, item, self._loop.now)

    # --- by a worker ---

    def _receive_in_worker(self, connection: ServerConnection) -> None:
        account = connection.account
        try:
            charge = self._accounting.charge_receive(account)
        except QuotaExceeded as error:
            self._dispatcher.reject(connection, error)
            return
        job = Receive(connection.channel, account, charge.count)
        connection.receiving = job
        self._pool.submit(job, partial(self._received, connection, job, charge))

    def _received(self, connection: ServerConnection, job: Receive, charge: Charge) -> None:
        """Act on what a worker has received, and charge its user for the time of both."""
        begun = thread_time_ns()
        connection.receiving = None
        job.charge = charge
        try:
            self._act(connection, job)
        finally:
            connection.arrival = None
            if job.charge is not None:
                left = job.detach_fds()
                charge.set(len(left))
                if left:
                    discard(self._pool, charge, left)
            self.arm(connection)
            if self._scheduler.queues and not connection.rights.unlimited:
                took = job.took + thread_time_ns() - begun
                self._scheduler.charge(connection.account.uid, took)

    def _act(self, connection: ServerConnection, job: Receive) -> None:
        if connection.state == ENDED:
            self._worker_is_done(connection)
        elif job.crash or (job.error and not isinstance(job.error, BlockingIOError)):
            self._end(connection)
        elif job.error is None:
            connection.arrival = job
            self._dispatcher.dispatch(connection, job.data)


def _wait_for_turn(connection: ServerConnection, events: int) -> None:
    """Do nothing: the item of the connection waits in the scheduler, and finds out by itself."""
