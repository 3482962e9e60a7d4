"""How a message and its descriptors get from one process to another, on this platform.

The rest of `ipc` stands on the names below, and this module, the chooser, is the only one below
``ipc/`` that asks which platform it is on.  The principle is that the broker is told which sessions
have a message, takes them one at a time, and never waits.  Readiness (epoll) and completion (a
completion port) can both give that.

    Port            wait(seconds) -> [(source, HAS | GONE | EMPTIED)]; listen, mute, await_read and
                    drop a source; wake() from any thread; watch_end(process)
    Listener        accept() -> Channel | None, close(), address, lasting
    Channel         the broker's end of a session: peer, groups_among(wanted); receive(buffer),
                    receive_with_descriptors(size, most); send(data) and lend(data, parcels) now or
                    never; unread(), in_flight; shut_down(), drain_descriptors(most), close()
    parcel          what `lend` sends of a descriptor: opaque, made once for each entry
    Link            the client's end of a session
    RECEIVE         how a link receives, with an owner for what comes: it may wait
    SEND, SEND_NOW  how `Link.send` sends: it may wait, or it must not
    SCM_MAX_FD      how many descriptors one message can bring
    now_ns          the clock of the broker's loop and ledger
    unknown_ids     the ids that stand for those the kernel cannot tell

A name loads its module when it is first used.
"""

from __future__ import annotations

import sys

from fdbroker._lazy import exported

TYPE_CHECKING = False  # importing `typing` would add to the start of `fdbroker exec`
if TYPE_CHECKING:
    from fdbroker.ipc.transport.unix_channel import Channel as Channel
    from fdbroker.ipc.transport.unix_channel import parcel as parcel
    from fdbroker.ipc.transport.unix_link import Link as Link
    from fdbroker.ipc.transport.unix_listener import Listener as Listener
    from fdbroker.ipc.transport.unix_peer import unknown_ids as unknown_ids
    from fdbroker.ipc.transport.unix_port import EMPTIED as EMPTIED
    from fdbroker.ipc.transport.unix_port import GONE as GONE
    from fdbroker.ipc.transport.unix_port import HAS as HAS
    from fdbroker.ipc.transport.unix_port import Handler as Handler
    from fdbroker.ipc.transport.unix_port import Port as Port
    from fdbroker.ipc.transport.unix_port import Source as Source
    from fdbroker.ipc.transport.unix_port import now_ns as now_ns
    from fdbroker.ipc.transport.unix_socket import RECEIVE as RECEIVE
    from fdbroker.ipc.transport.unix_socket import SCM_MAX_FD as SCM_MAX_FD
    from fdbroker.ipc.transport.unix_socket import SEND as SEND
    from fdbroker.ipc.transport.unix_socket import SEND_NOW as SEND_NOW

_PLATFORM = "windows" if sys.platform == "win32" else "unix"
_MODULES = {
    "Channel": "channel",
    "EMPTIED": "port",
    "GONE": "port",
    "HAS": "port",
    "Handler": "port",
    "Link": "link",
    "Listener": "listener",
    "Port": "port",
    "RECEIVE": "socket",
    "SCM_MAX_FD": "socket",
    "SEND": "socket",
    "SEND_NOW": "socket",
    "Source": "port",
    "now_ns": "port",
    "parcel": "channel",
    "unknown_ids": "peer",
}

__all__ = [
    "EMPTIED",
    "GONE",
    "HAS",
    "RECEIVE",
    "SCM_MAX_FD",
    "SEND",
    "SEND_NOW",
    "Channel",
    "Handler",
    "Link",
    "Listener",
    "Port",
    "Source",
    "now_ns",
    "parcel",
    "unknown_ids",
]
__getattr__, __dir__ = exported(
    __name__, {name: f"{__name__}.{_PLATFORM}_{module}" for name, module in _MODULES.items()}
)
