"""What is attacked: a broker process, which others need meanwhile and which must not change by it.

Every test of this folder stands on a `Target`, and each looks at the same five things:

* **The good client**, a process of a uid of its own, borrows, puts and asks all the time.  It looks
  at what it gets (inode and contents), and every attack goes on until it was answered.
* **The broker's descriptors**: where they lead is the same after the attack as it was before.
* **Its sessions**, loans, entries, waits and jobs: so are their numbers, and nobody who has gone
  has anything left on account.
* **Its memory** does not grow by what an attack does again and again.
* **Its log** says why, one line for each, and has no mistake of the broker's own in it.

Attackers are forked children that become another user: so they need not be allowed to read the
interpreter, and the kernel counts what they do against that uid.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from support import (
    PATIENCE,
    become,
    can_refuse_descriptors,
    cpu_seconds,
    memory_of,
    start_fork,
    targets,
    wait_until,
)

import fdbroker
from fdbroker.errors import TooManyInFlight
from fdbroker.ipc.client.client import forget_client_at
from fdbroker.ipc.client.pool import disconnect_all

ALICE, BOB, CAROL, EVE, KEEPER = range(65_520, 65_525)  # uids; nobody has an account for them
TESTS = Path(__file__).parents[1]
GROWTH = 1 << 20  # bytes that the broker may grow by in an attack, after it has seen it once
SLOWEST = 2.0  # seconds that an answer may take, on a machine that does much else
ANSWERS = 25  # that the good client must have had during each attack
CONTENTS = b"what the good client has to find in there"
COMPLAINTS = "Traceback", "event=error", "event=job-failed", "event=bad-log", "event=close-failed"
COUNTS = "sessions", "entries", "loans", "waiting", "jobs", "connections"

CONFIG = f"""
[server]
mode = "0666"
drain = 1

[entry."good/file"]
open = "%s/file:rw"

[entry."public/memory"]
memfd = 4096

[entry."public/busy"]
memfd = 4096

[[rule]]  # the attackers: they may put what and where they like, and borrow that
uid = {ALICE}
names = ["public/*", "alice/*", ""]
verbs = ["borrow", "put", "retire", "list"]

[[rule]]
uid = {BOB}
names = ["public/*", "bob/*"]
verbs = ["borrow", "put", "retire", "list"]

[[rule]]  # nobody, but so the groups of everybody are looked at
gid = 64_029
names = ["staff/*"]
verbs = ["borrow"]

[[rule]]  # the good client
uid = {CAROL}
names = ["good/*"]
verbs = ["borrow", "put", "retire", "list"]
"""


def unshare(what: int) -> None:
    """unshare(2), which Python has from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(what) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


