"""Attackers whose requests take as long as they can: the good client is answered in between.

The broker works on as long as anybody asks for something, so nothing is said of how busy it is.
What holds is that users take turns: while one long item of the attacker is served the good client
waits, and then it is the good client's turn.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

from support import BORROW, CANCEL, ENTRIES, PATIENCE, RETURN, SHARED, Raw, start_fork

import fdbroker

from .target import ALICE, ANSWERS, BOB, SLOWEST, Target, become

ASKED = 60  # times by the attacker
# An answer to the good client may take several requests, each of which waits for a long one.
LEAST = ASKED // 2
WATCHES = 40_000  # of one session
FILES = 2_000  # numbers of one file, which an epoll may watch each
NAMED = 3_000
SESSIONS = 100
FLOOD = 4_000  # answers
GROUPS = 65_000  # NGROUPS_MAX is 65,536
SECONDS = 1.5  # for which an attack goes on


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
    print(f"\n{ASKED} long requests, {answers} answers to the good client")
    assert answers >= LEAST


def test_session_that_many_epolls_watch_lets_others_be_served(target: Target) -> None:
    """The kernel tells each of them of each message, in the broker's thread."""

    def watch(raw: Raw) -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        numbers = [os.dup(raw.sock.fileno()) for _ in range(FILES)]
        for _ in range(WATCHES // FILES):
            watcher = select.epoll()
            # It stays.
            os.dup(watcher.fileno())
            for number in numbers:
                watcher.register(number, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    outlast(target, watch, "public/memory")


def test_requests_for_thousands_of_names_let_others_be_served(target: Target) -> None:
    outlast(target, lambda raw: None, ["public/memory"] * NAMED)


def test_newcomers_with_very_many_groups_let_others_be_served(target: Target) -> None:
    """The broker looks at the groups, since there is a rule for a group."""

    def run() -> int:
        become(ALICE, groups=tuple(range(100_000, 100_000 + GROUPS)))
        before = target.good.answers
        for _ in range(ASKED):
            Raw(target.address, puts=False).sock.close()
        return target.good.answers - before

    answers = start_fork(run)()
    print(f"\n{ASKED} newcomers, {answers} answers to the good client")
    assert answers >= LEAST


def test_newcomers_with_very_many_groups_that_send_junk_let_others_be_served(
    target: Target,
) -> None:
    def run() -> int:
        become(ALICE, groups=tuple(range(100_000, 100_000 + GROUPS)))
        before = target.good.answers
        for _ in range(ASKED):
            with Raw(target.address, hello=False) as raw:
                raw.send_bytes(b"?")
                while raw.receive()[0] is not None:
                    pass
        return target.good.answers - before

    assert start_fork(run)() >= LEAST


def test_flood_of_short_requests_lets_others_be_served_and_each_session_of_it(
    target: Target,
) -> None:
    def run() -> tuple[int, list[int]]:
        become(ALICE)
        before, answers = target.good.answers, [0] * SESSIONS
        with ExitStack() as stack:
            flood = [stack.enter_context(Raw(target.address, puts=False)) for _ in answers]
            numbers = {raw.sock.fileno(): number for number, raw in enumerate(flood)}
            for raw in flood:
                raw.send(BORROW, 1, "public/memory", *SHARED)
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
        return target.good.answers - before, answers

    good, each = start_fork(run)()
    print(f"\n{good} answers to the good client, {min(each)} to {max(each)} to each session")
    assert good >= ANSWERS
    assert min(each) > max(each) / 10


def test_hundreds_of_sessions_that_always_have_a_message_let_others_be_served(
    target: Target,
) -> None:
    """Each of them is served, too, when it asks for something."""

    def run() -> int:
        become(ALICE)
        with ExitStack() as stack:
            crowd = [
                stack.enter_context(Raw(target.address, puts=False)) for _ in range(3 * SESSIONS)
            ]
            before, deadline = target.good.answers, time.monotonic() + SECONDS
            while time.monotonic() < deadline:
                for raw in crowd:
                    with contextlib.suppress(BlockingIOError):
                        # An old message: it is ignored.
                        raw.sock.send(b"\x92\x03\x00", socket.MSG_DONTWAIT)
            answers = target.good.answers - before
            for raw in crowd:
                raw.send(ENTRIES, 1, 0)
            for raw in crowd:
                message, _ = raw.receive()
                assert message is not None
                assert message[:2] == [0, 1]
            return answers

    answers = start_fork(run)()
    print(f"\n{answers} answers to the good client in {SECONDS} s")
    assert answers >= ANSWERS


def test_clients_that_come_and_go_all_the_time_lock_nobody_out(target: Target) -> None:
    """A newcomer of another uid is let in while they do, and one of their own afterwards."""
    deadline = time.monotonic() + SECONDS

    def come_and_go() -> None:
        become(ALICE)
        while time.monotonic() < deadline:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(target.address)

    def come(uid: int) -> float:
        become(uid)
        begun = time.monotonic()
        # It waits where the listener's queue is full.
        with fdbroker.Client(target.address) as client:
            client.entries()
        return time.monotonic() - begun

    waits = [start_fork(come_and_go) for _ in range(2)]
    waited = []
    while time.monotonic() < deadline:
        waited.append(start_fork(lambda: come(BOB))())
    for wait in waits:
        wait()
    own = start_fork(lambda: come(ALICE))()
    print(f"\n{len(waited)} newcomers, let in after {max(waited):.3f} s at most, then {own:.3f} s")
    assert max(*waited, own) < SLOWEST


def test_sessions_that_are_shut_down_again_and_again_let_others_be_served(target: Target) -> None:
    """The kernel tells the broker of each shutdown; it looks once."""

    def run() -> int:
        become(ALICE)
        with ExitStack() as stack:
            crowd = [stack.enter_context(Raw(target.address)) for _ in range(3 * SESSIONS)]
            for _ in range(20):
                for raw in crowd:
                    raw.send(CANCEL, 0)
            before, deadline = target.good.answers, time.monotonic() + SECONDS
            while time.monotonic() < deadline:
                for raw in crowd:
                    with contextlib.suppress(OSError):
                        raw.sock.shutdown(socket.SHUT_RDWR)
            return target.good.answers - before

    assert start_fork(run)() >= ANSWERS


def test_many_at_once_let_others_be_served(target: Target) -> None:
    """Of several users, too, each of which may have a turn before the good client."""

    def run(uid: int) -> None:
        become(uid)
        with Raw(target.address, puts=False) as raw:
            for seq in range(1, 2 * ASKED, 2):
                raw.send(BORROW, seq, ["public/memory"] * (NAMED // 2), *SHARED)
                message, numbers = raw.receive()
                for number in numbers:
                    os.close(number)
                assert message is not None
                assert message[:2] == [0, seq]
                raw.send(RETURN, seq + 1)

    before = target.good.answers
    waits = [start_fork(lambda uid=uid: run(uid)) for uid in (ALICE, BOB)]
    for wait in waits:
        wait()
    assert target.good.answers - before >= LEAST
