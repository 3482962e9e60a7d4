"""Runs of pytest, each in a child that is forked from a process which has imported pytest already.

A child has a session of its own (so Ctrl-C reaches the parent alone, which ends them all) and tells
through a pipe which test it begins.  A test that takes much more of the processor than it did with
the code as it is, or does not come to its end, is endless: the child's whole session is killed.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import hypothesis
import hypothesis.stateful
import pytest

COLLECTING = 20.0  # seconds of the processor
SLACK, TIMES = 3.0, 5.0  # seconds of the processor, and times its own time, that a test may take
WAITING = 30.0  # seconds more that it may take in all: other programs are running, too
MEMORY = 3 << 30  # bytes of a child's address space: an endless loop may be one that appends

hypothesis.settings.register_profile(
    "mutation",
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # it fails: why is all one
    suppress_health_check=list(hypothesis.HealthCheck),
)


class Result(NamedTuple):
    """How a run ended: "passed", "failed" or "endless"; and in which test (0: before them)."""

    how: str
    test: int


class _Chosen:
    """The tests to run, in this order, and who is told of each that begins."""

    def __init__(self, tests: Sequence[str], pipe: int) -> None:
        self.numbers = {test: number for number, test in enumerate(tests, 1)}
        self.pipe = pipe

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self.numbers]
        items.sort(key=lambda item: self.numbers[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        os.write(self.pipe, b"%d\n" % self.numbers[nodeid])


def run_pytest(folder: Path, where: Sequence[str], plugins: Sequence[Any], log: Path) -> int:
    """In a child: all output goes to `log`, and `folder` is where everything is imported from."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    for number in (1, 2):
        os.dup2(output, number)
    os.close(output)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    here = Path(__file__).resolve().parents[2]
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path).resolve() != here)]
    os.environ["PYTHONPATH"] = str(folder)
    os.chdir(folder)
    hypothesis.settings.load_profile("mutation")
    options = ["-q", "-m", "not long", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what the parent imported
    status = int(pytest.main([*options, *where], plugins=plugins))
    sys.stdout.flush()
    return status


class Child:
    """One run of `tests` in `folder`, in a process of its own; `seconds` each should take."""

    def __init__(self, folder: Path, tests: Sequence[str], seconds: Sequence[float]) -> None:
        self.seconds, self.test = seconds, 0
        self.pipe, write = os.pipe()
        where = sorted({test.split("::")[0] for test in tests})
        self.pid = in_child(
            lambda: run_pytest(folder, ["-x", *where], [_Chosen(tests, write)], folder / "log")
        )
        os.close(write)
        os.set_blocking(self.pipe, False)
        self.pidfd = os.pidfd_open(self.pid)
        self.begins(COLLECTING)

    def poll(self) -> Result | None:
        """How it ended, or None: it goes on."""
        with contextlib.suppress(BlockingIOError):
            begun = os.read(self.pipe, 1 << 16).split()
            if begun:
                self.test = int(begun[-1])
                self.begins(SLACK + TIMES * self.seconds[self.test - 1])
        if select.select([self.pidfd], [], [], 0)[0]:
            status = self.end()
            return Result("passed" if status == 0 else "failed", self.test)
        if self.processor_time() > self.budget or monotonic() > self.deadline:
            self.end()
            return Result("endless", self.test)
        return None

    def begins(self, seconds: float) -> None:
        """Something that may take so much of the processor."""
        self.budget = self.processor_time() + seconds
        self.deadline = monotonic() + seconds + WAITING

    def processor_time(self) -> float:
        """Seconds, of all its threads (proc(5): utime and stime)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> int:
        """Kill what is left of its session; its wait status."""
        with contextlib.suppress(ProcessLookupError):  # it has no group before its setsid
            os.killpg(self.pid, signal.SIGKILL)
        os.kill(self.pid, signal.SIGKILL)  # not reaped yet, so it is still itself
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        os.close(self.pipe)
        return status


def in_child(body: Any) -> int:
    """The pid of a fork in which `body` runs; what it returns is the exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            os.setsid()
            status = body()
        except BaseException:
            with contextlib.suppress(BaseException):
                sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return pid


def wait(pid: int) -> int:
    """Its wait status.  An interrupt ends it, too."""
    try:
        return os.waitpid(pid, 0)[1]
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


@contextlib.contextmanager
def ended(children: dict[Any, Child]) -> Iterator[None]:
    """None of the children outlives the block."""
    try:
        yield
    finally:
        for child in children.values():
            child.end()
