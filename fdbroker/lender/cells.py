"""The cells of loans of several entries.

A session's record in the ledger has room for one entry.  Every further entry of its loan is in a
cell, and the record leads to the first of them.  This part gives the cells to sessions and takes
them back, and is the one place in which they are charged to their uids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdbroker.lender.ledger import CELL, Slots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdbroker.lender.accounting import Accounting
    from fdbroker.lender.ledger import Ledger
    from fdbroker.lender.model import Entry, Session


class Cells:
    """Knows which cells are free, and keeps `Session.cells`, ledger and accounting in step."""

    def __init__(self, ledger: Ledger, accounting: Accounting) -> None:
        self._ledger = ledger
        self._accounting = accounting
        self._slots = Slots(ledger.cells, "loans of several entries")

    def take(self, session: Session, entries: Sequence[Entry]) -> None:
        """Write all entries of a loan but the first to cells of the session.

        Raises `BrokerFull` or `QuotaExceeded`, and nothing has changed then.
        """
        count = len(entries) - 1
        self._accounting.check_members(session.account, count)
        cells = self._slots.take_many(count)
        self._ledger.write_cells(cells, [entry.slot for entry in entries[1:]])
        session.record[CELL] = cells[0]
        session.cells = cells
        self._accounting.add_members(session.account, count)

    def free(self, session: Session) -> None:
        """Take back the cells of the session, if it has any."""
        cells, session.cells = session.cells, ()
        if cells:
            self._slots.give_many(cells)
            self._accounting.add_members(session.account, -len(cells))

    def restore(self, sessions: Sequence[Session]) -> None:
        """Take over the cells that these recovered sessions have; all others are free."""
        taken = {cell for session in sessions for cell in session.cells}
        self._slots = Slots(self._ledger.cells, "loans of several entries", taken)
        for session in sessions:
            self._accounting.add_members(session.account, len(session.cells))
