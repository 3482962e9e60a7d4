"""The broker: it serves all sessions in one thread.

Every session is one socket in the loop's epoll.  A readable one is served with one receive: one
message, decoded, checked, handled (verbs.py), answered.  What others are to be told because of it
follows at once (`settle`).  What can take long is done by workers, and finished here.

It trusts nobody.  It never waits for a client (answers.py), and takes up one request of each uid
at a time.  It never polls a descriptor that it lends.  A fault of a client ends that client's
session.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fdbroker.descriptors import LISTENERS
from fdbroker.errors import (
    BrokerClosing,
    EntryRetired,
    FDBrokerError,
    NotPermitted,
    ProtocolError,
    QuotaExceeded,
    UnknownEntry,
    UnknownTicket,
    VersionMismatch,
)
from fdbroker.ipc.protocol.messages import (
    BORROW,
    CANCEL,
    HELLO,
    PUT,
    RETURN,
    SPLIT,
    VERBS,
    VERSION,
    decode_request,
    encode,
    encode_error,
    remember,
)
from fdbroker.ipc.server.connection import (
    ENDED,
    GREETING,
    LADEN,
    MESSAGE,
    READY,
    WORKING,
    Connection,
    NoRoom,
)
from fdbroker.ipc.server.custody import Custody
from fdbroker.ipc.server.handlers import HANDLERS
from fdbroker.ipc.server.jobs import Close, Discard
from fdbroker.ipc.server.policy import Admission, check_right_somewhere, log_refusal
from fdbroker.ipc.server.scheduler import Turns
from fdbroker.ipc.server.shares import LONG
from fdbroker.ipc.transport import unix
from fdbroker.ipc.transport.rlimit import descriptors_in_use
from fdbroker.lender.accounting import DEFAULT, Quota
from fdbroker.lender.model import FREE, LENT

if TYPE_CHECKING:
    from fdbroker.ipc.server.jobs import Request
    from fdbroker.ipc.transport.listener import Listener
    from fdbroker.lender import Lender
    from fdbroker.lender.model import Entry
    from fdbroker.lender.rules import Rule


COSTLY = 32  # to receive and close so many descriptors costs as much as an offence

log = logging.getLogger("fdbroker")


class Server(Turns):
    """Serves the books of `lender` at `listener`, until it has drained."""

    def __init__(self, listener: Listener, lender: Lender, custody: Custody | None = None) -> None:
        super().__init__(listener, lender)
        self.custody = custody or Custody()
        self._admission = Admission()
        self._by_slot: dict[int, Connection] = {}  # by session slot
        self.watch(self.workers.wake, self._finish_jobs)

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
        for connection in self._hung_up:
            if not connection.brings_descriptors:  # else a close may wait, as it is for a worker
                connection.sock.close()

    def set_rules(self, rules: tuple[Rule, ...], quota: Quota = DEFAULT) -> None:
        """From now on these say who may do what, and have how much, beside root and the broker's
        own uid.

        They hold for the next request of every session, also of those that are open.  What was
        granted before stays granted: loans, and waits.
        """
        self._admission = Admission(rules, quota)
        before = {one: one.quota for one in self.lender.accounting.accounts.values() if one.limited}
        for account in self.lender.accounting.accounts.values():
            account.clear_limit()
            self._admission.hold(account)
        for connection in self._connections.values():
            self._admission.look_at(connection)
        for account, quota in before.items():
            if not account.limited:  # nobody of it is admitted any more: what is granted stays
                account.set_limit(quota)
        for connection in self._connections.values():
            self.listen(connection)

    def keep(self, entry: Entry, where: str) -> None:
        """It has just come into the books, by a put or from the file: it leads to `where`.

        No request is taken up between the two.
        """
        entry.target = where
        entry.ancillary = unix.rights((entry.sysfd,))
        self.custody.keep_entry(entry.slot, entry.sysfd)
        if entry.kind in LISTENERS:
            self._admission.forget()

    def settle(self) -> None:
        """Tell others what was decided for them, and have closed what is to be closed."""
        while self.lender.notifications or self.lender.pending_closes:
            while self.lender.notifications:
                session, seq, error = self.lender.notifications.popleft()
                connection = self._by_slot.get(session.slot)
                if connection is None or connection.session is not session:
                    continue
                if self.is_put_off(connection):
                    self.tell_later(session, seq, error)
                    continue
                try:
                    self.in_time(connection, self._tell, connection, seq, error)
                except Exception:
                    self._blame_us(connection)
            while self.lender.pending_closes:
                entry = self.lender.pending_closes.popleft()
                self.lender.accounting.add(entry.account, "closes", 1)
                self.lender.accounting.add(entry.account, "closing", 1)
                self.workers.submit(Close(entry))

    def _tell(self, connection: Connection, seq: int, error: FDBrokerError | None) -> None:
        if error is None and connection.session.state == LENT:
            self.hand_over(connection, seq)
        elif error is None:
            self.reply(connection, encode([0, seq]))
        elif self.draining and isinstance(error, EntryRetired):
            self.reply(connection, encode_error(seq, BrokerClosing()))
        else:
            self.reply(connection, encode_error(seq, error))

    def _finish_jobs(self, about: None, events: int) -> None:
        self.workers.finish(self, LONG)

    # --- sessions ---

    def admit(self, connection: Connection) -> None:
        """It has come: serve it.  `NotPermitted`, `QuotaExceeded`; OSError: max_user_watches."""
        self._admission.look_at(connection)
        self._admission.check_come(connection)
        self.watch(connection.number, self.serving(connection), connection)
        self.lender.accounting.add(connection.account, "sessions", 1)
        self._connections[connection.number] = connection

    def _serve(self, connection: Connection, events: int) -> None:
        """A session can be received from: take one message and act upon it.

        A request that was seen before, and comes in turn, needs neither decoding nor checks.
        After a RETURN we look for one more: a busy client's next request is there by then, and to
        find it so costs less than to ask epoll again.
        """
        session, receive, known = connection.session, connection.receive, connection.known
        lender = self.lender
        try:
            while True:
                try:
                    size = receive(MESSAGE)
                    head, seq, tail = SPLIT[size](MESSAGE)
                    verb, fields = known[head + tail]
                except KeyError:
                    self._receive_unusual(connection, size)
                    return
                except BlockingIOError:
                    return
                except FDBrokerError:  # its uid's descriptors wait to be closed; also an OSError
                    raise
                except OSError:  # ECONNRESET: it died with our messages unread
                    self.end(connection)
                    return
                if seq != session.seq + 1 or connection.state != READY:
                    self._receive_unusual(connection, size)
                    return
                if verb == BORROW:  # as its handler does with one who may
                    if lender.borrow(session, seq, fields, self.now):
                        self.hand_over(connection, seq)
                    return
                if verb != RETURN:
                    self._handle(connection, verb, seq, fields)
                    return
                if lender.return_loan(session, seq, self.now):
                    return
        except NoRoom:
            self.receive_apart(connection)
        except ProtocolError as error:
            self._fault(connection, error)
        except FDBrokerError as error:
            self._refuse(connection, error)
        except Exception:
            self._blame_us(connection)

    def _receive_unusual(self, connection: Connection, size: int) -> None:
        """The same for what was not said before, comes with descriptors, or out of turn."""
        try:
            if not size:
                self.end(connection)
                return
            if connection.state == LADEN:
                connection.state = READY
            data = bytes(MESSAGE[:size])
            verb, seq, fields = decode_request(data)
            if connection.inbox is not None and not VERBS[verb].takes_descriptor:
                raise ProtocolError("client", "it sent descriptors that nobody asked for")
            if connection.state == GREETING:
                self._greet(connection, verb, seq, fields)
            elif connection.state == READY and seq == connection.session.seq + 1:
                self._handle(connection, verb, seq, fields)
                remember(connection.known, data, verb, fields)  # it was not refused
            else:
                self._receive_out_of_turn(connection, verb, seq)
        finally:
            if connection.inbox is not None:
                self._drop_inbox(connection)

    def _handle(self, connection: Connection, verb: int, seq: int, fields: Any) -> None:
        reply = HANDLERS[verb](self, connection, seq, fields)
        if reply is not None:
            self.reply(connection, reply)

    def _receive_out_of_turn(self, connection: Connection, verb: int, seq: int) -> None:
        """An old message is ignored, the last borrow is answered again, a gap is a fault."""
        session, job = connection.session, connection.job
        last = session.seq if job is None else max(session.seq, job.seq)
        if seq > last + 1:
            raise ProtocolError("client", f"after seq {last} came {seq}")
        if seq == last + 1:  # it is WORKING
            if verb != CANCEL or job is None or job.cancelled:
                raise ProtocolError("client", "it sent a request before it had the last answer")
            job.cancelled = seq
        elif (
            connection.state == READY
            and session.state == LENT
            and seq == session.seq == session.borrow_seq
        ):
            connection.repeated = True
            self.hand_over(connection, seq)

    def _refuse(self, connection: Connection, error: FDBrokerError) -> None:
        """Its request cannot be granted: the answer says why."""
        session = connection.session
        if isinstance(error, NotPermitted | QuotaExceeded):
            log_refusal(connection, error)
        if isinstance(error, QuotaExceeded) and error.what == "closes":
            self._hang_up_with(connection, error)
            return
        self.lender.advance(session, session.seq + 1)
        if self.draining and isinstance(error, UnknownEntry | UnknownTicket):
            error = BrokerClosing()  # it has retired because of that
        self.reply(connection, encode_error(session.seq, error))

    def _drop_inbox(self, connection: Connection) -> None:
        """Close what came with a message and was not taken out by its handler."""
        inbox, connection.inbox = connection.inbox, None
        assert inbox is not None
        if left := inbox.give_away():
            self.note_offences(connection, len(left) // COSTLY)
            self.workers.submit(Discard(left, connection.account))

    def _greet(self, connection: Connection, verb: int, seq: int, fields: tuple[int, bool]) -> None:
        """HELLO: who is it, may it, and does it speak our version?"""
        if verb != HELLO or seq != 0:
            raise ProtocolError("client", "a session begins with hello")
        version, puts = fields
        try:
            if puts:
                check_right_somewhere(connection, PUT)
            if version != VERSION:
                raise VersionMismatch(version, VERSION)
            connection.session = self.lender.open(connection.peer)
        except FDBrokerError as refusal:
            log_refusal(connection, refusal)
            self.reply(connection, encode_error(0, refusal))
            self.end(connection)
            return
        if puts:
            connection.accept_descriptors()
        connection.state = READY
        self.has_come(connection)
        self._by_slot[connection.session.slot] = connection
        self.custody.keep_session(connection.session.slot, connection.sock)
        self.reply(connection, encode([0, 0, VERSION]))

    def _fault(self, connection: Connection, error: ProtocolError) -> None:
        """The client broke the rules: tell it, as the answer that it waits for, and hang up."""
        log.warning('event=fault %s reason="%s"', connection, error.reason)
        self.rest(connection)
        self._hang_up_with(connection, error)

    def _hang_up_with(self, connection: Connection, error: FDBrokerError) -> None:
        seq = 0 if connection.state == GREETING else connection.session.seq + 1
        self.reply(connection, encode_error(seq, error))
        self.end(connection)

    def _blame_us(self, connection: Connection) -> None:
        """A mistake of ours costs one session, not every loan of everybody."""
        log.exception("event=error %s", connection)
        self.end(connection)

    def end(self, connection: Connection) -> None:
        """The session is over: hang up, clear its loans, tell custody, free its slot.

        While a worker has its request the last two wait; the request calls this when it is back.
        """
        if connection.state != ENDED:  # the second time its number may be another's
            connection.state = ENDED
            self.has_come(connection)
            del self._connections[connection.number]
            self._hang_up(connection)
            self._drop_unsent(connection)
            self._drop_received(connection)
            self._note_unread(connection, 0)
            self.forget_turn(connection)
        if (session := connection.session).state == FREE:
            return
        self.lender.clear(session, self.now)
        if connection.job is None:
            self.custody.drop_session(session.slot)
            del self._by_slot[session.slot]
            self.lender.free(session)
            self.lender.accounting.drop_idle(session.account)

    def start_job(self, connection: Connection, job: Request) -> None:
        """Have a worker do the slow part of this connection's request."""
        connection.state, connection.job = WORKING, job
        self.workers.submit(job)

    def job_is_back(self, connection: Connection) -> None:
        """The opposite; the answer is the job's."""
        connection.job = None
        if connection.state == WORKING:
            connection.state = READY

    def stats(self) -> dict[str, int]:
        """Counts, for people and for tests."""
        return {
            "sessions": len(self.lender.sessions),
            "entries": len(self.lender.entries),
            "loans": self.lender.loans,
            "waiting": self.lender.waiting,
            "jobs": self.workers.pending + self.workers.apart,
            "connections": len(self._connections),
            "descriptors": descriptors_in_use(),
        }
