"""A session that lends: it carries one request after the other, or one loan.

It is that loan's lifeline, so it also owns what the loan brought and what was made of it.  What
befalls it:

    idle -> busy      a thread took it from the client's pool for a request
    busy -> idle      the answer is there, or the loan was returned
    busy -> lent      the answer is a loan, and a `Loan` holds the session
    lent -> split     the process forked, or gave a copy away: no more messages (see fork.py)
    any  -> over      closed; whatever goes wrong in the middle of a request ends here

The end of a session returns its loan, so an interrupted request needs no other way back, nor
does a loan that is dropped: with it goes its session.
"""

from __future__ import annotations

import warnings

from fdbroker.errors import ProtocolError
from fdbroker.ipc.client import fork
from fdbroker.ipc.client.connection import Wire
from fdbroker.ipc.protocol.messages import BORROW, HEAD, MORE, RETURN, check_reply, template
from fdbroker.ipc.transport import received as owned
from fdbroker.ipc.transport import unix
from fdbroker.ipc.transport.rlimit import too_many_files

TYPE_CHECKING = False  # as a type checker knows it: `typing` costs too much at a start
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from fdbroker.ipc.client.holding import Holding
    from fdbroker.ipc.client.pool import Pool

NOBODY = -1  # no thread has this identity
RETURN_HEAD, _ = template(RETURN)


class Session(Wire):
    """One connection that receives descriptors and never sends any."""

    __slots__ = ("fds", "holding", "kept", "names", "pool", "thread")
    puts = False
    fds: tuple[int, ...]  # the numbers of its loan, in the order of ...
    names: Sequence[str]  # ... what was borrowed

    def __init__(self, address: str, pool: Pool) -> None:
        self.pool = pool  # where it goes when it is idle again
        self.thread = 0  # who shares its loan with a forked child: 0 is no loan, NOBODY no one
        self.kept = False  # a number was given away: open until the process ends
        self.holding: Holding | None = None  # what was made of its loan, if anything
        super().__init__(address)

    # --- what is unusual in a borrow or a return; borrowing.py and loan.py have the usual ---

    def take_loan(self, seq: int, total: int, timeout: float | None) -> tuple[tuple[int, ...], int]:
        """The descriptors of a loan of so many entries, and since when it has them.

        A message is there already: a refusal, a foreign one, the first part of many.
        """
        code, fields, numbers, lost = self.reply(seq, timeout, waited=True)
        if code:
            owned.close(self.owned)
        check_reply(BORROW, code, fields)
        self._check_promise(fields, numbers, lost)
        granted, _, since = fields
        if granted != total or type(since) is not int or not 0 <= since < 2**64:
            raise ProtocolError("broker", "the loan is of another number of entries")
        while len(numbers) < total:
            self.send(self.next(template(MORE, len(numbers))), unix.SEND)
            code, fields, part, lost = self.reply(self.seq)
            if code:
                self.end()
            check_reply(MORE, code, fields)
            self._check_promise(fields, part, lost)
            if not part:
                raise ProtocolError("broker", "a part of the loan brought nothing")
            numbers += part
        if len(numbers) > total:
            raise ProtocolError("broker", "more descriptors came than were asked for")
        return numbers, since

    def _check_promise(self, fields: list[Any], numbers: tuple[int, ...], lost: bool) -> None:
        """Whether all descriptors came that the payload speaks of; else the session ends."""
        _, promised, _ = fields
        if type(promised) is not int or len(numbers) > promised:
            raise ProtocolError("broker", "more descriptors came than it promised")
        if lost or len(numbers) < promised:
            error = too_many_files("client")
            self.end()
            raise error

    def close_loan(self) -> None:
        """Close the wrappers, then the descriptors, then return the loan, or leave that to the
        last mapping.  An error of a wrapper's last flush is raised after that."""
        if self.over or self.forked:
            return
        error, holding = None, self.holding
        try:
            if holding is not None:
                error = holding.flush()
            with fork.catching_up, fork.GATE:
                if holding is not None:
                    failure = holding.close_wrappers(self.fds)
                    error = error or failure
                owned.close(self.owned)
        except BaseException:
            self._end_dropped()
            raise
        if holding is None or holding.lifeline is None:
            self.let_go()  # from here on it may be another thread's
        else:
            holding.returning = True
            holding.lifeline = None
        if error is not None:
            raise error

    def let_go(self) -> None:
        """Everything is closed: RETURN, and go back to the pool."""
        self.thread = 0  # from here on a fork splits it no more, so it is looked at now
        self.holding = None
        if self.split:
            self.end()
            return
        self.seq += 1
        try:
            self.send(HEAD.pack(RETURN_HEAD, self.seq), unix.SEND_NOW)
        except OSError:  # a stopped broker's full queue, or no broker: the end is a return too
            self.end()
        else:
            self.pool.give(self)

    def cut_off(self) -> None:
        """If it carries a loan, that is returned now, but keeps its descriptors until it is closed.
        What a forked child has of it goes on."""
        with fork.catching_up, fork.GATE:
            if self.thread or self.holding is not None:
                if not self.split:
                    unix.shut_down(self.sock)
                self.split = True  # so its close sends nothing
                self.sock.close()

    def end(self) -> None:
        """Close everything; the broker sees the end of the session once no copy is left."""
        self.thread = 0
        super().end()

    def __del__(self) -> None:
        if getattr(self, "over", True):  # an interrupted constructor may not have set it
            return
        holding = self.holding
        closed = self.kept or self.forked or (holding is not None and holding.returning)
        try:
            if self.thread and not closed:
                names = ", ".join(name or "shared" for name in self.names)
                unclosed = f"unclosed <Loan of {names}, fd {self.fds[0]}>"
                warnings.warn(unclosed, ResourceWarning, stacklevel=2)
        finally:
            try:
                if holding is not None:
                    holding.flush()  # not under the gate: it may take its time
            finally:
                fork.in_finalizer(self._end_dropped)

    def _end_dropped(self) -> None:
        try:
            if self.holding is not None:
                with fork.catching_up, fork.GATE:
                    self.holding.close_wrappers(self.fds)
        finally:
            self.end()

    # --- the fork rule; the gate is held ---

    def mark_at_fork(self, thread: int, in_child: bool) -> None:
        """A shared loan of the forking thread is split, all else stays with the parent."""
        if in_child:
            self.split = True
            self.forked = self.forked or not (self.kept or self.thread == thread)
        elif self.thread == thread or (self.holding is not None and self.holding.mapped):
            self.split = True

    def close_in_child(self) -> None:
        """What stayed with the parent; a mapping that is looked at keeps its copy until it goes."""
        if not self.forked or self.over:
            return
        holding, mapped = self.holding, False
        if holding is not None:
            holding.close_sockets_in_child(self.fds)
        owned.close(self.owned)  # so there is a number free for what comes now
        if holding is not None:
            mapped = holding.drop_in_child()
        if not mapped:
            self.end()
