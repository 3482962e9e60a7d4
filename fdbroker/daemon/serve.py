"""The broker process: a server with its books, its signals, and the process it belongs to.

SIGTERM and SIGINT drain it with a deadline; a second one stops it now.  A private broker has an
owner, whose end it is told by a pidfd (a pipe would live on in a forked worker): it then drains
without a deadline, lends nothing more, and is gone with the last loan.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import resource
import signal
from itertools import chain, repeat
from typing import TYPE_CHECKING

from fdbroker.ipc.listener import Listener
from fdbroker.ipc.server import Server
from fdbroker.lender import Ledger, Lender

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

SESSIONS = 1_048_576  # room in the ledger; pages that are never written take no memory
ENTRIES = 131_072
CELLS = 262_144
NR_OPEN = 1_048_576  # fs.nr_open as it is if nobody has set it (proc_sys_fs(5))
DRAIN_SECONDS = 10.0

log = logging.getLogger("fdbroker")


def serve(
    address: str,
    *,
    ready_fd: int | None = None,
    owner_fd: int | None = None,
    drain_seconds: float = DRAIN_SECONDS,
) -> None:
    """Serve at `address` until drained.

    ready_fd: a newline is written to it when clients can connect; then it is closed.
    owner_fd: the pidfd of the process it belongs to; the folder of `address` is private then, and
    goes with the broker, since its owner may have been killed.
    Raises `AlreadyServing`, `BadAddress`, OSError.
    """
    with contextlib.ExitStack() as private:
        if owner_fd is not None:
            private.callback(_remove_folder, address)
        _serve(address, ready_fd, owner_fd, drain_seconds)


def _serve(address: str, ready_fd: int | None, owner_fd: int | None, drain_seconds: float) -> None:
    sessions = min(_raise_file_limit(), SESSIONS)
    buffer = mmap.mmap(-1, Ledger.size(sessions, ENTRIES, CELLS))
    lender = Lender(Ledger(memoryview(buffer), sessions, ENTRIES, CELLS))
    listener = Listener(address)
    try:
        server = Server(listener, lender)
    except BaseException:
        listener.close()
        raise
    try:
        with _signals(server, drain_seconds):
            if owner_fd is not None:
                _watch_owner(server, owner_fd)
            log.info("event=ready address=%s pid=%d", address, os.getpid())
            if ready_fd is not None:
                os.write(ready_fd, b"\n")
                os.close(ready_fd)
            server.run()
    finally:
        server.close()


def _raise_file_limit() -> int:
    """Raise the soft limit of open files as far as it goes: the result."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = file_limit(hard, _nr_open())
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    except ValueError as error:  # EPERM: there is no /proc, and fs.nr_open is less
        log.warning('event=file-limit-not-raised limit=%d reason="%s"', soft, error)
        return soft
    return limit


def file_limit(hard: int, nr_open: int) -> int:
    """The most that can be had.

    The hard limit may be none at all, or be left from a time when fs.nr_open was higher, which is
    above it everywhere: in open(2), and in setrlimit(2), where to ask for more is EPERM.
    """
    return nr_open if hard == resource.RLIM_INFINITY else min(hard, nr_open)


def _nr_open() -> int:
    try:
        with open("/proc/sys/fs/nr_open") as file:
            return int(file.read())
    except OSError:  # no /proc
        return NR_OPEN


def _watch_owner(server: Server, owner_fd: int) -> None:
    def owner_has_ended(about: None, events: int) -> None:
        server.unwatch(owner_fd)
        os.close(owner_fd)
        server.drain(None)

    server.watch(owner_fd, owner_has_ended)


def _remove_folder(address: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(address + ".lock")
        os.rmdir(os.path.dirname(address))


@contextlib.contextmanager
def _signals(server: Server, drain_seconds: float) -> Iterator[None]:
    """SIGTERM and SIGINT wake the loop, which then drains; nothing is ever raised in it.

    The loop is woken from within the C handler.  One in Python would run too late for a signal
    that comes just before the loop waits (signal.set_wakeup_fd).
    """
    arrived, tell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    deadlines = chain([drain_seconds], repeat(0.0))

    def drain(about: None, events: int) -> None:
        for _ in os.read(arrived, 64):  # a byte for each signal
            server.drain(next(deadlines))

    server.watch(arrived, drain)
    before_tell = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    before = {number: signal.signal(number, _noted) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_tell)
        os.close(arrived)
        os.close(tell)


def _noted(number: int, frame: FrameType | None) -> None:
    pass
