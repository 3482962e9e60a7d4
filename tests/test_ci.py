"""``.ci/run``, with stand-ins for all that it calls: its last words are true."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "run"
TOOLS = ("bash", "cp", "dirname", "env", "id", "mkdir", "mktemp", "rm")
STAND_IN = """#!/usr/bin/env bash
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin"
    for name in pip python fdbroker; do cp "$0" "$3/bin/$name"; done
fi
[ "$*" != "$FAILS" ]
"""
OPTIONAL = {
    "strace": "the package strace",
    "nginx": "the package nginx",
    "cc": "the package gcc",
    "valgrind": "the package valgrind",
    "systemd-analyze": "the package systemd",
    "python3.12": "Python 3.12",
    "python3.13": "Python 3.13",
}


def run(folder: Path, *commands: str, fails: str = "nothing") -> tuple[int, list[str]]:
    """Run it where there are only these commands: its status, and its last words."""
    commands = ("make", "python3", "../.venv/bin/python", *commands)
    for path in (folder / ".ci", folder / "bin", folder / ".venv" / "bin"):
        path.mkdir(parents=True)
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None
        (folder / "bin" / tool).symlink_to(found)
    for command in commands:
        path = folder / "bin" / command
        path.write_text(STAND_IN)
        path.chmod(0o755)
    done = subprocess.run(
        [shutil.copy(SCRIPT, folder / ".ci")],
        env={"PATH": f"{folder}/bin", "HOME": f"{folder}", "TMPDIR": f"{folder}", "FAILS": fails},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    print(done.stdout)
    return done.returncode, done.stdout.rpartition("\n=== ")[2].splitlines()


def test_all_is_well_where_nothing_is_missing(tmp_path: Path) -> None:
    status, (words,) = run(tmp_path, *OPTIONAL)
    assert status == 0
    assert words.startswith("all is well")


@pytest.mark.parametrize("missing", OPTIONAL)
def test_what_is_missing_is_named(tmp_path: Path, missing: str) -> None:
    if os.path.exists(f"/usr/bin/{missing}") and missing.startswith("python"):
        pytest.skip(f"there is a /usr/bin/{missing}, which would be found")
    status, (words, *left_out) = run(tmp_path, *(OPTIONAL.keys() - {missing}))
    assert status == 0
    assert "all is well" not in words
    (line,) = left_out
    assert OPTIONAL[missing] in line


@pytest.mark.parametrize(
    "fails", ["test", "check", "long", "test PYTHON=python3.13 VENV=.venv-3.13"]
)
def test_what_fails_is_not_well(tmp_path: Path, fails: str) -> None:
    status, (words,) = run(tmp_path, *OPTIONAL, fails=fails)
    assert status != 0
    assert words.startswith("make ")
