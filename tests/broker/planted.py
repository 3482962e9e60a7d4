"""A broker with a mistake, a delay or another limit in it, planted by a test."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

from support import wait_until

import fdbroker

from .puppet import Puppet, is_served


@contextlib.contextmanager
def broker_with(
    folder: Path, plant: str, arguments: str = ""
) -> Iterator[tuple[fdbroker.Client, Puppet]]:
    """A client of a broker with `plant` in it, and its process, whose stderr is a file there."""
    address = str(folder / "socket")
    with open(folder / "stderr", "wb") as said, Puppet(stderr=said) as server:
        server.do(f"folder = {str(folder)!r}")
        server.do(plant)
        server.begin(f"from fdbroker.daemon.serve import serve\nserve({address!r}{arguments})")
        wait_until(lambda: is_served(address))
        with fdbroker.Client(address) as client:
            wait_until(lambda: is_alone(client))
            yield client, server
        server.signal(signal.SIGTERM)
        server.result()


def is_alone(client: fdbroker.Client) -> bool:
    """Whether the broker has done with all others."""
    stats = client.stats()
    return (stats["connections"], stats["jobs"]) == (1, 0)
