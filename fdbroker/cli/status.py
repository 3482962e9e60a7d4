"""The exit status of every command, and the sentence that goes with an error.

This is the one table: ``fdbroker --help`` prints it, and docs/commands.md has it.
"""

from __future__ import annotations

from fdbroker import errors

DONE, FAILED, MISUSE, NO_BROKER, NO_ENTRY, NAME_TAKEN, NOT_PERMITTED, TIMED_OUT = range(8)
CANNOT_EXECUTE, NOT_FOUND = 126, 127  # as in the shell
INTERRUPTED = 130  # 128 + SIGINT
NO_READER = 141  # 128 + SIGPIPE

MEANINGS = {
    DONE: "done",
    FAILED: "any other error; it is one line on stderr, as all errors are",
    MISUSE: "misuse: an unknown option, a bad name, ADDR, SIZE or number",
    NO_BROKER: "no broker there, or it closes down",
    NO_ENTRY: "no such entry",
    NAME_TAKEN: "the name is taken",
    NOT_PERMITTED: "not permitted, by the broker or by the system",
    TIMED_OUT: "timed out",
    CANNOT_EXECUTE: "exec: CMD cannot be executed",
    NOT_FOUND: "exec: CMD not found",
    INTERRUPTED: "interrupted by Ctrl-C",
    NO_READER: "nobody reads the output any more",
}


class Misuse(Exception):
    """The command was called with words that make no sense together."""


STATUSES: tuple[tuple[type[BaseException], int], ...] = (  # the first that fits
    (Misuse, MISUSE),
    (errors.BadName, MISUSE),
    (errors.BadResource, MISUSE),
    (errors.NoBroker, NO_BROKER),
    (errors.BrokerGone, NO_BROKER),
    (errors.BrokerClosing, NO_BROKER),
    (errors.UnknownEntry, NO_ENTRY),
    (errors.EntryRetired, NO_ENTRY),
    (errors.NameTaken, NAME_TAKEN),
    (PermissionError, NOT_PERMITTED),
    (TimeoutError, TIMED_OUT),
    (KeyboardInterrupt, INTERRUPTED),
)


def status_of(error: BaseException) -> int:
    """The exit status of a command that ended with `error`."""
    return next((status for kind, status in STATUSES if isinstance(error, kind)), FAILED)


def sentence(error: BaseException) -> str:
    """What to say of it: the error's own sentence, with the command's words for what to do."""
    if isinstance(error, errors.NameTaken):
        return (
            f'there is an entry "{error.name}" already: fdbroker retire {error.name} first, '
            "or put with --replace or --if-absent"
        )
    if isinstance(error, errors.UnknownEntry) and not error.nearest:
        return f'no entry "{error.name}": fdbroker ls lists what there is, fdbroker put makes one'
    if isinstance(error, errors.RetireTimeout):
        loans = "1 loan is" if error.loans == 1 else f"{error.loans} loans are"
        return (
            f'"{error.name}" is retired, but after {errors.duration(error.seconds)} {loans} out: '
            f"the last return closes it, fdbroker loans {error.name} names the borrowers"
        )
    if isinstance(error, errors.BorrowTimeout):
        return _with_names(str(error), error)
    if type(error).__module__ == "builtins" and isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror}"
    return str(error)


def _with_names(text: str, error: errors.BorrowTimeout) -> str:
    """The same, with the name of each process that has it."""
    from time import time

    from fdbroker.ipc.client.info import name_of

    for pid, _, held, _ in error.holders:
        name = name_of(pid, time() - held)
        if name:
            text = text.replace(f"pid {pid} ", f"pid {pid} ({name}) ")
    return text


def table() -> str:
    """The whole of it, as lines of text."""
    return "\n".join(f"  {status:3}  {meaning}" for status, meaning in MEANINGS.items())
