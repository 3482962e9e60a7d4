"""The mutants of a small module, and the command on a copy of this project with a hole in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import support

from .mutants import mutants

ROOT = Path(__file__).resolve().parents[2]

SOURCE = b'''"""A module."""

from sys import maxsize

TYPE_CHECKING = False
__all__ = ["f"]


class A:
    def f(self, n: int = 1) -> "int | None":
        """Text."""
        assert n != 5
        local = "a"
        self.x = self.y = min(n, 2)
        if n < 3 and not local:
            raise ValueError(f"too {n + 1}")  # why
        self.x += n
        return print(n, end=b"")
'''

EXPECTED = """
A: def f(self, n: int = 1) -> "int | None": | 1 -> 2
A.f: local = "a" | "a" -> 'a~'
A.f: self.x = self.y = min(n, 2) | self.x = self.y = min(n, 2) -> self.x = min(n, 2)
A.f: self.x = self.y = min(n, 2) | self.x = self.y = min(n, 2) -> self.y = min(n, 2)
A.f: self.x = self.y = min(n, 2) | min -> max
A.f: self.x = self.y = min(n, 2) | 2 -> 3
A.f: if n < 3 and not local: | n < 3 -> (n <= 3)
A.f: if n < 3 and not local: | n < 3 and not local -> (n < 3 or not local)
A.f: if n < 3 and not local: | n < 3 and not local -> (n < 3)
A.f: if n < 3 and not local: | n < 3 and not local -> (not (n < 3 and (not local)))
A.f: if n < 3 and not local: | n < 3 and not local -> (not local)
A.f: if n < 3 and not local: | 3 -> 4
A.f: if n < 3 and not local: | not local -> local
A.f: raise ValueError(f"too {n + 1}") | f"too {n + 1}" -> ''
A.f: raise ValueError(f"too {n + 1}") | left out
A.f: self.x += n | left out
A.f: self.x += n | self.x += n -> self.x -= n
A.f: return print(n, end=b"") | return print(n, end=b"") -> return None
A.f: return print(n, end=b"") | print(n, end=b"") -> print(n)
A.f: return print(n, end=b"") | b"" -> b'~'
"""


def test_the_mutants_of_a_module() -> None:
    found = mutants("a.py", SOURCE)
    assert sorted(one.key for one in found) == sorted(EXPECTED.strip().splitlines())
    for one in found:
        compile(one.apply(SOURCE), "a.py", "exec")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_command_finds_what_no_test_would_notice(tmp_path: Path) -> None:
    """On a copy with few tests, and a function that none of them calls."""
    for part in ("fdbroker", "tests/mutation"):
        shutil.copytree(ROOT / part, tmp_path / part)
    for file in ("pyproject.toml", "tests/conftest.py", "tests/support.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    names = tmp_path / "fdbroker/lender/names.py"
    names.write_text(TESTED + UNTESTED)
    (tmp_path / "tests/test_names.py").write_text(TESTS)
    explained = tmp_path / "tests/mutation/survivors.toml"
    explained.write_text("")
    interrupt_the_command(tmp_path)
    status, said = command(tmp_path)
    assert "are known from before" in said, "what was found before the interrupt"
    assert status == 1
    assert figures(said) == [16, 9, 2, 7], said
    assert "survives: fdbroker/lender/names.py: untested: if n > 3: | 3 -> 4" in said
    keys = {line.split(": ", 2)[2] for line in said.splitlines() if line.startswith("survives: ")}
    assert len(keys) == 7
    assert all(key.startswith("untested: ") for key in keys)

    listed = ", ".join(f"'''{key}'''" for key in keys)
    file, why = "file = 'fdbroker/lender/names.py'", "why = 'a test of the command'"
    explained.write_text(f"[[survivors]]\n{file}\n{why}\nmutants = [{listed}]\n")
    status, said = command(tmp_path)
    assert "16 of 16 mutants are known from before" in said
    assert "survives" not in said
    assert "names.py: less than 90 % killed" in said
    assert status == 1

    names.write_text(TESTED)
    status, said = command(tmp_path)
    assert figures(said) == [9, 9, 2, 0], said
    assert said.count("explained, but survives no more: fdbroker/lender/names.py: untested: ") == 7
    assert status == 1

    explained.write_text("")
    status, said = command(tmp_path)
    assert status == 0, said


TESTED = """
from fdbroker.errors import BadName


def check_name(name: str) -> None:
    if not name:
        raise BadName(name)


def countdown(n: int) -> int:
    while n > 0:
        n -= 2
    return n
"""

UNTESTED = """

def untested(n: int) -> str:
    if n > 3:
        return "many"
    return "few"
"""

TESTS = """
import pytest

from fdbroker.errors import BadName
from fdbroker.lender.names import check_name, countdown


def test_names():
    check_name("a")
    with pytest.raises(BadName):
        check_name("")


def test_countdown():
    assert countdown(2) == 0
    assert countdown(1) == -1
"""


def figures(said: str) -> list[int]:
    """Mutants, killed, endless, survived."""
    (line,) = (line for line in said.splitlines() if line.startswith("in all "))
    return [int(figure) for figure in line.split()[2:6]]


def start(folder: Path) -> subprocess.Popen[str]:
    (folder / "tmp").mkdir(exist_ok=True)
    options = "--tests", "tests/test_names.py", "--jobs", "2", "--"
    return subprocess.Popen(
        [sys.executable, "-m", "tests.mutation", *options, "fdbroker/lender/names.py"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(folder / "tmp")},
    )


def command(folder: Path) -> tuple[int, str]:
    running = start(folder)
    said, _ = running.communicate()
    return running.returncode, said


def interrupt_the_command(folder: Path) -> None:
    """When it has found something; nothing may be left of it but that."""
    running = start(folder)
    kept = folder / ".mutation/results.jsonl"
    support.wait_until(lambda: kept.exists() and kept.read_text(), 60)
    of_it = support.wait_until(lambda: children(running.pid))
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate()
    assert running.returncode == 130, said
    assert said.endswith("\nstopped; the next run goes on from here\n")
    assert "Traceback" not in said
    assert not [pid for pid in of_it if os.path.exists(f"/proc/{pid}")]
    assert os.listdir(folder / "tmp") == []


def children(parent: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(stat.parent.name)
    return found
