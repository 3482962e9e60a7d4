"""Lend open file descriptors to other processes, and close them when the last one is back.

    import fdbroker

    with fdbroker.Broker() as broker:                # a private broker process
        with broker.share(open("data.bin", "rb")) as ref:
            pool.map(work, [ref] * 8)                # ref pickles; work() calls ref.borrow()

`borrow` and `put` speak to the broker of this process's default address ($FDBROKER_SOCKET, or
what `attach` said), `Client` to any.  What is imported is what is used: the names below load their
modules at first use, since the command must start fast.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as a type checker knows it; importing `typing` would show in `exec`
__version__ = "0.1.0"

_HOMES = {
    "Broker": "fdbroker.embedded",
    "Client": "fdbroker.ipc.client.client",
    "Loan": "fdbroker.ipc.client.loan",
    "SharedFD": "fdbroker.ipc.client.shared",
    "attach": "fdbroker.default",
    "borrow": "fdbroker.default",
    "put": "fdbroker.default",
}
_MODULES = ("errors", "rc")
__all__ = ["Broker", "Client", "Loan", "SharedFD", "attach", "borrow", "errors", "put", "rc"]

if TYPE_CHECKING:
    from typing import Any

    from fdbroker import errors as errors
    from fdbroker import rc as rc
    from fdbroker.default import attach as attach
    from fdbroker.default import borrow as borrow
    from fdbroker.default import put as put
    from fdbroker.embedded import Broker as Broker
    from fdbroker.ipc.client.client import Client as Client
    from fdbroker.ipc.client.loan import Loan as Loan
    from fdbroker.ipc.client.shared import SharedFD as SharedFD


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = import_module(f"fdbroker.{name}")
    else:
        raise AttributeError(f"module 'fdbroker' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
