"""What a borrower made of its loan: sockets, files and mappings, and how they end.

A **wrapper**, a socket or a file, has a duplicate of the loan's descriptor and ends with the loan.
A **mapping** has one too, and the loan ends with the mapping: an array may still look at the
memory when the loan is closed.  Most loans have neither, so a session gets a `LoanWrappers` only
when the first one is made.

They belong to the loan, but their users have them in hand.  A wrapper may be closed already, its
buffer may be detached, or its number closed behind its back and given to an unrelated file by the
kernel; then the loan must not close that file.  (Of a file object's number this cannot be told in
time, for Python closes it in C, whatever it leads to by then.)

Everything that is made here is made under the fork lock, together with the note of it: otherwise
another thread could close the loan meanwhile, and its number could lead to another file.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from socket import SocketType, socket
from typing import IO, Any, Protocol
from weakref import WeakValueDictionary

from fdbroker.descriptors import is_read_write
from fdbroker.ipc.client.fork import FORK_LOCK, deferred_cleanup, run_or_defer
from fdbroker.rc import identity


class Closable(Protocol):
    """A socket, a file object, or a mapping."""

    def close(self) -> object: ...


class Returnable(Protocol):
    """What the last mapping gives back: a session with a loan."""

    @property
    def return_loan(self) -> Callable[[], None]: ...

    @property
    def wrappers(self) -> LoanWrappers | None: ...


class MappingRef:
    """Held by a loan and by each of its mappings: the last of them to go returns the loan.

    Python counts the holders, since a mapping ends where its array does, and an interrupt must not
    lose the count.
    """

    __slots__ = ()

    def __init__(self, session: Returnable) -> None:
        _sessions[id(self)] = session

    def __del__(self) -> None:
        session = _sessions.pop(id(self), None)
        if session is not None and session.wrappers is not None and session.wrappers.return_pending:
            run_or_defer(session.return_loan)


# By the id of a MappingRef.  A weak reference in a slot of its own would not do: the garbage
# collector clears that before it calls `__del__`.
_sessions: WeakValueDictionary[int, Returnable] = WeakValueDictionary()


class Mapping(mmap.mmap):
    """A mapping of what was lent.  The loan ends when it is closed and this is, or was dropped."""

    _keeps: tuple[Returnable, MappingRef] | None = None

    def close(self) -> None:
        """Unmap; BufferError while an array or a memoryview still looks at it."""
        with deferred_cleanup, FORK_LOCK:  # a mapping has a descriptor of its own, which ends here
            super().close()
            self._keeps = None

    def _end(self) -> None:
        # An array that looks at it is dropped with it: the two are a cycle.
        with contextlib.suppress(BufferError):
            self.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        run_or_defer(self._end)


class LoanWrappers:
    """The sockets, files and mappings of one loan, as far as their users still have them.

    mapping_ref: the loan's own, once there is a mapping.
    return_pending: the loan is closed, and the last mapping returns it.
    """

    __slots__ = ("_files", "_mappings", "_sockets", "mapping_ref", "return_pending")

    def __init__(self) -> None:
        self._sockets: WeakValueDictionary[int, socket] = WeakValueDictionary()
        self._files: WeakValueDictionary[int, IO[Any]] = WeakValueDictionary()
        self._mappings: WeakValueDictionary[int, Mapping] = WeakValueDictionary()
        self.mapping_ref: MappingRef | None = None
        self.return_pending = False

    @property
    def mapped(self) -> bool:
        """Whether the loan may end later than it is closed."""
        return self.return_pending or self.mapping_ref is not None

    # --- making them; the fork lock is held ---

    def add_socket(self, fd: int) -> socket:
        """Return a socket object with a duplicate of `fd`."""
        made, dups = socket.__new__(socket), list[int]()
        try:
            dups.extend(map(os.dup, (fd,)))  # in one call into C, so no interrupt can lose it
            socket.__init__(made, fileno=dups[0])
        except BaseException:
            if made.fileno() < 0:  # it has not taken the duplicate over
                for number in dups:
                    os.close(number)
            raise
        self._sockets[id(made)] = made
        return made

    def add_file(self, fd: int, name: str, mode: str, buffering: int, **text: Any) -> IO[Any]:
        """Return a file object with a duplicate of `fd`, as from the builtin `open`."""
        dups: dict[str, int] = {}
        try:
            dups.update(zip((name,), map(os.dup, (fd,)), strict=True))
            # The opener is called as pop(name, flags).
            file: IO[Any] = open(name, mode, buffering, opener=dups.pop, **text)  # noqa: SIM115
        finally:
            for number in dups.values():
                os.close(number)
        self._files[id(file)] = file
        return file

    def add_mapping(
        self, session: Returnable, fd: int, length: int, access: int | None, offset: int
    ) -> Mapping:
        """Return a mapping of `fd`, with which the loan of `session` ends.

        access: mmap.ACCESS_READ or ACCESS_WRITE; None for what the descriptor allows.
        """
        if access is None:
            access = mmap.ACCESS_WRITE if is_read_write(fd) else mmap.ACCESS_READ
        mapping = Mapping(fd, length, access=access, offset=offset)
        if self.mapping_ref is None:
            self.mapping_ref = MappingRef(session)
        mapping._keeps = session, self.mapping_ref
        self._mappings[id(mapping)] = mapping
        return mapping

    # --- their end ---

    def flush(self) -> OSError | None:
        """Write what the files have buffered, which may take its time; returns the first error."""
        error = None
        for file in list(self._files.values()):
            try:
                file.flush()
            except OSError as failure:
                error = error or failure
            except ValueError:
                pass  # it is closed, or its buffer was detached
        return error

    def close(self, lent: Sequence[int]) -> OSError | None:
        """Close sockets and files, which were made of the descriptors `lent`, without waiting.

        Of a file object only the raw layer is closed, since its buffer may be locked by a thread
        that reads, or by one that this process was forked without.  So `flush` comes first.
        Returns the first error.
        """
        error = _close_sockets(self._sockets.values(), lent)
        for file in list(self._files.values()):
            try:
                _raw(file).close()
            except OSError as failure:
                error = error or failure
            except ValueError:
                pass  # its buffer was detached, and the rest is its user's
        self._sockets.clear()
        self._files.clear()
        return error

    def close_sockets_in_child(self, lent: Sequence[int]) -> None:
        """Close in a forked child what can be closed while no number is free."""
        _close_sockets(self._sockets.values(), lent)

    def drop_in_child(self) -> bool:
        """Let go of the files and mappings, which stay with the parent.

        Returns whether a mapping is in use: then this copy of the session goes with it.
        """
        for file in list(self._files.values()):
            _drop_file(file)
        self._sockets.clear()
        self._files.clear()
        mapped = False
        for mapping in list(self._mappings.values()):
            try:
                mapping.close()
            except BufferError:
                mapped = True
        self.return_pending = mapped
        self.mapping_ref = None
        return mapped


def _close_sockets(sockets: Iterable[socket], lent: Sequence[int]) -> OSError | None:
    """Close them, which were made of the descriptors `lent`; returns the first error."""
    error = None
    for sock in list(sockets):
        try:
            if _leads_elsewhere(sock.fileno(), lent):
                sock.detach()
            sock.close()
            SocketType.close(sock)  # `socket.close` leaves that to the last file of `makefile`
        except OSError as failure:
            error = error or failure
    return error


def _drop_file(file: IO[Any]) -> None:
    """Close a file object in a forked child without writing what it has buffered.

    The parent has the same in its buffer, and will write it.
    """
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.dup2(null, file.fileno(), inheritable=False)
        finally:
            os.close(null)
    with contextlib.suppress(OSError, ValueError):
        _raw(file).close()


def _raw(file: IO[Any]) -> Closable:
    """Return the layer of a file object that has the descriptor.

    Raises ValueError if its user took it apart.
    """
    buffered = getattr(file, "buffer", file)
    if buffered is None:
        raise ValueError("its buffer was detached")
    raw: Closable = getattr(buffered, "raw", buffered)
    return raw


def _leads_elsewhere(number: int, lent: Sequence[int]) -> bool:
    """Return whether `number` surely leads to nothing that was lent."""
    try:
        found = identity(number)
    except OSError:  # it leads to nothing at all
        return True
    try:
        return found not in map(identity, lent)
    except OSError:  # one of them was closed, so this is unknown
        return False
