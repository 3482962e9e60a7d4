"""FD: a descriptor that is closed exactly once, when its last reference is back.

After the Go package acln.ro/rc, with the order of Go's ``internal/poll``: who closes marks the FD
first, so that new users fail at once, and the last one out closes.  An FD goes down this list::

    uninitialized   FD() owns nothing yet
    live            init() adopted a number, incref() hands it out
    retired         by retire() or close(): no new reference; those that are out stay good
    closed          the last reference came back, and whoever brought it has closed
                    (or, from live: detach() has given the number away)

Two things hold all of it.  The *slot* is one integer: the number while live, negative otherwise.
The *tokens* are one list.  A reference is a ``None`` in it; a *right*, a string, is in it from
the start for each thing that must happen once: to init, to retire, to close.  Who does the thing
takes its right out.  What `list` does atomically is all the synchronisation there is:

- incref **publishes, then checks**: it adds its token, loads the slot once, and backs out if that
  is negative.  decref takes a token out, then looks at the slot.  retire changes the slot while
  it holds a token of its own, and gives that back as decref does.  So whoever retires sees the
  token of every incref that saw the FD live; and among retire and all decrefs, the one that comes
  last sees "retired, no reference".
- Everybody who sees that wants to close.  Who gets the right to close out of the list does it.

No lock is taken and nothing waits (but close and wait_closed, which say so): a finalizer and a
signal handler may do all of it.

**Interrupts.**  The exception of a signal handler (KeyboardInterrupt) comes up where the
interpreter looks for signals: after a call, where a function begins, at a jump backwards.  A right
is taken by a ``for`` over ``map(tokens.remove, ...)``, because between that and the first call
inside the loop there is no such place: no right is lost between its taking and its use.
`_settle` may be interrupted anywhere and done again, and who called it does it again.  What
remains: an exception before the first instruction of decref leaves the reference out, and one
within a ``close=`` that is written in Python is that function's own affair.

**Where.**  Claimed for what was tested: x86-64 with the GIL.  Elsewhere `_guard` puts a lock
around each look at the slot, which orders what the GIL orders here.

What an FD does not know: who else has a dup of its descriptor, in this process or another.
"""

from __future__ import annotations

import errno
import os
import sys
from itertools import repeat
from stat import S_IFMT
from warnings import warn

from fdbroker.errors import (
    ClosedFDError,
    CloseTimeout,
    FDBrokerError,
    MultipleInitError,
    ReferencedFDError,
    StolenFDError,
    UnbalancedDecrefError,
    UninitializedFDError,
)
from fdbroker.lifetime import LifetimeRegistry

__all__ = ["FD", "LifetimeRegistry", "close_func"]

TYPE_CHECKING = False  # as a type checker knows it; `typing` costs more to import than all this
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import NoReturn

    Close = Callable[[int], object]
    OnClosed = Callable[[OSError | None], object]

close_func: Close = os.close
"""What closes the number of every FD that was given no `close` of its own.  Looked up at close."""

# The slot: the number while live, ~number while retired (above -2**64, also for a handle), or:
_DETACHING, _UNINITIALIZED, _CLOSED, _DETACHED = -1 << 64, -2 << 64, -3 << 64, -4 << 64

# The list at the start.  A right is never on top of a reference, the floor never leaves; and with
# two of them at the bottom, `list` does not give its memory back each time the last reference goes.
_FLOOR, _INIT, _RETIRE, _CLOSE = "floor", "init", "retire", "close"


def identity(sysfd: int) -> int:
    """Device, inode and type of a descriptor (fstat(2)), in one integer.

    Different is surely another descriptor.  Equal is not surely the same one: eventfds, epolls and
    other anonymous inodes have it in common, and so have two descriptions of one file.
    Raises OSError (EBADF).
    """
    found = os.fstat(sysfd)
    return (found.st_dev << 64 | found.st_ino) << 4 | S_IFMT(found.st_mode) >> 12


