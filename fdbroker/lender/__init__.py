"""The heart: entries, loans, the waiting line.  No socket, no clock, no pid of its own.

A client needs no more of it than the rule for names, so the names below load their modules at
first use.
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
