"""The event loop: one thread that calls handlers, timers, and what other threads post.

It knows sources, callbacks and times, and nothing of what they are for.  One turn is: wait at the
port; call the handler of each source that has an event, and what other threads have posted; call
the timers that are due; and run one item of the `backlog`, if it has any.  While the backlog has
items the loop does not sleep.

After each of these calls, if there is any `work`, it calls `settle`: what one event decided for
others is worked off before the next event.

An exception in a handler is a mistake of ours.  It is logged and ends nothing, since it must not
cost every loan of every client.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Container
from heapq import heapify, heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fdbroker.ipc.transport import Handler, Port, Source

SECOND = 1_000_000_000
# epoll_wait(2) counts milliseconds in an int.
LONGEST_WAIT = 86_400.0
# Cancelled timers stay in the heap until they are this many more than the others.
SPARE_TIMERS = 64

Callback = Callable[[], object]

log = logging.getLogger("fdbroker")


class Timer:
    """A callback that `EventLoop.call_at` calls once, unless it is cancelled before."""

    __slots__ = ("_callback", "_loop", "when")

    def __init__(self, loop: EventLoop, when: int, callback: Callback) -> None:
        self._loop = loop
        self._callback: Callback | None = callback
        self.when = when

    @property
    def pending(self) -> bool:
        """Whether it will still be called."""
        return self._callback is not None

    def cancel(self) -> None:
        """Have it never called.  A second time, or after the call, it does nothing."""
        if self._callback is not None:
            self._callback = None
            self._loop.note_cancelled()

    def take(self) -> Callback | None:
        """The callback, which is the caller's to call; None if it was cancelled."""
        callback, self._callback = self._callback, None
        return callback


class EventLoop:
    """Calls back until it is stopped.  `now` is when the events at hand were taken.

    work: two containers, of notifications and of pending closes; `settle` is called while one of
    them is not empty.  backlog: a container that
    is not empty while `run_next` has something to do.
    """

    def __init__(
        self,
        port: Port,
        now_ns: Callable[[], int],
        *,
        settle: Callback,
        work: tuple[Container[Any], Container[Any]] = ((), ()),
        run_next: Callback,
        backlog: Container[Any] = (),
    ) -> None:
        self.port = port
        self.now = now_ns()
        self._now_ns = now_ns
        self._settle = settle
        self._work = work
        self._run_next = run_next
        self._backlog = backlog
        self._timers: list[tuple[int, int, Timer]] = []
        self._cancelled = 0
        self._order = count()
        self._posted: deque[Callback] = deque()
        self._stopped = False
        port.waker.handler = self._run_posted

    # --- what to call, and when ---

    def watch(self, source: Source, handler: Handler, subject: Any = None) -> None:
        """Call ``handler(subject, events)`` whenever something happens to `source`, which stays
        open until `unwatch`.  OSError: the port cannot watch one more."""
        self.port.listen(source)
        source.handler, source.subject = handler, subject

    def unwatch(self, source: Source) -> None:
        """Call the handler of `source` no more, not even for events that are at hand."""
        self.port.drop(source)

    def call_at(self, when: int, callback: Callback) -> Timer:
        """Call `callback` once at `when`, in the loop's nanoseconds, or as soon after as may be."""
        timer = Timer(self, when, callback)
        heappush(self._timers, (when, next(self._order), timer))
        return timer

    def post(self, callback: Callback) -> None:
        """Call `callback` once on the loop, and wake it.  For any thread."""
        self._posted.append(callback)
        self.port.wake()

    # --- running ---

    def run(self) -> None:
        """Serve until `stop`."""
        wait, now_ns, (notifications, closes) = self.port.wait, self._now_ns, self._work
        timers, backlog = self._timers, self._backlog
        seconds: float | None = 0.0
        while not self._stopped:
            happened = wait(seconds)
            self.now = now_ns()
            for source, events in happened:
                try:
                    source.handler(source.subject, events)
                except Exception:
                    log.exception("event=error")
                if notifications or closes:
                    self._call(self._settle)
            seconds = self._between_waits() if timers or backlog else None

    def _between_waits(self) -> float | None:
        """Call the timers that are due, run an item of the backlog; returns how long to wait."""
        self._run_timers()
        if self._backlog:
            self._call(self._run_next)
        return self._seconds_to_wait()

    def stop(self) -> None:
        """Have `run` return once the events at hand are handled."""
        self._stopped = True

    def _call(self, callback: Callback) -> None:
        """Call `callback` as an event: log its exception, and settle what it has left."""
        try:
            callback()
            if any(self._work):
                self._settle()
        except Exception:
            log.exception("event=error")

    def _seconds_to_wait(self) -> float | None:
        if self._backlog:
            return 0.0
        timers = self._timers
        while timers and not timers[0][2].pending:
            heappop(timers)
            self._cancelled -= 1
        if not timers:
            return None
        left = timers[0][0] - self._now_ns()
        # A millisecond more, since epoll rounds down.
        return min(left / SECOND + 0.001, LONGEST_WAIT) if left > 0 else 0.0

    def _run_timers(self) -> None:
        """Call the timers that are due.  One that a timer sets for now is called the next time."""
        due = []
        while self._timers and self._timers[0][0] <= self.now:
            due.append(heappop(self._timers)[2])
        for timer in due:
            callback = timer.take()
            if callback is None:
                self._cancelled -= 1
            else:
                self._call(callback)

    def _run_posted(self, subject: None, events: int) -> None:
        # What is posted meanwhile wakes the loop again.
        for _ in range(len(self._posted)):
            self._call(self._posted.popleft())

    def note_cancelled(self) -> None:
        """A timer was cancelled: throw such ones out of the heap when they are most of it."""
        self._cancelled += 1
        if self._cancelled > SPARE_TIMERS and self._cancelled > len(self._timers) // 2:
            self._timers[:] = [entry for entry in self._timers if entry[2].pending]
            heapify(self._timers)
            self._cancelled = 0
