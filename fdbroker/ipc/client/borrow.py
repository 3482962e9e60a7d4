"""What a borrow asks for, checked and encoded once, and the fast path of asking for it.

`encode_borrow` makes a `PreparedBorrow` of the arguments of a borrow, and remembers it for the next
time.  `borrow` sends it and makes a `Loan` of the reply.

**The fast path.**  Every loan pays for `borrow`.  So its usual case is written out in that one
function: a process with one thread, a loan in one message, a reply in the form in which the broker
encodes grants.  The slow twin, which must do the same, is `ClientConnection.wait` followed by
`Session.take_loan`; tests/ipc/test_fast_path.py holds the two together.  For speed, a function in a
slot is called through a local variable, and all that is the same at each call of one
`PreparedBorrow` is prepared there (benchmarks/README.md has the figures).
"""

from __future__ import annotations

import os
import struct
from _thread import get_ident  # `threading` would add to the start of `fdbroker exec`
from itertools import starmap

from fdbroker.errors import BrokerGone
from fdbroker.ipc.client import fork
from fdbroker.ipc.client.connection import StaleSession
from fdbroker.ipc.client.fork import deferred, run_deferred
from fdbroker.ipc.client.loan import Loan
from fdbroker.ipc.client.pool import TRIES
from fdbroker.ipc.client.session import NO_THREAD
from fdbroker.ipc.protocol.codec import GRANTED, HEAD, counts, template, unpack_grant
from fdbroker.ipc.protocol.messages import (
    BORROW,
    EXCLUSIVE,
    MESSAGE_BYTES,
    NAMES,
    PURPOSE_BYTES,
    READONLY,
    REPLY_BYTES,
    TICKET_BYTES,
    TIMEOUT_SECONDS,
)
from fdbroker.ipc.transport import RECEIVE, SCM_MAX_FD, SEND
from fdbroker.ipc.transport.received import closer, recvmsg_arguments
from fdbroker.lender.names import check_name

TYPE_CHECKING = False  # importing `typing` would add to the start of `fdbroker exec`
if TYPE_CHECKING:
    from collections.abc import Callable

    from fdbroker.ipc.client.pool import Pool

    Key = tuple[str | bytes | tuple[str, ...], bool, str | None, float | None, str]

PREPARED_BORROWS = 1024  # that are remembered
close_number = os.close


class PreparedBorrow:
    """A borrow that was checked and encoded: all that is the same when it is asked for again.

    pack(head, seq, tail): the bytes of the message.
    counts: of a grant that brings all descriptors in one message.
    arguments: of recvmsg, to receive that.
    unpack: its descriptors; struct.error if they are not as many as were asked for.
    """

    __slots__ = (
        *("arguments", "counts", "exclusive", "head", "names", "pack", "several", "tail"),
        *("timeout", "unpack"),
    )

    def __init__(
        self,
        what: str | bytes | tuple[str, ...],
        names: tuple[str, ...],
        *,
        exclusive: bool,
        readonly: bool,
        timeout: float | None,
        purpose: str,
    ) -> None:
        total = len(names)
        flags = EXCLUSIVE * exclusive | READONLY * readonly
        self.head, self.tail = template(BORROW, what, flags, timeout, purpose)
        self.pack = struct.Struct(f"{HEAD.format}{len(self.tail)}s").pack
        self.counts = counts(total, total)
        # Room for one more than the loan has, so that a reply with too many is not taken for right.
        self.arguments = recvmsg_arguments(REPLY_BYTES, min(total + 1, SCM_MAX_FD), RECEIVE)
        self.unpack: Callable[[bytes], tuple[int, ...]] = struct.Struct(f"{total}i").unpack
        self.several = total > 1
        self.names = names
        self.exclusive = exclusive
        self.timeout = timeout


_prepared: dict[Key, PreparedBorrow] = {}
prepared = _prepared.get


