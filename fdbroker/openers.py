"""How a descriptor is made when somebody says it in words: sockets, files, memfds, numbers.

What ``fdbroker serve``, ``put`` and ``exec`` take as options and ``fdbroker.toml`` as keys:

    listen   ``8000`` (on 127.0.0.1), ``:8000`` (on all addresses), ``127.0.0.1:8000``,
             ``[::]:8000``, ``localhost:8000``, ``unix:/path``, ``unix:@name`` (abstract);
             ``udp:`` before one of those: a bound datagram socket
    open     ``PATH``, ``PATH:r``, ``PATH:rw``, ``PATH:a`` (made if there is none but for ``r``)
    memfd    a size: ``4096``, ``64K``, ``16M``, ``1G``
    fd       the number of a descriptor that is open already; it is dup'ed

Each function returns a number that is the caller's to close, close-on-exec.  All raise OSError
with the system's reason, and `BadResource` for words that mean nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Callable
from fcntl import F_DUPFD_CLOEXEC, fcntl

from fdbroker.errors import BadResource

MODES = {
    "r": os.O_RDONLY,
    "rw": os.O_RDWR | os.O_CREAT,
    "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
}
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def make(how: str, what: str) -> int:
    """The descriptor of, say, ``make("listen", ":8000")``."""
    return MAKERS[how](what)


def listen(address: str) -> int:
    """A listening socket, or with ``udp:`` a bound one; with SO_REUSEADDR (ip(7), socket(7))."""
    kind, rest = socket.SOCK_STREAM, address
    if address.startswith("udp:"):
        kind, rest = socket.SOCK_DGRAM, address.removeprefix("udp:")
    if rest.startswith("unix:"):
        sock = _bound_to_path(address, rest.removeprefix("unix:"), kind)
    else:
        sock = _bound_to_port(address, rest, kind)
    try:
        if kind == socket.SOCK_STREAM:
            sock.listen(socket.SOMAXCONN)
        return sock.detach()
    finally:
        sock.close()


def _bound_to_path(address: str, path: str, kind: int) -> socket.socket:
    if not path or "\0" in path:
        raise BadResource("listen", address, "after unix: comes a path")
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        if not path.startswith("@"):
            _remove_stale(path, kind)
        try:
            sock.bind("\0" + path[1:] if path.startswith("@") else path)
        except OSError as error:
            if error.errno is None:  # Python's own: the path is too long
                raise BadResource("listen", address, str(error)) from None
            raise
    except BaseException:
        sock.close()
        raise
    return sock


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


def _bound_to_port(address: str, rest: str, kind: int) -> socket.socket:
    host, colon, port = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise BadResource("listen", address, "it ends with a port from 0 to 65535")
    if not host and colon and socket.has_dualstack_ipv6():  # all addresses, of both families
        host, dual = "::", True
    else:
        host, dual = host or ("0.0.0.0" if colon else "127.0.0.1"), False
    try:
        found = socket.getaddrinfo(host, int(port), type=kind, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise BadResource("listen", address, (error.strerror or "unknown").lower()) from None
    family, _, protocol, _, where = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if dual:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(where)
    except BaseException:
        sock.close()
        raise
    return sock


def open_path(what: str) -> int:
    """The file at ``PATH[:r|rw|a]``; a path that itself ends like that is given its mode too."""
    path, colon, mode = what.rpartition(":")
    if not colon or mode not in MODES:
        path, mode = what, "r"
    if not path or "\0" in path:
        raise BadResource("open", what, "it is PATH, or PATH:r, PATH:rw, PATH:a")
    return os.open(path, MODES[mode] | os.O_CLOEXEC | os.O_NOCTTY, 0o666)


def memfd(size: str) -> int:
    """Memory of that many bytes, zeroed, that can be sealed (memfd_create(2))."""
    digits = size.rstrip("".join(UNITS))
    unit = UNITS.get(size[len(digits) :], 1 if digits == size else 0)
    if not (digits.isascii() and digits.isdigit() and unit and int(digits) * unit < 2**63):
        raise BadResource("memfd", size, "a size is bytes, or with K, M, G or T behind it")
    fd = os.memfd_create("fdbroker", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, int(digits) * unit)
    except BaseException:
        os.close(fd)
        raise
    return fd


def duplicate(number: str) -> int:
    """A dup of the open descriptor `number`, which stays as it is."""
    if not (number.isascii() and number.isdigit() and int(number) < 2**31):
        raise BadResource("fd", number, "it is the number of an open descriptor")
    return fcntl(int(number), F_DUPFD_CLOEXEC, 3)


MAKERS: dict[str, Callable[[str], int]] = {
    "listen": listen,
    "open": open_path,
    "memfd": memfd,
    "fd": duplicate,
}
