"""KeyboardInterrupt at any point of a borrow leaves nothing open and nothing lent."""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import sys
import threading
import time
import warnings
from types import FrameType
from typing import IO, Any

import pytest
import support
from support import Peer, wait_until

import fdbroker
from fdbroker.errors import WouldDeadlock
from fdbroker.ipc.client import fork


class Alarm:
    """Raises KeyboardInterrupt once, after a random time, unless it is disarmed before."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._armed = False
        self.raised = 0
        signal.signal(signal.SIGALRM, self._ring)

    def arm(self, seconds: float) -> None:
        self._armed = True
        signal.setitimer(signal.ITIMER_REAL, self._dice.uniform(0.000_001, seconds))

    def disarm(self) -> None:
        self._armed = False

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            self.raised += 1
            raise KeyboardInterrupt


def borrow_one(client: fdbroker.Client, round: int) -> None:
    if round % 5 == 4:
        with client.borrow_all(["data"] * 300) as loan:
            loan.fileno()
        return
    with client.borrow("data", exclusive=round % 3 == 0, mode="r" if round % 4 else None) as loan:
        file = loan.open("rb") if round % 7 == 0 else None
        mapping = loan.mmap() if round % 6 == 0 else None
        os.pread(loan.fileno(), 1, 0)
    del file, mapping
    with client.borrow("web") as loan:
        web = loan.as_socket()
    assert web.fileno() == -1


def is_free() -> bool:
    """Whether another thread gets the gate."""
    got: list[bool] = []

    def try_it() -> None:
        got.append(fork.FORK_LOCK.acquire(timeout=5))
        if got[0]:
            fork.FORK_LOCK.release()

    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join()
    return got[0]


def interrupted(address: str, rounds: int, threads: int) -> tuple[int, dict[int, Any], bool]:
    # a loan that is dropped warns, and an interrupt within a finalizer goes nowhere: both are meant
    warnings.simplefilter("ignore", ResourceWarning)
    hook = sys.unraisablehook
    sys.unraisablehook = lambda found: (
        None if isinstance(found.exc_value, KeyboardInterrupt) else hook(found)
    )
    baseline = support.open_files()
    stop = threading.Event()
    others = [threading.Thread(target=stop.wait) for _ in range(threads)]
    for other in others:
        other.start()
    client = fdbroker.Client(address)
    alarm = Alarm(rounds)
    before = time.perf_counter()
    for round in range(5):
        borrow_one(client, round)
    often = [(time.perf_counter() - before) / 2, 0.000_2]  # the whole of it, and its beginning
    for round in range(rounds):
        try:
            alarm.arm(often[round % 2])
            borrow_one(client, round)
            alarm.disarm()
        except KeyboardInterrupt:
            pass
        except WouldDeadlock:  # the end of an interrupted session may still be on its way
            alarm.disarm()
            wait_until(lambda: not client.loans())
    alarm.disarm()
    stop.set()
    for other in others:
        other.join()
    client.close()
    gc.collect()
    free = is_free()
    left = {n: link for n, link in support.open_files().items() if n not in baseline}
    return alarm.raised, left, free


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("rounds", [500, pytest.param(5_000, marks=pytest.mark.long)])
def test_interrupts_leave_nothing(
    broker: fdbroker.Broker, data_file: IO[bytes], peer: Peer, rounds: int, threads: int
) -> None:
    broker.put("data", data_file)
    with socket.create_server(("127.0.0.1", 0)) as server:
        broker.put("web", server)
    sessions = broker.stats()["sessions"]
    raised, left, free = peer.call(interrupted, broker.address, rounds, threads)
    assert raised > rounds / 10
    assert left == {}
    assert free, "the gate is locked for ever"
    wait_until(lambda: broker.stats()["loans"] == 0)
    wait_until(lambda: broker.stats()["sessions"] == sessions)
