"""The broker process: a server with its books, its signals, and the process it belongs to.

SIGTERM and SIGINT drain it with a deadline; a second one stops it now.  SIGHUP has it read its
configuration anew, if it has one, and never ends it: a terminal may be gone before its users are.

What was handed over, by a service manager or by number, is taken first, while every other number
is still free: so none of our own can be mistaken for it.

A private broker has an owner, whose end it is told by a pidfd (a pipe would live on in a forked
worker): it then drains without a deadline, lends nothing more, and is gone with the last loan.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import signal
import sys
from itertools import chain, repeat
from typing import TYPE_CHECKING

from fdbroker.daemon import config
from fdbroker.daemon.config import Config
from fdbroker.daemon.resources import (
    Resources,
    adopt_handed_over,
    adopt_numbers,
    check_names,
    discard_all,
    let_go,
    open_all,
)
from fdbroker.daemon.systemd import Manager, take_handed_over, take_own
from fdbroker.descriptors import wait_writable
from fdbroker.errors import BadResource
from fdbroker.ipc.server.server import Server
from fdbroker.ipc.server.tuning import TUNING, Tuning
from fdbroker.ipc.transport import Listener
from fdbroker.ipc.transport.address import default_address
from fdbroker.ipc.transport.rlimit import raise_limit
from fdbroker.ipc.transport.unix_listener import PRIVATE
from fdbroker.ipc.transport.unix_port import Watched
from fdbroker.lender import Ledger, Lender

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from socket import socket
    from types import FrameType

    from fdbroker.daemon.config import Resource, Settings
    from fdbroker.daemon.resources import Opened
    from fdbroker.daemon.systemd import Handed

SESSIONS = 1_048_576  # room in the ledger; pages that are never written take no memory
ENTRIES = 131_072
CELLS = 262_144
SWITCH_SECONDS = 0.0001  # that the loop waits for a worker to let it go on, at most
DRAIN_SECONDS = 10.0
GROUP_TOO = 0o660  # the socket's mode where only its group was said
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

log = logging.getLogger("fdbroker")


def serve(
    address: str | None = None,
    *,
    config_path: str | None = None,
    resources: Sequence[Resource] = (),
    ready_fd: int | None = None,
    owner_fd: int | None = None,
    drain_seconds: float | None = None,
    tuning: Tuning = TUNING,
) -> None:
    """Serve at `address` until drained.

    address: a path; None: what the configuration says, else the default one.
    config_path: the file to read at the start, and at each SIGHUP.
    resources: entries beside those of the file; descriptors that are given by number are taken
    over.  ready_fd: a newline is written to it when clients can connect; then it is closed.
    owner_fd: the pidfd of the process it belongs to; the folder of `address` is private then, and
    goes with the broker, since its owner may have been killed.
    drain_seconds: None: what the configuration says, else `DRAIN_SECONDS`.
    tuning: how long the server waits, and how much it does at a time.
    Raises `AlreadyServing`, `BadAddress`, `BadResource`, `BadName`, `ConfigError`, OSError.
    """
    with contextlib.ExitStack() as stack:
        if owner_fd is not None and address is not None:
            stack.callback(_remove_folder, address)
        for option, number in (("--ready-fd", ready_fd), ("--owner-fd", owner_fd)):
            _check_open(option, number)
        manager = Manager(ours=owner_fd is None)
        handed = take_handed_over()
        for one in handed:
            if one.number in (ready_fd, owner_fd):
                reason = "it is handed over as an entry (LISTEN_FDS): use another one"
                raise BadResource("--ready-fd", str(one.number), reason)
        read = Config() if config_path is None else config.read(config_path)
        settings = read.settings
        if address is None:
            address = settings.socket
        bound = take_own(handed, address)
        check_names([one.name for group in (handed, resources, read.entries) for one in group])
        entries = stack.enter_context(_inherited(handed, resources, {ready_fd, owner_fd}))
        sessions = min(raise_limit(), SESSIONS)
        sys.setswitchinterval(SWITCH_SECONDS)
        listener = _listener(address, settings, bound)
        server = _server(listener, sessions, tuning)
        reloader = Resources(server, config_path, manager)
        with contextlib.ExitStack() as closing:
            closing.callback(server.close)
            entries += open_all(resource for resource in resources if resource.how != "fd")
            reloader.start(entries, read)
            if drain_seconds is None:
                drain_seconds = DRAIN_SECONDS if settings.drain is None else settings.drain
            # entered in the outer one: another signal must not cut the closing short
            stack.enter_context(_signals(server, drain_seconds, reloader, manager))
            if owner_fd is not None:
                _watch_owner(server, owner_fd)
            log.info("event=ready address=%s pid=%d", listener.address, os.getpid())
            manager.ready(reloader.status())
            if ready_fd is not None:
                _tell_ready(ready_fd)
            server.run()


def _check_open(option: str, number: int | None) -> None:
    """`BadResource` if there is no such descriptor: later it might be one of our own."""
    if number is None:
        return
    try:
        os.fstat(number)
    except (OSError, OverflowError):
        reason = "no such descriptor is open here, let it be inherited"
        raise BadResource(option, str(number), reason) from None


def _tell_ready(number: int) -> None:
    """A newline for whoever waits for it, who is not waited for; the descriptor is let go."""
    try:
        if not wait_writable(number, 0):
            raise BlockingIOError(errno.EAGAIN, "nobody reads it")
        os.write(number, b"\n")
    except OSError as error:
        log.warning('event=ready-not-told reason="--ready-fd %d: %s"', number, error.strerror)
    finally:
        let_go(number)


@contextlib.contextmanager
def _inherited(
    handed: list[Handed], resources: Sequence[Resource], keep: set[int | None]
) -> Iterator[list[Opened]]:
    """What is to be an entry and is open already; what nobody took of it is closed at the end."""
    numbers = [resource for resource in resources if resource.how == "fd"]
    opened = adopt_numbers(numbers, {2, *keep, *(one.number for one in handed)})
    try:
        opened += adopt_handed_over(handed)
        yield opened
    finally:
        discard_all(opened)


def _listener(address: str | None, settings: Settings, bound: socket | None) -> Listener:
    if bound is None:
        mode, group = settings.mode, settings.group
        if mode is None:
            mode = PRIVATE if group is None else GROUP_TOO
        address = default_address() if address is None else address
        return Listener(address, mode=mode, group=group)
    if settings.mode is not None or settings.group is not None:
        log.warning(
            'event=ignored setting="mode, group" reason="the service manager made the socket: '
            'use its SocketMode=, SocketGroup="'
        )
    try:
        return Listener(bound.getsockname(), bound=bound)
    except BaseException:
        bound.close()
        raise


def _server(listener: Listener, sessions: int, tuning: Tuning) -> Server:
    try:
        buffer = mmap.mmap(-1, Ledger.size(sessions, ENTRIES, CELLS))
        lender = Lender(Ledger(memoryview(buffer), sessions, ENTRIES, CELLS))
        return Server(listener, lender, tuning=tuning)
    except BaseException:
        listener.close()
        raise


def _watch_owner(server: Server, owner_fd: int) -> None:
    owner = server.loop.port.watch_end(owner_fd)

    def owner_has_ended(subject: None, events: int) -> None:
        server.loop.unwatch(owner)
        os.close(owner_fd)
        server.drain(None)

    os.set_inheritable(owner_fd, False)
    server.loop.watch(owner, owner_has_ended)


def _remove_folder(address: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(address + ".lock")
        os.rmdir(os.path.dirname(address))


@contextlib.contextmanager
def _signals(
    server: Server, drain_seconds: float, resources: Resources, manager: Manager
) -> Iterator[None]:
    """Signals wake the loop, which then drains or reloads; nothing is ever raised in it.

    The loop is woken from within the C handler.  One in Python would run too late for a signal
    that comes just before the loop waits (signal.set_wakeup_fd).
    """
    arrived, tell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    deadlines = chain([drain_seconds], repeat(0.0))

    def act(subject: None, events: int) -> None:
        for number in os.read(arrived, 64):  # a byte for each signal
            if number == signal.SIGHUP:
                resources.reload()
            else:
                manager.stopping("waiting for loans")
                server.drain(next(deadlines))

    server.loop.watch(Watched(arrived), act)
    before_tell = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    before = {number: signal.signal(number, _noted) for number in SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # what came while it started is acted upon
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
