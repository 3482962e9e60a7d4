"""The descriptors that clients send: one of each kind, opened once; the kernel makes copies.

The last three kinds are not opened here: they are the sender's own connection, another client's,
and the broker's listening socket.
"""

from __future__ import annotations

import os
import select
import socket
from contextlib import ExitStack

FILE, LONG_PATH, MEMFD, READER, WRITER, EVENTFD, NULL, FOLDER, PATH, EPOLL = range(10)
TCP_LISTENER, UDP, STREAM_END, PACKET_END, IDLE_UNIX, UNIX_LISTENER, LINGERING = range(10, 17)
OWN_CONNECTION, OTHER_CONNECTION, BROKERS_LISTENER = range(17, 20)
KINDS = 20
MOST = 253  # in one message (SCM_MAX_FD): of more the kernel sends nothing


class Palette:
    """Opens all of it; `close` closes it."""

    def __init__(self, folder: str, long_path: str) -> None:
        self._stack = ExitStack()
        reader, writer = map(self._opened, os.pipe())
        one_stream, _ = self._pair(socket.SOCK_STREAM)
        one_packet, _ = self._pair(socket.SOCK_SEQPACKET)
        idle = self._socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening = self._socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.bind(os.path.join(folder, "other"))
        listening.listen()
        tcp = self._socket(socket.AF_INET, socket.SOCK_STREAM)
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        udp = self._socket(socket.AF_INET, socket.SOCK_DGRAM)
        epoll = self._stack.enter_context(select.epoll())
        path = os.path.join(folder, "data")
        lingering = self._socket(socket.AF_INET, socket.SOCK_STREAM)
        lingering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\12\0\0\0")
        self.numbers = (
            self._opened(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)),
            self._opened(os.open(long_path, os.O_RDONLY | os.O_CLOEXEC)),
            self._opened(os.memfd_create("palette", os.MFD_CLOEXEC)),
            *(reader, writer),
            self._opened(os.eventfd(0, os.EFD_CLOEXEC)),
            self._opened(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)),
            self._opened(os.open(folder, os.O_RDONLY | os.O_CLOEXEC)),
            self._opened(os.open(folder, os.O_PATH | os.O_CLOEXEC)),
            epoll.fileno(),
            *(sock.fileno() for sock in (tcp, udp, one_stream, one_packet, idle, listening)),
            lingering.fileno(),
        )

    def close(self) -> None:
        """All of them."""
        self._stack.close()

    def _opened(self, number: int) -> int:
        self._stack.callback(os.close, number)
        return number

    def _socket(self, family: int, kind: int) -> socket.socket:
        return self._stack.enter_context(socket.socket(family, kind))

    def _pair(self, kind: int) -> tuple[socket.socket, socket.socket]:
        one, other = socket.socketpair(socket.AF_UNIX, kind)
        return self._stack.enter_context(one), self._stack.enter_context(other)
