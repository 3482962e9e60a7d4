"""Topic `cycle`: borrow + return, one client with one thread, against BASE.

The broker's variants have everything on: names, rules, quotas, ledger, msgpack.  The goals are
those of the design.  put + retire does more than BASE: the broker looks at what came, and closes it
in a thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from benchmarks.base import BASE, BASE_C, C_CHECK, lent_file
from benchmarks.harness import Run, Topic, Variant, needs

MANY = 8, 32, 253  # as many as one message can bring
CALLS = 800  # in each round: what comes first in it has all its memory out of the caches
GOAL_OF_MANY, BEYOND_OF_MANY = {32: 0.12}, {32: 0.08}


def shared(client: Any) -> Run:
    """Borrow "x" and return it."""

    def run(n: int) -> None:
        borrow = client.borrow
        for _ in range(n):
            borrow("x").close()

    return run


@contextmanager
def borrow(*, exclusive: bool = False) -> Iterator[Run]:
    broker_class = needs("fdbroker", "Broker")
    with lent_file() as file, broker_class() as broker:
        broker.put("x", file)

        def in_turn(n: int) -> None:
            borrow = broker.borrow
            for _ in range(n):
                borrow("x", exclusive=True).close()

        yield in_turn if exclusive else shared(broker)


@contextmanager
def borrow_all(count: int) -> Iterator[Run]:
    broker_class = needs("fdbroker", "Broker")
    with lent_file() as file, broker_class() as broker:
        names = [f"x{i}" for i in range(count)]
        for name in names:
            broker.put(name, file)

        def run(n: int) -> None:
            borrow_all = broker.borrow_all
            for _ in range(n):
                borrow_all(names).close()

        yield run


@contextmanager
def put() -> Iterator[Run]:
    broker_class = needs("fdbroker", "Broker")
    with lent_file() as file, broker_class() as broker:

        def run(n: int) -> None:
            put, retire = broker.put, broker.retire
            for _ in range(n):
                put("x", file)
                retire("x")

        yield run


TOPIC = Topic(
    name="cycle",
    unit="borrow + return of one descriptor",
    cycles=3200,
    variants=(
        BASE,
        BASE_C,
        Variant("borrow", borrow, against="base", goal=1.40, beyond=1.20),
        Variant("borrow exclusive", partial(borrow, exclusive=True), against="base"),
        *(
            Variant(
                f"borrow_all of {count}",
                partial(borrow_all, count),
                against="base",
                per=count,
                goal=GOAL_OF_MANY.get(count),
                beyond=BEYOND_OF_MANY.get(count),
                cycles=count * CALLS,
            )
            for count in MANY
        ),
        Variant("put + retire", put, against="base", cycles=640),
    ),
    check=C_CHECK,
)
