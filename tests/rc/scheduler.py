"""Threads that take turns at every opcode, in an order that a seed decides.

Exactly one thread runs.  At each opcode of the code under test (one source file) it may have to
hand over to another one: so the smallest steps of the threads interleave, as they never do when
the interpreter switches every 5 ms, and the same seed gives the same interleaving again.

Most mistakes need one thread to stop at one certain opcode for long, while others do much; a fair
dice seldom does that.  So a thread may also stall: at one opcode of its own it stops until nobody
else can go on (after Burckhardt et al., "A randomized scheduler with probabilistic guarantees of
finding bugs", ASPLOS 2010).

Nothing under test may block in C while others wait for their turn.  `SimpleQueue.get` waits
through the scheduler here: it is passed over until there is something to get.  If nobody can
go on, each thread gets `Deadlock`.
"""

from __future__ import annotations

import gc
import queue
import random
import sys
import threading
from _thread import allocate_lock
from collections.abc import Callable
from types import FrameType
from typing import Any

import opcodes


class Deadlock(AssertionError):
    """Every thread waits for another one."""


class Scheduler:
    """`source`: the file whose opcodes count; `whole`: its functions that run in one piece."""

    def __init__(self, seed: int, source: str, whole: tuple[str, ...] = ()) -> None:
        self.random = random.Random(seed)
        self.errors: list[BaseException] = []
        self.steps = 0
        self._haste = self.random.choice(
            (0.0, 0.0, 0.0, 0.03, 0.3)
        )  # share of opcodes that hand over
        self._stalls: dict[int, int] = {}  # of each thread, how many opcodes until it stalls
        self._stalled: set[int] = set()
        self._source = source
        self._whole = whole
        self._turns: dict[int, Any] = {}  # of each live thread, the lock that is its turn
        self._waits: dict[int, Callable[[], bool]] = {}  # of each that waits, whether it may go on
        self._deadlock = False
        self._me = -1  # who runs

    def run(self, *bodies: Callable[[], object]) -> None:
        """Run them all to their ends; what they raised is in `errors`."""
        threads = []
        first = self.random.randrange(len(bodies))
        for me, body in enumerate(bodies):
            self._turns[me] = allocate_lock()
            self._turns[me].acquire()
            self._stalls[me] = 0
            threads.append(threading.Thread(target=self._live, args=(me, body)))
        self._stalls[first] = self.random.randrange(100)
        if self.random.random() < 0.3:
            self._stalls[self.random.randrange(len(bodies))] = self.random.randrange(200)
        unpatched = queue.SimpleQueue
        queue.SimpleQueue = self._queue()  # type: ignore[assignment, misc]
        traced = sys.gettrace()
        sys.settrace(lambda *_: None)  # all along: 3.12.1 crashes if what is traced changes
        gc.disable()  # a finalizer is code under test too, and would come in the middle of this
        try:
            for thread in threads:
                thread.start()
            self._next([first])
            for thread in threads:
                thread.join()
        finally:
            gc.enable()
            sys.settrace(traced)
            queue.SimpleQueue = unpatched  # type: ignore[misc]

    def _live(self, me: int, body: Callable[[], object]) -> None:
        self._turns[me].acquire()
        sys.settrace(self._trace)
        try:
            body()
        except BaseException as error:
            self.errors.append(error)
        finally:
            sys.settrace(None)
            del self._turns[me]
            if self._turns:
                self._next(self._able())

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        if code.co_filename != self._source or code.co_name in self._whole:
            return None
        return opcodes.watch(frame, self._opcode)

    def _opcode(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "opcode":
            me = self._me
            self.steps += 1
            self._stalls[me] -= 1
            if self._stalls[me] == 0:
                self._stalled.add(me)
                self.pause()
            elif self.random.random() < self._haste:
                self.pause()
        return self._opcode

    def pause(self) -> None:
        """Let somebody run: another thread, or the same one again."""
        me = self._me
        chosen = self._next(self._able(), me)
        if chosen != me:
            self._turns[me].acquire()

    def wait_until(self, ready: Callable[[], bool]) -> None:
        me = self._me
        while not ready():
            self._waits[me] = ready
            chosen = self._next(self._able(), me)
            if chosen != me:
                self._turns[me].acquire()
            self._waits.pop(me, None)
            if self._deadlock:
                raise Deadlock

    def _able(self) -> list[int]:
        able = [me for me in self._turns if me not in self._waits or self._waits[me]()]
        if not able:
            self._deadlock = True
            able = list(self._turns)
        if not self._stalled.issuperset(able):
            return [me for me in able if me not in self._stalled]
        self._stalled.clear()
        return able

    def _next(self, able: Any, me: int = -1) -> int:
        chosen: int = self.random.choice(able)
        self._me = chosen
        if chosen != me:
            self._turns[chosen].release()
        return chosen

    def _queue(self) -> type:
        scheduler = self

        class ScheduledQueue(queue.SimpleQueue):  # type: ignore[type-arg]
            def get(self, block: bool = True, timeout: float | None = None) -> Any:
                if timeout is None:
                    scheduler.wait_until(lambda: not self.empty())
                return super().get(block=False)

        return ScheduledQueue
