"""What the wire allows, said a second time, apart from the broker's own tables.

The numbers stand here as literals, on purpose: nothing is imported from
``ipc/protocol/messages.py``.  So a limit that is taken out there, or changed, is still here, and
what the broker then accepts, keeps or sends is found to break it.

`is_malformed` says of any message whether its sender must be told of a fault, whatever state the
session is in; all other faults are of the turn, and `TURN_FAULTS` are how the broker words them.
`reply_mistake` says what is wrong with a reply.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgpack

from fdbroker import errors

MESSAGE_BYTES = 65_536
REPLY_BYTES = 479  # of what is no page
PAGE_ROWS = 64
PAGE_LOOKS = 2048
ROW_BYTES = 1000
WHERE_CHARS = 128
DESCRIPTORS = 253
TICKET_BYTES = 16
KNOWN_REQUESTS = 1024
KNOWN_BYTES = 256
SEQ = 9_007_199_254_740_992

HELLO, BORROW, MORE, RETURN, CANCEL, PUT, RETIRE, ENTRIES, LOANS, STATS, USAGE = range(11)


def number(most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and 0 <= value <= most


def text(most: int, least: int = 0) -> Callable[[Any], bool]:
    return lambda value: type(value) is str and least <= len(value.encode()) <= most


def timeout(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= 1_000_000_000)


def truth(value: Any) -> bool:
    return value is True or value is False


def name(value: Any) -> bool:
    """A name or a ticket."""
    return text(255)(value) or (type(value) is bytes and len(value) <= 255)


def names(value: Any) -> bool:
    """One, not empty, or a list of them."""
    if type(value) is list:
        return 1 <= len(value) <= 4096 and all(map(name, value))
    return name(value) and len(value) > 0


REQUESTS: dict[int, tuple[Callable[[Any], bool], ...]] = {
    HELLO: (number(2_147_483_648),),  # and whatever follows: another version may say more
    BORROW: (names, number(3), timeout, text(128)),
    MORE: (number(4096),),
    RETURN: (),
    CANCEL: (),
    PUT: (text(255), number(7)),
    RETIRE: (name, truth, timeout),
    ENTRIES: (number(4_294_967_296),),
    LOANS: (text(255), number(4_294_967_296), number(4096)),
    STATS: (),
    USAGE: (number(4_294_967_296),),
}

TURN_FAULTS = (
    "hello comes once",
    "a session begins with hello",
    "a session carries one loan",
    "it sent a request before it had the last answer",
    "after seq ",
    "there are no more descriptors",
    "a return without a loan",
    "a put brings one descriptor",
    "a nameless entry has no name",
)
# Of a message that would have been right in a session that puts; only before Linux 6.16.
UNASKED_FAULT = "it sent descriptors that nobody asked for"


class Request(NamedTuple):
    """What a message asks for, if it fits the wire."""

    verb: int
    seq: int
    fields: list[Any]


def parse(data: bytes, descriptors: int) -> Request | None:
    """The request that `data` with so many descriptors is; None: it is malformed."""
    if len(data) > MESSAGE_BYTES:
        return None
    try:
        message = msgpack.unpackb(data)
    except (ValueError, RecursionError, msgpack.UnpackException):
        return None
    if type(message) is not list or len(message) < 2:
        return None
    verb, seq, *fields = message
    if type(verb) is not int or verb not in REQUESTS:
        return None
    if type(seq) is not int or not 0 <= seq < SEQ:
        return None
    checks = REQUESTS[verb]
    if len(fields) != len(checks) and not (verb == HELLO and fields):
        return None
    if not all(check(field) for check, field in zip(checks, fields, strict=False)):
        return None
    if descriptors and verb != PUT:
        return None
    return Request(verb, seq, fields)


# --- replies ---------------------------------------------------------------------------------

COUNT = number(2**64)
ANY_TEXT = text(10_000)


def rows(*checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def page(value: Any) -> bool:
        return (
            type(value) is list
            and len(value) <= PAGE_ROWS
            and all(len(msgpack.packb(row)) <= ROW_BYTES for row in value)
            and all(
                len(row) == len(checks)
                and all(check(cell) for check, cell in zip(checks, row, strict=True))
                for row in value
            )
        )

    return page


def where(value: Any) -> bool:
    return type(value) is str and len(value) <= WHERE_CHARS


def ticket(value: Any) -> bool:
    return type(value) is bytes and len(value) in (0, TICKET_BYTES)


def pairs(value: Any) -> bool:
    return all(type(key) is str and type(count) is int and count >= 0 for key, count in value)


def counts(value: Any) -> bool:
    """Of sessions, loans, entries, waiting, bytes, closes; None is no limit."""
    return type(value) is list and len(value) == 7 and all(x is None or COUNT(x) for x in value)


REPLIES: dict[int, tuple[Callable[[Any], bool], ...]] = {
    HELLO: (lambda version: version == 1,),
    BORROW: (number(4096), number(DESCRIPTORS), COUNT),
    MORE: (number(4096), number(DESCRIPTORS), COUNT),
    PUT: (COUNT, ticket),
    RETIRE: (),
    ENTRIES: (
        COUNT,
        rows(text(255, 1), COUNT, where, COUNT, COUNT, COUNT, COUNT, COUNT, truth),
    ),
    LOANS: (
        COUNT,
        COUNT,
        rows(text(255), ANY_TEXT, COUNT, COUNT, COUNT, truth, text(128), COUNT),
    ),
    STATS: (pairs,),
    USAGE: (COUNT, rows(COUNT, counts, counts)),
}
PAGES = (ENTRIES, LOANS, USAGE)
ERRORS = errors.by_code()


def reply_mistake(verb: int, data: bytes, message: list[Any], descriptors: int) -> str:
    """What is wrong with the reply `message` to `verb`, which came as `data`; "" if nothing is."""
    code, _, *fields = message
    if code:
        kind = ERRORS.get(code)
        if kind is None or len(fields) != len(kind.fields):
            return "it is an unknown refusal"
        kind(*fields)
        return "a refusal brings descriptors" if descriptors else _too_long(data, REPLY_BYTES)
    checks = REPLIES.get(verb)
    if checks is None:
        return "this verb has no reply"
    if len(fields) != len(checks):
        return f"it has {len(fields)} fields"
    for place, (check, field) in enumerate(zip(checks, fields, strict=True)):
        if not check(field):
            return f"field {place} breaks the table"
    if descriptors != (fields[1] if verb in (BORROW, MORE) else 0):
        return f"it brings {descriptors} descriptors"
    return _too_long(data, MESSAGE_BYTES if verb in PAGES else REPLY_BYTES)


def _too_long(data: bytes, most: int) -> str:
    return "" if len(data) <= most else f"it has {len(data)} bytes, more than {most}"
