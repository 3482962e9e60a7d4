"""A loan in the hands of its borrower.

The descriptor is the loan's: use `fileno()` as long as the loan is open, and do not close it.
What `as_socket`, `open` and `mmap` give owns a copy of its own.  Leaving closes the wrappers,
then the descriptor, then tells the broker: when the broker counts zero, it is zero.  A mapping
keeps the loan until it is unmapped, since an array may still look at it.

A plain loan shares the **open file description** (open(2)) with the broker and with every other
borrower: the offset, O_NONBLOCK and locks are everybody's.  So use `os.pread`, or ``mode="r"``.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import warnings
from time import CLOCK_BOOTTIME, clock_gettime, time
from typing import IO, TYPE_CHECKING, Any
from weakref import ref

from fdbroker.errors import ClosedLoanError, ForkedLoanError
from fdbroker.ipc import forks, wrappers
from fdbroker.ipc.pool import keep_until_exit

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from fdbroker.ipc.session import Lifeline, Session


class Loan:
    """What one borrow call got: one descriptor, or one of each of several names.

    Made by `Client.borrow` and `Client.borrow_all`.  Use it in a ``with``, or call `close`; one
    that is dropped unclosed is returned with a ResourceWarning.  Where a loan has several, the
    methods take the name of one of them.
    """

    __slots__ = ("__weakref__", "_fds", "_names", "_session", "_since", "_taken")

    def __init__(self, session: Session, names: Sequence[str], since: int) -> None:
        self._session = session
        self._names = names
        self._since = since
        self._fds = session.fds
        self._taken = iter((session,))  # who takes it ends the loan: it is there once

    @property
    def entry(self) -> str:
        """The name that was borrowed (the first of several); empty for a `SharedFD`."""
        return self._names[0]

    @property
    def entries(self) -> tuple[str, ...]:
        """All names that were borrowed, in the order asked for."""
        return tuple(self._names)

    @property
    def since(self) -> float:
        """When it was granted, in seconds since the epoch."""
        return time() - (clock_gettime(CLOCK_BOOTTIME) - self._since / 1e9)

    @property
    def closed(self) -> bool:
        """Whether it was returned or given away, or stayed with the parent at a fork."""
        return not self._fds or self._session.forked

    def fileno(self, name: str | None = None) -> int:
        """The descriptor's number; it stays the loan's.

        `ClosedLoanError` after the return; `ForkedLoanError` in a forked child that did not get
        this loan; LookupError for a `name` that is not among `entries`.
        """
        if not self._fds:
            raise ClosedLoanError(self.entry)
        if self._session.forked:
            raise ForkedLoanError(self.entry)
        if name is None:
            return self._fds[0]
        if name not in self._names:
            raise LookupError(f'this loan has no "{name}", it is of {", ".join(self._names)}')
        return self._fds[self._names.index(name)]

    def as_socket(self, name: str | None = None) -> socket.socket:
        """A socket object with a dup of its own, closed with the loan.  OSError if it is none.

        Its `settimeout` makes the *description* non-blocking, for the broker and all borrowers.
        """
        fd = self.fileno(name)
        with forks.GATE:
            sock = wrappers.socket_of(fd)
            self._session.wrappers.append(ref(sock))
        forks.catch_up()
        return sock

    def open(
        self, mode: str = "r", buffering: int = -1, *, name: str | None = None, **text: Any
    ) -> IO[Any]:
        """A file object with a dup of its own, as from the builtin `open`; closed with the loan.

        ``"w"`` does not truncate, and every mode goes on at the offset that all borrowers share.
        """
        fd = self.fileno(name)
        with forks.GATE:
            file = wrappers.file_of(fd, name or self.entry or "shared", mode, buffering, **text)
            self._session.wrappers.append(ref(file))
        forks.catch_up()
        return file

    def mmap(
        self,
        length: int = 0,
        *,
        access: int | None = None,
        offset: int = 0,
        name: str | None = None,
    ) -> mmap.mmap:
        """Map the file (mmap(2), shared): `length` bytes from `offset`, 0 is to its end.

        `access` is mmap.ACCESS_READ or ACCESS_WRITE, by default what the descriptor allows.  The
        loan ends when it is closed *and* the last mapping is, or was garbage-collected.
        """
        fd = self.fileno(name)
        if access is None:
            writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        with forks.GATE:
            mapping = _Mapping(fd, length, access=access, offset=offset)
            mapping.of = self._session, self._session.share_lifeline()
            self._session.mappings.append(ref(mapping))
        forks.catch_up()
        return mapping

    def detach(self) -> int:
        """The number, which is the caller's from now on; the loan stays out until this process
        ends, since nobody can know when the number is closed.  TypeError for a loan of several."""
        number = self.fileno()
        if len(self._fds) > 1:
            raise TypeError("a loan of several cannot be detached: borrow them one by one")
        for session in self._taken:
            self._fds = []
            session.give_away_descriptors()
            keep_until_exit(session)
        return number

    def pass_fds(self) -> tuple[int, ...]:
        """The descriptors and, last, the session: for ``subprocess.Popen(pass_fds=...)``.

        The loan then lasts until this process has closed it and the child has ended.
        """
        self.fileno()
        self._session.split = True
        return (*self._fds, self._session.sock.fileno())

    def close(self) -> None:
        """Return the loan.  Again: nothing happens.  Raises what a wrapper's last flush raised,
        after the loan is back."""
        for session in self._taken:
            self._fds = []
            session.close_loan()

    def __enter__(self) -> Loan:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        for session in getattr(self, "_taken", ()):  # an interrupted constructor has set none
            try:
                if not session.forked and not session.over:
                    warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            finally:
                forks.in_finalizer(session.close_loan)

    def __repr__(self) -> str:
        names = ", ".join(name or "shared" for name in self._names)
        return f"<Loan of {names}, {'closed' if self.closed else f'fd {self._fds[0]}'}>"


class _Mapping(mmap.mmap):
    """A mapping that holds its loan until it is unmapped."""

    of: tuple[Session, Lifeline] | None = None

    def close(self) -> None:
        """Unmap; BufferError while an array or a memoryview still looks at it."""
        with forks.GATE:  # a mapping has a descriptor of its own, which ends here
            super().close()
            self.of = None
        forks.catch_up()

    def _end(self) -> None:
        with contextlib.suppress(BufferError):  # what looks at it ends with it: they are a cycle
            self.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        forks.in_finalizer(self._end)
