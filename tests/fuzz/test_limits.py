"""Every limit of messages.py matters to the fuzz run: without it, the bounded run fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import limits

TESTS = Path(__file__).parents[1]


def run(*arguments: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.limits", *arguments],
        cwd=TESTS,
        stdout=subprocess.PIPE,
        text=True,
        timeout=900,
    )
    print(done.stdout)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_each_limit_that_is_taken_out_is_found() -> None:
    """What found it is printed (`python -m fuzz.limits` in tests/)."""
    status, lines = run()
    assert status == 0, [line for line in lines if "NOT FOUND" in line]
    assert len(lines) > 80
    for name in (*limits.CONSTANTS, *limits.CANNOT_MATTER):  # none that is no more
        assert sum(line.split("  ")[0] == name for line in lines) == 1, name


def test_limits_that_are_taken_out_are_found() -> None:
    status, lines = run("--only", "flags l")
    assert status == 0
    assert len(lines) == 5
    assert all("corpus/" in line for line in lines[:-1])


def test_what_is_not_found_is_told() -> None:
    """Nothing is taken out, so nothing can find it."""
    program = (
        "from fuzz import limits\n"
        "limits.limits = lambda: [limits.Limit('nothing')]\n"
        "raise SystemExit(limits.main(['--without-corpus', '--examples', '3']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=TESTS, stdout=subprocess.PIPE, text=True, timeout=100
    )
    assert "NOT FOUND" in done.stdout
    assert done.returncode == 1
