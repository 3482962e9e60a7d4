"""The books: what the lender knows, and the small changes that its events are made of.

Every change here keeps memory and ledger in step.  What an event decides for *other* sessions is
left in `decisions`, and entries whose last reference is back are left in `closings`.

Two rules make the waiting line.  A loan can be granted when no holder conflicts with it, and when
nobody who conflicts with it came earlier and still waits; two loans conflict when they share an
entry and one of them is exclusive.  So shared loans run together, an exclusive one gets its turn,
and a loan of several entries, which stands in the line of each, is never overtaken into starvation.

An entry's FD carries one reference per loan, and one that is the closer's: the FD is retired with
its entry, and the closer gives back that last reference, where a slow close(2) holds up nobody.  It
is called when the last loan is back, and when nobody in the broker itself uses the descriptor.
"""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappush
from itertools import islice
from typing import TYPE_CHECKING

from fdbroker.errors import (
    BorrowTimeout,
    EntryRetired,
    FDBrokerError,
    RetireTimeout,
    WouldDeadlock,
)
from fdbroker.lender.accounting import Account, Quotas
from fdbroker.lender.ledger import ASKED, COMMIT, DEADLINE, SINCE, STATE_BITS, Ledger, Slots
from fdbroker.lender.model import (
    FOREVER,
    IDLE,
    LENT,
    LIVE,
    NO_REQUEST,
    RETIRING,
    WAITING,
    Entry,
    LoanRequest,
    Session,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


HOLDERS_NAMED = 8  # by a BorrowTimeout at most, which must fit a reply (REPLY_BYTES)
REASON_CHARS = 100  # of a CloseFailed, likewise
SECOND = 1_000_000_000


class LenderState:
    """Sessions, loans and entries, over a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.quotas = Quotas(ledger.sessions, ledger.entries, ledger.cells)
        self.sessions: dict[int, Session] = {}  # by slot
        self.entries: dict[int, Entry] = {}  # by slot; LIVE and RETIRING
        self.names: dict[str, Entry] = {}  # LIVE ones only
        self.tickets: dict[bytes, Entry] = {}  # LIVE ones only
        self.decisions: deque[tuple[Session, int, FDBrokerError | None]] = deque()
        self.closings: deque[Entry] = deque()
        # entries looked at or lent for those who waited: work that is theirs, whoever causes it
        self.looks: dict[Account, int] = {}
        self.waiting = 0  # sessions in a line
        self.retiring = 0  # entries
        self._session_slots = Slots(ledger.sessions, "sessions")
        self._entry_slots = Slots(ledger.entries, "entries")
        self._cells = Slots(ledger.cells, "loans of several entries")
        self.deadlines: list[tuple[int, int, int, int]] = []  # (deadline, id, seq, slot), a heap

    @property
    def loans(self) -> int:
        """How many loans are out."""
        return sum(session.state == LENT for session in self.sessions.values())

    # --- lists, a page at a time: each slot from `first` on that was ever used ---

    def entries_from(self, first: int) -> Iterator[tuple[int, Entry | None]]:
        """Slots with their entries, retiring ones included."""
        return ((slot, self.entries.get(slot)) for slot in range(first, self._entry_slots.fresh))

    def sessions_from(self, first: int) -> Iterator[tuple[int, Session | None]]:
        """Slots with their sessions, idle ones included."""
        return ((slot, self.sessions.get(slot)) for slot in range(first, self._session_slots.fresh))

    # --- changes ---

    def _commit(self, session: Session, state: int) -> None:
        session.state = state
        session.record[COMMIT] = session.seq << STATE_BITS | state

    def _ask(self, session: Session, seq: int, now: int, timeout: int | None) -> None:
        """Note since when, by which request and until when the session waits."""
        session.asked, session.asked_seq = now, seq
        if timeout is not None:
            session.deadline = now + timeout
            self.note_deadline(session)
        session.record[ASKED], session.record[DEADLINE] = now, session.deadline

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
        """The session has its loan: each of the entries is one reference longer open."""
        slot, entries = session.slot, session.entries
        session.account.loans += len(entries)
        for entry in entries:
            entry.fd.incref()
            entry.holders[slot] = session
        if session.request.exclusive:
            for entry in entries:
                entry.held_exclusively = True

    def _end_concerns(self, request: LoanRequest, entries: Sequence[Entry], now: int) -> None:
        """A loan has ended: close what it was the last one of, serve those who wait."""
        for entry in dict.fromkeys(entries):
            self.close_if_unused(entry)
        self._serve_lines(dict.fromkeys(entries, request.exclusive), now)

    def close_if_unused(self, entry: Entry) -> None:
        """It has one loan or user less, or retires: was that the last that kept it open?"""
        if entry.state == RETIRING and not entry.holders and not entry.users:
            self.closings.append(entry)

    def _serve_lines(self, left: Mapping[Entry, bool], now: int) -> None:
        """Serve the lines of these, each once: somebody has left, exclusively or not.

        A shared one left nobody better off but an exclusive one who is the first now.
        """
        refused: set[int] = set()
        for entry, exclusively in left.items():
            if entry.line and (exclusively or next(iter(entry.line.values())).request.exclusive):
                self.serve_line(entry, now, refused)

    def stand_in_line(self, session: Session) -> None:
        """The session waits for all entries of its request."""
        self.waiting += 1
        session.account.loans += len(session.entries)  # as it may have so many, when its turn comes
        self.quotas.add(session.account, "waiting")
        for entry in session.entries:
            if session.slot not in entry.line:
                entry.line[session.slot] = session
                if session.request.exclusive:
                    entry.turns[session.slot] = session

    def _step_out(self, session: Session) -> None:
        self.waiting -= 1
        session.account.loans -= len(session.entries)
        self.quotas.add(session.account, "waiting", -1)
        session.deadline = FOREVER
        for entry in session.entries:
            entry.line.pop(session.slot, None)
            entry.turns.pop(session.slot, None)

    def _leave_lines(self, sessions: Sequence[Session], now: int) -> None:
        """They stop waiting without a grant; those behind may now go."""
        left: dict[Entry, bool] = {}
        for session in sessions:
            self._commit(session, IDLE)
            self._step_out(session)
            self._give_cells(session)
            for entry in session.entries:
                left[entry] = session.request.exclusive or left.get(entry, False)
            session.request, session.entries = NO_REQUEST, ()
        self._serve_lines(left, now)

    def _give_cells(self, session: Session) -> None:
        """The room for the members of its loan is free again."""
        self._cells.give_many(session.cells)
        self.quotas.add_members(session.account, -len(session.cells))
        session.cells = ()

    def serve_line(self, entry: Entry, now: int, refused: set[int]) -> None:
        """Grant what can be granted in the line of `entry`, in order of arrival.

        `refused` are the slots of those who were found to have to wait on, in the same event.  No
        grant changes that, so they are not asked again: a session can wait for thousands.
        """
        if entry.state != LIVE or entry.held_exclusively:
            return
        ready: list[Session] = []
        passed_over = False  # somebody who conflicts with later exclusive ones
        for session in entry.line.values():
            if session.request.exclusive:
                if not ready and not passed_over and self._grantable(session, refused):
                    ready.append(session)
                break
            if self._grantable(session, refused):
                ready.append(session)
            else:
                passed_over = True
        for session in ready:
            self._step_out(session)
            session.since = now
            session.record[SINCE] = now
            self._commit(session, LENT)
            self.hold(session)
            self.decisions.append((session, session.borrow_seq, None))

    def _grantable(self, session: Session, refused: set[int]) -> bool:
        request, arrival = session.request, session.arrival
        if session.slot in refused:
            return False
        for looks, entry in enumerate(dict.fromkeys(session.entries), 1):
            if self._is_held(entry, request) or self._is_behind(entry, request, arrival):
                refused.add(session.slot)
                self._note_looks(session, 1 + looks)
                return False
        self._note_looks(session, 2 * request.count)
        return True

    def _note_looks(self, session: Session, count: int) -> None:
        """So many entries were looked at, or are lent, because it waits for them."""
        account = session.account
        self.looks[account] = self.looks.get(account, 0) + count

    @staticmethod
    def _is_held(entry: Entry, request: LoanRequest) -> bool:
        """Whether a holder of `entry` conflicts with `request`."""
        return bool(entry.holders) if request.exclusive else entry.held_exclusively

    @staticmethod
    def _is_behind(entry: Entry, request: LoanRequest, arrival: int | None) -> bool:
        """Whether somebody waits for `entry`, conflicts with `request` and came before `arrival`
        (None: now)."""
        line = entry.line if request.exclusive else entry.turns
        if not line:
            return False
        return arrival is None or next(iter(line.values())).arrival < arrival

    def _refuse_wait(
        self, session: Session, request: LoanRequest, entries: Sequence[Entry], now: int
    ) -> None:
        """Raise if `session` must not wait: its process has it itself, or it has no time."""
        self.quotas.check(session.account, "waiting")
        for entry in entries:
            if entry.held_exclusively:
                (holder,) = entry.holders.values()
                if holder.peer.is_process_of(session.peer):
                    raise WouldDeadlock(entry.name, session.peer.pid)
        if request.timeout == 0:
            raise self._timed_out(request, entries, None, 0, now)

    def _timed_out(
        self,
        request: LoanRequest,
        entries: Sequence[Entry],
        arrival: int | None,
        seconds: float,
        now: int,
    ) -> BorrowTimeout:
        """The error that names who has what is wished for."""
        entries = list(dict.fromkeys(entries))
        held = [entry for entry in entries if self._is_held(entry, request)]
        busy = held or [entry for entry in entries if self._is_behind(entry, request, arrival)]
        holders: dict[int, tuple[int, int, float, bool]] = {}
        for entry in held:
            for slot, holder in islice(entry.holders.items(), HOLDERS_NAMED):
                peer, seconds_held = holder.peer, (now - holder.since) / SECOND
                holders[slot] = peer.pid, peer.uid, seconds_held, holder.request.exclusive
        return BorrowTimeout(busy[0].name, seconds, list(holders.values())[:HOLDERS_NAMED])

    def _time_out(self, session: Session, now: int) -> None:
        """Stop a wait, of either kind, at its deadline."""
        seconds = (now - session.asked) / SECOND
        error: FDBrokerError
        if session.state == WAITING:
            error = self._timed_out(session.request, session.entries, session.arrival, seconds, now)
            self._leave_lines([session], now)
        else:
            entry = session.awaited
            assert entry is not None
            error = RetireTimeout(entry.name, seconds, len(entry.holders))
            self._leave_watch(session)
        self.decisions.append((session, session.asked_seq, error))

    def enter(self, entry: Entry) -> None:
        self.entries[entry.slot] = entry
        self.quotas.add(entry.account, "entries")
        if entry.state == LIVE and entry.name:
            self.names[entry.name] = entry
        elif entry.state == LIVE:
            self.tickets[entry.ticket] = entry
        if entry.owner is not None:
            entry.owner.owned[entry.slot] = entry

    def start_retiring(self, entry: Entry, now: int) -> None:
        entry.state = RETIRING
        self.ledger.commit_entry(entry.slot, entry.generation, RETIRING)
        self.retiring += 1
        if self.names.get(entry.name) is entry:
            del self.names[entry.name]
        self.tickets.pop(entry.ticket, None)
        if entry.owner is not None:
            entry.owner.owned.pop(entry.slot, None)
        entry.fd.retire()
        waiting = list(entry.line.values())
        self._leave_lines(waiting, now)
        for session in waiting:
            retired = EntryRetired(entry.name)
            self.decisions.append((session, session.borrow_seq, retired))
        self.close_if_unused(entry)

    def watch(self, session: Session, entry: Entry) -> None:
        self.quotas.add(session.account, "waiting")
        session.awaited = entry
        entry.watchers[session.slot] = session

    def watch_again(self, session: Session) -> None:
        """A loaded session that waits for a close; if it has lost what for, that is closed."""
        if session.awaited is not None:
            self.watch(session, session.awaited)
        else:
            self._leave_watch(session)
            self.decisions.append((session, session.asked_seq, None))

    def _leave_watch(self, session: Session) -> None:
        entry, session.awaited = session.awaited, None
        self._commit(session, IDLE)
        session.deadline = FOREVER
        if entry is not None:
            self.quotas.add(session.account, "waiting", -1)
            entry.watchers.pop(session.slot, None)
