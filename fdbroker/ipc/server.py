"""The broker's loop: one thread that serves all sessions.

Every session is one socket in one epoll.  A readable one is served with one receive: one message,
decoded, checked, handled (verbs.py), answered.  What others are to be told because of it follows
at once (`_settle`).  What can take long is done by workers, and finished here.

The loop trusts nobody.  It never waits for a client: a message that cannot be sent at once ends
the session, and one with descriptors is only sent when the client has read the one before (the
kernel counts descriptors in flight per uid, and a client that never reads would use them up).  It
never polls a descriptor that it lends.  A fault of a client ends that client's session.
"""

from __future__ import annotations

import errno
import logging
import os
import select
from time import CLOCK_BOOTTIME, clock_gettime_ns
from typing import TYPE_CHECKING

from fdbroker.errors import (
    BrokerClosing,
    EntryRetired,
    FDBrokerError,
    NotPermitted,
    ProtocolError,
    TooManyInFlight,
    VersionMismatch,
)
from fdbroker.ipc import unix
from fdbroker.ipc.connection import Connection, Unsent
from fdbroker.ipc.custody import Custody
from fdbroker.ipc.jobs import Close, Discard, HangUp, Reopen
from fdbroker.ipc.messages import (
    CANCEL,
    DESCRIPTORS,
    HELLO,
    MESSAGE_BYTES,
    RETURN,
    VERBS,
    VERSION,
    decode_request,
    encode,
    encode_error,
)
from fdbroker.ipc.session import descriptors_in_use
from fdbroker.ipc.verbs import HANDLERS
from fdbroker.ipc.workers import Job, Workers
from fdbroker.lender.parts import CLOSING, LENT, WAITING, Peer

if TYPE_CHECKING:
    from collections.abc import Callable

    from fdbroker.ipc.listener import Listener
    from fdbroker.lender import Lender

READABLE = int(select.EPOLLIN)
GONE = int(select.EPOLLHUP | select.EPOLLERR)
EVENTS = 64  # taken from epoll at a time
UNANSWERED = (WAITING, CLOSING)
EMPTIED = select.EPOLLOUT | select.EPOLLET  # an edge each time the peer has read a message
SECOND = 1_000_000_000

log = logging.getLogger("fdbroker")


