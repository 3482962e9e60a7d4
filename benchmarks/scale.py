"""Topic `scale`: many names and sessions, a large ledger; nothing is linear in what is idle."""

from __future__ import annotations

import mmap
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

from benchmarks.base import lent_file
from benchmarks.crowd import sessions
from benchmarks.harness import Figure, Figures, child
from benchmarks.memory import daemon
from benchmarks.stocked import stocked
from fdbroker import Client
from fdbroker.descriptors import Kind
from fdbroker.ipc.protocol.codec import encode
from fdbroker.ipc.protocol.messages import BORROW
from fdbroker.lender import Ledger, Lender
from fdbroker.lender.model import LoanRequest, Peer
from fdbroker.lender.recovery import recover
from fdbroker.rc import FD

CONFIGURED = 10_000
NAMES = 100_000
SESSIONS = 10_000
PART = 1000  # of the sessions: the first ones, and the last ones
ROOM = 20_000, 131_072, 131_072  # of the ledger
PEER = Peer(os.geteuid(), os.getegid(), os.getpid())


def measure() -> Iterator[Figure]:
    yield from start()
    yield from listing()
    yield from alive()
    yield from ledger()


def start() -> Iterator[Figure]:
    """From nothing to ready, with so many entries in the file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "fdbroker.toml")
        entries = (f'[entry.n{number}]\nmemfd = "4K"\n' for number in range(CONFIGURED))
        file.write_text("".join(entries))
        serve = ["serve", "--socket", f"{folder}/socket", "--config", str(file), "--ready-fd", "1"]
        began = time.perf_counter()
        with child([sys.executable, "-m", "fdbroker", *serve], stdout=PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            took = time.perf_counter() - began
            process.terminate()
    yield Figure(f"a start with {CONFIGURED:,} configured entries", "s", took, 2)


def listing() -> Iterator[Figure]:
    """`fdbroker ls` of many names, and what another client sees of it."""
    with stocked(NAMES) as (address, _), Client(address) as client:
        client.borrow("n0").close()
        command = [sys.executable, "-m", "fdbroker", "ls", "--socket", address]
        began = time.perf_counter()
        with Popen(command, stdout=DEVNULL) as listing:
            slowest = 0.0
            while listing.poll() is None:
                asked = time.perf_counter()
                client.borrow("n0").close()
                slowest = max(slowest, time.perf_counter() - asked)
        yield Figure(f"ls of {NAMES:,} names", "s", time.perf_counter() - began)
        yield Figure("the slowest borrow meanwhile", "ms", 1000 * slowest)


def alive() -> Iterator[Figure]:
    """So many sessions that each borrow once, and keep it."""
    request = encode([BORROW, 1, "x", 0, None, ""])
    with daemon() as (address, _), lent_file() as file, Client(address) as client:
        client.put("x", file)
        with ExitStack() as stack:
            began = time.perf_counter()
            crowd = [stack.enter_context(sock) for sock in sessions(address, SESSIONS)]
            yield Figure(
                f"a hello, of {SESSIONS:,}", "µs", 1e6 * (time.perf_counter() - began) / SESSIONS
            )
            times = []
            for sock in crowd:
                asked = time.perf_counter()
                sock.send(request)
                _, [number], _, _ = socket.recv_fds(sock, 100, 1)
                times.append(time.perf_counter() - asked)
                os.close(number)
            first, last = sorted(times[:PART]), sorted(times[-PART:])
            yield Figure(f"the first {PART:,} borrows, median", "µs", 1e6 * first[PART // 2])
            yield Figure(f"the last {PART:,}, median", "µs", 1e6 * last[PART // 2])
            loans = client.stats()["loans"]
            if loans != SESSIONS:
                raise RuntimeError(f"{loans} loans")
            began = time.perf_counter()
        while client.stats()["loans"]:
            pass
        yield Figure("their end, each", "µs", 1e6 * (time.perf_counter() - began) / SESSIONS)


def ledger() -> Iterator[Figure]:
    """The lender alone: each event is written through, and all of it is read again."""
    buffer = mmap.mmap(-1, Ledger.size(*ROOM))
    lender = Lender(Ledger(memoryview(buffer), *ROOM))
    shared = os.memfd_create("shared")
    try:
        fds = [FD(shared, _keep) for _ in range(NAMES)]
        began = time.perf_counter()
        for number, fd in enumerate(fds):
            lender.put(None, 0, f"n{number}", b"", fd, Kind.MEMFD, 0, uid=PEER.uid)
        yield Figure(f"a put, of {NAMES:,}", "µs", 1e6 * (time.perf_counter() - began) / NAMES)
        crowd = [lender.open(PEER) for _ in range(SESSIONS)]
        requests = [LoanRequest((f"n{10 * number}",)) for number in range(SESSIONS)]
        began = time.perf_counter()
        for session, request in zip(crowd, requests, strict=True):
            lender.borrow(session, 1, request, 0)
        each = 1e6 * (time.perf_counter() - began) / SESSIONS
        yield Figure(f"a borrow, of {SESSIONS:,}", "µs", each)
        peers = dict.fromkeys((session.slot for session in crowd), PEER)
        again = {slot: FD(shared, _keep) for slot in lender.entries}
        began = time.perf_counter()
        loaded = recover(Ledger(memoryview(buffer), *ROOM), peers, again, 0)
        took = time.perf_counter() - began
        if (len(loaded.entries), loaded.loans) != (NAMES, SESSIONS):
            raise RuntimeError(f"{len(loaded.entries)} entries, {loaded.loans} loans were loaded")
        yield Figure(f"load of {NAMES:,} entries and {SESSIONS:,} loans", "s", took)
        for one in (lender, loaded):
            for entry in one.entries.values():
                while entry.fd.refs:
                    entry.fd.decref()
                entry.fd.detach()
    finally:
        os.close(shared)


def _keep(sysfd: int) -> None:
    """It is shared."""


TOPIC = Figures("scale", measure)
