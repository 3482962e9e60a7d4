"""The client's end of a connection: one request at a time, and the reply to it.

A `ClientConnection` owns a `Link`, which carries the messages, and adds the protocol, the count of
requests (seq) and the fork rule.  Sessions (session.py) are made of it.

An error in the middle of a request ends the connection, since it would be unknown from then on
which reply belongs to which request; the broker takes back what it had lent on it.  A refusal by
the broker is not such an error.  Received descriptors belong to `received` until they are handed
on.
"""

from __future__ import annotations

import errno
from time import monotonic

from fdbroker._lazy import suppress
from fdbroker.errors import BrokerGone, FDBrokerError, ProtocolError, VersionMismatch
from fdbroker.ipc.client import fork
from fdbroker.ipc.protocol import messages
from fdbroker.ipc.protocol.codec import HEAD, Template, check_reply, decode_reply, template
from fdbroker.ipc.protocol.messages import CANCEL, HELLO, MESSAGE_BYTES, REPLY_BYTES
from fdbroker.ipc.transport import SEND, SEND_NOW, Link

TYPE_CHECKING = False  # importing `typing` would add to the start of `fdbroker exec`
if TYPE_CHECKING:
    from typing import Any, ClassVar, Self

GRACE_SECONDS = 2.0  # after the deadline, which the broker keeps, the client gives up by itself
BACKSTOP_SECONDS = 10**6  # a longer timeout is only the broker's (poll(2) takes 24 days)
HELLO_TRIES = 10  # a broker that is being replaced ends sessions before it has answered their hello
CANCEL_HEAD, _ = template(CANCEL)

kept_until_exit: set[ClientConnection] = set()
"""Connections that last as long as the process, whatever becomes of their client: put sessions
that own entries, and sessions of detached descriptors."""


class StaleSession(BrokerGone):
    """The broker had ended this session before the request was sent: another session will do."""

    code = 0


