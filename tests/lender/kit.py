"""What the tests of the lender stand on: a rig, a ledger that can be cut, a plain view."""

from __future__ import annotations

import os

from fdbroker.lender.ledger import Ledger
from fdbroker.lender.lender import Lender
from fdbroker.lender.model import (
    CLOSING,
    IDLE,
    LENT,
    LIVE,
    NO_REQUEST,
    WAITING,
    Entry,
    LoanRequest,
    Peer,
    Session,
)
from fdbroker.lender.recovery import recover
from fdbroker.rc import FD

SECOND = 1_000_000_000
ROOM = 6, 6, 3  # sessions, entries, cells


class Descriptors:
    """Makes FDs of made-up numbers, and records which of them were closed."""

    def __init__(self) -> None:
        self.next = 1000
        self.closed: list[int] = []
        self.fails = False
        self.process_ends = False

    def new(self) -> FD:
        self.next += 1
        return FD(self.next, close=self.close)

    def close(self, number: int) -> None:
        if self.process_ends:
            return
        self.closed.append(number)
        if self.fails:
            raise OSError(5, os.strerror(5))

    def abandon(self, lender: Lender) -> None:
        """The process of this lender is no more; its descriptors ended with it."""
        self.process_ends = True
        for entry in lender.entries.values():
            if entry.state == LIVE:
                entry.fd.retire()
            while not entry.fd.closed:
                entry.fd.decref()
        self.process_ends = False


class CountingFD:
    """Enough of an FD for a lender that is only looked at."""

    def __init__(self) -> None:
        self.refs, self.retired, self.closed = 0, False, False

    def incref(self) -> int:
        assert not self.retired
        self.refs += 1
        return 0

    def decref(self) -> None:
        assert self.refs > 0
        self.refs -= 1

    def retire(self) -> None:
        assert not self.retired
        self.retired = True


def buffer_for(room: tuple[int, int, int] = ROOM) -> bytearray:
    return bytearray(Ledger.size(*room))


def reload(ledger: Ledger, peers: dict[int, Peer], now: int, new_fd=CountingFD) -> Lender:
    """What a successor makes of `ledger`, with descriptors of its own."""
    descriptors = {slot: new_fd() for slot, state in enumerate(ledger.entry_states()) if state}
    return recover(ledger, peers, descriptors, now)


class CutLedger(Ledger):
    """A ledger that copies its buffer after every write, as a kill at that point would leave it.

    Before each write of a record there are two more copies, in which all that it is going to
    write is zeros or ones: so it is when the kill comes in the middle of `struct.pack_into`,
    which begins by clearing.
    """

    def __init__(self, buffer, *room: int) -> None:
        super().__init__(buffer, *room)
        self.copies: list[bytes] = []

    def record(self, slot: int):
        return CutRecord(self, super().record(slot))

    def copy(self) -> None:
        self.copies.append(bytes(self.buffer))

    def torn(self, write, *arguments) -> None:
        """Copies of the buffer with nonsense in all places that `write` writes to."""
        held = self.buffer, self.words
        outcomes = []
        for filler in (b"\x55", b"\xaa"):
            scratch = memoryview(bytearray(filler * len(self.buffer)))
            self.buffer, self.words = scratch, scratch.cast("Q")
            write(self, *arguments)
            outcomes.append(int.from_bytes(scratch))
        self.buffer, self.words = held
        untouched = outcomes[0] ^ outcomes[1]
        everything = (1 << 8 * len(self.buffer)) - 1
        before = int.from_bytes(self.buffer) & untouched
        self.copies += [
            torn.to_bytes(len(self.buffer)) for torn in (before, before | everything ^ untouched)
        ]


def _cut(name: str, atomic: bool):
    write = getattr(Ledger, name)

    def cut(self, *arguments):
        if not atomic:
            self.torn(write, *arguments)
        result = write(self, *arguments)
        self.copy()
        return result

    return cut


for _name in dir(Ledger):
    if _name.startswith(("write_", "commit_", "count")):
        setattr(CutLedger, _name, _cut(_name, not _name.startswith("write_")))


class CutRecord:
    """A session's record in a `CutLedger`: each word is written in one instant."""

    def __init__(self, ledger: CutLedger, record: memoryview) -> None:
        self._ledger, self._record = ledger, record

    def __getitem__(self, word: int) -> int:
        return self._record[word]

    def __setitem__(self, word: int, value: int) -> None:
        self._record[word] = value
        self._ledger.copy()


def told(error: BaseException | None) -> object:
    """An error as plain data, the holders in it in no particular order."""
    if error is None:
        return None
    data = [sorted(part) if isinstance(part, list) else part for part in error.data]
    return type(error).__name__, *data


def view(lender: Lender, at_closer=()) -> dict:
    """All of a lender that can be seen from outside, in the terms of `NaiveLender.view`."""
    return {
        "sessions": {slot: view_session(session) for slot, session in lender.sessions.items()},
        "entries": {slot: view_entry(entry) for slot, entry in lender.entries.items()},
        "names": {name: entry.slot for name, entry in lender.names.items()},
        "tickets": {ticket: entry.slot for ticket, entry in lender.tickets.items()},
        "loans": lender.loans,
        "waiting": lender.waiting,
        "retiring": lender.retiring,
        "pending_closes": sorted(entry.slot for entry in (*lender.pending_closes, *at_closer)),
        "deadline": lender.next_deadline(),
        "accounts": {
            uid: (account.sessions, account.loans, account.entries, account.waiting)
            for uid, account in lender.accounting.accounts.items()
            if not account.idle
        },
    }


