"""The lender: which session may have which entry when, and when an entry's last reference is back.

The lender has no socket, no clock and no pid.  Peers, times (nanoseconds of CLOCK_BOOTTIME),
tickets and descriptors are arguments, so a test can drive it and a recording can be replayed.

Each method of `Lender` is one event.  It changes the state (`state.py`), which writes the change
through to the ledger, and it returns or raises what the requesting session is told.  Results for
*other* sessions are left in `notifications`, and entries that are to be closed in `pending_closes`.
The caller works off both before the next event.

The plain borrow and return are the fast path of the broker: they write the ledger themselves
instead of calling the smaller steps in `state.py`, which the other events use.  The state machine
in tests/lender compares both with one naive model.
"""

from __future__ import annotations

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
    BORROW_SEQ,
    COMMIT,
    ID,
    NEXT_GENERATION,
    NEXT_SESSION,
    SHAPE,
    SINCE,
    STATE_BITS,
)
from fdbroker.lender.model import (
    CLOSING,
    FREE,
    IDLE,
    LENT,
    LIVE,
    NO_REQUEST,
    RETIRING,
    WAITING,
    Entry,
    Session,
)
from fdbroker.lender.names import check_name
from fdbroker.lender.state import LenderState, hold
from fdbroker.lender.wait_queue import check_wait

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fdbroker.lender.accounting import Accounting, Charge
    from fdbroker.lender.ledger import Ledger
    from fdbroker.lender.model import LoanRequest, Peer
    from fdbroker.rc import FD

# A CloseFailed has at most so many characters of the reason, since it must fit a reply.
REASON_CHARS = 100


