"""The fair scheduler, which knows no socket and no clock: its rules, and what follows from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from itertools import cycle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fdbroker.ipc.server.scheduler import MOST_DEFICIT, QUANTUM, FairScheduler


def scheduler_with(**items: str) -> FairScheduler:
    """A scheduler with items of one letter each, by user, queued in this order."""
    scheduler = FairScheduler()
    for user, letters in items.items():
        for letter in letters:
            scheduler.ready(user, letter)
    return scheduler


def served(scheduler: FairScheduler, cost: int = 0, costs: dict[str, int] | None = None) -> str:
    """The items in the order in which they are served, if each takes its user's cost."""
    order = ""
    while (chosen := scheduler.next()) is not None:
        user, item = chosen
        order += item
        scheduler.charge(user, cost if costs is None else costs.get(str(user), 0))
    return order


# --- one rule each ---


def test_scheduler_without_items_has_none() -> None:
    scheduler = FairScheduler()
    assert scheduler.next() is None


def test_items_of_one_user_are_served_in_order() -> None:
    assert served(scheduler_with(alice="abcdef"), QUANTUM // 3) == "abcdef"


def test_users_take_turns_one_item_each() -> None:
    assert served(scheduler_with(alice="abc", bob="xyz", carol="1")) == "ax1bycz"


@pytest.mark.parametrize("cost", [0, 1, QUANTUM - 1, QUANTUM, 7 * QUANTUM, 100 * QUANTUM])
def test_users_whose_items_cost_the_same_take_turns(cost: int) -> None:
    order = served(scheduler_with(alice="aaaaaa", bob="bbbbbb"), cost)
    for position in range(len(order)):
        assert abs(order[:position].count("a") - order[:position].count("b")) <= 1 + (
            QUANTUM // cost if cost else 0
        )


def test_user_in_deficit_is_skipped_while_another_is_ready() -> None:
    scheduler = scheduler_with(alice="abc", bob="xyz")
    assert scheduler.next() == ("alice", "a")
    assert scheduler.next() == ("bob", "x")
    scheduler.charge("alice", 1)
    assert served(scheduler) == "yzbc"


def test_user_in_deficit_is_served_if_nobody_else_is_ready() -> None:
    scheduler = scheduler_with(alice="abc")
    scheduler.charge("alice", MOST_DEFICIT)
    assert served(scheduler, MOST_DEFICIT) == "abc"


def test_of_users_in_deficit_the_one_least_in_deficit_is_served_first() -> None:
    scheduler = scheduler_with(alice="ab", bob="xy")
    assert [scheduler.next(), scheduler.next()] == [("alice", "a"), ("bob", "x")]
    scheduler.charge("alice", 3 * QUANTUM)
    scheduler.charge("bob", 2 * QUANTUM)
    assert served(scheduler) == "yb"


def test_one_long_item_is_as_many_short_ones() -> None:
    """The long item takes eight quanta, and each short one takes one."""
    scheduler = scheduler_with(alice="AZ", bob="abcdefghijklmnop")
    order = served(scheduler, costs={"alice": 8 * QUANTUM, "bob": QUANTUM})
    assert order == "AabcdefghZijklmnop"


def test_newcomer_is_served_after_one_item_of_each_user_not_in_deficit() -> None:
    scheduler = scheduler_with(alice="aaaa", bob="bbbb", carol="cccc")
    scheduler.charge("alice", 1)
    scheduler.ready("newcomer", "!")
    assert served(scheduler)[:3] == "bc!"


def test_deficit_is_paid_off_by_the_time_that_others_use() -> None:
    """Also by a user who has no other item ready, and is never in deficit itself."""
    scheduler = scheduler_with(alice="ab")
    assert scheduler.next() == ("alice", "a")
    scheduler.charge("alice", 3 * QUANTUM)
    order = ""
    for letter in "vwxyz":
        scheduler.ready("bob", letter)
        user, item = scheduler.next() or ("", "")
        scheduler.charge(user, QUANTUM)
        order += item
    assert order == "vwxby"


def test_item_that_is_ready_again_while_queued_keeps_its_place_and_is_served_once() -> None:
    scheduler = scheduler_with(alice="aba")
    assert scheduler.is_ready("alice", "a")
    assert served(scheduler) == "ab"
    assert not scheduler.is_ready("alice", "a")


def test_item_that_is_ready_again_after_its_turn_is_served_again() -> None:
    scheduler = scheduler_with(alice="a")
    assert scheduler.next() == ("alice", "a")
    scheduler.ready("alice", "a")
    assert scheduler.next() == ("alice", "a")


def test_equal_items_of_two_users_are_two() -> None:
    assert served(scheduler_with(alice="a", bob="a")) == "aa"


def test_discarded_item_is_not_served() -> None:
    scheduler = scheduler_with(alice="abc", bob="x")
    scheduler.discard("alice", "b")
    scheduler.discard("bob", "x")
    assert served(scheduler) == "ac"


def test_discard_of_what_is_not_queued_does_nothing() -> None:
    scheduler = scheduler_with(alice="a")
    scheduler.discard("alice", "b")
    scheduler.discard("bob", "a")
    assert served(scheduler) == "a"


def test_balance_is_zero_when_the_last_item_is_served() -> None:
    """Alice has nearly a quantum left in the round in which she has no item any more."""
    scheduler = scheduler_with(alice="ab", bob="xyz")
    assert [scheduler.next(), scheduler.next()] == [("alice", "a"), ("bob", "x")]
    for user in ("alice", "bob"):
        scheduler.charge(user, 1)
    assert scheduler.next() == ("alice", "b")
    assert "alice" not in scheduler._balances
    scheduler.charge("alice", MOST_DEFICIT)
    assert "alice" not in scheduler._balances


def test_credit_is_lost_when_the_last_item_is_discarded() -> None:
    scheduler = scheduler_with(alice="ab", bob="x")
    for user in ("alice", "bob"):
        scheduler.charge(user, 1)
    assert scheduler.next() == ("alice", "a")
    scheduler.discard("alice", "b")
    assert "alice" not in scheduler._balances


def test_user_that_asks_now_and_then_is_behind_one_item_of_one_that_asks_always() -> None:
    scheduler = scheduler_with(bob="uvwxyz")
    order = ""
    for letter in "abc":
        scheduler.ready("alice", letter)
        for _ in range(2):
            user, item = scheduler.next() or ("", "")
            scheduler.charge(user, 5 * QUANTUM)
            order += item
    assert order == "uavbwc"


def test_deficit_is_ten_quanta_at_most() -> None:
    scheduler = scheduler_with(alice="!A", bob="?abcdefghijklmnop")
    assert [scheduler.next(), scheduler.next()] == [("alice", "!"), ("bob", "?")]
    scheduler.charge("alice", 10**15)
    assert served(scheduler, costs={"bob": QUANTUM}) == "abcdefghijAklmnop"


def test_deficit_is_forgiven_when_nothing_is_ready() -> None:
    scheduler = scheduler_with(alice="a")
    assert scheduler.next() == ("alice", "a")
    scheduler.charge("alice", MOST_DEFICIT)
    assert scheduler.next() is None
    for user, item in (("alice", "b"), ("bob", "x")):
        scheduler.ready(user, item)
    assert served(scheduler) == "bx"


def test_idle_scheduler_keeps_nothing_of_its_users() -> None:
    scheduler = FairScheduler()
    for user in range(10_000):
        scheduler.ready(user, "a")
    while (chosen := scheduler.next()) is not None:
        scheduler.charge(chosen[0], QUANTUM)
    assert scheduler.next() is None
    assert not scheduler._balances


# --- shares under load ---

COSTS = st.lists(st.integers(0, MOST_DEFICIT), min_size=1, max_size=6)


@given(st.lists(COSTS, min_size=2, max_size=5))
def test_users_with_a_backlog_get_the_same_time(costs_of_users: list[list[int]]) -> None:
    """Whatever their items cost: at no time do two differ by more than a quantum and an item."""
    scheduler = FairScheduler()
    costs = {user: cycle(each) for user, each in enumerate(costs_of_users)}
    longest = max(map(max, costs_of_users))
    used = Counter[Hashable]()
    for user in costs:
        for number in range(2):
            scheduler.ready(user, number)
    for _ in range(300):
        chosen = scheduler.next()
        assert chosen is not None
        user, number = chosen
        scheduler.ready(user, number)
        cost = next(costs[user])
        scheduler.charge(user, cost)
        used[user] += cost
        times = [used[user] for user in costs]
        assert max(times) - min(times) <= QUANTUM + longest


@given(st.lists(COSTS, min_size=1, max_size=5))
def test_newcomer_waits_for_one_item_of_each_other_user(costs_of_users: list[list[int]]) -> None:
    """Whenever it comes, and whatever the items of the others cost, which always have one."""
    scheduler = FairScheduler()
    costs = {user: cycle(each) for user, each in enumerate(costs_of_users)}
    for user in costs:
        for number in range(2):
            scheduler.ready(user, number)
    for turn in range(50):
        newcomer, waited_for = f"newcomer {turn}", list[Hashable]()
        scheduler.ready(newcomer, "request")
        while (chosen := scheduler.next()) != (newcomer, "request"):
            assert chosen is not None
            user, number = chosen
            scheduler.ready(user, number)
            scheduler.charge(user, next(costs[user]))
            waited_for.append(user)
        assert len(waited_for) == len(set(waited_for))


# So that an item is at least a part of a quantum, and a round ends.
SOME_COSTS = st.lists(st.integers(QUANTUM // 50, MOST_DEFICIT), min_size=1, max_size=6)


@given(st.lists(SOME_COSTS, min_size=1, max_size=5), st.integers(0, QUANTUM))
def test_user_that_asks_again_and_again_waits_for_a_quantum_of_each_other(
    costs_of_users: list[list[int]], cost: int
) -> None:
    """Or for one item, if that is longer: what it used itself is paid back with the next round."""
    scheduler = FairScheduler()
    costs = {user: cycle(each) for user, each in enumerate(costs_of_users)}
    longest = max(map(max, costs_of_users))
    for user in costs:
        for number in range(2):
            scheduler.ready(user, number)
    for _ in range(50):
        scheduler.ready("good", "request")
        used = Counter[Hashable]()
        while (chosen := scheduler.next()) != ("good", "request"):
            assert chosen is not None
            user, number = chosen
            scheduler.ready(user, number)
            took = next(costs[user])
            scheduler.charge(user, took)
            used[user] += took
        assert max(used.values(), default=0) <= QUANTUM + longest
        scheduler.charge("good", cost)


# --- against the plain reading of the rules ---


class Naive:
    """The rules of scheduler.py, with lists, and one quantum after the other."""

    def __init__(self) -> None:
        self.turns: list[int] = []
        self.items: dict[int, list[int]] = {}
        self.balances: dict[int, int] = {}

    def ready(self, user: int, item: int) -> None:
        if user not in self.turns:
            self.turns.append(user)
            self.items[user] = []
        if item not in self.items[user]:
            self.items[user].append(item)

    def discard(self, user: int, item: int) -> None:
        if item in self.items.get(user, []):
            self.items[user].remove(item)
            self._end_if_empty(user)

    def next(self) -> tuple[int, int] | None:
        if not self.turns:
            return None
        while True:
            for user in self.turns:
                if self.balances.get(user, 0) >= 0:
                    item = self.items[user].pop(0)
                    self.turns.remove(user)
                    self.turns.append(user)
                    self._end_if_empty(user)
                    return user, item
            for user in self.turns:
                self.balances[user] += QUANTUM

    def charge(self, user: int, nanoseconds: int) -> None:
        if user in self.turns:
            self.balances[user] = max(self.balances.get(user, 0) - nanoseconds, -10 * QUANTUM)
        else:
            for other, balance in self.balances.items():
                self.balances[other] = max(balance, min(0, balance + nanoseconds))

    def _end_if_empty(self, user: int) -> None:
        if not self.items[user]:
            del self.items[user]
            self.turns.remove(user)
            self.balances.pop(user, None)


USERS, ITEMS = st.integers(0, 3), st.integers(0, 5)


class Machine(RuleBasedStateMachine):
    """Both do the same."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler, self.naive = FairScheduler(), Naive()

    @rule(user=USERS, item=ITEMS)
    def ready(self, user: int, item: int) -> None:
        self.scheduler.ready(user, item)
        self.naive.ready(user, item)

    @rule(user=USERS, item=ITEMS)
    def discard(self, user: int, item: int) -> None:
        self.scheduler.discard(user, item)
        self.naive.discard(user, item)

    @rule(cost=st.sampled_from([0, 1, QUANTUM // 2, QUANTUM, 3 * QUANTUM, 20 * QUANTUM]))
    def serve(self, cost: int) -> None:
        chosen = self.scheduler.next()
        assert chosen == self.naive.next()
        if chosen is not None:
            self.scheduler.charge(chosen[0], cost)
            self.naive.charge(chosen[0], cost)

    @rule(user=USERS, cost=st.integers(0, 12 * QUANTUM))
    def charge(self, user: int, cost: int) -> None:
        """By a worker, at any time."""
        self.scheduler.charge(user, cost)
        self.naive.charge(user, cost)

    @invariant()
    def the_same_is_queued(self) -> None:
        for user in range(4):
            for item in range(6):
                queued = item in self.naive.items.get(user, [])
                assert self.scheduler.is_ready(user, item) == queued

    @invariant()
    def balances_are_bounded(self) -> None:
        for balance in self.scheduler._balances.values():
            assert -10 * QUANTUM <= balance <= QUANTUM
        kept = {user: balance for user, balance in self.scheduler._balances.items() if balance}
        assert kept == {user: balance for user, balance in self.naive.balances.items() if balance}


test_scheduler_agrees_with_the_naive_model = Machine.TestCase


# --- submit and run_next ---


class Clock:
    """Thread time that an item uses as it says."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class Running:
    """A scheduler whose items note that they were run, and take time."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.scheduler = FairScheduler(self.clock)
        self.order: list[str] = []

    def item(self, name: str, took: int = 1000) -> Callable[[], None]:
        def run() -> None:
            self.order.append(name)
            self.clock.now += took

        return run

    def run_all(self) -> list[str]:
        while self.scheduler.queues:
            self.scheduler.run_next()
        return self.order


def test_submit_while_nobody_waits_runs_the_first_item_of_each_user() -> None:
    running = Running()
    for user, name in (("alice", "a1"), ("bob", "b1")):
        running.scheduler.submit(user, running.item(name), 1)
    assert running.order == ["a1", "b1"]


def test_submit_queues_the_second_item_of_a_user_in_a_turn() -> None:
    running = Running()
    for name in ("a1", "a2"):
        running.scheduler.submit("alice", running.item(name), 1)
    assert running.order == ["a1"]
    assert running.run_all() == ["a1", "a2"]


def test_submit_while_somebody_waits_queues_everybody() -> None:
    running = Running()
    for user, name in (("alice", "a1"), ("alice", "a2"), ("bob", "b1")):
        running.scheduler.submit(user, running.item(name), 1)
    assert running.order == ["a1"]
    assert running.run_all() == ["a1", "a2", "b1"]


def test_submit_in_the_next_turn_runs_at_once_again() -> None:
    running = Running()
    for turn in (1, 2, 3):
        running.scheduler.submit("alice", running.item(f"a{turn}"), turn)
    assert running.order == ["a1", "a2", "a3"]


def test_item_that_is_run_at_once_is_not_charged() -> None:
    running = Running()
    running.scheduler.submit("alice", running.item("long", 10 * QUANTUM), 1)
    running.scheduler.submit("alice", running.item("a"), 1)
    running.scheduler.submit("bob", running.item("b"), 1)
    assert running.run_all() == ["long", "a", "b"]


def test_run_next_charges_what_the_item_took() -> None:
    running = Running()
    for user, name, took in (
        ("alice", "a1", 3 * QUANTUM),
        ("alice", "a2", 1000),
        ("bob", "b1", 1000),
        ("bob", "b2", 1000),
    ):
        running.scheduler.ready(user, running.item(name, took))
    assert running.run_all() == ["a1", "b1", "b2", "a2"]


def test_run_next_charges_for_an_item_that_fails() -> None:
    running = Running()

    def fail() -> None:
        running.clock.now += 3 * QUANTUM
        raise LookupError

    running.scheduler.ready("alice", fail)
    running.scheduler.ready("alice", running.item("a"))
    for name in ("b1", "b2"):
        running.scheduler.ready("bob", running.item(name))
    with pytest.raises(LookupError):
        running.scheduler.run_next()
    assert running.run_all() == ["b1", "b2", "a"]


def test_run_next_without_an_item_does_nothing() -> None:
    running = Running()
    running.scheduler.run_next()
    assert running.order == []


def test_charge_while_nothing_is_ready_is_forgiven() -> None:
    running = Running()
    running.scheduler.charge("alice", 10 * QUANTUM)
    running.scheduler.ready("alice", running.item("a"))
    running.scheduler.ready("bob", running.item("b"))
    assert running.run_all() == ["a", "b"]
