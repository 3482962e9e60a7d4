"""The lender: who may have which entry when, and when an entry's last reference is back.

It knows no socket, clock or pid of its own: peers, times (nanoseconds of CLOCK_BOOTTIME), tickets
and descriptors are arguments.  Each method is one event.  It changes the books (books.py), writes
the change through to the ledger, and returns or raises what the asking session is to be told.
What it decides for *other* sessions is left in `decisions`, and what is to be closed in
`closings`; the caller works off both before it goes on.
"""

from __future__ import annotations

from heapq import heappop
from typing import TYPE_CHECKING

from fdbroker.errors import (
    CloseFailed,
    NameTaken,
    ProtocolError,
    UnknownEntry,
    UnknownTicket,
    WouldDeadlock,
)
from fdbroker.lender.ledger import (
    ARRIVAL,
    BORROW_SEQ,
    CELL,
    COMMIT,
    ID,
    NEXT_ARRIVAL,
    NEXT_GENERATION,
    NEXT_SESSION,
    SINCE,
    STATE_BITS,
    WHAT,
    EntryRecord,
)
from fdbroker.lender.model import (
    CLOSING,
    EPHEMERAL,
    FREE,
    IDLE,
    LENT,
    LIVE,
    NAMELESS,
    NO_REQUEST,
    RETIRING,
    WAITING,
    Entry,
    LoanRequest,
    Peer,
    Session,
)
from fdbroker.lender.names import check_name
from fdbroker.lender.state import REASON_CHARS, LenderState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.rc import FD


