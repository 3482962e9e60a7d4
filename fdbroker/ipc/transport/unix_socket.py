"""What both ends of a session over an AF_UNIX socket have in common: numbers, flags, rights.

A session is a socket of SOCK_SEQPACKET.  One message is one packet together with its descriptors
(SCM_RIGHTS, unix(7)), so it arrives whole or not at all.  These rules hold at either end:

* Received descriptors are close-on-exec from the first instant (MSG_CMSG_CLOEXEC), and they have
  an owner before an interrupt can come (received.py).
* A descriptor that does not fit, or for which no number is free, is lost, and the kernel reports
  MSG_CTRUNC.  The ones that did fit are installed all the same, so they need their owner too.
* An empty packet looks like the end of the session.  It is never sent, and it is treated as the
  end.
* A session ends with `shutdown`, since a copy of the socket in another process would hide a close.

The sockets are those of `_socket`, the C half of `socket`: importing the other half would add to
the start of ``fdbroker exec``.  For the same reason the flags are plain integers and not the enums
of `socket`, which are slow at every "&" and "|".
"""

from __future__ import annotations

import _socket
import struct
from collections.abc import Sequence

from fdbroker._lazy import suppress

SCM_MAX_FD = 253  # descriptors that the kernel takes in one message (include/net/scm.h)
INT = struct.Struct("i")
ANCILLARY_BYTES = _socket.CMSG_SPACE(SCM_MAX_FD * INT.size)
SOL_SOCKET, SCM_RIGHTS = int(_socket.SOL_SOCKET), int(_socket.SCM_RIGHTS)

RECEIVE = int(_socket.MSG_CMSG_CLOEXEC)
RECEIVE_NOW = int(_socket.MSG_CMSG_CLOEXEC | _socket.MSG_DONTWAIT)
SEND = int(_socket.MSG_NOSIGNAL)
SEND_NOW = int(_socket.MSG_NOSIGNAL | _socket.MSG_DONTWAIT)
LOST = int(_socket.MSG_CTRUNC)

Ancillary = tuple[tuple[int, int, bytes]]


def rights(fds: Sequence[int]) -> Ancillary:
    """Return the ancillary data that sends copies of `fds`, which stay the caller's."""
    return ((SOL_SOCKET, SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds)),)


def shut_down(sock: _socket.socket) -> None:
    """End the session for good, even if another process holds a copy of the socket."""
    with suppress(OSError):
        sock.shutdown(_socket.SHUT_RDWR)
