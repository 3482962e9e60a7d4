"""Custody: where the sockets and descriptors of a broker outlive it, once there is such a place.

The server tells it of each session and entry before the reply goes out.  The order is: ledger,
custody, answer; and at an end: loans cleared, custody told, slot freed.  This one keeps nothing.
"""

from __future__ import annotations


class Custody:
    """Is told of everything that a successor would need beside the ledger."""

    def keep_session(self, slot: int, number: int) -> None:
        """A session has begun; the `number` of its channel stays the caller's."""

    def keep_entry(self, slot: int, sysfd: int) -> None:
        """An entry is there; `sysfd` stays the caller's."""

    def drop_session(self, slot: int) -> None:
        """The session's loan is cleared; its slot will be free."""

    def drop_entry(self, slot: int) -> None:
        """The entry's descriptor is closed; its slot will be free."""
