"""The recorder: every event that a lender gets, in order, and what came of it.

A recorded lender writes its events to a file (`EVENTS`, and `CHARGES` for its accounting, which the
server also uses by itself): the method, its arguments, then the result or the error, and what it
newly left in `notifications` and `pending_closes`.  An event within an event follows from it and is
not written.  Every so often a digest of the ledger's bytes and of all accounts is written too.

Nothing of this is in the product: `broker.py` puts it in the lender's place.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
from collections.abc import Callable
from itertools import islice
from typing import Any

import msgpack

from fdbroker.errors import FDBrokerError
from fdbroker.lender import Entry, Ledger, Lender, LoanRequest, Peer, Session
from fdbroker.lender.accounting import RESOURCES, Account, Accounting, Charge, Quota
from fdbroker.rc import FD

EVENTS = (
    *("open", "advance", "clear", "free"),
    *("borrow", "return_loan", "roll_back_grant", "cancel"),
    *("put", "retire", "retire_and_wait", "start_retiring", "closed"),
    *("pin", "unpin"),
    "expire",
)
LOOKS = (  # they change nothing, or only what is forgotten when nobody asks
    *("find", "check_put", "next_deadline"),
    *("loans", "waiting", "retiring", "entries_from", "sessions_from"),
)
CHARGES = ("account", "add", "drop_idle", "supply", "set_limit", "clear_limit")
CHECKPOINT, END = "#", "."
EVENTS_BETWEEN = 2000  # checkpoints
SIZES = struct.Struct("=II")  # before each record: of what was asked, and of what came of it

SESSION, ENTRY, WISH, DESCRIPTOR, PEER, TUPLE, ERROR, SYSTEM_ERROR, QUOTA, CHARGE = range(1, 11)


def extension(value: Any) -> Any:
    """What msgpack does not know, by what stands for it."""
    if isinstance(value, int):  # one of an enum
        return int(value)
    kind: int
    fields: list[Any]
    match value:
        case Session():
            kind, fields = SESSION, [value.slot, value.id]
        case Entry():
            kind, fields = ENTRY, [value.slot, value.generation]
        case LoanRequest():
            names, flags = list(value.names), [value.exclusive, value.readonly]
            kind, fields = WISH, [names, *flags, value.timeout, value.purpose]
        case FD():
            kind, fields = DESCRIPTOR, []
        case Peer():
            kind, fields = PEER, list(value)
        case Quota():
            kind, fields = QUOTA, list(value)
        case Charge():
            uid = None if value.account is None else value.account.uid
            kind, fields = CHARGE, [uid, value.resource, value.count]
        case FDBrokerError():
            kind, fields = ERROR, [value.code, list(value.data)]
        case OSError():
            kind, fields = SYSTEM_ERROR, [value.errno, str(value)]
        case tuple():
            kind, fields = TUPLE, list(value)
        case _:
            raise TypeError(f"the recorder does not know how to write {value!r}")
    return msgpack.ExtType(kind, pack(fields))


def pack(value: Any) -> bytes:
    """Its bytes: equal ones are of what is the same."""
    data: bytes = msgpack.packb(value, default=extension, strict_types=True)
    return data


def digest(lender: Lender) -> bytes:
    """Of the ledger, byte by byte, and of what each uid uses."""
    found = hashlib.blake2b(lender.ledger.buffer, digest_size=16)
    books = lender.accounting
    accounts = [books.total, *(books.accounts[uid] for uid in sorted(books.accounts))]
    used = [[account.uid, *(getattr(account, what) for what in RESOURCES)] for account in accounts]
    found.update(pack([books.own, books.descriptors, used]))
    return found.digest()


def outcome(lender: Lender, call: Callable[[], Any]) -> tuple[bytes, BaseException | None]:
    """Call it: what is recorded of what comes of it, and what it raised."""
    decided, closing = len(lender.notifications), len(lender.pending_closes)
    result = error = None
    try:
        result = call()
    except FDBrokerError as refusal:
        result = error = refusal
    news = (
        islice(lender.notifications, decided, None),
        islice(lender.pending_closes, closing, None),
    )
    return pack([result, *map(list, news)]), error


class Recorder:
    """Writes to the file at `path`; `close` says that it was all."""

    def __init__(self, path: str) -> None:
        self._file = io.BufferedWriter(gzip.GzipFile(path, "wb", compresslevel=1), 2**16)
        self.lender: Lender | None = None
        self.within = False  # an event
        self.events = 0

    def begin(self, lender: Lender) -> None:
        self.lender = lender
        ledger = lender.ledger
        self._write(pack([ledger.sessions, ledger.entries, ledger.cells]), b"")

    def _write(self, asked: bytes, came: bytes) -> None:
        self._file.write(SIZES.pack(len(asked), len(came)) + asked + came)

    def event(self, method: str, call: Callable[[], Any], *arguments: Any, **named: Any) -> Any:
        """Call it and write it down; a call within another is only called."""
        if self.within:
            return call()
        assert self.lender is not None
        self.within = True
        try:
            asked = pack([method, list(arguments), named])  # before: an ended session has no slot
            results: list[Any] = []
            came, error = outcome(self.lender, lambda: _kept(results, call()))
            if method != "expire" or self.lender.notifications:  # else nobody's time had come
                self._write(asked, came)
                self.events += 1
                if self.events % EVENTS_BETWEEN == 0:
                    self._mark(CHECKPOINT)
        finally:
            self.within = False
        if error is not None:
            raise error
        return results[0]

    def _mark(self, what: str) -> None:
        assert self.lender is not None
        self._write(pack([what, [self.events], {}]), digest(self.lender))

    def close(self) -> None:
        """The end: a recording without it was cut off."""
        if self.lender is not None:
            self._mark(END)
        self._file.close()


def _kept(results: list[Any], result: Any) -> Any:
    results.append(result)
    return result


def recording(recorder: Recorder) -> type[Lender]:
    """A class of lenders that are recorded by it."""

    class RecordedAccount(Account):
        __slots__ = ()

        def set_limit(self, quota: Quota) -> None:
            call = super().set_limit
            recorder.event("set_limit", lambda: call(quota), self.uid, quota)

        def clear_limit(self) -> None:
            call = super().clear_limit
            if hasattr(self, "quota"):  # it is not just being made
                recorder.event("clear_limit", call, self.uid)
            else:
                call()

    class RecordedAccounting(Accounting):
        def account(self, uid: int) -> Account:
            if uid not in self.accounts:
                recorder.event("account", lambda: self._make(uid), uid)
            return self.accounts[uid]

        def _make(self, uid: int) -> None:
            self.accounts[uid] = RecordedAccount(uid)

        def add(self, account: Account | None, what: str, count: int) -> None:
            call, uid = super().add, None
            if account is not None:
                uid = account.uid
                assert self.accounts.get(uid) is account, f"{account} was given up"
            if count:
                recorder.event("add", lambda: call(account, what, count), uid, what, count)

        def drop_idle(self, account: Account) -> None:
            call, known = super().drop_idle, self.accounts.get(account.uid)
            if known is not None and account.idle:
                assert known is account, f"{account} was given up, and is not {known}"
                recorder.event("drop_idle", lambda: call(account), account.uid)

        def __setattr__(self, name: str, value: Any) -> None:
            set_it = super().__setattr__
            if name in ("own", "descriptors") and recorder.lender is not None:
                recorder.event("supply", lambda: set_it(name, value), name, value)
            else:
                set_it(name, value)

    class RecordedLender(Lender):
        def __init__(self, ledger: Ledger) -> None:
            super().__init__(
                ledger, RecordedAccounting(ledger.sessions, ledger.entries, ledger.cells)
            )
            recorder.begin(self)

    def recorded(name: str) -> Callable[..., Any]:
        method = getattr(Lender, name)

        def event(self: Lender, *arguments: Any, **named: Any) -> Any:
            def call() -> Any:
                return method(self, *arguments, **named)

            return recorder.event(name, call, *arguments, **named)

        return event

    for name in EVENTS:
        setattr(RecordedLender, name, recorded(name))
    return RecordedLender
