"""The deadlines of all waits, the earliest first.

A wait that ends leaves its deadline in the heap, because taking it out of the middle would break
the order.  Such leftovers are skipped when they come to the top.  They are removed all at once when
they are more than the sessions there are, so a client that waits and gives up in a loop does not
make the heap grow.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fdbroker.lender.model import Session


class Deadlines:
    """A heap of (deadline, session id, seq of the request, session slot)."""

    def __init__(self, sessions: Mapping[int, Session]) -> None:
        """`sessions` is the table of all sessions by slot, which stays the caller's."""
        self.heap: list[tuple[int, int, int, int]] = []
        self._sessions = sessions

    def add(self, session: Session) -> None:
        """Note the deadline of a session that has begun to wait."""
        if len(self.heap) > 2 * len(self._sessions):
            # The list stays the same object, since others refer to it.
            self.heap[:] = filter(self._is_pending, self.heap)
            heapify(self.heap)
        heappush(self.heap, (session.deadline, session.id, session.asked_seq, session.slot))

    def earliest(self) -> int | None:
        """Return the earliest deadline, or None if no wait has one."""
        while self.heap and not self._is_pending(self.heap[0]):
            heappop(self.heap)
        return self.heap[0][0] if self.heap else None

    def pop_due(self, now: int) -> Session | None:
        """Return the session with the earliest deadline if that is not after `now`, else None."""
        deadline = self.earliest()
        if deadline is None or deadline > now:
            return None
        return self._sessions[heappop(self.heap)[3]]

    def _is_pending(self, noted: tuple[int, int, int, int]) -> bool:
        """Tell whether the session still waits for what it waited for then."""
        session = self._sessions.get(noted[3])
        return session is not None and (
            (session.deadline, session.id, session.asked_seq) == noted[:3]
        )
