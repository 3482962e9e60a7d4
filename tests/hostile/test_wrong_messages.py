"""Messages that are none, or not in their turn: each ends its session, with one line that says why.

What is wrong is made from the table of messages itself, so a verb or a field that is added is
tried as well.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
from support import (
    BORROW,
    CANCEL,
    ENTRIES,
    HELLO,
    LOANS,
    MORE,
    PUT,
    RETIRE,
    RETURN,
    SHARED,
    Raw,
)

import fdbroker
from fdbroker.ipc.protocol.messages import MESSAGE_BYTES, NAME_BYTES, NAMES, VERBS, Verb

from .target import GROWTH, Target

PROTOCOL_ERROR, VERSION_MISMATCH = 60, 61
GOOD: dict[str, Any] = {  # a value for each field that the table has
    "version": 1,
    "puts": True,
    "names": "public/memory",
    "name": "alice/none",
    "flags": 0,
    "purpose": "",
    "offset": 0,
    "wait": False,
    "cursor": 0,
    "index": 0,
    "timeout": None,
}
STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31 + 1, 2**32 + 1, 2**53, 2**63, 2**64 - 1, -(2**63)),
    *(0.0, -0.5, 1e300, float("inf"), float("-inf"), float("nan"), "", "x", b"", b"x", [], {}),
    *("x" * (NAME_BYTES + 1), "é" * NAME_BYTES, b"x" * (NAME_BYTES + 1), [None], [[]], [-1]),
    *(["x"] * (NAMES + 1), ["x", "x" * (NAME_BYTES + 1)], {"x": 1}, {0: {0: {0: 0}}}),
    *(msgpack.ExtType(5, b""), msgpack.ExtType(127, b"x" * 300), msgpack.Timestamp(1, 5)),
]


def refused(address: str, *messages: bytes, hello: bool = True) -> None:
    """Each of them in a session of its own is answered with a fault, and the session ends."""
    for message in messages:
        with Raw(address, hello=hello) as raw:
            raw.send_bytes(message)
            raw.is_refused(PROTOCOL_ERROR)


def is_wrong(verb: Verb, place: int, value: Any) -> bool:
    """By the table: of another type, or beyond the limit."""
    field = verb.fields[place]
    if type(value) not in field.types:
        return True
    size: Any = value or 0
    if isinstance(value, str):
        size = len(value.encode())
    elif isinstance(value, bytes | list):
        size = len(value)
    if field.name == "names" and isinstance(value, list):
        are_names = [type(name) in (str, bytes) and len(name) <= NAME_BYTES for name in value]
        if not all(are_names):
            return True
    return not field.least <= size <= field.limit


def wrong_requests(code: int) -> Iterator[list[Any]]:
    """Of one verb: each field with each value that it cannot have, too few fields, too many."""
    verb = VERBS[code]
    good = [GOOD[field.name] for field in verb.fields]
    seq = int(code != HELLO)
    for place in range(len(good)):
        for value in STRANGE:
            if is_wrong(verb, place, value):
                yield [code, seq, *good[:place], value, *good[place + 1 :]]
    for length in range(len(good)):
        yield [code, seq, *good[:length]]
    yield [code, seq, *good, None]
    yield [code, seq, *good, *good, 1]


@pytest.mark.parametrize("code", VERBS, ids=lambda code: VERBS[code].name)
def test_every_field_of_every_verb_wrong_in_every_way(target: Target, code: int) -> None:
    requests = list(wrong_requests(code))
    if code == HELLO:  # what follows the version is another version's business
        requests = [one for one in requests if one[2:] and is_wrong(VERBS[code], 0, one[2])]
    assert len(requests) >= len(VERBS[code].fields) * 10
    wrong = [msgpack.packb(request) for request in requests]
    fd = os.open(os.devnull, os.O_RDONLY)

    def strike(address: str) -> None:
        for message in wrong:
            with Raw(address, hello=code != HELLO) as raw:
                raw.send_bytes(message, [fd] if code == PUT else [])
                raw.is_refused(PROTOCOL_ERROR)

    target.attack(strike, rounds=1, processes=1, why="event=fault", lines=len(wrong))
    os.close(fd)


def test_other_versions(target: Target) -> None:
    def strike(address: str) -> None:
        for version in (0, 2, 2**31):
            with Raw(address, hello=False) as raw:
                raw.send(HELLO, 0, version, True, {"and": ["more"]})
                assert raw.is_refused(VERSION_MISMATCH) == [version, 1]

    target.attack(strike, why="speaks version", lines=3)


# --- bytes ------------------------------------------------------------------------------------


def whole_requests() -> list[bytes]:
    """One of each verb, as it should be."""
    return [
        msgpack.packb([code, 1, *(GOOD[field.name] for field in verb.fields)])
        for code, verb in VERBS.items()
    ]


def test_truncated_messages(target: Target) -> None:
    """Every beginning of every request, before hello and after it.  (An empty one is the end.)"""
    pieces = [whole[:size] for whole in whole_requests() for size in range(1, len(whole))]

    def strike(address: str) -> None:
        refused(address, *pieces)
        refused(address, *random.sample(pieces, 20), hello=False)

    target.attack(strike, rounds=1, processes=1, why="no msgpack array", lines=len(pieces) + 20)


def test_messages_with_something_behind_them(target: Target) -> None:
    longer = [whole + rest for whole in whole_requests() for rest in (b"\x00", b"\xc1", whole)]

    def strike(address: str) -> None:
        refused(address, *longer)

    target.attack(strike, rounds=2, why="event=fault", lines=len(longer))


def greatest_request() -> bytes:
    """A borrow of very many names that is as long as a message can be."""

    def borrow(names: list[str]) -> bytes:
        packed: bytes = msgpack.packb([BORROW, 1, names, 0, None, ""])
        return packed

    names = ["n" * 200] * 100
    while (rest := MESSAGE_BYTES - len(borrow(names))) >= 202 + 34:
        names.append("n" * 200)
    whole = borrow([*names, "n" * (rest - 2)])  # of 32 bytes and more, so with a head of two
    assert len(whole) == MESSAGE_BYTES
    return whole


def test_oversized_messages(target: Target) -> None:
    """Also one whose first 64 KiB are a whole request: what is cut off was meant as well."""
    whole = greatest_request()
    oversized = [whole + b"\x00", whole * 2, bytes(MESSAGE_BYTES + 1), b"\x91" * 150_000]

    def strike(address: str) -> None:
        with Raw(address) as raw:
            raw.send_bytes(whole)  # it is none
            message, _ = raw.receive()
            assert message is not None
            assert message[0] not in (0, PROTOCOL_ERROR)
        refused(address, *oversized)

    target.attack(strike, rounds=10, why="event=fault", lines=len(oversized))


NESTED = [
    *(b"\x91" * depth + b"\xc0" for depth in (2, 500, 1023, 1024, 1025, 65_000)),
    *(b"\x95\x01\x01" + head * 20_000 for head in (b"\x91", b"\x81\x00", b"\xdc\x00\x01")),
    b"\x81" * 65_000,
]
GIANT = [
    head + b"\xff\xff\xff\xff" + rest
    for head in (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9", b"\x95\x01\x01\xdd", b"\x92\x01\xc6")
    for rest in (b"", b"\x01\x01", b"\x90" * 60_000)
]
WIDE = [
    b"\x96\x01\x01\xdc\xff\x00" + b"\x90" * 65_280 + b"\x00\xc0\xa0",  # as many lists
    b"\x93\x07\x01\xdc\xff\x00" + b"\x80" * 65_280,
    b"\x93\x07\x01\xde\x7f\x00" + b"\x01\x90" * 32_512,
]
EXTENSIONS = [
    *(
        b"\x93\x07\x01" + head + bytes([kind]) + bytes(size)
        for kind in (0, 5, 127, 128, 255)
        for head, size in (
            (b"\xd4", 1),
            (b"\xd5", 2),
            (b"\xd6", 4),
            (b"\xd7", 8),
            (b"\xd8", 16),
            (b"\xc7\x00", 0),
            (b"\xc7\x0c", 12),
            (b"\xc8\x10\x00", 4096),
        )
    ),
    b"\x93\x07\x01\xd7\xff" + b"\xff" * 8,  # times that are none
    b"\x93\x07\x01\xc7\x0c\xff" + b"\xff" * 12,
    b"\x93\x07\x01\xc7\x0c\xff\x00\x00\x00\x00\x7f" + b"\xff" * 7,
]
MAPS = [
    b"\x93\x07\x01\x82\xa1a\x00\xa1a\x01",  # a key twice
    b"\x82\x00\x07\x00\x07",
    b"\x93\x07\x01\x81\xc0\xc0",
    b"\x93\x07\x01\x81\x90\x90",  # a key that cannot be one
    b"\x93\x07\x01\x81\x81\x00\x00\x00",
    b"\x93\x07\x01\x81\xcb\x7f\xf8" + bytes(6) + b"\x00",  # NaN
]
TEXTS = [
    b"\x96\x01\x01" + bytes([0xA0 | len(text)]) + text + b"\x00\xc0\xa0"
    for text in (
        b"\xff",
        b"\xc3\x28",
        b"\xed\xa0\x80",
        b"\xf8\x88\x80\x80\x80",
        b"\xc0\xaf",
        b"a\xe2",
    )
]


@pytest.mark.parametrize(
    "bombs",
    [NESTED, GIANT, WIDE, EXTENSIONS, MAPS, TEXTS],
    ids=["nested", "giant", "wide", "extensions", "maps", "texts"],
)
def test_bombs(target: Target, bombs: list[bytes]) -> None:
    def strike(address: str) -> None:
        refused(address, *bombs)

    rounds, growth = max(2, 30 // len(bombs)), GROWTH
    if bombs is WIDE:  # each fills several arenas of Python's allocator (1 MiB, obmalloc), of
        rounds, growth = 2, GROWTH * 3 // 2  # which something that lives on may come to lie in one
    target.attack(strike, rounds=rounds, why="event=fault", lines=len(bombs), growth=growth)


def test_any_bytes(target: Target) -> None:
    """Requests with some of their bits turned: answered, refused, or ended; never stuck."""
    wholes = whole_requests()

    def strike(address: str) -> None:
        for _ in range(5):
            data = bytearray(random.choice(wholes))
            for _ in range(random.randint(1, 4)):
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
            with Raw(address) as raw:
                raw.send_bytes(bytes(data))
                raw.sock.shutdown(1)
                while (found := raw.receive())[0] is not None:
                    for number in found[1]:
                        os.close(number)

    target.attack(strike)


# --- seq and turn -------------------------------------------------------------------------------


def stats(seq: bytes) -> bytes:
    return b"\x93" + bytes([ENTRIES]) + seq + b"\x00"


SEQS = {
    "skipped": [stats(msgpack.packb(seq)) for seq in (2, 3, 1000, 2**31, 2**32, 2**53 - 1)],
    "wrapped": [
        *(stats(msgpack.packb(seq)) for seq in (2**53, 2**53 + 1, 2**63, 2**64 - 1, -1, -(2**63))),
        *(stats(b"\xcf" + struct.pack(">Q", seq)) for seq in (2**53, 2**64 - 1)),
        stats(b"\xd3" + struct.pack(">q", -1)),
    ],
    "no number": [stats(msgpack.packb(seq)) for seq in (None, True, 1.0, "1", b"1", [1], {1: 1})],
}


@pytest.mark.parametrize("how", SEQS)
def test_a_seq_that_is_none(target: Target, how: str) -> None:
    def strike(address: str) -> None:
        refused(address, *SEQS[how])

    target.attack(strike, rounds=10, why="event=fault", lines=len(SEQS[how]))


def test_a_seq_that_was_there_before(target: Target) -> None:
    """It is ignored; of a loan that is out the descriptor comes again, and it is one loan."""

    def strike(address: str) -> None:
        with Raw(address) as raw:
            for seq in range(1, 8):
                raw.send(ENTRIES, seq, 0)
                raw.receive()
                for old in range(seq + 1):
                    raw.send(RETURN, old)
                    raw.send(BORROW, old, "public/memory", *SHARED)
            for _ in range(5):
                os.close(raw.borrow(8, "public/memory"))
            raw.send(RETURN, 9)
            for old in (8, 9, 9):
                raw.send(RETURN, old)
                raw.send(BORROW, old, "public/memory", *SHARED)
            raw.send(LOANS, 10, "", 0, 0)
            message, fds = raw.receive()
            assert message is not None
            assert (message[:2], fds) == ([0, 10], [])
            assert not any(row[2] == os.getpid() for row in message[-1])

    target.attack(strike, why="event=fault", lines=0)


OUT_OF_TURN = {
    "a return of nothing": [[RETURN, 1]],
    "more of nothing": [[MORE, 1, 0]],
    "what came with the borrow once more": [[BORROW, 1, "public/memory", *SHARED], [MORE, 2, 0]],
    "more than there is": [[BORROW, 1, "public/memory", *SHARED], [MORE, 2, 1]],
    "a second loan": [[BORROW, 1, "public/memory", *SHARED]] * 1
    + [[BORROW, 2, "public/memory", *SHARED]],
    "a second hello": [[HELLO, 1, 1, True]],
    "a return twice": [[BORROW, 1, "public/memory", *SHARED], [RETURN, 2], [RETURN, 3]],
    "a wait with a loan": [[BORROW, 1, "public/memory", *SHARED], [RETIRE, 2, "alice/x", True, 1]],
    "something while it waits": [[BORROW, 1, "public/busy", *SHARED], [ENTRIES, 2, 0]],
    "a return while it waits": [[BORROW, 1, "public/busy", *SHARED], [RETURN, 2]],
}


@pytest.mark.parametrize("how", OUT_OF_TURN)
def test_out_of_turn(target: Target, how: str) -> None:
    """There is no id of a loan that one could make up: these are all that is said about loans."""

    def strike(address: str) -> None:
        with Raw(address) as raw:
            for message in OUT_OF_TURN[how]:
                raw.send(*message)
            while (found := raw.receive())[0] is not None:
                for number in found[1]:
                    os.close(number)
                last = found[0][0]
            assert last == PROTOCOL_ERROR

    with (
        fdbroker.Client(target.address) as holder,
        holder.borrow("public/busy", exclusive=True) as loan,
    ):
        target.attack(strike, why="event=fault")
        assert [found.pid for found in target.client.loans("public/busy")] == [os.getpid()]
        os.fstat(loan.fileno())


def test_cancel_of_nothing(target: Target) -> None:
    """It cancels what its own session asked, and nothing else."""

    def strike(address: str) -> None:
        with Raw(address) as raw:
            for seq in range(1, 50):
                raw.send(CANCEL, seq)
            raw.send(ENTRIES, 50, 0)
            message, _ = raw.receive()
            assert message is not None
            assert message[:2] == [0, 50]

    target.attack(strike)


def test_a_half_hello(target: Target) -> None:
    """What is no whole hello, then nothing more: it is not waited for."""
    halves = [b"\x94\x00\x00", b"\x93\x00\x00", b"\x94\x00\x01\x01\xc3", b"\x92\x00\x00", b"\x94"]

    def strike(address: str) -> None:
        refused(address, *halves, hello=False)

    target.attack(strike, rounds=10, why="event=fault", lines=len(halves))
