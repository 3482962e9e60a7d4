"""The way of a borrow: what is asked for, encoded once, and the one flat path of asking for it.

Here and in `Loan.close` time is spent that every loan costs, and a call, an object, a property
each takes a few percent of it (benchmarks/README.md).  So the usual case is written out: one
process with one thread, a loan in one message, a broker that grants it in its usual form.
Everything else is `Session.take_loan` and its like.
"""

from __future__ import annotations

import os
import struct
from _thread import get_ident  # the one of `threading`, which costs too much at a start
from collections.abc import Callable
from itertools import starmap

from fdbroker.errors import BrokerGone
from fdbroker.ipc.client import fork
from fdbroker.ipc.client.connection import StaleSession
from fdbroker.ipc.client.fork import catch_up, later
from fdbroker.ipc.client.loan import Loan
from fdbroker.ipc.client.pool import TRIES
from fdbroker.ipc.client.session import NOBODY
from fdbroker.ipc.protocol import messages
from fdbroker.ipc.protocol.messages import BORROW, EXCLUSIVE, GRANTED, HEAD, READONLY, unpack_grant
from fdbroker.ipc.transport.received import Arguments, closing, message_with
from fdbroker.ipc.transport.unix import SEND
from fdbroker.lender.names import check_name

TYPE_CHECKING = False  # as a type checker knows it: `typing` costs too much at a start
if TYPE_CHECKING:
    from fdbroker.ipc.client.pool import Pool

KNOWN_BORROWS = 1024  # that are remembered
pack_head, close_number = HEAD.pack, os.close


# A borrow that was checked and encoded, all that is the same when it is asked for again: head and
# tail of the message; the counts of a grant in one message; how to receive that, and what unpacks
# its descriptors (struct.error if they are not as many as promised); whether these are several; the
# names; exclusive; timeout.  A plain tuple, since to unpack a NamedTuple takes five times as long.
Unpack = Callable[[bytes], tuple[int, ...]]
Borrow = tuple[bytes, bytes, bytes, Arguments, Unpack, bool, tuple[str, ...], bool, float | None]
Key = tuple[str | bytes | tuple[str, ...], bool, str | None, float | None, str]
_known: dict[Key, Borrow] = {}
known = _known.get


def prepare(key: Key) -> Borrow:
    """Check and encode a borrow: what, exclusive, mode, timeout, purpose."""
    what, exclusive, mode, timeout, purpose = key
    if mode not in (None, "r"):
        raise ValueError(f'mode is None or "r", not {mode!r}')
    if timeout is not None:
        timeout = check_timeout(timeout)
    check_purpose(purpose)
    names: tuple[str, ...] = ("",)
    if isinstance(what, tuple):
        check_names(names := what)
    elif isinstance(what, bytes):
        check_ticket(what)
    else:
        check_name(what)
        names = (what,)
    flags = EXCLUSIVE * bool(exclusive) | READONLY * (mode == "r")
    head, tail = messages.template(BORROW, what, flags, timeout, purpose)
    total = len(names)
    totals = messages.counts(total, total)
    unpack = struct.Struct(f"{total}i").unpack
    receiving = message_with(min(total, messages.DESCRIPTORS))
    several = total > 1
    request = head, tail, totals, receiving, unpack, several, names, bool(exclusive), timeout
    if len(_known) >= KNOWN_BORROWS:
        _known.clear()
    _known[key] = request
    return request


def borrow(pool: Pool, request: Borrow, tries: int = TRIES) -> Loan:
    """Ask for it with a session of the pool; the loan holds the session then."""
    head, tail, totals, receiving, unpack, several, names, exclusive, timeout = request
    if later:  # what an interrupted finalizer left
        catch_up()
    try:
        session = pool.idle.pop()
    except IndexError:
        session = pool.open()
    try:
        session.seq = seq = session.seq + 1
        send = session.send  # called as an attribute, a slot takes twice as long
        try:
            send(pack_head(head, seq) + tail, SEND)
        except ConnectionResetError:  # it died with something unread: this was not sent
            raise BrokenPipeError from None
        received = session.owned
        if timeout is not None:
            session.wait(seq, timeout)
        elif fork.other_threads():
            session.receive()
        else:
            received.extend(starmap(session.recvmsg, receiving))
        reply, ancillary, _, _ = received[0]
        try:
            start, of, counted, since = unpack_grant(reply)
            ((_, _, rights),) = ancillary
            fds = unpack(rights)
            usual = of == seq and counted == totals and start == GRANTED
        except (ValueError, struct.error):
            usual = False
        if usual:
            received[0] = closing(fds) if several else map(close_number, fds)
        else:
            fds, since = session.take_loan(seq, len(names), timeout)
        session.fds = fds
        session.names = names
        session.thread = NOBODY if exclusive else get_ident()
        loan = Loan()
        loan._names = names
        loan._since = since
        loan._session = session
        return loan
    except BaseException as error:
        try:
            session.give_up_after(error)
        except StaleSession:
            if tries == 1:
                raise BrokerGone(pool.address) from None
        else:
            pool.give(session)
            raise
    return borrow(pool, request, tries - 1)


def check_timeout(seconds: float) -> float | None:
    """`seconds` as the wire takes it: None for infinity.  ValueError below 0 and for a NaN."""
    if not seconds >= 0:
        raise ValueError(f"a timeout is None or at least 0 seconds, not {seconds!r}")
    return float(seconds) if seconds <= messages.TIMEOUT_SECONDS else None


def check_ticket(ticket: bytes) -> None:
    """ValueError for what cannot be a ticket, TypeError if it is not even bytes."""
    if not isinstance(ticket, bytes):
        raise TypeError(f"a ticket is bytes, not {type(ticket).__name__}")
    if len(ticket) != messages.TICKET_BYTES:
        raise ValueError(f"a ticket has {messages.TICKET_BYTES} bytes, not {len(ticket)}")


def check_purpose(purpose: str) -> None:
    """ValueError for a purpose that is too long, TypeError for one that is no str."""
    if not isinstance(purpose, str):
        raise TypeError(f"a purpose is a str, not {type(purpose).__name__}")
    if len(purpose.encode(errors="replace")) > messages.PURPOSE_BYTES or not purpose.isprintable():
        limit = messages.PURPOSE_BYTES
        raise ValueError(f"a purpose has at most {limit} printable bytes, not {purpose!a}")


def check_names(names: tuple[str, ...]) -> None:
    """`BadName` for one that is none, ValueError if they are too many for one message."""
    if not names:
        raise ValueError("borrow_all needs at least one name")
    for name in names:
        check_name(name)
    if len(names) > messages.NAMES:
        raise ValueError(f"at most {messages.NAMES} names can be borrowed at once")
    if sum(map(len, names)) + 3 * len(names) > messages.MESSAGE_BYTES - 1024:  # the other fields
        raise ValueError(f"these names take more than the {messages.MESSAGE_BYTES} bytes at once")
