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
    from fdbroker.lender.parts import Entry, Peer, Session, Wish

_HOMES = {
    "Entry": "parts",
    "Ledger": "ledger",
    "Lender": "lender",
    "Peer": "parts",
    "Session": "parts",
    "Wish": "parts",
}
__all__ = ["Entry", "Ledger", "Lender", "Peer", "Session", "Wish"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'fdbroker.lender' has no attribute {name!r}")
    return getattr(import_module(f"fdbroker.lender.{_HOMES[name]}"), name)
