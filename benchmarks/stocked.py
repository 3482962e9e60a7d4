"""A broker with many names: ``python -m benchmarks.stocked ADDRESS N``.

Nobody has a hundred thousand descriptors to put, so its entries share one, which is not closed
with them.  Everything else of them is as of those that the broker opens itself: their rows in the
ledger, their places in its tables.  It is ready when it has written a newline, and ends with its
standard input.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from benchmarks.harness import child
from fdbroker.daemon.serve import serve
from fdbroker.descriptors import Kind
from fdbroker.ipc.server.server import Server
from fdbroker.rc import FD


@contextmanager
def stocked(count: int) -> Iterator[tuple[str, int]]:
    """The address of a broker with so many names, ``n0`` the first of them; and its pid."""
    with tempfile.TemporaryDirectory(prefix="fdbroker-stocked-") as folder:
        address = f"{folder}/socket"
        command = [sys.executable, "-m", "benchmarks.stocked", address, str(count)]
        with child(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            if process.stdout.read(1) != b"\n":
                raise RuntimeError(f"there cannot be {count} names")
            yield address, process.pid


def main(address: str, count: int) -> None:
    shared = os.memfd_create("shared")
    run = Server.run

    def stock(server: Server) -> None:
        for number in range(count):
            fd = FD(shared, lambda sysfd: None)
            entry = server.lender.put(
                None, 0, f"n{number}", b"", fd, Kind.MEMFD, server.now, uid=os.geteuid()
            )
            server.keep(entry, "shared")
        run(server)

    Server.run = stock  # type: ignore[method-assign]
    Thread(target=end_with_stdin, daemon=True).start()
    serve(address, ready_fd=os.dup(1))


def end_with_stdin() -> None:
    """At once: to retire all of them one by one would take its time."""
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
