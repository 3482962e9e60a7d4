"""The processes of a run: the broker, and the actors that are forked from here.

Whatever is left of them is ended by its pid: orphans come to us as they would to init
(PR_SET_CHILD_SUBREAPER, prctl(2)), so all of them are children sooner or later.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from support import children, cpu_seconds

from .actor import TOLD, Cast, become, fork, libc
from .board import Board
from .dying import Dying
from .good import Good
from .hostile import Hostile
from .plan import Actor
from .stage import Looks

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
ROOT = Path(__file__).parents[2]
CASTS: dict[str, type[Cast]] = {"good": Good, "dying": Dying, "hostile": Hostile}
FILES = 1024  # the broker's limit, and everybody's
READY_SECONDS = 30.0


def adopt_orphans() -> None:
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)


def import_what_actors_need() -> None:
    """Before they are somebody who cannot read it."""
    import difflib
    import encodings.idna  # noqa: F401

    assert difflib


class BrokerProcess:
    """A broker with its recording and its log, in `folder`."""

    def __init__(self, folder: str, recording: str, planted: str) -> None:
        self.address = f"{folder}/broker.sock"
        self.log = f"{folder}/log"
        ready, tell = os.pipe()
        command = [sys.executable, "-W", "error", "-m", "tests.chaos.broker", recording, planted]
        command += ["-v", "serve", "--socket", self.address, "--config", f"{folder}/fdbroker.toml"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*command, "--ready-fd", str(tell)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stderr=log,
                pass_fds=(tell,),
                preexec_fn=limit_files,
            )
        os.close(tell)
        try:
            came, _, _ = select.select([ready], [], [], READY_SECONDS)
            if not came or os.read(ready, 1) != b"\n":
                self.kill()
                raise RuntimeError("the broker did not start:\n" + Path(self.log).read_text())
        finally:
            os.close(ready)
        self.pid = self.process.pid

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def rss(self) -> int:
        """Bytes of memory that it has (proc_pid_statm(5))."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid)

    def end(self) -> int:
        """SIGTERM, and what it ends with."""
        self.process.terminate()
        try:
            return self.process.wait(READY_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return -1

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))


INTERRUPTS = signal.SIGINT, signal.SIGTERM


class Crew:
    """The actors at work, by pid."""

    def __init__(
        self, actors: list[Actor], broker: BrokerProcess, board: Board, expected: dict[str, Looks]
    ) -> None:
        self._broker_pid = broker.pid
        self.working: dict[int, tuple[int, Actor]] = {}
        self.failed: list[str] = []
        self._board = board
        gc.collect()
        sys.stdout.flush()
        # an interrupt within a hook of os.fork would be printed, and be lost (register_at_fork)
        signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
        for index, actor in enumerate(actors):

            def work(index: int = index, actor: Actor = actor) -> None:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # the crew is told by the board
                signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
                become(actor.role)
                cast = CASTS[actor.role](actor, index, broker.address, board, expected)
                if not cast.run():
                    os._exit(TOLD)

            self.working[fork(work)] = index, actor
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)

    def reap(self) -> None:
        """Look who has ended: an actor, or an orphan of one."""
        for pid in children() - {self._broker_pid}:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            _, status = os.waitpid(pid, 0)
            _, actor = self.working.pop(pid, (0, None))
            status = os.waitstatus_to_exitcode(status)
            if actor is not None and status not in (0, TOLD):
                self.failed.append(f"{actor.name} ended with status {status}")

    def wait(self, seconds: float) -> list[str]:
        """Wait until all have come to their end: those who have not, and what they are at."""
        deadline = time.monotonic() + seconds
        while self.working and time.monotonic() < deadline:
            self.reap()
            time.sleep(0.01)
        return [
            f"{actor.name} is stuck at {actor.steps[self._board.step(index) % len(actor.steps)]}"
            for index, actor in self.working.values()
        ]


def end_all(spare: set[int]) -> None:
    """No child of ours is left, and no child of theirs, but for these."""
    while left := children() - spare:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