class FD:
    """A reference-counted descriptor.

    ``FD(sysfd)`` adopts a number at once, ``FD()`` waits for `init`.  From then on the FD owns the
    number: nobody else may close it.  Every method may be called by any thread at any time.
    An FD that is garbage-collected unclosed closes, with a ResourceWarning.

    Adopting within the constructor has a gap that `init` has not: if KeyboardInterrupt comes out
    of it, the number was adopted and is closed already, or still is the caller's.
    """

    __slots__ = ("_close", "_error", "_identity", "_registry", "_sysfd", "_tokens", "_waiters")

    def __init__(self, sysfd: int | None = None, close: Close | None = None) -> None:
        self._sysfd = _UNINITIALIZED
        self._tokens: list[str | None] = [_FLOOR, _INIT, _RETIRE, _CLOSE]
        self._waiters: list[OnClosed] = []
        self._error: OSError | None = None
        self._registry: LifetimeRegistry | None = None
        if sysfd is not None:
            self.init(sysfd, close)

    def init(self, sysfd: int, close: Close | None = None) -> None:
        """Adopt `sysfd`: it is this FD's from here on, and the caller's still if this raises.

        `close` closes it, in place of `close_func`, and raises OSError if that fails.  It may be
        for something that is no descriptor, a Windows handle for one; so with it, and on Windows,
        nothing is looked up by fstat: neither here nor, to find a stolen number, at close.
        Raises MultipleInitError, ClosedFDError, OSError (EBADF: no such descriptor).
        """
        checked = close is None and os.name == "posix" and self._sysfd == _UNINITIALIZED
        found = identity(sysfd) if checked else None
        if sysfd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            for _ in map(self._tokens.remove, (_INIT,)):
                self._close, self._identity = close, found
                self._sysfd = sysfd
                if self._registry is not None:
                    self._track(self._registry)
                return
        except ValueError:  # the right was gone; the slot of who took it may not be set yet
            if (state := self._sysfd) >= 0 or state == _UNINITIALIZED:
                raise MultipleInitError(sysfd) from None
            raise ClosedFDError from None

    # --- references

    def incref(self) -> int:
        """Take a reference: the number stays open until `decref`, and stays this FD's.

        Raises ClosedFDError at once if this is retired, UninitializedFDError before `init`.
        """
        try:
            self._tokens.append(None)
            if (sysfd := self._sysfd) >= 0:
                return sysfd
            raise _refusal(sysfd)
        except MemoryError:
            raise  # from append: no token was added
        except BaseException:
            try:
                self._tokens.pop()
            finally:
                if self._sysfd < 0:
                    try:
                        self._settle()
                    finally:
                        self._settle()
            raise

    def decref(self) -> None:
        """Give a reference back; the last one of a retired FD closes it, here and now.

        Raises UnbalancedDecrefError if no reference is out.
        """
        try:
            if (token := self._tokens.pop()) is not None:
                self._put_back(token)
        finally:
            if self._sysfd < 0:
                try:
                    self._settle()
                finally:  # an interrupt may have come before it, or in the middle of it
                    self._settle()

    def use(self) -> AbstractContextManager[int]:
        """``with fd.use() as sysfd``: a reference for as long as the block runs.

        Entering raises what `incref` raises.
        """
        return self  # an object of its own would cost as much as the reference

    __enter__ = incref

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.decref()

    @property
    def refs(self) -> int:
        """How many references are out; for an instant also one that is about to be refused."""
        return self._tokens.count(None)

    @property
    def closed(self) -> bool:
        """Whether it has been closed or detached.  A retired one with references is not, yet."""
        return self._sysfd < _UNINITIALIZED

    # --- the end

    def retire(self, on_closed: OnClosed | None = None) -> None:
        """Refuse new references, and close when the last one is back; never waits.

        Whoever closes then calls ``on_closed(error)``, once, after it, in the thread it is in;
        that may be within this call.  `error` is the OSError of the close, or None; the number is
        gone in either case (close(2), "Dealing with error returns").  An exception of `on_closed`
        comes out of that thread's decref().  Raises ClosedFDError if it is retired or closed
        already, UninitializedFDError.
        """
        sysfd = self.incref()
        try:
            for _ in map(self._tokens.remove, (_RETIRE,)):
                self._sysfd = ~sysfd
                if on_closed is not None:
                    self._waiters += (on_closed,)
        except ValueError:
            raise ClosedFDError from None
        finally:
            try:
                self._tokens.pop()
            finally:
                try:
                    self._settle()
                finally:
                    self._settle()

    def close(self, timeout: float | None = None) -> None:
        """Retire it and wait until it has been closed, for `timeout` seconds at most.

        Who holds a reference must not wait: it would wait for itself.  Raises what `retire` and
        `wait_closed` raise; after CloseTimeout it stays retired, and the last decref closes.
        """
        self.retire()
        self.wait_closed(timeout)

    def wait_closed(self, timeout: float | None = None) -> None:
        """Wait until it has been closed or detached, for `timeout` seconds at most.

        Raises CloseTimeout; the OSError of the close, StolenFDError among them, after which the
        FD is closed all the same; UninitializedFDError.
        """
        if self._sysfd == _UNINITIALIZED:
            raise UninitializedFDError
        if not self.closed and not self._wait(timeout):
            raise CloseTimeout(timeout or 0.0, self.refs)
        if self._error is not None:
            raise self._error.with_traceback(None)

    def _wait(self, timeout: float | None) -> bool:
        from queue import Empty, SimpleQueue  # what few need costs a tenth of a start

        box: SimpleQueue[OSError | None] = SimpleQueue()
        put = box.put  # in C: runs whole, and takes no lock that a finalizer could find taken
        self._waiters.append(put)
        try:
            self._settle()  # publish, then check: it may have been closed just before
            box.get(timeout=None if timeout is None else max(timeout, 0.0))
        except Empty:
            return self.closed
        finally:
            try:  # noqa: SIM105 - contextlib.suppress costs an import
                self._waiters.remove(put)
            except ValueError:
                pass  # it was called
        return True

    def detach(self) -> int:
        """Give the number away: the caller owns it and closes it; this FD counts as closed.

        Raises ReferencedFDError while references are out, ClosedFDError, UninitializedFDError.
        A reference that another thread takes in the same instant may be refused though detach
        then fails, and so may a retire.
        """
        sysfd = self._sysfd
        if sysfd < 0:
            raise _refusal(sysfd)
        if refs := self.refs:
            raise ReferencedFDError(refs)
        take = self._tokens.remove
        try:
            for _ in zip(map(take, (_RETIRE,)), map(take, (_CLOSE,)), strict=True):  # both at once
                try:
                    self._sysfd = _DETACHING  # not ~sysfd, which tells others to close
                    if refs := self.refs:
                        raise ReferencedFDError(refs)
                    self._sysfd = _DETACHED
                    self._announce()
                    return sysfd
                except BaseException:
                    self._sysfd = sysfd
                    self._tokens[1:1] = _RETIRE, _CLOSE
                    raise
        except ValueError:  # of remove: another thread retires it
            raise ClosedFDError from None
        raise AssertionError  # the loop has one turn

    def __del__(self) -> None:
        try:
            if (state := self._sysfd) <= _UNINITIALIZED:
                return
        except AttributeError:
            return  # the constructor was interrupted
        try:
            warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
        finally:
            try:
                self._final_close(max(state, ~state))
            finally:  # see decref
                self._final_close(max(state, ~state))
                self._settle()
        if self._error is not None:
            raise self._error

    # --- how it closes

    def _settle(self) -> None:
        """Close, if it is retired and without references; call who waits, once it is closed."""
        state = self._sysfd
        if _DETACHING < state < 0 and None not in self._tokens:
            self._final_close(~state)
        if self.closed:
            self._announce()

    def _final_close(self, sysfd: int) -> None:
        """Close, if nobody else does.  Who gets the right also makes the slot say so."""
        problem = self._objection(sysfd)
        close = close_func if self._close is None else self._close
        try:
            for _ in map(self._tokens.remove, (_CLOSE,)):
                try:
                    if problem is None:
                        close(sysfd)
                except OSError as error:
                    problem = error
                except Exception as error:
                    problem = OSError(f"close={close!r} raised {error!r}, which is no OSError")
                finally:
                    if problem is not None:
                        problem.__traceback__ = None  # it would keep all callers' frames
                    self._error = problem
                    self._sysfd = _CLOSED
        except ValueError:
            pass  # somebody else closes

    def _objection(self, sysfd: int) -> OSError | None:
        """Why the number must not be closed: it is surely not the descriptor that was adopted."""
        if self._identity is None:
            return None
        try:
            if identity(sysfd) == self._identity:
                return None
        except OSError as error:  # on a dead file server, fstat may fail in other ways
            return error if error.errno == errno.EBADF else None
        return StolenFDError(sysfd)

    def _announce(self) -> None:
        """Call each waiter once, whatever the ones before it raised."""
        failure: BaseException | None = None
        try:
            for on_closed in map(self._waiters.pop, repeat(0)):
                try:
                    on_closed(self._error)
                except BaseException as error:
                    failure = error
        except IndexError:
            pass  # all were called
        if failure is not None:
            try:
                raise failure
            finally:
                del failure

    # --- the rest

    def track_lifetime(self, registry: LifetimeRegistry | None) -> None:
        """Have `registry` record the init and the close of this FD; None: nobody does.

        Called after init, it records that init with the stack of this call.
        """
        self._registry = registry
        if registry is not None and self._sysfd >= 0:
            self._track(registry)

    def _track(self, registry: LifetimeRegistry) -> None:
        self._waiters.append(registry.opened(self._sysfd))
        self._settle()

    def _put_back(self, right: str) -> NoReturn:
        self._tokens.insert(1, right)
        raise UnbalancedDecrefError

    def __reduce__(self) -> NoReturn:
        raise TypeError("an FD cannot be copied or pickled: two would own one number; share() it")

    def __repr__(self) -> str:
        state, refs = self._sysfd, self.refs
        named = {_UNINITIALIZED: "uninitialized", _CLOSED: "closed", _DETACHED: "detached"}
        named[_DETACHING] = "about to be detached"
        says = named.get(state) or (f"{state}" if state >= 0 else f"{~state} retired")
        return f"<FD {says}, {refs} reference{'s'[: refs != 1]}>"


def _refusal(state: int) -> FDBrokerError:
    """Why it was refused by who saw this in the slot; it may say something else by now."""
    return UninitializedFDError() if state == _UNINITIALIZED else ClosedFDError()


def _guard(fd_class: type[FD]) -> None:
    """Put every load and store of the slot under one lock, with all that it orders.

    Not as safe from interrupts: one may now come within a store, after a right was taken.
    """
    from threading import RLock  # recursive: a finalizer may come in between

    slot, lock = fd_class.__dict__["_sysfd"], RLock()

    def load(fd: FD) -> int:
        with lock:
            return slot.__get__(fd)  # type: ignore[no-any-return]

    def store(fd: FD, state: int) -> None:
        with lock:
            slot.__set__(fd, state)

    def renew() -> None:
        nonlocal lock
        lock = RLock()

    setattr(fd_class, "_sysfd", property(load, store))  # noqa: B010 - as a type, it is a slot
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)  # another thread of the parent may have held it


def _lock_free() -> bool:
    return (
        os.name == "posix"
        and os.uname().machine == "x86_64"
        and sys.implementation.name == "cpython"
        and getattr(sys, "_is_gil_enabled", lambda: True)()
    )


if not _lock_free():
    _guard(FD)