def encode_borrow(key: Key) -> PreparedBorrow:
    """Check and encode a borrow, and remember it for `prepared`.

    key: what is borrowed (a name, names, a ticket), exclusive, mode, timeout, purpose.
    """
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
    request = PreparedBorrow(
        what,
        names,
        exclusive=bool(exclusive),
        readonly=mode == "r",
        timeout=timeout,
        purpose=purpose,
    )
    if len(_prepared) >= PREPARED_BORROWS:
        _prepared.clear()
    _prepared[key] = request
    return request


def borrow(pool: Pool, request: PreparedBorrow, tries: int = TRIES) -> Loan:
    """Borrow with a session of the pool, which the loan holds then.

    tries: with how many sessions, if one after the other proves stale.
    """
    if deferred:
        run_deferred()
    try:
        session = pool.idle.pop()
    except IndexError:
        session = pool.open()
    try:
        session.seq = seq = session.seq + 1
        send = session.send
        try:
            pack = request.pack
            send(pack(request.head, seq, request.tail), SEND)
        except ConnectionResetError:
            # The broker died with something of ours unread, so this request was not sent.
            raise BrokenPipeError from None
        messages, timeout = session.messages, request.timeout
        if timeout is not None:
            session.wait(seq, timeout)
        elif fork.other_threads():
            session.receive()
        else:
            messages.extend(starmap(session.recvmsg, request.arguments))
        reply, ancillary, _, _ = messages[0]
        try:
            start, of, counted, since = unpack_grant(reply)
            ((_, _, rights),) = ancillary
            unpack = request.unpack
            fds = unpack(rights)
            usual = of == seq and counted == request.counts and start == GRANTED
        except (ValueError, struct.error):
            usual = False
        if usual:
            messages[0] = closer(fds) if request.several else map(close_number, fds)
        else:
            fds, since = session.take_loan(seq, len(request.names), timeout)
        session.fds = fds
        session.names = names = request.names
        session.thread = NO_THREAD if request.exclusive else get_ident()
        loan = Loan()
        loan._names = names
        loan._since = since
        loan._session = session
        return loan
    except BaseException as error:
        try:
            session.end_unless_refused(error)
        except StaleSession:
            if tries == 1:
                raise BrokerGone(pool.address) from None
        else:
            pool.release(session)
            raise
    return borrow(pool, request, tries - 1)


# --- checks of arguments ---


def check_timeout(seconds: float) -> float | None:
    """Return `seconds` as they are sent: None for infinity.

    ValueError for a negative number and for a NaN.
    """
    if not seconds >= 0:
        raise ValueError(f"a timeout is None or at least 0 seconds, not {seconds!r}")
    return float(seconds) if seconds <= TIMEOUT_SECONDS else None


def check_ticket(ticket: bytes) -> None:
    """ValueError for bytes that cannot be a ticket, TypeError for anything but bytes."""
    if not isinstance(ticket, bytes):
        raise TypeError(f"a ticket is bytes, not {type(ticket).__name__}")
    if len(ticket) != TICKET_BYTES:
        raise ValueError(f"a ticket has {TICKET_BYTES} bytes, not {len(ticket)}")


def check_purpose(purpose: str) -> None:
    """ValueError for a purpose that is too long, TypeError for anything but a str."""
    if not isinstance(purpose, str):
        raise TypeError(f"a purpose is a str, not {type(purpose).__name__}")
    if len(purpose.encode(errors="replace")) > PURPOSE_BYTES or not purpose.isprintable():
        limit = PURPOSE_BYTES
        raise ValueError(f"a purpose has at most {limit} printable bytes, not {purpose!a}")


def check_names(names: tuple[str, ...]) -> None:
    """`BadName` for a wrong name, ValueError if there are too many names for one message."""
    if not names:
        raise ValueError("borrow_all needs at least one name")
    for name in names:
        check_name(name)
    if len(names) > NAMES:
        raise ValueError(f"at most {NAMES} names can be borrowed at once")
    if sum(map(len, names)) + 3 * len(names) > MESSAGE_BYTES - 1024:  # the other fields
        raise ValueError(f"these names take more than the {MESSAGE_BYTES} bytes at once")
