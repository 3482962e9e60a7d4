"""What the broker does at each verb: one function each, and a table of them.

A handler gets the server, the connection (with its session, and the descriptors that came in its
inbox), the seq, and the fields, which fit the table in messages.py.  It returns the reply, or None
if there is none now: because the verb has none, or because a waiting line or a worker will bring
it.  It raises what the client is told.

Whether a request is permitted is asked before anything is looked for, so that who may not have an
entry does not learn whether it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fdbroker.errors import BrokerClosing, NotPermitted, ProtocolError
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
    USAGE,
    WHERE_CHARS,
    EntryRow,
    LoanRow,
    UsageRow,
    encode,
)
from fdbroker.ipc.server.jobs import Put
from fdbroker.ipc.server.policy import check_listener, check_right, check_right_somewhere
from fdbroker.ipc.transport.rlimit import too_many_files
from fdbroker.lender.accounting import NO_LIMIT, RESOURCES
from fdbroker.lender.lender import out_of_turn
from fdbroker.lender.model import IDLE, LENT, LIVE
from fdbroker.lender.names import check_name

if TYPE_CHECKING:
    from fdbroker.ipc.server.connection import Connection
    from fdbroker.ipc.server.server import Server
    from fdbroker.lender import Lender
    from fdbroker.lender.model import LoanRequest, Session

Fields = tuple[Any, ...]
Reply = bytes | None
Handler = Callable[["Server", "Connection", int, Any], Reply]


def _require(at: Connection, *states: int) -> None:
    """Raise unless the session is in one of these states."""
    if at.session.state not in states:
        raise out_of_turn(at.session, "a session carries one loan, or waits for one thing")


def hello(server: Server, at: Connection, seq: int, fields: Fields) -> Reply:
    """It is answered before there is a session, so here it is one too many."""
    raise ProtocolError("client", "hello comes once")


def borrow(server: Server, at: Connection, seq: int, request: LoanRequest) -> Reply:
    """Grant it now, or let the session wait for its turn."""
    if not at.rights.unlimited:
        _require(at, IDLE)
        for name in request.names:
            check_right(at, BORROW, name, readonly=request.readonly)
        for name in request.names:
            if isinstance(name, str):  # a ticket was made by who had the socket
                check_listener(at, server.lender.names.get(name))
    if server.lender.borrow(at.session, seq, request, server.now):
        server.hand_over(at, seq)
    return None


def more(server: Server, at: Connection, seq: int, fields: Fields) -> Reply:
    """The next descriptors of a loan of many."""
    (offset,) = fields
    _require(at, LENT)
    if offset >= len(at.session.entries):
        raise ProtocolError("client", "there are no more descriptors")
    server.lender.advance(at.session, seq)
    server.hand_over(at, seq, offset)
    return None


def give_back(server: Server, at: Connection, seq: int, fields: Fields) -> Reply:
    """RETURN: the loan ends."""
    server.lender.return_loan(at.session, seq, server.now)
    return None


def cancel(server: Server, at: Connection, seq: int, fields: Fields) -> Reply:
    """CANCEL: a wait ends; a grant that crossed it stands, the client returns it."""
    server.lender.cancel(at.session, seq, server.now)
    return None


def put(server: Server, at: Connection, seq: int, fields: Fields) -> Reply:
    """A new entry: checked here as far as possible, looked at by a worker, then entered."""
    name, flags = fields
    _require(at, IDLE, LENT)
    if at.inbox is not None and at.inbox.truncated and not at.inbox.fds:
        raise too_many_files("broker")
    if at.inbox is None or at.inbox.truncated or len(at.inbox.fds) != 1:
        raise ProtocolError("client", "a put brings one descriptor")
    if not flags & NAMELESS:
        check_name(name)
    elif name or not flags & EPHEMERAL:
        raise ProtocolError("client", "a nameless entry has no name, and ends with its maker")
    check_right(at, PUT, name)
    if flags & REPLACE:
        check_right(at, RETIRE, name)
    if server.draining:
        raise BrokerClosing()
    server.lender.check_put(at.session, name, bool(flags & REPLACE))
    (sysfd,) = at.inbox.give_away()
    server.start_job(at, Put(at, seq, name, flags, sysfd))
    return None


def retire(server: Server, at: Connection, seq: int, fields: Fields) -> Reply:
    """An entry refuses new borrows; with `wait` the reply comes after its final close."""
    name, wait, timeout = fields
    _require(at, *((IDLE,) if wait else (IDLE, LENT)))
    _check_retire(server, at, name)
    if wait:
        server.lender.retire_and_wait(at.session, seq, name, server.now, timeout)
        return None
    server.lender.retire(name, server.now)
    server.lender.advance(at.session, seq)
    return encode([0, seq])


def _check_retire(server: Server, at: Connection, name: str | bytes) -> None:
    """A ticket lets its bearer borrow; who may retire is the uid that made the entry, or one that
    may retire what has no name."""
    if isinstance(name, str):
        check_right(at, RETIRE, name)
    elif not at.rights.may("retire", "") and server.lender.find(name).uid != at.peer.uid:
        raise NotPermitted(at.peer.uid, "retire")


def entries(server: Server, at: Connection, seq: int, fields: Fields) -> Reply:
    """One page of the entries that have a name and may be listed, by slot from the cursor on."""
    (cursor,) = fields
    _require(at, IDLE, LENT)
    check_right_somewhere(at, ENTRIES)
    server.lender.advance(at.session, seq)
    following, rows = 0, list[EntryRow]()
    for looks, (slot, entry) in enumerate(server.lender.entries_from(cursor)):
        if len(rows) == PAGE_ROWS or looks == PAGE_LOOKS:
            following = slot
            break
        if entry is not None and entry.name and at.rights.may("list", entry.name):
            rows.append(
                EntryRow(
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
            )
    return encode([0, seq, following, rows])


def loans(server: Server, at: Connection, seq: int, fields: Fields) -> Reply:
    """One page of the loans of what may be listed, by session slot from the cursor on, `index`
    within a loan."""
    name, *start = fields
    _require(at, IDLE, LENT)
    if name:
        check_right(at, LOANS, name)
    else:
        check_right_somewhere(at, LOANS)
    server.lender.advance(at.session, seq)
    following, rows = (0, 0), list[LoanRow]()
    for looks, (slot, place, holder) in enumerate(_lent(server.lender, *start)):
        if len(rows) == PAGE_ROWS or looks == PAGE_LOOKS:
            following = slot, place
            break
        if holder is None:
            continue
        entry = holder.entries[place]
        if (not name or entry.name == name) and at.rights.may("list", entry.name):
            rows.append(
                LoanRow(
                    entry.name,
                    f"{holder.id}.{holder.borrow_seq}",
                    holder.peer.pid,
                    holder.peer.uid,
                    holder.since,
                    holder.request.exclusive,
                    holder.request.purpose,
                    entry.generation,
                )
            )
    return encode([0, seq, *following, rows])


def _lent(lender: Lender, cursor: int, index: int) -> Iterator[tuple[int, int, Session | None]]:
    """Every entry of every loan from there on: slot, place in the loan, who has it; and every slot
    without a loan."""
    for slot, holder in lender.sessions_from(cursor):
        if holder is None or holder.state != LENT:
            yield slot, 0, None
        else:
            for place in range(index if slot == cursor else 0, len(holder.entries)):
                yield slot, place, holder


def stats(server: Server, at: Connection, seq: int, fields: Fields) -> Reply:
    """Counts."""
    _require(at, IDLE, LENT)
    check_right(at, STATS, "")
    server.lender.advance(at.session, seq)
    return encode([0, seq, list(server.stats().items())])


def usage(server: Server, at: Connection, seq: int, fields: Fields) -> Reply:
    """One page of what each uid uses, by uid from the cursor on."""
    (cursor,) = fields
    _require(at, IDLE, LENT)
    check_right(at, USAGE, "")
    server.lender.advance(at.session, seq)
    server.look_at_all()
    quotas, following, rows = server.lender.accounting, 0, list[UsageRow]()
    for uid in sorted(uid for uid in quotas.accounts if uid >= cursor):
        if len(rows) == PAGE_ROWS:
            following = uid
            break
        account = quotas.accounts[uid]
        limits = [quotas.limit(account, what) for what in RESOURCES]
        rows.append(
            UsageRow(
                uid,
                [getattr(account, what) for what in RESOURCES],
                [limit if limit < NO_LIMIT else None for limit in limits],
            )
        )
    return encode([0, seq, following, rows])


HANDLERS: dict[int, Handler] = {
    HELLO: hello,
    BORROW: borrow,
    MORE: more,
    RETURN: give_back,
    CANCEL: cancel,
    PUT: put,
    RETIRE: retire,
    ENTRIES: entries,
    LOANS: loans,
    STATS: stats,
    USAGE: usage,
}
