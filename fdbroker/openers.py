"""How a descriptor is made when somebody says it in words: sockets, files, memfds, numbers.

What ``fdbroker serve``, ``put`` and ``exec`` take as options and ``fdbroker.toml`` as keys:

    listen   ``8000`` (on 127.0.0.1), ``:8000`` (on all addresses), ``127.0.0.1:8000``,
             ``[::]:8000``, ``localhost:8000``, ``unix:/path``, ``unix:@name`` (abstract);
             ``udp:`` before one of those: a bound datagram socket
    open     ``PATH``, ``PATH:r``, ``PATH:rw``, ``PATH:a`` (made if there is none but for ``r``,
             and but for devices: what is missing below /dev is not made as a file there)
    memfd    a size: ``4096``, ``64K``, ``16M``, ``1G``
    fd       the number of a descriptor that is open already; it is dup'ed

Each function returns a number that is the caller's to close, close-on-exec.  All raise OSError
with the system's reason, and `BadResource` for words that mean nothing; nothing is left then.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Callable, Iterator
from fcntl import F_DUPFD_CLOEXEC, LOCK_EX, LOCK_NB, fcntl, flock
from time import monotonic, sleep

from fdbroker.descriptors import open_now
from fdbroker.errors import BadResource

TYPE_CHECKING = False  # `typing` costs more to import than this module
if TYPE_CHECKING:
    from typing import Any

MODES = {
    "r": os.O_RDONLY,
    "rw": os.O_RDWR | os.O_CREAT,
    "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
}
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
FORMS = (
    "it is PORT, :PORT, HOST:PORT, [IPV6]:PORT, unix:PATH or unix:@NAME, or udp: and one of them"
)
TURN_SECONDS = 1.0  # for another to bind and listen: it needs microseconds


def make(how: str, what: str) -> int:
    """The descriptor of, say, ``make("listen", ":8000")``."""
    return MAKERS[how](what)


def check(how: str, what: str) -> None:
    """Raise `BadResource` if `make` would find no meaning in the words; nothing is opened."""
    READERS[how](what)


def listens(how: str, what: str) -> bool:
    """Whether `make` would make a socket that listens: one of streams, not of datagrams."""
    return how == "listen" and _read_address(what)[0] == socket.SOCK_STREAM


def discard(how: str, fd: int) -> None:
    """Close what `make` made and nobody took; the path of a socket goes with it (unix(7))."""
    if how != "listen":
        os.close(fd)
        return
    with socket.socket(fileno=fd) as sock:
        name = sock.getsockname() if sock.family == socket.AF_UNIX else b""
        if isinstance(name, str) and name:
            with contextlib.suppress(OSError):
                os.unlink(name)


def listen(address: str) -> int:
    """A listening socket, or with ``udp:`` a bound one; with SO_REUSEADDR (ip(7), socket(7))."""
    kind, path, host, port = _read_address(address)
    if path:
        return _at_path(address, path, kind)
    return _at_port(address, host, port, kind)


def _read_address(address: str) -> tuple[int, str, str, int]:
    """(type of socket, path, host, port): a path, or a host, which is empty for all addresses."""
    kind, rest = socket.SOCK_STREAM, address
    if address.startswith("udp:"):
        kind, rest = socket.SOCK_DGRAM, address.removeprefix("udp:")
    if rest.startswith("unix:"):
        path = rest.removeprefix("unix:")
        if path in ("", "@") or "\0" in path:
            raise BadResource("listen", address, "after unix: comes a path, or @ and a name")
        return kind, path, "", 0
    host, colon, port = rest.rpartition(":")
    if _number(port, 2**16) is None:
        raise BadResource("listen", address, "it ends with a port from 0 to 65535")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if (":" in bare) != (bare != host) or "[" in bare or "]" in bare:
        raise BadResource("listen", address, FORMS)
    return kind, "", bare if colon else "127.0.0.1", int(port)


def _at_path(address: str, path: str, kind: int) -> int:
    with socket.socket(socket.AF_UNIX, kind) as sock:
        if path.startswith("@"):
            _bind(sock, "\0" + path[1:], address)
            _listen(sock)
            return sock.detach()
        with _turn_in(os.path.dirname(path) or "."):
            _remove_stale(path, kind)
            _bind(sock, path, address)
            try:
                _listen(sock)
            except BaseException:
                os.unlink(path)
                raise
        return sock.detach()


def _bind(sock: socket.socket, path: str, address: str) -> None:
    try:
        sock.bind(path)
    except OSError as error:
        if error.errno is None:  # Python's own: the path is too long
            raise BadResource("listen", address, "the path is too long (unix(7))") from None
        raise


def _listen(sock: socket.socket) -> None:
    if sock.type == socket.SOCK_STREAM:
        sock.listen(socket.SOMAXCONN)


@contextlib.contextmanager
def _turn_in(folder: str) -> Iterator[None]:
    """One at a time binds in `folder`: a socket that does not listen yet looks like a stale one.

    The lock is on the folder itself (flock(2)), so nothing is left.  Others may hold it for
    reasons of their own, or it cannot be had there: then it is done without.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, place)
            deadline = monotonic() + TURN_SECONDS
            while monotonic() < deadline:
                try:
                    flock(place, LOCK_EX | LOCK_NB)
                    break
                except BlockingIOError:
                    sleep(0.002)
        yield


