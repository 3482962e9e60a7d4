"""Who has each of its turns take as long as it can: the others have most of the time."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from support import BORROW, CANCEL, PATIENCE, RETURN, SHARED, Raw, in_fork, start_fork, wait_until

from fdbroker.ipc.server.acceptor import OFFENCES

from .target import ALICE, ANSWERS, Target, become

ASKED = 8  # times by the attacker, in each process
FAIR = 4  # times as many answers has the good client, at least, though it makes pauses
WATCHES = 40_000  # of one session
FILES = 2_000  # numbers of one file, which an epoll may watch each
NAMED = 3_000
SESSIONS = 100
FLOOD = 4_000  # answers
GROUPS = 65_000  # NGROUPS_MAX is 65,536


def outlast(target: Target, prepare: Callable[[Raw], None], names: object) -> None:
    """One borrows again and again, as fast as it is answered."""

    def run() -> int:
        become(ALICE)
        with Raw(target.address, puts=False) as raw:
            prepare(raw)
            before = target.good.answers
            for seq in range(1, 2 * ASKED, 2):
                raw.send(BORROW, seq, names, *SHARED)
                message, numbers = raw.receive()
                for number in numbers:
                    os.close(number)
                assert message is not None
                assert message[:2] == [0, seq]
                raw.send(RETURN, seq + 1)
            return target.good.answers - before

    answers = start_fork(run)()
    print(f"\n{ASKED} long turns, {answers} answers to the good client")
    assert answers > FAIR * ASKED


def test_many_epolls_watch_its_own_end(target: Target) -> None:
    """The kernel tells each of them of each message, in the broker's thread."""

    def watch(raw: Raw) -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        numbers = [os.dup(raw.sock.fileno()) for _ in range(FILES)]
        for _ in range(WATCHES // FILES):
            watcher = select.epoll()
            os.dup(watcher.fileno())  # it stays
            for number in numbers:
                watcher.register(number, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    outlast(target, watch, "public/memory")


def test_it_comes_again_and_again_with_very_many_groups(target: Target) -> None:
    """Which are looked at, since there is a rule for a group."""

    def run() -> int:
        become(ALICE, groups=tuple(range(100_000, 100_000 + GROUPS)))
        before = target.good.answers
        for _ in range(ASKED):
            Raw(target.address, puts=False).sock.close()
        return target.good.answers - before

    answers = start_fork(run)()
    print(f"\n{ASKED} times, {answers} answers to the good client")
    assert answers > FAIR * ASKED


@pytest.mark.usefixtures("shared_target")  # which skips where this is not root
def test_it_comes_with_very_many_groups_and_breaks_the_rules() -> None:
    """For either nobody is let in for a while; after the longer one it goes on."""

    def run() -> int:
        become(ALICE, groups=tuple(range(100_000, 100_000 + GROUPS)))
        for _ in range(2 * OFFENCES):
            with Raw(target.address, hello=False) as raw:
                raw.send_bytes(b"?")
                while raw.receive()[0] is not None:
                    pass
        return 2 * OFFENCES

    with Target(rests=True) as target:
        target.good.puts = False  # what it gives back would have the broker look whether it may
        with target.unharmed():
            assert start_fork(run)() == 2 * OFFENCES


def test_it_names_thousands(target: Target) -> None:
    outlast(target, lambda raw: None, ["public/memory"] * NAMED)


def test_many_short_turns_are_as_one_long_turn(target: Target) -> None:
    """Of a flood the broker takes up so much that it is idle most of the time, and something of
    each of the sessions that make it."""
    answers = [0] * SESSIONS

    def run() -> list[int]:
        become(ALICE)
        with ExitStack() as stack:
            flood = [stack.enter_context(Raw(target.address, puts=False)) for _ in answers]
            numbers = {raw.sock.fileno(): number for number, raw in enumerate(flood)}
            for raw in flood:
                raw.send(BORROW, 1, "public/memory", *SHARED)
            cpu, began = target.cpu_seconds(), time.monotonic()
            while sum(answers) < FLOOD:
                for sock in select.select(list(numbers), [], [], PATIENCE)[0]:
                    number = numbers[sock]
                    message, fds = flood[number].receive()
                    for fd in fds:
                        os.close(fd)
                    seq = 2 * answers[number] + 1
                    assert message is not None
                    assert message[:2] == [0, seq]
                    flood[number].send(RETURN, seq + 1)
                    flood[number].send(BORROW, seq + 2, "public/memory", *SHARED)
                    answers[number] += 1
            used = (target.cpu_seconds() - cpu) / (time.monotonic() - began)
        return [round(100 * used), *answers]

    with alone(target):
        used, *each = start_fork(run)()
    print(f"\n{used} % of a CPU used, {min(each)} to {max(each)} answers to each session")
    assert min(each) > max(each) / 10
    assert used < 60


def test_many_sessions_that_are_ready_all_the_time(target: Target) -> None:
    """The broker does not look at all of them for each request that it takes up."""

    def run() -> int:
        become(ALICE)
        with ExitStack() as stack:
            crowd = []
            for _ in range(3 * SESSIONS):
                crowd.append(stack.enter_context(Raw(target.address, puts=False)))
                time.sleep(0.002)  # so slowly that it is not put off for it
            for raw in crowd:
                raw.sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        raw.send(RETURN, 0)  # an old message: it is ignored
            return cpu_percent(target, seconds=1.0)

    with alone(target):
        used = start_fork(run)()
    print(f"\n{used} % of a CPU used")
    assert used < 60


def test_who_comes_and_goes_all_the_time(target: Target) -> None:
    """It has no more of the broker for that, and is not locked out for long afterwards."""
    deadline = time.monotonic() + 1.5

    def come_and_go() -> None:
        become(ALICE)
        while time.monotonic() < deadline:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(target.address)

    with alone(target):
        waits = [start_fork(come_and_go) for _ in range(2)]
        used = cpu_percent(target, seconds=1.0)
        for wait in waits:
            wait()
        begun = time.monotonic()
        in_fork(lambda: (become(ALICE), Raw(target.address).sock.close()))
    locked_out = time.monotonic() - begun
    print(f"\n{used} % of a CPU used, then let in after {locked_out:.2f} s")
    assert used < 60
    assert locked_out < 1.5


def test_who_is_put_off_and_shuts_down_again_and_again(target: Target) -> None:
    """Each time the kernel tells us so; we look once."""

    def run() -> int:
        become(ALICE)
        with ExitStack() as stack:
            crowd = [stack.enter_context(Raw(target.address)) for _ in range(3 * SESSIONS)]
            for _ in range(20):  # it is put off by that
                for raw in crowd:
                    raw.send(CANCEL, 0)
            cpu, began = target.cpu_seconds(), time.monotonic()
            while time.monotonic() < began + 1.0:
                for raw in crowd:
                    with contextlib.suppress(OSError):
                        raw.sock.shutdown(socket.SHUT_RDWR)
            return round(100 * (target.cpu_seconds() - cpu))

    with alone(target):
        used = start_fork(run)()
    print(f"\n{used} % of a CPU used")
    assert used < 30


@contextlib.contextmanager
def alone(target: Target) -> Iterator[None]:
    """The good client asks for nothing, since that takes time as well; after it it is answered."""
    before = target.good.answers
    with target.good.rests():
        yield
    wait_until(lambda: target.good.answers >= before + ANSWERS)


def cpu_percent(target: Target, seconds: float) -> int:
    """Of one CPU, that the broker uses for so long."""
    cpu, began = target.cpu_seconds(), time.monotonic()
    time.sleep(seconds)
    return round(100 * (target.cpu_seconds() - cpu) / (time.monotonic() - began))
