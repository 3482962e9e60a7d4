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
