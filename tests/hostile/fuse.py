"""A file system of one file that hangs on command, spoken by hand over /dev/fuse (fuse(4)).

``hang`` (FLUSH or GETATTR) leaves such requests of everybody unanswered until ``let_go``: that is
what close(2), or fstat(2), waits for.  No library is needed, only root, who mounts it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from .target import meanwhile

LOOKUP, FORGET, GETATTR, OPEN, RELEASE, FLUSH, INIT, BATCH_FORGET = 1, 2, 3, 14, 18, 25, 26, 42
INTERRUPT = 36
IN = struct.Struct("IIQQIIII")  # length, opcode, unique, nodeid, uid, gid, pid, padding
OUT = struct.Struct("IiQ")  # length, error, unique
ATTRIBUTES = struct.Struct("6Q10I")
ENOENT, ENOSYS = 2, 38
DETACH = 2  # MNT_DETACH, umount2(2)
READ_BYTES = 1 << 17
FILE = b"file"


def attributes(node: int) -> bytes:
    """Of the folder (1), or of the file in it (2)."""
    mode = 0o040755 if node == 1 else 0o100666
    return ATTRIBUTES.pack(node, 0, 0, *[0] * 3, *[0] * 3, mode, 1, 0, 0, 0, 4096, 0)


def answer(opcode: int, node: int, body: bytes) -> bytes | int:
    """What follows the head of the answer; or an errno."""
    if opcode == INIT:
        _, _, ahead, _ = struct.unpack_from("4I", body)
        return struct.pack("4I2H2I2H8I", 7, 31, ahead, 0, 16, 12, 4096, 1, 1, 0, *[0] * 8)
    if opcode == LOOKUP:
        if body.rstrip(b"\0") != FILE:
            return ENOENT
        return struct.pack("4Q2I", 2, 0, 0, 0, 0, 0) + attributes(2)
    if opcode == GETATTR:
        return struct.pack("Q2I", 0, 0, 0) + attributes(node)
    if opcode == OPEN:
        return struct.pack("Q2I", 0, 0, 0)
    return b"" if opcode in (FLUSH, RELEASE) else ENOSYS


def serve(device: int, control: socket.socket) -> None:
    """Answer the kernel, and do what the test says, until it says no more."""
    hanging: set[int] = set()
    waiting: list[bytes] = []

    def take(request: bytes) -> None:
        _, opcode, unique, node, *_ = IN.unpack_from(request)
        if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
            return
        if opcode in hanging:
            waiting.append(request)
            return
        found = answer(opcode, node, request[IN.size :])
        error, body = (-found, b"") if isinstance(found, int) else (0, found)
        with contextlib.suppress(FileNotFoundError):  # it was interrupted
            os.write(device, OUT.pack(OUT.size + len(body), error, unique) + body)

    poll = select.poll()
    for one in (device, control.fileno()):
        poll.register(one, select.POLLIN)
    while True:
        for number, _ in poll.poll():
            if number == device:
                take(os.read(device, READ_BYTES))
                continue
            told = control.recv(100)
            if not told:
                return
            hanging = {int(told)} - {0}
            if not hanging:
                for request in waiting:
                    take(request)
                waiting.clear()
            control.send(b"%d" % len(waiting))


class Hanging:
    """The mounted file system."""

    def __init__(self, path: Path, control: socket.socket) -> None:
        self.file = path / FILE.decode()
        self._control = control

    def hang(self, opcode: int) -> int:
        """Such requests wait from now on: how many do already."""
        self._control.send(b"%d" % opcode)
        return int(self._control.recv(100))

    def let_go(self) -> None:
        """They are answered."""
        self.hang(0)


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[Hanging]:
    """It is mounted there during the block.  OSError where there is no FUSE."""
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        path.mkdir()
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
        name = os.fsencode(path)
        if libc.mount(b"fdbroker-test", name, b"fuse", 0, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), "mount")
        try:
            with meanwhile(lambda control: serve(device, control)) as control:
                os.close(device)  # so that its server's end is its end, and nothing hangs then
                device = -1
                yield Hanging(path, control)
        finally:
            libc.umount2(name, DETACH)
            path.rmdir()
    finally:
        if device >= 0:
            os.close(device)
