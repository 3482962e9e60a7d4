"""The client's side: `Client`, what it hands out, and what these stand on.

From the bottom up: fork (the fork rule and its lock), connection (one request at a time), session
(a connection that lends, or one that puts), pool (the sessions of a client), wrappers (what was
made of a loan), loan, borrow (the way of a borrow), info, client.
"""

from __future__ import annotations

from fdbroker._lazy import exported

TYPE_CHECKING = False  # importing `typing` would add to the start of `fdbroker exec`
if TYPE_CHECKING:
    from fdbroker.ipc.client.client import Client as Client
    from fdbroker.ipc.client.client import SharedFD as SharedFD
    from fdbroker.ipc.client.info import EntryInfo as EntryInfo
    from fdbroker.ipc.client.info import LoanInfo as LoanInfo
    from fdbroker.ipc.client.info import Usage as Usage
    from fdbroker.ipc.client.loan import Loan as Loan

_MODULES = {
    "Client": "client",
    "EntryInfo": "info",
    "Loan": "loan",
    "LoanInfo": "info",
    "SharedFD": "client",
    "Usage": "info",
}

__all__ = ["Client", "EntryInfo", "Loan", "LoanInfo", "SharedFD", "Usage"]
__getattr__, __dir__ = exported(
    __name__, {name: f"{__name__}.{module}" for name, module in _MODULES.items()}
)
