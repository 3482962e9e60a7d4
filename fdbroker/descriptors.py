"""What a descriptor is: its kind, where it leads, and what may be done with it.

The kernel is asked, never the caller: fstat(2), the link in /proc/self/fd, socket options.  Some
kinds are refused altogether, because lending them would hand out more than they seem to be; and
only some can be opened anew for reading, because opening has side effects or other rights.

These calls can take long on a file system that hangs (FUSE, NFS): not for the event loop.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import struct
from enum import IntEnum
from fcntl import F_GETFL, F_SETFL, fcntl

from fdbroker.errors import UnsupportedKind

LINGER_OFF = struct.pack("ii", 0, 0)

# file systems whose files are made at open, by the rights of who opens (proc(5), sysfs(5))
PSEUDO_FILE_SYSTEMS = {
    *("proc", "sysfs", "debugfs", "tracefs", "securityfs", "configfs", "fusectl"),
    *("cgroup", "cgroup2", "efivarfs", "bpf"),
}


class Kind(IntEnum):
    """What a descriptor is.  The numbers are those of the wire and the ledger."""

    OTHER = 0
    FILE = 1
    MEMFD = 2
    PIPE = 3
    CHARACTER_DEVICE = 4
    BLOCK_DEVICE = 5
    LISTENING_SOCKET = 6
    STREAM_SOCKET = 7
    DATAGRAM_SOCKET = 8
    OTHER_SOCKET = 9
    EVENTFD = 10
    TIMERFD = 11
    SIGNALFD = 12
    INOTIFY = 13
    FANOTIFY = 14
    PIDFD = 15
    BPF_MAP = 16
    BPF_PROGRAM = 17
    BPF_LINK = 18
    PERF_EVENT = 19
    UNCONNECTED_SOCKET = 20  # of streams: it does not listen yet, and may at any time
    # kinds that are known in order to be refused
    DIRECTORY = 32
    PATH = 33
    EPOLL = 34
    IO_URING = 35
    CONNECTED_UNIX_SOCKET = 36
    IDLE_UNIX_SOCKET = 37

    @property
    def label(self) -> str:
        """As people read it: ``listening socket``."""
        return self.name.lower().replace("_", " ")


LISTENERS = frozenset({Kind.LISTENING_SOCKET, Kind.UNCONNECTED_SOCKET})
"""Kinds that a borrower's shutdown(2) ends for everybody, now or once somebody calls listen(2)."""

REFUSED = {
    Kind.DIRECTORY: (
        'a borrower could reach all that is above it (openat(fd, "../..")); put the files in it'
    ),
    Kind.PATH: (
        "an O_PATH descriptor is no open file, and a borrower could open it with its rights; open "
        "the file, and put that"
    ),
    Kind.EPOLL: (
        "its registrations would outlive the descriptors they were made for (epoll(7)); put these"
    ),
    Kind.IO_URING: (
        "it acts with the memory and the rights of the process that made it; put the files that it "
        "works on"
    ),
    Kind.CONNECTED_UNIX_SOCKET: (
        "it can carry descriptors itself, so it could be sent through itself and never be freed "
        "(unix(7)); lend its listening socket"
    ),
    Kind.IDLE_UNIX_SOCKET: (
        "it neither listens nor is connected, so a borrower could connect it, even to this broker, "
        "as a session that would never end; put it after listen()"
    ),
}

_ANONYMOUS = {  # the names of anon_inodefs, as readlink shows them
    "eventpoll": Kind.EPOLL,
    "io_uring": Kind.IO_URING,
    "eventfd": Kind.EVENTFD,
    "timerfd": Kind.TIMERFD,
    "signalfd": Kind.SIGNALFD,
    "inotify": Kind.INOTIFY,
    "fanotify": Kind.FANOTIFY,
    "pidfd": Kind.PIDFD,
    "bpf-map": Kind.BPF_MAP,
    "bpf-prog": Kind.BPF_PROGRAM,
    "bpf_link": Kind.BPF_LINK,
    "perf_event": Kind.PERF_EVENT,
}


def inspect(fd: int) -> tuple[Kind, str]:
    """(kind, where it leads: a path or an address, or empty).

    `UnsupportedKind` for what cannot be kept; OSError EBADF if it is no descriptor.
    """
    mode = os.fstat(fd).st_mode
    link = _link(fd)
    kind, where = Kind.OTHER, ""
    if fcntl(fd, F_GETFL) & os.O_PATH:
        kind = Kind.PATH
    elif stat.S_ISDIR(mode):
        kind = Kind.DIRECTORY
    elif stat.S_ISSOCK(mode):
        kind, where = _inspect_socket(fd)
    elif stat.S_ISREG(mode):
        kind, where = (Kind.MEMFD if link.startswith("/memfd:") else Kind.FILE), link
    elif stat.S_ISFIFO(mode):
        kind, where = Kind.PIPE, "" if link.startswith("pipe:") else link
    elif stat.S_ISCHR(mode):
        kind, where = Kind.CHARACTER_DEVICE, link
    elif stat.S_ISBLK(mode):
        kind, where = Kind.BLOCK_DEVICE, link
    elif link.startswith("anon_inode:"):
        kind = _ANONYMOUS.get(link.removeprefix("anon_inode:").strip("[]"), Kind.OTHER)
    if kind in REFUSED:
        raise UnsupportedKind(kind.label, REFUSED[kind])
    return kind, where.encode(errors="backslashreplace").decode()


