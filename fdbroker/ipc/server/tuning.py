"""Every constant that tunes the server, in one table with the reason for each.

Times are in nanoseconds of the loop's clock.  None of them changes what a client is granted; they
say how long the broker waits for somebody, and how much it does at a time.  A test passes a table
of its own to `Server`.
"""

from __future__ import annotations

from typing import NamedTuple

from fdbroker.ipc.server.event_loop import SECOND


class Tuning(NamedTuple):
    """The table."""

    handshake: int = 10 * SECOND
    """A connection that sends no HELLO within this time is closed, and so is one that does not read
    a grant: its end may be all that keeps its session open."""

    accept_retry: int = SECOND
    """After a failed accept the listener is muted for this time.  The connection stays queued
    (accept(2)), so a level-triggered epoll would spin; and the shortage may be another process's,
    and end unseen."""

    recheck_read: int = SECOND // 4
    """How often the broker asks whether a client that it has hung up on has read what it was sent.
    The kernel tells nobody; until then the descriptors count as in flight."""

    refresh_rest: int = 16
    """All sessions are asked what they have not read at most in one part of so many of the time:
    with a hundred thousand sessions that takes milliseconds."""

    refresh_burst: int = SECOND // 10
    """Asking all sessions is free as long as there was none in this time before."""

    reserved_fds: int = 4
    """Descriptors that clients never get: to accept one more connection, to look at /proc, and for
    a reload."""

    threads: int = 4
    """Threads of each kind that start with the broker, since one more may be refused later
    (pthread_create(3), EAGAIN)."""

    most_threads: int = 64
    """Threads of each kind if so many are stuck in system calls."""

    close_rest: int = 16
    """A worker that closes what a client sent and nobody received rests so many times as long as it
    worked, so that such closes never take more than a small part of a CPU."""

    join_seconds: float = 0.5
    """How long the end of the broker waits for its threads; one that is stuck ends with it."""


TUNING = Tuning()
