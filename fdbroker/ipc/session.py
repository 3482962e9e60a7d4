"""The client's end of a session: one connection, one request at a time, at most one loan.

A session is its loan's lifeline, so it also owns what the loan brought and what was made of it.
What befalls it:

    idle -> busy      a thread took it from the client's pool for a request
    busy -> idle      the answer is there, or the loan was returned
    busy -> lent      the answer is a loan; `thread` is the one that borrowed
    lent -> split     the process forked, or gave a copy away: no more messages (see forks.py)
    any  -> over      closed; whatever goes wrong in the middle of a request ends here

The end of a session returns its loan, so an interrupted request needs no other way back.
"""

from __future__ import annotations

import contextlib
import os
import select
from resource import RLIMIT_NOFILE, getrlimit  # none is left to import it when it is needed
from socket import socket
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary, ref

from fdbroker.errors import (
    BrokerGone,
    FDBrokerError,
    ProtocolError,
    TooManyFiles,
    VersionMismatch,
)
from fdbroker.ipc import forks, unix, wrappers
from fdbroker.ipc.messages import (
    BORROW,
    CANCEL,
    HELLO,
    MORE,
    REPLY_BYTES,
    RETURN,
    VERSION,
    check_reply,
    decode_reply,
    encode,
)
from fdbroker.ipc.wrappers import Wrapper

if TYPE_CHECKING:
    from fdbroker.ipc.pool import Pool

GRACE_SECONDS = 2.0  # after the deadline, which the broker keeps, the client gives up by itself
BACKSTOP_SECONDS = 10**6  # a longer timeout is only the broker's (poll(2) takes 24 days)
HELLO_TRIES = 10  # an end before the answer to hello: the broker is being replaced, connect again


class StaleSession(BrokerGone):
    """The broker had ended this session before the request was sent: another one will do."""

    code = 0


class Lifeline:
    """Held by a loan and by each of its mappings: the last of them to go returns the loan.

    It counts as Python does, since a mapping ends where its array does, and an interrupt must not
    lose the count.
    """

    __slots__ = ()

    def __init__(self, session: Session) -> None:
        _sessions_of[id(self)] = session

    def __del__(self) -> None:
        session = _sessions_of.pop(id(self), None)
        if session is not None and session.returning:
            forks.in_finalizer(session.let_go)


# not weak references of the lifelines' own: gc clears those before it calls `__del__`
_sessions_of: WeakValueDictionary[int, Session] = WeakValueDictionary()