def come(lender: Lender, peer: Peer) -> Session:
    """A session whose connection is charged to its uid, as the server does."""
    session = lender.open(peer)
    session.charge = lender.accounting.charge(session.account, "sessions")
    return session


def leave(lender: Lender, session: Session) -> None:
    """Free a cleared session, and release the charge of its connection."""
    lender.free(session)
    session.charge.release()


DOES = {IDLE: "idle", WAITING: "waiting", LENT: "lent", CLOSING: "closing"}


def view_session(session) -> dict:
    seen = {
        "id": session.id,
        "peer": tuple(session.peer),
        "seq": session.seq,
        "does": DOES[session.state],
    }
    request = session.request
    assert (request is not NO_REQUEST) == (session.state in (WAITING, LENT))
    assert bool(session.entries) == (request is not NO_REQUEST)
    assert (session.awaited is not None) == (session.state == CLOSING)
    if request is not NO_REQUEST:
        seen["loan"] = (
            session.borrow_seq,
            [entry.slot for entry in session.entries],
            request.exclusive,
            request.readonly,
            request.purpose,
            list(session.cells),
        )
    if session.state == LENT:
        seen["time"] = session.since
    elif session.state == WAITING:
        seen["time"] = session.asked, session.asked_seq, session.deadline, session.arrival
    elif session.state == CLOSING:
        seen["time"] = session.awaited.slot, session.asked, session.asked_seq, session.deadline
    seen["owned"] = sorted(session.owned)
    return seen


def view_entry(entry) -> dict:
    turns = [session.slot for session in entry.waiters.values() if session.request.exclusive]
    assert list(entry.exclusive_waiters) == turns
    live = entry.state == LIVE
    assert not live or entry.ephemeral == (entry.owner is not None)
    return {
        "what": (entry.name, entry.ticket, entry.generation, entry.kind, entry.since),
        "made": (entry.creator, entry.creator_seq, entry.uid),
        "live": live,
        "owner": entry.owner.slot if live and entry.ephemeral else None,
        "holders": sorted(entry.holders),
        "exclusive": entry.held_exclusively,
        "waiters": list(entry.waiters),
        "close_waiters": sorted(entry.close_waiters),
        "refs": entry.fd.refs,
    }


def counters(ledger: Ledger) -> tuple[int, ...]:
    return tuple(ledger.words[4:7])


class Rig:
    """A lender with its surroundings: a clock, a closer, and clients that count their requests."""

    def __init__(self, room: tuple[int, int, int] = ROOM) -> None:
        self.ledger = Ledger(buffer_for(room), *room)
        self.lender = Lender(self.ledger)
        self.descriptors = Descriptors()
        self.now = 1000 * SECOND

    def client(self, pid: int = 0, uid: int = 1000) -> Session:
        return come(self.lender, Peer(uid, uid, pid))

    def clients(self, count: int) -> list[Session]:
        return [self.client() for _ in range(count)]

    def put(self, name: str, by: Session | None = None, ticket: bytes = b"", **how) -> Entry:
        seq = by.seq + 1 if by else 0
        fd = self.descriptors.new()
        try:
            return self.lender.put(by, seq, name, ticket, fd, 1, self.now, **how)
        except Exception:
            fd.detach()  # without a reference: it stayed the caller's
            raise

    def borrow(self, who: Session, *names: str | bytes, **how) -> bool:
        return self.lender.borrow(who, who.seq + 1, LoanRequest(names, **how), self.now)

    def return_loan(self, who: Session) -> bool:
        return self.lender.return_loan(who, who.seq + 1, self.now)

    def cancel(self, who: Session) -> None:
        self.lender.cancel(who, who.seq + 1, self.now)

    def retire(self, name: str | bytes) -> Entry:
        return self.lender.retire(name, self.now)

    def retire_and_wait(self, who: Session, name: str | bytes, timeout: int | None = None) -> None:
        self.lender.retire_and_wait(who, who.seq + 1, name, self.now, timeout)

    def end(self, who: Session) -> None:
        self.lender.clear(who, self.now)
        leave(self.lender, who)

    def time_passes(self, seconds: float) -> None:
        self.now += int(seconds * SECOND)
        while (due := self.lender.next_deadline()) is not None and due <= self.now:
            self.lender.expire(self.now)

    def decided(self) -> list[tuple[Session, object]]:
        """Who was told what since the last time: None is a grant, or the final close."""
        decided = [(who, told(error)) for who, _, error in self.lender.notifications]
        self.lender.notifications.clear()
        return decided

    def granted(self) -> list[Session]:
        """Who got its turn since the last time; nothing else may have been decided."""
        decided = self.decided()
        assert all(error is None for _, error in decided), decided
        return [who for who, _ in decided]

    def close_all(self, fails: bool = False) -> list[str]:
        """The closer's work: the last reference of each entry that is due; their names."""
        self.descriptors.fails = fails
        names = []
        while self.lender.pending_closes:
            entry = self.lender.pending_closes.popleft()
            entry.fd.decref()
            assert entry.fd.closed
            error = None
            try:
                entry.fd.wait_closed()
            except OSError as failure:
                error = failure
            self.lender.closed(entry, error)
            names.append(entry.name)
        return names

    def reload(self) -> Lender:
        """What a successor would make of it, to be looked at."""
        peers = {slot: session.peer for slot, session in self.lender.sessions.items()}
        return reload(Ledger(bytearray(self.ledger.buffer)), peers, self.now)

    def check(self) -> None:
        """The ledger tells all: what is loaded from it is what there is."""
        loaded = self.reload()
        assert not loaded.notifications
        assert view(loaded) == view(self.lender)
