"""From a message to its handler: decode, put in sequence, check, and answer what went wrong.

`serve` is the fast path.  A request that was decoded before and comes in sequence takes no
decoding, and BORROW and RETURN go straight to the lender.  Everything else goes through `dispatch`,
which must do the same for every message that both can act on.

A client that breaks the protocol is told so, as the answer that it waits for, and its session ends.
A mistake of ours ends the session that met it, and no other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fdbroker.errors import (
    BrokerClosing,
    FDBrokerError,
    NotPermitted,
    ProtocolError,
    QuotaExceeded,
    UnknownEntry,
    UnknownTicket,
    VersionMismatch,
)
from fdbroker.ipc.protocol.codec import decode_request, encode, encode_error
from fdbroker.ipc.protocol.messages import (
    BORROW,
    CANCEL,
    HELLO,
    MESSAGE_BYTES,
    PUT,
    RETURN,
    VERBS,
    VERSION,
)
from fdbroker.ipc.server.connection import HANDSHAKE, READY, WORKING
from fdbroker.ipc.server.log import log_refusal
from fdbroker.ipc.server.policy import check_somewhere
from fdbroker.ipc.server.request_cache import CONVERSIONS
from fdbroker.lender.model import LENT

if TYPE_CHECKING:
    from fdbroker.ipc.server.connection import ServerConnection
    from fdbroker.ipc.server.delivery import Delivery
    from fdbroker.ipc.server.event_loop import EventLoop
    from fdbroker.ipc.server.handlers import Handlers
    from fdbroker.ipc.server.request_cache import RequestCache
    from fdbroker.ipc.server.sender import Sender
    from fdbroker.ipc.server.sessions import Sessions
    from fdbroker.lender import Lender

# The message at hand, of whichever connection: to make room for each would take longer than to
# receive it.  One byte more than a message may have, so that one that is too long is seen to be.
MESSAGE = bytearray(MESSAGE_BYTES + 1)

log = logging.getLogger("fdbroker")


class Dispatcher:
    """Serves messages with `handlers`.  `end` ends a connection; `rearm` has the port report what
    comes next of one whose state has changed."""

    def __init__(
        self,
        loop: EventLoop,
        lender: Lender,
        sessions: Sessions,
        delivery: Delivery,
        sender: Sender,
        handlers: Handlers,
        cache: RequestCache,
        *,
        end: Callable[[ServerConnection], None],
        rearm: Callable[[ServerConnection], None],
    ) -> None:
        self.draining = False
        self._loop = loop
        self._lender = lender
        self._sessions = sessions
        self._delivery = delivery
        self._sender = sender
        self._handlers = handlers
        self._cache = cache
        self._split, self._known = cache.split, cache.known
        self._end = end
        self._rearm = rearm

    def serve(self, connection: ServerConnection, events: int = 0) -> None:
        """Receive one message and act on it.  After a RETURN the next request of a busy client is
        there already, and to look for it costs less than to wait at the port again."""
        session, receive, lender = connection.session, connection.channel.receive, self._lender
        split, known = self._split, self._known
        try:
            while True:
                try:
                    size = receive(MESSAGE)
                    head, seq, tail = split[size](MESSAGE)
                    verb, fields = known[head + tail]
                except KeyError:
                    self._act(connection, bytes(MESSAGE[:size]))
                    return
                if seq != session.seq + 1 or connection.state != READY:
                    self._act(connection, bytes(MESSAGE[:size]))
                    return
                if verb == BORROW:
                    if not connection.rights.unlimited:
                        self._handlers.check_borrow(connection, fields)
                    if lender.borrow(session, seq, fields, self._loop.now):
                        if not fields.single:
                            self._delivery.grant(connection, seq)
                        elif outcome := self._sender.send_grant(connection, seq):
                            self._delivery.not_sent(connection, outcome, seq)
                    else:
                        self._handlers.wait_began()
                    return
                if verb != RETURN:
                    self._handle(connection, verb, seq, fields)
                    return
                if lender.return_loan(session, seq, self._loop.now):
                    return
        except BlockingIOError:
            return
        except Exception as error:
            self._fail(connection, error)

    def dispatch(self, connection: ServerConnection, data: bytes) -> None:
        """Act on a message that was received already; empty is the end of the session."""
        try:
            self._act(connection, data)
        except Exception as error:
            self._fail(connection, error)

    def _act(self, connection: ServerConnection, data: bytes) -> None:
        if not data:
            self._end(connection)
            return
        verb, seq, fields = decode_request(data)
        if verb in CONVERSIONS:
            fields = CONVERSIONS[verb](*fields)
        arrival = connection.arrival
        brought = arrival is not None and (arrival.count or arrival.truncated)
        if brought and not VERBS[verb].takes_descriptor:
            raise ProtocolError("client", "it sent descriptors that nobody asked for")
        if connection.state == HANDSHAKE:
            self._greet(connection, verb, seq, fields)
        elif connection.state == READY and seq == connection.session.seq + 1:
            self._handle(connection, verb, seq, fields)
            # It was not refused, and may be said again; a put never goes through `serve`.
            if arrival is None:
                self._cache.remember(data, verb, fields)
        else:
            self._act_out_of_sequence(connection, verb, seq)

    def _handle(self, connection: ServerConnection, verb: int, seq: int, fields: Any) -> None:
        reply = self._handlers.table[verb](connection, seq, fields)
        if reply is not None and self._sender.send(connection, reply):
            self._end(connection)

    def _act_out_of_sequence(self, connection: ServerConnection, verb: int, seq: int) -> None:
        """Ignore an old message, answer the last borrow again, and end a session with a gap."""
        session, job = connection.session, connection.job
        last = session.seq if job is None else max(session.seq, job.cancelled)
        if seq > last + 1:
            raise ProtocolError("client", f"after seq {last} came {seq}")
        if seq == last + 1:
            if connection.state != WORKING or verb != CANCEL or job is None or job.cancelled:
                raise ProtocolError("client", "it sent a request before it had the last answer")
            job.cancelled = seq
        elif (
            connection.state == READY
            and session.state == LENT
            and seq == session.seq == session.borrow_seq
        ):
            connection.repeated = True
            self._delivery.grant(connection, seq)

    def _greet(
        self, connection: ServerConnection, verb: int, seq: int, fields: tuple[int, bool]
    ) -> None:
        """Answer HELLO: the peer may have to have the right to put, and must speak our version."""
        if verb != HELLO or seq != 0:
            raise ProtocolError("client", "a session begins with hello")
        version, puts = fields
        try:
            if puts:
                check_somewhere(connection.rights, connection.peer, PUT)
            if version != VERSION:
                raise VersionMismatch(version, VERSION)
            self._sessions.open(connection)
        except FDBrokerError as refusal:
            self.reject(connection, refusal)
            return
        if puts:
            connection.by_worker = True
            connection.channel.accept_descriptors()
            self._rearm(connection)
        self._delivery.reply(connection, encode([0, 0, VERSION]))

    # --- what went wrong ---

    def _fail(self, connection: ServerConnection, error: Exception) -> None:
        """Answer what was raised while a message was received or acted on."""
        if isinstance(error, ProtocolError):
            self.reject(connection, error)
        elif isinstance(error, FDBrokerError):
            self._refuse(connection, error)
        elif isinstance(error, ConnectionError):
            # It died with our messages unread.
            self._end(connection)
        else:
            log.exception("event=error %s", connection)
            self._end(connection)

    def _refuse(self, connection: ServerConnection, error: FDBrokerError) -> None:
        """Tell the client why its request is not granted; the session goes on."""
        session = connection.session
        if isinstance(error, NotPermitted | QuotaExceeded):
            log_refusal(connection, error)
        self._lender.advance(session, session.seq + 1)
        if self.draining and isinstance(error, UnknownEntry | UnknownTicket):
            # The entry has retired because of the drain.
            error = BrokerClosing()
        self._delivery.reply(connection, encode_error(session.seq, error))

    def reject(self, connection: ServerConnection, error: FDBrokerError) -> None:
        """Tell the client why, as the answer that it waits for, and end the session."""
        if isinstance(error, ProtocolError):
            log.warning('event=fault %s reason="%s"', connection, error.reason)
        else:
            log_refusal(connection, error)
        seq = 0 if connection.state == HANDSHAKE else connection.session.seq + 1
        self._delivery.reply(connection, encode_error(seq, error))
        self._end(connection)
