"""Topic `startup`: from the start of ``fdbroker exec ... -- true`` to its end, against bare Python.

Bare is ``python -I -c pass`` with the same interpreter, of a virtual environment if this one is:
no Python program can start in less.  `true` is what exec becomes, and is shown alone too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from benchmarks.base import lent_file
from benchmarks.harness import Run, Topic, Unavailable, Variant, needs

BARE = "python -I -c pass"


@contextmanager
def program(*command: str) -> Iterator[Run]:
    """Starts it and waits for its end."""
    found = shutil.which(command[0])
    if found is None:
        raise Unavailable(f"no {command[0]}")

    def run(n: int) -> None:
        for _ in range(n):
            subprocess.run([found, *command[1:]], check=True)

    yield run


@contextmanager
def exec_true(*start: str) -> Iterator[Run]:
    """The command, which borrows from a broker and becomes `true`."""
    broker_class = needs("fdbroker", "Broker")
    with lent_file() as file, broker_class() as broker:
        broker.put("x", file)
        command = (*start, "exec", "--socket", broker.address, "--fd", "x", "--", "true")
        with program(*command) as run:
            yield run


SCRIPT = os.path.join(os.path.dirname(sys.executable), "fdbroker")
TOPIC = Topic(
    name="startup",
    unit="start to end",
    cycles=4,
    variants=(
        Variant(BARE, partial(program, sys.executable, "-I", "-c", "pass"), against=BARE),
        Variant("true", partial(program, "true"), against=BARE),
        Variant(
            "python -I -c 'import fdbroker'",
            partial(program, sys.executable, "-I", "-c", "import fdbroker"),
            against=BARE,
        ),
        Variant(
            "fdbroker exec -- true",
            partial(exec_true, SCRIPT),
            against=BARE,
            goal=2.5,
            beyond=1.8,
        ),
        Variant(
            "python -m fdbroker exec -- true",
            partial(exec_true, sys.executable, "-m", "fdbroker"),
            against=BARE,
            goal=2.5,
            beyond=1.8,
        ),
    ),
)
