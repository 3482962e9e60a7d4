"""The fair queue on a real loop: one item in each turn, its time charged to its user."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from threading import Thread
from time import thread_time_ns
from typing import Any

import pytest

from fdbroker.ipc.server.event_loop import EventLoop
from fdbroker.ipc.server.fair_queue import FairQueue
from fdbroker.ipc.server.scheduler import QUANTUM, FairScheduler
from fdbroker.ipc.transport.unix_port import Port, Watched, now_ns


class Recorder(FairScheduler):
    """A scheduler that records what is charged."""

    def __init__(self) -> None:
        super().__init__()
        self.charged: list[tuple[Hashable, int]] = []

    def charge(self, user: Hashable, nanoseconds: int) -> None:
        self.charged.append((user, nanoseconds))
        super().charge(user, nanoseconds)


class Queued:
    """A queue on a loop of its own, and the order of all that happens there."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.port = Port()
        self.loop = EventLoop(self.port, now_ns, lambda: self.order.append("settle"))
        self.scheduler = Recorder()
        self.queue = FairQueue(self.loop, self.scheduler)

    def note(self, what: str) -> Callable[[], None]:
        """An item of the queue."""
        return lambda: self.order.append(what)

    def run(self) -> list[str]:
        """Run until nothing waits: all but the settling."""
        self.loop.call_soon(self._stop_when_idle)
        self.loop.run()
        return [what for what in self.order if what != "settle"]

    def _stop_when_idle(self) -> None:
        if self.queue._running:
            self.loop.call_soon(self._stop_when_idle)
        else:
            self.loop.stop()


@pytest.fixture
def queued() -> Iterator[Queued]:
    made = Queued()
    yield made
    made.port.close()


def test_queue_runs_items_in_the_order_of_the_scheduler(queued: Queued) -> None:
    for user, what in (("alice", "a"), ("alice", "b"), ("bob", "x")):
        queued.queue.submit(user, queued.note(what))
    assert queued.queue.busy
    assert queued.run() == ["a", "x", "b"]
    assert not queued.queue.busy


def test_queue_runs_one_item_between_two_looks_at_the_events(queued: Queued) -> None:
    number = os.eventfd(1)
    try:
        source = Watched(number)
        queued.loop.watch(source, lambda subject, events: queued.order.append("event"))
        for what in "abc":
            queued.queue.submit("alice", queued.note(what))
        assert queued.run()[:6] == ["event", "a", "event", "b", "event", "c"]
    finally:
        os.close(number)


def test_queue_settles_after_each_item(queued: Queued) -> None:
    for what in "ab":
        queued.queue.submit("alice", queued.note(what))
    queued.run()
    assert queued.order[queued.order.index("a") + 1] == "settle"
    assert queued.order[queued.order.index("b") + 1] == "settle"


def test_item_that_an_item_submits_is_run_behind_those_that_wait(queued: Queued) -> None:
    queued.queue.submit("alice", lambda: queued.queue.submit("alice", queued.note("later")))
    queued.queue.submit("alice", queued.note("waits"))
    assert queued.run() == ["waits", "later"]


def test_queue_that_was_idle_runs_the_next_item(queued: Queued) -> None:
    queued.queue.submit("alice", queued.note("first"))
    queued.run()
    queued.loop._stopped = False
    queued.queue.submit("alice", queued.note("second"))
    assert queued.run() == ["first", "second"]


def test_discarded_item_of_the_queue_is_not_run(queued: Queued) -> None:
    item = queued.note("never")
    queued.queue.submit("alice", item)
    assert queued.queue.is_queued("alice", item)
    queued.queue.discard("alice", item)
    assert not queued.queue.is_queued("alice", item)
    assert queued.run() == []


def work(nanoseconds: int) -> None:
    """Use a CPU for so long."""
    end = thread_time_ns() + nanoseconds
    while thread_time_ns() < end:
        pass


def test_time_of_an_item_is_charged_to_its_user(queued: Queued) -> None:
    queued.queue.submit("alice", lambda: work(2 * QUANTUM))
    queued.run()
    [(user, took)] = queued.scheduler.charged
    assert user == "alice"
    assert took >= 2 * QUANTUM


def test_time_in_which_an_item_waits_is_not_charged(queued: Queued) -> None:
    """What is charged is CPU time, so a thread that is not run costs its user nothing."""
    reader, writer = os.pipe()

    def write_later() -> None:
        end = now_ns() + 20 * QUANTUM
        while now_ns() < end:
            os.sched_yield()
        os.write(writer, b"x")

    thread = Thread(target=write_later)
    queued.queue.submit("alice", lambda: (thread.start(), os.read(reader, 1)))
    queued.run()
    thread.join()
    os.close(reader)
    os.close(writer)
    assert queued.scheduler.charged[0][1] < 20 * QUANTUM


def test_item_that_raises_is_charged_and_ends_nothing(
    queued: Queued, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        work(QUANTUM)
        raise LookupError

    queued.queue.submit("alice", fail)
    queued.queue.submit("alice", queued.note("next"))
    assert queued.run() == ["next"]
    (user, took), _ = queued.scheduler.charged
    assert (user, took >= QUANTUM) == ("alice", True)
    assert [record.getMessage() for record in caplog.records] == ["event=error"]


def test_time_of_a_worker_is_charged_like_that_of_an_item(queued: Queued) -> None:
    queued.queue.charge("alice", QUANTUM)
    queued.queue.submit("alice", queued.note("alice"))
    queued.queue.submit("bob", queued.note("bob"))
    assert queued.run() == ["bob", "alice"]


def test_queue_leaves_no_balance_behind(queued: Queued) -> None:
    """When nothing waits, nobody is owed anything."""

    def submit(user: Any) -> None:
        queued.queue.submit(user, lambda: work(1000))

    for user in range(1000):
        submit(user)
    queued.run()
    assert not queued.scheduler._balances
