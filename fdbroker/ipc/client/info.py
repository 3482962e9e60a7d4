"""What a client is told about entries, loans and users of the broker."""

from __future__ import annotations

from typing import NamedTuple


class EntryInfo(NamedTuple):
    """An entry of the broker: what `Client.entries` lists."""

    name: str
    kind: str
    where: str
    """The address of a socket, the path of a file; empty for the rest."""
    generation: int
    loans: int
    waiting: int
    uid: int
    """The user who put it."""
    since: float
    """When it was put, in seconds since the epoch."""
    retired: bool
    """It takes no new borrow, and closes with its last return; its name is free."""


class LoanInfo(NamedTuple):
    """One entry of a live loan: what `Client.loans` lists."""

    entry: str
    id: str
    """The same for all entries that were borrowed in one call."""
    pid: int
    """As the kernel saw it at connect; 0 if it could not be seen from the broker's namespace."""
    uid: int
    since: float
    exclusive: bool
    purpose: str
    generation: int
    """Of the entry: one that is retired and the one that replaced it have the same name."""

    @property
    def process(self) -> str:
        """The borrower's name, or empty if it is gone or another process has its pid by now.

        Empty, too, if psutil cannot be imported or cannot ask: it is imported here, when it is
        first needed, and the process may have changed its root or its rights since.
        """
        return name_of(self.pid, self.since)


class Usage(NamedTuple):
    """What one uid uses of the broker: what `Client.usage` lists.

    The keys of both dictionaries are sessions, loans (entries on loan or waited for), entries (that
    it has put), waiting (requests), bytes (of answers that it has not read), closes (descriptors
    that are being closed, or are not entered yet), inflight (descriptors sent to it that it has not
    received).
    """

    uid: int
    used: dict[str, int]
    limits: dict[str, int | None]
    """As things are now: more is free when other users give back.  None: whatever there is."""


def name_of(pid: int, since: float) -> str:
    """Return the name of the process that had this pid at `since` (seconds since the epoch).

    Empty if it is gone, if another process has its pid by now, or if psutil cannot tell.
    """
    try:
        import psutil
    except (ImportError, OSError):
        return ""
    try:
        process = psutil.Process(pid) if pid else None
        if process is not None and process.create_time() <= since:
            return str(process.name())
    except (psutil.Error, OSError):
        pass
    return ""
