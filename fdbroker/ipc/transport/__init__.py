"""How a message and its descriptors get from one process to another, on this platform.

This is the chooser: the only place below ``ipc/`` that asks which platform this is.  Each platform
has modules with the same names in them, and the rest of the package takes the names from here:

    Link                the client's end of a session
    RECEIVE             how a link receives, with an owner for what comes: it may wait
    SEND, SEND_NOW      how `Link.send` sends: it may wait, or it must not
    SCM_MAX_FD          how many descriptors one message can bring

A name loads its module when it is first used.
"""

from __future__ import annotations

import sys

from fdbroker._lazy import exported

TYPE_CHECKING = False  # importing `typing` would add to the start of `fdbroker exec`
if TYPE_CHECKING:
    from fdbroker.ipc.transport.unix_link import Link as Link
    from fdbroker.ipc.transport.unix_socket import RECEIVE as RECEIVE
    from fdbroker.ipc.transport.unix_socket import SCM_MAX_FD as SCM_MAX_FD
    from fdbroker.ipc.transport.unix_socket import SEND as SEND
    from fdbroker.ipc.transport.unix_socket import SEND_NOW as SEND_NOW

_PLATFORM = "windows" if sys.platform == "win32" else "unix"
_MODULES = {
    "Link": "link",
    "RECEIVE": "socket",
    "SCM_MAX_FD": "socket",
    "SEND": "socket",
    "SEND_NOW": "socket",
}

__all__ = ["RECEIVE", "SCM_MAX_FD", "SEND", "SEND_NOW", "Link"]
__getattr__, __dir__ = exported(
    __name__, {name: f"{__name__}.{_PLATFORM}_{module}" for name, module in _MODULES.items()}
)
