"""What the broker does at each verb: one method each, and a table of them.

A handler gets the connection (with its session, and what a worker has received of the message),
the seq, and the fields, which fit the table of messages.  It returns the reply, or None if there is
none now: because the verb has none, or because the lender or a worker will bring it.  It raises
what the client is told.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fdbroker.errors import BrokerClosing, NotPermitted, ProtocolError
from fdbroker.ipc.protocol.codec import encode
from fdbroker.ipc.protocol.messages import (
    BORROW,
    CANCEL,
    ENTRIES,
    EPHEMERAL,
    HELLO,
    LOANS,
    MORE,
    NAMELESS,
    PAGE_LOOKS,
    PAGE_ROWS,
    PUT,
    REPLACE,
    RETIRE,
    RETURN,
    STATS,
    TICKET_BYTES,
    USAGE,
    WHERE_CHARS,
    EntryRow,
    LoanRow,
    UsageRow,
)
from fdbroker.ipc.server.policy import check, check_listener, check_somewhere
from fdbroker.ipc.transport.rlimit import too_many_files
from fdbroker.lender.accounting import NO_LIMIT, RESOURCES
from fdbroker.lender.lender import out_of_turn
from fdbroker.lender.model import IDLE, LENT, LIVE
from fdbroker.lender.names import check_name

if TYPE_CHECKING:
    from fdbroker.ipc.server.connection import ServerConnection
    from fdbroker.ipc.server.custody import Custody
    from fdbroker.ipc.server.delivery import Delivery
    from fdbroker.ipc.server.event_loop import EventLoop
    from fdbroker.ipc.server.jobs import Receive
    from fdbroker.lender import Lender
    from fdbroker.lender.model import Entry, LoanRequest, Session

Fields = tuple[Any, ...]
Reply = bytes | None
Handler = Callable[["ServerConnection", int, Any], Reply]


class Handlers:
    """The handlers of one broker.

    `wait_began` is called when a request waits, which may have a deadline.  `refresh_usage` brings
    up to date what the accounts say, and `stats` counts.
    """

    def __init__(
        self,
        loop: EventLoop,
        lender: Lender,
        delivery: Delivery,
        *,
        custody: Custody,
        wait_began: Callable[[], None],
        refresh_usage: Callable[[], None],
        stats: Callable[[], dict[str, int]],
    ) -> None:
        self.draining = False
        self._loop = loop
        self._lender = lender
        self._delivery = delivery
        self._custody = custody
        self.wait_began = wait_began
        self._refresh_usage = refresh_usage
        self._stats = stats
        self.table: dict[int, Handler] = {
            HELLO: self._hello,
            BORROW: self._borrow,
            MORE: self._more,
            RETURN: self._return,
            CANCEL: self._cancel,
            PUT: self._put,
            RETIRE: self._retire,
            ENTRIES: self._entries,
            LOANS: self._loans,
            STATS: self._count,
            USAGE: self._usage,
        }

    def _hello(self, at: ServerConnection, seq: int, fields: Fields) -> Reply:
        """Refuse a second HELLO; the first one is answered before there is a session."""
        raise ProtocolError("client", "hello comes once")

    # --- borrowing ---

    def check_borrow(self, at: ServerConnection, request: LoanRequest) -> None:
        """Raise unless the peer may borrow all that is asked for, in this way."""
        _require(at, IDLE)
        for name in request.names:
            check(at.rights, at.peer, BORROW, name, readonly=request.readonly)
        for name in request.names:
            # A ticket was made by a process that had the socket.
            if isinstance(name, str):
                check_listener(at.rights, at.peer, self._lender.names.get(name))

    def _borrow(self, at: ServerConnection, seq: int, request: LoanRequest) -> Reply:
        """Grant the loan now, or let the session wait for it."""
        if not at.rights.unlimited:
            self.check_borrow(at, request)
        if self._lender.borrow(at.session, seq, request, self._loop.now):
            self._delivery.grant(at, seq)
        else:
            self.wait_began()
        return None

    def _more(self, at: ServerConnection, seq: int, fields: Fields) -> Reply:
        """Send the next descriptors of a loan of many."""
        (offset,) = fields
        _require(at, LENT)
        if not 0 < offset < len(at.session.entries):
            raise ProtocolError("client", "there are no more descriptors")
        self._lender.advance(at.session, seq)
        self._delivery.grant(at, seq, offset)
        return None

    def _return(self, at: ServerConnection, seq: int, fields: Fields) -> Reply:
        """End the loan."""
        self._lender.return_loan(at.session, seq, self._loop.now)
        return None

    def _cancel(self, at: ServerConnection, seq: int, fields: Fields) -> Reply:
        """End a wait.  A grant that crossed the CANCEL stands, and the client returns it."""
        self._lender.cancel(at.session, seq, self._loop.now)
        return None

    # --- entries ---

    def _put(self, at: ServerConnection, seq: int, fields: Fields) -> Reply:
        """Enter the descriptor that a worker has received and inspected."""
        name, flags = fields
        _require(at, IDLE, LENT)
        arrival = at.arrival
        if arrival is not None and arrival.truncated and not arrival.count:
            raise too_many_files("broker")
        if arrival is None or arrival.truncated or arrival.count != 1:
            raise ProtocolError("client", "a put brings one descriptor")
        if not flags & NAMELESS:
            check_name(name)
        elif name or not flags & EPHEMERAL:
            raise ProtocolError("client", "a nameless entry has no name, and ends with its maker")
        check(at.rights, at.peer, PUT, name)
        if flags & REPLACE:
            check(at.rights, at.peer, RETIRE, name)
        if self.draining:
            raise BrokerClosing()
        if arrival.refusal is not None:
            raise arrival.refusal
        entry = self._enter(at.session, seq, name, flags, arrival)
        entry.target, entry.parcel = arrival.target, arrival.parcel
        self._custody.keep_entry(entry.slot, entry.sysfd)
        return encode([0, seq, entry.generation, entry.ticket])

    def _enter(self, session: Session, seq: int, name: str, flags: int, arrival: Receive) -> Entry:
        assert arrival.fd is not None
        entry = self._lender.put(
            session,
            seq,
            name,
            os.urandom(TICKET_BYTES) if flags & NAMELESS else b"",
            arrival.fd,
            arrival.kind,
            self._loop.now,
            replace=bool(flags & REPLACE),
            ephemeral=bool(flags & EPHEMERAL),
            charge=arrival.charge,
        )
        # From here on the descriptor is the entry's, and so is the charge.
        arrival.fd = arrival.charge = None
        return entry

    def _retire(self, at: ServerConnection, seq: int, fields: Fields) -> Reply:
        """Have an entry refuse new borrows; with `wait` the reply comes after its final close."""
        name, wait, timeout = fields
        _require(at, *((IDLE,) if wait else (IDLE, LENT)))
        self._check_retire(at, name)
        if wait:
            self._lender.retire_and_wait(at.session, seq, name, self._loop.now, timeout)
            self.wait_began()
            return None
        self._lender.retire(name, self._loop.now)
        self._lender.advance(at.session, seq)
        return encode([0, seq])

    def _check_retire(self, at: ServerConnection, name: str | bytes) -> None:
        """A ticket lets its bearer borrow.  To retire by it takes the uid that made the entry, or
        the right to retire what has no name."""
        if isinstance(name, str):
            check(at.rights, at.peer, RETIRE, name)
        elif not at.rights.may("retire", "") and self._lender.find(name).uid != at.peer.uid:
            raise NotPermitted(at.peer.uid, "retire")

    # --- lists ---

    def _entries(self, at: ServerConnection, seq: int, fields: Fields) -> Reply:
        """List a page of the entries that have a name and that the peer may list, by slot."""
        (cursor,) = fields
        _require(at, IDLE, LENT)
        check_somewhere(at.rights, at.peer, ENTRIES)
        self._lender.advance(at.session, seq)
        following, rows = 0, list[EntryRow]()
        for looks, (slot, entry) in enumerate(self._lender.entries_from(cursor)):
            if len(rows) == PAGE_ROWS or looks == PAGE_LOOKS:
                following = slot
                break
            if entry is not None and entry.name and at.rights.may("list", entry.name):
                rows.append(_entry_row(entry))
        return encode([0, seq, following, rows])

    def _loans(self, at: ServerConnection, seq: int, fields: Fields) -> Reply:
        """List a page of the loans that the peer may list, by session slot, `index` in a loan."""
        name, *start = fields
        _require(at, IDLE, LENT)
        if name:
            check(at.rights, at.peer, LOANS, name)
        else:
            check_somewhere(at.rights, at.peer, LOANS)
        self._lender.advance(at.session, seq)
        following, rows = (0, 0), list[LoanRow]()
        for looks, (slot, index, holder) in enumerate(_lent(self._lender, *start)):
            if len(rows) == PAGE_ROWS or looks == PAGE_LOOKS:
                following = slot, index
                break
            if holder is None:
                continue
            entry = holder.entries[index]
            if (not name or entry.name == name) and at.rights.may("list", entry.name):
                rows.append(_loan_row(holder, entry))
        return encode([0, seq, *following, rows])

    def _count(self, at: ServerConnection, seq: int, fields: Fields) -> Reply:
        """Count sessions, loans, entries and more."""
        _require(at, IDLE, LENT)
        check(at.rights, at.peer, STATS, "")
        self._lender.advance(at.session, seq)
        return encode([0, seq, list(self._stats().items())])

    def _usage(self, at: ServerConnection, seq: int, fields: Fields) -> Reply:
        """List a page of what each uid uses, by uid."""
        (cursor,) = fields
        _require(at, IDLE, LENT)
        check(at.rights, at.peer, USAGE, "")
        self._lender.advance(at.session, seq)
        self._refresh_usage()
        accounting, following, rows = self._lender.accounting, 0, list[UsageRow]()
        for uid in sorted(uid for uid in accounting.accounts if uid >= cursor):
            if len(rows) == PAGE_ROWS:
                following = uid
                break
            account = accounting.accounts[uid]
            limits = [accounting.limit(account, resource) for resource in RESOURCES]
            used = [getattr(account, resource) for resource in RESOURCES]
            rows.append(
                UsageRow(uid, used, [limit if limit < NO_LIMIT else None for limit in limits])
            )
        return encode([0, seq, following, rows])


def _require(at: ServerConnection, *states: int) -> None:
    """Raise unless the session is in one of these states."""
    if at.session.state not in states:
        raise out_of_turn(at.session, "a session carries one loan, or waits for one thing")


def _entry_row(entry: Entry) -> EntryRow:
    return EntryRow(
        entry.name,
        entry.kind,
        entry.target[:WHERE_CHARS],
        entry.generation,
        len(entry.holders),
        len(entry.waiters),
        entry.uid,
        entry.since,
        entry.state != LIVE,
    )


def _loan_row(holder: Session, entry: Entry) -> LoanRow:
    return LoanRow(
        entry.name,
        f"{holder.id}.{holder.borrow_seq}",
        holder.peer.pid,
        holder.peer.uid,
        holder.since,
        holder.request.exclusive,
        holder.request.purpose,
        entry.generation,
    )


def _lent(lender: Lender, cursor: int, index: int) -> Iterator[tuple[int, int, Session | None]]:
    """Every entry of every loan from there on: slot, index in the loan, holder; and every slot
    without a loan."""
    for slot, holder in lender.sessions_from(cursor):
        if holder is None or holder.state != LENT:
            yield slot, 0, None
        else:
            for at in range(index if slot == cursor else 0, len(holder.entries)):
                yield slot, at, holder
