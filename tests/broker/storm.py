"""What runs in the processes of the storm: victims, who kills them, and a good client.

These functions are called in puppets (`import storm`), where `run` forks its victims.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import threading
import time
from random import Random
from typing import NamedTuple

import fdbroker
from fdbroker.errors import EntryRetired

AT_A_TIME = 8
NAMES = ("s0", "s1", "s2", "s3")
SIZE = 4096
PATIENCE = 60.0


def content(name: str) -> bytes:
    return (name.encode() * SIZE)[:SIZE]


def put(client: fdbroker.Client, name: str) -> None:
    """A new memfd under `name`, with the content that goes with it."""
    fd = os.memfd_create(name)
    os.write(fd, content(name))
    client.put(name, fd, replace=True)
    os.close(fd)


# --- victims ---


def borrow(client: fdbroker.Client, random: Random) -> tuple[fdbroker.Loan, mmap.mmap | None]:
    """A loan of one kind or another, mapped perhaps."""
    names = random.sample(NAMES, random.randint(2, 4))
    while True:
        with contextlib.suppress(EntryRetired):  # it was replaced while we waited
            match random.randrange(6):
                case 0:
                    return client.borrow(names[0]), None
                case 1:
                    return client.borrow(names[0], exclusive=True), None
                case 2:
                    return client.borrow_all(names), None
                case 3:
                    return client.borrow_all(names, exclusive=True), None
                case 4:
                    return client.borrow(names[0], mode="r"), None
                case 5:
                    loan = client.borrow(names[0])
                    return loan, loan.mmap()


def victim(address: str, seed: int, holds: bool, tell: int) -> None:
    """Borrow and return for ever; or say that it holds a loan, and hold it."""
    random, client = Random(seed), fdbroker.Client(address)
    while True:
        loan, mapping = borrow(client, random)
        name = loan.entry
        if mapping is not None:
            assert mapping[:SIZE] == content(name)
        assert os.pread(loan.fileno(), SIZE, 0) == content(name)
        os.write(tell, b"x")  # it holds; or it is somewhere in its loop from now on
        if holds:
            while True:
                signal.pause()
        if mapping is not None:
            mapping.close()
        loan.close()


class Report(NamedTuple):
    kills: int
    held: int
    """Kills of who held a loan, which the broker had on its list."""
    put: int
    """Descriptors that were put meanwhile."""


def run(address: str, kills: int, seed: int) -> Report:
    """Fork victims and kill them; replace entries, put and retire others, all the while."""
    random, client = Random(seed), fdbroker.Client(address)
    victims: dict[int, tuple[int, bool]] = {}  # by the pipe that it tells us through
    done = held = puts = spawned = 0
    try:
        while done < kills:
            while len(victims) < AT_A_TIME:
                holds = spawned % 2 == 0
                victims.update(_spawn(address, seed * 1_000_000 + spawned, holds, victims))
                spawned += 1
            pipe = random.choice(_who_told(victims))
            pid, holds = victims[pipe]
            if holds:
                assert any(loan.pid == pid for loan in client.loans()), "it holds no loan"
                held += 1
            else:
                time.sleep(random.random() * 0.005)  # somewhere in its loop
            _kill(victims, pipe)
            done += 1
            puts += _stir(client, random, done)
    finally:
        for pipe in list(victims):
            _kill(victims, pipe)
        client.close()
    return Report(done, held, puts)


def _spawn(address: str, seed: int, holds: bool, others: dict) -> dict[int, tuple[int, bool]]:
    ours, theirs = os.pipe()
    if pid := os.fork():
        os.close(theirs)
        return {ours: (pid, holds)}
    try:
        for pipe in (ours, *others):
            os.close(pipe)
        victim(address, seed, holds, theirs)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(1)


def _who_told(victims: dict) -> list[int]:
    poll = select.poll()
    for pipe in victims:
        poll.register(pipe, select.POLLIN)
    told = poll.poll(PATIENCE * 1000)
    assert told, "no victim gets a loan any more"
    for pipe, events in told:
        assert events & select.POLLIN, f"victim {victims[pipe]} has ended by itself"
    return [pipe for pipe, _ in told]


def _kill(victims: dict, pipe: int) -> None:
    pid, _ = victims.pop(pipe)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(pipe)


def _stir(client: fdbroker.Client, random: Random, number: int) -> int:
    """Replace an entry under everybody's hands, or put and retire a pipe."""
    if number % 2:
        put(client, random.choice(NAMES))
        return 1
    ends = os.pipe()
    for end in ends:
        client.put(f"pipe{end}", end)
        os.close(end)
    with client.borrow_all([f"pipe{end}" for end in ends]) as loan:
        os.write(loan.fileno(f"pipe{ends[1]}"), b"through")
        client.retire(f"pipe{ends[0]}")
        assert os.read(loan.fileno(f"pipe{ends[0]}"), 7) == b"through"
    client.retire(f"pipe{ends[1]}", wait=True)
    return 2


# --- the good client ---


class Good:
    """A thread that borrows all the time, looks at what it got, and counts."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._stop = False
        self.borrowed = 0
        self.slowest = 0.0
        self.errors: list[str] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        random = Random(1)
        with fdbroker.Client(self._address) as client:
            while not self._stop:
                try:
                    self._borrow(client, random.choice(NAMES), random.choice([None, "r"]))
                except EntryRetired:
                    pass
                except Exception as error:
                    self.errors.append(repr(error))
                    return

    def _borrow(self, client: fdbroker.Client, name: str, mode: str | None) -> None:
        before = time.monotonic()
        with client.borrow(name, mode=mode, timeout=PATIENCE) as loan:
            assert os.pread(loan.fileno(), SIZE, 0) == content(name)
        self.slowest = max(self.slowest, time.monotonic() - before)
        self.borrowed += 1

    def stop(self) -> tuple[int, float, list[str]]:
        self._stop = True
        self._thread.join()
        return self.borrowed, self.slowest, self.errors
