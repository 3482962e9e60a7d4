"""How the next message of a connection is received: by which thread, and in whose turn.

* A peer that may do everything is served by the loop as soon as it has sent something.
* The messages of everybody else are items of the fair queue: one message is one item.  While the
  item waits, the port reports nothing but the end of the connection.
* A connection that may put is received from by a worker, since its messages may bring descriptors
  (see the channel's module).  The worker also inspects what came, then the loop acts on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
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
    from fdbroker.ipc.server.fair_queue import FairQueue
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
        queue: FairQueue,
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
        self._queue = queue
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
        if connection.rights.unlimited and not connection.puts:
            return self._dispatcher.serve
        return self._on_event

    def arm(self, connection: ServerConnection) -> None:
        """Have the port report what comes next of a connection, by its state of now."""
        port = self._loop.port
        if connection.state == ENDED:
            return
        if connection.state == AWAITING_READ:
            self._sessions.expect_progress(connection)
            self._set_interest(connection, port.await_read, self._on_read)
        elif connection.receiving is not None:
            self._set_interest(connection, port.mute, self._on_gone)
        else:
            self._set_interest(connection, port.listen, self._handler(connection))

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
        if connection.rights.unlimited:
            connection.serve()
            return
        others_wait = self._queue.busy
        self._queue.submit(connection.account.uid, connection.serve)
        if others_wait:
            self._set_interest(connection, self._loop.port.mute, _wait_for_turn)

    def _take_turn(self, connection: ServerConnection) -> None:
        """Serve one message of a connection, unless the client has to read first."""
        if connection.state in (ENDED, AWAITING_READ):
            return
        if connection.puts:
            self._receive_in_worker(connection)
        else:
            self._dispatcher.serve(connection)
        self.arm(connection)

    def _on_gone(self, connection: ServerConnection, events: int) -> None:
        """The client has gone while a worker receives: its loan need not wait for that."""
        if events & GONE:
            self._loop.unwatch(connection.channel)
            self._in_turn(connection, partial(self._end, connection))

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
            self._queue.submit(connection.account.uid, item)

    # --- by a worker ---

    def _receive_in_worker(self, connection: ServerConnection) -> None:
        accounting, account = self._accounting, connection.account
        try:
            accounting.check_receive(account)
        except QuotaExceeded as error:
            self._dispatcher.reject(connection, error)
            return
        most = int(accounting.free_descriptors > 0)
        charge = accounting.charge(account, "closes", most)
        job = connection.receiving = Receive(connection.channel, account, most)
        self._pool.submit(job, partial(self._received, connection, job, charge))
        self.arm(connection)

    def _received(self, connection: ServerConnection, job: Receive, charge: Charge) -> None:
        self._queue.charge(connection.account.uid, job.took)
        self._in_turn(connection, partial(self._act, connection, job, charge))

    def _act(self, connection: ServerConnection, job: Receive, charge: Charge) -> None:
        """Act on what a worker has received; close what nobody took of it."""
        connection.receiving = None
        try:
            if connection.state == ENDED:
                self._worker_is_done(connection)
            elif job.crash or (job.error and not isinstance(job.error, BlockingIOError)):
                self._end(connection)
            elif job.error is None:
                connection.arrival = job
                self._dispatcher.dispatch(connection, job.data)
        finally:
            connection.arrival = None
            left = job.detach_fds()
            charge.set(len(left))
            if left:
                discard(self._pool, charge, left)
            self.arm(connection)


def _wait_for_turn(connection: ServerConnection, events: int) -> None:
    """Do nothing: the item of the connection is in the fair queue, and finds out by itself."""
