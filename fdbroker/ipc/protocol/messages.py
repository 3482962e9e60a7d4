"""What is said: every message is one msgpack array, and this is the table of them.

    request   [verb, seq, field, ...]        reply   [0, seq, field, ...]
                                             refusal [code, seq, field, ...]  (code: errors.py)

`seq` counts a session's requests, from 1, without a gap; a reply carries the seq of its request.
HELLO comes first and has seq 0.  RETURN and CANCEL get no reply: CANCEL hastens the reply to the
request before it.  A name is a str, a ticket is bytes; both are welcome wherever a `name` is.

Nothing here knows of sockets.  A request is looked at field by field before anybody acts on it;
what does not fit the table is a `ProtocolError` of whoever sent it.

**What is said again is not worked out again.**  Requests that are alike but for their seq are
alike byte for byte, if the seq always takes nine bytes (msgpack's uint 64; any of its forms is
welcome).  So a client encodes a request once, as a `Template`, and puts the seq in; a broker
knows a request that it has decoded and checked before by its bytes without the seq.  Either takes
a third of the time.
"""

from __future__ import annotations

import struct

import msgpack

from fdbroker import errors
from fdbroker._lazy import NamedTuple
from fdbroker.errors import FDBrokerError, ProtocolError

TYPE_CHECKING = False  # as a type checker knows it: `typing` costs too much at a start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


VERSION = 1
MESSAGE_BYTES = 64 * 1024  # longer lists come in pages
REPLY_BYTES = 479  # of every reply that is not a page: with a bytes object's head 512, a small
# allocation of Python's, which is cheap to cut to the size of what came
DESCRIPTORS = 253  # SCM_MAX_FD of the kernel (include/net/scm.h)
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

HEAD = struct.Struct(">3sQ")  # of a request: array of so many, verb, "uint 64 follows"; the seq
UINT64 = 0xCF  # msgpack's
UINT16 = 0xCD
GRANT = struct.Struct(">3sQ7sQ")  # the reply to BORROW and MORE, in msgpack's widest forms:
GRANTED = b"\x95\x00\xcf"  # an array of five: 0, the seq, ...
COUNTS = struct.Struct(">BHBHB")  # ... the two counts of descriptors, since


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


_ERRORS = errors.by_code()

encode: Callable[[list[Any]], bytes] = msgpack.Packer().pack
"""The bytes of one message.  One call packs one message, so that threads can share it."""


class Template(NamedTuple):
    """A request but for its seq: ``HEAD.pack(head, seq) + tail`` are its bytes."""

    head: bytes
    tail: bytes


def template(verb: int, *fields: Any) -> Template:
    """A request with these fields, at most 13, encoded."""
    packed = encode([verb, *fields])
    return Template(bytes((packed[0] + 1, verb, UINT64)), packed[2:])


def encode_grant(seq: int, total: int, count: int, since: int) -> bytes:
    """The bytes of the reply that comes with `count` of a loan's `total` descriptors."""
    return GRANT.pack(GRANTED, seq, counts(total, count), since)


def counts(total: int, count: int) -> bytes:
    """The counts of a grant, with what introduces `since`."""
    return COUNTS.pack(UINT16, total, UINT16, count, UINT64)


ONE_OF_ONE = counts(1, 1)
pack_grant, unpack_grant = GRANT.pack, GRANT.unpack


def encode_error(seq: int, error: FDBrokerError) -> bytes:
    """The bytes of a refusal."""
    return encode([error.code, seq, *error.data])


def _decode(data: bytes, side: str) -> list[Any]:
    if len(data) > MESSAGE_BYTES:
        raise ProtocolError(side, f"a message has at most {MESSAGE_BYTES} bytes")
    try:
        message = msgpack.unpackb(data)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(side, f"no msgpack array ({type(error).__name__})") from None
    if type(message) is not list or len(message) < 2:
        raise ProtocolError(side, "a message is an array of two or more")
    if type(message[0]) is not int or type(message[1]) is not int or not 0 <= message[1] < SEQ:
        raise ProtocolError(side, "a message begins with its verb and its seq")
    return message


def decode_request(data: bytes) -> tuple[int, int, tuple[Any, ...]]:
    """(verb, seq, fields) of a request that fits the table, else `ProtocolError`.

    The fields are a tuple of what the message has, each of the type and within the limit of the
    table.
    """
    message = _decode(data, "client")
    return message[0], message[1], _check(message[0], message[2:])


def _check(code: int, fields: list[Any]) -> tuple[Any, ...]:
    """The fields as the verb wants them, each looked at."""
    verb = VERBS.get(code)
    if verb is None:
        raise ProtocolError("client", f"verb {code} is unknown")
    if code == HELLO:  # another version may say anything after its number
        fields = [*fields[:1], fields[1:2] == [True]]
    if len(fields) != len(verb.fields):
        raise ProtocolError("client", f"{verb.name} takes {len(verb.fields)} fields")
    for (name, types, limit, least), value in zip(verb.fields, fields, strict=True):
        kind = type(value)
        if kind not in types:
            raise ProtocolError("client", f"{name} is of the wrong type")
        if kind is str:
            size = len(value.encode())
        elif kind is bytes or kind is list:
            size = len(value)
        else:  # a number, or None where that may be
            size = value or 0
        if not least <= size <= limit:  # so written that a NaN fails
            raise ProtocolError("client", f"{name} is not within {least} to {limit}")
        if name == "names":
            _check_names(value if kind is list else [value])
    return tuple(fields)


def _check_names(names: list[Any]) -> None:
    for name in names:
        size = len(name.encode() if type(name) is str else name) if type(name) in NAMED else -1
        if not 0 <= size <= NAME_BYTES:
            raise ProtocolError("client", "one of the names is none")


def decode_reply(data: bytes) -> tuple[int, int, list[Any]]:
    """(code, seq, fields) of a reply; `check_reply` tells what is in it."""
    message = _decode(data, "broker")
    return message[0], message[1], message[2:]


def check_reply(verb: int, code: int, fields: list[Any]) -> None:
    """Raise the error that a refusal carries, and `ProtocolError` for what fits no table."""
    if code:
        raise _refusal(code, fields)
    if len(fields) != REPLIES[verb]:
        raise ProtocolError("broker", f"the reply to {VERBS[verb].name} has the wrong length")


def _refusal(code: int, data: list[Any]) -> FDBrokerError:
    kind = _ERRORS.get(code)
    if kind is None or len(data) > len(kind.fields):
        return ProtocolError("broker", f"error {code} is unknown: it may be a newer version")
    try:
        return kind(*data)
    except (TypeError, ValueError, AttributeError):
        return ProtocolError("broker", f"error {code} came with the wrong data")
