"""An input: what up to four clients do at one broker, as steps, and as the bytes of a corpus file.

Every string of bytes is an input, so that a fuzzer may change any of them; what is missing at its
end is zero.  The first byte tells which kernel there is (`OLD_KERNEL`), then comes step after step:

    op and client, how, the op's numbers, [groups of (kind, count) of descriptors], [length, bytes]

A few ops stand for many bytes (a list of thousands of names, five hundred requests), so that
inputs stay small.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

OLD_KERNEL = 1  # one without SO_PASSRIGHTS: descriptors come unasked
CLIENTS = 4
STEPS = 64  # of one input at most

CONNECT, SEND, REQUEST, MANY, FLOOD, REST, SHUTDOWN, CLOSE, TIME, TICKET = range(10)

# how: what happens after the step
ANSWERED, UNREAD, HELD = range(3)  # all is served and read; served, not read; not even served
# of CONNECT
WITH_HELLO, PUTS, STRANGER = 1, 2, 4


class Form(NamedTuple):
    """What an op carries."""

    numbers: struct.Struct
    has_descriptors: bool = False
    has_data: bool = False


FORMS = {
    CONNECT: Form(struct.Struct(">B")),  # flags
    SEND: Form(struct.Struct(">H"), True, True),  # the data so many times
    REQUEST: Form(struct.Struct(">BbB"), True, True),  # verb, what to add to the right seq, fields
    # a borrow of so many names, each of so many bytes; its flags; bytes of purpose, and of junk
    MANY: Form(struct.Struct(">HBBBB")),
    FLOOD: Form(struct.Struct(">H")),  # so many requests, each another one
    REST: Form(struct.Struct("")),
    SHUTDOWN: Form(struct.Struct(">B")),  # SHUT_RD, SHUT_WR, SHUT_RDWR
    CLOSE: Form(struct.Struct("")),
    TIME: Form(struct.Struct(">B")),  # 2 ** n / 8 seconds pass
    TICKET: Form(struct.Struct(">BB")),  # the verb; which of the tickets that came
}


class Step(NamedTuple):
    """One thing that one client does."""

    op: int
    client: int = 0
    how: int = ANSWERED
    numbers: tuple[int, ...] = ()
    descriptors: tuple[tuple[int, int], ...] = ()
    data: bytes = b""


class Input(NamedTuple):
    """All of it."""

    kernel: int
    steps: Sequence[Step]


def encode(it: Input) -> bytes:
    """The bytes of an input."""
    parts = [bytes((it.kernel,))]
    for step in it.steps:
        form = FORMS[step.op]
        parts.append(bytes((step.op | step.client << 4, step.how)))
        parts.append(form.numbers.pack(*step.numbers))
        if form.has_descriptors:
            groups = step.descriptors[:3]
            parts.append(bytes((len(groups), *(part for group in groups for part in group))))
        if form.has_data:
            parts.append(struct.pack(">H", len(step.data)) + step.data)
    return b"".join(parts)


class Reader:
    """Takes bytes from the front; beyond the end there are zeros."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        taken = self.data[self.at : self.at + count]
        self.at += count
        return taken

    def padded(self, count: int) -> bytes:
        return self.take(count).ljust(count, b"\0")


def decode(data: bytes) -> Input:
    """The input that any bytes are."""
    reader, steps = Reader(data), list[Step]()
    kernel = reader.padded(1)[0] & 1
    while reader.at < len(data) and len(steps) < STEPS:
        first, how = reader.padded(2)
        form = FORMS[op := (first & 15) % len(FORMS)]
        numbers = form.numbers.unpack(reader.padded(form.numbers.size))
        groups = list[tuple[int, int]]()
        if form.has_descriptors:
            for _ in range(reader.padded(1)[0] % 4):
                kind, count = reader.padded(2)
                groups.append((kind, count))
        body = b""
        if form.has_data:
            (size,) = struct.unpack(">H", reader.padded(2))
            body = reader.take(size)
        client, how = (first >> 4) % CLIENTS, how % 3
        steps.append(Step(op, client, how, numbers, tuple(groups), body))
    return Input(kernel, steps)
