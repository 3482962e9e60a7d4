"""What holds for the code as a whole: the directions of imports, sizes, what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fdbroker

PACKAGE = Path(fdbroker.__file__).parent
ROOT = PACKAGE.parent
LINES = 480  # "under about 400"


def test_imports_point_down_only():
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_a_file_opens_with_its_idea_and_is_small(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert len(text.splitlines()) <= LINES


def test_the_public_names_are_there_and_typed():
    assert (PACKAGE / "py.typed").exists()
    assert {"Broker", "Client", "Loan", "SharedFD", "attach", "borrow", "errors", "put", "rc"} == {
        *fdbroker.__all__
    }
    for name in fdbroker.__all__:
        assert getattr(fdbroker, name).__doc__
    with pytest.raises(AttributeError):
        _ = fdbroker.no_such_name


@pytest.mark.parametrize("module", ["fdbroker", "fdbroker.rc", "fdbroker.cli"])
def test_an_import_brings_only_what_is_used(module):
    heavy = {"asyncio", "multiprocessing", "psutil", "click", "rich", "numpy", "difflib"}
    if module != "fdbroker.cli":
        heavy |= {"msgpack", "typing", "socket", "threading"}
    code = f"import sys, {module}; print(*({heavy} & {{*sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == []
