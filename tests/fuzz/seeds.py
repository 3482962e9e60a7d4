"""The part of the corpus that is made by hand: each boundary of the table, and known hard cases.

`python -m tests.fuzz --seeds` writes them into ``corpus/``; the other files there were kept by
atheris, for the code that they reach (`atheris-...`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack

from fuzz import palette, steps
from fuzz.contract import BORROW, CANCEL, ENTRIES, HELLO, LOANS, MORE, PUT, RETIRE, RETURN, STATS
from fuzz.steps import ANSWERED, HELD, STEPS, UNREAD, Input, Step
from fuzz.strategies import BAD, GOOD, HEADS, WRONG_TYPES, request

LISTS = ("entries", "loans", "stats", "usage")
NAMES = ("hello", "borrow", "more", "return", "cancel", "put", "retire", *LISTS)
SILENT = Step(steps.CONNECT, 0, ANSWERED, (0,))
COMES, COMES_TO_PUT = (Step(steps.CONNECT, 0, ANSWERED, (flags,)) for flags in (1, 3))
DATA = ((palette.MEMFD, 1),)


def seeds() -> Iterator[tuple[str, Input]]:
    """All of them, by name; both kernels where it can matter."""
    for verb, good in GOOD.items():
        fields = [values[0] for values in good]
        for place in range(len(good)):
            values = (*good[place], *BAD[verb][place], *WRONG_TYPES)
            yield from _each(f"{NAMES[verb]}-{place}", verb, fields, place, values)
        wrong = [fields[:-1], [*fields, 0], fields * 2, [], [None] * 14]
        yield f"{NAMES[verb]}-counts", Input(0, [_one(verb, some) for some in wrong])
        for kernel in (0, steps.OLD_KERNEL):
            yield f"{NAMES[verb]}-descriptors-{kernel}", Input(kernel, list(_laden(verb, fields)))
    yield from _hard_cases()
    for number in range(0, len(HEADS), 8):
        sends = [
            Step(steps.SEND, 0, ANSWERED, (times,), (), head)
            for head in HEADS[number : number + 8]
            for times in (1, 65_535)
        ]
        yield f"heads-{number:02}", Input(0, [x for send in sends for x in (COMES_TO_PUT, send)])


def _one(verb: int, fields: list[Any], **how: Any) -> Step:
    if verb == PUT:
        how.setdefault("descriptors", DATA)
    return request(verb, fields, **how)


def _each(
    name: str, verb: int, fields: list[Any], place: int, values: tuple[Any, ...]
) -> Iterator[tuple[str, Input]]:
    """One request for each value, by a client that has nothing."""
    played: list[Step] = []
    for value in values:
        some = [*fields[:place], value, *fields[place + 1 :]]
        played += [SILENT] if verb == HELLO else [COMES_TO_PUT]
        if verb == MORE:
            played.append(_one(BORROW, ["a", 0, None, ""]))
        played.append(_one(verb, some))
    for part in range(0, len(played), STEPS - 1):
        yield f"{name}-{part // (STEPS - 1)}", Input(0, played[part : part + STEPS - 1])


def _laden(verb: int, fields: list[Any]) -> Iterator[Step]:
    """With descriptors of each kind, one and many."""
    for kind in range(palette.KINDS):
        yield SILENT if kind % 5 == 4 else COMES_TO_PUT if kind % 5 else COMES
        yield _one(verb, fields, descriptors=((kind, 1),))
    for count in (0, 2, 253, 254):
        yield _one(verb, fields, descriptors=((palette.WRITER, count),))


def _hard_cases() -> Iterator[tuple[str, Input]]:
    borrow, back = _one(BORROW, ["a", 0, None, ""]), _one(RETURN, [])
    alone = _one(BORROW, ["a", 1, None, "alone"])
    seqs = [_one(STATS, [], shift=shift) for shift in (0, -1, -3, 0, 1)]
    yield "seqs", Input(0, [*seqs, borrow, _one(BORROW, ["b", 0, None, ""], shift=-1), back])
    far = [b"\x92\x09" + seq for seq in (b"\xff", b"\xc3", b"\xcb" + bytes(8), b"\xa1a", b"\xc0")]
    far += [b"\x92\x09\xcf" + seq.to_bytes(8) for seq in (2**53 - 1, 2**53, 2**64 - 1)]
    shapes = [b"\xc4\x02\x03\x01", b"\x82\xa1a\1\xa1b\2", b"\xa2ab", b"\x91\x03", b"\x90", b"\x03"]
    odd = [msgpack.packb([verb, 1]) for verb in (3.0, True, None, [], {}, b"", -1, 2**63)]
    odd.append(msgpack.packb([True, 1, "a", 0, None, ""]))
    sends = [Step(steps.SEND, 0, ANSWERED, (1,), (), data) for data in far + shapes + odd]
    yield "heads-of-requests", Input(0, [x for send in sends for x in (COMES, send)])
    pages = [_one(LOANS, [name, 0, 0]) for name in ("", "a", "zz")]
    for count in (1, 64, 65, 253, 254, 300, 2048, 2049, 4096, 4097):
        many = Step(steps.MANY, 0, ANSWERED, (count, 1, 0, 3, 0))
        parts = [_one(MORE, [offset]) for offset in (253, 506, count)]
        yield f"many-{count:04}", Input(0, [many, *pages, _one(ENTRIES, [0]), parts[0], *parts])
    readonly = [Step(steps.MANY, 0, ANSWERED, (count, 1, 2, 0, 0)) for count in (1, 300)]
    yield "read-only", Input(0, [readonly[0], back, readonly[1], _one(MORE, [253]), back])
    for purpose, junk in ((0, 0), (39, 0), (39, 1), (40, 0), (40, 1), (40, 9), (41, 0), (41, 1)):
        sizes = Step(steps.MANY, 0, ANSWERED, (*EXACT, 0, purpose, junk))
        yield f"size-{purpose}-{junk}", Input(0, [sizes])
    yield "flood", Input(0, [Step(steps.FLOOD, 0, ANSWERED, (1100,))])
    yield (
        "turns",
        Input(0, [alone, *[request(BORROW, ["a", f, t, ""], client=1) for f, t in WAITS], back]),
    )
    yield (
        "unread",
        Input(
            0,
            [
                *[step._replace(how=UNREAD) for step in (borrow, back, borrow, back, alone)],
                *[step._replace(how=HELD) for step in (back, borrow, _one(MORE, [0]))],
                Step(steps.REST),
            ],
        ),
    )
    put = _one(PUT, ["s-1", 1])
    hasty = [step._replace(how=HELD) for step in (put, _one(CANCEL, []), put, back)]
    yield "hasty", Input(0, [*hasty, Step(steps.REST), put, Step(steps.CLOSE)])
    ephemeral = _one(PUT, ["", 6])
    tickets = [
        Step(steps.TICKET, client, ANSWERED, (verb, 0)) for verb in (0, 1) for client in (1, 0)
    ]
    yield "tickets", Input(0, [ephemeral, *tickets, ephemeral, Step(steps.CLOSE), *tickets])
    long = _one(PUT, ["s-2", 0], descriptors=((palette.LONG_PATH, 1),))
    yield "long-path", Input(0, [long, _one(ENTRIES, [0]), _one(ENTRIES, [60])])
    stranger = Step(steps.CONNECT, 0, ANSWERED, (7,))
    names = ("a", "b", "n01", "s-9", "")
    asks = [_one(BORROW, [name, flags, 0, ""]) for name in names for flags in (0, 2)]
    others = [
        _one(RETIRE, ["n02", False, None]),
        _one(STATS, []),
        _one(ENTRIES, [0]),
        pages[0],
        put,
    ]
    yield "stranger", Input(0, [stranger, *[x for ask in (*asks, *others) for x in (ask, back)]])
    crowd = [Step(steps.CONNECT, client, ANSWERED, (3,)) for client in range(4)]
    yield "crowd", Input(0, [*crowd, Step(steps.CLOSE, 1), *crowd[1:]])
    silent = Step(steps.CONNECT, 3, ANSWERED, (steps.STRANGER,))
    malformed = [Step(steps.SEND, 3, how, (1,), (), b"?") for how in (HELD, ANSWERED)]
    away = [*crowd[:3], silent, silent._replace(how=HELD), *malformed]
    yield "turned-away", Input(0, [*away, request(STATS, [], client=3)])
    again = [*crowd[:3], *[silent] * 9, malformed[1], *[silent] * 9, malformed[1]]
    yield "turned-away-often", Input(0, again)
    hour = Step(steps.TIME, 0, ANSWERED, (15,))
    waits = [alone, request(BORROW, ["a", 0, 10**9, ""], client=1), hour]
    closing = request(RETIRE, ["a", True, 5], client=2)
    yield "time", Input(0, [SILENT, hour, *waits, closing, hour, closing, back, hour])
    unread = [step._replace(how=UNREAD) for step in (borrow, back, borrow, hour)]
    yield "time-unread", Input(0, [*unread, request(STATS, [])])
    for way in range(3):
        leave = Step(steps.SHUTDOWN, 0, ANSWERED, (way,))
        yield f"shutdown-{way}", Input(0, [*waits[:2], leave, borrow._replace(client=2)])


WAITS = ((0, 0), (1, 0), (0, 0.5), (1, 5))
EXACT = 3118, 20  # names of so many bytes: a message of 65,536 bytes if its purpose has 40