def reopen_read_only(fd: int) -> int:
    """A fresh read-only open file description of the same file; the number is the caller's.

    Only of regular files and memfds that can be read through `fd` already.  The kernel opens them
    anew through /proc/self/fd, with the rights of this process (proc(5)).  A lease on the file
    (fcntl(2), F_SETLEASE) is never waited for: its holder could make that last most of a minute.
    """
    kind, _ = inspect(fd)
    if kind not in (Kind.FILE, Kind.MEMFD):
        reason = "only files and memfds can be opened anew for reading, borrow it as it is"
        raise UnsupportedKind(kind.label, reason)
    if fcntl(fd, F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
        raise UnsupportedKind(kind.label, "it was put for writing only, borrow it as it is")
    if kind is Kind.FILE and _file_system(fd) in PSEUDO_FILE_SYSTEMS:
        reason = "to open a file of this file system has side effects, borrow it as it is"
        raise UnsupportedKind(kind.label, reason)
    try:
        return open_now(f"/proc/self/fd/{fd}", os.O_RDONLY)
    except FileNotFoundError:
        reason = "the broker has no /proc to open it anew, borrow it as it is"
        raise UnsupportedKind(kind.label, reason) from None
    except BlockingIOError:
        reason = "another process has a lease on it, which it is asked to give up: try again"
        raise UnsupportedKind(kind.label, reason) from None


def open_now(path: str, flags: int) -> int:
    """Open it without waiting for a lease, the other end of a FIFO or the carrier of a serial line
    (open(2), O_NONBLOCK).  The number, the caller's, is a blocking one all the same.  OSError."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK, 0o666)
    try:
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~os.O_NONBLOCK)
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_socket(fd: int) -> bool:
    """Whether it is one; no error if nothing is open there."""
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        return False


def switch_linger_off(fd: int) -> None:
    """Let the coming close(2) of a socket return at once (SO_LINGER, socket(7))."""
    with contextlib.suppress(OSError):  # not a socket, or none that lingers
        # said to be of IPv4, whatever it is: of AF_VSOCK, Python takes no bytes for an option
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=fd)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_OFF)
        finally:
            sock.detach()


def _link(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _inspect_socket(fd: int) -> tuple[Kind, str]:
    sock = socket.socket(fileno=fd)
    try:
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if sock.family == socket.AF_UNIX and not listening:
            if _connected(sock):
                return Kind.CONNECTED_UNIX_SOCKET, ""
            if sock.type != socket.SOCK_DGRAM:
                return Kind.IDLE_UNIX_SOCKET, ""
        if listening:
            kind = Kind.LISTENING_SOCKET
        elif sock.type in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET) and not _connected(sock):
            kind = Kind.UNCONNECTED_SOCKET
        elif sock.type == socket.SOCK_STREAM:
            kind = Kind.STREAM_SOCKET
        elif sock.type == socket.SOCK_DGRAM:
            kind = Kind.DATAGRAM_SOCKET
        else:
            kind = Kind.OTHER_SOCKET
        return kind, _address(sock)
    finally:
        sock.detach()


def _connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _address(sock: socket.socket) -> str:
    if sock.family == socket.AF_INET:
        return "{}:{}".format(*sock.getsockname())
    if sock.family == socket.AF_INET6:
        return "[{}]:{}".format(*sock.getsockname()[:2])
    if sock.family == socket.AF_UNIX:
        name = sock.getsockname()
        return "unix:" + (name if isinstance(name, str) else "@" + os.fsdecode(name[1:]))
    return ""


def _file_system(fd: int) -> str:
    """The type of the file system that `fd` is on, by its mount (proc_pid_mountinfo(5))."""
    try:
        with open(f"/proc/self/fdinfo/{fd}") as info:
            mount = next(line.split()[1] for line in info if line.startswith("mnt_id:"))
        with open("/proc/self/mountinfo") as mounts:
            for line in mounts:
                if line.split(maxsplit=1)[0] == mount:
                    return line.partition(" - ")[2].split()[0]
    except (OSError, StopIteration):
        pass
    return ""


def is_read_write(fd: int) -> bool:
    """Whether `fd` is open for both reading and writing (F_GETFL, fcntl(2))."""
    return fcntl(fd, F_GETFL) & os.O_ACCMODE == os.O_RDWR


def wait_readable(fd: int, seconds: float | None = None) -> bool:
    """Wait until `fd` can be read from, or has ended; None waits for ever.  Returns whether it can.

    The descriptor stays the caller's, and its flags as they are (poll(2)).
    """
    return _wait(fd, select.POLLIN, seconds)


def wait_writable(fd: int, seconds: float | None = None) -> bool:
    """Wait until `fd` can be written to, or nobody reads it, as `wait_readable` does."""
    return _wait(fd, select.POLLOUT, seconds)


def _wait(fd: int, events: int, seconds: float | None) -> bool:
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(None if seconds is None else seconds * 1000))
