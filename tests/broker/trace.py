"""Every descriptor that a process gets or closes, as the kernel sees it: strace(1), replayed."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import open_files, wait_until

MAKERS = ("accept", "accept4", "openat", "open", "dup", "socket", "eventfd2", "memfd_create")
CLOSERS = ("close", "close_range")  # the latter's numbers, first to last, are all open
UNEXPECTED = ("dup2", "dup3", "pipe2", "epoll_create1")
CALL = re.compile(r"(?:(\d+) +)?(?:<\.\.\. )?(\w+)(?: resumed>|\()(.*)")


class Trace:
    """``with Trace(pid, file) as trace``: what happens in the block; then ask."""

    def __init__(self, pid: int, output: Path) -> None:
        self._pid, self._output = pid, output
        self.received = 0
        self.closed = 0  # of those
        self.faults: list[str] = []

    def __enter__(self) -> Trace:
        if (strace := shutil.which("strace")) is None:
            pytest.skip("NOT TESTED: there is no strace, so nobody sees each close")
        calls = ",".join(("recvmsg", *CLOSERS, "fcntl", *MAKERS, *UNEXPECTED))
        self._strace = subprocess.Popen(
            [strace, "-f", "-v", "-o", self._output, "-p", str(self._pid), "-e", f"trace={calls}"],
            stderr=subprocess.PIPE,
        )
        self._open = dict.fromkeys(open_files(self._pid), "before")
        wait_until(lambda: self._is_attached() or self._strace.poll() is not None)
        if self._strace.poll() is not None:
            said = self._strace.communicate()[1].decode()
            pytest.skip(f"NOT TESTED: strace may not look at another process here ({said.strip()})")
        return self

    def _is_attached(self) -> bool:
        tasks = Path(f"/proc/{self._pid}/task")
        return all(
            f"TracerPid:\t{self._strace.pid}\n" in (task / "status").read_text()
            for task in tasks.iterdir()
        )

    def __exit__(self, *_: object) -> None:
        self._strace.send_signal(signal.SIGINT)
        self._strace.communicate()
        self._replay()
        now = set(open_files(self._pid))
        if now != set(self._open):
            self.faults.append(f"open is {sorted(now)}, by the trace it is {sorted(self._open)}")

    def _replay(self) -> None:
        """A number is free when close() begins, and taken when the call that makes it ends."""
        begun: dict[str, str] = {}  # by thread: the arguments so far
        for line in self._output.read_text().splitlines():
            match = CALL.match(line)
            if match is None or line.endswith(("+++", "---")):
                continue
            thread, name, rest = match.groups()
            resumed = "resumed>" in line
            if name in CLOSERS and not resumed:
                arguments = [int(word) for word in re.findall(r"\d+", rest.partition(")")[0])]
                first, last = arguments[0], arguments[name == "close_range"]
                for number in range(first, last + 1):
                    self._close(number, line)
            if rest.endswith("<unfinished ...>"):
                begun[thread] = rest.removesuffix("<unfinished ...>")
                continue
            if resumed:
                rest = begun.pop(thread, "") + rest
            self._ended(name, rest, line)

    def _ended(self, name: str, rest: str, line: str) -> None:
        result = int(re.search(r"\) += (-?\d+)", rest)[1])
        if name in CLOSERS and result < 0:
            self.faults.append(f"a close that failed: {line}")
        elif name == "recvmsg" and result >= 0:
            for number in _rights(rest):
                self.received += 1
                self._make(number, "received", line)
        elif result >= 0 and (name in MAKERS or "F_DUPFD" in rest):
            self._make(result, name, line)
        elif name in UNEXPECTED:
            self.faults.append(f"not understood: {line}")

    def _make(self, number: int, how: str, line: str) -> None:
        if number in self._open:
            self.faults.append(f"{number} ({self._open[number]}) is made again: {line}")
        self._open[number] = how

    def _close(self, number: int, line: str) -> None:
        how = self._open.pop(number, None)
        if how is None:
            self.faults.append(f"closed again, or never made: {line}")
        self.closed += how == "received"


def _rights(rest: str) -> Iterator[int]:
    for numbers in re.findall(r"cmsg_type=SCM_RIGHTS, cmsg_data=\[([\d, ]+)\]", rest):
        yield from map(int, numbers.split(", "))
