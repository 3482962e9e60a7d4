"""The waiting rules: which requests conflict, and which waiting sessions can be granted.

A request that cannot be granted at once waits in the queue of each of its entries
(`Entry.waiters`).  Two rules decide when it is granted:

    no holder of one of its entries conflicts with it, and
    no earlier waiter of one of its entries conflicts with it.

Two loans conflict when they share an entry and one of them is exclusive.  So shared loans run
together, and an exclusive request is granted after the loans before it and before all later
requests.  A loan of several entries waits in several queues at once, and later requests cannot
overtake it in any of them, so it does not starve.

These functions change nothing but the queues.  `state.py` grants, charges and writes the ledger.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from fdbroker.errors import BorrowTimeout, WouldDeadlock
from fdbroker.lender.model import LIVE, SECOND

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.lender.model import Entry, LoanRequest, Session

# A BorrowTimeout names at most so many holders, since it must fit a reply.
HOLDERS_NAMED = 8


def is_held(entry: Entry, request: LoanRequest) -> bool:
    """Tell whether a holder of `entry` conflicts with `request`."""
    return bool(entry.holders) if request.exclusive else entry.held_exclusively


def is_behind(entry: Entry, request: LoanRequest, arrival: int | None) -> bool:
    """Tell whether an earlier waiter of `entry` conflicts with `request`.

    `arrival` is the number of the request if it waits already, else None.
    """
    waiters = entry.waiters if request.exclusive else entry.exclusive_waiters
    return bool(waiters) and (arrival is None or next(iter(waiters.values())).arrival < arrival)


def enqueue(session: Session) -> None:
    """Put a waiting session into the queues of all its entries."""
    for entry in session.entries:
        if session.slot not in entry.waiters:
            entry.waiters[session.slot] = session
            if session.request.exclusive:
                entry.exclusive_waiters[session.slot] = session


def dequeue(session: Session) -> None:
    """Take a session out of the queues of all its entries."""
    for entry in session.entries:
        entry.waiters.pop(session.slot, None)
        entry.exclusive_waiters.pop(session.slot, None)


def grantable_waiters(entry: Entry, refused: set[int]) -> list[Session]:
    """Return the waiters of `entry` that can be granted now, in order of arrival.

    The result is one exclusive waiter, or any number of shared ones.  `refused` has the slots of
    the sessions that cannot be granted in the present event.  No grant changes that, so they are
    not looked at again, however many of their entries are concerned.
    """
    if entry.state != LIVE or entry.held_exclusively:
        return []
    ready: list[Session] = []
    for session in entry.waiters.values():
        if is_grantable(session, refused):
            ready.append(session)
        if session.request.exclusive:
            # All waiters behind an exclusive one conflict with it.
            break
    return ready


def is_grantable(session: Session, refused: set[int]) -> bool:
    """Tell whether a waiting session can be granted; if not, its slot is added to `refused`."""
    if session.slot in refused:
        return False
    request, arrival = session.request, session.arrival
    for entry in dict.fromkeys(session.entries):
        if is_held(entry, request) or is_behind(entry, request, arrival):
            refused.add(session.slot)
            return False
    return True


def check_wait(session: Session, request: LoanRequest, entries: Sequence[Entry], now: int) -> None:
    """Raise if `session` must not wait for `entries`.

    Raises `WouldDeadlock` if its own process has one of them exclusively, and `BorrowTimeout` if
    its timeout is 0.
    """
    for entry in entries:
        if entry.held_exclusively:
            (holder,) = entry.holders.values()
            if holder.peer.is_process_of(session.peer):
                raise WouldDeadlock(entry.name, session.peer.pid)
    if request.timeout == 0:
        raise borrow_timeout(request, entries, None, 0, now)


def borrow_timeout(
    request: LoanRequest,
    entries: Sequence[Entry],
    arrival: int | None,
    seconds: float,
    now: int,
) -> BorrowTimeout:
    """Return the error for a wait of `seconds`; it names the entry that is busy and its holders.

    `arrival` is as in `is_behind`.
    """
    entries = list(dict.fromkeys(entries))
    held = [entry for entry in entries if is_held(entry, request)]
    busy = held or [entry for entry in entries if is_behind(entry, request, arrival)]
    holders: dict[int, tuple[int, int, float, bool]] = {}
    for entry in held:
        for slot, holder in islice(entry.holders.items(), HOLDERS_NAMED):
            peer, seconds_held = holder.peer, (now - holder.since) / SECOND
            holders[slot] = peer.pid, peer.uid, seconds_held, holder.request.exclusive
    return BorrowTimeout(busy[0].name, seconds, list(holders.values())[:HOLDERS_NAMED])
