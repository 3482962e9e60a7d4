"""The client's end of a connection: one request at a time, and the reply to it.

Whatever goes wrong in the middle of a request ends the connection, since nobody could tell any
more which reply belongs to which request; the broker takes back what it had lent on it.  A
refusal is no such thing.  What was received belongs to `owned` until it is handed on.
"""

from __future__ import annotations

import errno
import select
from collections.abc import Callable
from itertools import starmap
from time import monotonic

from fdbroker._lazy import suppress
from fdbroker.errors import BrokerGone, FDBrokerError, ProtocolError, VersionMismatch
from fdbroker.ipc.client import fork
from fdbroker.ipc.protocol import messages
from fdbroker.ipc.protocol.messages import (
    CANCEL,
    HEAD,
    HELLO,
    Template,
    check_reply,
    decode_reply,
    template,
)
from fdbroker.ipc.transport import received as owned
from fdbroker.ipc.transport import unix

TYPE_CHECKING = False  # as a type checker knows it: `typing` costs too much at a start
if TYPE_CHECKING:
    from typing import Any, ClassVar, Self

GRACE_SECONDS = 2.0  # after the deadline, which the broker keeps, the client gives up by itself
BACKSTOP_SECONDS = 10**6  # a longer timeout is only the broker's (poll(2) takes 24 days)
HELLO_TRIES = 10  # an end before the answer to hello: the broker is being replaced, connect again
CANCEL_HEAD, _ = template(CANCEL)

until_exit: set[Wire] = set()  # putters that own entries, sessions of detached descriptors


class StaleSession(BrokerGone):
    """The broker had ended this session before the request was sent: another one will do."""

    code = 0


