"""The event loop and its port: sources, timers, and what other threads post."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from fdbroker.ipc.server.event_loop import SPARE_TIMERS, EventLoop
from fdbroker.ipc.transport.unix_port import Port, Watched, now_ns


class Backlog(deque[Callable[[], object]]):
    """Items that a loop runs, one in each turn."""

    def run_next(self) -> None:
        self.popleft()()


class Work(deque[str]):
    """What a handler leaves to be settled, and what was settled."""

    def __init__(self) -> None:
        self.settled: list[str] = []

    def settle(self) -> None:
        while self:
            self.settled.append(self.popleft())


@pytest.fixture
def backlog() -> Backlog:
    return Backlog()


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def loop(backlog: Backlog, work: Work) -> Iterator[EventLoop]:
    port = Port()
    yield EventLoop(
        port,
        now_ns,
        settle=work.settle,
        work=(work, ()),
        run_next=backlog.run_next,
        backlog=backlog,
    )
    port.close()


@pytest.fixture
def eventfds() -> Iterator[Callable[[int], list[int]]]:
    """Makes numbers that are readable."""
    numbers: list[int] = []

    def make(count: int) -> list[int]:
        made = [os.eventfd(1) for _ in range(count)]
        numbers.extend(made)
        return made

    yield make
    for number in numbers:
        os.close(number)


def taken(loop: EventLoop, numbers: list[int], rounds: int) -> list[int]:
    """How many events each wait brings, while nobody takes what is there."""
    for number in numbers:
        loop.port.listen(Watched(number))
    return [len(loop.port.wait(0)) for _ in range(rounds)]


def test_port_with_few_sources_reports_all(loop: EventLoop, eventfds: Any) -> None:
    assert taken(loop, eventfds(20), 2) == [20, 20]


def test_port_with_many_sources_reports_more_each_time(loop: EventLoop, eventfds: Any) -> None:
    """A quiet source is not behind all others, a few at a time."""
    assert taken(loop, eventfds(300), 6) == [32, 64, 128, 256, 300, 300]


def test_port_reports_a_quiet_source_within_one_round(loop: EventLoop, eventfds: Any) -> None:
    numbers = eventfds(33)
    for number in numbers:
        loop.port.listen(Watched(number))
    first, second = loop.port.wait(0), loop.port.wait(0)
    seen = [source.number for source, _ in (*first, *second)]
    assert set(seen) == set(numbers)
    assert seen.index((set(seen) - {source.number for source, _ in first}).pop()) == 32


def test_source_that_an_event_drops_gets_no_event(loop: EventLoop, eventfds: Any) -> None:
    sources = [Watched(number) for number in eventfds(2)]
    handled = []

    def drop_all(mine: Watched, events: int) -> None:
        handled.append(mine)
        for source in sources:
            loop.unwatch(source)
        loop.stop()

    for source in sources:
        loop.watch(source, drop_all, source)
    loop.run()
    assert len(handled) == 1


def test_exception_of_a_handler_is_logged_and_ends_nothing(
    loop: EventLoop, eventfds: Any, caplog: pytest.LogCaptureFixture, work: Work
) -> None:
    (number,) = eventfds(1)
    source = Watched(number)

    def fail(subject: None, events: int) -> None:
        loop.unwatch(source)
        loop.post(loop.stop)
        work.append("left by the handler that failed")
        raise LookupError

    loop.watch(source, fail)
    loop.run()
    assert work.settled == ["left by the handler that failed"]
    assert [record.getMessage() for record in caplog.records] == ["event=error"]


def test_timers_are_called_in_order_and_each_is_settled(loop: EventLoop, work: Work) -> None:
    order: list[object] = work.settled  # type: ignore[assignment]

    def act(after: int) -> None:
        order.append(after)
        work.append(f"what {after} left")

    for after in (3, 1, 2):
        loop.call_at(loop.now + after, partial(act, after))
    loop.call_at(loop.now + 4, loop.stop)
    loop.run()
    assert order == [1, "what 1 left", 2, "what 2 left", 3, "what 3 left"]


def test_nothing_is_settled_where_nothing_was_left(loop: EventLoop, eventfds: Any) -> None:
    (number,) = eventfds(1)
    loop._settle = lambda: pytest.fail("there is nothing")
    loop.watch(Watched(number), lambda *_: loop.stop())
    loop.run()


def test_cancelled_timer_is_never_called(loop: EventLoop) -> None:
    called: list[str] = []
    timer = loop.call_at(loop.now, lambda: called.append("cancelled"))
    assert timer.pending
    timer.cancel()
    timer.cancel()
    assert not timer.pending
    loop.call_at(loop.now, loop.stop)
    loop.run()
    assert not called


def test_timer_that_a_timer_sets_for_now_is_called_in_the_next_turn(loop: EventLoop) -> None:
    called: list[str] = []

    def set_another() -> None:
        loop.call_at(loop.now, lambda: called.append("another"))
        loop.post(lambda: called.append("posted"))
        loop.call_at(loop.now + 1, loop.stop)

    loop.call_at(loop.now, set_another)
    loop.run()
    assert called == ["posted", "another"]


def test_cancelled_timers_do_not_pile_up(loop: EventLoop) -> None:
    for _ in range(100 * SPARE_TIMERS):
        loop.call_at(loop.now + 10**12, print).cancel()
    assert len(loop._timers) <= 2 * SPARE_TIMERS + 1


def test_backlog_is_run_an_item_a_turn_with_the_events_between(
    loop: EventLoop, backlog: Backlog, eventfds: Any
) -> None:
    (number,) = eventfds(1)
    order: list[str] = []

    def again() -> None:
        order.append("item")
        backlog.append(again)

    def handle(subject: None, events: int) -> None:
        order.append("event")
        if len(order) > 4:
            loop.stop()

    loop.watch(Watched(number), handle)
    backlog.append(again)
    backlog.append(again)
    loop.run()
    assert order[:4] == ["event", "item", "event", "item"]


def test_backlog_item_that_fails_is_logged_and_the_others_are_run(
    loop: EventLoop, backlog: Backlog, caplog: pytest.LogCaptureFixture
) -> None:
    backlog.append(lambda: 1 / 0)
    backlog.append(loop.stop)
    loop.run()
    assert [record.getMessage() for record in caplog.records] == ["event=error"]


def test_post_from_another_thread_wakes_the_loop(loop: EventLoop) -> None:
    called: list[int] = []

    def post() -> None:
        for number in range(1000):
            loop.post(lambda number=number: called.append(number))  # type: ignore[misc]
        loop.post(loop.stop)

    thread = threading.Thread(target=post)
    thread.start()
    loop.run()
    thread.join()
    assert called == list(range(1000))
