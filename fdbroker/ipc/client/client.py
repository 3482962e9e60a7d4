"""The client: put, borrow, and ask what there is, over a pool of sessions.

A client may be used by any number of threads, and after a fork in the child too: each request or
loan takes a session of its own, and a child starts with none.  Every method is one request.
"""

from __future__ import annotations

import errno
import os
from time import CLOCK_BOOTTIME, clock_gettime, time

from fdbroker._lazy import NamedTuple
from fdbroker.errors import BrokerGone, FDBrokerError, NotPermitted, UnknownEntry
from fdbroker.ipc.client.borrow import borrow, check_ticket, check_timeout, known, prepare
from fdbroker.ipc.client.connection import StaleSession
from fdbroker.ipc.client.pool import TRIES, Pool
from fdbroker.ipc.protocol.messages import (
    ENTRIES,
    EPHEMERAL,
    LOANS,
    NAMELESS,
    REPLACE,
    RETIRE,
    STATS,
    USAGE,
    EntryRow,
    LoanRow,
)
from fdbroker.ipc.transport.address import default_address
from fdbroker.lender.names import check_name

TYPE_CHECKING = False  # as a type checker knows it: `typing` costs too much at a start
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType
    from typing import Any, Protocol

    from fdbroker.ipc.client.loan import Loan
    from fdbroker.ipc.client.shared import SharedFD

    class HasFileno(Protocol):
        """Anything with a descriptor."""

        def fileno(self) -> int: ...


NEAREST_NAMES = 2  # that an UnknownEntry suggests
NAMES_LOOKED_AT = 1000  # for that, at most


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
    """Who put it."""
    since: float
    """When, in seconds since the epoch."""
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
        """The borrower's name, or empty if it is gone or another process has its pid by now."""
        from fdbroker.ipc.client.processes import name_of

        return name_of(self.pid, self.since)


class Usage(NamedTuple):
    """What one uid uses of the broker: what `Client.usage` lists.

    Of both the keys are sessions, loans (entries on loan or waited for), entries (that it has put),
    waiting (requests), bytes (of answers that it has not read), closes (descriptors that are being
    closed, or are not entered yet), inflight (descriptors sent to it that it has not received).
    """

    uid: int
    used: dict[str, int]
    limits: dict[str, int | None]
    """As things are now: more is free when others give back.  None: whatever there is."""


