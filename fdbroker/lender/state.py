"""The state of the lender: its tables, and the changes that its events are made of.

Every change here keeps three things in step: the records in memory, the ledger, and the accounts.
An event of one session can concern others.  Their results are left in `notifications`, and entries
whose last reference is back are left in `pending_closes`; the caller of the lender works off both.

An entry's FD has one reference for each loan, and one that belongs to the closer.  The FD is
retired together with its entry.  When no loan is left, and the broker itself does not use the
descriptor either, the entry becomes a pending close.  The closer then gives back the last reference
in a thread, because close(2) can take long.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from fdbroker.errors import EntryRetired, RetireTimeout
from fdbroker.lender.accounting import Accounting
from fdbroker.lender.cells import Cells
from fdbroker.lender.deadlines import Deadlines
from fdbroker.lender.ledger import (
    ARRIVAL,
    ASKED,
    BORROW_SEQ,
    COMMIT,
    DEADLINE,
    NEXT_ARRIVAL,
    SHAPE,
    SINCE,
    STATE_BITS,
    EntryRecord,
    Slots,
)
from fdbroker.lender.model import (
    ENTRY_EPHEMERAL,
    ENTRY_NAMELESS,
    FOREVER,
    IDLE,
    LENT,
    LIVE,
    NO_REQUEST,
    RETIRING,
    SECOND,
    WAITING,
)
from fdbroker.lender.wait_queue import borrow_timeout, dequeue, enqueue, grantable_waiters

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fdbroker.errors import FDBrokerError
    from fdbroker.lender.ledger import Ledger
    from fdbroker.lender.model import Entry, LoanRequest, Session


def hold(session: Session) -> None:
    """Give the session, which is LENT, its loan: a reference to each of the entries.

    Its loans are counted by a plain addition, because every borrow comes here and a charge takes
    several times as long.  This is the only place that adds loans that were granted, and
    `Lender.return_loan` is the only one that subtracts them.
    """
    request, slot = session.request, session.slot
    session.account.loans += request.count
    for entry in session.entries:
        entry.fd.incref()
        entry.holders[slot] = session
    if request.exclusive:
        for entry in session.entries:
            entry.held_exclusively = True


class LenderState:
    """Sessions, loans and entries over a ledger.

    sessions, entries   by slot; entries are LIVE or RETIRING
    names, tickets      the LIVE entries
    notifications       (session, seq of its request, error), in the order in which they are sent;
                        the error is None for a grant, and for a final close
    pending_closes      entries whose final close is due
    waiting, retiring   the numbers of WAITING sessions and of RETIRING entries
    """

    def __init__(self, ledger: Ledger, accounting: Accounting | None = None) -> None:
        self.ledger = ledger
        self.accounting = accounting or Accounting(ledger.sessions, ledger.entries, ledger.cells)
        self.sessions: dict[int, Session] = {}
        self.entries: dict[int, Entry] = {}
        self.names: dict[str, Entry] = {}
        self.tickets: dict[bytes, Entry] = {}
        self.notifications: deque[tuple[Session, int, FDBrokerError | None]] = deque()
        self.pending_closes: deque[Entry] = deque()
        self.waiting = 0
        self.retiring = 0
        self.session_slots = Slots(ledger.sessions, "sessions")
        self.entry_slots = Slots(ledger.entries, "entries")
        self.cells = Cells(ledger, self.accounting)
        self.deadlines = Deadlines(self.sessions)

    @property
    def loans(self) -> int:
        """The number of loans that are out."""
        return sum(session.state == LENT for session in self.sessions.values())

    def commit(self, session: Session, state: int) -> None:
        """Put the session into another state; its fields in the ledger are true from now on."""
        session.state = state
        session.record[COMMIT] = session.seq << STATE_BITS | state

    def write_extra_records(
        self, session: Session, request: LoanRequest, entries: Sequence[Entry]
    ) -> None:
        """Write what the fixed words of a session have no room for: further entries, the purpose.

        Raises `BrokerFull` or `QuotaExceeded`, and nothing has changed then.
        """
        if len(entries) > 1:
            self.cells.take(session, entries)
        if request.purpose_bytes:
            self.ledger.write_purpose(session.slot, request.purpose_bytes)

    # --- waits ---

    def wait_for_grant(
        self,
        session: Session,
        seq: int,
        request: LoanRequest,
        entries: Sequence[Entry],
        now: int,
    ) -> None:
        """Have the session wait for a loan of `entries`."""
        if request.needs_extra_records:
            self.write_extra_records(session, request, entries)
        record = session.record
        record[BORROW_SEQ] = session.borrow_seq = session.seq = seq
        record[SHAPE] = request.shape | entries[0].slot
        record[ARRIVAL] = session.arrival = self.ledger.count(NEXT_ARRIVAL)
        session.request, session.entries = request, entries
        self.start_wait(session, seq, now, request.timeout)
        self.commit(session, WAITING)
        self.enqueue(session)

    def start_wait(self, session: Session, seq: int, now: int, timeout: int | None) -> None:
        """Note since when, by which request, and until when the session waits."""
        session.asked, session.asked_seq = now, seq
        if timeout is not None:
            session.deadline = now + timeout
            self.deadlines.add(session)
        session.record[ASKED], session.record[DEADLINE] = now, session.deadline

    def enqueue(self, session: Session) -> None:
        """Put a WAITING session into the wait queues of its entries.

        It is charged for the loans that it waits for, so that no check is needed at the grant.
        """
        self.waiting += 1
        session.wait_charges = (
            self.accounting.charge(session.account, "waiting"),
            self.accounting.charge(session.account, "loans", session.request.count),
        )
        enqueue(session)

    def _dequeue(self, session: Session) -> None:
        self.waiting -= 1
        dequeue(session)
        self._end_wait(session)

    def _end_wait(self, session: Session) -> None:
        session.deadline = FOREVER
        for charge in session.wait_charges:
            charge.release()
        session.wait_charges = ()

    def stop_waiting(self, sessions: Sequence[Session], now: int) -> None:
        """End the waits of these sessions without a grant, and wake the waiters behind them."""
        left: dict[Entry, bool] = {}
        for session in sessions:
            self.commit(session, IDLE)
            self._dequeue(session)
            self.cells.free(session)
            for entry in session.entries:
                left[entry] = session.request.exclusive or left.get(entry, False)
            session.request, session.entries = NO_REQUEST, ()
        self._wake_waiters(left, now)

    def after_return(self, request: LoanRequest, entries: Sequence[Entry], now: int) -> None:
        """Do what the return of a loan makes possible: final closes, and grants to waiters."""
        for entry in dict.fromkeys(entries):
            self.close_if_unused(entry)
        self._wake_waiters(dict.fromkeys(entries, request.exclusive), now)

    def _wake_waiters(self, left: Mapping[Entry, bool], now: int) -> None:
        """Grant to the waiters of these entries, which a loan or a waiter has left.

        The value of an entry tells whether an exclusive loan or waiter has left it.  If only shared
        ones have, an exclusive waiter at the head of the queue is the only one that can profit.
        """
        refused: set[int] = set()
        for entry, exclusively in left.items():
            waiters = entry.waiters
            if waiters and (exclusively or next(iter(waiters.values())).request.exclusive):
                self.wake_waiters_of(entry, now, refused)

    def wake_waiters_of(self, entry: Entry, now: int, refused: set[int]) -> None:
        """Grant to the waiters of one entry; `refused` is as in `grantable_waiters`."""
        for session in grantable_waiters(entry, refused):
            session.record[SINCE] = session.since = now
            self.commit(session, LENT)
            # The loans are counted before the wait's charge for them goes, so the account never
            # looks idle in between.
            hold(session)
            self._dequeue(session)
            self.notifications.append((session, session.borrow_seq, None))

    def wait_for_close(self, session: Session, entry: Entry) -> None:
        """Have a CLOSING session wait for the final close of `entry`."""
        session.wait_charges = (self.accounting.charge(session.account, "waiting"),)
        session.awaited = entry
        entry.close_waiters[session.slot] = session

    def stop_waiting_for_close(self, session: Session) -> None:
        """End the wait of a CLOSING session."""
        entry, session.awaited = session.awaited, None
        self.commit(session, IDLE)
        self._end_wait(session)
        if entry is not None:
            entry.close_waiters.pop(session.slot, None)

    def time_out(self, session: Session, now: int) -> None:
        """End the wait of a session, of either kind, and notify it of a timeout."""
        seconds = (now - session.asked) / SECOND
        error: FDBrokerError
        if session.state == WAITING:
            error = borrow_timeout(session.request, session.entries, session.arrival, seconds, now)
            self.stop_waiting([session], now)
        else:
            entry = session.awaited
            assert entry is not None
            error = RetireTimeout(entry.name, seconds, len(entry.holders))
            self.stop_waiting_for_close(session)
        self.notifications.append((session, session.asked_seq, error))

    # --- entries ---

    def put_entry(self, entry: Entry) -> None:
        """Write a new entry to the ledger, and add it to the tables."""
        key = entry.name.encode() or entry.ticket
        flags = ENTRY_EPHEMERAL * entry.ephemeral | ENTRY_NAMELESS * (not entry.name)
        record = EntryRecord(
            entry.creator,
            entry.creator_seq,
            entry.since,
            entry.uid,
            entry.kind,
            flags,
            len(key),
            key,
        )
        self.ledger.add_entry(entry.slot, entry.generation, LIVE, record)
        self.add_entry(entry)

    def add_entry(self, entry: Entry) -> None:
        """Add an entry that is in the ledger to the tables, and charge for it."""
        self.entries[entry.slot] = entry
        if entry.charge is None:
            entry.charge = self.accounting.charge(entry.account, "entries")
        if entry.state == LIVE and entry.name:
            self.names[entry.name] = entry
        elif entry.state == LIVE:
            self.tickets[entry.ticket] = entry
        if entry.owner is not None:
            entry.owner.owned[entry.slot] = entry

    def start_retiring(self, entry: Entry, now: int) -> None:
        """Have the entry refuse new borrows; its waiters are notified, its name is free."""
        entry.state = RETIRING
        self.ledger.commit_entry(entry.slot, entry.generation, RETIRING)
        self.retiring += 1
        if self.names.get(entry.name) is entry:
            del self.names[entry.name]
        self.tickets.pop(entry.ticket, None)
        if entry.owner is not None:
            entry.owner.owned.pop(entry.slot, None)
        entry.fd.retire()
        waiting = list(entry.waiters.values())
        self.stop_waiting(waiting, now)
        for session in waiting:
            retired = EntryRetired(entry.name)
            self.notifications.append((session, session.borrow_seq, retired))
        self.close_if_unused(entry)

    def close_if_unused(self, entry: Entry) -> None:
        """Make the entry a pending close if it retires and its descriptor is not in use."""
        if entry.state == RETIRING and not entry.holders and not entry.pins:
            self.pending_closes.append(entry)

    # --- lists ---

    def entries_from(self, first: int) -> Iterator[tuple[int, Entry | None]]:
        """Iterate over all entry slots in use from `first` on, and the free ones between them."""
        return ((slot, self.entries.get(slot)) for slot in range(first, self.entry_slots.fresh))

    def sessions_from(self, first: int) -> Iterator[tuple[int, Session | None]]:
        """Iterate over all session slots in use from `first` on, and the free ones between them."""
        return ((slot, self.sessions.get(slot)) for slot in range(first, self.session_slots.fresh))
