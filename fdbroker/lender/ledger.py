"""The ledger: the lender's whole state as fixed-width records in a buffer of the caller.

Every decision of the lender is written here before any client is told, so that another process can
map the same buffer and take over.  A header is followed by three tables of 64-bit words in the
machine's byte order:

    sessions   one record each: its seq and id, and its loan or its wait
    entries    one record each: name or ticket, generation, kind, its creator and the creator's seq
    cells      one word each: the second, third, ... entry of a loan of several, and the number of
               cells between it and the cell of the next entry

The first word of a record is its **commit word**: a state in the low eight bits, and above it the
seq (sessions) or the generation (entries).  A change writes the fields first and the commit word
last, and it writes only fields that have no meaning in the present state.  (The id of a session
always has a meaning; it is written once, while the slot is free.)  So a record is true at every
instant, wherever its writer was killed.  A grant or a return is one word.  Cells have no state: a
cell is free if no session's record leads to it.

The ledger does not know what the records mean.  Times are nanoseconds of CLOCK_BOOTTIME, which goes
on through suspend and is the same for the process that takes over.
"""

from __future__ import annotations

import struct
from array import array
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.errors import BrokerFull

if TYPE_CHECKING:
    from collections.abc import Sequence

# "fledger2".  Every change of the layout below needs another number.
MAGIC = 0x32_72_65_67_64_65_6C_66

# The header: the magic number, three capacities, three counters, and a spare word.
HEADER_WORDS = 8
NEXT_SESSION, NEXT_GENERATION, NEXT_ARRIVAL = 4, 5, 6

# The words of a session's record.  ARRIVAL, ASKED and DEADLINE have a meaning only while it waits.
# SHAPE has the first entry and, above it, what `shape` makes of the request.
COMMIT, ID, BORROW_SEQ, SINCE, SHAPE, CELL, ARRIVAL, ASKED, DEADLINE, PURPOSE = range(10)
PURPOSE_BYTES = 128
SESSION_WORDS = PURPOSE + PURPOSE_BYTES // 8

# An entry's record after the commit word.
ENTRY = struct.Struct("=QQQIBBH256s")
ENTRY_WORDS = 1 + ENTRY.size // 8

STATE_BITS = 8
STATE_MASK = (1 << STATE_BITS) - 1

# The low half of SHAPE and of a cell is the slot of an entry.
HALF = 0xFFFFFFFF


class SessionRecord(NamedTuple):
    """The fields of a session's record, which have no meaning while it is IDLE.

    `members` is the number of entries, `entry` the first one, and `cell` the cell of the second.
    """

    borrow_seq: int
    since: int
    entry: int
    members: int
    flags: int
    cell: int
    arrival: int
    asked: int
    deadline: int
    purpose: bytes


def shape(members: int, flags: int, purpose_size: int) -> int:
    """Return the part of the word SHAPE that a request fixes; the slot of the entry is added."""
    return purpose_size << 56 | flags << 48 | members << 32


class EntryRecord(NamedTuple):
    """An entry's fields, in the order of the record."""

    creator: int
    creator_seq: int
    since: int
    uid: int
    kind: int
    flags: int
    name_size: int
    name: bytes


