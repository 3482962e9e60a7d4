"""Topic `names`: borrow and return one of few and of many names.

Beside it the same of s6-fdholderd, whose names have a descriptor each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from random import Random

from benchmarks.harness import Run, Topic, Variant, needs
from benchmarks.peers import s6_kept
from benchmarks.stocked import stocked
from benchmarks.subjects import KEPT

NAMES = 1, 100, 1000, 10_000, 100_000
GOAL, BEYOND = 1.15, 1.05
S6_NAMES = 100, 1000
ASKED = 1000  # of them, drawn once: what a client says again and again the broker remembers


@contextmanager
def of(count: int, asked: int = 1) -> Iterator[Run]:
    client_class = needs("fdbroker", "Client")
    with stocked(count) as (address, _), client_class(address) as client:
        names = [f"n{Random(number).randrange(count)}" for number in range(asked)]
        client.borrow(names[0]).close()

        def run(n: int) -> None:
            borrow = client.borrow
            for name in names * (n // asked):
                borrow(name).close()

        yield run


def s6_of(count: int) -> AbstractContextManager[Run]:
    return s6_kept(names=[*KEPT, *(f"n{number}" for number in range(count - len(KEPT)))])


TOPIC = Topic(
    name="names",
    unit="borrow + return of one descriptor",
    cycles=2000,
    variants=(
        *(
            Variant(
                f"1 of {count}",
                partial(of, count),
                against="1 of 1",
                goal=GOAL if count == NAMES[-1] else None,
                beyond=BEYOND if count == NAMES[-1] else None,
            )
            for count in NAMES
        ),
        *(
            Variant(f"s6: 1 of {count}", partial(s6_of, count), against=f"1 of {count}")
            for count in S6_NAMES
        ),
        *(
            Variant(
                f"{ASKED} drawn of {count}",
                partial(of, count, ASKED),
                against=f"{ASKED} drawn of 1000",
            )
            for count in (1000, 100_000)
        ),
    ),
)
