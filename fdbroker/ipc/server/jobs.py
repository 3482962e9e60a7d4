"""The slow parts of what the broker does: look at what was put, open anew, close."""

from __future__ import annotations

import errno
import logging
import os
from abc import abstractmethod
from time import sleep, thread_time
from typing import TYPE_CHECKING

from fdbroker import descriptors
from fdbroker.errors import BrokerClosing, EntryRetired, FDBrokerError, UnsupportedKind
from fdbroker.ipc.protocol.messages import (
    EPHEMERAL,
    MESSAGE_BYTES,
    NAMELESS,
    REPLACE,
    TICKET_BYTES,
    encode,
    encode_error,
)
from fdbroker.ipc.server.connection import ENDED
from fdbroker.ipc.server.worker_pool import CLOSING, RECEIVING, Job
from fdbroker.ipc.transport import unix
from fdbroker.ipc.transport.received import closer as closing
from fdbroker.ipc.transport.rlimit import too_many_files
from fdbroker.lender.accounting import FEW
from fdbroker.rc import FD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.ipc.server.connection import Connection
    from fdbroker.ipc.server.server import Server
    from fdbroker.ipc.transport.unix import Inbox
    from fdbroker.lender.accounting import Account
    from fdbroker.lender.model import Entry

GENTLY = 16  # times as long as it has worked, a thread rests between what one uid left unread

log = logging.getLogger("fdbroker")


class Request(Job):
    """A request of a client.  Its session keeps its slot until it is back, so that no other session
    gets what follows; once the client has gone, nothing does."""

    account: Account
    cancelled = 0  # the seq of the CANCEL that came meanwhile

    def __init__(self, connection: Connection, seq: int) -> None:
        self.account = connection.account
        self.connection = connection
        self.seq = seq

    def finish(self, server: Server) -> None:
        server.job_is_back(self.connection)
        answered = False
        try:
            if not self.failure and self.connection.state != ENDED:
                server.in_time(self.connection, self.answer, server)
                answered = True
        except Exception:
            log.exception("event=error %s", self.connection)
        if self.cancelled and self.connection.state != ENDED:
            server.lender.advance(self.connection.session, self.cancelled)
        if left := self.give_away():
            server.workers.submit(Discard(left, self.account))
        # one that got no answer would wait for ever
        if not answered or self.connection.state == ENDED:
            server.end(self.connection)

    @abstractmethod
    def answer(self, server: Server) -> None:
        """What follows, and the reply.  The client is there."""

    @abstractmethod
    def give_away(self) -> list[int]:
        """The descriptors that it still has, which are the caller's from now on."""


class Put(Request):
    """Look at a descriptor that a client has put, then enter it."""

    def __init__(self, connection: Connection, seq: int, name: str, flags: int, sysfd: int) -> None:
        super().__init__(connection, seq)
        self.name = name
        self.flags = flags
        self.sysfds = [sysfd]  # until it is the FD's
        self.fd: FD | None = None  # until it is the entry's
        self.kind = descriptors.Kind.OTHER
        self.where = ""
        self.error: FDBrokerError | None = None

    def run(self) -> None:
        (sysfd,) = self.sysfds
        try:
            self.kind, self.where = descriptors.inspect(sysfd)
            self.fd = FD(sysfd)
            self.sysfds = []
        except FDBrokerError as error:
            self.error = error
        except OSError as error:
            self.error = UnsupportedKind("unknown", f"it cannot be looked at ({error.strerror})")

    def give_away(self) -> list[int]:
        sysfds, self.sysfds = self.sysfds, []
        if self.fd is not None:
            sysfds.append(self.fd.detach())
            self.fd = None
        return sysfds

    def answer(self, server: Server) -> None:
        try:
            entry = self._enter(server)
        except FDBrokerError as error:
            server.lender.advance(self.connection.session, self.seq)
            server.reply(self.connection, encode_error(self.seq, error))
            return
        server.lender.quotas.add(self.account, "closes", -1)  # it is an entry now
        server.keep(entry, self.where)
        server.reply(self.connection, encode([0, self.seq, entry.generation, entry.ticket]))

    def _enter(self, server: Server) -> Entry:
        if self.error is not None:
            raise self.error
        if server.draining:
            raise BrokerClosing()
        if self.cancelled:
            raise EntryRetired(self.name)
        assert self.fd is not None
        fd, self.fd = self.fd, None
        try:
            return self._put(server, fd)
        except FDBrokerError:
            self.fd = fd  # it was not taken
            raise

    def _put(self, server: Server, fd: FD) -> Entry:
        return server.lender.put(
            self.connection.session,
            self.seq,
            self.name,
            os.urandom(TICKET_BYTES) if self.flags & NAMELESS else b"",
            fd,
            self.kind,
            server.now,
            replace=bool(self.flags & REPLACE),
            ephemeral=bool(self.flags & EPHEMERAL),
        )


