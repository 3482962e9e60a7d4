"""A broker as a user starts it: the command, its options, its signals, what it says."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from support import PATIENCE, open_files, wait_until

import fdbroker

COMMAND = (sys.executable, "-m", "fdbroker")


def run(*arguments: str | Path, **how) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **how)


class Served:
    """A broker process that is ready."""

    def __init__(self, process: subprocess.Popen, address: str, said: Path) -> None:
        self.process = process
        self.pid = process.pid
        self.address = address
        self._said = said
        self.client = fdbroker.Client(address)

    def said(self) -> list[str]:
        """The lines of its log so far."""
        return self._said.read_text().splitlines()

    def says(self, *words: str, times: int = 1) -> list[str]:
        """Wait until so many lines of the log have all these words: those."""

        def found() -> list[str]:
            lines = [line for line in self.said() if all(word in line for word in words)]
            return lines if len(lines) >= times else []

        return wait_until(found)

    def entries(self) -> dict[str, fdbroker.ipc.client.EntryInfo]:
        """By name; those that are live."""
        return {entry.name: entry for entry in self.client.entries() if not entry.retired}

    def inode(self, name: str) -> tuple[int, int]:
        """Which file, or socket, is lent under that name."""
        with self.client.borrow(name, timeout=0) as loan:
            found = os.fstat(loan.fileno())
        return found.st_dev, found.st_ino

    def number_of(self, inode: tuple[int, int]) -> list[int]:
        """The descriptors of the broker that are of that inode."""
        numbers = []
        for number in open_files(self.pid):
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(f"/proc/{self.pid}/fd/{number}")
                if (found.st_dev, found.st_ino) == inode:
                    numbers.append(number)
        return numbers

    def hang_up(self) -> None:
        """SIGHUP."""
        self.process.send_signal(signal.SIGHUP)

    def reload(self, *words: str) -> str:
        """SIGHUP, and wait for what it says: the last line with these words."""
        before = len([line for line in self.said() if all(word in line for word in words)])
        self.hang_up()
        return self.says(*words, times=before + 1)[-1]


@contextlib.contextmanager
def served(
    folder: Path,
    *arguments: str | Path,
    socket: Path | None = None,
    pass_fds: Sequence[int] = (),
    verbose: bool = True,
    **how,
) -> Iterator[Served]:
    """Start a broker, and end it after the block, if it has not ended before."""
    path = socket or folder / "broker.sock"
    said = folder / "said"
    ready, told = os.pipe()
    try:
        with open(said, "ab") as file:
            command = [*COMMAND, *(["-v"] if verbose else []), "serve", "--socket", str(path)]
            process = subprocess.Popen(
                [*command, "--ready-fd", str(told), *map(str, arguments)],
                stderr=file,
                pass_fds=(told, *pass_fds),
                **how,
            )
    finally:
        os.close(told)
    try:
        wait_for_newline(ready)
        broker = Served(process, str(path), said)
        yield broker
        broker.client.close()
        assert "Traceback" not in said.read_text(), said.read_text()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
    except BaseException:
        print(said.read_text())
        raise
    finally:
        os.close(ready)
        process.kill()
        process.wait()


def wait_for_newline(number: int) -> None:
    """Raise if the pipe ends before one came."""
    assert select.select([number], [], [], PATIENCE)[0], "it is not ready"
    assert os.read(number, 1) == b"\n", "it ended before it was ready"


def open_for_writing(fifo: Path) -> int | None:
    """Its number, once somebody reads."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None
