"""BASE: the least that can be called lending, in plain Python and in C.

One stream socket, one blocking server process, one descriptor.  The client sends a request of 16
bytes, receives a reply of 16 bytes with the descriptor, closes it, and sends a return of 16 bytes
that nobody answers.  No names, no count, no rules, no second client: what a broker costs is what
it takes beyond this.

The C twin (base_twin.c) makes the same system calls on both sides.  Python's share of a cycle is
small and known, so the ratio of the two tells whether the run can be believed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from benchmarks.harness import Check, Run, Unavailable, Variant, child

SIZE = 16
REQUEST, REPLY, RETURN = b"B" * SIZE, b"G" * SIZE, b"R" * SIZE
TWIN = Path(__file__).with_name("base_twin.c")
COUNT = struct.Struct("=I")


@contextmanager
def lent_file() -> Iterator[BinaryIO]:
    """What every variant of every topic lends: an unlinked regular file."""
    with tempfile.TemporaryFile() as file:
        yield cast(BinaryIO, file)


@contextmanager
def base(prefix: Sequence[str] = ()) -> Iterator[Run]:
    """BASE itself.  Its server is another process, run by the command `prefix`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs, lent_file() as file:
        numbers = (theirs.fileno(), file.fileno())
        command = [*prefix, sys.executable, "-m", "benchmarks.base", *map(str, numbers)]
        with child(command, pass_fds=numbers), ours:  # closed first: the server ends by it
            theirs.close()
            verify(ours, file)
            yield client(ours)


def client(sock: socket.socket) -> Run:
    def run(n: int) -> None:
        number = sock.fileno()
        write, recvmsg, close = os.write, sock.recvmsg, os.close
        request, back = REQUEST, RETURN
        space, cloexec = socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
        unpack = struct.Struct("i").unpack
        for _ in range(n):
            write(number, request)
            _, [(_, _, rights)], _, _ = recvmsg(SIZE, space, cloexec)
            [fd] = unpack(rights)
            close(fd)
            write(number, back)

    return run


def serve(sock: socket.socket, fd: int) -> None:
    """Until the client is gone.  Requests and returns alternate, so neither is looked at."""
    number = sock.fileno()
    read, sendmsg = os.read, sock.sendmsg
    data = [REPLY]
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
    while read(number, SIZE):
        sendmsg(data, rights)
        read(number, SIZE)


def verify(sock: socket.socket, file: BinaryIO) -> None:
    """One cycle with everything looked at that the timed loop takes for granted."""
    sock.sendall(REQUEST)
    data, [(_, _, rights)], flags, _ = sock.recvmsg(
        SIZE, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
    )
    [fd] = struct.unpack("i", rights)
    try:
        same = os.path.sameopenfile(fd, file.fileno())
        if data != REPLY or flags & socket.MSG_CTRUNC or not same or os.get_inheritable(fd):
            raise RuntimeError(f"BASE did not lend: {data!r}, flags {flags:#x}, same file: {same}")
    finally:
        os.close(fd)
    sock.sendall(RETURN)


@contextmanager
def base_c() -> Iterator[Run]:
    """The twin.  It is told how many cycles to do, and answers when they are done."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise Unavailable("there is no cc here")
    with tempfile.TemporaryDirectory() as folder, lent_file() as file:
        program = f"{folder}/base_twin"
        subprocess.run([compiler, "-O2", "-o", program, TWIN], check=True, timeout=60)
        command = [program, str(file.fileno())]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with child(command, pass_fds=[file.fileno()], **pipes) as twin:
            assert twin.stdin is not None
            assert twin.stdout is not None
            tell, hear = twin.stdin.write, twin.stdout.read

            def run(n: int) -> None:
                count = COUNT.pack(n)
                tell(count)
                if hear(COUNT.size) != count:
                    raise RuntimeError("the C twin ended early")

            yield run


BASE = Variant("base", base, against="base")
BASE_C = Variant("base_c", base_c, against="base")
C_CHECK = Check("base_c", low=0.75, high=0.90)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the client's end is the only end
    with socket.socket(fileno=int(sys.argv[1])) as served, suppress(ConnectionError):
        serve(served, int(sys.argv[2]))
