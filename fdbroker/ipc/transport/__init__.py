"""How a message and its descriptors get from one process to another, on this platform.

The rest of `ipc` stands on the names below, and this module is the only one that asks which
platform it is on.  The principle is that the broker is told which sessions have a message, takes
them one at a time, and never waits.  Readiness (epoll) and completion (a completion port) can both
give that.

    Port        wait(seconds) -> [(source, HAS | GONE | EMPTIED)]; listen, mute, await_read, drop a
                source; wake() from any thread; watch_end(process)
    Listener    accept() -> Channel | None, close(), address, lasting
    Channel     the broker's end of a session: peer, groups_among(wanted); receive(buffer) -> size,
                receive_with_descriptors(size, most); send(data) and lend(data, parcels) now or
                never; unread(), in_flight; shut_down(), drain_descriptors(most), close()
    parcel(fd)  what `lend` sends of a descriptor, opaque, made once for each entry
    Link        the client's end of a session
"""

from __future__ import annotations

from fdbroker.ipc.transport.rlimit import descriptors_in_use, limit, too_many_files
from fdbroker.ipc.transport.unix import MOST_DESCRIPTORS, unknown_ids
from fdbroker.ipc.transport.unix_channel import Channel, parcel
from fdbroker.ipc.transport.unix_listener import Listener
from fdbroker.ipc.transport.unix_port import EMPTIED, GONE, HAS, Handler, Port, Source, now_ns

__all__ = [
    "EMPTIED",
    "GONE",
    "HAS",
    "MOST_DESCRIPTORS",
    "Channel",
    "Handler",
    "Listener",
    "Port",
    "Source",
    "descriptors_in_use",
    "limit",
    "now_ns",
    "parcel",
    "too_many_files",
    "unknown_ids",
]
