"""A loan in the hands of its borrower.

The descriptor is the loan's: use `fileno()` as long as the loan is open, and do not close it.  What
`as_socket`, `open` and `mmap` give owns a duplicate.  Leaving closes the wrappers, then the
descriptor, and then tells the broker: when the broker counts zero loans, there are zero.  A mapping
keeps the loan until it is unmapped, since an array may still look at it (wrappers.py).

A plain loan shares the **open file description** (open(2)) with the broker and with every other
borrower: the offset, O_NONBLOCK and locks are common to all.  So use `os.pread`, or ``mode="r"``.

**The fast path.**  Every loan pays for `Loan.close`.  So its usual case, a loan without wrappers
that no fork has shared, is written out in that one method.  The slow twin, which must do the same,
is `Session.close_loan` with `Session.return_loan`; tests/ipc/test_fast_path.py holds the two
together.  The imports that would add to the start of ``fdbroker exec`` are left to client.py.
"""

from __future__ import annotations

from time import CLOCK_BOOTTIME, clock_gettime, time

from fdbroker.errors import ClosedLoanError, ForkedLoanError
from fdbroker.ipc.client import fork
from fdbroker.ipc.client.connection import kept_until_exit
from fdbroker.ipc.client.fork import FORK_LOCK, deferred_cleanup
from fdbroker.ipc.client.session import RETURN_HEAD
from fdbroker.ipc.protocol.codec import HEAD
from fdbroker.ipc.transport import SEND_NOW

TYPE_CHECKING = False  # importing `typing` would add to the start of `fdbroker exec`
if TYPE_CHECKING:
    import mmap
    import socket
    from types import TracebackType
    from typing import IO, Any, NoReturn

    from fdbroker.ipc.client.session import Session
    from fdbroker.ipc.client.wrappers import LoanWrappers

pack_head = HEAD.pack


class Loan:
    """What one borrow call got: one descriptor, or one of each of several names.

    Made by `Client.borrow` and `Client.borrow_all`.  Use it in a ``with``, or call `close`; one
    that is dropped unclosed is returned with a ResourceWarning.  Where a loan has several, the
    methods take the name of one of them.

    Only the loan holds its session, so a dropped loan ends its session, which returns the loan.
    Its fields are set by `borrow` (borrow.py), without the cost of an `__init__`.
    """

    __slots__ = ("__weakref__", "_names", "_session", "_since")
    _names: tuple[str, ...]
    _session: Session  # whoever deletes the attribute ends the loan: that succeeds once
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
        return session is None or session.left_to_parent

    def fileno(self, name: str | None = None) -> int:
        """Return the descriptor's number, which stays the loan's to close.

        `ClosedLoanError` after the return; `ForkedLoanError` in a forked child that did not get
        this loan; LookupError for a `name` that is not among `entries`.
        """
        fds = self._open_session().fds
        if name is None:
            return fds[0]
        if name not in self._names:
            raise LookupError(f'this loan has no "{name}", it is of {", ".join(self._names)}')
        return fds[self._names.index(name)]

    def _open_session(self) -> Session:
        try:
            session = self._session
        except AttributeError:
            raise ClosedLoanError(self.entry) from None
        if session.left_to_parent:
            raise ForkedLoanError(self.entry)
        return session

    def _wrappers(self) -> LoanWrappers:
        """Return what makes and notes wrappers and mappings; under the fork lock."""
        # client.py has imported this module already: see there.
        from fdbroker.ipc.client.wrappers import LoanWrappers

        session = self._open_session()
        if session.wrappers is None:
            session.wrappers = LoanWrappers()
        return session.wrappers

    def as_socket(self, name: str | None = None) -> socket.socket:
        """Return a socket object with a duplicate of its own, which is closed with the loan.

        OSError if the descriptor is no socket.
        Its `settimeout` makes the *description* non-blocking, for the broker and all borrowers.
        """
        with deferred_cleanup, FORK_LOCK:
            return self._wrappers().add_socket(self.fileno(name))

    def open(
        self, mode: str = "r", buffering: int = -1, *, name: str | None = None, **text: Any
    ) -> IO[Any]:
        """Return a file object with a duplicate of its own, which is closed with the loan.

        mode, buffering, text: as for the builtin `open`.
        ``"w"`` does not truncate, and every mode goes on at the offset that all borrowers share.
        """
        called = name or self.entry or "shared"
        with deferred_cleanup, FORK_LOCK:
            return self._wrappers().add_file(self.fileno(name), called, mode, buffering, **text)

    def mmap(
        self,
        length: int = 0,
        *,
        access: int | None = None,
        offset: int = 0,
        name: str | None = None,
    ) -> mmap.mmap:
        """Map the file (mmap(2), shared): `length` bytes from `offset`; 0 maps it to its end.

        access: mmap.ACCESS_READ or ACCESS_WRITE, by default what the descriptor allows.  The loan
        ends when it is closed *and* the last mapping is closed or was garbage-collected.
        """
        with deferred_cleanup, FORK_LOCK:
            session, wrappers = self._open_session(), self._wrappers()
            return wrappers.add_mapping(session, self.fileno(name), length, access, offset)

    def detach(self) -> int:
        """Return the number, which is the caller's to close from now on.

        The loan stays out until this process ends, since nothing tells when the number is closed.
        TypeError for a loan of several.
        """
        with deferred_cleanup, FORK_LOCK:
            session = self._open_session()
            if len(session.fds) > 1:
                raise TypeError("a loan of several cannot be detached: borrow them one by one")
            try:
                del self._session
            except AttributeError:  # another thread has just closed it
                raise ClosedLoanError(self.entry) from None
            session.detached = True
            kept_until_exit.add(session)
            session.received.detach()
            return session.fds[0]

    def pass_fds(self) -> tuple[int, ...]:
        """Return the descriptors and, last, the session: for ``subprocess.Popen(pass_fds=...)``.

        The loan then lasts until this process has closed it and the child has ended.  Once this
        process has ended its private broker there is no session any more.
        """
        with deferred_cleanup, FORK_LOCK:
            session = self._open_session()
            session.shared_by_fork = True
            number = session.link.fileno()
            return session.fds if number < 0 else (*session.fds, number)

    def close(self) -> None:
        """Return the loan; a second call does nothing.

        Raises what a wrapper's last flush raised, after the loan is back.
        """
        try:
            session = self._session
            del self._session
        except AttributeError:  # it is closed, or another thread is about to close it
            return
        if session.wrappers is not None:
            session.close_loan()
            return
        try:  # the fast path: what `close_loan` does when there are no wrappers
            if fork.other_threads():
                with deferred_cleanup, FORK_LOCK:
                    session.received.close()
            else:
                messages = session.messages
                for closer in messages:
                    any(closer)
                messages.clear()
            session.thread = 0  # from here on a fork does not share the session any more
            if session.shared_by_fork:
                session.end()
                return
            session.seq = seq = session.seq + 1
            send = session.send
            send(pack_head(RETURN_HEAD, seq), SEND_NOW)
        except BaseException as error:
            session.end()
            if not isinstance(error, OSError):
                raise
        else:
            session.release(session)  # from here on it may be another thread's

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
        if session is None or session.left_to_parent:
            return f"<Loan of {names}, closed>"
        return f"<Loan of {names}, fd {session.fds[0]}>"
