"""The examples do what they say, as a user runs them: their own process, its output, its status."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES = 80  # an example is to be read at one glance


def run(name: str) -> str:
    """What the example printed; it ended with 0 and complained of nothing."""
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / name],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def test_pool_shared_file() -> None:
    out = run("pool_shared_file.py")
    assert "67108864 bytes, unlinked, not open here" in out
    pools = re.findall(r"^(\w+), (\S+)$", out, re.M)
    kinds = ("multiprocessing.Pool", "ProcessPoolExecutor")
    assert pools == [(m, kind) for m in ("fork", "spawn", "forkserver") for kind in kinds]
    assert out.count("before it borrowed: (0, 0, 0, 0, 0, 0, 0, 0)") == len(pools)
    lent = re.findall(r"loans of one moment, by pid: \[(.*)\]", out)
    assert [len(set(pids.split(", "))) for pids in lent] == [8] * len(pools)
    digests = re.findall(r"SHA-256 .*: ([0-9a-f]{64})$", out, re.M)
    assert len(digests) == len(pools)
    assert len(set(digests)) == 1
    assert out.count("  ok: ") == 1 + 3 * len(pools)


def test_shared_array() -> None:
    out = run("shared_array.py")
    assert "the producer's exit code is -9" in out
    assert "but not the sealed one: PermissionError(1," in out
    assert re.search(r"retired, but in use by \{\d+, \d+\}$", out, re.M)
    assert "unmapped: in use by nobody" in out
    assert out.count("  ok: ") == 6


def test_exclusive_device() -> None:
    out = run("exclusive_device.py")
    assert "both had their turns, and their own answers: [100, 100]" in out
    keeper = re.search(r"pid (\d+) keeps the port: firmware update$", out, re.M)
    assert keeper is not None
    told = rf'the other is told: "port" is busy after .* s: held by pid {keeper[1]} for .* s; try'
    assert re.search(told, out)
    assert f"pid {keeper[1]} is killed, and it has its turn" in out
    assert out.count("  ok: ") == 5


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_is_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < LINES


@pytest.mark.parametrize(
    ("name", "right", "wrong", "said"),
    [
        ("pool_shared_file.py", "index * PART)", "index * PART + 1)", "SHA-256"),
        ("exclusive_device.py", "OK {words}", "KO {words}", "both had their turns"),
    ],
)
def test_an_example_that_fails_says_so(
    tmp_path: Path, name: str, right: str, wrong: str, said: str
) -> None:
    """One wrong byte, and the exit status is not 0."""
    source = (EXAMPLES / name).read_text()
    broken = source.replace(right, wrong)
    assert broken != source
    (tmp_path / "broken.py").write_text(broken)
    done = subprocess.run(
        [sys.executable, tmp_path / "broken.py"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 1
    assert f"FAILED: {said}" in done.stdout
