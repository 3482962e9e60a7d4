"""The same events once more: a recording is fed into a fresh lender, which must do the same.

Its descriptors are made up: an FD that is closed here only says so, and each must be closed when
the recorded closer reported it.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import msgpack

from fdbroker.errors import by_code
from fdbroker.lender import Ledger, Lender, LoanRequest, Peer
from fdbroker.lender.accounting import Charge, Quota
from fdbroker.lender.model import LIVE
from fdbroker.rc import FD

from .record import (
    CHARGE,
    CHARGES,
    CHECKPOINT,
    DESCRIPTOR,
    END,
    ENTRY,
    ERROR,
    EVENTS,
    PEER,
    QUOTA,
    SESSION,
    SIZES,
    SYSTEM_ERROR,
    TUPLE,
    WISH,
    digest,
    outcome,
)

NUMBERS = 1_000_000_000  # from here on made-up descriptors, that no process has


class Different(Exception):
    """The lender did not do again what it had done."""


class Same(NamedTuple):
    """It did; so many events, digests that were compared, and whether the recording has an end."""

    events: int
    digests: int
    whole: bool
    digest: bytes
    """At the end."""


def replay(path: str, lender_class: type[Lender] = Lender) -> Same:
    """Feed the recording at `path` into a fresh lender.  `Different` names the first event after
    which it is not as it was."""
    with open(path, "rb") as file, contextlib.closing(Replay(file, lender_class)) as one:
        return one.run()


class Replay:
    """One lender, and the recording that it is fed with."""

    def __init__(self, file: IO[bytes], lender_class: type[Lender] = Lender) -> None:
        self._records = self._read(file)
        first, _ = next(self._records, (b"", b""))
        if not first:
            raise Different("the recording was cut off before its first event")
        room = msgpack.unpackb(first)
        self.lender = lender_class(Ledger(bytearray(Ledger.size(*room)), *room))
        self.closed: set[int] = set()
        self._made = NUMBERS

    def run(self) -> Same:
        events = digests = 0
        whole = False
        for asked, came in self._records:
            method, arguments, named = msgpack.unpackb(asked, ext_hook=self._restore)
            if method in (CHECKPOINT, END):
                if digest(self.lender) != came:
                    raise Different(f"after {events} events the ledger has other bytes")
                digests += 1
                whole = method == END
                continue
            events += 1
            found = self._repeat(method, arguments, named)
            if found != came:
                raise Different(
                    f"event {events}, {method}{tuple(arguments)}: "
                    f"it was {_shown(came)}, it is {_shown(found)}"
                )
        return Same(events, digests, whole, digest(self.lender))

    def close(self) -> None:
        """Its process would end now."""
        for entry in list(self.lender.entries.values()):
            if entry.state == LIVE:
                entry.fd.retire()
            while not entry.fd.closed:
                entry.fd.decref()

    def _repeat(self, method: str, arguments: list[Any], named: dict[str, Any]) -> bytes:
        """Do it again: what came of it, as it is recorded."""
        lender, accounting = self.lender, self.lender.accounting
        if method == "closed":
            fd = arguments[0].fd
            fd.decref()  # the closer's reference
            if not fd.closed:
                raise Different(f"{arguments[0]} was closed, and here has {fd.refs} references")
        if method in EVENTS:
            call = lambda: getattr(lender, method)(*arguments, **named)  # noqa: E731
        elif method == "account":
            call = lambda: accounting.account(*arguments) and None  # noqa: E731
        elif method == "add":
            uid, what, count = arguments
            account = None if uid is None else accounting.accounts[uid]
            call = lambda: accounting.add(account, what, count)  # noqa: E731
        elif method == "drop_idle":
            call = lambda: accounting.drop_idle(accounting.accounts[arguments[0]])  # noqa: E731
        elif method == "supply":
            call = lambda: setattr(accounting, *arguments)  # noqa: E731
        elif method in CHARGES:
            uid, *rest = arguments
            call = lambda: getattr(accounting.accounts[uid], method)(*rest)  # noqa: E731
        else:
            raise Different(f"the recording has an event that is none: {method}")
        found, error = outcome(lender, call)
        if method == "put" and error is not None:
            arguments[4].detach()  # it was not taken
        lender.notifications.clear()
        lender.pending_closes.clear()
        return found

    def _restore(self, kind: int, data: bytes) -> Any:
        """The argument that was recorded, as the lender here knows it."""
        fields = msgpack.unpackb(data, ext_hook=self._restore)
        match kind:
            case _ if kind in (SESSION, ENTRY):
                slot, number = fields
                table = self.lender.sessions if kind == SESSION else self.lender.entries
                found: Any = table.get(slot)
                known = None if found is None else found.id if kind == SESSION else found.generation
                if known != number:
                    raise Different(f"slot {slot} has {found}, and not number {number}")
                return found
            case _ if kind == WISH:
                names, exclusive, readonly, timeout, purpose = fields
                return LoanRequest(tuple(names), exclusive, readonly, timeout, purpose)
            case _ if kind == DESCRIPTOR:
                self._made += 1
                return FD(self._made, close=self.closed.add)
            case _ if kind == SYSTEM_ERROR:
                return OSError(*fields) if fields[0] is not None else OSError(fields[1])
            case _ if kind == PEER:
                return Peer(*fields)
            case _ if kind == QUOTA:
                return Quota(*fields)
            case _ if kind == CHARGE:
                return self._charge(*fields)
            case _ if kind == TUPLE:
                return tuple(fields)
        raise Different(f"the recording has a value of unknown kind {kind}")

    def _charge(self, uid: int | None, resource: str, count: int) -> Charge:
        """A charge that was noted already, by an event of its own."""
        accounting = self.lender.accounting
        account = None if uid is None else accounting.account(uid)
        charge = accounting.charge(account, resource, 0)
        charge.count = count
        return charge

    @staticmethod
    def _read(file: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """The records: what was asked, and what came of it.  The last may have been cut off."""
        unzip, buffer = zlib.decompressobj(wbits=31), bytearray()  # 31: with gzip's header
        while more := file.read(2**16):
            buffer += unzip.decompress(more)
            at = 0
            while len(buffer) >= at + SIZES.size:
                sizes = SIZES.unpack_from(buffer, at)
                middle = at + SIZES.size + sizes[0]
                end = middle + sizes[1]
                if len(buffer) < end:
                    break
                yield bytes(buffer[at + SIZES.size : middle]), bytes(buffer[middle:end])
                at = end
            del buffer[:at]


def _shown(came: bytes) -> str:
    """What came of an event, for people."""

    def name(kind: int, data: bytes) -> Any:
        fields = msgpack.unpackb(data, ext_hook=name)
        if kind == ERROR:
            return f"{by_code()[fields[0]].__name__}{tuple(fields[1])}"
        if kind in (SESSION, ENTRY):
            return f"{'session' if kind == SESSION else 'entry'} {fields[1]} in slot {fields[0]}"
        return fields

    result, notifications, closes = msgpack.unpackb(came, ext_hook=name)
    return f"{result!r}, notifications {notifications}, pending closes {closes}"
