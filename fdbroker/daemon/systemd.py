"""What the broker and the service manager say to each other (systemd, or who does as it does).

It hands over sockets that it has bound: their number and names are in the environment, they are
the descriptors from 3 on (sd_listen_fds(3)).  And it is told of the broker's state by datagrams
(sd_notify(3)).  The environment is cleared of both, for they are for this process alone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import NamedTuple

from fdbroker.errors import BadResource
from fdbroker.ipc.transport.address import default_address

FIRST = 3  # SD_LISTEN_FDS_START
UNNAMED = ("", "unknown")  # sd_listen_fds_with_names(3)
OWN_NAMES = ("fdbroker", "fdbroker.socket")  # of a socket to serve at; no entries
PATIENCE = 1.0  # seconds: the manager reads at once, or it is of no use anyway


class Handed(NamedTuple):
    """A descriptor that was handed over, and what it is called."""

    name: str
    number: int


def take_handed_over() -> list[Handed]:
    """The descriptors that were handed over to this process, from now on close-on-exec.

    One without a name is called after its number: ``fd3``.  `BadResource` if that is no count, or
    there are not as many.
    """
    pid, count, names = (os.environ.pop(f"LISTEN_{what}", "") for what in ("PID", "FDS", "FDNAMES"))
    os.environ.pop("LISTEN_PIDFDID", None)
    if pid != str(os.getpid()):  # they are for another process
        return []
    if not (count.isascii() and count.isdigit() and len(count) < 8):
        raise BadResource("LISTEN_FDS", count, "it is how many descriptors were handed over")
    called = names.split(":") if names else []
    called += [""] * (int(count) - len(called))
    found = []
    for number, name in zip(range(FIRST, FIRST + int(count)), called, strict=False):
        try:
            os.set_inheritable(number, False)
        except OSError:
            reason = f"descriptor {number} is not open here, it was not handed over"
            raise BadResource("LISTEN_FDS", count, reason) from None
        found.append(Handed(f"fd{number}" if name in UNNAMED else name, number))
    return found


def take_own(handed: list[Handed], address: str | None) -> socket.socket | None:
    """Take the socket to serve at out of `handed`, if it is there; it is the caller's then.

    That is the one with a name for it, or at the path `address` (None: the default one).
    `BadResource` if that is no listening SOCK_SEQPACKET socket, or at another path than was said.
    """
    expected = default_address() if address is None else address
    for one in handed:
        path = _path_served_at(one.number)
        if one.name not in OWN_NAMES and path != expected:
            continue
        if path is None:
            reason = "the broker's own socket is one with a path, of ListenSequentialPacket="
            raise BadResource("LISTEN_FDNAMES", one.name, reason)
        if address is not None and path != address:
            reason = f"it is at {path}, not at {address}: say the same path in both places"
            raise BadResource("LISTEN_FDNAMES", one.name, reason)
        handed.remove(one)
        return socket.socket(fileno=one.number)
    return None


def _path_served_at(number: int) -> str | None:
    """The path of a listening Unix socket of SOCK_SEQPACKET."""
    try:
        sock = socket.socket(fileno=number)
    except OSError:
        return None
    try:
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            return None
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        path = sock.getsockname()
        return path if isinstance(path, str) and path else None
    finally:
        sock.detach()


class Manager:
    """Who started us, if it wants to know how we are.  Telling it never fails.

    ours: False for a private broker, whose owner has the same environment and speaks for itself.
    """

    def __init__(self, *, ours: bool = True) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self._address = address if ours else ""

    def ready(self, status: str) -> None:
        """Clients can connect; or a reload is over.  `status` is a line for people."""
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """A reload has begun."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        """The end has begun."""
        self._tell("STOPPING=1", f"STATUS={status}")

    def _tell(self, *lines: str) -> None:
        if self._address[:1] not in ("/", "@"):  # none, or of a kind we do not know
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
        ):
            sock.settimeout(PATIENCE)
            sock.sendto("\n".join(lines).encode(errors="backslashreplace"), address)
