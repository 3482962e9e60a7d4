"""No room: of descriptors, of the whole machine's, of what may be in flight; and clients that sit
on what there is."""

from __future__ import annotations

import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from support import (
    BORROW,
    ENTRIES,
    HELLO,
    MORE,
    RETURN,
    SHARED,
    Raw,
    open_files,
    process_state,
    start_fork,
    stopped,
    wait_until,
)

import fdbroker
from fdbroker.ipc.transport.unix_listener import BACKLOG

from .target import ALICE, ANSWERS, BOB, CAROL, KEEPER, SLOWEST, Target, become, meanwhile

pytestmark = pytest.mark.usefixtures("shared_target")  # which skips where this is not root
LOOK = 0.6  # seconds in which the use of a CPU is measured
BUSY = 0.2  # of a CPU: who waits uses less
PROTOCOL_ERROR = 60
MOST = 253
MANY = BACKLOG - 8  # that fit in, so that one more does


@pytest.fixture
def own() -> Iterator[Target]:
    """A broker of the test's own, whose good client needs none of its descriptors."""
    with Target() as target:
        target.good.puts = False
        with target.unharmed():
            yield target


def is_answered(raw: Raw) -> bool:
    return bool(select.select([raw.sock], [], [], 0)[0])


class Crowd:
    """Sessions of another uid, which it opens, and ends, when it is told to."""

    def __init__(self, target: Target, uid: int, stack: ExitStack) -> None:
        def play(test: socket.socket) -> None:
            become(uid)
            with ExitStack() as sessions:
                raws: list[Raw] = []
                while told := test.recv(100):
                    if told == b"come":
                        raw = sessions.enter_context(Raw(target.address, hello=False))
                        raw.send(HELLO, 0, 1, False)
                        raws.append(raw)
                    elif told == b"go":
                        raws.pop(0).sock.close()
                    test.send(b"%d" % sum(map(is_answered, raws)))

        self._control = stack.enter_context(meanwhile(play))

    def _tell(self, what: bytes) -> int:
        self._control.send(what)
        return int(self._control.recv(100))

    def come(self, number: int) -> None:
        for _ in range(number):
            self._tell(b"come")

    def go(self) -> None:
        """The one that came first ends its session."""
        self._tell(b"go")

    def served(self) -> int:
        """How many of those that are there have had an answer to their hello."""
        return self._tell(b"?")


def look_at_cpu(target: Target) -> None:
    """While the good client rests, it does nothing."""
    with target.good.rests():
        before, since = target.cpu_seconds(), time.monotonic()
        time.sleep(LOOK)
        used = (target.cpu_seconds() - before) / (time.monotonic() - since)
    print(f"\nwithout room the broker uses {used:.0%} of a CPU")
    assert used < BUSY


