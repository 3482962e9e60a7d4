"""The broker's listening socket at a path, and the lock beside it that says whose it is.

The lock (flock(2) on ``PATH.lock``) is held as long as the process lives, so a path whose lock can
be had belongs to nobody, and a socket found there is stale.  Nothing but a socket is ever removed.

Who can rename in the folder can put another socket in the broker's place, and is then sent what
was meant for it.  So the folder is its own uid's or root's, and nobody else may write to it, but
in a sticky one, where only the owner of a file can rename it (inode(7)).

A service manager may have bound the socket already, and keep it when the broker ends: then it is
taken as it is, mode, group and all, and its file stays.  The lock is needed all the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
from fcntl import LOCK_EX, LOCK_NB, flock
from typing import Any

from fdbroker.descriptors import wait_readable
from fdbroker.errors import AlreadyServing, BadAddress
from fdbroker.ipc.transport import unix_channel
from fdbroker.ipc.transport.address import check_path
from fdbroker.ipc.transport.unix_channel import Channel
from fdbroker.ipc.transport.unix_port import Handler, ignore

# How many connections the kernel queues (listen(2)).
BACKLOG = 512
PRIVATE = 0o600

log = logging.getLogger("fdbroker")


class Listener:
    """Listens at the path `address`, whose folder is made if there is none.

    mode, group: of the socket.  Who may write to it can connect, if the folder lets them through:
    a folder that is made here does, another one is left as it is.
    bound: a listening socket of that address, to be taken over; if this raises, it has not been.

    Raises `AlreadyServing` if another process has the lock; `BadAddress` if there is something
    else than a socket, or if others could replace the socket; OSError.
    """

    def __init__(
        self,
        address: str,
        *,
        mode: int = PRIVATE,
        group: int | None = None,
        bound: socket.socket | None = None,
    ) -> None:
        self.address = address
        self.handler: Handler = ignore
        self.subject: Any = None
        self.lasting = bound is not None  # it stays, with its queue, when this process ends
        # Whether the next connection may have been in the queue before descriptors were refused.
        self._predating = False
        self._file: os.stat_result | None = None  # the socket's, if it is ours to unlink
        check_path(address)
        folder = os.path.dirname(address) or "."
        _make_folder(folder, mode, group)
        _check_folder(address, folder)
        _check_place(address)  # now, too: a mistyped path shall get no lock file beside it
        _check_reach(folder, mode)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._lock = os.open(address + ".lock", flags, 0o600)
        try:
            self._take_lock()
            if bound is not None:
                bound.setblocking(False)
                self.sock = bound
                self._predating = unix_channel.refuse_descriptors(bound) and self._has_more()
                return
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            # Connections inherit that.
            unix_channel.refuse_descriptors(self.sock)
            try:
                self._bind(mode, group)
            except BaseException:
                self._unlink()
                self.sock.close()
                raise
        except BaseException:
            os.close(self._lock)
            raise

    def _take_lock(self) -> None:
        try:
            flock(self._lock, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            raise AlreadyServing(self.address) from None

    def _bind(self, mode: int, group: int | None) -> None:
        if _check_place(self.address):
            _check_stale(self.address)
            os.unlink(self.address)
        mask = os.umask(0o177)
        try:
            self.sock.bind(self.address)
        finally:
            os.umask(mask)
        self._file = os.lstat(self.address)
        if group is not None:
            os.chown(self.address, -1, group)
        if mode != PRIVATE:
            os.chmod(self.address, mode)
        self.sock.listen(BACKLOG)

    @property
    def number(self) -> int:
        """The number that the port watches."""
        return self.sock.fileno()

    def accept(self) -> Channel | None:
        """A new connection, if one is still there.  OSError: EMFILE and its kin (accept(2))."""
        try:
            sock, _ = self.sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        predates = self._predating
        # Once the queue was empty, everybody connects to a listener that refuses.
        self._predating = predates and self._has_more()
        return Channel(sock, predates_refusal=predates)

    def _has_more(self) -> bool:
        """Whether a connection waits in the queue."""
        return wait_readable(self.sock.fileno(), 0)

    def close(self) -> None:
        """Stop listening: the socket file goes, if it is still this one, then the lock.

        The lock's own file stays: to unlink it would let two others each lock a file of that name.
        """
        self._unlink()
        self.sock.close()
        os.close(self._lock)

    def _unlink(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._file and os.path.samestat(os.lstat(self.address), self._file):
                os.unlink(self.address)


def _make_folder(folder: str, mode: int, group: int | None) -> None:
    """Make it if there is none, so that those for whom the socket's mode is get through it."""
    with contextlib.suppress(FileExistsError):
        os.makedirs(folder, mode=0o700)
        if mode & 0o006:
            os.chmod(folder, 0o711)
        elif mode & 0o060:
            if group is not None:
                os.chown(folder, -1, group)
            os.chmod(folder, 0o710)


def _check_reach(folder: str, mode: int) -> None:
    """Say so if `mode` lets others connect, and the folder does not."""
    found = stat.S_IMODE(os.stat(folder).st_mode)
    if (mode & 0o060 and not found & 0o011) or (mode & 0o006 and not found & 0o001):
        log.warning(
            "event=out-of-reach folder=%r mode=%04o socket-mode=%04o "
            'note="chmod the folder, so that others get to the socket"',
            *(folder, found, mode),
        )


def _check_folder(address: str, folder: str) -> None:
    """`BadAddress` if others than this uid and root can replace what is in it."""
    found = os.stat(folder)
    if found.st_uid not in (0, os.geteuid()):
        raise BadAddress(
            address,
            f"its folder belongs to uid {found.st_uid}, who could put another socket there: "
            "use a folder of your own",
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        raise BadAddress(
            address,
            f"others may write to its folder (mode {stat.S_IMODE(found.st_mode):04o}) and could "
            "put another socket there: chmod go-w it, or use a folder of your own",
        )


def _check_stale(address: str) -> None:
    """`BadAddress` if somebody has the socket open, who knows nothing of our lock: a service
    manager, another program.  A socket without anybody refuses a connection (unix(7))."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            return
        except OSError:  # EAGAIN: its queue is full; EPROTOTYPE: it is of another type
            pass
    raise BadAddress(address, "another program listens there: stop it, or use another path")


def _check_place(address: str) -> bool:
    """Whether there is a socket; `BadAddress` if there is something else."""
    try:
        mode = os.lstat(address).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(mode):
        raise BadAddress(address, "what is there is no socket and is left alone: use another path")
    return True
