"""The commands of benchmarks/ that compare checkouts: they run and print what they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.long


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    return subprocess.check_output(command, cwd=ROOT, text=True, timeout=60)


def test_borders_prints_each_step_with_moves() -> None:
    blocks = run("benchmarks.borders").strip().split("\n\n")
    steps = [block.splitlines()[0] for block in blocks]
    assert steps == ["put", "first borrow", "borrow again", "return", "retire and wait"]
    for block in blocks:
        moves, _, _, files, _ = block.splitlines()[1].split()
        assert int(moves) >= int(files) >= 2, block


def test_before_after_of_one_checkout_has_ratio_near_one() -> None:
    told = run("benchmarks.before_after", ".", ".", "cycle", "--sets", "1", "--rounds", "5")
    _, what, _, _, ratio, _, _ = told.splitlines()[-1].split("|")
    assert what.strip() == "borrow + return"
    assert 0.5 < float(ratio) < 2