class Server:
    """Serves the books of `lender` at `listener`, until it has drained."""

    def __init__(self, listener: Listener, lender: Lender, custody: Custody | None = None) -> None:
        self.listener = listener
        self.lender = lender
        self.custody = custody or Custody()
        self.workers = Workers()
        self.draining = False
        self._deadline: int | None = None  # of the drain
        self._uids = {0, os.geteuid()}  # who is served
        self._connections: dict[int, Connection] = {}  # by socket number
        self._by_slot: dict[int, Connection] = {}  # by session slot
        self._watched: dict[int, Callable[[], None]] = {}
        self._accepting = True
        self._into: unix.Buffers = ((bytearray(MESSAGE_BYTES),),)
        self._view = memoryview(self._into[0][0])
        self._epoll = select.epoll()
        self.watch(listener.sock.fileno(), self._accept)
        self.watch(self.workers.wake, self._finish_jobs)

    @staticmethod
    def now() -> int:
        """The time of the ledger."""
        return clock_gettime_ns(CLOCK_BOOTTIME)

    # --- the loop ---

    def watch(self, number: int, action: Callable[[], None]) -> None:
        """Call `action` whenever descriptor `number`, which stays the caller's, is readable."""
        self._watched[number] = action
        self._epoll.register(number, READABLE)

    def unwatch(self, number: int) -> None:
        """The opposite."""
        if self._watched.pop(number, None) is not None:
            self._epoll.unregister(number)

    def run(self) -> None:
        """Serve until drained."""
        lender, connections, watched = self.lender, self._connections, self._watched
        poll = self._epoll.poll
        while not self.draining or not self._finished():
            patience = self._patience() if lender.deadlines or self.draining else None
            for number, events in poll(patience, EVENTS):
                connection = connections.get(number)
                if connection is not None:
                    self._serve(connection, events)
                elif number in watched:
                    watched[number]()
                if lender.decisions or lender.closings:
                    self._settle()
            if lender.deadlines:
                lender.expire(self.now())
                self._settle()

    def drain(self, seconds: float | None) -> None:
        """Lend nothing new, retire every entry; `run` ends when the last loan is back and closed,
        or after that many seconds.  None: however long it takes.  The earliest deadline holds."""
        if seconds is not None:
            deadline = self.now() + int(seconds * SECOND)
            self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
        if self.draining:
            return
        self.draining = True
        log.info("event=drain loans=%d entries=%d", self.lender.loans, len(self.lender.entries))
        for entry in [*self.lender.names.values(), *self.lender.tickets.values()]:
            self.lender.start_retiring(entry, self.now())
        self._settle()

    def close(self) -> None:
        """End all sessions and stop listening; what is still lent stays valid at the borrowers."""
        if self.lender.loans:
            log.warning(
                "event=end loans=%d note=these-stay-with-their-borrowers", self.lender.loans
            )
        for connection in list(self._connections.values()):
            self._hang_up(connection)
        self._epoll.close()
        self.workers.close()
        self.listener.close()

    def _finished(self) -> bool:
        """Whether a drain is over."""
        done = not self.lender.entries and not self.workers.pending
        return done or (self._deadline is not None and self.now() >= self._deadline)

    def _patience(self) -> float | None:
        """Seconds until the loop has something to do by itself."""
        deadline = self._deadline
        if self.lender.deadlines:
            first = self.lender.next_deadline()
            deadline = first if deadline is None else min(deadline, first or deadline)
        return None if deadline is None else max(0.0, (deadline - self.now()) / SECOND + 0.001)

    def _settle(self) -> None:
        """Tell others what was decided for them, and have closed what is to be closed."""
        while self.lender.decisions or self.lender.closings:
            while self.lender.decisions:
                session, seq, error = self.lender.decisions.popleft()
                connection = self._by_slot.get(session.slot)
                if connection is None or connection.session is not session:
                    continue
                if error is None and session.state == LENT:
                    self.hand_over(connection, seq, 0)
                elif error is None:
                    self.reply(connection, encode([0, seq]))
                elif self.draining and isinstance(error, EntryRetired):
                    self.refuse(connection, seq, BrokerClosing())
                else:
                    self.refuse(connection, seq, error)
            while self.lender.closings:
                self.workers.submit(Close(self.lender.closings.popleft()))

    def _finish_jobs(self) -> None:
        self.workers.finish(self)

    # --- sessions ---

    def _accept(self) -> None:
        try:
            sock = self.listener.accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            # the connection stays queued, and a level-triggered epoll would spin on it
            log.warning("event=accept-paused error=%r", error.strerror)
            self._accepting = False
            self.unwatch(self.listener.sock.fileno())
            return
        if sock is not None:
            connection = Connection(sock, Peer(*unix.credentials(sock)))
            self._connections[connection.number] = connection
            self._epoll.register(connection.number, READABLE)

    def resume_accepting(self) -> None:
        """A descriptor has become free."""
        if not self._accepting:
            self._accepting = True
            self.watch(self.listener.sock.fileno(), self._accept)

    def _serve(self, connection: Connection, events: int) -> None:
        """One event of one session: receive one message, act upon it.

        After a RETURN look for one more: a busy client's next request is there already, and to
        find it so costs less than to ask epoll again.
        """
        if connection.unsent is not None and not events & GONE:
            self._send_unsent(connection)
        elif self._receive(connection) == RETURN and not self.lender.decisions:
            self._receive(connection)

    def _receive(self, connection: Connection) -> int | None:
        """Take one message and act upon it: its verb, if all is well."""
        try:
            size, inbox = unix.receive_now(connection.sock, self._into)
        except BlockingIOError:
            return None
        except OSError:  # ECONNRESET: it died with our messages unread
            self.end(connection)
            return None
        if size == 0:
            if inbox is not None:
                self.workers.submit(Discard(inbox.give_away()))
            self.end(connection)
            return None
        connection.inbox = inbox
        try:
            verb, seq, fields = decode_request(bytes(self._view[:size]))
            if inbox is not None and not VERBS[verb].takes_descriptor:
                raise ProtocolError("client", "it sent descriptors that nobody asked for")
            if connection.greeted:
                self._handle(connection, verb, seq, fields)
            else:
                self._greet(connection, verb, seq, fields[0] if fields else 0)
            return verb
        except ProtocolError as error:
            self._fault(connection, error)
        except Exception:  # a mistake of ours costs one session, not every loan of everybody
            log.exception("event=error %s", connection)
            self.end(connection)
        finally:
            if inbox is not None:
                connection.inbox = None
                if left := inbox.give_away():
                    self.workers.submit(Discard(left))
        return None

    def _handle(self, connection: Connection, verb: int, seq: int, fields: list[object]) -> None:
        session = connection.session
        if seq != session.seq + 1:
            self._repeat(connection, seq)
            return
        if connection.job is not None or session.state in UNANSWERED:
            if verb != CANCEL:
                raise ProtocolError("client", "it sent a request before it had the last answer")
            if connection.job is not None:  # the answer is on its way
                self.lender.advance(session, seq)
                return
        try:
            reply = HANDLERS[verb](self, connection, seq, fields)
        except FDBrokerError as error:
            if isinstance(error, ProtocolError):
                raise
            self.lender.advance(session, seq)
            reply = encode_error(seq, error)
        if reply is not None:
            self.reply(connection, reply)

    def _repeat(self, connection: Connection, seq: int) -> None:
        """An old message is ignored, the last borrow is answered again, a gap is a fault."""
        session = connection.session
        if seq > session.seq:
            raise ProtocolError("client", f"after seq {session.seq} came {seq}")
        loan = session.loan
        if session.state != LENT or loan is None or not seq == session.seq == loan.seq:
            return
        if connection.job is None and connection.unsent is None:
            self.hand_over(connection, seq, 0)

    def _greet(self, connection: Connection, verb: int, seq: int, version: int) -> None:
        """HELLO: who is it, may it, and does it speak our version?"""
        if verb != HELLO or seq != 0:
            raise ProtocolError("client", "a session begins with hello")
        peer = connection.peer
        refusal: FDBrokerError | None = None
        if peer.uid not in self._uids:
            refusal = NotPermitted(peer.uid, "connect")
        elif version != VERSION:
            refusal = VersionMismatch(version, VERSION)
        else:
            try:
                connection.session = self.lender.open(peer)
            except FDBrokerError as error:
                refusal = error
        if refusal is not None:
            log.warning('event=refused %s reason="%s"', connection, refusal)
            self.refuse(connection, 0, refusal)
            self.end(connection)
            return
        connection.greeted = True
        self._by_slot[connection.session.slot] = connection
        self.custody.keep_session(connection.session.slot, connection.sock)
        self.reply(connection, encode([0, 0, VERSION]))

    def _fault(self, connection: Connection, error: ProtocolError) -> None:
        log.warning('event=fault %s reason="%s"', connection, error.reason)
        seq = (
            connection.session.seq + 1 if connection.greeted else 0
        )  # whoever asked waits for that
        self.refuse(connection, seq, error)
        self.end(connection)

    def end(self, connection: Connection) -> None:
        """The session is over: loans cleared, custody told, slot freed.

        While a worker has its request that waits, since it uses what the loan keeps open.
        """
        if not connection.ended:  # the second time its number may be another's
            connection.ended = True
            del self._connections[connection.number]
            self._hang_up(connection)
            if connection.unsent is not None and connection.unsent.fresh:
                self.workers.submit(Discard(connection.unsent.fresh))
            connection.unsent = None
        if connection.greeted and connection.job is None:
            session = connection.session
            connection.greeted = False
            self.lender.clear(session, self.now())
            self.custody.drop_session(session.slot)
            del self._by_slot[session.slot]
            self.lender.forget(session)

    def _hang_up(self, connection: Connection) -> None:
        unix.shut_down(connection.sock)
        self._epoll.unregister(connection.number)
        self.workers.submit(HangUp(connection.sock))

    # --- answers ---

    def reply(self, connection: Connection, data: bytes) -> None:
        """Send a message without descriptors, now or never."""
        if connection.ended:
            return
        try:
            connection.sock.send(data, unix.SEND_NOW)
        except BlockingIOError:
            log.warning("event=ended %s reason=it-does-not-read", connection)
            self.end(connection)
        except OSError:
            self.end(connection)

    def refuse(self, connection: Connection, seq: int, error: FDBrokerError) -> None:
        """Send a refusal."""
        self.reply(connection, encode_error(seq, error))

    def hand_over(self, connection: Connection, seq: int, offset: int) -> None:
        """Send the descriptors of a loan, which is on the ledger, from `offset` on."""
        loan = connection.session.loan
        assert loan is not None
        if loan.readonly:
            part = loan.entries[offset : offset + DESCRIPTORS]
            sysfds = [entry.sysfd for entry in part]
            self.start_job(connection, Reopen(connection, seq, offset, sysfds))
        else:
            self.send_loan(connection, seq, offset, None)

    def send_loan(
        self, connection: Connection, seq: int, offset: int, fresh: list[int] | None
    ) -> None:
        """The same, with the descriptors opened for it (`fresh`, closed afterwards) or its own."""
        loan = connection.session.loan
        assert loan is not None
        if connection.ended:
            if fresh:
                self.workers.submit(Discard(fresh))
            return
        if not unix.all_read(connection.sock):
            connection.unsent = Unsent(seq, offset, fresh)
            self._epoll.modify(connection.number, EMPTIED)
            return
        entries = loan.entries
        total = len(entries)
        if total == 1 and fresh is None:
            count, ancillary = 1, entries[0].ancillary
        else:
            fds = fresh or [entry.sysfd for entry in entries[offset : offset + DESCRIPTORS]]
            count, ancillary = len(fds), unix.rights(fds)
        data = encode([0, seq, total, count, loan.since])
        try:
            unix.send_with(connection.sock, data, ancillary, unix.SEND_NOW)
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            self.end(connection)
        except OSError as error:
            log.warning('event=not-sent %s reason="%s"', connection, error.strerror)
            self.take_back(connection, seq, TooManyInFlight())
        if fresh:
            self.workers.submit(Discard(fresh))

    def take_back(self, connection: Connection, seq: int, error: FDBrokerError) -> None:
        """The loan ends here, since its descriptors cannot be sent; the client is told why."""
        self.lender.take_back(connection.session, self.now())
        self.refuse(connection, seq, error)

    def _send_unsent(self, connection: Connection) -> None:
        unsent = connection.unsent
        assert unsent is not None
        if unix.all_read(connection.sock):
            connection.unsent = None
            self._epoll.modify(connection.number, READABLE)
            self.send_loan(connection, *unsent)

    def start_job(self, connection: Connection, job: Job) -> None:
        """Have a worker do the slow part of this connection's request."""
        connection.job = job
        self.workers.submit(job)

    def stats(self) -> dict[str, int]:
        """Counts, for people and for tests."""
        return {
            "sessions": len(self.lender.sessions),
            "entries": len(self.lender.entries),
            "loans": self.lender.loans,
            "waiting": self.lender.waiting,
            "jobs": self.workers.pending,
            "connections": len(self._connections),
            "descriptors": descriptors_in_use(),
        }
