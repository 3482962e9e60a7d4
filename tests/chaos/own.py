"""What good clients do with entries of their own: put, replace, share, retire, and see it closed.

What they put says what it is: a memfd with a stamp in it.  That something was closed is seen from
the other end of a pipe.
"""

from __future__ import annotations

import io
import os
import pickle
import select
import struct
import time

import fdbroker
from fdbroker.errors import (
    BorrowTimeout,
    NameTaken,
    UnknownEntry,
    UnknownTicket,
    WouldDeadlock,
)

from .actor import Cast, fork, pipe
from .plan import CREW

STAMP = struct.Struct("=16sQQ")


class Owner(Cast):
    """The half of a good client that owns something."""

    published_by = CREW["good"]

    @property
    def purpose(self) -> str:
        return f"{self.actor.name} at {self.at}"

    def name(self, of: str) -> str:
        return f"good/{self.number}/{of}"

    # --- stamps ---

    def stamped(self, what: str, of: int, number: int) -> int:
        """A memfd that says so: the caller's."""
        fd = os.memfd_create("stamp", os.MFD_CLOEXEC)
        os.write(fd, STAMP.pack(what.encode(), of, number))
        return fd

    def read_stamp(self, fd: int) -> tuple[str, int, int]:
        what, of, number = STAMP.unpack(os.pread(fd, STAMP.size, 0))
        return what.rstrip(b"\0").decode(), of, number

    def has_stamp(self, fd: int, *stamp: object) -> None:
        found = self.read_stamp(fd)
        self.check(found == stamp, f"{stamp} was put, and {found} was lent")

    def put_stamp(self, name: str, number: int, **how: bool) -> int:
        """Its generation."""
        fd = self.stamped("put", self.number, number)
        try:
            return self.client.put(name, fd, **how)
        finally:
            os.close(fd)

    # --- steps ---

    def put(self, number: int) -> None:
        """Put, be refused, replace while it is lent, retire while it is lent."""
        name = self.name("file")
        first = self.put_stamp(name, number)
        error = self.refuses(NameTaken, self.put_stamp, name, 0)
        self.check(error.name == name, f"{error.name} is taken, instead of {name}")
        with self.client.borrow(name) as old:
            second = self.put_stamp(name, number + 1, replace=True)
            self.check(second > first, f"generation {second} after {first}")
            with self.client.borrow(name) as new:
                self.has_stamp(new.fileno(), "put", self.number, number + 1)
                self.has_stamp(old.fileno(), "put", self.number, number)
                rows = [row for row in self.client.entries() if row.name == name]
                live = [row.generation for row in rows if not row.retired]
                self.check(live == [second], f"{rows} are listed after a replace")
                mine = [row for row in rows if row.retired and row.generation == first]
                self.check(len(mine) == 1 and mine[0].loans == 1, f"{rows}: the old one is lent")
                self.client.retire(name)
                self.refuses(UnknownEntry, self.client.borrow, name)
                self.refuses(UnknownEntry, self.client.retire, name)
                self.has_stamp(new.fileno(), "put", self.number, number + 1)
        self.wait_until(lambda: not self.listed(name), f"{name} is closed")

    def listed(self, name: str) -> bool:
        return any(entry.name == name for entry in self.client.entries())

    def publish(self, retire: bool) -> None:
        """The next state of what this one publishes; the board says which, before and after."""
        name, value = f"published/{self.number}", self.board.published(self.number)
        self.board.publish(self.number, value + 1)
        if value % 4 == 2 and retire:
            self.client.retire(name)
            value += 2
        else:
            value += 4 if value % 4 == 2 else 2
            fd = self.stamped("published", self.number, value)
            self.client.put(name, fd, replace=value > 2)
            os.close(fd)
        self.board.publish(self.number, value)
        self.right += 1

    def closing(self, wait: bool) -> None:
        """The end of the pipe that was put is open as long as it is lent, and then it is closed."""
        name = self.name("pipe")
        with pipe() as (reader, writer):
            self.client.put(name, writer)
            writer.close()
            loan = self.client.borrow(name)
            if wait:
                self.refuses(WouldDeadlock, self.client.retire, name, wait=True)
            else:
                self.client.retire(name)
                self.refuses(UnknownEntry, self.client.borrow, name)
            os.write(loan.fileno(), b"still")
            self.check(reader.read(10) == b"still", "the pipe leads elsewhere")
            self.check(not is_at_end(reader, 0), "it was closed while it was lent")
            loan.close()
            if wait:
                self.client.retire(name, wait=True, timeout=self.patience)
                self.check(is_at_end(reader, 0), "it was said to be closed, and was open")
            else:
                self.check(is_at_end(reader, self.patience), "it was not closed")

    def share(self, number: int) -> None:
        """A ticket is good until its owner retires it; the loan is good for longer."""
        fd = self.stamped("share", self.number, number)
        with self.client.share(fd) as ref:
            os.close(fd)
            copy = pickle.loads(pickle.dumps(ref))
            with copy.borrow() as loan:
                self.has_stamp(loan.fileno(), "share", self.number, number)
            kept = ref.borrow()
        with kept:
            self.refuses(UnknownTicket, copy.borrow)
            self.has_stamp(kept.fileno(), "share", self.number, number)

    def many(self, count: int) -> None:
        """More than one message takes."""
        name = self.name("many")
        self.put_stamp(name, count)
        with self.client.borrow_all([name] * count) as loan:
            numbers = loan._session.fds
            self.check(len(set(numbers)) == count, f"{len(set(numbers))} came instead of {count}")
            inodes = {os.fstat(number).st_ino for number in numbers}
            self.check(len(inodes) == 1, f"of one file came {len(inodes)}")
            self.has_stamp(numbers[-1], "put", self.number, count)
        self.client.retire(name, wait=True, timeout=self.patience)

    def deadlock(self) -> None:
        name = self.name("lock")
        self.put_stamp(name, 1)
        with self.client.borrow(name, exclusive=True):
            self.refuses(WouldDeadlock, self.client.borrow, name, timeout=self.patience)
            self.refuses(WouldDeadlock, self.client.borrow, name, exclusive=True)
        self.client.retire(name, wait=True, timeout=self.patience)

    def busy(self, ms: float) -> None:
        """Another process has it: who, and for how long one waits."""
        name = self.name("lock")
        self.put_stamp(name, 2)
        with pipe() as (told, tell), pipe() as (go, let_go):

            def hold() -> None:
                let_go.close()
                with self.client.borrow(name, exclusive=True):
                    tell.write(b"x")
                    go.read(1)

            pid = fork(hold)
            tell.close()
            self.check(told.read(1) == b"x", "another process of ours got no loan")
            for seconds in (0, ms / 1000):
                begun = time.monotonic()
                error = self.refuses(
                    BorrowTimeout, self.client.borrow, name, exclusive=True, timeout=seconds
                )
                waited = time.monotonic() - begun
                self.check(waited >= seconds, f"it waited {waited} s instead of {seconds}")
                holders = [(holder[0], holder[3]) for holder in error.holders]
                self.check(holders == [(pid, True)], f"held by {pid}, told {error.holders}")
            let_go.close()
            with self.client.borrow(name, exclusive=True, timeout=self.patience):
                self.right += 1
            self.check(os.waitpid(pid, 0)[1] == 0, "another process of ours failed")
        self.client.retire(name, wait=True, timeout=self.patience)

    def ephemeral(self) -> None:
        """What was put ephemerally ends with the process that put it; the loan does not."""
        name = self.name("ephemeral")
        with pipe() as (told, tell), pipe() as (go, let_go):

            def put() -> None:
                let_go.close()
                with fdbroker.Client(self.address) as client:
                    fd = self.stamped("ephemeral", self.number, self.at)
                    client.put(name, fd, ephemeral=True)
                    tell.write(b"x")
                    go.read(1)

            pid = fork(put)
            tell.close()
            self.check(told.read(1) == b"x", "another process of ours could not put")
            with self.client.borrow(name) as loan:
                let_go.close()
                self.check(os.waitpid(pid, 0)[1] == 0, "another process of ours failed")
                self.wait_until(lambda: not self.is_lent(name), f"{name} has retired")
                self.has_stamp(loan.fileno(), "ephemeral", self.number, self.at)

    def is_lent(self, name: str) -> bool:
        try:
            self.client.borrow(name).close()
        except UnknownEntry:
            return False
        return True


def is_at_end(reader: io.FileIO, seconds: float) -> bool:
    """Whether nobody has the other end of an empty pipe any more, now or before long."""
    poll = select.poll()
    poll.register(reader, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(seconds * 1000))
