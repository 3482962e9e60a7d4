"""The core of the broker: entries, sessions and loans, without sockets, clock or pid.

    names        which names an entry can have
    rules        who may do what with which names
    accounting   how much each uid uses, and how much it may use
    ledger       the whole state as fixed-width records in a buffer
    model        the records in memory: peers, entries, sessions
    wait_queue   the waiting rules: what conflicts, and who can be granted
    deadlines    when waits end
    cells        the ledger's cells of loans of several entries
    state        the tables, and the changes that keep memory, ledger and accounts in step
    lender       the events
    recovery     a lender rebuilt from its ledger

A client needs only the names and the records, so the names below load their modules at first use.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fdbroker.lender.ledger import Ledger
    from fdbroker.lender.lender import Lender
    from fdbroker.lender.model import Entry, LoanRequest, Peer, Session

_HOMES = {
    "Entry": "model",
    "Ledger": "ledger",
    "Lender": "lender",
    "Peer": "model",
    "Session": "model",
    "LoanRequest": "model",
}
__all__ = ["Entry", "Ledger", "Lender", "LoanRequest", "Peer", "Session"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'fdbroker.lender' has no attribute {name!r}")
    return getattr(import_module(f"fdbroker.lender.{_HOMES[name]}"), name)
