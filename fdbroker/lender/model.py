"""What the lender keeps account of: peers, sessions, their loans, and entries.

Plain records with the states they can be in; what moves them is in `lender.py`.

    session   FREE -> IDLE -> WAITING -> LENT -> IDLE -> ... -> FREE
                      IDLE -> CLOSING -> IDLE    (it waits for the final close of an entry)
    entry     FREE -> LIVE -> RETIRING -> FREE   (at once without loans, else with the last one)
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from fdbroker.lender.ledger import shape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from fdbroker.lender.accounting import Account
    from fdbroker.rc import FD

FREE, IDLE, WAITING, LENT, CLOSING = range(5)  # a session's states
LIVE, RETIRING = 1, 2  # an entry's states, beside FREE

EXCLUSIVE, READONLY = 1, 2  # a loan's flags in the ledger
EPHEMERAL, NAMELESS = 1, 2  # an entry's flags in the ledger

FOREVER = 0  # a deadline that never comes


class Peer(NamedTuple):
    """Who is at the other end of a session, as the kernel says.  `pid` 0 is: unknown."""

    uid: int
    gid: int
    pid: int

    def is_process_of(self, other: Peer) -> bool:
        """Whether both are sessions of one process.  A pid alone says nothing: that of one who is
        dead may be another's by now."""
        return self.pid == other.pid != 0 and self.uid == other.uid


class Entry:
    """A descriptor that the broker keeps under a name, or nameless under a ticket."""

    __slots__ = (
        "account",
        "ancillary",
        "ephemeral",
        "fd",
        "generation",
        "held_exclusively",
        "holders",
        "kind",
        "line",
        "maker",
        "maker_seq",
        "name",
        "owner",
        "since",
        "slot",
        "state",
        "sysfd",
        "ticket",
        "turns",
        "uid",
        "users",
        "watchers",
        "where",
    )

    def __init__(self, slot: int, name: str, ticket: bytes, generation: int, fd: FD) -> None:
        self.slot = slot
        self.name = name
        self.ticket = ticket
        self.generation = generation
        self.fd = fd
        self.sysfd = fd.incref()  # the closer's reference
        self.ancillary: Any = None  # what the channel sends of it; not in the ledger
        self.where = ""  # its path or address, for people; not in the ledger
        self.state = LIVE
        self.kind = 0
        self.maker = 0  # the id of the session that put it, and ...
        self.maker_seq = 0  # ... the seq of that request
        self.ephemeral = False  # it retires when ...
        self.owner: Session | None = None  # ... this session ends
        self.since = 0
        self.uid = 0
        self.account: Account | None = None  # who is charged for it; None: the broker itself
        self.holders: dict[int, Session] = {}  # by slot: who has it on loan
        self.held_exclusively = False
        self.users = 0  # of the broker's own: it is not closed before they are done with `sysfd`
        self.line: OrderedDict[int, Session] = OrderedDict()  # who waits for it, in order
        self.turns: dict[int, Session] = {}  # those of them who wait for it exclusively
        self.watchers: dict[int, Session] = {}  # by slot: who waits for its final close

    def __repr__(self) -> str:
        return f"<Entry {self.name or self.ticket.hex()!r} generation {self.generation}>"


class LoanRequest:
    """What a borrow asks for.  Never changed, so one serves all requests that are alike.

    `names` may have tickets among them (bytes); `timeout` is in nanoseconds, None waits for ever;
    `purpose` has at most 128 bytes.
    """

    __slots__ = (
        "count",
        "exclusive",
        "names",
        "needs_extra_records",
        "plain",
        "purpose",
        "purpose_bytes",
        "readonly",
        "shape",
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
        self.purpose_bytes = purpose.encode()  # as in the ledger, and so are ...
        self.needs_extra_records = len(names) > 1 or purpose != ""  # to be written than one entry
        self.plain = len(names) == 1 and not readonly  # it takes one message, and what is there
        flags = EXCLUSIVE * exclusive | READONLY * readonly
        self.shape = shape(len(names), flags, len(self.purpose_bytes))


NO_REQUEST = LoanRequest(())


class Session:
    """One connection of a client process: at most one loan, or one wait.  Those are not objects of
    their own: what `request` got, or waits for, is `entries`, and the rest is beside it."""

    __slots__ = (
        "account",
        "arrival",
        "asked",
        "asked_seq",
        "awaited",
        "borrow_seq",
        "cells",
        "deadline",
        "entries",
        "id",
        "made",
        "owned",
        "peer",
        "record",
        "request",
        "seq",
        "since",
        "slot",
        "state",
    )

    def __init__(
        self, slot: int, id: int, peer: Peer, record: memoryview, account: Account
    ) -> None:
        self.slot = slot
        self.id = id
        self.peer = peer
        self.account = account  # who is charged for what it does
        self.record = record  # its words in the ledger
        self.seq = 0  # of the last message that was acted upon
        self.state = IDLE
        self.request = NO_REQUEST  # unless WAITING or LENT; then it has, too:
        self.entries: Sequence[Entry] = ()  # in the order of the request
        self.cells: Sequence[int] = ()  # of the ledger, for all entries but the first
        self.borrow_seq = 0  # of its request; with the session's id it names the loan
        self.since = 0  # while LENT: when it was granted
        self.arrival = 0  # while WAITING: its place among all that wait
        self.awaited: Entry | None = None  # while CLOSING
        self.asked = 0  # while WAITING or CLOSING: since when, ...
        self.asked_seq = 0  # ... by which request, ...
        self.deadline = FOREVER  # ... and until when
        self.made: Entry | None = None  # what it put last
        self.owned: dict[int, Entry] = {}  # by slot: ephemeral entries, which end with it

    def __repr__(self) -> str:
        return f"<Session {self.id} of {self.peer}>"
