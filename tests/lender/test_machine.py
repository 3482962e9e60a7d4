"""The lender against a naive model of the same rules, event by event, and cut at every write.

After each event the two must agree in everything that can be seen; then each copy that was taken
of the ledger while the event went on is loaded, and must be the model before the event, after it,
or at one of the points in between that the model names.  Now and then the lender is replaced by
what a load makes of its ledger, whole or cut in the middle of an event, and life goes on with it.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fdbroker.errors import FDBrokerError
from fdbroker.lender.ledger import Ledger
from fdbroker.lender.lender import Lender
from fdbroker.lender.model import NO_REQUEST, LoanRequest, Peer

from .kit import (
    ROOM,
    CutLedger,
    Descriptors,
    buffer_for,
    come,
    counters,
    leave,
    reload,
    told,
    view,
)
from .naive import NaiveLender, Refused

NAMES = ["a", "b", "c"]
TIMEOUTS = st.sampled_from([None, None, 0, 3, 10])
PICK = st.integers(0, 9)  # of whatever there is; 9 asks for an entry that is not there
SEVERAL = st.sampled_from([(0,), (0,), (1,), (2,), (0, 1), (1, 0), (2, 1), (0, 0), (0, 1, 2)])
PEERS = st.sampled_from([Peer(uid, 100, pid) for pid in (11, 12, 0, 0) for uid in (1000, 0)])
PURPOSES = st.sampled_from(["", "", "backup", "ü" * 64])


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 100
        self.naive = NaiveLender(ROOM)
        self.ledger = CutLedger(buffer_for(), *ROOM)
        self.lender = Lender(self.ledger)
        self.descriptors = Descriptors()
        self.at_closer: list = []
        self.closes = 0
        self.tickets = 0
        self.peers: dict[int, Peer] = {}
        self.cut: int | None = None  # which of its writes the next event ends with

    # --- one event, in both ---

    def event(self, name: str, real, naive) -> object:
        """Let it happen; the result, or the refusal, of both.  None if the event was cut."""
        before = self.naive.view(), deepcopy(self.naive) if self.cut is not None else None
        counted = counters(self.ledger)
        self.naive.steps, self.naive.notifications = [], []
        self.naive.keeping = self.cut is not None
        self.ledger.copies = []
        try:
            expected = naive(self.naive)
        except Refused as refused:
            expected = refused.error
        try:
            happened = real(self.lender)
        except FDBrokerError as error:
            happened = told(error)
        if name == "borrow" or isinstance(happened, tuple) or isinstance(expected, tuple):
            assert happened == expected, name
        decided = [(session.slot, seq, told(error)) for session, seq, error in self.drain()]
        assert sorted(decided, key=repr) == sorted(self.naive.notifications, key=repr), name
        assert view(self.lender, self.at_closer) == self.naive.view(), name
        assert counters(self.ledger) == self.next_numbers(), name
        copies = self.ledger.copies
        assert not copies or copies[-1] == self.ledger.buffer, "a write that no copy was made of"
        assert copies or (not decided and counters(self.ledger) == counted)
        found = self.load_copies(copies, [before, *self.naive.steps], counted)
        if self.cut is None or not copies:
            return happened
        self.go_on_from(*found[self.cut % len(found)])
        return None

    def drain(self) -> list:
        decided = list(self.lender.notifications)
        for session, _, error in decided:
            assert error is None or session.request is NO_REQUEST
        self.lender.notifications.clear()
        self.at_closer += self.lender.pending_closes
        self.lender.pending_closes.clear()
        return decided

    def next_numbers(self) -> tuple[int, int, int]:
        naive = self.naive
        return naive.next_session, naive.next_generation, naive.next_arrival

    def load_copies(self, copies, steps, counted) -> list:
        """Each copy with the model that it is; in the order of the event, and never back."""
        at, found, last = 0, [], None
        for copy in copies:
            if copy == last:
                continue
            last = copy
            loaded = reload(Ledger(bytearray(copy)), self.peers, self.now)
            seen = view(loaded)
            while at < len(steps) and steps[at][0] != seen:
                at += 1
            if at == len(steps):
                at = min(at, len(steps) - 1)
                raise AssertionError(f"cut in two, it loads as {seen}, not as one of {steps}")
            for least, number, most in zip(
                counted, counters(loaded.ledger), counters(self.ledger), strict=True
            ):
                assert least <= number <= most
            if loaded.ledger.buffer != copy:  # the load finished something: cut that in two, too
                again = CutLedger(bytearray(copy))
                reload(again, self.peers, self.now)
                for half in again.copies:
                    twice = reload(Ledger(bytearray(half)), self.peers, self.now)
                    assert view(twice) == seen
            found.append((copy, steps[at][1]))
        return found

    def go_on_from(self, copy: bytes, naive: NaiveLender) -> None:
        """The broker was killed in the middle of an event; its successor has `copy`."""
        self.cut, self.naive = None, naive
        self.succeed(copy)
        numbers = counters(self.ledger)
        naive.next_session, naive.next_generation, naive.next_arrival = numbers

    def succeed(self, copy: bytes) -> None:
        self.descriptors.abandon(self.lender)
        self.ledger = CutLedger(bytearray(copy))
        self.lender = reload(self.ledger, self.peers, self.now, self.descriptors.new)
        self.at_closer = []
        finished = self.drain()
        assert not finished or self.ledger.buffer != copy
        self.naive.reloaded()
        assert view(self.lender, self.at_closer) == self.naive.view()

    # --- what to do it with ---

    def pick_session(self, pick: int, idle: bool = True):
        """A session of the model; an idle one if there is one and it is wanted."""
        busy = {
            wait.session.slot for wait in self.naive.loans + self.naive.waiting + self.naive.watches
        }
        sessions = [one for one in self.naive.sessions if not idle or one.slot not in busy]
        return sessions[pick % len(sessions)] if sessions else None

    def pick_name(self, pick: int):
        live = [entry.name or entry.ticket for entry in self.naive.entries if entry.live]
        if pick == 9 or not live:
            return "nobody" if len(live) % 2 else b"no such ticket.."
        return live[pick % len(live)]

    def request(self, name: str, session, real, naive) -> None:
        """An event that a session asks for; what is refused is noted as acted upon."""
        slot, seq = session.slot, session.seq + 1
        result = self.event(
            name,
            lambda lender: real(lender, lender.sessions[slot], seq),
            lambda model: naive(model, session, seq),
        )
        if isinstance(result, tuple):
            self.advance_to(session, seq)

    def advance_to(self, session, seq: int) -> None:
        slot = session.slot
        self.event(
            "advance",
            lambda lender: lender.advance(lender.sessions[slot], seq),
            lambda model: model.advance(session, seq),
        )

    # --- sessions ---

    @initialize()
    def begin(self) -> None:
        for pid in (11, 12, 13, 0, 0):
            self.open(Peer(1000, 100, pid))
        self.put(0, 0, False, False, False, 1)
        self.put(0, 1, False, False, False, 2)

    @precondition(lambda self: len(self.naive.sessions) < ROOM[0] or len(self.naive.entries) > 5)
    @rule(peer=PEERS)
    def open(self, peer: Peer) -> None:
        taken = {session.slot for session in self.naive.sessions}
        slot = min(set(range(ROOM[0] + 1)) - taken)
        self.peers[slot] = peer

        def real(lender: Lender) -> None:
            assert come(lender, peer).slot == slot

        self.event("open", real, lambda model: model.open(tuple(peer)))

    @precondition(lambda self: len(self.naive.sessions) > 4)
    @rule(pick=PICK)
    def end(self, pick: int) -> None:
        session = self.pick_session(pick, idle=False)
        if session is None:
            return
        slot, now = session.slot, self.now

        def real(lender: Lender) -> str:
            lender.clear(lender.sessions[slot], now)
            return "cleared"

        if self.event("clear", real, lambda model: model.clear(session, now)) is None:
            return  # killed in between: the session is still in the books
        self.event(
            "free",
            lambda lender: leave(lender, lender.sessions[slot]),
            lambda model: model.free(session),
        )

    # --- loans ---

    @rule(
        pick=PICK,
        first=PICK,
        several=SEVERAL,
        exclusive=st.booleans(),
        readonly=st.booleans(),
        timeout=TIMEOUTS,
        purpose=PURPOSES,
    )
    def borrow(self, pick, first, several, exclusive, readonly, timeout, purpose) -> None:
        names = [self.pick_name(9 if first == 9 else (first + more) % 9) for more in several]
        self.ask(pick, names, exclusive, readonly, timeout, purpose)

    @precondition(lambda self: self.naive.loans or self.naive.waiting)
    @rule(pick=PICK, of=PICK, more=PICK, exclusive=st.booleans(), timeout=TIMEOUTS)
    def borrow_what_is_busy(self, pick, of, more, exclusive, timeout) -> None:
        wanted = self.naive.loans + self.naive.waiting
        entry = wanted[of % len(wanted)].entries[-1]
        others = [self.pick_name(more)] if more % 3 == 2 and more != 8 else []
        names = [entry.name or entry.ticket, *others]
        self.ask(pick, names[:: 1 if of % 2 else -1], exclusive, False, timeout, "")

    @rule(pick=PICK, first=PICK, several=SEVERAL, timeout=st.sampled_from([None, 5]))
    def borrow_exclusively(self, pick, first, several, timeout) -> None:
        names = [self.pick_name((first + more) % 9) for more in several]
        self.ask(pick, names, True, False, timeout, "to be alone")

    def ask(self, pick, names, exclusive, readonly, timeout, purpose) -> None:
        session = self.pick_session(pick)
        if session is None:
            return
        now, request = self.now, LoanRequest(tuple(names), exclusive, readonly, timeout, purpose)
        self.request(
            "borrow",
            session,
            lambda lender, whose, seq: lender.borrow(whose, seq, request, now),
            lambda model, whose, seq: model.borrow(
                whose, seq, names, now, exclusive, readonly, timeout, purpose
            ),
        )

    @precondition(lambda self: self.naive.loans)
    @rule(pick=PICK)
    def return_loan(self, pick) -> None:
        loan = self.naive.loans[pick % len(self.naive.loans)]
        now = self.now
        self.request(
            "return_loan",
            loan.session,
            lambda lender, whose, seq: lender.return_loan(whose, seq, now),
            lambda model, whose, seq: model.return_loan(whose, seq, now),
        )

    @precondition(lambda self: self.naive.loans)
    @rule(pick=PICK)
    def roll_back_grant(self, pick) -> None:
        session = self.naive.loans[pick % len(self.naive.loans)].session
        slot, now = session.slot, self.now
        self.event(
            "roll_back_grant",
            lambda lender: lender.roll_back_grant(lender.sessions[slot], now),
            lambda model: model.return_loan(session, session.seq, now),
        )

    @precondition(lambda self: len(self.naive.loans) < 2)
    @rule(pick=PICK)
    def return_or_cancel_nothing(self, pick) -> None:
        session = self.pick_session(pick)
        if session is None:
            return
        now, verb = self.now, "return_loan" if pick % 2 else "cancel"
        self.request(
            verb,
            session,
            lambda lender, whose, seq: getattr(lender, verb)(whose, seq, now),
            lambda model, whose, seq: getattr(model, verb)(whose, seq, now),
        )

    @precondition(lambda self: self.naive.loans + self.naive.waiting + self.naive.watches)
    @rule(pick=PICK)
    def cancel(self, pick) -> None:
        waits = self.naive.waiting + self.naive.watches + self.naive.loans
        now = self.now
        self.request(
            "cancel",
            waits[pick % len(waits)].session,
            lambda lender, whose, seq: lender.cancel(whose, seq, now),
            lambda model, whose, seq: model.cancel(whose, seq, now),
        )

    # --- entries ---

    @precondition(
        lambda self: (
            len(self.naive.entries) == ROOM[1]
            or sum(entry.live for entry in self.naive.entries) < 4
        )
    )
    @rule(
        pick=PICK,
        name=st.integers(0, len(NAMES) - 1),
        nameless=st.sampled_from([False, False, True]),
        replace=st.booleans(),
        ephemeral=st.booleans(),
        kind=st.integers(0, 255),
    )
    def put(self, pick, name, nameless, replace, ephemeral, kind) -> None:
        session = None if pick == 9 else self.pick_session(pick)
        slot = session and session.slot
        seq = session.seq + 1 if session else 0
        self.tickets += 1
        ticket = b"ticket %9d" % self.tickets if nameless else b""
        key = "" if nameless else NAMES[name]
        fd, now = self.descriptors.new(), self.now

        def real(lender: Lender) -> None:
            whose = None if slot is None else lender.sessions[slot]
            lender.put(whose, seq, key, ticket, fd, kind, now, replace=replace, ephemeral=ephemeral)

        result = self.event(
            "put",
            real,
            lambda model: model.put(session, seq, key, ticket, kind, now, replace, ephemeral),
        )
        if isinstance(result, tuple):
            fd.detach()  # it stayed the caller's, and without a reference
            if session is not None:
                self.advance_to(session, seq)

    @precondition(lambda self: sum(entry.live for entry in self.naive.entries) > 2)
    @rule(entry=PICK)
    def retire(self, entry) -> None:
        name, now = self.pick_name(entry), self.now

        def real(lender: Lender) -> None:
            assert (lender.retire(name, now).name or name) == name

        self.event("retire", real, lambda model: model.retire(name, now))

    @precondition(lambda self: sum(entry.live for entry in self.naive.entries) > 1)
    @rule(pick=PICK, entry=PICK, timeout=TIMEOUTS)
    def retire_and_wait(self, pick, entry, timeout) -> None:
        session = self.pick_session(pick)
        if session is None:
            return
        name, now = self.pick_name(entry), self.now
        self.request(
            "retire_and_wait",
            session,
            lambda lender, whose, seq: lender.retire_and_wait(whose, seq, name, now, timeout),
            lambda model, whose, seq: model.retire_and_wait(whose, seq, name, now, timeout),
        )

    @precondition(lambda self: self.at_closer)
    @rule(pick=PICK, fails=st.booleans())
    def closed(self, pick, fails) -> None:
        entry = self.at_closer.pop(pick % len(self.at_closer))
        self.descriptors.fails = fails
        assert not entry.fd.closed
        assert len(self.descriptors.closed) == self.closes
        entry.fd.decref()
        self.closes += 1
        assert entry.fd.closed
        error = None
        try:
            entry.fd.wait_closed()
        except OSError as failure:
            error = failure
        assert (error is not None) == fails
        reason = str(error) if fails else None
        doomed = next(one for one in self.naive.entries if one.slot == entry.slot)
        self.event(
            "closed",
            lambda lender: lender.closed(entry, error),
            lambda model: model.closed(doomed, reason),
        )

    # --- time, and the end of the broker ---

    @rule(passed=st.sampled_from([1, 3, 7, 20]))
    def time_passes(self, passed) -> None:
        self.now += passed
        now = self.now
        while (due := self.naive.view()["deadline"]) is not None and due <= now:
            self.event("expire", lambda lender: lender.expire(now), lambda model: model.expire(now))
        self.event("expire", lambda lender: lender.expire(now), lambda model: model.expire(now))

    @rule()
    def is_replaced(self) -> None:
        copy = bytes(self.ledger.buffer)
        self.succeed(copy)
        assert self.ledger.buffer == copy, "there was nothing to finish"

    @rule(write=st.integers(0, 11))
    def is_killed_in_the_next_event(self, write) -> None:
        self.cut = write

    # --- what is true at all times ---

    @invariant()
    def closes_only_what_is_retired_and_back(self) -> None:
        assert len(set(self.descriptors.closed)) == len(self.descriptors.closed) == self.closes
        for entry in self.lender.entries.values():
            assert not entry.fd.closed
            lent = sum(session.entries.count(entry) for session in entry.holders.values())
            assert entry.fd.refs == lent + 1

    @invariant()
    def lists_all_by_slot(self) -> None:
        sessions = sorted(session.slot for session in self.naive.sessions)
        entries = sorted(entry.slot for entry in self.naive.entries)
        for first in range(3):
            listed = [slot for slot, session in self.lender.sessions_from(first) if session]
            assert listed == [slot for slot in sessions if slot >= first]
            listed = [slot for slot, entry in self.lender.entries_from(first) if entry]
            assert listed == [slot for slot in entries if slot >= first]

    @invariant()
    def exclusive_is_alone(self) -> None:
        for entry in self.lender.entries.values():
            if any(session.request.exclusive for session in entry.holders.values()):
                assert len(entry.holders) == 1

    def teardown(self) -> None:
        self.descriptors.abandon(self.lender)


def test_agrees_with_the_naive_model_and_survives_every_cut():
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=200,
            stateful_step_count=60,
            deadline=None,
            derandomize=True,
            print_blob=True,
        ),
    )


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_agrees_with_the_naive_model_for_long():
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=3000,
            stateful_step_count=80,
            deadline=None,
            print_blob=True,
            phases=[Phase.generate, Phase.shrink],
        ),
    )
