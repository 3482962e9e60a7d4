"""What the tests of the command share: to run it, and what to put for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fdbroker

Done = subprocess.CompletedProcess[str]


def words(address: str, *given: str) -> list[str]:
    """The whole command line: ``fdbroker GIVEN`` for the broker at `address`."""
    asks_a_broker = given and not given[0].startswith("-") and given[0] != "check"
    where = ("--socket", address) if asks_a_broker else ()
    return [sys.executable, "-W", "error", "-m", "fdbroker", *given[:1], *where, *given[1:]]


def command(broker: fdbroker.Client | str, *given: str, **how: Any) -> Done:
    """Run it to its end."""
    address = broker if isinstance(broker, str) else broker.address
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | how
    return subprocess.run(words(address, *given), timeout=60, **how)


def start(broker: fdbroker.Client, *given: str, **how: Any) -> subprocess.Popen[str]:
    """Start it."""
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | how
    return subprocess.Popen(words(broker.address, *given), **how)


def succeeds(broker: fdbroker.Client, *given: str, **how: Any) -> str:
    """Its output; it has said nothing else."""
    done = command(broker, *given, **how)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def complaint(done: Done, status: int) -> str:
    """The one line that it has said, with that exit status."""
    assert (done.returncode, done.stdout) == (status, ""), done
    (line,) = done.stderr.splitlines(keepends=True)
    assert line.endswith("\n")
    line = line[:-1]
    assert line.startswith("fdbroker: ")
    assert line.isprintable()
    return line.removeprefix("fdbroker: ")


def put_memory(broker: fdbroker.Client, name: str = "data") -> int:
    """An entry: its generation."""
    number = os.memfd_create("data")
    try:
        return broker.put(name, number)
    finally:
        os.close(number)


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """The process is gone at the end of the block, and its pipes are closed."""
    try:
        with process:
            yield process
            process.wait(20)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
