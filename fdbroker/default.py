"""The default client of a process, for programs that need no more than one broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdbroker.ipc.client.client import Client, client_at
from fdbroker.ipc.transport.address import default_address

if TYPE_CHECKING:
    from fdbroker.ipc.client import Loan
    from fdbroker.ipc.client.client import HasFileno

_address: str | None = None


def attach(address: str) -> None:
    """Make the broker at `address` this process's default, for `borrow` and `put`.

    It connects to nothing yet.  A pool does this in each of its workers with
    ``initializer=fdbroker.attach, initargs=(broker.address,)``.
    """
    global _address
    _address = address


def default_client() -> Client:
    """Return the client that `borrow` and `put` use: of the attached address, or the default."""
    return client_at(_address if _address is not None else default_address())


def borrow(
    name: str,
    *,
    exclusive: bool = False,
    mode: str | None = None,
    timeout: float | None = None,
    purpose: str = "",
) -> Loan:
    """Borrow with the default client: see `Client.borrow`."""
    return default_client().borrow(
        name, exclusive=exclusive, mode=mode, timeout=timeout, purpose=purpose
    )


def put(name: str, obj: HasFileno | int, *, replace: bool = False, ephemeral: bool = False) -> int:
    """Put with the default client: see `Client.put`."""
    return default_client().put(name, obj, replace=replace, ephemeral=ephemeral)
