"""The board: memory that all processes of a run share, and what the good ones write into it.

    stop         1 once everybody is to come to an end
    published    a word for each good client: what is true of the name that it publishes
    counts       for each actor, how often it did each kind of thing, how many answers it found
                 right, and how slow the slowest one was

And the *witness*, an independent one for who has what exclusively: a lock on a byte of a file that
the broker knows nothing of.  It is taken after the grant and let go before the return, so if two
locks are in each other's way, two loans were.  It is a POSIX lock (fcntl(2)), since those go in
`filp_close`, before any socket of a process that is killed is shut down, whatever the order of its
descriptors; and a forked child has none of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from .plan import KINDS, Actor

STOP = 0
RIGHT, SLOWEST, STEP = range(3)  # words of an actor, before its counts
WORD = 8
PATIENCE = 30.0  # seconds; what a good client waits for longer does not come


class WrongAnswer(Exception):
    """The broker said or did what it must not."""


class Board:
    """Made before the actors are forked."""

    def __init__(
        self, actors: Sequence[Actor], turns: Sequence[str], patience: float = PATIENCE
    ) -> None:
        self.patience = patience
        self._names = [actor.name for actor in actors]
        self._row = 3 + len(KINDS)
        self._published_at = 1
        self._rows_at = 1 + len(actors)
        self._memory = mmap.mmap(-1, WORD * (self._rows_at + len(actors) * self._row))
        self._words = memoryview(self._memory).cast("Q")
        self._turns = {name: number for number, name in enumerate(turns)}
        self._witness = tempfile.TemporaryFile()  # noqa: SIM115 - until close
        self._faults = tempfile.TemporaryFile("a+", buffering=1)  # noqa: SIM115

    def close(self) -> None:
        self._words.release()
        self._memory.close()
        self._witness.close()
        self._faults.close()

    # --- the end ---

    @property
    def stopped(self) -> bool:
        return self._words[STOP] == 1

    def stop(self) -> None:
        self._words[STOP] = 1

    # --- what is published ---

    def published(self, number: int) -> int:
        return self._words[self._published_at + number]

    def publish(self, number: int, value: int) -> None:
        self._words[self._published_at + number] = value

    # --- counts ---

    def _place(self, actor: int, what: int) -> int:
        return self._rows_at + actor * self._row + what

    def add(self, actor: int, kind: str) -> None:
        self._words[self._place(actor, 3 + KINDS.index(kind))] += 1

    def note(self, actor: int, *, step: int, right: int, slowest: int) -> None:
        """Which step it is at, how many answers were right, microseconds of the slowest one."""
        self._words[self._place(actor, STEP)] = step
        self._words[self._place(actor, RIGHT)] = right
        self._words[self._place(actor, SLOWEST)] = slowest

    def step(self, actor: int) -> int:
        return self._words[self._place(actor, STEP)]

    def right(self) -> int:
        """Answers of all that were right."""
        return sum(self._words[self._place(n, RIGHT)] for n in range(len(self._names)))

    def slowest(self) -> int:
        return max(self._words[self._place(n, SLOWEST)] for n in range(len(self._names)))

    def counts(self) -> dict[str, int]:
        """How often each kind of thing was done, by all."""
        return {
            kind: sum(self._words[self._place(n, 3 + at)] for n in range(len(self._names)))
            for at, kind in enumerate(KINDS)
        }

    # --- the witness ---

    @contextlib.contextmanager
    def witness(self, names: Sequence[str], *, exclusive: bool) -> Iterator[None]:
        """This process has these turns, with nobody else or with others."""
        number, taken = self._witness.fileno(), set[int]()
        how = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        try:
            for name in names:
                place = self._turns[name]
                try:
                    fcntl.lockf(number, how | fcntl.LOCK_NB, 1, place)
                except OSError:
                    raise WrongAnswer(f"{name} was lent to two who exclude each other") from None
                taken.add(place)
            yield
        finally:
            for place in taken:
                fcntl.lockf(number, fcntl.LOCK_UN, 1, place)

    # --- faults ---

    def tell(self, actor: str, step: Any, text: str) -> None:
        """Somebody found a wrong answer, or failed itself.  One write, so none is cut in two."""
        line = json.dumps([actor, step, os.getpid(), text]) + "\n"
        os.write(self._faults.fileno(), line.encode())

    def faults(self) -> list[list[Any]]:
        self._faults.seek(0)
        return [json.loads(line) for line in self._faults]
