"""The rules of lending once more, the naive way: what the real lender is compared with.

Plain lists, one global waiting list in the order of arrival, and everything looked at from scratch
after each event.  It imports nothing of `fdbroker`.  `steps` are the points of the event at which
it may be cut in two: whatever a writer that was killed left behind must load as one of them.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field

SECOND = 1_000_000_000


@dataclass(eq=False)
class Session:
    slot: int
    id: int
    peer: tuple[int, int, int]  # uid, gid, pid
    seq: int = 0


@dataclass(eq=False)
class Entry:
    slot: int
    name: str
    ticket: bytes
    generation: int
    kind: int
    since: int
    creator: int
    creator_seq: int
    uid: int
    owner: Session | None
    live: bool = True


@dataclass(eq=False)
class Loan:
    """A loan, or the request for one while it is in `waiting`."""

    session: Session
    seq: int
    entries: list[Entry]
    exclusive: bool
    readonly: bool
    purpose: str
    cells: list[int]
    asked: int = 0
    deadline: int = 0
    arrival: int = 0
    since: int = 0


@dataclass(eq=False)
class Watch:
    session: Session
    seq: int
    entry: Entry
    asked: int
    deadline: int


class Refused(Exception):
    """What the asking session is told, as (type, *data)."""

    def __init__(self, *error: object) -> None:
        super().__init__(*error)
        self.error = error


@dataclass
class NaiveLender:
    room: tuple[int, int, int]  # sessions, entries, cells
    sessions: list[Session] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    loans: list[Loan] = field(default_factory=list)
    waiting: list[Loan] = field(default_factory=list)
    watches: list[Watch] = field(default_factory=list)
    next_session: int = 1
    next_generation: int = 1
    next_arrival: int = 1
    notifications: list[tuple[int, int, object]] = field(default_factory=list)  # slot, seq, error
    steps: list[tuple[dict, NaiveLender | None]] = field(default_factory=list)
    keeping: bool = False  # whether `steps` shall hold copies of the model too

    # --- events ---

    def open(self, peer):
        slot = lowest(1, self.room[0], [session.slot for session in self.sessions], "sessions")[0]
        self.sessions.append(Session(slot, self.next_session, peer))
        self.next_session += 1
        self.step()

    def advance(self, session, seq):
        session.seq = seq
        self.step()

    def clear(self, session, now):
        self.loans = [loan for loan in self.loans if loan.session is not session]
        self.waiting = [request for request in self.waiting if request.session is not session]
        self.watches = [watch for watch in self.watches if watch.session is not session]
        self.grant_all(now)
        self.step()
        for entry in [entry for entry in self.entries if entry.live and entry.owner is session]:
            self.end_entry(entry, now)
            self.step()

    def free(self, session):
        self.sessions.remove(session)
        self.step()

    def borrow(self, session, seq, names, now, exclusive, readonly, timeout, purpose):
        entries = [self.find(name) for name in names]
        request = Loan(session, seq, entries, exclusive, readonly, purpose, [])
        waits = not self.may_go(request, self.waiting)
        if waits:
            for entry in entries:
                for loan in self.loans:
                    if entry in loan.entries and loan.exclusive and same_pid(loan.session, session):
                        raise Refused("WouldDeadlock", entry.name, session.peer[2])
            if timeout == 0:
                raise Refused(*self.busy(request, self.waiting, 0, now))
        taken = [cell for loan in self.loans + self.waiting for cell in loan.cells]
        request.cells = lowest(len(entries) - 1, self.room[2], taken, "loans of several entries")
        session.seq = seq
        if waits:
            request.asked, request.arrival = now, self.next_arrival
            self.next_arrival += 1
            request.deadline = 0 if timeout is None else now + timeout
            self.waiting.append(request)
        else:
            request.since = now
            self.loans.append(request)
        self.step()
        return not waits

    def return_loan(self, session, seq, now):
        if not any(loan.session is session for loan in self.loans):
            raise Refused("ProtocolError", "client", "a return without a loan")
        session.seq = seq
        self.loans = [loan for loan in self.loans if loan.session is not session]
        self.grant_all(now)
        self.step()

    def cancel(self, session, seq, now):
        for entry in [entry for entry in self.entries if entry.live]:
            if (entry.creator, entry.creator_seq) == (session.id, seq - 1):
                self.end_entry(entry, now)
                self.step()
        session.seq = seq
        for wait in self.waiting + self.watches:
            if wait.session is session:
                self.time_out(wait, now)
        self.step()

    def put(self, session, seq, name, ticket, kind, now, replace, ephemeral):
        old = [entry for entry in self.entries if name and entry.live and entry.name == name]
        if old and not replace:
            raise Refused("NameTaken", name)
        slot = lowest(1, self.room[1], [entry.slot for entry in self.entries], "entries")[0]
        entry = Entry(slot, name, ticket, self.next_generation, kind, now, 0, 0, 0, None)
        self.next_generation += 1
        if session is not None:
            entry.creator, entry.creator_seq, entry.uid = session.id, seq, session.peer[0]
            entry.owner = session if ephemeral else None
            session.seq = seq
        self.entries.append(entry)
        for entry in old:
            self.end_entry(entry, now)
        self.step()

    def retire(self, name, now):
        self.end_entry(self.find(name), now)
        self.step()

    def retire_and_wait(self, session, seq, name, now, timeout):
        entry = self.find(name)
        for loan in self.loans:
            if entry in loan.entries and same_pid(loan.session, session):
                raise Refused("WouldDeadlock", entry.name, session.peer[2])
        session.seq = seq
        deadline = 0 if timeout is None else now + timeout
        self.watches.append(Watch(session, seq, entry, now, deadline))
        self.end_entry(entry, now)
        self.step()

    def closed(self, entry, reason):
        error = None if reason is None else ("CloseFailed", entry.name, reason)
        for watch in [watch for watch in self.watches if watch.entry is entry]:
            self.watches.remove(watch)
            self.decide(watch, error)
            self.step()
        self.entries.remove(entry)
        self.step()

    def expire(self, now):
        due = [
            wait for wait in self.waiting + self.watches if wait.deadline and wait.deadline <= now
        ]
        if due:
            self.time_out(min(due, key=lambda wait: (wait.deadline, wait.session.id)), now)
            self.step()

    # --- the rules ---

    def find(self, name):
        for entry in self.entries:
            if entry.live and name == (entry.name or entry.ticket):
                return entry
        if isinstance(name, bytes):
            raise Refused("UnknownTicket")
        raise Refused("UnknownEntry", name, [])

    def may_go(self, request, earlier):
        return not any(conflict(request, other) for other in self.loans + earlier)

    def grant_all(self, now):
        before = []
        for request in list(self.waiting):
            if self.may_go(request, before):
                self.waiting.remove(request)
                request.since = now
                self.loans.append(request)
                self.decide(request, None)
            else:
                before.append(request)

    def end_entry(self, entry, now):
        entry.live = False
        for request in list(self.waiting):
            if entry in request.entries:
                self.waiting.remove(request)
                self.decide(request, ("EntryRetired", entry.name))
        self.grant_all(now)

    def time_out(self, wait, now):
        seconds = (now - wait.asked) / SECOND
        if isinstance(wait, Watch):
            self.watches.remove(wait)
            lent = sum(wait.entry in loan.entries for loan in self.loans)
            self.decide(wait, ("RetireTimeout", wait.entry.name, seconds, lent))
        else:
            earlier = self.waiting[: self.waiting.index(wait)]
            self.decide(wait, self.busy(wait, earlier, seconds, now))
            self.waiting.remove(wait)
            self.grant_all(now)

    def busy(self, request, earlier, seconds, now):
        holders = [loan for loan in self.loans if conflict(request, loan)]
        names = [
            entry.name
            for others in (holders, earlier)
            for entry in request.entries
            if any(conflict(request, other) and entry in other.entries for other in others)
        ]
        who = []
        for loan in holders:
            uid, _, pid = loan.session.peer
            who.append((pid, uid, (now - loan.since) / SECOND, loan.exclusive))
        return "BorrowTimeout", names[0], seconds, sorted(who)

    def decide(self, wait, error):
        self.notifications.append((wait.session.slot, wait.seq, error))

    # --- what can be seen from outside ---

    def reloaded(self):
        """Forget what a ledger need not keep: in which order the close is waited for."""
        self.watches.sort(key=lambda watch: watch.session.slot)

    def step(self):
        steps, self.steps = self.steps, []
        steps.append((self.view(), deepcopy(self) if self.keeping else None))
        self.steps = steps

    def pending_closes(self):
        lent = [entry for loan in self.loans for entry in loan.entries]
        return [entry for entry in self.entries if not entry.live and entry not in lent]

    def view(self):
        deadlines = [wait.deadline for wait in self.waiting + self.watches if wait.deadline]
        live = [entry for entry in self.entries if entry.live]
        return {
            "sessions": {session.slot: self.view_session(session) for session in self.sessions},
            "entries": {entry.slot: self.view_entry(entry) for entry in self.entries},
            "names": {entry.name: entry.slot for entry in live if entry.name},
            "tickets": {entry.ticket: entry.slot for entry in live if not entry.name},
            "loans": len(self.loans),
            "waiting": len(self.waiting),
            "retiring": len(self.entries) - len(live),
            "pending_closes": sorted(entry.slot for entry in self.pending_closes()),
            "deadline": min(deadlines, default=None),
            "accounts": {uid: used for uid in self.uids() if any(used := self.used(uid))},
        }

    def uids(self):
        return {session.peer[0] for session in self.sessions} | {e.uid for e in self.entries}

    def used(self, uid):
        return (
            sum(session.peer[0] == uid for session in self.sessions),
            sum(
                len(loan.entries)
                for loan in self.loans + self.waiting
                if loan.session.peer[0] == uid
            ),
            sum(entry.uid == uid and entry.creator != 0 for entry in self.entries),
            sum(wait.session.peer[0] == uid for wait in self.waiting + self.watches),
        )

    def view_session(self, session):
        seen = {"id": session.id, "peer": session.peer, "seq": session.seq, "does": "idle"}
        for does, loans in (("lent", self.loans), ("waiting", self.waiting)):
            for loan in loans:
                if loan.session is session:
                    seen["does"] = does
                    seen["loan"] = (
                        loan.seq,
                        [entry.slot for entry in loan.entries],
                        loan.exclusive,
                        loan.readonly,
                        loan.purpose,
                        loan.cells,
                    )
                    seen["time"] = (
                        loan.since
                        if does == "lent"
                        else (loan.asked, loan.seq, loan.deadline, loan.arrival)
                    )
        for watch in self.watches:
            if watch.session is session:
                seen["does"] = "closing"
                seen["time"] = watch.entry.slot, watch.asked, watch.seq, watch.deadline
        owned = [entry.slot for entry in self.entries if entry.live and entry.owner is session]
        seen["owned"] = sorted(owned)
        return seen

    def view_entry(self, entry):
        held = [loan for loan in self.loans if entry in loan.entries]
        line = [request for request in self.waiting if entry in request.entries]
        return {
            "what": (entry.name, entry.ticket, entry.generation, entry.kind, entry.since),
            "made": (entry.creator, entry.creator_seq, entry.uid),
            "live": entry.live,
            "owner": entry.owner.slot if entry.live and entry.owner else None,
            "holders": sorted(loan.session.slot for loan in held),
            "exclusive": any(loan.exclusive for loan in held),
            "waiters": [request.session.slot for request in line],
            "close_waiters": sorted(w.session.slot for w in self.watches if w.entry is entry),
            "refs": 1 + sum(loan.entries.count(entry) for loan in held),
        }


def conflict(one, other):
    return (one.exclusive or other.exclusive) and any(
        entry in other.entries for entry in one.entries
    )


def same_pid(one, other):
    return one.peer[0] == other.peer[0] and one.peer[2] == other.peer[2] != 0


def lowest(count, limit, taken, what):
    free = [number for number in range(limit) if number not in taken]
    if count > len(free):
        raise Refused("BrokerFull", what, limit)
    return free[:count]
