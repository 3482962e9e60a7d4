"""The heart: entries, loans, the waiting line.  No socket, no clock, no pid of its own.

A client needs no more of it than the rule for names, so the names below load their modules at
first use.
"""

from __future__ import annotations

from fdbroker._lazy import exported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fdbroker.lender.ledger import Ledger as Ledger
    from fdbroker.lender.lender import Lender as Lender
    from fdbroker.lender.model import Entry as Entry
    from fdbroker.lender.model import LoanRequest as LoanRequest
    from fdbroker.lender.model import Peer as Peer
    from fdbroker.lender.model import Session as Session

__all__ = ["Entry", "Ledger", "Lender", "LoanRequest", "Peer", "Session"]
__getattr__, __dir__ = exported(
    __name__,
    {
        "Entry": "fdbroker.lender.model",
        "Ledger": "fdbroker.lender.ledger",
        "Lender": "fdbroker.lender.lender",
        "LoanRequest": "fdbroker.lender.model",
        "Peer": "fdbroker.lender.model",
        "Session": "fdbroker.lender.model",
    },
)
