"""Mistakes to plant into the broker: each must be found by the good clients, or at the end.

A check that nobody has seen fail may be none.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from fdbroker.ipc.server.jobs import CloseEntry
from fdbroker.ipc.transport import Channel
from fdbroker.lender import lender, state, wait_queue
from fdbroker.lender.lender import Lender
from fdbroker.lender.model import Entry, LoanRequest, Session


def everybody_at_once() -> None:
    """An exclusive loan excludes nobody."""

    def hold(session: Session) -> None:
        correctly(session)
        for entry in session.entries:
            entry.held_exclusively = False

    correctly, state.hold = state.hold, hold
    lender.hold = hold
    wait_queue.is_held = lambda entry, request: False


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

    def run(self: CloseEntry) -> None:
        if self._entry.generation % 10 == 0:
            os.dup(self._entry.sysfd)
        correctly(self)

    correctly, CloseEntry.run = CloseEntry.run, run  # type: ignore[method-assign]


def no_return_at_death() -> None:
    """Who dies keeps what it has."""

    def clear(self: Lender, session: Session, now: int) -> None:
        if not session.entries or session.id % 4:
            correctly(self, session, now)

    correctly, Lender.clear = Lender.clear, clear  # type: ignore[method-assign]


def cut_short() -> None:
    """Who borrows many gets the first descriptor of a message twice."""

    def lend(self: Channel, data: bytes, parcels: Any) -> bool:
        if len(parcels) > 1:
            parcels = [parcels[0], parcels[0], *parcels[2:]]
        return correctly(self, data, parcels)

    correctly, Channel.lend = Channel.lend, lend  # type: ignore[method-assign]


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
