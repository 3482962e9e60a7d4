"""Sessions: a `Session` carries requests and loans, a `PutSession` sends descriptors.

The two kinds are kept apart because a fork would give a child a copy of a session with a loan,
and with it a part in the entries that a session that puts may own.

A **Session** carries one request after the other, or one loan.  It is that loan's lifeline, so it
also owns what the loan brought and what was made of it.  Its states:

    idle -> busy      a thread took it from the client's pool for a request
    busy -> idle      the answer is there, or the loan was returned
    busy -> lent      the answer is a loan, and a `Loan` holds the session
    lent -> shared    the process forked, or gave a copy away: no more messages (fork.py)
    any  -> closed    an error in the middle of a request, too, ends here

The end of a session returns its loan.  So an interrupted request needs no other way back, and
neither does a loan that is dropped: its session goes with it.

A **PutSession** owns the ephemeral entries that it put: they retire when it ends.  So as long as it
owns any, an error in one more put does not end it.  Instead that put is undone, if it made a new
entry, which no other client knows yet: CANCEL, right after a PUT, retires what the PUT made.  The
session itself is *broken*, since an answer is still to come on it: it lives on for the sake of its
entries, and the next put takes another session.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from fdbroker.errors import ProtocolError
from fdbroker.ipc.client import fork
from fdbroker.ipc.client.connection import ClientConnection, kept_until_exit
from fdbroker.ipc.protocol.codec import HEAD, check_reply, template
from fdbroker.ipc.protocol.messages import BORROW, EPHEMERAL, MORE, PUT, REPLACE, RETURN
from fdbroker.ipc.transport import SEND, SEND_NOW
from fdbroker.ipc.transport.rlimit import too_many_files

TYPE_CHECKING = False  # importing `typing` would add to the start of `fdbroker exec`
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from fdbroker.ipc.client.wrappers import LoanWrappers

NO_THREAD = -1  # no thread has this identity
RETURN_HEAD, _ = template(RETURN)


class Session(ClientConnection):
    """A connection that receives descriptors and never sends any.

    release: is called with the session when it is idle again.
    fds, names: of its loan, in the order of the borrow.
    thread: the thread whose forked children share its loan; NO_THREAD, or 0 without a loan.
    detached: its descriptor was given away, so it is open until the process ends.
    wrappers: what was made of its loan, if anything.
    """

    __slots__ = ("detached", "fds", "names", "release", "thread", "wrappers")
    sends_fds = False
    fds: tuple[int, ...]
    names: Sequence[str]

    def __init__(self, address: str, release: Callable[[Session], None]) -> None:
        self.release = release
        self.thread = 0
        self.detached = False
        self.wrappers: LoanWrappers | None = None
        super().__init__(address)

    # --- a loan comes and goes: the slow twins of `borrow` (borrow.py) and `Loan.close` ---

    def take_loan(self, seq: int, total: int, timeout: float | None) -> tuple[tuple[int, ...], int]:
        """Receive what request `seq` borrowed, `total` descriptors in any number of parts.

        A message was received already; it may be a refusal, a reply to another request, or the
        first part.  Returns the descriptors, which `received` owns, and since when they are lent
        (nanoseconds of CLOCK_BOOTTIME).
        """
        code, fields, fds, lost = self.reply(seq, timeout, waited=True)
        if code:
            self.received.close()
        check_reply(BORROW, code, fields)
        self._check_promise(fields, fds, lost)
        granted, _, since = fields
        if granted != total or type(since) is not int or not 0 <= since < 2**64:
            raise ProtocolError("broker", "the loan is of another number of entries")
        while len(fds) < total:
            self.send(self.next(template(MORE, len(fds))), SEND)
            code, fields, part, lost = self.reply(self.seq)
            if code:
                self.end()
            check_reply(MORE, code, fields)
            self._check_promise(fields, part, lost)
            if not part:
                raise ProtocolError("broker", "a part of the loan brought nothing")
            fds += part
        if len(fds) > total:
            raise ProtocolError("broker", "more descriptors came than were asked for")
        return fds, since

    def _check_promise(self, fields: list[Any], fds: tuple[int, ...], lost: bool) -> None:
        """Check that all descriptors came that the reply speaks of.

        Raises `ProtocolError` for too many; `TooManyFiles`, with the session ended, for too few.
        """
        _, promised, _ = fields
        if type(promised) is not int or len(fds) > promised:
            raise ProtocolError("broker", "more descriptors came than it promised")
        if lost or len(fds) < promised:
            error = too_many_files("client")
            self.end()
            raise error

    def close_loan(self) -> None:
        """Close the wrappers, then the descriptors, then return the loan.

        If there are mappings, the last of them returns it.  An error of a wrapper's last flush is
        raised when all that is done.
        """
        if self.closed or self.left_to_parent:
            return
        error, wrappers = None, self.wrappers
        try:
            if wrappers is not None:
                error = wrappers.flush()
            with fork.deferred_cleanup, fork.FORK_LOCK:
                if wrappers is not None:
                    failure = wrappers.close(self.fds)
                    error = error or failure
                self.received.close()
        except BaseException:
            self._end_dropped()
            raise
        if wrappers is None or wrappers.mapping_ref is None:
            self.return_loan()  # from here on the session may be another thread's
        else:
            wrappers.return_pending = True
            wrappers.mapping_ref = None
        if error is not None:
            raise error

    def return_loan(self) -> None:
        """Send RETURN and release the session; everything that the loan brought is closed."""
        # From here on a fork does not share the session any more, so it is asked now if one did.
        self.thread = 0
        self.wrappers = None
        if self.shared_by_fork:
            self.end()
            return
        self.seq += 1
        try:
            self.send(HEAD.pack(RETURN_HEAD, self.seq), SEND_NOW)
        except OSError:
            # The broker is gone, or has stopped with a full queue.  The end is a return, too.
            self.end()
        else:
            self.release(self)

    def disconnect(self) -> None:
        """Return a loan now, and let it keep its descriptors until it is closed.

        The share that a forked child has in it lasts.  A session without a loan stays as it is.
        """
        with fork.deferred_cleanup, fork.FORK_LOCK:
            if self.thread or self.wrappers is not None:
                shared, self.shared_by_fork = self.shared_by_fork, True  # its close sends nothing
                if shared:
                    self.link.close()
                else:
                    self.link.end()

    def end(self) -> None:
        """Close everything; the broker sees the end of the session once no copy is left."""
        self.thread = 0
        super().end()

    def __del__(self) -> None:
        if getattr(self, "closed", True):  # an interrupted constructor may not have set it
            return
        wrappers = self.wrappers
        was_closed = (
            self.detached
            or self.left_to_parent
            or (wrappers is not None and wrappers.return_pending)
        )
        try:
            if self.thread and not was_closed:
                names = ", ".join(name or "shared" for name in self.names)
                unclosed = f"unclosed <Loan of {names}, fd {self.fds[0]}>"
                warnings.warn(unclosed, ResourceWarning, stacklevel=2)
        finally:
            try:
                if wrappers is not None:
                    wrappers.flush()  # not under the lock: it may take its time
            finally:
                fork.run_or_defer(self._end_dropped)

    def _end_dropped(self) -> None:
        try:
            if self.wrappers is not None:
                with fork.deferred_cleanup, fork.FORK_LOCK:
                    self.wrappers.close(self.fds)
        finally:
            self.end()

    # --- the fork rule; the fork lock is held ---

    def mark_at_fork(self, thread: int, in_child: bool) -> None:
        """Share a loan that `thread`, which forks, shares; all else stays with the parent."""
        if in_child:
            self.shared_by_fork = True
            shared = self.detached or self.thread == thread
            self.left_to_parent = self.left_to_parent or not shared
        elif self.thread == thread or (self.wrappers is not None and self.wrappers.mapped):
            self.shared_by_fork = True

    def close_in_child(self) -> None:
        """Close what stayed with the parent.

        A mapping that is in use keeps its copy of the session until it is unmapped.
        """
        if not self.left_to_parent or self.closed:
            return
        wrappers, mapped = self.wrappers, False
        if wrappers is not None:
            wrappers.close_sockets_in_child(self.fds)
        self.received.close()  # so that there is a number free for what comes now
        if wrappers is not None:
            mapped = wrappers.drop_in_child()
        if not mapped:
            self.end()


# How a put that raised has left its session:
NOT_SENT = "not sent"  # the request never left, so the session is as it was before
UNANSWERED = "unanswered"  # the answer is still to come, and the session must live on
LOST = "lost"  # there is no connection any more, or nothing to keep it for


class PutSession(ClientConnection):
    """A connection that sends descriptors and never receives any.

    owns_ephemeral: an ephemeral entry is, or may be, its own.
    broken: an answer is still to come, so no other request may be sent.
    """

    __slots__ = ("broken", "owns_ephemeral")
    sends_fds = True

    def __init__(self, address: str) -> None:
        self.owns_ephemeral = False
        self.broken = False
        super().__init__(address)

    def put(self, name: str, flags: int, fd: int) -> list[Any]:
        """Have the broker keep a copy of `fd`; returns the generation and the ticket."""
        seq, owned_before = self.seq, self.owns_ephemeral
        sent: list[int] = []
        try:
            message = self.next(template(PUT, name, flags))
            self._set_ownership(owned_before or flags & EPHEMERAL != 0)
            self.link.put(message, fd, sent)
            code, reply, _, _ = self.reply(self.seq)
            self.received.close()  # no descriptors were promised
            if not code:
                check_reply(PUT, code, reply)
        except BaseException as error:
            if not sent and isinstance(error, ConnectionResetError):
                # The broker died with something of ours unread, so this was not sent.
                error = BrokenPipeError()
            outcome = self._outcome_of(error, bool(sent), owned_before)
            if outcome is NOT_SENT:
                self.seq = seq
                self._set_ownership(owned_before)
            elif outcome is UNANSWERED:
                self.broken = True
                if not flags & REPLACE:  # that cannot be undone: the old entry has retired
                    self.cancel()
            else:
                kept_until_exit.discard(self)
                self.end_unless_refused(error)
            raise
        if code:
            self._set_ownership(owned_before)
            check_reply(PUT, code, reply)
        return reply

    def _outcome_of(self, error: BaseException, sent: bool, owned_before: bool) -> str:
        if self.is_stale(error) or isinstance(error, ConnectionResetError):
            return LOST
        if not sent:
            return NOT_SENT
        return UNANSWERED if owned_before else LOST

    def _set_ownership(self, owns: bool) -> None:
        """Note whether the session owns entries, so that it lives on whatever its client does."""
        self.owns_ephemeral = owns
        if owns:
            kept_until_exit.add(self)
        else:
            kept_until_exit.discard(self)
