"""Who is served next: deficit round robin over users (Shreedhar and Varghese, 1995).

Each user has a FIFO of ready items, and a balance in nanoseconds of the broker's time.  Users take
turns, one item each.  What an item took is charged to its user afterwards, so a balance can become
negative: the user is in deficit, and is skipped while a user who is not in deficit is ready.  When
all ready users are in deficit a new round begins, in which each of them is given the same number of
quanta, as many as it takes for one of them to be served.  So the scheduler never lets the broker
idle while an item is ready, and under load each user gets the same time, by one long item or by
many short ones.

A balance is bounded on both sides.  A user is at most ten quanta in deficit, so that nobody is
locked out for long, and credit is at most one quantum.  When a user's FIFO empties its balance is
zero again: nobody saves up credit, and a user that asks now and then is never behind one that asks
all the time.  What such a user uses pays off the deficits of the others, so that a stream of small
requests, each by itself, does not keep a user in deficit waiting for ever.

`submit` and `run_next` run items that are callables.  While nobody waits there is nothing to be
fair about: the first item of each user in each turn of the loop is run at once, and not charged.

Users, items and turns are opaque, and the clock is an argument: nothing here knows a socket.  The
broker's clock is thread CPU time, so that preemption is not charged to a user.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from time import thread_time_ns
from typing import Any

QUANTUM = 1_000_000
MOST_DEFICIT = 10 * QUANTUM


class FairScheduler:
    """Chooses the next of the items that are ready.

    `queues` is true while any item is ready.
    """

    __slots__ = ("_balances", "_clock", "_served", "_turn", "queues")

    def __init__(self, clock: Callable[[], int] = thread_time_ns) -> None:
        # The users who have an item ready, in the order of their turns, each with its items.
        self.queues: OrderedDict[Hashable, OrderedDict[Any, None]] = OrderedDict()
        self._clock = clock
        # The users whose item was run at once in the loop's turn that was seen last.
        self._turn: object = None
        self._served: set[Hashable] = set()
        # Nanoseconds, of each user for whom they are not zero.
        self._balances: dict[Hashable, int] = {}

    def admits(self, user: Hashable, turn: object) -> bool:
        """Whether the user's item may be run at once: nobody waits, and it is the user's first in
        this turn of the loop.  If so, the caller runs it."""
        if turn != self._turn:
            self._turn = turn
            self._served.clear()
        if self.queues or user in self._served:
            return False
        self._served.add(user)
        return True

    def submit(self, user: Hashable, item: Callable[[], object], turn: object) -> None:
        """Run the item now, if `admits` allows it; else queue it."""
        if self.admits(user, turn):
            item()
        else:
            self.ready(user, item)

    def run_next(self) -> None:
        """Run the item that is to be served now, and charge its user for the time it takes."""
        chosen = self.next()
        if chosen is not None:
            user, item = chosen
            begun = self._clock()
            try:
                item()
            finally:
                self.charge(user, self._clock() - begun)

    def ready(self, user: Hashable, item: Hashable) -> None:
        """Queue an item of a user, behind those the user has; once, if it is queued already."""
        queue = self.queues.get(user)
        if queue is None:
            self.queues[user] = OrderedDict(((item, None),))
        else:
            queue[item] = None

    def is_ready(self, user: Hashable, item: Hashable) -> bool:
        """Whether the item is queued."""
        return item in self.queues.get(user, ())

    def discard(self, user: Hashable, item: Hashable) -> None:
        """Take the item out, if it is queued."""
        queue = self.queues.get(user)
        if queue is not None and item in queue:
            del queue[item]
            if not queue:
                self._empty(user)

    def next(self) -> tuple[Hashable, Any] | None:
        """Take out the item to be served now: its user and the item; None if nothing is ready."""
        if not self.queues:
            return None
        user = self._first_not_in_deficit()
        if user is None:
            self._begin_round()
            user = self._first_not_in_deficit()
        assert user is not None
        queue = self.queues[user]
        item, _ = queue.popitem(last=False)
        if queue:
            self.queues.move_to_end(user)
        else:
            self._empty(user)
        return user, item

    def charge(self, user: Hashable, nanoseconds: int) -> None:
        """Note that the user has used so much of the broker's time.

        A user that has no item ready has no balance; what it uses pays off the others' deficits.
        """
        balances = self._balances
        if user in self.queues:
            balances[user] = max(balances.get(user, 0) - nanoseconds, -MOST_DEFICIT)
            return
        for other, balance in balances.items():
            if balance < 0:
                balances[other] = min(0, balance + nanoseconds)

    def _first_not_in_deficit(self) -> Hashable | None:
        balances = self._balances
        for user in self.queues:
            if balances.get(user, 0) >= 0:
                return user
        return None

    def _begin_round(self) -> None:
        """Give every ready user as many quanta as the one least in deficit needs."""
        balances = self._balances
        least = min(-balances[user] for user in self.queues)
        given = QUANTUM * -(-least // QUANTUM)
        for user in self.queues:
            balances[user] = min(balances[user] + given, QUANTUM)

    def _empty(self, user: Hashable) -> None:
        """The user has no item left: its balance is zero."""
        del self.queues[user]
        self._balances.pop(user, None)
