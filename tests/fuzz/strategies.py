"""Hypothesis strategies for structure: requests at and beyond every boundary, in and out of turn.

A request is drawn good or bad.  A bad one is a good one with one thing wrong: one field beside its
boundary or of another type, one too many or too few, another verb, descriptors where none belong.
"""

from __future__ import annotations

from typing import Any

import msgpack
from hypothesis import strategies as st

from fuzz import palette, steps
from fuzz.contract import (
    BORROW,
    CANCEL,
    ENTRIES,
    HELLO,
    LOANS,
    MORE,
    PUT,
    RETIRE,
    RETURN,
    STATS,
    USAGE,
)
from fuzz.steps import ANSWERED, HELD, UNREAD, Input, Step

HUGE = 2**63
WRONG_TYPES = (None, True, False, 3, -1, 1.5, "a", "", b"a", [], ["a"], [[]], {"a": 1}, HUGE)


def beside(most: int) -> tuple[int, ...]:
    """Good and bad numbers at the ends of 0 to `most`."""
    return 0, 1, most - 1, most, most + 1, -1, HUGE, 2**64 - 1


class Strings:
    """Names, tickets and purposes at their boundaries."""

    NAMES = ("a", "b", "n07", "s-1", "x" * 255, "nobody", "a\n", "\x1b[31m", "é" * 127, "a b")
    TOO_LONG = ("x" * 256, "é" * 128, "x" * 4096, "x" * 5000)
    TICKETS = (bytes(16), b"t", bytes(255))
    TICKETS_TOO_LONG = (bytes(256), bytes(4097))


GOOD: dict[int, tuple[tuple[Any, ...], ...]] = {
    HELLO: ((1,), (True, False)),
    BORROW: (
        ("a", "b", "a", "s-1", ["a", "b"], ["a", "a"], ["n01"] * 20, bytes(16)),
        (0, 0, 0, 1, 2, 3),
        (None, 0, 0.5, 5, 1e9, 10**9),
        ("", "why", "p" * 128, "é" * 64),
    ),
    MORE: ((0, 1, 253, 4095, 4096),),
    RETURN: (),
    CANCEL: (),
    PUT: (("s-1", "p", "a", "x" * 254, "", ""), (0, 1, 2, 3, 6, 6)),
    RETIRE: (
        ("a", "s-1", "p", "n05", bytes(16)),
        (False, False, True),
        (None, 0, 0.5, 10**9),
    ),
    ENTRIES: ((0, 0, 60, 2**32 - 1, 2**32),),
    LOANS: (("", "", "a", "zz", "x" * 255), (0, 0, 1, 2**32), (0, 0, 1, 4095, 4096)),
    STATS: (),
    USAGE: ((0, 0, 1, 2**32),),
}
TIMEOUTS = (-1, -0.001, 10**9 + 1, 1e9 + 1, 1e300, float("inf"), float("nan"), HUGE, 10**18)
BAD: dict[int, tuple[tuple[Any, ...], ...]] = {
    HELLO: (beside(2**31), ()),
    BORROW: (
        (
            *("", [], b"", *Strings.TOO_LONG, *Strings.TICKETS_TOO_LONG, ["a"] * 4097),
            *(["x" * 256], ["a", 5], ["a", None], ["a", ["a"]], [bytes(256)], ["a", "é" * 128]),
        ),
        beside(3),
        TIMEOUTS,
        ("p" * 129, "é" * 65, "p" * 300, "p" * 5000),
    ),
    MORE: (beside(4096),),
    RETURN: (),
    CANCEL: (),
    PUT: (Strings.TOO_LONG, beside(7)),
    RETIRE: ((*Strings.TOO_LONG, *Strings.TICKETS_TOO_LONG), (), TIMEOUTS),
    ENTRIES: (beside(2**32),),
    LOANS: (Strings.TOO_LONG, beside(2**32), beside(4096)),
    STATS: (),
    USAGE: (beside(2**32),),
}
VERBS = (BORROW, BORROW, BORROW, BORROW, MORE, RETURN, RETURN, CANCEL, PUT, PUT, RETIRE)
LISTS = (ENTRIES, LOANS, STATS, USAGE, HELLO)

clients = st.sampled_from((0, 0, 0, 1, 1, 2, 3))
hows = st.sampled_from((ANSWERED,) * 6 + (UNREAD, HELD))
kinds = st.integers(0, palette.KINDS - 1)
groups = st.lists(
    st.tuples(kinds, st.sampled_from((1, 1, 2, 100, 253))), min_size=1, max_size=3
).map(tuple)
one_descriptor = st.one_of(
    st.sampled_from((palette.FILE, palette.LONG_PATH, palette.MEMFD, palette.TCP_LISTENER)), kinds
).map(lambda kind: ((kind, 1),))


def request(
    verb: int,
    fields: list[Any],
    *,
    client: int = 0,
    how: int = ANSWERED,
    shift: int = 0,
    descriptors: tuple[tuple[int, int], ...] = (),
) -> Step:
    """A request as a step."""
    data = b"".join(map(msgpack.packb, fields))
    return Step(steps.REQUEST, client, how, (verb, shift, len(fields)), descriptors, data)