class Lender:
    """The events of one broker.

    The tables, queues and counters belong to `state`.  The ones that the server reads are
    attributes here as well.
    """

    def __init__(self, ledger: Ledger, accounting: Accounting | None = None) -> None:
        self.state = state = LenderState(ledger, accounting)
        self.ledger = ledger
        self.accounting = state.accounting
        self.sessions = state.sessions
        self.entries = state.entries
        self.names = state.names
        self.tickets = state.tickets
        self.notifications = state.notifications
        self.pending_closes = state.pending_closes
        self.deadlines = state.deadlines.heap

    @property
    def loans(self) -> int:
        """The number of loans that are out."""
        return self.state.loans

    @property
    def waiting(self) -> int:
        """The number of sessions that wait for a grant."""
        return self.state.waiting

    @property
    def retiring(self) -> int:
        """The number of entries that retire and are not closed yet."""
        return self.state.retiring

    # --- sessions ---

    def open(self, peer: Peer) -> Session:
        """Return a new session; raise `BrokerFull` if there is no room for one."""
        slot = self.state.session_slots.take()
        id, account = self.ledger.count(NEXT_SESSION), self.accounting.account(peer.uid)
        session = Session(slot, id, peer, self.ledger.record(slot), account)
        session.record[ID] = session.id
        self.state.commit(session, IDLE)
        self.sessions[session.slot] = session
        return session

    def advance(self, session: Session, seq: int) -> None:
        """Note that a request which changes nothing else was acted upon."""
        session.seq = seq
        self.state.commit(session, session.state)

    def clear(self, session: Session, now: int) -> None:
        """End the session's loan or wait, and retire its ephemeral entries: it has ended."""
        if session.state == WAITING:
            self.state.stop_waiting([session], now)
        elif session.state == LENT:
            self.return_loan(session, session.seq, now)
        elif session.state == CLOSING:
            self.state.stop_waiting_for_close(session)
        for entry in list(session.owned.values()):
            self.start_retiring(entry, now)

    def free(self, session: Session) -> None:
        """Free the slot of a cleared session."""
        session.record[COMMIT] = FREE
        del self.sessions[session.slot]
        session.state = FREE
        self.state.session_slots.give(session.slot)

    def sessions_from(self, first: int) -> Iterator[tuple[int, Session | None]]:
        """Iterate over all session slots in use from `first` on, and the free ones between them."""
        return self.state.sessions_from(first)

    # --- loans ---

    def borrow(self, session: Session, seq: int, request: LoanRequest, now: int) -> bool:
        """Grant a loan of all that is requested and return True, or have it wait and return False.

        Raises `UnknownEntry`, `UnknownTicket`, `WouldDeadlock`, `BrokerFull`, `QuotaExceeded`, and
        `BorrowTimeout` if the timeout is 0.
        """
        if session.state != IDLE:
            raise out_of_turn(session, "a session carries one loan, or one wait")
        account = session.account
        # The quota comes first, so that a refused request costs no look-up of its names.
        if account.loans + request.count > account.most_loans:
            self.accounting.check(account, "loans", request.count)
        names, exclusive, entries = self.names, request.exclusive, []
        for name in request.names:
            try:
                entry = names[name]  # type: ignore[index]
            except KeyError:
                entry = self.find(name)
            # These two tests are `is_held` and `is_behind` of wait_queue.py without the calls.
            if entry.held_exclusively or entry.exclusive_waiters:
                return self._wait_for_grant(session, seq, request, now)
            if exclusive and (entry.holders or entry.waiters):
                return self._wait_for_grant(session, seq, request, now)
            entries.append(entry)
        if request.needs_extra_records:
            self.state.write_extra_records(session, request, entries)
        record = session.record
        record[BORROW_SEQ] = session.borrow_seq = session.seq = seq
        record[SINCE] = session.since = now
        record[SHAPE] = request.shape | entries[0].slot
        session.request, session.entries, session.state = request, entries, LENT
        record[COMMIT] = seq << STATE_BITS | LENT
        hold(session)
        return True

    def _wait_for_grant(self, session: Session, seq: int, request: LoanRequest, now: int) -> bool:
        """Have a request wait that cannot be granted at once, and return False."""
        entries = [self.find(name) for name in request.names]
        self.accounting.check(session.account, "waiting")
        check_wait(session, request, entries, now)
        self.state.wait_for_grant(session, seq, request, entries, now)
        return False

    def return_loan(self, session: Session, seq: int, now: int) -> bool:
        """End the session's loan, and return whether that concerned anything else.

        Raises `ProtocolError` if the session has no loan.
        """
        request, entries, slot = session.request, session.entries, session.slot
        if session.state != LENT:
            raise out_of_turn(session, "a return without a loan")
        session.seq, session.state = seq, IDLE
        session.request, session.entries = NO_REQUEST, ()
        session.record[COMMIT] = seq << STATE_BITS | IDLE
        # This balances the addition in `hold`.
        session.account.loans -= request.count
        for entry in entries:
            entry.fd.decref()
            # A request can name an entry twice, and the session is one holder.
            entry.holders.pop(slot, None)
        if request.exclusive:
            for entry in entries:
                entry.held_exclusively = False
        state = self.state
        if session.cells:
            state.cells.free(session)
        if not state.waiting and not state.retiring:
            return False
        if any(entry.waiters or entry.state == RETIRING for entry in entries):
            state.after_return(request, entries, now)
            return True
        return False

    def roll_back_grant(self, session: Session, now: int) -> None:
        """End a loan whose descriptors could not be sent."""
        self.return_loan(session, session.seq, now)

    def pin(self, entries: Sequence[Entry]) -> None:
        """Keep the descriptors of these entries, which are on loan, open for the broker itself.

        They stay open until `unpin`, even if the loan ends before.
        """
        for entry in entries:
            entry.pins += 1

    def unpin(self, entries: Sequence[Entry]) -> None:
        """Undo `pin`."""
        for entry in entries:
            entry.pins -= 1
            self.state.close_if_unused(entry)

    def cancel(self, session: Session, seq: int, now: int) -> None:
        """End the session's wait as its deadline would, and retire what its last request put.

        A grant stands: its descriptor may be on its way, so the client returns the loan when it has
        closed that.
        """
        entry = session.last_put
        if entry is not None and entry.state == LIVE and entry.creator_seq == seq - 1:
            self.start_retiring(entry, now)
        session.seq = seq
        if session.state in (WAITING, CLOSING):
            self.state.time_out(session, now)
        else:
            self.state.commit(session, session.state)

    # --- entries ---

    def find(self, name: str | bytes) -> Entry:
        """Return the live entry of a name or ticket; raise `UnknownEntry` or `UnknownTicket`."""
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

    def check_put(self, session: Session | None, name: str, replace: bool) -> None:
        """Raise `NameTaken` or `QuotaExceeded` as `put` would, before any work is done."""
        if name in self.names and not replace:
            raise NameTaken(name)
        if session is not None:
            self.accounting.check(session.account, "entries")

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
        charge: Charge | None = None,
    ) -> Entry:
        """Return a new entry that owns `fd`, under a name or under a ticket; the other is empty.

        With `replace` the entry that has the name retires.  `session` is None for the broker
        itself, which runs as `uid`.  `charge` is what the account is charged for the descriptor so
        far, and becomes the entry's.  Raises `NameTaken`, `QuotaExceeded` or `BrokerFull`, and the
        FD stays the caller's then.
        """
        self.check_put(session, name, replace)
        slot = self.state.entry_slots.take()
        entry = Entry(slot, name, ticket, self.ledger.count(NEXT_GENERATION), fd)
        entry.kind, entry.since, entry.uid = kind, now, uid
        if session is not None:
            entry.creator, entry.creator_seq, entry.uid = session.id, seq, session.peer.uid
            entry.owner = session if ephemeral else None
            entry.account = session.account
            session.last_put = entry
        entry.ephemeral = entry.owner is not None
        if charge is not None:
            charge.become("entries")
            entry.charge = charge
        replaced = self.names.get(name) if name else None
        self.state.put_entry(entry)
        if session is not None:
            self.advance(session, seq)
        if replaced is not None:
            self.start_retiring(replaced, now)
        return entry

    def retire(self, name: str | bytes, now: int) -> Entry:
        """Have the entry of a name or ticket refuse new borrows; its last reference closes it."""
        entry = self.find(name)
        self.start_retiring(entry, now)
        return entry

    def start_retiring(self, entry: Entry, now: int) -> None:
        """Retire an entry that is LIVE."""
        self.state.start_retiring(entry, now)

    def retire_and_wait(
        self, session: Session, seq: int, name: str | bytes, now: int, timeout: int | None
    ) -> None:
        """Retire, and notify the session when the final close has happened.

        Raises `WouldDeadlock` if the session's process has the entry on loan itself, and
        `QuotaExceeded`; nothing has changed then.
        """
        entry = self.find(name)
        self.accounting.check(session.account, "waiting")
        if any(holder.peer.is_process_of(session.peer) for holder in entry.holders.values()):
            raise WouldDeadlock(entry.name, session.peer.pid)
        session.seq = seq
        session.record[BORROW_SEQ], session.record[SHAPE] = seq, entry.slot
        self.state.start_wait(session, seq, now, timeout)
        self.state.commit(session, CLOSING)
        self.state.wait_for_close(session, entry)
        self.start_retiring(entry, now)

    def closed(self, entry: Entry, error: OSError | None) -> None:
        """Notify the sessions that wait for the final close, which has happened; free the slot."""
        state = self.state
        for session in list(entry.close_waiters.values()):
            state.stop_waiting_for_close(session)
            failure = CloseFailed(entry.name, str(error)[:REASON_CHARS]) if error else None
            self.notifications.append((session, session.asked_seq, failure))
        self.ledger.commit_entry(entry.slot, 0, FREE)
        entry.state = FREE
        state.retiring -= 1
        del self.entries[entry.slot]
        assert entry.charge is not None
        entry.charge.release()
        state.entry_slots.give(entry.slot)

    def entries_from(self, first: int) -> Iterator[tuple[int, Entry | None]]:
        """Iterate over all entry slots in use from `first` on, and the free ones between them."""
        return self.state.entries_from(first)

    # --- time ---

    def next_deadline(self) -> int | None:
        """Return when `expire` has something to do, or None if no wait has a deadline."""
        return self.state.deadlines.earliest()

    def expire(self, now: int) -> None:
        """End the wait with the earliest deadline, if that has come.

        It ends one wait only.  The end of a wait can wake any number of waiters, so the caller
        does other work before the next one if many deadlines come at the same instant.
        """
        session = self.state.deadlines.pop_due(now)
        if session is not None:
            self.state.time_out(session, now)


def out_of_turn(session: Session, reason: str) -> ProtocolError:
    """Return the error for a request that does not fit the state of the session."""
    if session.state in (WAITING, CLOSING):
        reason = "it sent a request before it had the last answer"
    return ProtocolError("client", reason)
