"""Mistakes to plant into the broker: each must be found by the good clients, or at the end.

A check that nobody has seen fail may be none.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from fdbroker.ipc.server.jobs import Close
from fdbroker.ipc.transport import unix
from fdbroker.ipc.transport.unix_socket import Ancillary
from fdbroker.lender.lender import Lender
from fdbroker.lender.model import Entry, LoanRequest, Session
from fdbroker.lender.state import LenderState


def everybody_at_once() -> None:
    """An exclusive loan excludes nobody."""

    def hold(self: LenderState, session: Session) -> None:
        correctly(self, session)
        for entry in session.entries:
            entry.held_exclusively = False

    correctly, LenderState.hold = LenderState.hold, hold  # type: ignore[method-assign]
    LenderState._is_held = staticmethod(lambda entry, request: False)  # type: ignore[method-assign]


def another_one() -> None:
    """Now and then another entry than the one that was asked for."""

    def borrow(self: Lender, session: Session, seq: int, request: LoanRequest, now: int) -> bool:
        self.__dict__["asked"] = asked = self.__dict__.get("asked", 0) + 1
        if asked % 20 == 0 and len(request.names) == 1 and not request.exclusive:
            request = LoanRequest(
                ("common/memory",), False, request.readonly, request.timeout, request.purpose
            )
        return correctly(self, session, seq, request, now)

    correctly, Lender.borrow = Lender.borrow, borrow  # type: ignore[method-assign]


def still_there() -> None:
    """What is lent does not retire."""

    def retire(self: Lender, name: str | bytes, now: int) -> Entry:
        entry = self.find(name)
        return entry if entry.holders else correctly(self, name, now)

    correctly, Lender.retire = Lender.retire, retire  # type: ignore[method-assign]


def never_closed() -> None:
    """Each tenth descriptor stays open."""

    def run(self: Close) -> None:
        if self.entry.generation % 10 == 0:
            os.dup(self.entry.sysfd)
        correctly(self)

    correctly, Close.run = Close.run, run  # type: ignore[method-assign]


def no_return_at_death() -> None:
    """Who dies keeps what it has."""

    def clear(self: Lender, session: Session, now: int) -> None:
        if not session.entries or session.id % 4:
            correctly(self, session, now)

    correctly, Lender.clear = Lender.clear, clear  # type: ignore[method-assign]


def cut_short() -> None:
    """Who borrows many gets the first descriptor of a message twice."""

    def rights(fds: Any) -> Ancillary:
        return correctly([fds[0], fds[0], *fds[2:]] if len(fds) > 1 else fds)

    correctly, unix.rights = unix.rights, rights


PLANTED: dict[str, Callable[[], None]] = {
    "everybody-at-once": everybody_at_once,
    "another-one": another_one,
    "still-there": still_there,
    "never-closed": never_closed,
    "no-return-at-death": no_return_at_death,
    "cut-short": cut_short,
}


def plant(name: str) -> None:
    """From now on this process makes that mistake."""
    PLANTED[name]()
