"""The client: put, borrow, and ask what there is, over a pool of sessions.

A client may be used by any number of threads, and after a fork in the child too: each request or
loan takes a session of its own, and a child starts with none.  Every method is one request.

A `SharedFD` is a descriptor that can be an argument to another process.  It is a ticket for a
nameless entry of a broker, and pickles as the address and the ticket, any number of times, in any
start method of multiprocessing.  Unpickling borrows nothing and so leaks nothing; `SharedFD.borrow`
does, where and when the descriptor is needed.  The ticket is a capability of 128 random bits: a
process that has it, and is served by the broker at all, may borrow.

**Nothing is imported later.**  A server may make its client as root and then drop its privileges
or change its root, and from then on it may not be able to read this package or the library of
Python.  So this module imports all that a client, its loans and their wrappers will ever need;
psutil alone is imported when it is asked for, and its absence is no error (info.py).  The command
``fdbroker exec`` cannot wait for that.  It borrows with `Pool` and `borrow` and not with a client.
"""

from __future__ import annotations

import contextlib
import errno
import os
from difflib import get_close_matches
from itertools import islice
from time import CLOCK_BOOTTIME, clock_gettime, time
from typing import TYPE_CHECKING, Any, Protocol

import fdbroker.ipc.client.wrappers  # noqa: F401 - for the loans: see above
from fdbroker.descriptors import Kind, inspect
from fdbroker.errors import (
    BrokerGone,
    ClosedClientError,
    FDBrokerError,
    NoBroker,
    NotPermitted,
    UnknownEntry,
    UnknownTicket,
)
from fdbroker.ipc.client.borrow import (
    borrow,
    check_ticket,
    check_timeout,
    encode_borrow,
    prepared,
)
from fdbroker.ipc.client.connection import StaleSession
from fdbroker.ipc.client.info import EntryInfo, LoanInfo, Usage
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
from fdbroker.lender.accounting import RESOURCES
from fdbroker.lender.names import check_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from fdbroker.ipc.client.loan import Loan

NEAREST_NAMES = 2  # that an UnknownEntry suggests
NAMES_COMPARED = 1000  # for that, at most


class HasFileno(Protocol):
    """Anything with a descriptor."""

    def fileno(self) -> int: ...


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

        exclusive: no other loan is out meanwhile; waits for its turn, in order of arrival.
        mode: ``"r"`` for a read-only description with an offset of its own (regular files, memfds).
        timeout: seconds to wait for the turn; None waits for ever, 0 not at all.
        purpose: up to 128 bytes that `loans` shows to others.

        Raises `UnknownEntry`, `BorrowTimeout`, `WouldDeadlock`, `EntryRetired`, `UnsupportedKind`
        (mode), `TooManyFiles`, `NotPermitted`, `BrokerClosing`, `NoBroker`.
        """
        key = name, exclusive, mode, timeout, purpose
        try:
            return borrow(self._pool, prepared(key) or encode_borrow(key))
        except UnknownEntry as error:
            raise with_nearest(self, error) from None

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
            return borrow(self._pool, prepared(key) or encode_borrow(key))
        except UnknownEntry as error:
            raise with_nearest(self, error) from None

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
        return borrow(self._pool, prepared(key) or encode_borrow(key))

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
        """Put a nameless entry that ends with its owner: ``with client.share(file) as ref:``.

        `ref` can be pickled into any number of processes; each borrows with ``ref.borrow()``.
        """
        _, ticket = self._put("", obj, NAMELESS | EPHEMERAL)
        return SharedFD(self.address, bytes(ticket), self)

    def _put(self, name: str, obj: HasFileno | int, flags: int) -> list[Any]:
        if isinstance(obj, bool):
            raise TypeError("a descriptor is an int or has a fileno(), not a bool")
        fd = obj if isinstance(obj, int) else obj.fileno()
        os.fstat(fd)  # a number that is closed could become the one of a session's socket
        for _ in range(TRIES):
            try:
                session = self._pool.acquire_put_session()
            except NotPermitted as error:
                if error.verb != "put":
                    raise
                # The refusal of the session has no name in it.
                raise NotPermitted(error.uid, "put", name or "*") from None
            try:
                return session.put(name, flags, fd)
            except StaleSession:
                continue
            except OSError as error:
                if error.errno == errno.EINVAL:
                    # The kernel itself refuses to send some kinds (io_uring), which this raises.
                    inspect(fd)
                raise
            finally:
                self._pool.release_put_session(session)
        raise BrokerGone(self.address)

    def retire(self, name: str | bytes, wait: bool = False, timeout: float | None = None) -> None:
        """Take an entry out: no new borrow, its name is free, and its last return closes it.

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
            raise with_nearest(self, error) from None

    def entries(self) -> list[EntryInfo]:
        """Return the entries that can be borrowed by name, or are retiring with loans still out."""
        return list(self._entries())

    def _entries(self) -> Iterator[EntryInfo]:
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
        """Return all loans that are out, or those of the entry `name` (of retiring ones too)."""
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
        """Return counts of the broker: sessions, entries, loans, waiting, descriptors, and more."""
        (pairs,) = self._request(STATS)
        return dict(pairs)

    def usage(self) -> list[Usage]:
        """Return what each uid uses of the broker, and may use at most, by uid.

        A uid that uses nothing is not listed.  It takes the right to admin: `NotPermitted`.
        """
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
            session = self._pool.acquire()
            try:
                return session.request(verb, *fields, **how)
            except StaleSession:
                continue
            finally:
                self._pool.release(session)
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


