"""The loop: one thread, one epoll, and a table of what to do when a descriptor is readable.

It knows the time, and when to end: a drain has begun, and nothing is on loan or being closed, or
its deadline has come.  What an event decided for others is worked off before the next one.
"""

from __future__ import annotations

import logging
import select
from abc import ABC, abstractmethod
from collections.abc import Callable
from time import CLOCK_BOOTTIME, clock_gettime_ns
from typing import TYPE_CHECKING, Any

from fdbroker.ipc.server.worker_pool import Workers
from fdbroker.lender.model import SECOND

if TYPE_CHECKING:
    from fdbroker.lender import Lender

READABLE = int(select.EPOLLIN)
LIFETIME = 10**10  # seconds
LONGEST_SLEEP = 86_400.0  # seconds; epoll_wait(2) counts milliseconds in an int
EVENTS = 32  # taken from epoll at a time: so many that their list is a small allocation.  And if
MOST_EVENTS = 1024  # there are more, twice as many: who asks seldom is not to be behind them all

Action = Callable[[Any, int], None]  # what it is about, the events of epoll

log = logging.getLogger("fdbroker")


class Loop(ABC):
    """Acts on events until drained.  `now` is when those at hand were taken, as in the ledger."""

    def __init__(self, lender: Lender) -> None:
        self.lender = lender
        self.workers = Workers()
        self.now = clock_gettime_ns(CLOCK_BOOTTIME)
        self.draining = False
        self._deadline: int | None = None  # of the drain
        self.alarm = 0  # when `ring` is to be called; 0: never
        self._watched: dict[int, tuple[Action, Any]] = {}
        self._epoll = select.epoll()

    def watch(self, number: int, action: Action, about: Any = None) -> None:
        """Call ``action(about, events)`` whenever `number`, the caller's, is readable."""
        self._epoll.register(number, READABLE)
        self._watched[number] = action, about

    def unwatch(self, number: int) -> None:
        """The opposite."""
        if self._watched.pop(number, None) is not None:
            self._epoll.unregister(number)

    def rewatch(self, number: int, events: int, action: Action, about: Any) -> None:
        """Wait for other events of `number`, and call another action; if it is watched at all."""
        if number in self._watched:
            self._watched[number] = action, about
            self._epoll.modify(number, events)

    def run(self) -> None:
        """Serve until drained."""
        lender, watched, poll, most = self.lender, self._watched, self._epoll.poll, EVENTS
        while not self.draining or not self._finished():
            timed = lender.deadlines or self.draining or self.alarm
            patience = self._patience() if timed else None
            happened = poll(patience, most)
            self.now = clock_gettime_ns(CLOCK_BOOTTIME)
            if len(happened) > 1:
                if len(happened) == most:
                    most = min(2 * most, MOST_EVENTS)
                elif len(happened) < most // 4:
                    most = EVENTS
                happened = self.in_turn(happened)
            for number, events in happened:
                try:
                    action, about = watched[number]
                except KeyError:  # it ended with an event before this one
                    continue
                try:
                    action(about, events)
                except Exception:  # a mistake of ours must not end every loan of everybody
                    log.exception("event=error number=%d", number)
                if lender.notifications or lender.pending_closes:
                    self.settle()
            if patience is not None:
                self._keep_time()

    def _keep_time(self) -> None:
        """Do what was to be done by now."""
        if self.lender.deadlines:
            self.lender.expire(self.now)
            self.settle()
        if self.alarm and self.now >= self.alarm:
            self.alarm = 0
            try:
                self.ring()
            except Exception:
                log.exception("event=error alarm")
            self.settle()

    def drain(self, seconds: float | None) -> None:
        """Lend nothing new, retire every entry; `run` ends when the last loan is back and closed,
        or after that many seconds.  None, and more than a lifetime: however long it takes.  The
        earliest deadline holds."""
        if seconds is not None and seconds < LIFETIME:
            deadline = self.now + int(seconds * SECOND)
            self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
        if self.draining:
            return
        self.draining = True
        log.info("event=drain loans=%d entries=%d", self.lender.loans, len(self.lender.entries))
        for entry in [*self.lender.names.values(), *self.lender.tickets.values()]:
            self.lender.start_retiring(entry, self.now)
        self.settle()

    def _finished(self) -> bool:
        """Whether a drain is over."""
        done = not self.lender.entries and not self.workers.awaited
        return done or (self._deadline is not None and self.now >= self._deadline)

    def _patience(self) -> float | None:
        """Seconds until the loop has something to do by itself."""
        times = [self._deadline, self.alarm or None, self.lender.next_deadline()]
        first = min((time for time in times if time is not None), default=None)
        if first is None:
            return None
        left = first - clock_gettime_ns(CLOCK_BOOTTIME)
        return min(left / SECOND + 0.001, LONGEST_SLEEP) if left > 0 else 0.0

    @abstractmethod
    def in_turn(self, happened: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """What of this to act upon now, and in which order; the rest will happen again."""

    @abstractmethod
    def ring(self) -> None:
        """The alarm has come."""

    @abstractmethod
    def settle(self) -> None:
        """Tell others what was decided for them, and have closed what is to be closed."""
