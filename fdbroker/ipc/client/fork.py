"""What a fork does to sessions and loans: the fork rule, and the lock it needs.

A forked child has copies of everything its parent had open, and two processes must not use one
session.  So, when `os.fork` is called (os.register_at_fork):

* A loan of the forking thread is **split**: parent and child both keep its descriptors and their
  copy of the session, which carries no more messages.  Each lets go by closing its copies, and
  the broker sees the end when the last one has: late perhaps, early never.
* The child closes everything else at once: sessions without a loan, exclusive loans, loans of
  other threads.  What cannot be closed, because a mapping of it is still in use, is split too.

In a process with several threads another thread may be just between the kernel's installing a
descriptor and its owner's noting it, or between the noting of a close and the close.  Those
moments are passed under the `GATE`, for which the fork waits.  Finalizers must not wait for a
lock; what they cannot do at once they leave in `later`, and whoever leaves the gate does it.
"""

from __future__ import annotations

import os
from _thread import RLock, get_ident  # as in `threading`, which costs too much at a start
from _thread import _count as count_threads  # threading.active_count() takes a lock, and long
from collections import deque
from collections.abc import Callable
from weakref import WeakSet

from fdbroker._lazy import suppress

TYPE_CHECKING = False  # as a type checker knows it: `typing` costs too much at a start
if TYPE_CHECKING:
    from typing import Protocol

    class Forked(Protocol):
        """What a session must do at a fork; the gate is held, and all may be done twice."""

        def mark_at_fork(self, thread: int, in_child: bool) -> None:
            """`thread` has forked, and in the child it is the only one: note what is split."""

        def close_in_child(self) -> None:
            """Close what stays with the parent."""


__all__ = ["GATE", "catch_up", "catching_up", "in_finalizer", "later", "other_threads", "sessions"]

GATE = RLock()  # reentrant: a signal handler may fork, a finalizer may close
sessions: WeakSet[Forked] = WeakSet()  # all of this process
other_threads: Callable[[], int] = count_threads  # how many, or more; in a child see below


class _Left(tuple[Callable[[], None]]):
    """An action that a finalizer left: done as this goes, as by a finalizer.

    So what it raises goes to sys.unraisablehook, and an interrupt cannot lose it: a tuple is made
    in one call into C.
    """

    __slots__ = ()

    def __del__(self) -> None:
        for action in self:
            action()


later: deque[_Left] = deque()


class _CatchingUp:
    """``with catching_up, GATE:`` no fork happens meanwhile; nothing in it may wait.

    The lock is its own context manager, in C: no interrupt comes between its being taken or given
    back and the noting of that, and no traceback of one keeps it.  What finalizers left is done
    when it is free again.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if later:
            catch_up()


catching_up = _CatchingUp()


def catch_up() -> None:
    """Do what finalizers left.  An exception of it is none of the caller's."""
    while later:
        for acquired in map(GATE.acquire, (False,)):  # no interrupt can come before the `try`
            if not acquired:
                return  # whoever has it will do it
            try:
                while later:
                    later.popleft()
            finally:
                GATE.release()


def in_finalizer(action: Callable[[], None]) -> None:
    """Do `action` under the gate without ever waiting for it: now, or when it is left."""
    later.append(_Left((action,)))
    catch_up()


# --- the hooks -------------------------------------------------------------------------------


def _mark(in_child: bool) -> None:
    thread = get_ident()  # the forking thread's: pthread_self() survives the fork
    for session in list(sessions):
        session.mark_at_fork(thread, in_child)


def _mark_in_parent() -> None:
    _mark(False)


def _mark_in_child() -> None:
    _mark(True)


def _forget_threads() -> None:
    """Python counts those that stayed with the parent to the end.  How many there really are only
    the kernel knows: other hooks may have started some."""
    global other_threads
    if not count_threads():
        return
    with suppress(OSError):  # no /proc: as if all were there, which is slower, and right
        stayed = max(0, count_threads() + 1 - len(os.listdir("/proc/self/task")))

        def count_others() -> int:
            return count_threads() - stayed

        other_threads = count_others


def _close_in_child() -> None:
    failure = None
    for session in list(sessions):
        try:
            session.close_in_child()
        except BaseException as error:  # the others are not to suffer from it
            failure = error
    if failure is not None:
        raise failure


# `before` hooks run last first, the others first first; the lock itself is a C method in all
# three places, where no signal handler can come between.  An exception ends a hook, and a signal
# handler may raise one anywhere, but Python goes on to the next hook.  So all are marked before
# any is closed, a mark being what keeps two processes off one session; and either is done twice:
# what an interrupt cuts short the first time, the second time finishes.
os.register_at_fork(
    before=GATE.acquire, after_in_parent=_mark_in_parent, after_in_child=_mark_in_child
)
os.register_at_fork(after_in_parent=_mark_in_parent, after_in_child=_mark_in_child)
os.register_at_fork(after_in_child=_close_in_child)
os.register_at_fork(after_in_child=_close_in_child)
os.register_at_fork(after_in_child=_forget_threads)
os.register_at_fork(after_in_parent=GATE.release, after_in_child=GATE.release)