def with_nearest(client: Client, error: UnknownEntry) -> UnknownEntry:
    """Return the error with the names of entries that look most like the one asked for."""
    try:
        names = [entry.name for entry in islice(client._entries(), NAMES_COMPARED)]
    except FDBrokerError:  # this user may not list
        return error
    return UnknownEntry(error.name, get_close_matches(error.name, names, NEAREST_NAMES))


def _boot() -> float:
    """Return when CLOCK_BOOTTIME was zero, in seconds since the epoch."""
    return time() - clock_gettime(CLOCK_BOOTTIME)


_clients: dict[str, Client] = {}


def client_at(address: str) -> Client:
    """Return this process's own client of that address, made once."""
    client = _clients.get(address)
    if client is None:
        client = _clients.setdefault(address, Client(address))
    return client


def forget_client_at(address: str) -> None:
    """Close this process's own client of that address: its broker ends."""
    client = _clients.pop(address, None)
    if client is not None:
        client.close()


class SharedFD:
    """Made by `Client.share`; the one made there is the owner, unpickled ones only borrow."""

    __module__ = "fdbroker"  # where pickles look for it
    __slots__ = ("_address", "_owner", "_owner_pid", "_ticket")

    def __init__(self, address: str, ticket: bytes, owner: Client | None = None) -> None:
        self._address = address
        self._ticket = ticket
        self._owner = owner
        self._owner_pid = os.getpid() if owner is not None else 0

    def borrow(
        self,
        *,
        exclusive: bool = False,
        mode: str | None = None,
        timeout: float | None = None,
        purpose: str = "",
    ) -> Loan:
        """Borrow it in this process, as `Client.borrow`; `UnknownTicket` once it has retired."""
        return client_at(self._address).borrow_ticket(
            self._ticket, exclusive=exclusive, mode=mode, timeout=timeout, purpose=purpose
        )

    def close(self) -> None:
        """Retire the entry, if this is its owner: its last return closes it.

        Elsewhere, in a forked child too, and the second time, this does nothing.
        """
        owner = self._owner
        if owner is not None and self._owner_pid == os.getpid():
            # An entry or a broker that has ended already needs no retiring.
            with contextlib.suppress(UnknownTicket, NoBroker, BrokerGone):
                try:
                    owner.retire(self._ticket)
                except ClosedClientError:  # the entry lasts as long as the process
                    with Client(self._address) as other:
                        other.retire(self._ticket)
        self._owner = None

    def __enter__(self) -> SharedFD:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedFD, (self._address, self._ticket)

    def __repr__(self) -> str:
        role = "owner of" if self._owner is not None else "ticket for"
        return f"<SharedFD, {role} an entry of {self._address}>"
