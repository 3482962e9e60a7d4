"""Making an entry: a descriptor out of words, put into the broker.

Any number of processes may ask for the same one at once, "unless it is there".  Then one of them
makes it, and the others find it: an address that is in use may be that one's, which is about to
put what it has bound.
"""

from __future__ import annotations

import errno
import os
from time import monotonic, sleep

from fdbroker import openers
from fdbroker.errors import (
    BorrowTimeout,
    BrokerGone,
    FDBrokerError,
    NotPermitted,
    ProtocolError,
    UnknownEntry,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fdbroker.ipc.client import Client

RACE_SECONDS = 2.0  # for another process to put what it has bound
PAUSE = 0.02


def make_unless_there(client: Client, name: str, how: str, what: str) -> int | None:
    """The descriptor, the caller's; None if there is such an entry.  `BadResource`, OSError."""
    deadline = monotonic() + RACE_SECONDS
    while not is_there(client, name):
        try:
            return openers.make(how, what)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or monotonic() > deadline:
                raise
        sleep(PAUSE)
    return None


def is_there(client: Client, name: str) -> bool:
    """Whether there is such an entry, as far as this process may know."""
    try:
        return any(entry.name == name and not entry.retired for entry in client.entries())
    except NotPermitted as error:
        if error.verb == "connect":
            raise
    try:
        client.borrow(name, timeout=0).close()
    except (UnknownEntry, NotPermitted):
        return False
    except BorrowTimeout:
        pass
    return True


def put(client: Client, name: str, how: str, fd: int, *, replace: bool = False) -> None:
    """Put what was made, and let go of it.

    What is at a path goes with it, if the broker has surely not taken it: an interrupt or the end
    of the broker leaves that open.
    """
    try:
        client.put(name, fd, replace=replace)
    except (BrokerGone, ProtocolError):
        os.close(fd)
        raise
    except FDBrokerError:
        openers.discard(how, fd)
        raise
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
