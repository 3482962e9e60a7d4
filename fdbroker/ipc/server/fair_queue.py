"""The turns of the users that are held to a quota: what they ask for is queued, and run in turn.

An item is a callable.  The loop runs one of them between two waits, so that whatever needs no turn
(root, the broker's own uid) is served in between.  The time that an item takes is measured in
thread CPU time, so that preemption is not charged to the user.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from time import thread_time_ns
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdbroker.ipc.server.event_loop import EventLoop
    from fdbroker.ipc.server.scheduler import FairScheduler

Item = Callable[[], object]


class FairQueue:
    """Runs items on `loop`, in the order in which `scheduler` chooses them."""

    def __init__(self, loop: EventLoop, scheduler: FairScheduler) -> None:
        self._loop = loop
        self._scheduler = scheduler
        self._running = False

    def submit(self, user: Hashable, item: Item) -> None:
        """Run `item` when it is the user's turn; once, if it is queued already."""
        self._scheduler.ready(user, item)
        if not self._running:
            self._running = True
            self._loop.call_soon(self._run_next)

    def is_queued(self, user: Hashable, item: Item) -> bool:
        """Whether the item waits for its turn."""
        return self._scheduler.is_ready(user, item)

    @property
    def busy(self) -> bool:
        """Whether any item waits for its turn."""
        return bool(self._scheduler)

    def discard(self, user: Hashable, item: Item) -> None:
        """Never run the item."""
        self._scheduler.discard(user, item)

    def charge(self, user: Hashable, nanoseconds: int) -> None:
        """Charge the user for what was done for it elsewhere, by a worker."""
        self._scheduler.charge(user, nanoseconds)

    def _run_next(self) -> None:
        chosen = self._scheduler.next()
        if chosen is None:
            self._running = False
            return
        self._loop.call_soon(self._run_next)
        user, item = chosen
        begun = thread_time_ns()
        try:
            item()
        finally:
            self._scheduler.charge(user, thread_time_ns() - begun)
