"""What all actors have in common: they do their steps one after the other, and tell of faults."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import support

import fdbroker

from . import stage
from .board import Board, WrongAnswer
from .plan import Actor
from .stage import Looks

TOLD = 3  # the exit status of who has told what was wrong
PR_SET_PDEATHSIG = 1  # linux/prctl.h
libc = ctypes.CDLL(None, use_errno=True)


def become(role: str) -> None:
    """The uid of a role, for good; and nobody outlives who made it."""
    if stage.RULED:
        support.become(stage.uid_of(role))
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of uid clears it (prctl(2))


class Cast:
    """An actor at work.  `steps` has a method for each kind of step, by its name."""

    steps: ClassVar[dict[str, str]] = {}

    def __init__(
        self, actor: Actor, index: int, address: str, board: Board, expected: dict[str, Looks]
    ) -> None:
        self.actor = actor
        self.number = actor.number
        self.index = index  # its row of the board
        self.address = address
        self.board = board
        self.patience = board.patience
        self.expected = expected
        self.client = fdbroker.Client(address)
        self.at = 0
        self.right = 0
        self.slowest = 0

    def run(self) -> bool:
        """Do step after step until the board says stop.  False: something was wrong."""
        done = 0
        while not self.board.stopped:
            step = self.actor.steps[done % len(self.actor.steps)]
            self.at = done
            self.note()
            kind, *needs = step
            try:
                getattr(self, kind.replace("-", "_"))(*needs)
            except BaseException as error:
                self.tell(step, error)
                return False
            self.board.add(self.index, kind)
            done += 1
        self.note()
        self.client.close()
        gc.collect()
        return True

    def note(self) -> None:
        self.board.note(self.index, step=self.at, right=self.right, slowest=self.slowest)

    def tell(self, step: Any, error: BaseException) -> None:
        where = "".join(traceback.format_tb(error.__traceback__)[-2:])
        self.board.tell(self.actor.name, step, f"{type(error).__name__}: {error}\n{where}")

    # --- checks ---

    def check(self, condition: object, otherwise: str) -> None:
        """One more answer that was right, or `WrongAnswer`."""
        if not condition:
            raise WrongAnswer(otherwise)
        self.right += 1

    def refuses(
        self, error: type[Exception], call: Callable[..., Any], *arguments: Any, **named: Any
    ) -> Any:
        """Check that the call raises exactly that: the error."""
        try:
            result = call(*arguments, **named)
        except error as refusal:
            self.check(type(refusal) is error, f"{refusal!r} instead of {error.__name__}")
            return refusal
        if isinstance(result, fdbroker.Loan):
            result.close()
        raise WrongAnswer(f"{call.__name__}{arguments} was granted, instead of {error.__name__}")

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        """Check that it comes true, in time."""
        deadline = time.monotonic() + self.patience
        while not condition():
            if time.monotonic() > deadline:
                raise WrongAnswer(f"after {self.patience} s still not: {what}")
            time.sleep(0.002)
        self.right += 1

    def pause(self, milliseconds: float) -> None:
        if milliseconds:
            time.sleep(milliseconds / 1000)


# --- forks of actors ---


@contextlib.contextmanager
def pipe() -> Iterator[tuple[io.FileIO, io.FileIO]]:
    """Both ends of a pipe, closed at the end if they were not before."""
    reader, writer = os.pipe()
    with io.FileIO(reader) as one, io.FileIO(writer, "w") as other:
        yield one, other


def fork(run: Callable[[], object]) -> int:
    """A child that does that and ends, without a word if it is killed: its pid."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            run()
            status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def die() -> None:
    """At once, with nothing of Python's own."""
    os.kill(os.getpid(), signal.SIGKILL)