class Ledger:
    """Reads and writes the records in `buffer`, which stays the caller's.

    A buffer of zeros is formatted for `sessions`, `entries` and `cells` records.  A buffer that was
    formatted before is taken as it is.  `size` tells how many bytes it must have.  Pages that were
    never written take no memory if the buffer is an anonymous mapping or a memfd.
    """

    __slots__ = (
        "_cells_at",
        "_entries_at",
        "_sessions_at",
        "buffer",
        "cells",
        "entries",
        "sessions",
        "words",
    )

    def __init__(
        self,
        buffer: bytearray | memoryview,
        sessions: int = 1024,
        entries: int = 1024,
        cells: int = 1024,
    ) -> None:
        self.buffer = memoryview(buffer).cast("B")
        self.words = self.buffer[: len(self.buffer) // 8 * 8].cast("Q")
        if len(self.buffer) < self.size(0, 0, 0):
            raise ValueError("the buffer is too small for a ledger")
        if self.words[0] == 0:
            if len(self.buffer) < self.size(sessions, entries, cells):
                raise ValueError("the buffer is too small for that many records")
            self.words[1:7] = (
                memoryview(struct.pack("=6Q", sessions, entries, cells, 1, 1, 1))
                .cast("B")
                .cast("Q")
            )
            self.words[0] = MAGIC
        if self.words[0] != MAGIC:
            raise ValueError("the buffer holds something else, or a ledger of another version")
        self.sessions, self.entries, self.cells = self.words[1:4]
        if len(self.buffer) < self.size(self.sessions, self.entries, self.cells):
            raise ValueError("the buffer is only the beginning of a ledger")
        self._sessions_at = HEADER_WORDS
        self._entries_at = self._sessions_at + self.sessions * SESSION_WORDS
        self._cells_at = self._entries_at + self.entries * ENTRY_WORDS

    @staticmethod
    def size(sessions: int, entries: int, cells: int) -> int:
        """Return the bytes that a buffer for so many records must have."""
        return 8 * (HEADER_WORDS + sessions * SESSION_WORDS + entries * ENTRY_WORDS + cells)

    def count(self, counter: int) -> int:
        """Return the next number of a counter in the header; no number is returned twice."""
        number = self.words[counter]
        self.words[counter] = number + 1
        return number

    # --- sessions ---

    def record(self, slot: int) -> memoryview:
        """Return the words of a session's record, to be written one by one, COMMIT last."""
        at = self._sessions_at + slot * SESSION_WORDS
        return self.words[at : at + SESSION_WORDS]

    def write_purpose(self, slot: int, purpose: bytes) -> None:
        """Write the purpose of a loan; it has no meaning until the commit."""
        at = (self._sessions_at + slot * SESSION_WORDS + PURPOSE) * 8
        self.buffer[at : at + len(purpose)] = purpose

    def read_session(self, slot: int) -> tuple[int, int, int, SessionRecord]:
        """Return (seq, state, id, fields) of a session's record."""
        record = self.record(slot)
        commit, loan = record[COMMIT], record[SHAPE]
        size = min(loan >> 56, PURPOSE_BYTES)
        at = (self._sessions_at + slot * SESSION_WORDS + PURPOSE) * 8
        fields = SessionRecord(
            record[BORROW_SEQ],
            record[SINCE],
            entry=loan & HALF,
            members=loan >> 32 & 0xFFFF,
            flags=loan >> 48 & 0xFF,
            cell=record[CELL],
            arrival=record[ARRIVAL],
            asked=record[ASKED],
            deadline=record[DEADLINE],
            purpose=bytes(self.buffer[at : at + size]),
        )
        return commit >> STATE_BITS, commit & STATE_MASK, record[ID], fields

    def session_states(self) -> list[int]:
        """Return the state of every session slot, free ones included."""
        words = self.words[self._sessions_at : self._entries_at : SESSION_WORDS]
        return [word & STATE_MASK for word in words]

    # --- entries ---

    def add_entry(self, slot: int, generation: int, state: int, record: EntryRecord) -> None:
        """Write an entry: its fields, then the commit word that makes them true."""
        self.write_entry(slot, record)
        self.commit_entry(slot, generation, state)

    def write_entry(self, slot: int, record: EntryRecord) -> None:
        """Write an entry's fields; they have no meaning until `commit_entry`."""
        ENTRY.pack_into(self.buffer, (self._entries_at + slot * ENTRY_WORDS + 1) * 8, *record)

    def commit_entry(self, slot: int, generation: int, state: int) -> None:
        """Put the entry's record into a state; its fields are true from now on."""
        self.words[self._entries_at + slot * ENTRY_WORDS] = generation << STATE_BITS | state

    def read_entry(self, slot: int) -> tuple[int, int, EntryRecord]:
        """Return (generation, state, fields) of an entry's record."""
        at = self._entries_at + slot * ENTRY_WORDS
        record = EntryRecord(*ENTRY.unpack_from(self.buffer, (at + 1) * 8))
        commit = self.words[at]
        name = record.name[: record.name_size]
        return commit >> STATE_BITS, commit & STATE_MASK, record._replace(name=name)

    def entry_states(self) -> list[int]:
        """Return the state of every entry slot, free ones included."""
        words = self.words[self._entries_at : self._cells_at : ENTRY_WORDS]
        return [word & STATE_MASK for word in words]

    # --- cells ---

    def write_cells(self, cells: Sequence[int], entries: Sequence[int]) -> None:
        """Write `entries` to `cells`, which are in rising order."""
        start = self._cells_at
        if isinstance(cells, range):
            # No cell is skipped, so all words can be written by one call.
            self.words[start + cells.start : start + cells.stop] = array("Q", entries)
            return
        for cell, entry, following in zip(cells, entries, [*cells[1:], cells[-1] + 1], strict=True):
            self.words[start + cell] = (following - cell - 1) << 32 | entry

    def read_cells(self, first: int, count: int) -> tuple[list[int], list[int]]:
        """Return the chain of `count` cells that begins at `first`, as (cells, entries)."""
        cells, entries = [], []
        for _ in range(count):
            word = self.words[self._cells_at + first]
            cells.append(first)
            entries.append(word & HALF)
            first += 1 + (word >> 32)
        return cells, entries


class Slots:
    """The free slots of one table.

    The lowest free slot is always taken first, so a successor takes the same ones.  All slots from
    `fresh` on are free and were never used; they take no memory, however large the table is.
    """

    __slots__ = ("_limit", "_returned", "_what", "fresh")

    def __init__(self, limit: int, what: str, taken: set[int] | None = None) -> None:
        taken = taken or set()
        self._limit = limit
        self._what = what
        self.fresh = max(taken, default=-1) + 1
        # A heap, as every sorted list is.
        self._returned = sorted(set(range(self.fresh)) - taken)

    def take(self) -> int:
        """Take and return the lowest free slot; raise `BrokerFull` if there is none."""
        if self._returned:
            return heappop(self._returned)
        if self.fresh >= self._limit:
            raise BrokerFull(self._what, self._limit)
        self.fresh += 1
        return self.fresh - 1

    def take_many(self, count: int) -> Sequence[int]:
        """Take and return `count` free slots in rising order, as a range if possible.

        Raises `BrokerFull` if there are not so many, and takes none then.
        """
        if count > len(self._returned) + self._limit - self.fresh:
            raise BrokerFull(self._what, self._limit)
        first = self.fresh
        if not self._returned:
            self.fresh += count
            return range(first, self.fresh)
        again = [heappop(self._returned) for _ in range(min(count, len(self._returned)))]
        self.fresh += count - len(again)
        return [*again, *range(first, self.fresh)]

    def give_many(self, slots: Sequence[int]) -> None:
        """Free slots that `take_many` returned."""
        if isinstance(slots, range) and slots.stop == self.fresh:
            self.fresh = slots.start
        else:
            for slot in slots:
                heappush(self._returned, slot)
        if self._returned and len(self._returned) == self.fresh:
            # No slot is in use.
            self._returned.clear()
            self.fresh = 0

    def give(self, slot: int) -> None:
        """Free a slot."""
        heappush(self._returned, slot)
