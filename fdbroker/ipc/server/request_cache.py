"""Requests that were decoded before: a cache by their bytes, without their seq.

Requests that are alike but for their seq are alike byte for byte, if the seq always takes nine
bytes (msgpack's uint 64).  So a request is known by its head and its tail, and to find it takes a
third of the time that decoding takes.  Only the decoding is cached.  Whether the peer may have what
it asks for is checked each time, so one cache serves all peers, and new rules leave it as it is.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from fdbroker.ipc.protocol.codec import HEAD, UINT64
from fdbroker.ipc.protocol.messages import BORROW, EXCLUSIVE, READONLY, RETIRE
from fdbroker.lender.model import LoanRequest

# How many requests are remembered, and how long each may be.
REQUESTS = 1024
REQUEST_BYTES = 256
SECOND = 1_000_000_000

Decoded = tuple[int, Any]


class RequestCache:
    """Requests that were decoded before.

    `split[size](buffer)` takes a request of that size apart: its head, its seq, its tail.  It has
    no such size if no known request has it: KeyError.  `known[head + tail]` is the verb and the
    fields, which nobody may change.
    """

    __slots__ = ("known", "split")

    def __init__(self) -> None:
        self.known: OrderedDict[bytes, Decoded] = OrderedDict()
        self.split: dict[int, Callable[[bytes | bytearray], tuple[bytes, int, bytes]]] = {}

    def remember(self, data: bytes, verb: int, fields: Any) -> None:
        """Keep a request that was decoded, if its form can be known again."""
        if data[1:3] != bytes((verb, UINT64)) or len(data) > REQUEST_BYTES:
            return
        if len(self.known) >= REQUESTS:
            # The oldest goes.  To forget all at once would take long.
            self.known.popitem(last=False)
        self.known[data[:3] + data[HEAD.size :]] = verb, fields
        if len(data) not in self.split:
            tail = f"{len(data) - HEAD.size}s"
            self.split[len(data)] = struct.Struct(HEAD.format + tail).unpack_from


def _loan_request(names: Any, flags: int, timeout: float | None, purpose: str) -> LoanRequest:
    return LoanRequest(
        tuple(names) if type(names) is list else (names,),
        flags & EXCLUSIVE != 0,
        flags & READONLY != 0,
        _nanoseconds(timeout),
        purpose,
    )


def _retirement(name: str | bytes, wait: bool, timeout: float | None) -> tuple[Any, ...]:
    return name, wait, _nanoseconds(timeout)


def _nanoseconds(timeout: float | None) -> int | None:
    return None if timeout is None else int(timeout * SECOND)


# What the lender takes in place of the fields of a message.
CONVERSIONS: dict[int, Callable[..., Any]] = {BORROW: _loan_request, RETIRE: _retirement}
