"""The event loop and its port: sources, timers, and what other threads post."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fdbroker.ipc.server.event_loop import SPARE_TIMERS, EventLoop
from fdbroker.ipc.transport.unix_port import Port, Watched, now_ns


class Settled:
    """Counts how often a loop has settled."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


@pytest.fixture
def settled() -> Settled:
    return Settled()


@pytest.fixture
def loop(settled: Settled) -> Iterator[EventLoop]:
    port = Port()
    yield EventLoop(port, now_ns, settled)
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
    loop: EventLoop, eventfds: Any, caplog: pytest.LogCaptureFixture, settled: Settled
) -> None:
    (number,) = eventfds(1)
    source = Watched(number)

    def fail(subject: None, events: int) -> None:
        loop.unwatch(source)
        loop.call_soon(loop.stop)
        raise LookupError

    loop.watch(source, fail)
    loop.run()
    assert [record.getMessage() for record in caplog.records] == ["event=error"]


def test_timers_are_called_in_order_and_each_is_settled(loop: EventLoop, settled: Settled) -> None:
    called: list[int] = []
    for after in (3, 1, 2):
        loop.call_at(loop.now + after, lambda after=after: called.append(after))  # type: ignore
    loop.call_at(loop.now + 4, loop.stop)
    loop.run()
    assert called == [1, 2, 3]
    assert settled.times == 4


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
        loop.call_soon(lambda: called.append("soon"))
        loop.call_at(loop.now + 1, loop.stop)

    loop.call_at(loop.now, set_another)
    loop.run()
    assert called == ["soon", "another"]


def test_cancelled_timers_do_not_pile_up(loop: EventLoop) -> None:
    for _ in range(100 * SPARE_TIMERS):
        loop.call_at(loop.now + 10**12, print).cancel()
    assert len(loop._timers) <= 2 * SPARE_TIMERS + 1


def test_call_soon_that_calls_soon_lets_events_come_between(loop: EventLoop, eventfds: Any) -> None:
    (number,) = eventfds(1)
    order: list[str] = []

    def again() -> None:
        order.append("soon")
        loop.call_soon(again)

    def handle(subject: None, events: int) -> None:
        order.append("event")
        if len(order) > 4:
            loop.stop()

    loop.watch(Watched(number), handle)
    loop.call_soon(again)
    loop.run()
    assert order[:4] == ["event", "soon", "event", "soon"]


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
