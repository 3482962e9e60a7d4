"""Topic `memory`: what the daemon holds of it, for itself and for each entry, session and loan.

Its memory is what is its own: what it has written to, and no other process has; its RSS has the
pages of files too, which it shares with every other Python.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import PIPE

from benchmarks.base import lent_file
from benchmarks.crowd import crowd, sessions
from benchmarks.cycle import shared
from benchmarks.harness import Figure, Figures, child, field
from benchmarks.stocked import stocked
from fdbroker import Client
from fdbroker.ipc.protocol.codec import encode
from fdbroker.ipc.protocol.messages import BORROW

MANY = 4000
CYCLES = 1_000_000
WARM = 20_000


@contextmanager
def daemon() -> Iterator[tuple[str, int]]:
    """`fdbroker serve`: its address and its pid."""
    with tempfile.TemporaryDirectory(prefix="fdbroker-memory-") as folder:
        address = f"{folder}/socket"
        serve = ["-m", "fdbroker", "serve", "--socket", address, "--ready-fd", "1"]
        with child([sys.executable, *serve], stdout=PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            try:
                yield address, process.pid
            finally:
                process.terminate()


def rss(pid: int) -> float:
    """Megabytes, of 10**6 bytes."""
    return pages(pid, "Rss:") / 1e6


def own(pid: int) -> int:
    """Bytes that it has written to, and no other process has."""
    return pages(pid, "Private_Dirty:")


def pages(pid: int, key: str) -> int:
    """In bytes; exact, where the Rss of proc_pid_status(5) is not."""
    return 1024 * int(field(Path(f"/proc/{pid}/smaps_rollup"), key).split()[0])


def measure() -> Iterator[Figure]:
    with daemon() as (address, pid), Client(address) as client:
        client.stats()
        yield Figure("the daemon, with one session", "MB of RSS", rss(pid), 16, beyond=12)
    with daemon() as (address, pid), lent_file() as file, Client(address) as client:
        client.put("x", file)
        client.borrow("x").close()
        before = own(pid)
        with crowd(address, MANY):
            yield Figure("a session", "bytes", (own(pid) - before) / MANY)
    with daemon() as (address, pid), lent_file() as file, Client(address) as client:
        client.put("x", file)
        with ExitStack() as stack:
            crowded = [stack.enter_context(sock) for sock in sessions(address, MANY)]
            before = own(pid)
            for sock in crowded:
                sock.send(encode([BORROW, 1, "x", 0, None, ""]))
                _, [number], _, _ = socket.recv_fds(sock, 100, 1)
                os.close(number)
            yield Figure("a loan", "bytes", (own(pid) - before) / MANY)
    few, many = (named(count) for count in (1, 10 * MANY))
    yield Figure("an entry", "bytes", (many - few) / (10 * MANY))
    with daemon() as (address, pid), lent_file() as file, Client(address) as client:
        client.put("x", file)
        run = shared(client)
        run(WARM)
        for _ in range(WARM // 100):
            run(1)
            os.sched_yield()  # so the broker looks in vain for what follows a return: another way
        before = own(pid)
        run(CYCLES)
        yield Figure(f"{CYCLES:,} cycles", "bytes", own(pid) - before, 0)


def named(count: int) -> float:
    """What a broker with so many names has of its own."""
    with stocked(count) as (address, pid), Client(address) as client:
        client.borrow("n0").close()
        return own(pid)


TOPIC = Figures("memory", measure)
