"""``.ci/run``, with stand-ins for all that it calls: its last words are true."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "run"
TOOLS = ("bash", "cp", "dirname", "env", "grep", "id", "mkdir", "mktemp", "rm", "tee")
SKIPPED = "SKIPPED [2] tests/test_it.py:7: not here"
STAND_IN = """#!/usr/bin/env bash
if [ "$1" = -c ] && [ "${2:0:10}" = "import sys" ]; then
    echo "$OURS"
fi
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin"
    for name in pip python fdbroker; do cp "$0" "$3/bin/$name"; done
fi
if [ "$*" = "$SKIPS" ]; then
    echo "SKIPPED [2] tests/test_it.py:7: not here"
fi
[ "$*" != "$FAILS" ]
"""
OPTIONAL = {
    "strace": "the package strace",
    "nginx": "the package nginx",
    "cc": "the package gcc",
    "valgrind": "the package valgrind",
    "systemd-analyze": "the package systemd",
    "python3.11": "Python 3.11",
    "python3.12": "Python 3.12",
    "python3.13": "Python 3.13",
}


def run(folder: Path, *commands: str, **more: str) -> tuple[int, list[str]]:
    """Run it where there are only these commands: its status, and its last words.

    `FAILS` and `SKIPS` are a call of `make` that does; `OURS` is the version of ``python3``.
    """
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
        env={
            "PATH": f"{folder}/bin",
            "HOME": f"{folder}",
            "TMPDIR": f"{folder}",
            "SYSTEM_BIN": f"{folder}/none",
            "OURS": "3.14",
            "FAILS": "nothing",
            "SKIPS": "nothing",
            **more,
        },
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
    status, (words, *left_out) = run(tmp_path, *(OPTIONAL.keys() - {missing}))
    assert status == 0
    assert "all is well" not in words
    (line,) = left_out
    assert OPTIONAL[missing] in line


@pytest.mark.parametrize("skips", ["test", "long", "test PYTHON=python3.12 VENV=.venv-3.12"])
def test_what_is_skipped_is_named(tmp_path: Path, skips: str) -> None:
    status, (words, *left_out) = run(tmp_path, *OPTIONAL, SKIPS=skips)
    assert status == 0
    assert "all is well" not in words
    assert [line.strip() for line in left_out] == [SKIPPED]


def test_each_version_is_tested_once(tmp_path: Path) -> None:
    status, (words,) = run(tmp_path, *(OPTIONAL.keys() - {"python3.12"}), OURS="3.12")
    assert status == 0
    assert words.startswith("all is well")


@pytest.mark.parametrize(
    "fails", ["test", "check", "long", "test PYTHON=python3.13 VENV=.venv-3.13"]
)
def test_what_fails_is_not_well(tmp_path: Path, fails: str) -> None:
    status, (words,) = run(tmp_path, *OPTIONAL, FAILS=fails)
    assert status != 0
    assert words.startswith("make ")