class ClientConnection:
    """One connection to the broker at `address`.  Not for two threads at a time.

    closed: there is no socket any more, or not yet.
    shared_by_fork: another process has a copy, so this one sends no more messages.
    left_to_parent: this process is a forked child, and the connection stays with its parent.
    send, recvmsg, messages: of the link and of `received`, for the fast path of a borrow.
    """

    __slots__ = (
        *("__weakref__", "address", "closed", "left_to_parent", "link", "messages", "received"),
        *("recvmsg", "send", "seq", "shared_by_fork"),
    )
    sends_fds: ClassVar[bool]

    def __init__(self, address: str) -> None:
        self.closed = True
        self.shared_by_fork = False
        self.left_to_parent = False
        self.address = address
        self.seq = -1
        # A child that is forked after this block finds the connection among the sessions.
        with fork.deferred_cleanup, fork.FORK_LOCK:
            self.link = Link()
            self.received = self.link.received
            self.closed = False
            fork.sessions.add(self)
        self.messages = self.received.messages
        self.send = self.link.send
        self.recvmsg = self.link.recvmsg
        try:
            self.link.connect(address)
        except BaseException:
            self.end()
            raise

    @classmethod
    def open(cls, address: str, *arguments: Any) -> Self:
        """Connect and say hello.

        Raises `NoBroker`, `NotPermitted`, `VersionMismatch`, `BrokerFull`, `QuotaExceeded`.
        """
        for _ in range(HELLO_TRIES):
            connection = cls(address, *arguments)
            try:
                connection._say_hello()
            except BaseException as error:
                again = isinstance(error, ConnectionResetError) or connection.is_stale(error)
                connection.end()
                if not again:
                    raise
            else:
                return connection
        raise BrokerGone(address)

    def _say_hello(self) -> None:
        """Send HELLO and check the answer, which may be there already if we are turned away."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.send(self.next(template(HELLO, messages.VERSION, self.sends_fds)), SEND)
        try:
            code, reply, _, _ = self.reply(0)
        except BrokerGone:
            raise
        except ConnectionResetError:
            # Our hello came too late.  The kernel says so once, and then gives the answer.
            code, reply, _, _ = self.reply(0)
        self.received.close()  # no descriptors were promised
        check_reply(HELLO, code, reply)
        if reply != [messages.VERSION]:
            raise VersionMismatch(messages.VERSION, *reply)

    def request(
        self, verb: int, *fields: Any, pages: bool = False, timeout: float | None = None
    ) -> list[Any]:
        """Send one request and wait for its reply; returns the fields, or raises the refusal.

        timeout: seconds, kept by the broker; if its answer is overdue, the request is cancelled
        from here.  pages: whether the reply may be as long as a page.  Any exception but a refusal
        has ended the session.
        """
        received_before = len(self.received.messages)
        try:
            try:
                self.send(self.next(template(verb, *fields)), SEND)
            except ConnectionResetError:
                # The broker died with something of ours unread, so this request was not sent.
                raise BrokenPipeError from None
            code, reply, _, _ = self.reply(self.seq, timeout, pages=pages)
            self.received.close(received_before)  # no descriptors were promised
            check_reply(verb, code, reply)
        except BaseException as error:
            self.end_unless_refused(error)
            raise
        return reply

    def next(self, request: Template) -> bytes:
        """Return the bytes of `request` with the next seq, which they take."""
        self.seq += 1
        return HEAD.pack(request.head, self.seq) + request.tail

    def end_unless_refused(self, error: BaseException) -> None:
        """End the session, unless `error` is a refusal of the broker.

        Raises `StaleSession` or `BrokerGone` where that says more than `error`, which the caller
        is about to raise.
        """
        refused = isinstance(error, FDBrokerError) and not isinstance(
            error, (ProtocolError, BrokerGone)
        )
        if refused and not self.closed:
            return
        stale = self.is_stale(error)
        self.end()
        if stale:
            raise StaleSession(self.address) from None
        if isinstance(error, ConnectionResetError) and not isinstance(error, BrokerGone):
            raise BrokerGone(self.address) from None

    def is_stale(self, error: BaseException) -> bool:
        """Return whether `error` means that the broker never saw the request.

        That is so too if the connection stayed with the parent of this process.
        """
        if isinstance(error, BrokenPipeError):
            return True
        if isinstance(error, OSError) and error.errno == errno.EBADF:
            return self.link.fileno() < 0  # the connection was closed here
        return self.left_to_parent and isinstance(error, Exception)

    # --- receiving ---

    def reply(
        self, seq: int, timeout: float | None = None, *, pages: bool = False, waited: bool = False
    ) -> tuple[int, list[Any], tuple[int, ...], bool]:
        """Wait for the reply to request `seq`; `waited`: a message was received already.

        Returns its code and fields, the descriptors that came with it (`received` owns them, as
        its last message), and whether any were lost.  A reply to another seq is passed over, and
        its descriptors are closed.
        """
        while True:
            if not waited:
                self.wait(seq, timeout, pages=pages)
            waited = False
            data, fds, lost = self.received.parse_last()
            if not data:
                raise BrokerGone(self.address)
            code, of, fields = decode_reply(data)
            if of == seq:
                return code, fields, fds, lost
            self.received.close(len(self.received.messages) - 1)

    def wait(self, seq: int, timeout: float | None, *, pages: bool = False) -> None:
        """Receive one message, which may be the reply to request `seq`.

        If it does not come within `timeout` seconds and a grace, the request is cancelled.  Raises
        `BrokerGone` if the broker does not answer that either.
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
        """Ask for the reply to the last request now; if that cannot be sent, it is not."""
        self.seq += 1
        with suppress(OSError):
            self.send(HEAD.pack(CANCEL_HEAD, self.seq), SEND_NOW)

    def receive(self, deadline: float | None = None, *, pages: bool = False) -> bool:
        """Receive one message; returns False if none came before the deadline (`monotonic`).

        Where another thread may fork, a message is taken under the fork lock.  Nothing may wait
        there, so it is waited for first.
        """
        size = MESSAGE_BYTES if pages else REPLY_BYTES
        if deadline is None and not fork.other_threads():
            self.link.receive(size)
            return True
        while self.link.wait(deadline):
            with fork.deferred_cleanup, fork.FORK_LOCK:
                if self.link.receive_now(size):
                    return True
        return False

    # --- the end ---

    def end(self) -> None:
        """Close everything; the broker sees the end of the session once no copy is left."""
        with fork.deferred_cleanup, fork.FORK_LOCK:
            self.received.close()
            if self.shared_by_fork:
                self.link.close()
            else:
                self.link.end()
            self.closed = True  # last, so that the finalizer finishes what an interrupt leaves

    def __del__(self) -> None:
        if not getattr(self, "closed", True):  # an interrupted constructor may not have set it
            fork.run_or_defer(self.end)

    # --- the fork rule; the fork lock is held ---

    def mark_at_fork(self, thread: int, in_child: bool) -> None:
        """Note in the child that the connection stays with the parent."""
        if in_child:
            self.shared_by_fork = self.left_to_parent = True

    def close_in_child(self) -> None:
        """Close what stayed with the parent."""
        if self.left_to_parent and not self.closed:
            self.end()
