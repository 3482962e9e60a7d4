"""All connections of the broker, and the sessions of those that have said HELLO."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from fdbroker.ipc.server.connection import ENDED, HANDSHAKE, READY, ServerConnection
from fdbroker.lender.model import FREE

if TYPE_CHECKING:
    from fdbroker.ipc.server.custody import Custody
    from fdbroker.ipc.server.event_loop import EventLoop
    from fdbroker.ipc.server.scheduler import FairScheduler
    from fdbroker.ipc.server.tuning import Tuning
    from fdbroker.lender import Lender
    from fdbroker.lender.model import Session

log = logging.getLogger("fdbroker")


class Sessions:
    """The connections that have not ended.  `end` is called for one that is silent for too long."""

    def __init__(
        self,
        loop: EventLoop,
        lender: Lender,
        custody: Custody,
        scheduler: FairScheduler,
        tuning: Tuning,
        *,
        end: Callable[[ServerConnection], None],
    ) -> None:
        self.connections: dict[ServerConnection, None] = {}
        self._loop = loop
        self._lender = lender
        self._custody = custody
        self._scheduler = scheduler
        self._tuning = tuning
        self._end = end
        self._by_slot: dict[int, ServerConnection] = {}

    def add(self, connection: ServerConnection) -> None:
        """A connection has come.  It has to send its HELLO in time."""
        self.connections[connection] = None
        self.expect_progress(connection)

    def open(self, connection: ServerConnection) -> None:
        """Give a connection its session; `BrokerFull`."""
        session = connection.session = self._lender.open(connection.peer)
        connection.state = READY
        self.note_progress(connection)
        self._by_slot[session.slot] = connection
        self._custody.keep_session(session.slot, connection.channel.number)

    def connection_of(self, session: Session) -> ServerConnection | None:
        """The connection of a session; None if that has ended."""
        connection = self._by_slot.get(session.slot)
        return connection if connection is not None and connection.session is session else None

    def remove(self, connection: ServerConnection) -> None:
        """A connection ends: so does its session, with its loan."""
        connection.state = ENDED
        self.note_progress(connection)
        del self.connections[connection]
        session = connection.session
        if session.state != FREE:
            self._lender.clear(session, self._loop.now)
            self._custody.drop_session(session.slot)
            del self._by_slot[session.slot]
            self._lender.free(session)

    def expect_progress(self, connection: ServerConnection) -> None:
        """End the connection unless it says HELLO, or reads, in time."""
        self.note_progress(connection)
        when = self._loop.now + self._tuning.handshake
        connection.timer = self._loop.call_at(when, partial(self._is_late, connection))

    def note_progress(self, connection: ServerConnection) -> None:
        """The connection has done what it had to do in time."""
        if connection.timer is not None:
            connection.timer.cancel()
            connection.timer = None

    def _is_late(self, connection: ServerConnection) -> None:
        connection.timer = None
        if self._scheduler.is_ready(connection.account.uid, connection.serve):
            # It has said something, and we have not listened yet.
            self.expect_progress(connection)
            return
        reason = "it-said-no-hello" if connection.state == HANDSHAKE else "it-does-not-read"
        log.warning("event=ended %s reason=%s", connection, reason)
        self._end(connection)
