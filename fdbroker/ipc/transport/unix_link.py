"""Link: the client's end of a session over an AF_UNIX socket.

A link carries whole messages and the descriptors that come with them, and knows neither the
protocol nor the rule for forks: sizes are arguments, and whoever needs a lock takes it around a
call.  That is why waiting (`wait`) and taking a message (`receive_now`) are two calls: the first
may last for ever, the second never waits.

Whatever is received belongs to `received` before an interrupt can come.  `send` and `recvmsg` are
the socket's own methods, without a function of ours around them, since the fast path of a borrow
calls them (client/borrow.py).
"""

from __future__ import annotations

import _socket
import errno
import os
import select
from collections.abc import Callable
from itertools import starmap
from time import monotonic

from fdbroker.errors import NoBroker, NotPermitted
from fdbroker.ipc.transport.address import check_path
from fdbroker.ipc.transport.received import ReceivedFDs
from fdbroker.ipc.transport.rlimit import too_many_files
from fdbroker.ipc.transport.unix_socket import (
    ANCILLARY_BYTES,
    RECEIVE,
    RECEIVE_NOW,
    SEND,
    rights,
    shut_down,
)

TYPE_CHECKING = False  # importing `typing` would add to the start of `fdbroker exec`
if TYPE_CHECKING:
    from fdbroker.ipc.transport.received import Message

__all__ = ["Link"]


class Link:
    """A socket that is not connected yet; `TooManyFiles` if there can be none.

    `send(data, flags)` sends one message without descriptors, with `SEND` or `SEND_NOW`.
    Not for two threads at a time.
    """

    __slots__ = ("_poll", "_sock", "received", "recvmsg", "send")

    def __init__(self) -> None:
        self._poll: select.poll | None = None
        self.received = ReceivedFDs()
        try:
            self._sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        except OSError as error:
            raise _translated(error, "") from None
        self.send: Callable[[bytes, int], int] = self._sock.send
        self.recvmsg: Callable[[int, int, int], Message] = self._sock.recvmsg

    def connect(self, address: str) -> None:
        """Connect to the broker whose socket has the path `address`.

        `NoBroker`, `NotPermitted`, `BadAddress`, `TooManyFiles`.  If this raises, the link is of
        no further use, and the caller closes it.
        """
        check_path(address)
        try:
            self._sock.connect(address)
        except OSError as error:
            raise _translated(error, address) from None

    def put(self, data: bytes, fd: int, sent: list[int]) -> None:
        """Send one message with a copy of `fd`, which stays the caller's, and append to `sent`.

        The send and the append happen in one call into C.  So an interrupt finds the message
        either sent and noted, or not sent.
        """
        sent.extend(map(self._sock.sendmsg, ((data,),), (rights((fd,)),), (SEND,)))

    def receive(self, size: int) -> None:
        """Wait for one message of at most `size` bytes; `received` has it then.

        An empty message is the end of the session.
        """
        self.received.messages.extend(starmap(self.recvmsg, ((size, ANCILLARY_BYTES, RECEIVE),)))

    def receive_now(self, size: int) -> bool:
        """Take a message if there is one, as `receive` does; returns whether there was one."""
        arguments = (size, ANCILLARY_BYTES, RECEIVE_NOW)
        try:
            self.received.messages.extend(starmap(self.recvmsg, (arguments,)))
        except BlockingIOError:
            return False
        return True

    def wait(self, deadline: float | None = None) -> bool:
        """Wait until there is a message or the end of the session; returns whether there is.

        deadline: in seconds of `time.monotonic`; None waits for ever.
        """
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self._sock, select.POLLIN)
        left = None if deadline is None else max(0.0, deadline - monotonic()) * 1000
        return bool(self._poll.poll(left))

    def fileno(self) -> int:
        """Return the number of the socket, or -1 once it is closed."""
        return self._sock.fileno()

    def end(self) -> None:
        """End the session for good, even if another process holds a copy, and close this copy."""
        shut_down(self._sock)
        self._sock.close()

    def close(self) -> None:
        """Close this process's copy; the session ends when no other process has one."""
        self._sock.close()


def _translated(error: OSError, address: str) -> OSError:
    """Return the error of fdbroker that stands for `error`, or `error` itself."""
    if isinstance(error, FileNotFoundError | ConnectionRefusedError | NotADirectoryError):
        return NoBroker(address)
    if isinstance(error, PermissionError):  # the mode of the socket, or of its folder
        return NotPermitted(os.geteuid(), "connect")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return too_many_files("client")
    return error