class Target:
    """A broker process, its folder, its log, and a client of its own uid to ask it questions.

    uid: that it runs as.  limit: its RLIMIT_NOFILE.  passes_rights: the kernel has no
    SO_PASSRIGHTS, it believes.  pid_namespace: it is in one of its own.  patience: the seconds in
    which one must say hello, or read.
    """

    def __init__(
        self,
        *,
        uid: int = 0,
        limit: int = 0,
        passes_rights: bool = False,
        pid_namespace: bool = False,
        patience: float = 0.0,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fdbroker-hostile-"))
        self.folder.chmod(0o711)
        self.address = str(self.folder / "socket")
        (self.folder / "file").write_bytes(CONTENTS)
        (self.folder / "config").write_text(CONFIG % self.folder)
        for path in (self.folder, self.folder / "file"):
            os.chown(path, uid, uid)
        how = {
            "uid": uid,
            "limit": limit,
            "passes_rights": passes_rights,
            "pid_namespace": pid_namespace,
            "patience": patience,
        }
        serve = ["serve", "--socket", self.address, "--config", str(self.folder / "config")]
        ready, told = os.pipe()
        with open(self.folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-W", "error", "-m", "hostile.serving", json.dumps(how)),
                    *(*serve, "--ready-fd", str(told)),
                ],
                env=os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
                stderr=log,
                pass_fds=[told],
            )
        os.close(told)
        with open(ready, "rb") as file:
            if file.read(1) != b"\n":
                self._process.kill()
                self._process.wait()
                raise AssertionError((self.folder / "log").read_text())
        self.pid = self._process.pid
        if pid_namespace:
            (self.pid,) = children_of(self.pid)
        self.client = fdbroker.Client(self.address)
        self.counts()  # so that it has its session
        self.refuses = can_refuse_descriptors() and not passes_rights
        self.good = Good(self)
        self.volume = 1  # how many times as often everything is done

    # --- what it looks like ---

    def memory(self) -> int:
        """See `memory_of`."""
        return memory_of(self.pid)

    def cpu_seconds(self) -> float:
        """That it has used so far."""
        return cpu_seconds(self.pid)

    def counts(self) -> dict[str, int]:
        """How many there are of what a client can make."""
        stats = self.client.stats()
        counts = {name: stats[name] for name in COUNTS}
        return counts | {"users": len(self.client.usage())}

    def log(self) -> list[str]:
        """Its lines so far."""
        return (self.folder / "log").read_text().splitlines()

    def told(self, why: str) -> int:
        """How many lines say that, with those for which its log had no room."""
        lines = self.log()
        lost = sum(int(line.partition("count=")[2]) for line in lines if "log-lines-lost" in line)
        return sum(why in line for line in lines) + lost

    # --- before and after ---

    @contextlib.contextmanager
    def unharmed(self) -> Iterator[Target]:
        """It is attacked in the block, and as it was before afterwards."""
        begun = len(self.log())
        wait_until(lambda: self.counts()["connections"] == 1)
        counts, files = self.counts(), targets(self.pid)
        with self.good.served():
            yield self
        try:
            wait_until(lambda: (self.counts(), targets(self.pid)) == (counts, files))
        except AssertionError:
            assert (self.counts(), targets(self.pid)) == (counts, files)
        for line in self.log()[begun:]:
            assert line.startswith("fdbroker: event="), line
            assert line.isprintable(), line
            assert not any(complaint in line for complaint in COMPLAINTS), line

    def attack(
        self,
        strike: Callable[[str], object],
        *,
        rounds: int = 25,
        processes: int = 2,
        uid: int = ALICE,
        why: str = "",
        lines: int = 1,
        growth: int = GROWTH,
    ) -> None:
        """Have processes of `uid` call `strike(address)` so often, and for as long as it takes the
        good client to be answered.

        why: what the log says, `lines` times for each strike.  growth: bytes, less than which the
        broker may grow by.
        """
        told = self.told(why)
        done = self._strike(strike, uid, min(rounds, 4), 1, 0)
        self.settle()
        # A leak grows each time.  What the allocator keeps for the workers' threads does so once.
        for _ in range(2):
            memory = self.memory()
            done += self._strike(strike, uid, rounds * self.volume, processes, ANSWERS)
            self.settle()
            grown = self.memory() - memory
            if grown < growth:
                break
        assert grown < growth
        if why:
            wait_until(lambda: self.told(why) - told >= done * lines)
            assert self.told(why) - told == done * lines

    def settle(self) -> None:
        """Wait until it has done with all but the good client."""
        wait_until(lambda: self.counts()["connections"] <= 1 + Good.SESSIONS)

    def _strike(
        self, strike: Callable[[str], object], uid: int, rounds: int, processes: int, answers: int
    ) -> int:
        enough = self.good.answers + answers

        def run() -> int:
            become(uid)
            done, deadline = 0, time.monotonic() + 4 * PATIENCE  # for all of them
            while done < rounds or self.good.answers < enough:
                try:
                    strike(self.address)
                except BaseException as error:  # which is told to another process, without those
                    error.add_note(traceback.format_exc())
                    error.add_note("\n".join(self.log()[-9:]))
                    raise
                done += 1
                assert time.monotonic() < deadline, f"{done} strikes, {self.good.answers} answers"
            return done

        return sum(in_each(run, processes))

    # --- its end ---

    def close(self) -> None:
        """End it; what it has said until then is looked at where it was attacked."""
        self.client.close()
        forget_client_at(self.address)
        disconnect_all(self.address)
        self.good.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        try:
            status = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            said = (self.folder / "log").read_text()
            shutil.rmtree(self.folder)
        assert status == 0, said

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Good:
    """A process that uses the broker as one should, and sees whether it is served rightly."""

    SESSIONS = 3  # that it has at most

    def __init__(self, target: Target) -> None:
        self._target = target
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)  # shared with the processes forked later
        self._numbers = memoryview(self._memory).cast("q")
        self.puts = True  # and has opened anew: not where there is no room for that
        self.retries = False  # where it is told to

    @property
    def answers(self) -> int:
        """How many it has had, all of them right."""
        return self._numbers[0]

    @property
    def refused(self) -> int:
        """How often it was told to try again."""
        return self._numbers[4]

    @property
    def slowest(self) -> float:
        """The seconds that the slowest one took, of those since this was asked last."""
        nanoseconds, self._numbers[1] = self._numbers[1], 0
        return nanoseconds / 1e9

    @contextlib.contextmanager
    def rests(self) -> Iterator[None]:
        """It asks for nothing during the block."""
        self._numbers[3] = 1
        answers = -1
        while answers != self.answers:
            answers = self.answers
            time.sleep(0.05)
        try:
            yield
        finally:
            self._numbers[3] = 0

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """It runs during the block, and must have been answered all the time."""
        self._numbers[1] = self._numbers[2] = 0
        before = self.answers
        wait = start_fork(self._run)
        try:
            wait_until(lambda: self.answers > before)
            before = self.answers
            yield
            assert self.answers - before >= ANSWERS, "the good client was not served meanwhile"
        finally:
            self._numbers[2] = 1
            wait()
        slowest = self.slowest
        print(f"\n{self.answers - before} answers meanwhile, the slowest in {slowest * 1e3:.1f} ms")
        assert slowest < SLOWEST

    def close(self) -> None:
        """Its memory."""
        self._numbers.release()
        self._memory.close()

    def _run(self) -> None:
        become(CAROL)
        inode = os.stat(self._target.folder / "file").st_ino
        with fdbroker.Client(self._target.address) as client:
            while not self._numbers[2]:
                for mode in (None, None, None, None, *["r"] * self.puts):
                    self._ask(lambda mode=mode: look_at_file(client, inode, mode))
                if self.puts:
                    self._ask(lambda: put_and_borrow(client))
                self._ask(lambda: look_at_list(client))
                time.sleep(0.001)  # it is no flood itself
                while self._numbers[3]:
                    time.sleep(0.01)

    def _ask(self, question: Callable[[], object]) -> None:
        before = time.monotonic_ns()
        while True:
            try:
                question()
                break
            except TooManyInFlight:
                if not self.retries:
                    raise
                self._numbers[4] += 1
                time.sleep(0.01)
        self._numbers[1] = max(self._numbers[1], time.monotonic_ns() - before)
        self._numbers[0] += 1


