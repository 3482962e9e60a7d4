"""The broker's source of events on Linux: one epoll.

A **source** is an object with a `number`, the descriptor that epoll watches, and a `handler`, which
the event loop calls with the `subject` and the events.  A channel is a source, so is the listener,
and so is a `Watched` number of the broker's own: a pidfd, or the pipe of its signals.  Sources are
objects and not numbers because the kernel gives the number of a closed descriptor to the next one
at once.

The events of a source are HAS (a message, a client or a wake-up is there), GONE (the other end has
ended) and EMPTIED (the client has read what it was sent).  They are level-triggered: what is not
taken is reported again.  epoll puts what it has reported behind all that it has not, so a busy
source never hides a quiet one.

The broker never registers a descriptor that it lends: a registration outlives `close` as long as a
duplicate of the descriptor lives (epoll(7)).
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Sequence
from functools import partial
from time import CLOCK_BOOTTIME, clock_gettime_ns
from typing import Any, Protocol

# What is called for an event: with the subject of the source, and the events.
Handler = Callable[[Any, int], object]


class Source(Protocol):
    """What a port can watch: a channel, a listener, or a number of the broker's own."""

    handler: Handler
    subject: Any

    @property
    def number(self) -> int:
        """The descriptor that is watched."""


HAS = int(select.EPOLLIN)
GONE = int(select.EPOLLHUP | select.EPOLLERR)
EMPTIED = int(select.EPOLLOUT)

# The interests of a source.  EPOLLHUP and EPOLLERR are always reported; edge-triggered they are
# reported once, so that a muted source cannot keep the loop awake.
_LISTEN = HAS
_LISTEN_ONCE = int(select.EPOLLIN | select.EPOLLET)
_MUTE = int(select.EPOLLET)
_AWAIT_READ = int(select.EPOLLOUT | select.EPOLLET)

# The list of events is a small allocation of Python's for up to this many.  The port takes twice as
# many as long as there are more, so that a quiet source need not wait for many rounds.
LEAST_EVENTS = 32
MOST_EVENTS = 1024

now_ns = partial(clock_gettime_ns, CLOCK_BOOTTIME)
"""The time in nanoseconds, as the ledger has it: it goes on while the machine is suspended."""


def ignore(subject: Any, events: int) -> None:
    """Do nothing with an event of a source that was dropped."""


class Watched:
    """A number of the broker's own as a source.  The number stays the caller's."""

    __slots__ = ("handler", "number", "subject")

    def __init__(self, number: int) -> None:
        self.number = number
        self.handler: Handler = ignore
        self.subject: Any = None


class Port:
    """An epoll, and an eventfd by which other threads wake whoever waits at it."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._sources: dict[int, Source] = {}
        self._most = LEAST_EVENTS
        self.waker = Watched(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        # Edge-triggered, so that each write is an event and nobody has to read it.
        self.listen_once(self.waker)

    def wait(self, seconds: float | None) -> Sequence[tuple[Source, int]]:
        """Wait until something happens, at most that long: the sources, each with its events."""
        happened, sources = self._epoll.poll(seconds, self._most), self._sources
        if len(happened) == 1:
            number, events = happened[0]
            return ((sources[number], events),)
        if not happened and seconds:
            # Python asks no more when the time was over while this process was stopped (EINTR).
            happened = self._epoll.poll(0, self._most)
        count = len(happened)
        if count == self._most:
            self._most = min(2 * count, MOST_EVENTS)
        elif count < self._most // 4:
            self._most = LEAST_EVENTS
        return [(sources[number], events) for number, events in happened]

    def listen(self, source: Source) -> None:
        """Report all that happens to `source`.  OSError: max_user_watches (epoll(7)) is reached."""
        self._set(source, _LISTEN)

    def listen_once(self, source: Source) -> None:
        """Report what is there of `source` once, and then what comes; GONE at any time.

        Called again, it reports anew what is still there.
        """
        self._set(source, _LISTEN_ONCE)

    def mute(self, source: Source) -> None:
        """Report of `source` only that it is gone, once."""
        self._set(source, _MUTE)

    def await_read(self, source: Source) -> None:
        """Report EMPTIED each time the client has read a message, and GONE; nothing else."""
        self._set(source, _AWAIT_READ)

    def _set(self, source: Source, events: int) -> None:
        number = source.number
        if number in self._sources:
            self._epoll.modify(number, events)
        else:
            self._epoll.register(number, events)
            self._sources[number] = source

    def drop(self, source: Source) -> None:
        """Report nothing of `source` any more, not even what was reported and not handled yet."""
        if self._sources.get(source.number) is source:
            self._epoll.unregister(source.number)
            del self._sources[source.number]
        source.handler = ignore

    def wake(self) -> None:
        """Have `wait` return with the `waker`.  For any thread."""
        os.eventfd_write(self.waker.number, 1)

    def watch_end(self, pidfd: int) -> Watched:
        """A source that has something once the process of `pidfd` has ended (pidfd_open(2))."""
        return Watched(pidfd)

    def close(self, *, keep_waker: bool = False) -> None:
        """Close the epoll.  With `keep_waker` a thread that is still at work may wake it."""
        self._epoll.close()
        if not keep_waker:
            os.close(self.waker.number)