class Receive(Job):
    """Receive one message of a session, where there may be no room for all that it brings.

    Of its descriptors `most`, which are on the account's closes, get numbers.  The others the
    kernel closes meanwhile; as one uid has one such job at a time, the others can be looked at.
    """

    account: Account
    lane = RECEIVING
    awaited = False

    def __init__(self, connection: Connection) -> None:
        self.account = connection.account
        self.connection = connection
        self.most = 0
        self.begun = self.done = False
        self.data = b""
        self.inbox: Inbox | None = None
        self.error: OSError | FDBrokerError | None = None

    def run(self) -> None:
        buffer = bytearray(MESSAGE_BYTES + 1)
        room = unix.room_for(self.most)
        try:
            size, self.inbox = unix.receive_into(self.connection.sock, buffer, room)
        except OSError as error:
            self.error = error.with_traceback(None)  # which has this frame, and the buffer
        else:
            self.data = bytes(buffer[:size])

    def finish(self, server: Server) -> None:
        came = len(self.inbox.fds) if self.inbox is not None else 0
        server.release(self.account, "closes", self.most - came)
        server.received(self)

    def take(self, buffer: bytearray) -> tuple[int, Inbox | None]:
        """As `unix.receive_into`; also `QuotaExceeded`: it was not even begun."""
        if self.error is not None:
            raise self.error
        buffer[: len(self.data)] = self.data
        inbox, self.inbox = self.inbox, None
        return len(self.data), inbox


class Discard(Job):
    """Close what was not kept, or was opened for one message only.  It is on the account's
    closes."""

    lane = CLOSING
    awaited = False

    def __init__(self, fds: list[int], account: Account) -> None:
        self.account = account
        self.fds = fds

    def run(self) -> None:
        close_each(self.fds)

    def finish(self, server: Server) -> None:
        server.release(self.account, "closes", len(self.fds))


class HangUp(Job):
    """Take what was never received out of the socket of a session that was shut down, and close it:
    a close of the socket would do the same, and might wait.

    Of each message `most` descriptors, which are on the account's closes, are kept from lingering.
    """

    account: Account
    lane = CLOSING
    awaited = False

    def __init__(self, connection: Connection, most: int) -> None:
        self.account = connection.account
        self.most = most
        self._connection = connection

    def run(self) -> None:
        begun = thread_time()
        try:
            for fds in unix.never_read(self._connection.sock, self.most):
                close_each(fds)
                if not self._connection.rights.unlimited:
                    sleep(GENTLY * (thread_time() - begun))
                begun = thread_time()
        finally:  # or nobody would ask it again, once something is in flight to it
            self._connection.brings_descriptors = False

    def finish(self, server: Server) -> None:
        server.release(self.account, "closes", self.most)
        server.part(self._connection)


def close_each(fds: list[int]) -> None:
    """Close all of them.  Nobody wants them, so nobody is told of an error: it is gone (close(2)).

    They may have come in a mass, so as to take our time: then only the first ones are kept from
    lingering, and numbers that follow each other are closed in one call.
    """
    for fd in fds[:FEW]:
        if descriptors.is_socket(fd):
            descriptors.switch_linger_off(fd)
    any(closing(tuple(fds)))


class Close(Job):
    """Give back an entry's last reference: the final close."""

    lane = CLOSING

    def __init__(self, entry: Entry) -> None:
        self.account = entry.account
        self.entry = entry
        self.error: OSError | None = None

    def run(self) -> None:
        descriptors.switch_linger_off(self.entry.sysfd)
        self.entry.fd.decref()
        try:
            self.entry.fd.wait_closed()
        except OSError as error:
            self.error = error

    def finish(self, server: Server) -> None:
        if self.failure:
            self.error = OSError(self.failure)
        if self.error is not None:
            log.error("event=close-failed entry=%s error=%r", self.entry.name, str(self.error))
        server.custody.drop_entry(self.entry.slot)
        server.lender.quotas.add(self.account, "closing", -1)
        server.lender.closed(self.entry, self.error)
        server.release(self.account, "closes", 1)


class Reopen(Request):
    """Open the files of a read-only loan anew, for one message of it.

    The loan may end meanwhile, with its client: so it is the job for which the entries stay open.
    """

    def __init__(
        self, connection: Connection, seq: int, offset: int, entries: Sequence[Entry]
    ) -> None:
        super().__init__(connection, seq)
        self.offset = offset
        self.entries = entries
        self.sysfds = [entry.sysfd for entry in entries]
        self.fresh: list[int] = []
        self.error: FDBrokerError | None = None

    def run(self) -> None:
        try:
            for sysfd in self.sysfds:
                self.fresh.append(descriptors.reopen_read_only(sysfd))
        except FDBrokerError as error:
            self.error = error
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.error = too_many_files("broker")
            else:
                reason = f"it cannot be opened anew for reading ({error.strerror})"
                self.error = UnsupportedKind("file", reason)

    def finish(self, server: Server) -> None:
        unopened = len(self.sysfds) - len(self.fresh)  # charged were all of them
        server.lender.let_go(self.entries)
        super().finish(server)
        server.release(self.account, "closes", unopened)

    def give_away(self) -> list[int]:
        fresh, self.fresh = self.fresh, []
        return fresh

    def answer(self, server: Server) -> None:
        if self.error is not None:
            server.take_back(self.connection, self.seq, self.offset, self.error)
        else:
            server.hand_over(self.connection, self.seq, self.offset, self.give_away())