class Wire:
    """One connection to the broker at `address`.  Not for two threads at a time."""

    __slots__ = (
        *("__weakref__", "_poll", "address", "forked", "over", "owned", "recvmsg"),
        *("send", "seq", "sock", "split"),
    )
    puts: ClassVar[bool]  # whether it will send descriptors

    def __init__(self, address: str) -> None:
        self.over = True  # until there is a socket
        self.split = False  # another process has a copy: no more messages
        self.forked = False  # it stayed with the parent
        self.address = address
        self.owned: owned.Owned = owned.Numbers()
        self.seq = -1
        self._poll: select.poll | None = None
        with fork.catching_up, fork.GATE:  # a child that is forked from here on knows of it
            self.sock = unix.client_socket()
            self.over = False
            fork.sessions.add(self)
        try:
            unix.connect(address, self.sock)
        except BaseException:
            self.end()
            raise
        self.send: Callable[[bytes, int], int] = self.sock.send
        self.recvmsg: Callable[[int, int, int], owned.Message] = self.sock.recvmsg

    @classmethod
    def open(cls, address: str, *data: Any) -> Self:
        """Connect and say hello; `NoBroker`, `NotPermitted`, `VersionMismatch`, `BrokerFull`,
        `QuotaExceeded`."""
        for _ in range(HELLO_TRIES):
            wire = cls(address, *data)
            try:
                wire._say_hello()
            except BaseException as error:
                again = isinstance(error, ConnectionResetError) or wire.is_stale(error)
                wire.end()
                if not again:
                    raise
            else:
                return wire
        raise BrokerGone(address)

    def _say_hello(self) -> None:
        """It may have been turned away already: then the answer is there, to be read."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.send(self.next(template(HELLO, messages.VERSION, self.puts)), unix.SEND)
        try:
            code, reply, _, _ = self.reply(0)
        except BrokerGone:
            raise
        except ConnectionResetError:  # our hello came too late: that is said once, then the answer
            code, reply, _, _ = self.reply(0)
        owned.close(self.owned)  # nothing was promised
        check_reply(HELLO, code, reply)
        if reply != [messages.VERSION]:
            raise VersionMismatch(messages.VERSION, *reply)

    def request(
        self, verb: int, *fields: Any, pages: bool = False, timeout: float | None = None
    ) -> list[Any]:
        """Send one request and wait for its reply: the fields, or its refusal raised.

        `timeout` (seconds) is the broker's to keep; if its answer is overdue, the request is
        cancelled from here.  Any exception but a refusal has ended the session.
        """
        begun = len(self.owned)
        try:
            try:
                self.send(self.next(template(verb, *fields)), unix.SEND)
            except ConnectionResetError:  # it died with something unread: this was not sent
                raise BrokenPipeError from None
            code, reply, _, _ = self.reply(self.seq, timeout, pages=pages)
            owned.close(self.owned, begun)  # nothing was promised
            check_reply(verb, code, reply)
        except BaseException as error:
            self.give_up_after(error)
            raise
        return reply

    def next(self, request: Template) -> bytes:
        """The bytes of this request, which is the next one."""
        self.seq += 1
        return HEAD.pack(request.head, self.seq) + request.tail

    def give_up_after(self, error: BaseException) -> None:
        """End the session, unless the error is a refusal.  Another error than the one that is on
        its way is raised here, if it tells more."""
        refused = isinstance(error, FDBrokerError) and not isinstance(
            error, (ProtocolError, BrokerGone)
        )
        if refused and not self.over:
            return
        stale = self.is_stale(error)
        self.end()
        if stale:
            raise StaleSession(self.address) from None
        if isinstance(error, ConnectionResetError) and not isinstance(error, BrokerGone):
            raise BrokerGone(self.address) from None

    def is_stale(self, error: BaseException) -> bool:
        """Whether the broker never saw the request, or it stayed with this process's parent."""
        if isinstance(error, BrokenPipeError):
            return True
        if isinstance(error, OSError) and error.errno == errno.EBADF:
            return self.sock.fileno() < 0  # it was ended here
        return self.forked and isinstance(error, Exception)

    # --- receiving ---

    def reply(
        self, seq: int, timeout: float | None = None, *, pages: bool = False, waited: bool = False
    ) -> tuple[int, list[Any], tuple[int, ...], bool]:
        """The reply to request `seq`: its code and fields, the descriptors that came with it (in
        `owned`, last), and whether any was lost.  `waited`: a message is there already.

        One to another seq is passed over, and what it brought is closed.
        """
        while True:
            if not waited:
                self.wait(seq, timeout, pages=pages)
            waited = False
            data, numbers, lost = owned.look_at_last(self.owned)
            if not data:
                raise BrokerGone(self.address)
            code, of, fields = decode_reply(data)
            if of == seq:
                return code, fields, numbers, lost
            owned.close(self.owned, len(self.owned) - 1)

    def wait(self, seq: int, timeout: float | None, *, pages: bool = False) -> None:
        """Have `owned` take one message, which may be the reply to request `seq`.

        That is cancelled `timeout` seconds and a grace from now.
        """
        deadline = None
        if timeout is not None and timeout <= BACKSTOP_SECONDS:
            deadline = monotonic() + timeout + GRACE_SECONDS
        while not self.receive(deadline, pages=pages):
            if self.seq > seq:  # not even the cancel was answered
                raise BrokerGone(self.address)
            self.cancel()
            deadline = monotonic() + GRACE_SECONDS

    def cancel(self) -> None:
        """Hasten the reply to the last request; if that cannot be said, it is not."""
        self.seq += 1
        with suppress(OSError):
            self.send(HEAD.pack(CANCEL_HEAD, self.seq), unix.SEND_NOW)

    def receive(self, deadline: float | None = None, *, pages: bool = False) -> bool:
        """Have `owned` take one message; False if there is none before the deadline.

        Where another thread may fork, it is taken under the gate, so it is waited for first.
        """
        if deadline is None and not fork.other_threads():
            self.owned.extend(starmap(self.recvmsg, owned.ONE_PAGE if pages else owned.ONE_MESSAGE))
            return True
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self.sock, select.POLLIN)
        arguments = owned.ONE_PAGE_NOW if pages else owned.ONE_MESSAGE_NOW
        while self._poll.poll(
            None if deadline is None else max(0.0, deadline - monotonic()) * 1000
        ):
            try:
                with fork.catching_up, fork.GATE:
                    self.owned.extend(starmap(self.recvmsg, arguments))
                return True
            except BlockingIOError:
                continue
        return False

    # --- its end ---

    def end(self) -> None:
        """Close everything; the broker sees the end of the session once no copy is left."""
        with fork.catching_up, fork.GATE:
            owned.close(self.owned)
            if self.split:
                self.sock.close()
            else:
                unix.end(self.sock)
            self.over = True  # last: what an interrupt leaves here is the finalizer's

    def __del__(self) -> None:
        if not getattr(self, "over", True):  # an interrupted constructor may not have set it
            fork.in_finalizer(self.end)

    # --- the fork rule; the gate is held ---

    def mark_at_fork(self, thread: int, in_child: bool) -> None:
        """It stays with the parent."""
        if in_child:
            self.split = self.forked = True

    def close_in_child(self) -> None:
        """All of it."""
        if self.forked and not self.over:
            self.end()
