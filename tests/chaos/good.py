"""Good clients, which check every answer: what they borrow of others, alone and together.

What they do with entries of their own is in own.py.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterable

import fdbroker
from fdbroker.errors import (
    BorrowTimeout,
    NotPermitted,
    UnknownEntry,
    UnsupportedKind,
)

from . import stage
from .board import WrongAnswer
from .own import Owner
from .plan import COMMON, READABLE, SECRET

COUNTER = struct.Struct("=QQ")  # in the file of a turn: how many had it, who has it
NANOSECONDS = 1_000_000_000


class Good(Owner):
    """One of them."""

    # --- what all may have at once ---

    def shared(self, name: str, ms: float) -> None:
        begun = time.perf_counter_ns()
        with self.client.borrow(name, purpose=self.purpose) as loan:
            self.slowest = max(self.slowest, (time.perf_counter_ns() - begun) // 1000)
            stage.check_looks(self.expected, name, loan.fileno())
            self.check(fcntl.fcntl(loan.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC, "no CLOEXEC")
            self.pause(ms)
            if self.at % 16 == 0:
                self.is_listed(loan, exclusive=False)

    def read(self, name: str, offset: int) -> None:
        if name not in READABLE:
            self.refuses(UnsupportedKind, self.client.borrow, name, mode="r")
            return
        with self.client.borrow(name, mode="r") as loan:
            fd = loan.fileno()
            self.check(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY, "writable")
            self.check(os.lseek(fd, 0, os.SEEK_CUR) == 0, "the offset is not its own")
            os.lseek(fd, offset, os.SEEK_SET)
            content = stage.pattern(name)[offset : offset + 100]
            self.check(os.read(fd, 100) == content, f"{name} has other contents at {offset}")
            stage.check_looks(self.expected, name, fd)

    # --- turns ---

    def turn(self, name: str, ms: float) -> None:
        with self.client.borrow(
            name, exclusive=True, timeout=self.patience, purpose=self.purpose
        ) as loan:
            self.has_turns(loan, [name], ms)
            if self.at % 16 == 0:
                self.is_listed(loan, exclusive=True)

    def turn_shared(self, name: str, ms: float) -> None:
        with (
            self.client.borrow(name, timeout=self.patience) as loan,
            self.board.witness([name], exclusive=False),
        ):
            stage.check_looks(self.expected, name, loan.fileno())
            self.right += 1
            self.pause(ms)

    def turn_now(self, name: str, exclusive: bool) -> None:
        try:
            loan = self.client.borrow(name, exclusive=exclusive, timeout=0)
        except BorrowTimeout as error:
            self.check(error.name == name, f"asked for {name}, told that {error.name} is busy")
            known = {stage.uid_of(role) for role in ("good", "dying")}
            for pid, uid, seconds, held_exclusively in error.holders:
                self.check(pid > 0 and uid in known, f"{name} is held by pid {pid} uid {uid}")
                self.check(-0.1 < seconds < 3600, f"{name} has been held for {seconds} s")
                self.check(held_exclusively or exclusive, "shared loans excluded a shared one")
            return
        with loan:
            if exclusive:
                self.has_turns(loan, [name], 0)
                return
            with self.board.witness([name], exclusive=False):
                stage.check_looks(self.expected, name, loan.fileno())
                self.right += 1

    def several(self, names: list[str], exclusive: bool, ms: float) -> None:
        loan = self.client.borrow_all(names, exclusive=exclusive, timeout=self.patience)
        with loan:
            self.check(loan.entries == tuple(names), f"{names} became {loan.entries}")
            if exclusive:
                self.has_turns(loan, names, ms)
                return
            with self.board.witness(names, exclusive=False):
                for name in names:
                    stage.check_looks(self.expected, name, loan.fileno(name))
                self.right += len(names)
                self.pause(ms)

    def has_turns(self, loan: fdbroker.Loan, names: Iterable[str], ms: float) -> None:
        """Nobody else has them, as the witness sees it, and as the files themselves show."""
        names = list(names)
        with self.board.witness(names, exclusive=True):
            found = []
            for name in names:
                fd = loan.fileno(name)
                stage.check_looks(self.expected, name, fd)
                count, _ = COUNTER.unpack(os.pread(fd, COUNTER.size, 0))
                os.pwrite(fd, COUNTER.pack(count + 1, os.getpid()), 0)
                found.append((fd, count + 1))
            self.pause(ms)
            for fd, count in found:
                now = COUNTER.unpack(os.pread(fd, COUNTER.size, 0))
                self.check(now == (count, os.getpid()), f"somebody else wrote into it: {now}")

    # --- lists and refusals ---

    def is_listed(self, loan: fdbroker.Loan, *, exclusive: bool) -> None:
        rows = [
            row
            for row in self.client.loans(loan.entry)
            if row.pid == os.getpid() and row.purpose == self.purpose
        ]
        self.check(rows, f"a loan of {loan.entry} is not listed")
        (row,) = rows
        self.check(row.uid == os.geteuid(), f"its uid is listed as {row.uid}")
        self.check(row.exclusive == exclusive, f"its exclusive is listed as {row.exclusive}")
        self.check(abs(row.since - loan.since) < 0.1, f"since {loan.since}, listed as {row.since}")

    def list(self) -> None:
        entries = {entry.name: entry for entry in self.client.entries()}
        self.check(set(COMMON) <= entries.keys(), "an entry is not listed")
        if stage.RULED:
            strange = {name for name in entries if name.startswith(("hostile/", "dying/", SECRET))}
            self.check(not strange, f"what we may not see is listed: {strange}")
        for name in COMMON:
            self.check(not entries[name].retired, f"{name} is listed as retired")
        self.check(entries["common/tcp"].where.startswith("127.0.0.1:"), "its address is missing")
        for row in self.client.loans():
            self.check(row.entry and row.pid > 0, f"a loan is listed as {row}")

    def forbidden(self) -> None:
        if not stage.RULED:
            return
        self.refuses(NotPermitted, self.client.borrow, SECRET)
        self.refuses(NotPermitted, self.client.borrow_all, [COMMON[0], SECRET])
        self.refuses(NotPermitted, self.client.retire, COMMON[0])
        self.refuses(NotPermitted, self.client.stats)
        with open(os.devnull) as null:
            self.refuses(NotPermitted, self.client.put, "common/mine", null)

    def unknown(self, name: str) -> None:
        error = self.refuses(UnknownEntry, self.client.borrow, name)
        self.check(error.name == name, f"asked for {name}, told that {error.name} is unknown")
        self.refuses(UnknownEntry, self.client.borrow_all, [COMMON[0], name])

    def visit(self, number: int) -> None:
        """What another one publishes is there, and is what was published last, or is not there."""
        of = number % self.published_by
        before = self.board.published(of)
        try:
            with self.client.borrow(f"published/{of}") as loan:
                found = self.read_stamp(loan.fileno())
        except UnknownEntry:
            found = None
        after = self.board.published(of)
        if before == after and before % 4 == 0:
            self.check(found is None, f"a retired name was lent: {found}")
        elif before == after and before % 4 == 2:
            expected = ("published", of, after)
            self.check(found == expected, f"{expected} was published, and {found} was lent")
        elif found is not None:
            # on its way from retired it is one more, from live one less or three more
            if not (found[:2] == ("published", of) and before - 1 <= found[2] <= after + 3):
                raise WrongAnswer(f"{found} was lent, between {before} and {after}")
            self.right += 1
