"""The command's arguments, and what it costs to look at them."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"asyncio", "bz2", "logging.handlers", "lzma", "multiprocessing", "psutil", "shutil"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


def test_a_broker_imports_nothing_that_it_does_not_need():
    """It stays in memory for long; and this is on the way of every command."""
    script = f"""
import sys
before = set(sys.modules)
from fdbroker.cli import _parser
_parser(["serve"]).parse_args(["serve"])
import fdbroker.daemon.log, fdbroker.daemon.serve
print(*{HEAVY} & set(sys.modules) - before)
"""
    done = run("-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{script}")
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("serve", "--help")])
def test_help(arguments):
    done = run("-m", "fdbroker", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    assert max(map(len, done.stdout.splitlines())) < 80


@pytest.mark.parametrize("arguments", [(), ("steal",), ("serve", "--drain", "soon")])
def test_misuse_is_status_two(arguments):
    done = run("-m", "fdbroker", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "fdbroker" in done.stderr.splitlines()[-1]
