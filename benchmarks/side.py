"""One side of before_after.py: a broker and a client of the fdbroker package on the path.

``python -P side.py SITUATION`` sets the situation up and writes a newline.  Then it reads a number
from each line of its standard input, does the work so many times, and writes how many nanoseconds
that took.  It uses the public command and client only, and imports nothing else of this folder, so
that it runs with any version of the package.
"""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdbroker import Client

TOGETHER = 32  # names in one borrow_all
IDLE = 4000  # sessions
NAMES = 100_000  # or as many as the limit of open files allows
IN_TURN = 5000  # names
SPARE = 1000  # descriptors beside those of the entries or the sessions
SERVE = [sys.executable, "-P", "-m", "fdbroker", "serve", "--ready-fd", "1"]
Work = Callable[[int], None]


# --- the broker, and who is there beside the client ------------------------------------------


@contextmanager
def broker(names: int) -> Iterator[str]:
    """The address of a broker that has the entries n0, n1, ..."""
    allow_files(names + SPARE)
    with tempfile.TemporaryDirectory(prefix="fdbroker-side-") as folder:
        address, config = f"{folder}/socket", Path(folder, "config")
        config.write_text("".join(f'[entry.n{i}]\nmemfd = "4K"\n' for i in range(names)))
        command = [*SERVE, "--socket", address, "--config", str(config)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                if not process.stdout.read(1):
                    raise RuntimeError("the broker did not start")
                yield address
            finally:
                process.kill()


@contextmanager
def crowd(address: str) -> Iterator[None]:
    """Sessions that do nothing meanwhile, in another process."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-P", __file__, "crowd", address]
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        if not process.stdout.read(1):
            raise RuntimeError("the idle sessions did not start")
        yield
        process.stdin.close()


def be_crowd(address: str) -> None:
    from fdbroker import Client

    allow_files(IDLE + SPARE)
    clients = [Client(address) for _ in range(IDLE)]
    for client in clients:
        client.borrow("n0").close()
    print(flush=True)
    sys.stdin.read()


def allow_files(count: int) -> None:
    """Let this process and its children open so many; ValueError above the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def names_here() -> int:
    """How many names a broker can have here, for each of which it keeps a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return NAMES if hard == resource.RLIM_INFINITY else min(NAMES, hard - SPARE)


# --- the situations --------------------------------------------------------------------------


@contextmanager
def connected(names: int) -> Iterator[tuple[str, Client]]:
    from fdbroker import Client

    with broker(names) as address, Client(address) as client:
        yield address, client


def borrowing(client: Client, names: Sequence[str]) -> Work:
    """Borrow and return these names in turn, and go on where the last round ended."""
    endless = cycle(names)

    def work(n: int) -> None:
        borrow = client.borrow
        for name in islice(endless, n):
            borrow(name).close()

    return work


@contextmanager
def one_name() -> Iterator[Work]:
    with connected(1) as (_, client):
        yield borrowing(client, ["n0"])


@contextmanager
def together() -> Iterator[Work]:
    with connected(TOGETHER) as (_, client):
        names = [f"n{i}" for i in range(TOGETHER)]

        def work(n: int) -> None:
            borrow_all = client.borrow_all
            for _ in range(n):
                borrow_all(names).close()

        yield work


@contextmanager
def beside_idle() -> Iterator[Work]:
    with connected(1) as (address, client), crowd(address):
        yield borrowing(client, ["n0"])


@contextmanager
def one_of_many() -> Iterator[Work]:
    with connected(names_here()) as (_, client):
        yield borrowing(client, ["n999"])


@contextmanager
def many_in_turn() -> Iterator[Work]:
    with connected(IN_TURN) as (_, client):
        yield borrowing(client, [f"n{i}" for i in range(IN_TURN)])


@contextmanager
def exec_true() -> Iterator[Work]:
    with broker(1) as address:
        options = ["--socket", address, "--fd", "n0", "--", "true"]
        command = [sys.executable, "-P", "-m", "fdbroker", "exec", *options]

        def work(n: int) -> None:
            for _ in range(n):
                subprocess.run(command, check=True)

        yield work


SITUATIONS = {
    "cycle": one_name,
    "borrow_all": together,
    "idle": beside_idle,
    "names": one_of_many,
    "turns": many_in_turn,
    "exec": exec_true,
}


def main(situation: str) -> None:
    with SITUATIONS[situation]() as work:
        print(flush=True)
        gc.disable()
        for line in sys.stdin:
            began = time.perf_counter_ns()
            work(int(line))
            print(time.perf_counter_ns() - began, flush=True)
            gc.collect()


if __name__ == "__main__":
    if sys.argv[1] == "crowd":
        be_crowd(sys.argv[2])
    else:
        main(sys.argv[1])
