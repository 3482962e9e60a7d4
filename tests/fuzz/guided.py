"""Bytes, mutated by atheris towards code that no input has reached before.

A process of its own, since libFuzzer ends it: ``python -m fuzz.guided FOLDER... -OPTION=...`` in
``tests/``, all that follows being libFuzzer's.  See `python -m tests.fuzz`.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["fdbroker"], enable_loader_override=False):
    from fuzz.steps import decode
    from fuzz.target import Target


def main() -> None:
    """Play whatever comes; the first thing that is found ends the process with status 77."""
    target = Target(thorough=False)
    atheris.Setup(sys.argv, lambda data: target.play(decode(data)))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