class Lender(LenderState):
    """The events of one broker."""

    # --- sessions ---

    def open(self, peer: Peer) -> Session:
        """A new session; `BrokerFull` if there is no room for one."""
        slot = self._session_slots.take()
        id, account = self.ledger.count(NEXT_SESSION), self.quotas.account(peer.uid)
        session = Session(slot, id, peer, self.ledger.record(slot), account)
        session.record[ID] = session.id
        self._commit(session, IDLE)
        self.sessions[session.slot] = session
        return session

    def advance(self, session: Session, seq: int) -> None:
        """Note that a request which changes nothing in the books was acted upon."""
        session.seq = seq
        self._commit(session, session.state)

    def clear(self, session: Session, now: int) -> None:
        """The session has ended: so does its loan or its wait; its ephemeral entries retire."""
        if session.state == WAITING:
            self._leave_lines([session], now)
        elif session.state == LENT:
            self.give_back(session, session.seq, now)
        elif session.state == CLOSING:
            self._leave_watch(session)
        for entry in list(session.owned.values()):
            self.start_retiring(entry, now)

    def forget(self, session: Session) -> None:
        """Free the slot of a cleared session."""
        session.record[COMMIT] = FREE
        del self.sessions[session.slot]
        session.state = FREE
        self._session_slots.give(session.slot)

    # --- borrowing ---

    def borrow(self, session: Session, seq: int, request: LoanRequest, now: int) -> bool:
        """Grant a loan of all that is wished for: True; or put it in the line: False.

        Raises `UnknownEntry`, `UnknownTicket`, `WouldDeadlock`, `BrokerFull`, `QuotaExceeded`, and
        `BorrowTimeout` where the timeout is 0.
        """
        if session.state != IDLE:
            raise out_of_turn(session, "a session carries one loan, or one wait")
        account = session.account
        if account.loans + request.count > account.most_loans:  # before any of the names costs time
            self.quotas.check(account, "loans", request.count)
        names, exclusive, entries = self.names, request.exclusive, []
        for name in request.names:
            try:
                entry = names[name]  # type: ignore[index]
            except KeyError:
                entry = self.find(name)
            if entry.held_exclusively or entry.turns:
                return self._stand_in_line(session, seq, request, now)
            if exclusive and (entry.holders or entry.line):
                return self._stand_in_line(session, seq, request, now)
            entries.append(entry)
        if request.needs_extra_records:
            self._note_more(session, request, entries)
        record = session.record
        record[BORROW_SEQ] = session.borrow_seq = session.seq = seq
        record[SINCE] = session.since = now
        record[WHAT] = request.shape | entries[0].slot
        session.request, session.entries, session.state = request, entries, LENT
        record[COMMIT] = seq << STATE_BITS | LENT
        self.hold(session)
        return True

    def _stand_in_line(self, session: Session, seq: int, request: LoanRequest, now: int) -> bool:
        """It cannot be granted at once."""
        entries = [self.find(name) for name in request.names]
        self._refuse_wait(session, request, entries, now)
        if request.needs_extra_records:
            self._note_more(session, request, entries)
        record = session.record
        record[BORROW_SEQ] = session.borrow_seq = session.seq = seq
        record[WHAT] = request.shape | entries[0].slot
        record[ARRIVAL] = session.arrival = self.ledger.count(NEXT_ARRIVAL)
        session.request, session.entries = request, entries
        self._ask(session, seq, now, request.timeout)
        self._commit(session, WAITING)
        self.stand_in_line(session)
        return False

    def _note_more(self, session: Session, request: LoanRequest, entries: list[Entry]) -> None:
        """Write what most loans have not; `BrokerFull`, `QuotaExceeded`: nothing was noted."""
        if len(entries) > 1:
            self.quotas.check_members(session.account, len(entries) - 1)
            session.cells = self._cells.take_many(len(entries) - 1)
            self.ledger.write_cells(session.cells, [entry.slot for entry in entries[1:]])
            session.record[CELL] = session.cells[0]
            self.quotas.add_members(session.account, len(session.cells))
        if request.purpose_bytes:
            self.ledger.write_purpose(session.slot, request.purpose_bytes)

    def give_back(self, session: Session, seq: int, now: int) -> bool:
        """A RETURN, or whatever else ends a loan: whether others are concerned.  `ProtocolError` if
        there is none."""
        request, entries, slot = session.request, session.entries, session.slot
        if session.state != LENT:
            raise out_of_turn(session, "a return without a loan")
        session.seq, session.state = seq, IDLE
        session.request, session.entries = NO_REQUEST, ()
        session.record[COMMIT] = seq << STATE_BITS | IDLE
        session.account.loans -= len(entries)
        for entry in entries:
            entry.fd.decref()
            entry.holders.pop(slot, None)  # it is not there again where two names are alike
        if request.exclusive:
            for entry in entries:
                entry.held_exclusively = False
        if session.cells:
            self._give_cells(session)
        if not self.waiting and not self.retiring:  # so nobody waits for any of these
            return False
        if any(entry.line or entry.state == RETIRING for entry in entries):
            self._end_concerns(request, entries, now)
            return True
        return False

    def take_back(self, session: Session, now: int) -> None:
        """The loan ends because its descriptors could not be sent."""
        self.give_back(session, session.seq, now)

    def keep_open(self, entries: Sequence[Entry]) -> None:
        """The broker itself uses these, which are on loan, and may do so longer than the loan."""
        for entry in entries:
            entry.users += 1

    def let_go(self, entries: Sequence[Entry]) -> None:
        """The opposite."""
        for entry in entries:
            entry.users -= 1
            self.close_if_unused(entry)

    def cancel(self, session: Session, seq: int, now: int) -> None:
        """A CANCEL: the wait ends as if its deadline had come, and what was just put retires.

        What was granted already stands, and the client returns it: its descriptor may be on its
        way, so only the client knows when it is gone.
        """
        made = session.made
        if made is not None and made.state == LIVE and made.maker_seq == seq - 1:
            self.start_retiring(made, now)
        session.seq = seq
        if session.state in (WAITING, CLOSING):
            self._time_out(session, now)
        else:
            self._commit(session, session.state)

    def find(self, name: str | bytes) -> Entry:
        """The live entry of a name or a ticket; `UnknownEntry` or `UnknownTicket`."""
        if isinstance(name, str):
            entry = self.names.get(name)
            if entry is None:
                check_name(name)
                raise UnknownEntry(name)
        else:
            entry = self.tickets.get(name)
            if entry is None:
                raise UnknownTicket()
        return entry

    # --- entries ---

    def check_put(self, session: Session | None, name: str, replace: bool) -> None:
        """Raise what `put` would, so that it is known before any work is done."""
        if name in self.names and not replace:
            raise NameTaken(name)
        if session is not None:
            self.quotas.check(session.account, "entries")

    def put(
        self,
        session: Session | None,
        seq: int,
        name: str,
        ticket: bytes,
        fd: FD,
        kind: int,
        now: int,
        *,
        uid: int = 0,
        replace: bool = False,
        ephemeral: bool = False,
    ) -> Entry:
        """A new entry that owns `fd`, under a name or under a ticket (the other is empty).

        With `replace` an entry of that name retires.  `session` is who puts it; None is the
        broker itself, which runs as `uid`.  Raises `NameTaken`, `QuotaExceeded` and `BrokerFull`,
        and the FD stays the caller's.
        """
        self.check_put(session, name, replace)
        entry = Entry(
            self._entry_slots.take(), name, ticket, self.ledger.count(NEXT_GENERATION), fd
        )
        entry.kind, entry.since, entry.uid = kind, now, uid
        if session is not None:
            entry.maker, entry.maker_seq, entry.uid = session.id, seq, session.peer.uid
            entry.owner = session if ephemeral else None
            entry.account = session.account
            session.made = entry
        entry.ephemeral = entry.owner is not None
        key = name.encode() or ticket
        flags = EPHEMERAL * entry.ephemeral | NAMELESS * (not name)
        record = EntryRecord(
            entry.maker, entry.maker_seq, now, entry.uid, kind, flags, len(key), key
        )
        self.ledger.write_entry(entry.slot, record)
        self.ledger.commit_entry(entry.slot, entry.generation, LIVE)
        replaced = self.names.get(name) if name else None
        self.enter(entry)
        if session is not None:
            self.advance(session, seq)
        if replaced is not None:
            self.start_retiring(replaced, now)
        return entry

    def retire(self, name: str | bytes, now: int) -> Entry:
        """The entry refuses new borrows from now on; its last reference closes it."""
        entry = self.find(name)
        self.start_retiring(entry, now)
        return entry

    def retire_and_wait(
        self, session: Session, seq: int, name: str | bytes, now: int, timeout: int | None
    ) -> None:
        """Retire, and decide for `session` when the final close has happened.

        `WouldDeadlock`, with nothing changed, for a process that has the entry on loan itself;
        `QuotaExceeded` likewise.
        """
        entry = self.find(name)
        self.quotas.check(session.account, "waiting")
        if any(holder.peer.is_process_of(session.peer) for holder in entry.holders.values()):
            raise WouldDeadlock(entry.name, session.peer.pid)
        session.seq = seq
        session.record[BORROW_SEQ], session.record[WHAT] = seq, entry.slot
        self._ask(session, seq, now, timeout)
        self._commit(session, CLOSING)
        self.watch(session, entry)
        self.start_retiring(entry, now)

    def closed(self, entry: Entry, error: OSError | None) -> None:
        """The closer reports the final close: tell who waits for it, free the slot."""
        for session in list(entry.watchers.values()):
            self._leave_watch(session)
            failure = CloseFailed(entry.name, str(error)[:REASON_CHARS]) if error else None
            self.decisions.append((session, session.asked_seq, failure))
        self.ledger.commit_entry(entry.slot, 0, FREE)
        entry.state = FREE
        self.retiring -= 1
        del self.entries[entry.slot]
        self.quotas.add(entry.account, "entries", -1)
        self._entry_slots.give(entry.slot)

    # --- time ---

    def next_deadline(self) -> int | None:
        """When `expire` has something to do, if ever."""
        heap = self.deadlines
        while heap and not self._is_pending(heap[0]):
            heappop(heap)  # that wait is over
        return heap[0][0] if heap else None

    def expire(self, now: int) -> None:
        """Decide for one whose deadline has come, the earliest.  For each the others in its lines
        may have to be looked at, so who has many end in one instant has the caller do other things
        between."""
        deadline = self.next_deadline()
        if deadline is not None and deadline <= now:
            self._time_out(self.sessions[heappop(self.deadlines)[3]], now)


def out_of_turn(session: Session, reason: str) -> ProtocolError:
    """The error for a request that does not go with what the session is doing."""
    if session.state in (WAITING, CLOSING):
        reason = "it sent a request before it had the last answer"
    return ProtocolError("client", reason)
