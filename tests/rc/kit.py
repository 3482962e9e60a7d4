"""What the tests of rc share: the module in its variants, and questions to the kernel."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import fdbroker.rc

SOURCE = Path(fdbroker.rc.__file__)
MUTANTS = sorted((Path(__file__).parent / "mutants").glob("*.patch"))


def load(source: Path, name: str) -> ModuleType:
    """The file as a module of its own, beside the real one."""
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def guarded() -> ModuleType:
    """rc as it runs where its lock-free order was not tested: with the slot under a lock."""
    module: Any = load(SOURCE, "rc_guarded")
    module._guard(module.FD)
    assert isinstance(module.FD._sysfd, property)
    return module  # type: ignore[no-any-return]


def mutant(patch: Path, folder: Path) -> ModuleType:
    """rc with a mistake in it.  A patch that no longer applies is an error."""
    shutil.copy(SOURCE, folder / "rc.py")
    done = subprocess.run(
        ["patch", "--silent", "--fuzz=0", "--batch", "rc.py", str(patch)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{patch.name}: {done.stdout}{done.stderr}"
    return load(folder / "rc.py", f"rc_{patch.stem}")


def is_open(sysfd: int) -> bool:
    try:
        os.fstat(sysfd)
    except OSError:
        return False
    return True


class Pipe:
    """A pipe whose write end an FD is to own; `ended` asks the read end whether that is closed."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)

    def ended(self) -> bool:
        try:
            return os.read(self.read, 1) == b""
        except BlockingIOError:
            return False

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.read)
