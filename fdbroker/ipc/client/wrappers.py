"""What a loan made of its descriptor, and how that ends: sockets and file objects, each with a dup.

They belong to the loan, but their users have them in hand: a wrapper may be closed already, its
buffer may be detached, or a socket's number closed behind its back and given to a stranger by the
kernel, who must not lose it.  (Of a file object's number that cannot be told in time, as of any
file object: Python closes it in C, whatever it leads to by then.)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from socket import SocketType, socket
from typing import IO, Any, Protocol

from fdbroker.rc import identity


class Wrapper(Protocol):
    """A socket, a file object, or a mapping."""

    def close(self) -> object: ...


def socket_of(fd: int) -> socket:
    """A socket object with a dup of `fd`."""
    made, dups = socket.__new__(socket), list[int]()
    try:
        dups.extend(map(os.dup, (fd,)))  # in one call into C, so no interrupt can lose it
        socket.__init__(made, fileno=dups[0])
    except BaseException:
        if made.fileno() < 0:  # it has not taken it over
            for number in dups:
                os.close(number)
        raise
    return made


def file_of(fd: int, name: str, mode: str, buffering: int, **text: Any) -> IO[Any]:
    """A file object with a dup of `fd`, as from the builtin `open`."""
    dups: dict[str, int] = {}
    try:
        dups.update(zip((name,), map(os.dup, (fd,)), strict=True))
        return open(name, mode, buffering, opener=dups.pop, **text)  # called as pop(name, flags)
    finally:
        for number in dups.values():
            os.close(number)


def flush(wrappers: Iterable[Wrapper]) -> OSError | None:
    """Write what they have buffered, which may take its time; the first error."""
    error = None
    for wrapper in wrappers:
        try:
            if not isinstance(wrapper, socket):
                wrapper.flush()  # type: ignore[attr-defined]
        except OSError as failure:
            error = error or failure
        except ValueError:
            pass  # closed, or without its buffer
    return error


def close(wrappers: Iterable[Wrapper], lent: Sequence[int]) -> OSError | None:
    """Close them, which were made of the descriptors `lent`; the first error.

    Without waiting: of a file object only the raw layer, since its buffer may be locked by a
    thread that reads, or by one that this process was forked without.  So `flush` comes first.
    """
    error = None
    for wrapper in wrappers:
        try:
            if not isinstance(wrapper, socket):
                _raw(wrapper).close()
                continue
            if _is_strange(wrapper.fileno(), lent):
                wrapper.detach()
            wrapper.close()
            SocketType.close(wrapper)  # `close` leaves that to the last file of `makefile`
        except OSError as failure:
            error = error or failure
        except ValueError:
            pass  # a file object without its buffer: the rest is its user's
    return error


def drop_in_child(files: Iterable[Wrapper]) -> None:
    """Close file objects in a forked child without writing what they have buffered.

    The parent has the same in its buffers, and will write it.
    """
    for file in files:
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.dup2(null, file.fileno(), inheritable=False)  # type: ignore[attr-defined]
            finally:
                os.close(null)
        with contextlib.suppress(OSError, ValueError):
            _raw(file).close()


def _raw(file: Wrapper) -> Wrapper:
    """The layer of a file object that has the descriptor; ValueError if its user took it apart."""
    buffered = getattr(file, "buffer", file)
    if buffered is None:
        raise ValueError("its buffer was detached")
    raw: Wrapper = getattr(buffered, "raw", buffered)
    return raw


def _is_strange(number: int, lent: Sequence[int]) -> bool:
    """Whether a number surely leads to nothing that was lent."""
    try:
        found = identity(number)
    except OSError:  # to nothing at all
        return True
    try:
        return found not in map(identity, lent)
    except OSError:  # one of them was closed: unknown
        return False
