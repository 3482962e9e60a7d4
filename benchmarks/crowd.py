"""Sessions that do nothing, held by another process: ``python -m benchmarks.crowd ADDRESS N``.

It ends when its standard input does.
"""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.harness import child
from fdbroker.ipc.protocol.codec import encode
from fdbroker.ipc.protocol.messages import HELLO, VERSION

SPARE = 50  # descriptors that a process has beside its sessions


@contextmanager
def crowd(address: str, count: int) -> Iterator[None]:
    """So many sessions at the broker there, while the block runs."""
    command = [sys.executable, "-m", "benchmarks.crowd", address, str(count)]
    with child(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        if process.stdout.read(1) != b"\n":
            raise RuntimeError(f"there cannot be {count} sessions")
        yield


def sessions(address: str, count: int) -> list[socket.socket]:
    """So many that have said hello, spoken by hand; their sockets are the caller's."""
    allow_files(count + SPARE)
    crowd = []
    for _ in range(count):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        crowd.append(sock)
        sock.connect(address)
        sock.send(encode([HELLO, 0, VERSION, False]))
        sock.recv(100)
    return crowd


def allow_files(count: int) -> None:
    """Raise the limit of descriptors to so many; ValueError if that is above the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


if __name__ == "__main__":
    kept = sessions(sys.argv[1], int(sys.argv[2]))
    print(flush=True)
    sys.stdin.read()
    for one in kept:
        one.close()