@st.composite
def requests(draw: Any) -> Step:
    """A request, good or with one thing wrong."""
    verb = draw(st.sampled_from(VERBS + LISTS))
    fields = [draw(st.sampled_from(values)) for values in GOOD[verb]]
    descriptors = draw(one_descriptor) if verb == PUT else ()
    shift = 0
    wrong = draw(st.sampled_from(("",) * 5 + ("value",) * 5 + ("type",) * 2 + WRONGS))
    if wrong in ("value", "type") and fields:
        place = draw(st.integers(0, len(fields) - 1))
        values = BAD[verb][place] if wrong == "value" else WRONG_TYPES
        fields[place] = draw(st.sampled_from(values or WRONG_TYPES))
    elif wrong == "count":
        fields = fields[:-1] if fields and draw(st.booleans()) else [*fields, 0]
    elif wrong == "seq":
        shift = draw(st.sampled_from((-2, -1, 1, 2)))
    elif wrong == "descriptors":
        descriptors = draw(groups)
    elif wrong == "verb":
        verb = draw(st.sampled_from((10, 11, 100, 127)))
    return request(
        verb,
        fields,
        client=draw(clients),
        how=draw(hows),
        shift=shift,
        descriptors=descriptors,
    )


WRONGS = ("count", "seq", "descriptors", "verb")

ENCODED = (1, 0, "a", b"a", None, 1.5, [], {}, ["a"], {"a": 1}, msgpack.ExtType(5, b"a"))
HEADS = (
    *(b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc9\xff"),
    *(b"\xc1", b"\x81\xc0\xc0", b"\x82\xa1a\x01\xa1a\x02", b"\xd6\xff\0\0\0\0", b"\xa1\xff"),
    *(b"\x95\x01\xcf\0\0\0\0\0\0\0\1\x91", b"\x94\x08\1", b"\x91\x01", b"\x92\x01\xff", b"\x90"),
    *(b"\x92\x03\xcf\0\x20\0\0\0\0\0\0", b"\x92\x03\xcf\0\x1f\xff\xff\xff\xff\xff\xff", b""),
    *(
        b"\x92\x03\xd3\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x92\x03\xcb\0\0\0\0\0\0\0\0",
        b"\x92\x03",
    ),
    *(b"\x92\xff\0", b"\x92\xa1a\0", b"\x92\x01\xa1a", b"\x92\x01\xc0", b"\x92\xc3\1", b"\x01"),
)
raw_data = st.one_of(
    st.sampled_from(HEADS),
    st.binary(max_size=40),
    st.lists(st.sampled_from(ENCODED), max_size=6).map(msgpack.packb),
    st.builds(
        lambda verb, seq, rest: msgpack.packb([verb, seq, *rest]),
        st.integers(-1, 12),
        st.sampled_from((0, 1, 2, 3, -1, 2**53 - 1, 2**53, 2**64 - 1)),
        st.lists(st.sampled_from(ENCODED), max_size=4),
    ),
)
raw_sends = st.builds(
    lambda client, how, times, fds, data: Step(steps.SEND, client, how, (times,), fds, data),
    clients,
    hows,
    st.sampled_from((1,) * 6 + (1000, 65_535)),
    st.one_of(st.just(()), st.just(()), groups),
    raw_data,
)
connects = st.builds(
    lambda client, flags: Step(steps.CONNECT, client, ANSWERED, (flags,)),
    clients,
    st.sampled_from((3, 3, 3, 3, 1, 1, 0, 2, 7, 5)),
)
# names of one byte or 20; 2,730 of 21 and a purpose of 3, then 16 bytes make 65,536 and two more
many = st.builds(
    lambda client, how, *numbers: Step(steps.MANY, client, how, numbers),
    clients,
    hows,
    st.sampled_from((1, 64, 253, 254, 300, 2100, 3200, 4095, 4096, 4097, 5000)),
    st.sampled_from((1, 1, 1, 1, 20, 255)),
    st.sampled_from((0, 0, 0, 1, 2)),
    st.sampled_from((0, 0, 9, 128, 129)),
    st.sampled_from((0,) * 8 + (1,)),
)
flood = st.builds(lambda count: Step(steps.FLOOD, 0, 0, (count,)), st.sampled_from((5, 5, 520)))
rests = st.builds(lambda client: Step(steps.REST, client), clients)
ends = st.one_of(
    st.builds(
        lambda client, way: Step(steps.SHUTDOWN, client, 0, (way,)), clients, st.integers(0, 2)
    ),
    st.builds(lambda client, how: Step(steps.CLOSE, client, how), clients, hows),
)
times = st.builds(lambda n: Step(steps.TIME, 0, 0, (n,)), st.integers(0, 15))
tickets = st.builds(
    lambda client, how, verb: Step(steps.TICKET, client, how, (verb, 0)),
    *(clients, hows, st.integers(0, 1)),
)
WEIGHTED = (
    *[requests()] * 24,
    *[raw_sends] * 4,
    *[many] * 4,
    *[connects] * 3,
    *[tickets] * 3,
    *[ends] * 2,
    *(rests, times, flood),
)


@st.composite
def inputs(draw: Any) -> Input:
    """An input: anything.  Who is not there, or was shown out, comes by itself."""
    count = draw(st.integers(1, 16))
    chosen = [draw(WEIGHTED[draw(st.integers(0, len(WEIGHTED) - 1))]) for _ in range(count)]
    return Input(draw(st.integers(0, 1)), chosen)