def look_at_file(client: fdbroker.Client, inode: int, mode: str | None) -> None:
    with client.borrow("good/file", mode=mode) as loan:
        assert os.fstat(loan.fileno()).st_ino == inode
        assert os.pread(loan.fileno(), 100, 0) == CONTENTS


def put_and_borrow(client: fdbroker.Client) -> None:
    number = os.memfd_create("good")
    try:
        os.write(number, CONTENTS)
        client.put("good/memory", number)
        with client.borrow("good/memory") as loan:
            assert os.path.sameopenfile(loan.fileno(), number)
        client.retire("good/memory")
    finally:
        os.close(number)


def look_at_list(client: fdbroker.Client) -> None:
    listed = {entry.name for entry in client.entries()}
    assert "good/file" in listed
    assert listed <= {"good/file", "good/memory"}


def in_each(function: Callable[[], Any], processes: int) -> list[Any]:
    """What the function returns in each of so many forked children; what one raises is raised."""
    waits, results, errors = [start_fork(function) for _ in range(processes)], [], []
    for wait in waits:
        try:
            results.append(wait())
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return results


@contextlib.contextmanager
def meanwhile(play: Callable[[socket.socket], object]) -> Iterator[socket.socket]:
    """Another process plays during the block, with the other end of a socket; it plays to its end
    after it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def run() -> None:
        ours.close()
        with theirs:
            play(theirs)

    wait = start_fork(run)
    theirs.close()
    ours.settimeout(PATIENCE)
    try:
        with ours:
            yield ours
    finally:
        wait()


def children_of(pid: int) -> set[int]:
    """Its child processes."""
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