class Client:
    """A connection pool to the broker at `address`, a socket's path (see `default_address`).

    It connects when it is first used.  Close it, or use it in a ``with``: loans that are out then
    stay valid until they are closed.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = default_address() if address is None else address
        self._pool = Pool(self.address)

    # --- borrowing ---

    def borrow(
        self,
        name: str,
        *,
        exclusive: bool = False,
        mode: str | None = None,
        timeout: float | None = None,
        purpose: str = "",
    ) -> Loan:
        """Borrow the entry `name`, now; the loan is returned by its `close`, ``with`` or death.

        exclusive: nobody else has it meanwhile; waits for its turn, in order of arrival.
        mode: ``"r"`` for a read-only description with an offset of its own (regular files, memfds).
        timeout: seconds to wait for the turn; None waits for ever, 0 not at all.
        purpose: up to 128 bytes that `loans` shows to others.

        Raises `UnknownEntry`, `BorrowTimeout`, `WouldDeadlock`, `EntryRetired`, `UnsupportedKind`
        (mode), `TooManyFiles`, `NotPermitted`, `BrokerClosing`, `NoBroker`.
        """
        key = name, exclusive, mode, timeout, purpose
        try:
            return borrow(self._pool, known(key) or prepare(key))
        except UnknownEntry as error:
            raise self._with_nearest(error) from None

    def borrow_all(
        self,
        names: Sequence[str],
        *,
        exclusive: bool = False,
        mode: str | None = None,
        timeout: float | None = None,
        purpose: str = "",
    ) -> Loan:
        """Borrow several entries at once, all or nothing, as one loan.  As `borrow` otherwise."""
        if isinstance(names, str | bytes):
            raise TypeError("borrow_all takes several names: borrow() takes one")
        key = tuple(names), exclusive, mode, timeout, purpose
        try:
            return borrow(self._pool, known(key) or prepare(key))
        except UnknownEntry as error:
            raise self._with_nearest(error) from None

    def borrow_ticket(
        self,
        ticket: bytes,
        *,
        exclusive: bool = False,
        mode: str | None = None,
        timeout: float | None = None,
        purpose: str = "",
    ) -> Loan:
        """Borrow what a `SharedFD` stands for; `UnknownTicket`.  As `borrow` otherwise."""
        check_ticket(ticket)
        key = ticket, exclusive, mode, timeout, purpose
        return borrow(self._pool, known(key) or prepare(key))

    def _with_nearest(self, error: UnknownEntry) -> UnknownEntry:
        """The same error, with the names that look most like the one asked for."""
        from difflib import get_close_matches
        from itertools import islice

        try:
            names = [entry.name for entry in islice(self._entries(), NAMES_LOOKED_AT)]
        except FDBrokerError:  # it may not list
            return error
        return UnknownEntry(error.name, get_close_matches(error.name, names, NEAREST_NAMES))

    # --- entries ---

    def put(
        self, name: str, obj: HasFileno | int, *, replace: bool = False, ephemeral: bool = False
    ) -> int:
        """Have the broker keep a dup of `obj` under `name`; `obj` stays the caller's.

        replace: an entry of that name retires in the same instant.  ephemeral: it retires when
        this process ends.  Returns the entry's generation, a number that only grows.  Raises
        `NameTaken`, `BadName`, `UnsupportedKind`, `NotPermitted`, `BrokerFull`, `BrokerClosing`.
        """
        check_name(name)
        flags = REPLACE * bool(replace) | EPHEMERAL * bool(ephemeral)
        generation, _ = self._put(name, obj, flags)
        return int(generation)

    def share(self, obj: HasFileno | int) -> SharedFD:
        """A nameless entry that ends with its owner: ``with client.share(file) as ref:``.

        `ref` can be pickled into any number of processes; each borrows with ``ref.borrow()``.
        """
        from fdbroker.ipc.client.shared import SharedFD

        _, ticket = self._put("", obj, NAMELESS | EPHEMERAL)
        return SharedFD(self.address, bytes(ticket), self)

    def _put(self, name: str, obj: HasFileno | int, flags: int) -> list[Any]:
        if isinstance(obj, bool):
            raise TypeError("a descriptor is an int or has a fileno(), not a bool")
        fd = obj if isinstance(obj, int) else obj.fileno()
        os.fstat(fd)  # a number that is closed could become the one of a session's socket
        for _ in range(TRIES):
            try:
                putter = self._pool.take_putter()
            except NotPermitted as error:
                if error.verb != "put":
                    raise
                raise NotPermitted(error.uid, "put", name or "*") from None  # what it was for
            try:
                return putter.put(name, flags, fd)
            except StaleSession:
                continue
            except OSError as error:
                if error.errno == errno.EINVAL:  # what the kernel itself refuses to send: io_uring
                    from fdbroker.descriptors import inspect

                    inspect(fd)
                raise
            finally:
                self._pool.give_putter(putter)
        raise BrokerGone(self.address)

    def retire(self, name: str | bytes, wait: bool = False, timeout: float | None = None) -> None:
        """The entry refuses new borrows from now on, its name is free, its last return closes it.

        wait: return when that close has happened, at most `timeout` seconds from now.  Raises
        `UnknownEntry`, `RetireTimeout`, `CloseFailed`, and `WouldDeadlock` (with nothing changed)
        if this process has it on loan itself.
        """
        if isinstance(name, bytes):
            check_ticket(name)
        else:
            check_name(name)
        wait_for = check_timeout(timeout) if wait and timeout is not None else None
        try:
            self._request(RETIRE, name, bool(wait), wait_for, timeout=wait_for)
        except UnknownEntry as error:
            raise self._with_nearest(error) from None

    def entries(self) -> list[EntryInfo]:
        """All entries that can be borrowed by name, or are retiring with loans still out."""
        return list(self._entries())

    def _entries(self) -> Iterator[EntryInfo]:
        from fdbroker.descriptors import Kind

        cursor, since_boot = 0, _boot()
        while True:
            cursor, rows = self._request(ENTRIES, cursor, pages=True)
            for row in rows:
                name, kind, where, generation, loans, waiting, uid, since, retired = EntryRow(*row)
                yield EntryInfo(
                    *(name, Kind(kind).label, where, generation, loans, waiting, uid),
                    since=since_boot + since / 1e9,
                    retired=retired,
                )
            if not cursor:
                return

    def loans(self, name: str | None = None) -> list[LoanInfo]:
        """All loans that are out, or those of the entry `name` (of retiring ones too)."""
        if name is not None:
            check_name(name)
        found: list[LoanInfo] = []
        cursor, index, since_boot = 0, 0, _boot()
        while True:
            cursor, index, rows = self._request(LOANS, name or "", cursor, index, pages=True)
            for row in rows:
                info = LoanRow(*row)
                found.append(LoanInfo(*info)._replace(since=since_boot + info.since / 1e9))
            if not cursor and not index:
                return found

    def stats(self) -> dict[str, int]:
        """Counts of the broker: sessions, entries, loans, waiting, descriptors, and more."""
        (pairs,) = self._request(STATS)
        return dict(pairs)

    def usage(self) -> list[Usage]:
        """What each uid uses of the broker, and what it may use at most, by uid.

        Who uses nothing is not in it.  It takes the right to admin: `NotPermitted`.
        """
        from fdbroker.lender.accounting import RESOURCES

        found: list[Usage] = []
        cursor = 0
        while True:
            cursor, rows = self._request(USAGE, cursor, pages=True)
            for uid, *lists in rows:
                found.append(Usage(uid, *(dict(zip(RESOURCES, one, strict=True)) for one in lists)))
            if not cursor:
                return found

    # --- the client itself ---

    def _request(self, verb: int, *fields: Any, **how: Any) -> list[Any]:
        for _ in range(TRIES):
            session = self._pool.take()
            try:
                return session.request(verb, *fields, **how)
            except StaleSession:
                continue
            finally:
                self._pool.give(session)
        raise BrokerGone(self.address)

    def close(self) -> None:
        """End the idle sessions.  Ephemeral entries stay, they end with the process."""
        self._pool.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.address}>"


def _boot() -> float:
    """When CLOCK_BOOTTIME was zero, in seconds since the epoch."""
    return time() - clock_gettime(CLOCK_BOOTTIME)


_clients: dict[str, Client] = {}


def client_at(address: str) -> Client:
    """This process's own client of that address, made once."""
    client = _clients.get(address)
    if client is None:
        client = _clients.setdefault(address, Client(address))
    return client


def forget_client_at(address: str) -> None:
    """Close it: its broker ends."""
    client = _clients.pop(address, None)
    if client is not None:
        client.close()
