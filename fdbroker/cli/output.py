"""What the command prints: tables for people, JSON for programs, one line for an error.

Names, purposes, paths and the names of processes come from others.  Whatever is not printable in
them (control characters, escape sequences, what turns the direction of writing, line ends) is
shown as an escape like ``\\x1b``, here and nowhere else.  stdout carries the answer and nothing
else; what is said beside it goes to stderr.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any, TextIO


def printable(text: object) -> str:
    """`text` on one line, safe for a terminal."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown
    )


def complain(text: object) -> None:
    """One line on stderr, if anybody reads that: ``fdbroker: ...``."""
    if sys.stderr is None:
        return
    try:
        print(f"fdbroker: {printable(text)}", file=sys.stderr, flush=True)
    except OSError:
        _lead_nowhere(sys.stderr)


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """The header and the rows, in columns two spaces apart; ``-`` where there is nothing."""
    lines = [tuple(header), *(tuple(printable(cell) or "-" for cell in row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[-1] = 0
    write("".join("  ".join(map(str.ljust, line, widths)) + "\n" for line in lines))


def print_json(value: Any) -> None:
    """As one JSON text, in ASCII."""
    import json

    write(json.dumps(value, indent=2) + "\n")


def user(uid: int) -> str:
    """Its name, or the number if it has none."""
    from pwd import getpwuid

    try:
        return getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


class Unwritable(Exception):
    """stdout did not take the answer; the errno, and what it stands for."""


def write(text: str) -> None:
    """Have all of `text` written now, so that what fails is known while it can be said.

    What the encoding of stdout lacks is escaped.  `Unwritable`.
    """
    if sys.stdout is None:  # it was closed when we were started
        return
    left = text.encode(sys.stdout.encoding, "backslashreplace")
    try:
        while left:  # an unbuffered stdout may take a part of it
            left = left[sys.stdout.buffer.write(left) :]
        sys.stdout.flush()
    except OSError as error:
        _lead_nowhere(sys.stdout)
        raise Unwritable(error.errno, error.strerror) from None


def _lead_nowhere(stream: TextIO) -> None:
    """The interpreter writes at its end what is left in it; that shall not fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
