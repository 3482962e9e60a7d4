"""A loan in the hands of its borrower.

The descriptor is the loan's: use `fileno()` as long as the loan is open, and do not close it.
What `as_socket`, `open` and `mmap` give owns a copy of its own.  Leaving closes the wrappers,
then the descriptor, then tells the broker: when the broker counts zero, it is zero.  A mapping
keeps the loan until it is unmapped, since an array may still look at it.

A plain loan shares the **open file description** (open(2)) with the broker and with every other
borrower: the offset, O_NONBLOCK and locks are everybody's.  So use `os.pread`, or ``mode="r"``.
"""

from __future__ import annotations

import fcntl
import os
from time import CLOCK_BOOTTIME, clock_gettime, time

from fdbroker.errors import ClosedLoanError, ForkedLoanError
from fdbroker.ipc.client import fork
from fdbroker.ipc.client.connection import until_exit
from fdbroker.ipc.client.fork import GATE, catching_up
from fdbroker.ipc.client.session import RETURN_HEAD
from fdbroker.ipc.protocol.messages import HEAD
from fdbroker.ipc.transport import received as owned
from fdbroker.ipc.transport.unix import SEND_NOW

TYPE_CHECKING = False  # as a type checker knows it: `typing` costs too much at a start
if TYPE_CHECKING:
    import mmap
    import socket
    from types import TracebackType
    from typing import IO, Any, NoReturn

    from fdbroker.ipc.client.holding import Holding
    from fdbroker.ipc.client.session import Session

pack_head = HEAD.pack


