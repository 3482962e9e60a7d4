"""What the command prints: tables for people, JSON for programs, one line for an error.

Names, purposes, paths and the names of processes come from others.  Whatever is not printable in
them (control characters, escape sequences, what turns the direction of writing, line ends) is
shown as an escape like ``\\x1b``, here and nowhere else.  stdout carries the answer and nothing
else; what is said beside it goes to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def printable(text: object) -> str:
    """`text` on one line, safe for a terminal."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown
    )


def complain(text: object) -> None:
    """One line on stderr, if there is one: ``fdbroker: ...``."""
    if sys.stderr is not None:
        print(f"fdbroker: {printable(text)}", file=sys.stderr, flush=True)


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """The header and the rows, in columns two spaces apart; ``-`` where there is nothing."""
    lines = [tuple(header), *(tuple(printable(cell) or "-" for cell in row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[-1] = 0
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)))


def print_json(value: Any) -> None:
    """As one JSON text, in ASCII."""
    import json

    print(json.dumps(value, indent=2))


def flush() -> None:
    """Have everything written, so that what fails is known while it can be said."""
    if sys.stdout is not None:
        sys.stdout.flush()


def drop() -> None:
    """Give up what is not written yet; else the interpreter would try again at its end."""
    if sys.stdout is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def escape_what_cannot_be_encoded() -> None:
    """A terminal that knows no UTF-8 gets escapes, not an error."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
