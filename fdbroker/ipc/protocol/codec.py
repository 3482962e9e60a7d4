"""Messages as bytes: encoding, and decoding with every check.

A request is checked field by field against the table of messages.py before anything acts on it.
What does not fit is a `ProtocolError`, which names the side that sent it.

**Requests that are alike but for their seq are alike byte for byte**, if the seq always takes nine
bytes (msgpack's uint 64; any of its forms is welcome).  So a client encodes a request once, as a
`Template`, and puts the seq in; a broker recognizes a request that it has decoded before by its
bytes without the seq.  Either takes a third of the time.  A grant has one form for the same reason.
"""

from __future__ import annotations

import struct

import msgpack

from fdbroker import errors
from fdbroker._lazy import NamedTuple
from fdbroker.errors import FDBrokerError, ProtocolError
from fdbroker.ipc.protocol.messages import (
    HELLO,
    MESSAGE_BYTES,
    NAME_BYTES,
    NAMED,
    REPLIES,
    SEQ,
    VERBS,
)

TYPE_CHECKING = False  # importing `typing` would add to the start of `fdbroker exec`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# The start of a request: an array of so many, the verb, "uint 64 follows", the seq.
HEAD = struct.Struct(">3sQ")
UINT64 = 0xCF
UINT16 = 0xCD
# The reply to BORROW and MORE, in msgpack's widest forms: an array of five with 0 and the seq, then
# the two counts of descriptors, and since when.
GRANT = struct.Struct(">3sQ7sQ")
GRANTED = b"\x95\x00\xcf"
COUNTS = struct.Struct(">BHBHB")

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
