"""The exit statuses of the command, all of them, and which error leads to which.

0    done
1    another error
2    misuse: the words make no sense
3    no broker there, or it closes down
4    no such entry
5    the name is taken
6    not permitted
7    timed out
126  CMD cannot be executed       (exec only, as a shell says it)
127  CMD not found                (exec only)
130  interrupted by Ctrl-C
"""

from __future__ import annotations

from fdbroker import errors

DONE, FAILED, MISUSE, NO_BROKER, NO_ENTRY, NAME_TAKEN, NOT_PERMITTED, TIMED_OUT = range(8)
CANNOT_EXECUTE, NOT_FOUND = 126, 127
INTERRUPTED = 130  # 128 + SIGINT


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
    (errors.NotPermitted, NOT_PERMITTED),
    (errors.BorrowTimeout, TIMED_OUT),
    (errors.RetireTimeout, TIMED_OUT),
    (KeyboardInterrupt, INTERRUPTED),
)


def status_of(error: BaseException) -> int:
    """The exit status of a command that ended with this error."""
    return next((status for kind, status in STATUSES if isinstance(error, kind)), FAILED)
