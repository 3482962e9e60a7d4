"""The peer of a session over an AF_UNIX socket, as the kernel identifies it.

The kernel says what was true when the peer connected (SO_PEERCRED, SO_PEERGROUPS; unix(7)), for as
long as the socket is there: still uid 0 after the client has dropped root, still the pid of a
process that is dead.  A uid or a gid that the broker's user namespace does not map is shown as the
overflow id (user_namespaces(7)), which is no identity; `unknown_ids` says which number that is.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct

from fdbroker.ipc.transport.unix_socket import INT, SOL_SOCKET

UCRED = struct.Struct("3i")
SO_PEERGROUPS = 59  # asm-generic/socket.h
# How many groups socket.getsockopt has room for, and how many a process can be in (NGROUPS_MAX,
# linux/limits.h).
FEW_GROUPS = 256
MANY_GROUPS = 65_536
# As many ids as there are: -1 is none (user_namespaces(7)).
ALL_IDS = 2**32 - 1
# kernel.overflowuid and overflowgid, unless somebody has set them.
OVERFLOW_ID = 65_534


def credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return the uid, gid and pid of the peer as it was when it connected."""
    pid, uid, gid = UCRED.unpack(sock.getsockopt(SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return uid & 0xFFFFFFFF, gid & 0xFFFFFFFF, pid


def groups_among(wanted: frozenset[int], sock: socket.socket) -> frozenset[int]:
    """Return which of these are supplementary groups of the peer, as they were at its connect.

    A peer may be in 65,536 groups, and a set of all would take milliseconds more.
    """
    try:
        data = sock.getsockopt(SOL_SOCKET, SO_PEERGROUPS, FEW_GROUPS * INT.size)
    except OSError as error:
        # Before Linux 4.13 there is no such option.
        if error.errno != errno.ERANGE:
            return frozenset()
        data = _many_groups(sock)
    return wanted.intersection(memoryview(data).cast("I"))


def _many_groups(sock: socket.socket) -> bytes:
    """Return the groups of a peer that has more than Python's getsockopt has room for."""
    buffer = ctypes.create_string_buffer(MANY_GROUPS * INT.size)
    size = ctypes.c_uint32(len(buffer))
    getsockopt = ctypes.CDLL(None, use_errno=True).getsockopt
    if getsockopt(sock.fileno(), SOL_SOCKET, SO_PEERGROUPS, buffer, ctypes.byref(size)) != 0:
        return b""
    return buffer.raw[: size.value]


def unknown_ids() -> tuple[int | None, int | None]:
    """Return the uid and the gid that stand for all that this process's user namespace does not
    map; None where it maps every one, as the initial namespace does."""
    return _unknown_id("uid"), _unknown_id("gid")


def _unknown_id(kind: str) -> int | None:
    overflow = OVERFLOW_ID
    try:
        with open(f"/proc/sys/kernel/overflow{kind}") as file:
            overflow = int(file.read())
        with open(f"/proc/self/{kind}_map") as file:
            mapped = sum(int(line.split()[2]) for line in file)
    except OSError:
        # There is no /proc, so nothing is known to be mapped.
        mapped = 0
    return None if mapped >= ALL_IDS else overflow