def _remove_stale(path: str, kind: int) -> None:
    """Unlink a socket that nobody listens at any more (unix(7): its file stays)."""
    with contextlib.suppress(OSError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, kind) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)


def _at_port(address: str, host: str, port: int, kind: int) -> int:
    dual = not host and socket.has_dualstack_ipv6()  # all addresses, of both families
    host = host or ("::" if dual else "0.0.0.0")
    family, _, protocol, _, where = _resolve(address, host, port, kind)
    with socket.socket(family, kind, protocol) as sock:
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if dual:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(where)
        _listen(sock)
        return sock.detach()


def _resolve(address: str, host: str, port: int, kind: int) -> tuple[int, int, int, str, Any]:
    """The first that getaddrinfo(3) finds."""
    try:
        return socket.getaddrinfo(host, port, type=kind, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        reason = (error.strerror or "unknown").lower()
    except ValueError:  # no text that could be a host's: a label too long, a NUL
        reason = "that cannot be the name of a host"
    raise BadResource("listen", address, reason)


def open_path(what: str) -> int:
    """The file at ``PATH[:r|rw|a]``; a path that itself ends like that is given its mode too.

    Never waits for the other end of a FIFO or the carrier of a serial line.
    """
    path, mode = _read_path(what)
    flags = MODES[mode]
    place = os.path.abspath(path)
    if place.startswith("/dev/") and not place.startswith("/dev/shm/"):
        flags &= ~os.O_CREAT  # a device that is unplugged must not become a file
    return open_now(path, flags)


def _read_path(what: str) -> tuple[str, str]:
    """(path, mode)."""
    path, colon, mode = what.rpartition(":")
    if not colon or mode not in MODES:
        path, mode = what, "r"
    if not path or "\0" in path:
        raise BadResource("open", what, "it is PATH, or PATH:r, PATH:rw, PATH:a")
    return path, mode


def memfd(size: str) -> int:
    """Memory of that many bytes, zeroed, that can be sealed (memfd_create(2)).

    Its mode would let everybody who has it on a read-only loan open it anew for writing
    (/proc/self/fd, proc(5)); so only its own user may.
    """
    count = _read_size(size)
    fd = os.memfd_create("fdbroker", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, count)
        os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _read_size(size: str) -> int:
    """In bytes."""
    unit = UNITS.get(size[-1:], 1)
    count = _number(size[:-1] if size[-1:] in UNITS else size, 2**63 // unit)
    if count is None:
        raise BadResource("memfd", size, "a size is bytes, or with K, M, G or T behind it")
    return count * unit


def duplicate(number: str) -> int:
    """A dup of the open descriptor `number`, which stays as it is."""
    return fcntl(_read_number(number), F_DUPFD_CLOEXEC, 3)


def _read_number(number: str) -> int:
    fd = _number(number, 2**31)
    if fd is None:
        raise BadResource("fd", number, "it is the number of an open descriptor")
    return fd


def _number(word: str, limit: int) -> int | None:
    """What the decimal digits of `word` say, if that is below `limit`."""
    if word.isascii() and word.isdigit() and len(word) < 20 and int(word) < limit:
        return int(word)
    return None


MAKERS: dict[str, Callable[[str], int]] = {
    "listen": listen,
    "open": open_path,
    "memfd": memfd,
    "fd": duplicate,
}

READERS: dict[str, Callable[[str], object]] = {
    "listen": _read_address,
    "open": _read_path,
    "memfd": _read_size,
    "fd": _read_number,
}