def test_no_descriptor_left(own: Target) -> None:
    """EMFILE at accept: who is in is served, who comes waits in the queue and is let in as soon as
    anyone leaves, while there is no more room than before."""
    with ExitStack() as stack:
        inside, outside = Crowd(own, ALICE, stack), Crowd(own, BOB, stack)
        inside.come(6)
        wait_until(lambda: inside.served() == 6)
        soft, hard = resource.prlimit(own.pid, resource.RLIMIT_NOFILE)
        lowest_free = min(set(range(soft)) - set(open_files(own.pid)))
        resource.prlimit(own.pid, resource.RLIMIT_NOFILE, (lowest_free, hard))
        outside.come(6)
        answers = own.good.answers
        look_at_cpu(own)
        assert outside.served() == 0
        for number in range(1, 7):
            inside.go()
            wait_until(lambda number=number: outside.served() == number)
        wait_until(lambda: own.good.answers >= answers + ANSWERS)
        resource.prlimit(own.pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert 1 <= own.told("event=accept-paused error='Too many open files'") <= 8


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_no_file_left_in_the_system(own: Target) -> None:
    """ENFILE at accept, which ends without anybody telling.  It is of the whole machine, so only
    the broker is told so, by a tracer."""
    inject = ["-e", "trace=accept4", "-e", "inject=accept4:error=ENFILE", "-o", os.devnull]
    with ExitStack() as stack:
        inside, outside = Crowd(own, ALICE, stack), Crowd(own, BOB, stack)
        inside.come(3)
        wait_until(lambda: inside.served() == 3)
        strace = stack.enter_context(
            subprocess.Popen(["strace", "-qq", "-p", str(own.pid), *inject])
        )
        status = Path(f"/proc/{own.pid}/status")
        wait_until(lambda: f"TracerPid:\t{strace.pid}\n" in status.read_text())
        outside.come(3)
        answers = own.good.answers
        look_at_cpu(own)
        inside.go()  # somebody leaves: it tries again, in vain
        wait_until(lambda: own.good.answers >= answers + ANSWERS)
        assert outside.served() == 0
        strace.send_signal(signal.SIGINT)
        strace.wait()
        wait_until(lambda: outside.served() == 3)
    assert own.told("event=accept-paused error='Too many open files in system'") == 1


@pytest.mark.parametrize("seconds", [1, pytest.param(8, marks=pytest.mark.long)])
def test_sixty_clients_and_few_descriptors(seconds: int) -> None:
    """They come again and again, for a broker that has room for a third of them at most."""
    with Target(limit=40) as target:
        target.good.puts = False
        with target.unharmed():

            def strike(address: str) -> None:
                with ExitStack() as stack:
                    for _ in range(30):
                        raw = stack.enter_context(Raw(address, hello=False))
                        raw.sock.settimeout(0.02)
                        with suppress(TimeoutError):
                            with suppress(BrokenPipeError):  # it was turned away already
                                raw.send(HELLO, 0, 1, False)
                            message, _ = raw.receive()
                            if message == [0, 0, 1]:
                                os.close(raw.borrow(1, "public/memory"))

            until = time.monotonic() + seconds
            while time.monotonic() < until:
                for uid in (ALICE, BOB):
                    target.attack(strike, rounds=2, uid=uid)
            assert target.told("event=refused") > 0
            listed = {entry.name for entry in target.client.entries()}
            assert listed == {"good/file", "public/memory", "public/busy"}


def test_who_receives_nothing_is_the_only_one_refused() -> None:
    """Its sessions may have half of what can be in flight, for a broker that is not root."""
    with Target(uid=KEEPER, limit=150) as target:
        target.good.puts = False

        def strike(address: str) -> None:
            with ExitStack() as stack:
                for _ in range(10):
                    raw = stack.enter_context(Raw(address))
                    raw.send(BORROW, 1, ["public/memory"] * 70, *SHARED)
                    wait_until(lambda raw=raw: is_answered(raw))

        with target.unharmed():
            target.attack(strike, rounds=10)
        assert target.told("event=not-sent") == 0
        assert target.told("of the 75 inflight") >= 50


def test_too_many_in_flight_for_an_unprivileged_broker() -> None:
    """ETOOMANYREFS: what others of the broker's own uid have in flight counts against it, and while
    that is more than its RLIMIT_NOFILE the kernel refuses it every send.  Who is refused is told,
    has nothing on loan, and may try again; that goes well once it was received."""
    with Target(uid=KEEPER, limit=150) as target:
        target.good.puts, target.good.retries = False, True

        def play(test: socket.socket) -> None:
            become(KEEPER)
            while test.recv(100):
                sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with sender, receiver:
                    socket.send_fds(sender, [b"x"], [0] * 200)
                    test.send(b"held")
                    test.recv(100)
                test.send(b"gone")

        with target.unharmed(), meanwhile(play) as attacker:
            for _ in range(10):
                refused, answers = target.good.refused, target.good.answers
                attacker.send(b"hold")
                assert attacker.recv(100) == b"held"
                wait_until(lambda refused=refused: target.good.refused > refused)
                assert target.client.loans("public/memory") == []
                attacker.send(b"let go")
                assert attacker.recv(100) == b"gone"
                wait_until(lambda answers=answers: target.good.answers >= answers + 5)
        assert target.told("event=not-sent") >= 10


@pytest.mark.parametrize("offence", ["no message", "no hello", "silence"])
def test_a_queue_full_of_offenders(offence: str) -> None:
    """Who comes after them is let in all the same, and soon."""
    with Target() as target, target.unharmed():

        def flood(test: socket.socket) -> None:
            become(ALICE)
            with ExitStack() as stack:
                test.recv(100)
                for _ in range(MANY):
                    sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                    sock.setblocking(False)
                    sock.connect(target.address)
                    if offence == "no message":
                        sock.send(b"\xc1")
                    elif offence == "no hello":
                        sock.send(b"\x93\x01\x01\x01")
                test.send(b"all are there")
                test.recv(100)

        def come() -> None:
            become(CAROL)
            begun = time.monotonic()
            with fdbroker.Client(target.address) as client, client.borrow("good/file"):
                assert time.monotonic() - begun < SLOWEST

        with meanwhile(flood) as attacker:
            with stopped(target.pid):
                attacker.send(b"come")
                assert attacker.recv(100) == b"all are there"
                newcomer = start_fork(come)
                wait_until(lambda: queued(target.address) > MANY)
            newcomer()
            answers = target.good.answers
            wait_until(lambda: target.good.answers >= answers + ANSWERS)


def queued(path: str) -> int:
    """How many have connected there, and were not accepted (unix_diag, as ss(8) shows it)."""
    shown = subprocess.run(["ss", "-xlHn", "src", path], capture_output=True, text=True, check=True)
    return int(shown.stdout.split()[2])


# --- clients that do nothing --------------------------------------------------------------------


def test_who_never_reads(target: Target) -> None:
    """Its answers are queued up to a bound; then its session ends."""

    def strike(address: str) -> None:
        with Raw(address) as raw:
            raw.sock.setblocking(False)
            poll = select.poll()
            poll.register(raw.sock, select.POLLOUT)
            seq = 0
            while not poll.poll(20_000)[0][1] & select.POLLHUP:
                with suppress(BlockingIOError, BrokenPipeError):
                    seq += 1
                    raw.send(ENTRIES, seq, 0)
            assert seq > 10

    target.attack(strike, rounds=3, why="event=ended")


@pytest.mark.parametrize(
    ("patience", "silent"), [(0.5, 20), pytest.param(0, 200, marks=pytest.mark.long)]
)
def test_who_says_nothing(patience: float, silent: int) -> None:
    """Its connection ends at the deadline; also if it says hello, and reads no descriptor."""
    with Target(patience=patience) as target, target.unharmed():

        def sit(test: socket.socket) -> None:
            become(ALICE)
            with ExitStack() as stack:
                raws = [Raw(target.address, hello=False) for _ in range(silent)]
                for raw in raws:
                    stack.enter_context(raw)
                for raw in raws:
                    assert raw.receive() == (None, [])
                slow = stack.enter_context(Raw(target.address))
                for seq in (1, 3):
                    slow.send(BORROW, seq, "public/memory", *SHARED)
                    slow.send(RETURN, seq + 1)
                poll = select.poll()
                poll.register(slow.sock, select.POLLRDHUP)
                assert poll.poll(20_000)

        with meanwhile(sit):
            pass
        wait_until(lambda: target.told("it-said-no-hello") == silent)
        wait_until(lambda: target.told("it-does-not-read") == 1)


def test_who_is_stopped(target: Target) -> None:
    """With a loan, in the line, and with answers unread: the others go on, and all is back when
    it is killed.  (Its queue holds one message with descriptors, however much it has asked for.)"""

    def sit(test: socket.socket) -> None:
        become(ALICE)
        with ExitStack() as stack:
            raws = [stack.enter_context(Raw(target.address)) for _ in range(10)]
            raws[0].borrow(1, "public/memory")
            raws[1].send(BORROW, 1, "public/busy", 1, None, "")
            raws[2].send(BORROW, 1, "public/busy", *SHARED)
            for raw in raws[3:5]:  # of more its uid would have too many in flight
                raw.send(BORROW, 1, ["public/memory"] * 300, 0, None, "")
                raw.send(MORE, 2, MOST)
                raw.send(RETURN, 3)
                raw.send(BORROW, 4, "public/memory", *SHARED)
            for raw in raws[5:]:
                raw.send(BORROW, 1, "public/memory", *SHARED)
                raw.send(RETURN, 2)
                raw.send(BORROW, 3, "public/memory", *SHARED)
            test.send(b"%d" % os.getpid())
            test.recv(1)
            for raw in raws:
                raw.sock.close()

    with meanwhile(sit) as first, meanwhile(sit) as second:
        pids = [int(other.recv(100)) for other in (first, second)]
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
                wait_until(lambda pid=pid: process_state(pid) == "T")
            enough = target.good.answers + 4 * ANSWERS
            wait_until(lambda: target.good.answers >= enough)
            wait_until(lambda: target.counts()["loans"] >= 2 * 8)
            assert target.counts()["waiting"] >= 2
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
