"""The lender: who may have which entry when, and when an entry's last reference is back.

It knows no socket, clock or pid of its own: peers, times (nanoseconds of CLOCK_BOOTTIME), tickets
and descriptors are arguments.  Each method is one event.  It changes the books, writes the change
through to the ledger, and returns or raises what the asking session is to be told.  What an event
decides for *other* sessions is left in `decisions`, and entries whose last reference is back are
left in `closings`; the caller works off both before it goes on.

Two rules make the waiting line.  A loan can be granted when no holder conflicts with it, and when
nobody who conflicts with it came earlier and still waits; two loans conflict when they share an
entry and one of them is exclusive.  So shared loans run together, an exclusive one gets its turn,
and a loan of several entries, which stands in the line of each, is never overtaken into starvation.

An entry's FD carries one reference per loan, and one that is the closer's: the FD is retired with
its entry, and the closer gives back that last reference, where a slow close(2) holds up nobody.
"""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import TYPE_CHECKING

from fdbroker.errors import (
    BorrowTimeout,
    CloseFailed,
    EntryRetired,
    FDBrokerError,
    NameTaken,
    ProtocolError,
    RetireTimeout,
    UnknownEntry,
    UnknownTicket,
    WouldDeadlock,
)
from fdbroker.lender.ledger import (
    NEXT_ARRIVAL,
    NEXT_GENERATION,
    NEXT_SESSION,
    NONE,
    EntryRecord,
    Ledger,
    SessionRecord,
    Slots,
)
from fdbroker.lender.names import check_name
from fdbroker.lender.parts import (
    CLOSING,
    EPHEMERAL,
    EXCLUSIVE,
    FOREVER,
    FREE,
    IDLE,
    LENT,
    LIVE,
    NAMELESS,
    READONLY,
    RETIRING,
    WAITING,
    Entry,
    Loan,
    Peer,
    Session,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fdbroker.rc import FD

HOLDERS_NAMED = 16  # how many holders a BorrowTimeout names at most
SECOND = 1_000_000_000


class Lender:
    """The books of one broker, over a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.sessions: dict[int, Session] = {}  # by slot
        self.entries: dict[int, Entry] = {}  # by slot; LIVE and RETIRING
        self.names: dict[str, Entry] = {}  # LIVE ones only
        self.tickets: dict[bytes, Entry] = {}  # LIVE ones only
        self.decisions: deque[tuple[Session, int, FDBrokerError | None]] = deque()
        self.closings: deque[Entry] = deque()
        self.loans = 0
        self.waiting = 0
        self._session_slots = Slots(ledger.sessions, "sessions")
        self._entry_slots = Slots(ledger.entries, "entries")
        self._cells = Slots(ledger.cells, "loans of several entries")
        self.deadlines: list[tuple[int, int, int, int]] = []  # (deadline, id, seq, slot), a heap

    # --- sessions ---

    def open(self, peer: Peer) -> Session:
        """A new session; `BrokerFull` if there is no room for one."""
        session = Session(self._session_slots.take(), self.ledger.count(NEXT_SESSION), peer)
        self.ledger.write_session_id(session.slot, session.id)
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
            self._leave_line(session, now)
        elif session.state == LENT:
            self._end_loan(session, now)
        elif session.state == CLOSING:
            self._leave_watch(session)
        for entry in list(session.owned.values()):
            self.start_retiring(entry, now)

    def forget(self, session: Session) -> None:
        """Free the slot of a cleared session."""
        self.ledger.commit_session(session.slot, 0, FREE)
        del self.sessions[session.slot]
        session.state = FREE
        self._session_slots.give(session.slot)

    # --- borrowing ---

    def borrow(
        self,
        session: Session,
        seq: int,
        names: Sequence[str | bytes],
        now: int,
        *,
        exclusive: bool = False,
        readonly: bool = False,
        timeout: int | None = None,
        purpose: str = "",
    ) -> bool:
        """Grant a loan of all `names` (a ticket is bytes): True; or put it in the line: False.

        `timeout` is in nanoseconds from `now`, `purpose` at most 128 bytes.  Raises
        `UnknownEntry`, `UnknownTicket`, `WouldDeadlock`, `BrokerFull`, and `BorrowTimeout` where
        the timeout is 0.
        """
        entries = []
        for name in names:
            entry = self.names.get(name) if type(name) is str else None
            entries.append(entry or self.find(name))
        loan = Loan(seq, entries, exclusive, readonly, purpose)
        granted = True
        for entry in entries:
            if entry.turns or (
                (entry.holders or entry.line) if exclusive else entry.held_exclusively
            ):
                granted = False
                self._refuse_own_wait(session, entry)
        if not granted and timeout == 0:
            raise self._timed_out(loan, 0, now)
        if len(entries) > 1:
            loan.cells = self._cells.take_many(len(entries) - 1)
            self.ledger.write_cells(loan.cells, [entry.slot for entry in entries[1:]])
        session.seq = seq
        session.loan = loan
        if granted:
            loan.since = now
            self._write_loan(session, loan)
            self._commit(session, LENT)
            self.hold(session)
            return True
        loan.arrival = self.ledger.count(NEXT_ARRIVAL)
        self._ask(session, seq, now, timeout)
        self._write_loan(session, loan)
        self._commit(session, WAITING)
        self.stand_in_line(session)
        return False

    def give_back(self, session: Session, seq: int, now: int) -> None:
        """A RETURN: the loan ends.  `ProtocolError` if there is none."""
        if session.state != LENT:
            raise ProtocolError("client", "a return without a loan")
        session.seq = seq
        self._end_loan(session, now)

    def take_back(self, session: Session, now: int) -> None:
        """The loan ends because its descriptors could not be sent."""
        self._end_loan(session, now)

    def cancel(self, session: Session, seq: int, now: int) -> None:
        """A CANCEL: the wait ends as if its deadline had come.

        What was granted already stands, and the client returns it: its descriptor may be on its
        way, so only the client knows when it is gone.
        """
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

    def check_free(self, name: str, replace: bool) -> None:
        """Raise `NameTaken` if `put` would, so that it is known before any work is done."""
        if name in self.names and not replace:
            raise NameTaken(name)

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
        replace: bool = False,
        ephemeral: bool = False,
    ) -> Entry:
        """A new entry that owns `fd`, under a name or under a ticket (the other is empty).

        With `replace` an entry of that name retires.  `session` is who puts it; None is the
        broker itself.  Raises `NameTaken` and `BrokerFull`, and the FD stays the caller's.
        """
        self.check_free(name, replace)
        entry = Entry(
            self._entry_slots.take(), name, ticket, self.ledger.count(NEXT_GENERATION), fd
        )
        entry.kind, entry.since = kind, now
        if session is not None:
            entry.maker, entry.maker_seq, entry.uid = session.id, seq, session.peer.uid
            entry.owner = session if ephemeral else None
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

        `WouldDeadlock`, with nothing changed, for a process that has the entry on loan itself.
        """
        entry = self.find(name)
        pid = session.peer.pid
        if pid and any(holder.peer.pid == pid for holder in entry.holders.values()):
            raise WouldDeadlock(entry.name, pid)
        session.seq = seq
        self._ask(session, seq, now, timeout)
        record = SessionRecord(seq, 0, now, 0, session.deadline, entry.slot)
        self.ledger.write_session(session.slot, record)
        self._commit(session, CLOSING)
        self.watch(session, entry)
        self.start_retiring(entry, now)

    def closed(self, entry: Entry, error: OSError | None) -> None:
        """The closer reports the final close: tell who waits for it, free the slot."""
        for session in list(entry.watchers.values()):
            self._leave_watch(session)
            failure = CloseFailed(entry.name, str(error)) if error is not None else None
            self.decisions.append((session, session.asked_seq, failure))
        self.ledger.commit_entry(entry.slot, 0, FREE)
        entry.state = FREE
        del self.entries[entry.slot]
        self._entry_slots.give(entry.slot)

    # --- lists, a page at a time: both tables by slot from `first` on ---

    def entries_from(self, first: int) -> Iterator[Entry]:
        """Entries, retiring ones included."""
        for slot in range(first, self._entry_slots.fresh):
            if slot in self.entries:
                yield self.entries[slot]

    def sessions_from(self, first: int) -> Iterator[Session]:
        """Sessions, idle ones included."""
        for slot in range(first, self._session_slots.fresh):
            if slot in self.sessions:
                yield self.sessions[slot]

    # --- time ---

    def next_deadline(self) -> int | None:
        """When `expire` has something to do, if ever."""
        heap = self.deadlines
        while heap and not self._is_pending(heap[0]):
            heappop(heap)  # that wait is over
        return heap[0][0] if heap else None

    def expire(self, now: int) -> None:
        """Decide for everyone whose deadline has come."""
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            self._time_out(self.sessions[heappop(self.deadlines)[3]], now)

    # --- what the events are made of; `load` puts the same pieces together ---

    def _commit(self, session: Session, state: int) -> None:
        session.state = state
        self.ledger.commit_session(session.slot, session.seq, state)

    def _write_loan(self, session: Session, loan: Loan) -> None:
        purpose = loan.purpose.encode()
        self.ledger.write_session(
            session.slot,
            (
                loan.seq,
                loan.arrival,
                session.asked,
                loan.since,
                session.deadline,
                loan.entries[0].slot,
                loan.cells[0] if loan.cells else NONE,
                len(loan.entries),
                EXCLUSIVE * loan.exclusive | READONLY * loan.readonly,
                len(purpose),
                purpose,
            ),
        )

    def _ask(self, session: Session, seq: int, now: int, timeout: int | None) -> None:
        """Note since when, by which request and until when the session waits."""
        session.asked, session.asked_seq = now, seq
        if timeout is not None:
            session.deadline = now + timeout
            self.note_deadline(session)

    def note_deadline(self, session: Session) -> None:
        heap = self.deadlines
        if len(heap) > 2 * len(self.sessions):  # most of them are of waits that are over
            heap[:] = filter(self._is_pending, heap)
            heapify(heap)
        heappush(heap, (session.deadline, session.id, session.asked_seq, session.slot))

    def _is_pending(self, noted: tuple[int, int, int, int]) -> bool:
        session = self.sessions.get(noted[3])
        return session is not None and (
            (session.deadline, session.id, session.asked_seq) == noted[:3]
        )

    def slots_taken(self, sessions: Slots, entries: Slots, cells: Slots) -> None:
        self._session_slots, self._entry_slots, self._cells = sessions, entries, cells

    def hold(self, session: Session) -> None:
        loan = session.loan
        assert loan is not None
        self.loans += 1
        for entry in loan.entries:
            entry.fd.incref()
            entry.holders[session.slot] = session
            entry.held_exclusively = loan.exclusive

    def _end_loan(self, session: Session, now: int) -> None:
        loan = session.loan
        assert loan is not None
        self._commit(session, IDLE)
        session.loan = None
        self.loans -= 1
        for cell in loan.cells:
            self._cells.give(cell)
        for entry in loan.entries:
            entry.fd.decref()
            if entry.holders.pop(session.slot, None) is not None:
                entry.held_exclusively = False
                if entry.state == RETIRING and not entry.holders:
                    self.closings.append(entry)
        for entry in loan.entries:
            if entry.line and (loan.exclusive or entry.turns):
                self.serve_line(entry, now)

    def stand_in_line(self, session: Session) -> None:
        loan = session.loan
        assert loan is not None
        self.waiting += 1
        for entry in loan.entries:
            if session.slot not in entry.line:
                entry.line[session.slot] = session
                if loan.exclusive:
                    entry.turns[session.slot] = session

    def _step_out(self, session: Session, loan: Loan) -> None:
        self.waiting -= 1
        session.deadline = FOREVER
        for entry in loan.entries:
            entry.line.pop(session.slot, None)
            entry.turns.pop(session.slot, None)

    def _leave_line(self, session: Session, now: int) -> None:
        """Stop waiting without a grant; those behind may now go."""
        loan = session.loan
        assert loan is not None
        self._commit(session, IDLE)
        session.loan = None
        self._step_out(session, loan)
        for cell in loan.cells:
            self._cells.give(cell)
        for entry in loan.entries:
            if entry.line and (loan.exclusive or entry.turns):
                self.serve_line(entry, now)

    def serve_line(self, entry: Entry, now: int) -> None:
        """Grant what can be granted in the line of `entry`, in order of arrival."""
        if entry.state != LIVE or entry.held_exclusively:
            return
        ready: list[Session] = []
        passed_over = False  # somebody who conflicts with later exclusive ones
        for session in entry.line.values():
            loan = session.loan
            assert loan is not None
            if loan.exclusive:
                if not ready and not passed_over and self._grantable(loan):
                    ready.append(session)
                break
            if self._grantable(loan):
                ready.append(session)
            else:
                passed_over = True
        for session in ready:
            loan = session.loan
            assert loan is not None
            self._step_out(session, loan)
            loan.since = now
            self.ledger.write_since(session.slot, now)
            self._commit(session, LENT)
            self.hold(session)
            self.decisions.append((session, loan.seq, None))

    def _grantable(self, loan: Loan) -> bool:
        return not any(
            entry.state != LIVE or self._is_held(entry, loan) or self._is_behind(entry, loan)
            for entry in loan.entries
        )

    @staticmethod
    def _is_held(entry: Entry, loan: Loan) -> bool:
        """Whether a holder of `entry` conflicts with `loan`."""
        return bool(entry.holders) if loan.exclusive else entry.held_exclusively

    @staticmethod
    def _is_behind(entry: Entry, loan: Loan) -> bool:
        """Whether somebody in the line of `entry` conflicts with `loan` and came earlier."""
        line = entry.line if loan.exclusive else entry.turns
        if not line:
            return False
        first = next(iter(line.values())).loan
        assert first is not None
        return first.arrival < loan.arrival or not loan.arrival

    @staticmethod
    def _refuse_own_wait(session: Session, entry: Entry) -> None:
        pid = session.peer.pid
        if entry.held_exclusively and pid:
            holder = next(iter(entry.holders.values()))
            if holder.peer.pid == pid:
                raise WouldDeadlock(entry.name, pid)

    def _timed_out(self, loan: Loan, seconds: float, now: int) -> BorrowTimeout:
        """The error that names who has what `loan` waits for."""

        held = [entry for entry in loan.entries if self._is_held(entry, loan)]
        busy = held or [entry for entry in loan.entries if self._is_behind(entry, loan)]
        holders: dict[int, tuple[int, int, float, bool]] = {}
        for entry in held:
            for slot, holder in islice(entry.holders.items(), HOLDERS_NAMED):
                assert holder.loan is not None
                peer, seconds_held = holder.peer, (now - holder.loan.since) / SECOND
                holders[slot] = peer.pid, peer.uid, seconds_held, holder.loan.exclusive
        return BorrowTimeout(busy[0].name, seconds, list(holders.values())[:HOLDERS_NAMED])

    def _time_out(self, session: Session, now: int) -> None:
        """Stop a wait, of either kind, at its deadline."""
        seconds = (now - session.asked) / SECOND
        error: FDBrokerError
        if session.state == WAITING:
            loan = session.loan
            assert loan is not None
            error = self._timed_out(loan, seconds, now)
            self._leave_line(session, now)
        else:
            entry = session.awaited
            assert entry is not None
            error = RetireTimeout(entry.name, seconds, len(entry.holders))
            self._leave_watch(session)
        self.decisions.append((session, session.asked_seq, error))

    def enter(self, entry: Entry) -> None:
        self.entries[entry.slot] = entry
        if entry.state == LIVE and entry.name:
            self.names[entry.name] = entry
        elif entry.state == LIVE:
            self.tickets[entry.ticket] = entry
        if entry.owner is not None:
            entry.owner.owned[entry.slot] = entry

    def start_retiring(self, entry: Entry, now: int) -> None:
        entry.state = RETIRING
        self.ledger.commit_entry(entry.slot, entry.generation, RETIRING)
        if self.names.get(entry.name) is entry:
            del self.names[entry.name]
        self.tickets.pop(entry.ticket, None)
        if entry.owner is not None:
            entry.owner.owned.pop(entry.slot, None)
        entry.fd.retire()
        for session in list(entry.line.values()):
            loan = session.loan
            if session.state == WAITING and loan is not None:
                self._leave_line(session, now)
                self.decisions.append((session, loan.seq, EntryRetired(entry.name)))
        if not entry.holders:
            self.closings.append(entry)

    def watch(self, session: Session, entry: Entry) -> None:
        session.awaited = entry
        entry.watchers[session.slot] = session

    def _leave_watch(self, session: Session) -> None:
        entry = session.awaited
        assert entry is not None
        self._commit(session, IDLE)
        session.awaited = None
        session.deadline = FOREVER
        entry.watchers.pop(session.slot, None)
