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


def run(name: str, *arguments: str) -> str:
    """What the example printed; it ended with 0 and complained of nothing."""
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / name, *arguments],
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


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_is_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < LINES


def test_an_example_that_fails_says_so(tmp_path: Path) -> None:
    """One wrong byte, and the exit status is not 0."""
    source = (EXAMPLES / "pool_shared_file.py").read_text()
    broken = source.replace("index * PART)", "index * PART + 1)")
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
    assert "FAILED: SHA-256" in done.stdout


def restart(server: str) -> None:
    """The example's own verdict, and its table: nobody refused, many refused, nobody refused."""
    pytest.importorskip(server)
    head, *rows = run("restart_web_server.py", "--server", server).splitlines()
    assert head.split() == [server, *["succeeded", "refused", "reset", "other", "stall", "pids"]]
    figures = [
        re.fullmatch(r"([a-z, ]+?)" + r" +(\d+)" * 4 + r" +\d\.\d+ s +(\d+)", r) for r in rows
    ]
    assert all(figures), rows
    lent, own, overlapping = (list(map(int, found.groups()[1:])) for found in figures if found)
    for succeeded, refused, reset, other, pids in (lent, own, overlapping):
        assert succeeded > 100
        assert reset <= 4 * 5 or refused  # at most what four clients had in hand at each stop
        assert other == 0
        assert pids == 6
    assert lent[1] == overlapping[1] == 0
    assert own[1] >= 100


def test_restart_web_server() -> None:
    restart("uvicorn")


@pytest.mark.long
@pytest.mark.parametrize("server", ["gunicorn", "hypercorn"])
def test_restart_other_web_servers(server: str) -> None:
    restart(server)