class Loan:
    """What one borrow call got: one descriptor, or one of each of several names.

    Made by `Client.borrow` and `Client.borrow_all`.  Use it in a ``with``, or call `close`; one
    that is dropped unclosed is returned with a ResourceWarning.  Where a loan has several, the
    methods take the name of one of them.

    It is what holds its session, and nothing else does; so a dropped loan ends its session, which
    returns the loan.  Its fields are set by who makes it (borrowing.py): an `__init__`, or a
    `__del__`, would take longer than all else that is done for it.
    """

    __slots__ = ("__weakref__", "_names", "_session", "_since")
    _names: tuple[str, ...]
    _session: Session  # who deletes it ends the loan: that succeeds once
    _since: int  # in nanoseconds of CLOCK_BOOTTIME

    @property
    def entry(self) -> str:
        """The name that was borrowed (the first of several); empty for a `SharedFD`."""
        return self._names[0]

    @property
    def entries(self) -> tuple[str, ...]:
        """All names that were borrowed, in the order asked for."""
        return self._names

    @property
    def since(self) -> float:
        """When it was granted, in seconds since the epoch."""
        return time() - (clock_gettime(CLOCK_BOOTTIME) - self._since / 1e9)

    @property
    def closed(self) -> bool:
        """Whether it was returned or given away, or stayed with the parent at a fork."""
        session = getattr(self, "_session", None)
        return session is None or session.forked

    def fileno(self, name: str | None = None) -> int:
        """The descriptor's number; it stays the loan's.

        `ClosedLoanError` after the return; `ForkedLoanError` in a forked child that did not get
        this loan; LookupError for a `name` that is not among `entries`.
        """
        fds = self._held().fds
        if name is None:
            return fds[0]
        if name not in self._names:
            raise LookupError(f'this loan has no "{name}", it is of {", ".join(self._names)}')
        return fds[self._names.index(name)]

    def _held(self) -> Session:
        try:
            session = self._session
        except AttributeError:
            raise ClosedLoanError(self.entry) from None
        if session.forked:
            raise ForkedLoanError(self.entry)
        return session

    def _holding(self) -> Holding:
        """Where a wrapper or a mapping is noted.  Under the gate, as is what it is made of: else
        another thread may close the loan, and a stranger has its number."""
        from fdbroker.ipc.client.holding import Holding  # a loan that has none needs no code for it

        session = self._held()
        if session.holding is None:
            session.holding = Holding()
        return session.holding

    def as_socket(self, name: str | None = None) -> socket.socket:
        """A socket object with a dup of its own, closed with the loan.  OSError if it is none.

        Its `settimeout` makes the *description* non-blocking, for the broker and all borrowers.
        """
        with catching_up, GATE:
            from fdbroker.ipc.client import wrappers  # a fork meanwhile would share its open file

            holding = self._holding()
            sock = wrappers.socket_of(self.fileno(name))
            holding.add_wrapper(sock)
        return sock

    def open(
        self, mode: str = "r", buffering: int = -1, *, name: str | None = None, **text: Any
    ) -> IO[Any]:
        """A file object with a dup of its own, as from the builtin `open`; closed with the loan.

        ``"w"`` does not truncate, and every mode goes on at the offset that all borrowers share.
        """
        called = name or self.entry or "shared"
        with catching_up, GATE:
            from fdbroker.ipc.client import wrappers

            holding = self._holding()
            file = wrappers.file_of(self.fileno(name), called, mode, buffering, **text)
            holding.add_wrapper(file)
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
        with catching_up, GATE:
            import mmap

            from fdbroker.ipc.client.holding import Lifeline
            from fdbroker.ipc.client.mapping import Mapping

            session, holding = self._held(), self._holding()
            fd = self.fileno(name)
            if access is None:
                writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
                access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            mapping = Mapping(fd, length, access=access, offset=offset)
            if holding.lifeline is None:
                holding.lifeline = Lifeline(session)
            mapping.of = session, holding.lifeline
            holding.add_mapping(mapping)
        return mapping

    def detach(self) -> int:
        """The number, which is the caller's from now on; the loan stays out until this process
        ends, since nobody can know when the number is closed.  TypeError for a loan of several."""
        with catching_up, GATE:
            session = self._held()
            if len(session.fds) > 1:
                raise TypeError("a loan of several cannot be detached: borrow them one by one")
            try:
                del self._session
            except AttributeError:  # another thread has just closed it
                raise ClosedLoanError(self.entry) from None
            session.kept = True
            until_exit.add(session)
            owned.give_away(session.owned)
            return session.fds[0]

    def pass_fds(self) -> tuple[int, ...]:
        """The descriptors and, last, the session: for ``subprocess.Popen(pass_fds=...)``.

        The loan then lasts until this process has closed it and the child has ended.  Once this
        process has ended its private broker there is no session any more.
        """
        with catching_up, GATE:
            session = self._held()
            session.split = True
            number = session.sock.fileno()
            return session.fds if number < 0 else (*session.fds, number)

    def close(self) -> None:
        """Return the loan.  Again: nothing happens.  Raises what a wrapper's last flush raised,
        after the loan is back."""
        try:
            session = self._session
            del self._session
        except AttributeError:  # a second time, or another thread was first
            return
        if session.holding is not None:
            session.close_loan()
            return
        try:  # what `close_loan` does, written out for the usual case
            received = session.owned
            if fork.other_threads():
                with catching_up, GATE:
                    owned.close(received)
            else:
                for rights in received:
                    any(rights)
                received.clear()
            session.thread = 0  # from here on a fork splits it no more
            if session.split:
                session.end()
                return
            session.seq = seq = session.seq + 1
            send = session.send
            send(pack_head(RETURN_HEAD, seq), SEND_NOW)
        except BaseException as error:
            session.end()
            if not isinstance(error, OSError):
                raise
        else:  # once it is in the pool it may be another thread's
            pool = session.pool
            pool.idle.append(session)
            if pool.closed:
                pool.close()

    def __enter__(self) -> Loan:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a loan cannot be copied or pickled: share() what is to be borrowed there")

    def __repr__(self) -> str:
        names = ", ".join(name or "shared" for name in self._names)
        session = getattr(self, "_session", None)
        state = "closed" if session is None or session.forked else f"fd {session.fds[0]}"
        return f"<Loan of {names}, {state}>"
