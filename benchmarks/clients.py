"""Topic `clients`: many processes that borrow and return, each as fast as it can, all at once.

A round is so many cycles in all, shared out among them; its time is from the word to begin until
the last of them is done.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from subprocess import PIPE

from benchmarks.base import lent_file
from benchmarks.cycle import shared
from benchmarks.harness import Run, Topic, Variant, child, needs

PROCESSES = 1, 2, 10, 50, 200
FIRST = "1 process"
COUNT = struct.Struct("=I")


@contextmanager
def clients(count: int) -> Iterator[Run]:
    broker_class = needs("fdbroker", "Broker")
    with lent_file() as file, broker_class() as broker, ExitStack() as stack:
        broker.put("x", file)
        command = [sys.executable, "-m", "benchmarks.clients", broker.address]
        processes = [
            stack.enter_context(child(command, stdin=PIPE, stdout=PIPE)) for _ in range(count)
        ]

        def run(n: int) -> None:
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(COUNT.pack(max(1, n // count)))
            for process in processes:
                assert process.stdout is not None
                if len(process.stdout.read(1)) != 1:
                    raise RuntimeError("a client has ended early")

        run(count)  # each has its session
        yield run


def client(address: str) -> None:
    """As many cycles as it is told, again and again, until its standard input ends."""
    with needs("fdbroker", "Client")(address) as client:
        run = shared(client)
        while told := os.read(0, COUNT.size):
            run(*COUNT.unpack(told))
            os.write(1, b".")


TOPIC = Topic(
    name="clients",
    unit="borrow + return of one descriptor",
    cycles=2000,
    variants=tuple(
        Variant(FIRST if count == 1 else f"{count} processes", partial(clients, count), FIRST)
        for count in PROCESSES
    ),
)


if __name__ == "__main__":
    client(sys.argv[1])
