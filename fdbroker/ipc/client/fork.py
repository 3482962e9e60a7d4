"""What a fork does to sessions and loans: the fork rule, and the lock that it needs.

A forked child has copies of everything its parent had open, and two processes must not use one
session.  So, when `os.fork` is called (os.register_at_fork):

* A loan of the forking thread is **shared**: parent and child both keep its descriptors and their
  copy of the session, which carries no more messages.  Each lets go by closing its copies, and
  the broker sees the end of the session when the last copy is closed: perhaps late, never early.
* The child closes everything else at once: sessions without a loan, exclusive loans, loans of
  other threads.  A loan that cannot be closed, because a mapping of it is still in use, is shared
  too.

In a process with several threads, another thread may be between the kernel's installing a
descriptor and the noting of its owner, or between the noting of a close and the close.  Such a
moment is passed under the `FORK_LOCK`, for which the fork waits.

A finalizer must not wait for a lock.  A call that it cannot make at once it leaves in `deferred`,
and the next thread that leaves the lock makes it (`deferred_cleanup`).

The modules `_thread` and `_lazy` stand in for `threading` and `contextlib`, which would add to the
start of ``fdbroker exec``.
"""

from __future__ import annotations

import os
from _thread import RLock, get_ident
from _thread import _count as count_threads  # threading.active_count() takes a lock
from collections import deque
from collections.abc import Callable
from weakref import WeakSet

from fdbroker._lazy import suppress

TYPE_CHECKING = False  # importing `typing` would add to the start of `fdbroker exec`
if TYPE_CHECKING:
    from typing import Protocol

    class ForkAware(Protocol):
        """What a session does at a fork.  The lock is held, and each call may come twice."""

        def mark_at_fork(self, thread: int, in_child: bool) -> None:
            """Note what is shared: `thread` has forked, and is the only one in the child."""

        def close_in_child(self) -> None:
            """Close what stays with the parent."""


__all__ = [
    "FORK_LOCK",
    "deferred",
    "deferred_cleanup",
    "other_threads",
    "run_deferred",
    "run_or_defer",
    "sessions",
]

FORK_LOCK = RLock()
"""Held where a fork must not come.  Reentrant: a signal handler may fork, a finalizer may close."""

sessions: WeakSet[ForkAware] = WeakSet()
"""All sessions of this process."""

other_threads: Callable[[], int] = count_threads
"""Returns how many threads there are beside this one, or more; see `_forget_threads`."""


class DeferredCall(tuple[Callable[[], None]]):
    """A call that a finalizer left, made when this object is dropped, as if by a finalizer.

    So an exception of it goes to sys.unraisablehook.  It is a tuple because that is made in one
    call into C, where no interrupt can lose it.
    """

    __slots__ = ()

    def __del__(self) -> None:
        for call in self:
            call()


deferred: deque[DeferredCall] = deque()


class _DeferredCleanup:
    """``with deferred_cleanup, FORK_LOCK:`` no fork happens meanwhile; nothing in it may wait.

    The lock is its own context manager, in C: no interrupt comes between its being taken or
    released and the noting of that, and no traceback of an interrupt keeps it.  The calls that
    finalizers left are made when the lock is free again.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if deferred:
            run_deferred()


deferred_cleanup = _DeferredCleanup()


def run_deferred() -> None:
    """Make the calls that finalizers left.  No exception of theirs is raised here."""
    while deferred:
        for acquired in map(FORK_LOCK.acquire, (False,)):  # no interrupt can come before the `try`
            if not acquired:
                return  # the thread that has the lock will make them
            try:
                while deferred:
                    deferred.popleft()
            finally:
                FORK_LOCK.release()


def run_or_defer(call: Callable[[], None]) -> None:
    """Make `call` under the lock without ever waiting for it: now, or when it is released."""
    deferred.append(DeferredCall((call,)))
    run_deferred()


# --- the hooks -------------------------------------------------------------------------------


def _mark(in_child: bool) -> None:
    thread = get_ident()  # of the forking thread: pthread_self() survives the fork
    for session in list(sessions):
        session.mark_at_fork(thread, in_child)


def _mark_in_parent() -> None:
    _mark(False)


def _mark_in_child() -> None:
    _mark(True)


def _forget_threads() -> None:
    """Have `other_threads` pass over the threads that stayed with the parent.

    Python goes on counting them.  Only the kernel knows how many threads there really are: the
    hooks of other libraries may have started some.  Without /proc all of them count, which is
    slower, and right.
    """
    global other_threads
    if not count_threads():
        return
    with suppress(OSError):
        stayed = max(0, count_threads() + 1 - len(os.listdir("/proc/self/task")))

        def count_others() -> int:
            return count_threads() - stayed

        other_threads = count_others


def _close_in_child() -> None:
    failure = None
    for session in list(sessions):
        try:
            session.close_in_child()
        except BaseException as error:  # the other sessions must not suffer from it
            failure = error
    if failure is not None:
        raise failure


# Python calls the last `before` hook first, and the first of the others first.  The lock itself is
# a C method in all three places, where no signal handler can come between.  An exception ends a
# hook, and a signal handler may raise one anywhere, but Python goes on to the next hook.  So all
# sessions are marked before any is closed, since the mark is what keeps two processes off one
# session; and either hook is registered twice, so that the second call finishes what an interrupt
# cut short in the first.
os.register_at_fork(
    before=FORK_LOCK.acquire, after_in_parent=_mark_in_parent, after_in_child=_mark_in_child
)
os.register_at_fork(after_in_parent=_mark_in_parent, after_in_child=_mark_in_child)
os.register_at_fork(after_in_child=_close_in_child)
os.register_at_fork(after_in_child=_close_in_child)
os.register_at_fork(after_in_child=_forget_threads)
os.register_at_fork(after_in_parent=FORK_LOCK.release, after_in_child=FORK_LOCK.release)
