"""Topic `pool`: the worker of a pool borrows and returns a `SharedFD` that was pickled to it.

A topic of its own, since a pool has threads in the process that makes it, and a client in a process
with threads takes more care (client/fork.py): it would not be the one that `cycle` is about.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.base import BASE, BASE_C, C_CHECK, lent_file
from benchmarks.harness import Run, Topic, Variant, needs


@contextmanager
def share() -> Iterator[Run]:
    broker_class = needs("fdbroker", "Broker")
    with (
        lent_file() as file,
        broker_class() as broker,
        broker.share(file) as ref,
        multiprocessing.get_context("spawn").Pool(1) as pool,
    ):

        def run(n: int) -> None:
            pool.apply(borrow_often, (ref, n))

        yield run
        pool.close()
        pool.join()


def borrow_often(ref: Any, n: int) -> None:
    """The worker's part."""
    for _ in range(n):
        ref.borrow().close()


TOPIC = Topic(
    name="pool",
    unit="borrow + return of one descriptor",
    cycles=3200,
    variants=(BASE, BASE_C, Variant("SharedFD in a pool", share, against="base")),
    check=C_CHECK,
)
