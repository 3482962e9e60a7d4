"""Who is served next: deficit round robin over users (Shreedhar and Varghese, 1995).

Each user has a FIFO of ready items, and a balance in nanoseconds of the broker's time.  Users take
turns, one item each.  What an item took is charged to its user afterwards, so a balance can become
negative: the user is in deficit, and is skipped while a user who is not in deficit is ready.  When
all ready users are in deficit a new round begins, in which each of them is given the same number of
quanta, as many as it takes for one of them to be served.  So the scheduler never lets the broker
idle while an item is ready, and under load each user gets the same time, by one long item or by
many short ones.

A balance is bounded on both sides.  A user is at most ten quanta in deficit, so that nobody is
locked out for long.  Credit is at most one quantum, and is lost when the user's FIFO empties, so
that nobody can save it up.  When nothing is ready at all, nobody waits for anybody, and every
deficit is forgiven.

Users and items are opaque, and times are arguments: nothing here knows a socket or a clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

QUANTUM = 1_000_000
MOST_DEFICIT = 10 * QUANTUM


class FairScheduler:
    """Chooses the next of the items that are ready."""

    __slots__ = ("_balances", "_queues")

    def __init__(self) -> None:
        # The users who have an item ready, in the order of their turns, each with its items.
        self._queues: OrderedDict[Hashable, OrderedDict[Any, None]] = OrderedDict()
        # Nanoseconds, of each user for whom they are not zero.
        self._balances: dict[Hashable, int] = {}

    def __bool__(self) -> bool:
        """Whether any item is ready."""
        return bool(self._queues)

    def ready(self, user: Hashable, item: Hashable) -> None:
        """Queue an item of a user, behind those the user has; once, if it is queued already."""
        queue = self._queues.get(user)
        if queue is None:
            self._queues[user] = OrderedDict(((item, None),))
        else:
            queue[item] = None

    def is_ready(self, user: Hashable, item: Hashable) -> bool:
        """Whether the item is queued."""
        return item in self._queues.get(user, ())

    def discard(self, user: Hashable, item: Hashable) -> None:
        """Take the item out, if it is queued."""
        queue = self._queues.get(user)
        if queue is not None and item in queue:
            del queue[item]
            if not queue:
                self._empty(user)

    def next(self) -> tuple[Hashable, Any] | None:
        """Take out the item to be served now: its user and the item; None if nothing is ready."""
        if not self._queues:
            self._balances.clear()
            return None
        user = self._first_not_in_deficit()
        if user is None:
            self._begin_round()
            user = self._first_not_in_deficit()
        assert user is not None
        queue = self._queues[user]
        item, _ = queue.popitem(last=False)
        if queue:
            self._queues.move_to_end(user)
        else:
            self._empty(user)
        return user, item

    def charge(self, user: Hashable, nanoseconds: int) -> None:
        """Note that the user has used so much of the broker's time."""
        balance = self._balances.get(user, 0) - nanoseconds
        self._balances[user] = max(balance, -MOST_DEFICIT)

    def _first_not_in_deficit(self) -> Hashable | None:
        balances = self._balances
        for user in self._queues:
            if balances.get(user, 0) >= 0:
                return user
        return None

    def _begin_round(self) -> None:
        """Give every ready user as many quanta as the one least in deficit needs."""
        balances = self._balances
        least = min(-balances[user] for user in self._queues)
        given = QUANTUM * -(-least // QUANTUM)
        for user in self._queues:
            balances[user] = min(balances[user] + given, QUANTUM)

    def _empty(self, user: Hashable) -> None:
        """The user has no item left: what credit it has is lost."""
        del self._queues[user]
        if self._balances.get(user, -1) >= 0:
            self._balances.pop(user, None)
