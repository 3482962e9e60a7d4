"""Lend open file descriptors to other processes, and close them when the last one is back.

    import fdbroker

    with fdbroker.Broker() as broker:                # a private broker process
        with broker.share(open("data.bin", "rb")) as ref:
            pool.map(work, [ref] * 8)                # ref pickles; work() calls ref.borrow()

`borrow` and `put` speak to the broker of this process's default address ($FDBROKER_SOCKET, or the
one given to `attach`), `Client` to any.  The names below load their modules when they are first
used, since the command must start fast.
"""

from __future__ import annotations

from fdbroker._lazy import exported

TYPE_CHECKING = False  # importing `typing` would add to the start of `fdbroker exec`
if TYPE_CHECKING:
    from fdbroker import errors as errors
    from fdbroker import rc as rc
    from fdbroker.default import attach as attach
    from fdbroker.default import borrow as borrow
    from fdbroker.default import put as put
    from fdbroker.embedded import Broker as Broker
    from fdbroker.ipc.client import Client as Client
    from fdbroker.ipc.client import Loan as Loan
    from fdbroker.ipc.client import SharedFD as SharedFD

__version__ = "0.1.0"
__all__ = ["Broker", "Client", "Loan", "SharedFD", "attach", "borrow", "errors", "put", "rc"]
__getattr__, __dir__ = exported(
    __name__,
    {
        "Broker": "fdbroker.embedded",
        "Client": "fdbroker.ipc.client.client",
        "Loan": "fdbroker.ipc.client.loan",
        "SharedFD": "fdbroker.ipc.client.client",
        "attach": "fdbroker.default",
        "borrow": "fdbroker.default",
        "errors": None,
        "put": "fdbroker.default",
        "rc": None,
    },
)
