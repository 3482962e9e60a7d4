"""The exit status of every command, and the sentence that goes with an error.

This is the one table: ``fdbroker --help`` prints it, and docs/commands.md has it.
"""

from __future__ import annotations

from fdbroker.errors import (
    BadAddress,
    BadName,
    BadResource,
    EntryRetired,
    NameTaken,
    NoBroker,
    RetireTimeout,
    UnknownEntry,
)

DONE = 0
FAILED = 1
MISUSE = 2
NO_BROKER = 3
NO_ENTRY = 4
NAME_TAKEN = 5
NOT_PERMITTED = 6
TIMED_OUT = 7
CANNOT_RUN = 126
NOT_FOUND = 127
INTERRUPTED = 130
NO_READER = 141

MEANINGS = {
    DONE: "done",
    FAILED: "any other error; it is one line on stderr, as all errors are",
    MISUSE: "misuse: an unknown option, a bad name, address, size or number",
    NO_BROKER: "no broker there",
    NO_ENTRY: "no such entry",
    NAME_TAKEN: "the name is taken",
    NOT_PERMITTED: "not permitted, by the broker or by the system",
    TIMED_OUT: "timed out",
    CANNOT_RUN: "exec: the command was found but cannot be run (as in the shell)",
    NOT_FOUND: "exec: the command was not found (as in the shell)",
    INTERRUPTED: "interrupted by Ctrl-C",
    NO_READER: "nobody reads the output any more (as SIGPIPE in the shell)",
}

_BY_ERROR: tuple[tuple[type[BaseException], int], ...] = (  # the first that fits
    (BadName, MISUSE),
    (BadResource, MISUSE),
    (BadAddress, MISUSE),
    (NoBroker, NO_BROKER),
    (UnknownEntry, NO_ENTRY),
    (EntryRetired, NO_ENTRY),
    (NameTaken, NAME_TAKEN),
    (PermissionError, NOT_PERMITTED),
    (TimeoutError, TIMED_OUT),
    (KeyboardInterrupt, INTERRUPTED),
)


def of(error: BaseException) -> int:
    """The exit status of a command that ends with `error`."""
    return next((status for kind, status in _BY_ERROR if isinstance(error, kind)), FAILED)


def sentence(error: BaseException) -> str:
    """What to say of it: the error's own sentence, with the command's words for what to do."""
    if isinstance(error, NameTaken):
        return (
            f'there is an entry "{error.name}" already: fdbroker retire {error.name} first, '
            "or put with --replace or --if-absent"
        )
    if isinstance(error, UnknownEntry) and not error.nearest:
        return f'no entry "{error.name}": fdbroker ls lists what there is, fdbroker put makes one'
    if isinstance(error, RetireTimeout):
        return (
            f'"{error.name}" is retired, but after {error.seconds:g} s {error.loans} loans are '
            f"out: the last return closes it, fdbroker loans {error.name} names the borrowers"
        )
    if type(error).__module__ == "builtins" and isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror}"
    return str(error)


def table() -> str:
    """The whole of it, as lines of text."""
    return "\n".join(f"  {status:3}  {meaning}" for status, meaning in MEANINGS.items())
