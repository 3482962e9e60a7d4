"""What is said: every message is one msgpack array, and this is the table of them.

    request   [verb, seq, field, ...]        reply   [0, seq, field, ...]
                                             refusal [code, seq, field, ...]  (code: errors.py)

`seq` counts a session's requests, from 1, without a gap; a reply carries the seq of its request.
HELLO comes first and has seq 0.  RETURN and CANCEL get no reply: CANCEL hastens the reply to the
request before it.  A name is a str, a ticket is bytes; both are welcome wherever a `name` is.

This module is the table: verbs, their fields and limits, and the rows of lists.  codec.py makes
messages of them and takes messages apart.  Neither knows of sockets.
"""

from __future__ import annotations

from fdbroker._lazy import NamedTuple

VERSION = 1
MESSAGE_BYTES = 64 * 1024  # longer lists come in pages
REPLY_BYTES = 479  # of every reply that is not a page: with a bytes object's head 512, a small
# allocation of Python's, which is cheap to cut to the size of what came
NAME_BYTES = 255  # as a file's name (NAME_MAX)
NAMED = (str, bytes)  # by what an entry is asked for: a name, a ticket
NAMES = 4096  # of one borrow_all
TICKET_BYTES = 16
PURPOSE_BYTES = 128
TIMEOUT_SECONDS = 10**9  # thirty years; more is meant to be None
SEQ = 2**53
CURSOR = 2**32
PAGE_ROWS = 64  # of at most 1,000 bytes each: a page stays below MESSAGE_BYTES
PAGE_LOOKS = 2048  # that a page takes at most, so that no page holds up the others for long
WHERE_CHARS = 128  # of the address or the path in a row

EXCLUSIVE, READONLY = 1, 2  # flags of BORROW
REPLACE, EPHEMERAL, NAMELESS = 1, 2, 4  # flags of PUT


class Field(NamedTuple):
    """One field: its types, and the limit of its value (a number) or its length (all else)."""

    name: str
    types: tuple[type, ...]
    limit: int
    least: int = 0


_NAME = Field("name", (str, bytes), NAME_BYTES)
_NAMES = Field("names", (str, bytes, list), NAMES, least=1)
_TIMEOUT = Field("timeout", (int, float, type(None)), TIMEOUT_SECONDS)


class Verb(NamedTuple):
    """One request: what it is called, what it carries, and what a peer needs to be granted."""

    name: str
    right: str
    fields: tuple[Field, ...]
    takes_descriptor: bool = False
    one_way: bool = False


HELLO, BORROW, MORE, RETURN, CANCEL, PUT, RETIRE, ENTRIES, LOANS, STATS, USAGE = range(11)

VERBS: dict[int, Verb] = {
    # puts: whether this session will bring descriptors; only then the broker receives any on it
    HELLO: Verb("hello", "", (Field("version", (int,), 2**31), Field("puts", (bool,), 1))),
    BORROW: Verb(
        "borrow",
        "borrow",
        (_NAMES, Field("flags", (int,), 3), _TIMEOUT, Field("purpose", (str,), PURPOSE_BYTES)),
    ),
    MORE: Verb("more", "borrow", (Field("offset", (int,), NAMES),)),
    RETURN: Verb("return", "", (), one_way=True),
    CANCEL: Verb("cancel", "", (), one_way=True),
    PUT: Verb(
        "put",
        "put",
        (Field("name", (str,), NAME_BYTES), Field("flags", (int,), 7)),
        takes_descriptor=True,
    ),
    RETIRE: Verb("retire", "retire", (_NAME, Field("wait", (bool,), 1), _TIMEOUT)),
    ENTRIES: Verb("entries", "list", (Field("cursor", (int,), CURSOR),)),
    LOANS: Verb(
        "loans",
        "list",
        (
            Field("name", (str,), NAME_BYTES),
            Field("cursor", (int,), CURSOR),
            Field("index", (int,), NAMES),
        ),
    ),
    STATS: Verb("stats", "admin", ()),
    USAGE: Verb("usage", "admin", (Field("cursor", (int,), CURSOR),)),
}
REPLIES: dict[int, int] = {  # how many fields the reply to each verb has
    HELLO: 1,  # version
    BORROW: 3,  # descriptors of the whole loan, of this message, since (ns of CLOCK_BOOTTIME)
    MORE: 3,  # the same
    PUT: 2,  # generation, ticket
    RETIRE: 0,
    ENTRIES: 2,  # the cursor of the next page (0: none), rows
    LOANS: 3,  # the cursor and index of the next page (0, 0: none), rows
    STATS: 1,  # [name, number] pairs
    USAGE: 2,  # the cursor of the next page (0: none), rows
}


class EntryRow(NamedTuple):
    """An entry as ENTRIES lists it."""

    name: str
    kind: int
    where: str
    generation: int
    loans: int
    waiting: int
    uid: int
    since: int
    retired: bool


class LoanRow(NamedTuple):
    """One entry of a loan as LOANS lists it; `id` is its session's and the seq of its borrow."""

    name: str
    id: str
    pid: int
    uid: int
    since: int
    exclusive: bool
    purpose: str
    generation: int


class UsageRow(NamedTuple):
    """What a uid uses as USAGE lists it; both lists in the order of `accounting.RESOURCES`."""

    uid: int
    used: list[int]
    limits: list[int | None]
