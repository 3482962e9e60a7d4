"""Topic `rc`: what counting a reference costs, inside one process.

Each statement is repeated in the body of timeit's loop, so that the loop itself weighs little in
the ratios.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from threading import Thread
from timeit import Timer
from typing import Any

from benchmarks.base import lent_file
from benchmarks.harness import Run, Topic, Variant, needs

UNROLLED = 20
COPIES = 8  # of a statement and its FD: where these come to lie in memory is worth a fifth
THREADS = 8
PAIR = "fd.incref(); fd.decref()"


class Empty:
    """Two method calls that do nothing: the least that a pair can cost in Python."""

    __slots__ = ()

    def incref(self) -> None:
        pass

    def decref(self) -> None:
        pass


@contextmanager
def statement(text: str, copies: int = COPIES, **names: Callable[[], Any]) -> Iterator[Run]:
    """Runs the text with what these make as local variables; n counts how often, in steps of
    copies x UNROLLED."""
    setup = "; ".join(f"{name} = _{name}" for name in names)
    body = "\n".join([text] * UNROLLED)
    timers = [
        Timer(body, setup, globals={f"_{name}": make() for name, make in names.items()})
        for _ in range(copies)
    ]

    def run(n: int) -> None:
        for timer in timers:
            timer.timeit(n // copies // UNROLLED)

    yield run


@contextmanager
def counted(text: str, copies: int = COPIES) -> Iterator[Run]:
    """The same on an `fd` of ours."""
    fd_class = needs("fdbroker.rc", "FD")
    with lent_file() as file, ExitStack() as stack:

        def make() -> Any:
            return stack.enter_context(closing(fd_class(os.dup(file.fileno()))))

        yield stack.enter_context(statement(text, copies, fd=make))


@contextmanager
def contended() -> Iterator[Run]:
    """Pairs on one FD by several threads at once; n counts those of all."""
    with counted(PAIR, copies=1) as pairs:

        def run(n: int) -> None:
            threads = [Thread(target=pairs, args=(n // THREADS,)) for _ in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        yield run


@contextmanager
def duplicated() -> Iterator[Run]:
    call = "close(dup(n))"
    with (
        lent_file() as file,
        statement(call, close=lambda: os.close, dup=lambda: os.dup, n=file.fileno) as run,
    ):
        yield run


TOPIC = Topic(
    name="rc",
    unit="pair",
    cycles=100_000,
    variants=(
        Variant(
            "two empty method calls",
            partial(statement, PAIR, fd=Empty),
            against="two empty method calls",
        ),
        Variant(
            "incref + decref",
            partial(counted, PAIR),
            against="two empty method calls",
            goal=2.4,
            beyond=2.0,
        ),
        Variant(
            f"incref + decref, {THREADS} threads on one FD",
            contended,
            against="incref + decref",
        ),
        Variant("dup + close", duplicated, against="dup + close"),
        Variant(
            "with fd.use()",
            partial(counted, "with fd.use(): pass"),
            against="dup + close",
            goal=0.5,
            beyond=0.4,
        ),
    ),
)
