"""What the kernel says a descriptor is, and what may be done with it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fdbroker.descriptors import REFUSED, Kind, inspect, reopen_read_only, switch_linger_off
from fdbroker.errors import UnsupportedKind

LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def owned(stack: ExitStack, number: int) -> int:
    assert number >= 0, os.strerror(ctypes.get_errno())
    stack.callback(os.close, number)
    return number


def test_regular_files(stack: ExitStack, tmp_path: Path) -> None:
    path = tmp_path / "file"
    number = owned(stack, os.open(path, os.O_RDWR | os.O_CREAT))
    assert inspect(number) == (Kind.FILE, str(path))
    path.unlink()
    assert inspect(number) == (Kind.FILE, f"{path} (deleted)")


def test_a_path_that_is_no_text(stack: ExitStack, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\n"
    _, where = inspect(owned(stack, os.open(path, os.O_RDWR | os.O_CREAT)))
    assert where.encode()  # it can be sent
    assert where.startswith(str(tmp_path))


def test_memfds(stack: ExitStack) -> None:
    kind, where = inspect(owned(stack, os.memfd_create("shared")))
    assert kind == Kind.MEMFD
    assert "shared" in where


def test_pipes(stack: ExitStack, tmp_path: Path) -> None:
    for number in os.pipe():
        assert inspect(owned(stack, number)) == (Kind.PIPE, "")
    os.mkfifo(tmp_path / "fifo")
    number = owned(stack, os.open(tmp_path / "fifo", os.O_RDWR))
    assert inspect(number) == (Kind.PIPE, str(tmp_path / "fifo"))


def test_devices(stack: ExitStack) -> None:
    number = owned(stack, os.open("/dev/null", os.O_RDWR))
    assert inspect(number) == (Kind.CHARACTER_DEVICE, "/dev/null")


def test_internet_sockets(stack: ExitStack) -> None:
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    port = server.getsockname()[1]
    assert inspect(server.fileno()) == (Kind.LISTENING_SOCKET, f"127.0.0.1:{port}")
    client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
    kind, where = inspect(client.fileno())
    assert kind == Kind.STREAM_SOCKET
    later = stack.enter_context(socket.socket())
    later.bind(("127.0.0.1", 0))
    where_it_is = "{}:{}".format(*later.getsockname())
    assert inspect(later.fileno()) == (Kind.UNCONNECTED_SOCKET, where_it_is)
    later.listen()
    assert inspect(later.fileno()) == (Kind.LISTENING_SOCKET, where_it_is)
    assert where == "{}:{}".format(*client.getsockname())
    udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    assert inspect(udp.fileno()) == (Kind.DATAGRAM_SOCKET, "0.0.0.0:0")
    assert client.fileno() >= 0  # looking has closed none


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_internet_sockets_of_version_six(stack: ExitStack) -> None:
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("needs IPv6")
    stack.enter_context(server)
    port = server.getsockname()[1]
    assert inspect(server.fileno()) == (Kind.LISTENING_SOCKET, f"[::1]:{port}")


def test_unix_sockets(stack: ExitStack, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    server = stack.enter_context(socket.socket(socket.AF_UNIX))
    server.bind(path)
    server.listen()
    assert inspect(server.fileno()) == (Kind.LISTENING_SOCKET, f"unix:{path}")
    abstract = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    abstract.bind(f"\0fdbroker-{os.getpid()}")
    assert inspect(abstract.fileno()) == (Kind.DATAGRAM_SOCKET, f"unix:@fdbroker-{os.getpid()}")


@pytest.mark.parametrize("type", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_unix_socket_is_nobodys_to_connect(stack: ExitStack, tmp_path: Path, type: int) -> None:
    """Not before it is bound, nor bound; once it listens, connect(2) refuses it."""
    sock = stack.enter_context(socket.socket(socket.AF_UNIX, type))
    with pytest.raises(UnsupportedKind, match=r"idle unix socket.*after listen"):
        inspect(sock.fileno())
    sock.bind(str(tmp_path / "s"))
    with pytest.raises(UnsupportedKind, match="idle unix socket"):
        inspect(sock.fileno())
    sock.listen()
    assert inspect(sock.fileno())[0] == Kind.LISTENING_SOCKET
    with pytest.raises(OSError, match="Invalid argument"):
        sock.connect(str(tmp_path / "s"))


def test_other_sockets(stack: ExitStack) -> None:
    netlink = stack.enter_context(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
    assert inspect(netlink.fileno())[0] == Kind.OTHER_SOCKET


def anonymous(stack: ExitStack) -> Iterator[tuple[Kind, int]]:
    yield Kind.EVENTFD, os.eventfd(0)
    yield Kind.TIMERFD, LIBC.timerfd_create(1, 0)
    yield Kind.SIGNALFD, LIBC.signalfd(-1, (ctypes.c_uint64 * 16)(), 0)
    yield Kind.INOTIFY, LIBC.inotify_init1(0)
    yield Kind.PIDFD, os.pidfd_open(os.getpid())
    if (number := LIBC.fanotify_init(0, os.O_RDONLY)) >= 0:
        yield Kind.FANOTIFY, number
    attributes = struct.pack("IIII", 2, 4, 4, 1).ljust(64, b"\0")  # an array of one
    if (number := LIBC.syscall(321, 0, attributes, 64)) >= 0:  # bpf(2), BPF_MAP_CREATE
        yield Kind.BPF_MAP, number
    event = struct.pack("IIQ", 1, 112, 0).ljust(112, b"\0")  # a software event: the cpu clock
    if (number := LIBC.syscall(298, event, 0, -1, -1, 0)) >= 0:  # perf_event_open(2)
        yield Kind.PERF_EVENT, number


def test_anonymous_inodes(stack: ExitStack) -> None:
    for kind, number in anonymous(stack):
        assert inspect(owned(stack, number))[0] == kind


def refused(stack: ExitStack, folder: Path) -> Iterator[tuple[Kind, int]]:
    yield Kind.DIRECTORY, owned(stack, os.open(folder, os.O_RDONLY))
    yield Kind.PATH, owned(stack, os.open(folder, os.O_PATH))
    yield Kind.PATH, owned(stack, os.open("/dev/null", os.O_PATH))
    yield Kind.EPOLL, stack.enter_context(select.epoll()).fileno()
    for end in socket.socketpair():
        yield Kind.CONNECTED_UNIX_SOCKET, stack.enter_context(end).fileno()
    for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM):
        yield Kind.CONNECTED_UNIX_SOCKET, stack.enter_context(end).fileno()
    yield Kind.IDLE_UNIX_SOCKET, stack.enter_context(socket.socket(socket.AF_UNIX)).fileno()
    if (number := LIBC.syscall(425, 4, (ctypes.c_uint32 * 30)())) >= 0:  # io_uring_setup(2)
        yield Kind.IO_URING, owned(stack, number)


def test_what_is_refused_says_why(stack: ExitStack, tmp_path: Path) -> None:
    seen = set()
    for kind, number in refused(stack, tmp_path):
        with pytest.raises(UnsupportedKind) as caught:
            inspect(number)
        assert caught.value.data == (kind.label, REFUSED[kind])
        with pytest.raises(UnsupportedKind):
            reopen_read_only(number)
        seen.add(kind)
    assert seen >= REFUSED.keys() - {Kind.IO_URING}


def test_no_descriptor() -> None:
    number = os.dup(0)
    os.close(number)
    for wrong in (number, -1):
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            inspect(wrong)
        assert caught.value.errno == errno.EBADF


def test_a_reopened_file_is_another_description(stack: ExitStack, tmp_path: Path) -> None:
    number = owned(stack, os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT | os.O_APPEND))
    os.write(number, b"abc")
    fresh = owned(stack, reopen_read_only(number))
    assert os.path.sameopenfile(number, fresh)
    assert os.read(fresh, 9) == b"abc"
    flags = fcntl.fcntl(fresh, fcntl.F_GETFL)
    assert flags & os.O_ACCMODE == os.O_RDONLY
    assert not flags & (os.O_APPEND | os.O_NONBLOCK)
    assert fcntl.fcntl(fresh, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_a_lease_is_not_waited_for(stack: ExitStack, tmp_path: Path) -> None:
    """open(2) waits until the holder gives it up, /proc/sys/fs/lease-break-time seconds at most."""
    number = owned(stack, os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT))
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    stack.callback(signal.signal, signal.SIGIO, before)
    fcntl.fcntl(number, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    with pytest.raises(UnsupportedKind, match=r"a lease on it.*try again"):
        reopen_read_only(number)
    fcntl.fcntl(number, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    os.close(reopen_read_only(number))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another uid")
def test_reopening_is_by_the_rights_of_this_process(stack: ExitStack, tmp_path: Path) -> None:
    """Not by those that it was opened with: unprivileged, it is refused like any open(2)."""
    import support

    path = tmp_path / "private"
    path.write_bytes(b"abc")
    path.chmod(0o600)
    number = owned(stack, os.open(path, os.O_RDONLY))

    def unprivileged() -> None:
        os.setuid(65534)
        os.close(reopen_read_only(number))

    with pytest.raises(PermissionError):
        support.in_fork(unprivileged)


def test_linger_is_switched_off(stack: ExitStack) -> None:
    sock = stack.enter_context(socket.socket())
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
    switch_linger_off(sock.fileno())
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
    assert struct.unpack("ii", found)[0] == 0
    with contextlib.suppress(OSError):  # there is no vsock
        sock = stack.enter_context(socket.socket(socket.AF_VSOCK))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 1 << 32 | 1)
        switch_linger_off(sock.fileno())
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER) & 0xFFFFFFFF == 0
    for number in os.pipe():
        switch_linger_off(owned(stack, number))
        os.fstat(number)
