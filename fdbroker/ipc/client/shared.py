"""SharedFD: a descriptor that can be an argument to another process.

It is a ticket for a nameless entry of a broker, and pickles as the address and the ticket, any
number of times, in any start method of multiprocessing.  Unpickling borrows nothing and so leaks
nothing; `borrow` does, where and when it is needed.  The ticket is a capability of 128 random
bits: who has it, and is served by the broker at all, may borrow.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from fdbroker.errors import BrokerGone, ClosedClientError, NoBroker, UnknownTicket
from fdbroker.ipc.client.client import Client, client_at

if TYPE_CHECKING:
    from types import TracebackType

    from fdbroker.ipc.client.loan import Loan


class SharedFD:
    """Made by `Client.share`; the one made there is the owner, unpickled ones only borrow."""

    __slots__ = ("_address", "_owner", "_owner_pid", "_ticket")

    def __init__(self, address: str, ticket: bytes, owner: Client | None = None) -> None:
        self._address = address
        self._ticket = ticket
        self._owner = owner
        self._owner_pid = os.getpid() if owner is not None else 0

    def borrow(
        self,
        *,
        exclusive: bool = False,
        mode: str | None = None,
        timeout: float | None = None,
        purpose: str = "",
    ) -> Loan:
        """Borrow it in this process, as `Client.borrow`; `UnknownTicket` once it has retired."""
        return client_at(self._address).borrow_ticket(
            self._ticket, exclusive=exclusive, mode=mode, timeout=timeout, purpose=purpose
        )

    def close(self) -> None:
        """The owner retires the entry: no new borrow, and its last return closes it.

        Elsewhere, in a forked child too, it does nothing; so it does the second time.
        """
        owner = self._owner
        if owner is not None and self._owner_pid == os.getpid():
            with contextlib.suppress(UnknownTicket, NoBroker, BrokerGone):  # it has ended already
                try:
                    owner.retire(self._ticket)
                except ClosedClientError:  # not so its entry
                    with Client(self._address) as other:
                        other.retire(self._ticket)
        self._owner = None

    def __enter__(self) -> SharedFD:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedFD, (self._address, self._ticket)

    def __repr__(self) -> str:
        role = "owner of" if self._owner is not None else "ticket for"
        return f"<SharedFD, {role} an entry of {self._address}>"