class Session:
    """One connection to the broker at `address`.  Not for two threads at a time."""

    __slots__ = (
        "__weakref__",
        "_into",
        "_seq",
        "address",
        "earlier",
        "exclusive",
        "forked",
        "inbox",
        "kept",
        "lifeline",
        "mappings",
        "over",
        "pool",
        "returning",
        "sock",
        "split",
        "thread",
        "wrappers",
    )

    def __init__(self, address: str, pool: Pool | None = None) -> None:
        self.over = True  # until there is a socket
        self.address = address
        self.pool = pool  # where it goes when it is idle again
        self.thread = 0  # whose loan it carries, 0: none
        self.exclusive = False
        self.split = False  # no more messages
        self.forked = False  # the loan stayed with the parent
        self.kept = False  # a number was given away: open until the process ends
        self.inbox = unix.Inbox()  # the loan's descriptors, or ...
        self.earlier: list[unix.Inbox] = []  # ... the last of them, after these
        self.wrappers: list[ref[Wrapper]] = []  # sockets and files: they end with the loan
        self.mappings: list[ref[Wrapper]] = []  # the loan ends with them
        self.lifeline: Lifeline | None = None  # the loan's own, once there is a mapping
        self.returning = False  # the loan is closed, and the last mapping returns it
        self._seq = -1
        self._into: unix.Buffers = ((bytearray(REPLY_BYTES),),)
        with forks.GATE:  # a child that is forked from here on knows of it
            self.sock = unix.client_socket()
            self.over = False
            forks.sessions.add(self)
        forks.catch_up()
        try:
            unix.connect(address, self.sock)
        except BaseException:
            self.end()
            raise

    @classmethod
    def open(cls, address: str, pool: Pool | None = None) -> Session:
        """Connect and say hello; `NoBroker`, `NotPermitted`, `VersionMismatch`, `BrokerFull`."""
        for _ in range(HELLO_TRIES):
            session = cls(address, pool)
            try:
                (version,) = session.request(HELLO, VERSION, True)
                if version != VERSION:
                    raise VersionMismatch(VERSION, version)
            except BrokerGone:
                continue
            except BaseException:
                session.end()
                raise
            return session
        raise BrokerGone(address)

    # --- requests ---

    def request(
        self,
        verb: int,
        *fields: Any,
        fds: tuple[int, ...] = (),
        size: int = REPLY_BYTES,
        timeout: float | None = None,
    ) -> list[Any]:
        """Send one request and wait for its reply: the fields, or its refusal raised.

        `timeout` (seconds) is the broker's to keep; if its answer is overdue, the request is
        cancelled from here.  Any exception but a refusal has ended the session.
        """
        self._seq = seq = self._seq + 1
        if self.inbox.raw:  # it holds a loan's first descriptors, and more of them are to come
            self.earlier.append(self.inbox)
            self.inbox = unix.Inbox()
        try:
            message = encode([verb, seq, *fields])
            if fds:
                unix.send_with(self.sock, message, unix.rights(fds))
            else:
                self.sock.send(message, unix.SEND)
            into = self._into if size <= REPLY_BYTES else ((bytearray(size),),)
            code, reply = self._reply(seq, into, timeout)
            if verb not in (BORROW, MORE) or code:
                self.inbox.close()  # nothing was promised
            elif len(reply) != 3 or len(self.inbox.fds) != reply[1] or self.inbox.truncated:
                raise self._broken_promise(reply)
        except BrokenPipeError:  # of sending: the broker never saw this request
            self.end()
            raise StaleSession(self.address) from None
        except ConnectionResetError as error:
            self.end()
            raise error if isinstance(error, BrokerGone) else BrokerGone(self.address) from None
        except BaseException:
            self.end()
            raise
        try:
            check_reply(verb, code, reply)
        except ProtocolError:
            self.end()
            raise
        return reply

    def _reply(self, seq: int, into: unix.Buffers, timeout: float | None) -> tuple[int, list[Any]]:
        """(code, fields) of the reply to `seq`; its descriptors are in the inbox.

        One to another seq is passed over, and what it brought is closed.
        """
        inbox = self.inbox
        if timeout is not None and timeout > BACKSTOP_SECONDS:
            timeout = None
        deadline = None if timeout is None else monotonic() + timeout + GRACE_SECONDS
        cancelled = False
        while True:
            if deadline is None and not forks.threaded():
                unix.receive(self.sock, into, inbox)
            while not inbox.raw and not self._receive(into, deadline):
                if cancelled:  # not even that was answered
                    raise BrokerGone(self.address)
                self._seq += 1
                with contextlib.suppress(OSError):
                    self.sock.send(encode([CANCEL, self._seq]), unix.SEND_NOW)
                deadline, cancelled = monotonic() + GRACE_SECONDS, True
            length = inbox.sort()
            if length == 0:
                raise BrokerGone(self.address)
            code, of, reply = decode_reply(bytes(into[0][0][:length]))
            if of == seq:
                return code, reply
            inbox.close()

    def _receive(self, into: unix.Buffers, deadline: float | None) -> bool:
        """Take one message where another thread may fork; False if there is none in time."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        while poll.poll(None if deadline is None else max(0.0, deadline - monotonic()) * 1000):
            try:
                with forks.GATE:
                    unix.receive(self.sock, into, self.inbox, unix.RECEIVE_NOW)
                return True
            except BlockingIOError:
                continue
            finally:
                forks.catch_up()
        return False

    def _broken_promise(self, reply: list[Any]) -> FDBrokerError:
        """What to raise when not all descriptors came that the payload speaks of."""
        promised = reply[1] if len(reply) == 3 else None
        if type(promised) is not int or len(self.inbox.fds) > promised:
            return ProtocolError("broker", "more descriptors came than it promised")
        return too_many_files("client")

    # --- its loan ---

    def lend(self, exclusive: bool) -> None:
        """Note that it carries a loan of this thread now."""
        self.exclusive = exclusive
        self.thread = get_ident()

    @property
    def fds(self) -> list[int]:
        """The numbers of the loan, in the order of its names."""
        if not self.earlier:
            return self.inbox.fds
        return [number for inbox in (*self.earlier, self.inbox) for number in inbox.fds]

    def share_lifeline(self) -> Lifeline:
        """What each mapping is to hold.  Called under the gate."""
        if self.lifeline is None:
            self.lifeline = Lifeline(self)
        return self.lifeline

    def close_loan(self) -> None:
        """Close the wrappers, then the descriptors, then return the loan, or leave that to the
        last mapping.  An error of a wrapper's last flush is raised after that."""
        if self.over or self.forked:
            return
        error = None
        try:
            error = self._close_wrappers() if self.wrappers else None
            if forks.threaded():
                with forks.GATE:
                    self.close_descriptors()
                forks.catch_up()
            else:
                self.close_descriptors()
            if self.lifeline is None:
                self.let_go()
            else:
                self.returning = True
                self.lifeline = None
        except BaseException:
            self.end()
            raise
        if error is not None:
            raise error

    def _close_wrappers(self) -> OSError | None:
        error = wrappers.flush(self._wrappers())
        with forks.GATE:
            failure = wrappers.close(self._wrappers(), self.fds)
            self.wrappers.clear()
        forks.catch_up()
        return error or failure

    def _wrappers(self) -> list[Wrapper]:
        return [wrapper for made in self.wrappers if (wrapper := made()) is not None]

    def let_go(self) -> None:
        """Everything is closed: RETURN, and go back to the pool."""
        self.returning = False
        self.mappings.clear()
        self.thread = 0
        if self.split or self.pool is None:
            self.end()
            return
        self._seq += 1
        try:
            self.sock.send(encode([RETURN, self._seq]), unix.SEND_NOW)
        except OSError:  # a stopped broker's full queue, or no broker: the end is a return too
            self.end()
        else:
            self.pool.give(self)

    def close_descriptors(self) -> None:
        """Close all numbers of the loan."""
        while self.earlier:
            self.earlier[-1].close()
            self.earlier.pop()
        self.inbox.close()

    def give_away_descriptors(self) -> None:
        """The numbers of the loan are somebody else's from now on."""
        for inbox in (*self.earlier, self.inbox):
            inbox.give_away()

    def end(self) -> None:
        """Close everything; the broker sees the end of the session once no copy is left."""
        with forks.GATE:
            self.over = True
            self.thread = 0
            self.close_descriptors()
            if self.split:
                self.sock.close()
            else:
                unix.end(self.sock)
        forks.catch_up()

    def __del__(self) -> None:
        if not getattr(self, "over", True):  # an interrupted constructor may not have set it
            forks.in_finalizer(self.end)

    # --- the fork rule; the gate is held ---

    def at_fork_in_parent(self, thread: int) -> None:
        mapped = self.returning or self.lifeline is not None
        if self.thread and (mapped or (self.thread == thread and not self.exclusive)):
            self.split = True

    def at_fork_in_child(self, thread: int) -> None:
        self.split = True
        if self.kept or (self.thread == thread and not self.exclusive):
            return
        self.forked = True
        made = self._wrappers()
        wrappers.close((one for one in made if isinstance(one, socket)), self.fds)
        self.close_descriptors()  # so there is a number free for what comes now
        wrappers.drop_in_child(one for one in made if not isinstance(one, socket))
        mapped = False
        for reference in self.mappings:
            mapping = reference()
            try:
                if mapping is not None:
                    mapping.close()
            except BufferError:
                mapped = True  # somebody still looks at it: this copy goes with the mapping
        self.returning = mapped
        self.lifeline = None
        if not mapped:
            self.end()


def too_many_files(side: str) -> TooManyFiles:
    """The error that names the limit of this process, and its use."""
    return TooManyFiles(side, getrlimit(RLIMIT_NOFILE)[0], descriptors_in_use())


def descriptors_in_use() -> int:
    """How many descriptors this process has."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # the listing's own
    except OSError:  # no number left to open the folder with
        return getrlimit(RLIMIT_NOFILE)[0]
