"""LifetimeRegistry: which FDs were adopted, which were closed, and where the others came from.

For tests and for the hunt after a leak: it keeps the stack of each init until that FD is closed,
and a few words for ever.  An FD tells it from wherever it is closed, a finalizer perhaps; so it
takes no lock and does nothing but append to a list and set attributes.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType


class LifetimeRegistry:
    """Records the init and the close of each FD whose `track_lifetime` was told of it."""

    def __init__(self) -> None:
        self._lives: list[Lifetime] = []

    def opened(self, sysfd: int) -> Callable[[OSError | None], object]:
        """Record an init, with the stack of it; what is returned records the close."""
        life = Lifetime(sysfd)
        self._lives.append(life)
        return life.ended

    def stats(self) -> LifetimeStats:
        """What was recorded until now."""
        return LifetimeStats(self._lives.copy())


class Lifetime:
    """One FD's: its number, where it was adopted, how it ended."""

    __slots__ = ("outcome", "stack", "sysfd")

    def __init__(self, sysfd: int) -> None:
        self.sysfd = sysfd
        self.outcome = "open"
        self.stack: list[str] = []
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            where = f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}'
            self.stack.insert(0, where)
            frame = frame.f_back

    def ended(self, error: OSError | None) -> None:
        self.outcome = "closed" if error is None else "failed"
        self.stack = []


class LifetimeStats:
    """How many FDs were `initialized`, `closed`, `close_failed`; of the others, all that `leaked`:

    a list of the number and the stack of each.
    """

    def __init__(self, lives: list[Lifetime]) -> None:
        outcomes = [life.outcome for life in lives]
        self.initialized = len(lives)
        self.closed = outcomes.count("closed")
        self.close_failed = outcomes.count("failed")
        self.leaked = [(life.sysfd, life.stack) for life in lives if life.outcome == "open"]

    def report(self) -> str:
        """What was never closed, each with the stack of its init; empty if nothing leaked."""
        if not self.leaked:
            return ""
        lines = [f"{len(self.leaked)} of {self.initialized} FDs were never closed:"]
        for sysfd, stack in self.leaked:
            lines += [f"FD {sysfd}, adopted at (most recent call last):", *stack]
        return "\n".join(lines)
