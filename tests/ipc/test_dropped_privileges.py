"""A process that gives up its rights or its root after it made a client loses no method of it.

The package is copied below a folder that only root can enter, and run from there (dropped.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from dropped import put_entries
from ruled import ALICE, Ruled, rule
from support import PATIENCE

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")

PROGRAM = Path(__file__).with_name("dropped.py")


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A folder for root alone, with copies of the package and of what it imports."""
    folder = tmp_path / "private"
    folder.mkdir(mode=0o700)
    for name in ("fdbroker", "msgpack", "psutil"):
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        ignored = shutil.ignore_patterns("__pycache__", "tests")
        shutil.copytree(Path(spec.origin).parent, folder / name, ignore=ignored)
    return folder


def run(private: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-S", "-P", str(PROGRAM), *arguments],
        env={"PATH": os.defpath, "PYTHONPATH": str(private)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_method_works_for_another_uid(ruled: Ruled, private: Path) -> None:
    ruled.set_rules(rule("borrow", "put", "retire", "list", "admin", listeners=True))
    put_entries(ruled.client)
    assert run(private, "setuid", ruled.address, str(ALICE)) == ""


def test_every_method_works_in_an_empty_root(private: Path, tmp_path: Path) -> None:
    root = tmp_path / "empty"
    root.mkdir()
    assert run(private, "chroot", str(root)) == ""
