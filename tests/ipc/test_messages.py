"""Requests that were seen before: no decoding, the same answer, and no way around the checks."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from fdbroker import descriptors
from fdbroker.errors import (
    BorrowTimeout,
    CloseFailed,
    NotPermitted,
    ProtocolError,
    RetireTimeout,
    StolenFDError,
    UnknownEntry,
    UnsupportedKind,
)
from fdbroker.ipc.protocol.codec import (
    GRANT,
    HEAD,
    decode_request,
    encode,
    encode_error,
    encode_grant,
    template,
)
from fdbroker.ipc.protocol.messages import BORROW, LOANS, NAME_BYTES, REPLY_BYTES, RETURN
from fdbroker.ipc.server.request_cache import CONVERSIONS, REQUEST_BYTES, REQUESTS, RequestCache
from fdbroker.lender import LoanRequest
from fdbroker.lender.lender import REASON_CHARS
from fdbroker.lender.wait_queue import HOLDERS_NAMED


@pytest.fixture
def cache() -> RequestCache:
    return RequestCache()


def request(seq: int, verb: int, *fields: object) -> bytes:
    head, tail = template(verb, *fields)
    return HEAD.pack(head, seq) + tail


@pytest.mark.parametrize("seq", [0, 1, 127, 128, 2**16, 2**32, 2**53 - 1])
def test_a_template_makes_a_plain_msgpack_array(seq: int) -> None:
    assert msgpack.unpackb(request(seq, LOANS, "web", 7, 0)) == [LOANS, seq, "web", 7, 0]
    assert msgpack.unpackb(request(seq, RETURN)) == [RETURN, seq]


def test_a_grant_is_a_plain_msgpack_array() -> None:
    data = encode_grant(2**40, 300, 253, 2**60)
    assert len(data) == GRANT.size
    assert msgpack.unpackb(data) == [0, 2**40, 300, 253, 2**60]


def learn(cache: RequestCache, data: bytes) -> tuple[int, int, Any]:
    """Decode and remember a request, as a broker does with one that it does not know."""
    verb, seq, fields = decode_request(data)
    if verb in CONVERSIONS:
        fields = CONVERSIONS[verb](*fields)
    cache.remember(data, verb, fields)
    return verb, seq, fields


def test_what_was_seen_before_is_decoded_once(cache: RequestCache) -> None:
    verb, seq, wish = learn(cache, request(5, BORROW, "web", 1, 2.5, "why"))
    assert (verb, seq) == (BORROW, 5)
    assert isinstance(wish, LoanRequest)
    assert (wish.names, wish.exclusive, wish.timeout) == (("web",), True, 2_500_000_000)
    ((key, known),) = cache.known.items()
    again = request(2**40, BORROW, "web", 1, 2.5, "why")
    assert again[:3] + again[HEAD.size :] == key
    assert known == (BORROW, wish)


def test_other_encodings_of_the_same_request_are_welcome(cache: RequestCache) -> None:
    for seq in (5, 200, 70_000, 2**40):
        packed = msgpack.packb([BORROW, seq, "web", 0, None, ""])
        verb, found, wish = learn(cache, packed)
        assert (verb, found, wish.names) == (BORROW, seq, ("web",))
    for key, (verb, wish) in cache.known.items():  # only what has the seq in nine bytes
        rebuilt = key[:3] + (77).to_bytes(8, "big") + key[3:]
        assert msgpack.unpackb(rebuilt) == [verb, 77, *wish.names, 0, None, ""]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: bytes([data[0] - 1]) + data[1:],
        lambda data: bytes([data[0] + 1]) + data[1:],
        lambda data: data[:1] + bytes([RETURN]) + data[2:],
        lambda data: data[:2] + b"\xd3" + b"\xff" * 8 + data[11:],  # int 64: minus one
        lambda data: data[:3] + b"\xff" * 8 + data[11:],
        lambda data: data[:2] + b"\xcb" + data[3:],  # a float
    ],
)
def test_what_only_looks_like_a_known_request_is_checked(cache: RequestCache, change: Any) -> None:
    good = request(5, BORROW, "web", 0, None, "")
    learn(cache, good)
    with pytest.raises(ProtocolError):
        learn(cache, change(good))
    assert len(cache.known) == 1


def test_what_is_known_is_bounded(cache: RequestCache) -> None:
    for number in range(3 * REQUESTS):
        learn(cache, request(1, BORROW, f"name-{number}", 0, None, ""))
        assert len(cache.known) <= REQUESTS
    cache.known.clear()
    learn(cache, request(1, BORROW, ["n" * 250] * 10, 0, None, ""))
    assert not cache.known
    learn(cache, request(1, BORROW, "n" * 100, 0, None, "p" * 128))
    assert all(len(key) <= REQUEST_BYTES for key in cache.known)
    assert cache.known


def test_nothing_wrong_becomes_known(cache: RequestCache) -> None:
    for fields in (
        ("web", 4, None, ""),
        ("web", 0, -1, ""),
        ("w" * 256, 0, None, ""),
        ("web", 0),
        ("ü" * 128, 0, None, ""),
    ):
        with pytest.raises(ProtocolError):
            learn(cache, request(1, BORROW, *fields))
    assert not cache.known


def test_every_answer_fits_what_a_client_receives() -> None:
    """The longest there are: a name, the holders, a reason.  (Pages are received as pages.)"""
    name, seq = "n" * NAME_BYTES, 2**53 - 1
    holders = [(2**22, 2**32 - 1, 1e9, True)] * HOLDERS_NAMED
    reasons = [*descriptors.REFUSED.values(), str(StolenFDError(2**20))]
    for error in (
        BorrowTimeout(name, 1e9, holders),
        CloseFailed(name, "r" * REASON_CHARS),
        RetireTimeout(name, 1e9, 2**20),
        UnknownEntry(name),
        NotPermitted(2**32 - 2, "borrow", name),
        *(UnsupportedKind("connected unix socket", reason) for reason in reasons),
    ):
        assert len(encode_error(seq, error)) <= REPLY_BYTES
    pairs = [(f"{number:12}", 2**40) for number in range(12)]
    assert len(encode([0, seq, pairs])) <= REPLY_BYTES
