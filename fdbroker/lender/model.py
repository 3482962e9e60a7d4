"""The records that the lender keeps: peers, entries, and sessions with their loans or waits.

The records are plain data.  `lender.py` and `state.py` change them, and write each change through
to the ledger.  Sessions and entries have a state, which is the one of their record there:

    session   FREE -> IDLE -> WAITING -> LENT -> IDLE -> ... -> FREE
                      IDLE -> CLOSING -> IDLE    while it waits for the final close of an entry
    entry     FREE -> LIVE -> RETIRING -> FREE   at once if it is not on loan, else after the loans

All times are nanoseconds of CLOCK_BOOTTIME.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from fdbroker.lender.ledger import shape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from fdbroker.lender.accounting import Account, Charge
    from fdbroker.rc import FD

# The states of a session.
FREE, IDLE, WAITING, LENT, CLOSING = range(5)

# The states of an entry, beside FREE.
LIVE, RETIRING = 1, 2

# The flags of a loan and of an entry in the ledger.  The wire has flags of its own.
LOAN_EXCLUSIVE, LOAN_READONLY = 1, 2
ENTRY_EPHEMERAL, ENTRY_NAMELESS = 1, 2

# The deadline of a wait without a timeout.
FOREVER = 0

SECOND = 1_000_000_000


class Peer(NamedTuple):
    """The process at the other end of a session, as the kernel tells; `pid` 0 is an unknown one."""

    uid: int
    gid: int
    pid: int

    def is_process_of(self, other: Peer) -> bool:
        """Tell whether both are sessions of one process.

        The pid alone does not tell: another user's process may have the pid of a dead one.
        """
        return self.pid == other.pid != 0 and self.uid == other.uid


class Entry:
    """A descriptor that the broker keeps under a name, or under a ticket if it is nameless.

    slot              its place in the ledger
    generation        a number that no other entry has
    fd, sysfd         the descriptor, with one reference that belongs to the closer; its number
    parcel            what the channel sends to lend it, made by the server; not in the ledger
    target            its path or address, for people; not in the ledger
    creator           the id of the session that put it, 0 for the broker; `creator_seq` is the seq
                      of that request
    owner             the session with whose end it retires, if it is `ephemeral`
    account, charge   the uid's account that it is charged to, None for the broker; the charge
    holders           by slot: the sessions that have it on loan
    pins              how often the broker itself uses the descriptor; it stays open meanwhile
    waiters           by slot, in order of arrival: the sessions that wait for a grant
    exclusive_waiters those of them that wait for an exclusive one
    close_waiters     by slot: the sessions that wait for the final close
    """

    __slots__ = (
        "account",
        "charge",
        "close_waiters",
        "creator",
        "creator_seq",
        "ephemeral",
        "exclusive_waiters",
        "fd",
        "generation",
        "held_exclusively",
        "holders",
        "kind",
        "name",
        "owner",
        "parcel",
        "pins",
        "since",
        "slot",
        "state",
        "sysfd",
        "target",
        "ticket",
        "uid",
        "waiters",
    )

    def __init__(self, slot: int, name: str, ticket: bytes, generation: int, fd: FD) -> None:
        self.slot = slot
        self.name = name
        self.ticket = ticket
        self.generation = generation
        self.fd = fd
        self.sysfd = fd.incref()
        self.parcel: Any = None
        self.target = ""
        self.state = LIVE
        self.kind = 0
        self.creator = 0
        self.creator_seq = 0
        self.ephemeral = False
        self.owner: Session | None = None
        self.since = 0
        self.uid = 0
        self.account: Account | None = None
        self.charge: Charge | None = None
        self.holders: dict[int, Session] = {}
        self.held_exclusively = False
        self.pins = 0
        self.waiters: OrderedDict[int, Session] = OrderedDict()
        self.exclusive_waiters: dict[int, Session] = {}
        self.close_waiters: dict[int, Session] = {}

    def __repr__(self) -> str:
        return f"<Entry {self.name or self.ticket.hex()!r} generation {self.generation}>"


class LoanRequest:
    """The arguments of a borrow.  A request is never changed, so equal ones can share an object.

    names                 names of entries, or tickets (bytes)
    timeout               nanoseconds; None waits for ever
    purpose               at most 128 bytes, for people
    single                the grant is one message with one descriptor that is there already
    needs_extra_records   the loan has several entries or a purpose, so it takes more of the ledger
                          than the fixed words of a session
    shape                 all of the loan's words in the ledger that the request fixes
    """

    __slots__ = (
        "count",
        "exclusive",
        "names",
        "needs_extra_records",
        "purpose",
        "purpose_bytes",
        "readonly",
        "shape",
        "single",
        "timeout",
    )

    def __init__(
        self,
        names: tuple[str | bytes, ...],
        exclusive: bool = False,
        readonly: bool = False,
        timeout: int | None = None,
        purpose: str = "",
    ) -> None:
        self.names = names
        self.count = len(names)
        self.exclusive = exclusive
        self.readonly = readonly
        self.timeout = timeout
        self.purpose = purpose
        self.purpose_bytes = purpose.encode()
        self.single = len(names) == 1 and not readonly
        self.needs_extra_records = len(names) > 1 or purpose != ""
        flags = LOAN_EXCLUSIVE * exclusive | LOAN_READONLY * readonly
        self.shape = shape(len(names), flags, len(self.purpose_bytes))


NO_REQUEST = LoanRequest(())


class Session:
    """One connection of a client process, with at most one loan or one wait.

    Loans and waits are not objects of their own: `request` is what the session has borrowed or
    waits for, and the attributes beside it say the rest.

    charge         the charge for its connection.  Recovery sets it, for the connection that takes
                   the session over
    record         its words in the ledger
    seq            the number of the last message that was acted upon
    request        while WAITING or LENT, else `NO_REQUEST`
    entries        the entries of the request, in its order
    cells          the cells in the ledger that name all entries but the first
    borrow_seq     the seq of the request; with the session's id it names the loan
    since          while LENT: when the loan was granted
    arrival        while WAITING: a number that is higher than those of all earlier waits
    awaited        while CLOSING: the entry whose final close it waits for
    asked, asked_seq, deadline, wait_charges
                   while WAITING or CLOSING: since when, by which request, until when, and the
                   charges for it
    last_put       the entry that it put last
    owned          by slot: the ephemeral entries that retire when it ends
    """

    __slots__ = (
        "account",
        "arrival",
        "asked",
        "asked_seq",
        "awaited",
        "borrow_seq",
        "cells",
        "charge",
        "deadline",
        "entries",
        "id",
        "last_put",
        "owned",
        "peer",
        "record",
        "request",
        "seq",
        "since",
        "slot",
        "state",
        "wait_charges",
    )

    def __init__(
        self, slot: int, id: int, peer: Peer, record: memoryview, account: Account
    ) -> None:
        self.slot = slot
        self.id = id
        self.peer = peer
        self.account = account
        self.charge: Charge | None = None
        self.record = record
        self.seq = 0
        self.state = IDLE
        self.request = NO_REQUEST
        self.entries: Sequence[Entry] = ()
        self.cells: Sequence[int] = ()
        self.borrow_seq = 0
        self.since = 0
        self.arrival = 0
        self.awaited: Entry | None = None
        self.asked = 0
        self.asked_seq = 0
        self.deadline = FOREVER
        self.wait_charges: tuple[Charge, ...] = ()
        self.last_put: Entry | None = None
        self.owned: dict[int, Entry] = {}

    def __repr__(self) -> str:
        return f"<Session {self.id} of {self.peer}>"
