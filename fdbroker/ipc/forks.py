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
moments are passed under `GATE`, for which the fork waits.  Finalizers must not wait for a lock;
what they cannot do at once they leave in `later`, and whoever leaves the gate does it.
"""

from __future__ import annotations

import os
import threading
from _thread import _count as _other_threads  # threading.active_count() takes a lock, and long
from collections import deque
from collections.abc import Callable
from typing import Protocol
from weakref import WeakSet


class Forked(Protocol):
    """What a session must do at a fork; the gate is held."""

    def at_fork_in_parent(self, thread: int) -> None:
        """`thread` has forked."""

    def at_fork_in_child(self, thread: int) -> None:
        """This is the child, and what was `thread` is its only one."""


GATE = threading.RLock()  # reentrant: a signal handler may fork, a finalizer may close
sessions: WeakSet[Forked] = WeakSet()  # all of this process
later: deque[Callable[[], None]] = deque()


def threaded() -> bool:
    """Whether another thread could fork just now."""
    return _other_threads() > 0


def catch_up() -> None:
    """Do what finalizers left; called by whoever has just left the gate."""
    while later:
        for acquired in map(GATE.acquire, (False,)):  # no interrupt can come before the `try`
            if not acquired:
                return
            try:
                while later:
                    later.popleft()()
            finally:
                GATE.release()


def in_finalizer(action: Callable[[], None]) -> None:
    """Do `action` under the gate without ever waiting for it: now, or when it is left."""
    later.append(action)
    catch_up()


def _after_in_parent() -> None:
    thread = threading.get_ident()
    for session in list(sessions):
        session.at_fork_in_parent(thread)


def _after_in_child() -> None:
    thread = threading.get_ident()  # the forking thread's: pthread_self() survives the fork
    for session in list(sessions):
        session.at_fork_in_child(thread)


# `before` hooks run last first, the others first first; the gate itself is a C method in all
# three places, where no signal handler can come between
os.register_at_fork(
    before=GATE.acquire, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
os.register_at_fork(after_in_parent=GATE.release, after_in_child=GATE.release)
