"""Finds the descriptors that a piece of code left open, and where each of them was opened.

The kernel lists the open descriptors (/proc/self/fd), before the code and after it.  Where one was
opened only Python can know, and of two kinds only: an audit hook (`sys.addaudithook`) is told of
each opening of a file, with its path, and of each new socket object.  Neither has a number yet, so
a file is found again by its path and a socket by its object.  The hook is not told of a pipe, a
dup, a memfd, an epoll, of received descriptors, nor of what C code opens; their origin is reported
as unknown and not guessed.

An audit hook stays for as long as the process lives.  So it is added at the first check, and
between checks it looks at one variable.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import traceback
from _thread import _count as other_threads
from collections import deque
from socket import socket
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from fdbroker.descriptors import inspect
from fdbroker.errors import UnsupportedKind

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from fdbroker.ipc.client.client import HasFileno

OPENINGS = 10_000  # of files that are remembered, the last ones
FRAMES = 10  # innermost ones of a stack that are remembered
STACKS = 3  # that are shown of one path that was opened in many places
GRACE_SECONDS = 1.0  # for other threads to close what they have open just now
RUNNERS = ("_pytest.", "pluggy.")  # the stack of a test ends where these begin

Stack = tuple[tuple[str, int, str], ...]  # file, line, function; the innermost first


class Leak(NamedTuple):
    """A descriptor that is open now and was not before."""

    number: int
    kind: str
    """As `descriptors.Kind.label` has it: ``listening socket``."""
    where: str
    """The path of a file, the address of a socket; for the rest the link in /proc."""
    stacks: list[Stack]
    """Where it was opened; several, if its path was opened in several places; none: unknown."""

    def __str__(self) -> str:
        lines = [f"fd {self.number}: {self.kind} {self.where}"]
        if not self.stacks:
            lines.append("  where it was opened is not known")
        for stack in self.stacks[:STACKS]:
            lines.append("  opened here:" if len(self.stacks) == 1 else "  opened here, maybe:")
            frames = [traceback.FrameSummary(*frame) for frame in reversed(stack)]
            for entry in traceback.format_list(frames):
                lines += [f"  {line}" for line in entry.splitlines()]
        return "\n".join(lines)


class LeakCheck:
    """``with LeakCheck() as check:`` and, in the block, ``check.leaks()`` for what it left open.

    For one thread at a time.  The sessions that clients of this process keep for the next request
    are no leaks, and neither are the helpers that multiprocessing starts once; a loan is one.
    """

    def __init__(self) -> None:
        self._before: set[Identity] = set()
        self._kept: set[Identity] = set()
        self._openings = Openings()
        self._outer: Openings | None = None  # of a check that this one is within

    def __enter__(self) -> LeakCheck:
        self._outer = _listen(self._openings)
        self._before = set(_open_descriptors())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _listen(self._outer)

    def keep(self, descriptor: HasFileno | int) -> None:
        """Count this descriptor, which is meant to stay open, as no leak."""
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        self._kept |= {one for one in _open_descriptors() if one.number == number}

    def leaks(self) -> list[Leak]:
        """Return the descriptors that were opened since the block began and still are, by number.

        A seeming leak is given two chances: a garbage collection, since objects of a cycle close
        late, and in a process with several threads `GRACE_SECONDS`, since another thread may close
        the next instant what it has open just now.
        """
        left = self._left()
        if left:
            gc.collect()
            left &= self._left()
        deadline = monotonic() + GRACE_SECONDS
        while left and other_threads() and monotonic() < deadline:
            sleep(0.01)
            left &= self._left()
        numbers = sorted(identity.number for identity in left)
        return [leak for leak in map(self._leak, numbers) if leak is not None]

    def _left(self) -> set[Identity]:
        now = set(_open_descriptors()) - self._before - self._kept
        numbers = _kept_for_life()
        return {identity for identity in now if identity.number not in numbers}

    def _leak(self, number: int) -> Leak | None:
        try:
            link = os.readlink(f"/proc/self/fd/{number}")
            try:
                known, where = inspect(number)
                kind = known.label
            except UnsupportedKind as error:
                kind, where = error.kind, ""
        except OSError:  # another thread has closed it meanwhile
            return None
        return Leak(number, kind, where or link, self._openings.of(number, link))


class Identity(NamedTuple):
    """Tells whether a descriptor is the same one as before, although its path may have changed."""

    number: int
    device: int
    inode: int
    anonymous: str  # the kind of those that share one inode: an eventfd, an epoll


def _open_descriptors() -> list[Identity]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{number}"
        with contextlib.suppress(OSError):  # the listing's own is gone, and so may others be
            status, link = os.stat(path), os.readlink(path)
            anonymous = link if link.startswith("anon_inode:") else ""
            found.append(Identity(int(number), status.st_dev, status.st_ino, anonymous))
    return found


def _kept_for_life() -> set[int]:
    """Return the numbers that libraries keep until the process ends, once they are first used."""
    numbers = set()
    for name, *attributes in (
        ("multiprocessing.resource_tracker", "_resource_tracker", "_fd"),
        ("multiprocessing.forkserver", "_forkserver", "_forkserver_alive_fd"),
    ):
        value: Any = sys.modules.get(name)
        for attribute in attributes:
            value = getattr(value, attribute, None)
        if isinstance(value, int):
            numbers.add(value)
    if "fdbroker.ipc.client.connection" in sys.modules:
        from fdbroker.ipc.client import fork
        from fdbroker.ipc.client.connection import ClientConnection

        for session in list(fork.sessions):
            if isinstance(session, ClientConnection) and not session.closed:
                numbers.add(session.link.fileno())
    return numbers


# --- where it was opened ---------------------------------------------------------------------


class Openings:
    """The openings of files and sockets that the audit hook was told of, by any thread."""

    def __init__(self) -> None:
        self._files: deque[tuple[str, bool, Stack]] = deque(maxlen=OPENINGS)
        self._sockets: WeakKeyDictionary[socket, Stack] = WeakKeyDictionary()

    def note_file(self, path: Any, flags: int, stack: Stack) -> None:
        """Note that a file is about to be opened; `path` may be a number, which is open already."""
        if not isinstance(path, int):
            nameless = flags & os.O_TMPFILE == os.O_TMPFILE  # then the path is that of its folder
            self._files.append((os.path.abspath(os.fsdecode(path)), nameless, stack))

    def note_socket(self, sock: Any, stack: Stack) -> None:
        """Note that a socket object is about to get its descriptor."""
        self._sockets[sock] = stack

    def of(self, number: int, link: str) -> list[Stack]:
        """Return where descriptor `number`, with this link in /proc, may have been opened."""
        if link.startswith("socket:"):
            sockets = [reference() for reference in self._sockets.keyrefs()]
            return [
                self._sockets[sock]
                for sock in sockets
                if sock is not None and sock.fileno() == number
            ]
        path = link.removesuffix(" (deleted)")
        folder = os.path.dirname(path) if path != link else None
        stacks = [
            stack
            for name, nameless, stack in list(self._files)
            if os.path.realpath(name) == (folder if nameless else path)
        ]
        return list(dict.fromkeys(reversed(stacks)))  # the last one first


_listening: Openings | None = None
_hooked = False


def _listen(openings: Openings | None) -> Openings | None:
    """Have the audit hook tell `openings` from now on; returns the ones that it told so far.

    A check within a check, as in a test that runs pytest, is told as long as it lasts.
    """
    global _listening, _hooked
    if openings is not None and not _hooked:
        sys.addaudithook(_hear)
        _hooked = True
    before, _listening = _listening, openings
    return before


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    openings = _listening
    if openings is None or event not in ("open", "socket.__new__"):
        return
    # An exception of a hook would become one of the open itself.  So nothing is noted where it
    # cannot be: the working directory is gone, the socket takes no weak reference, the event has
    # another form.
    with contextlib.suppress(OSError, TypeError, ValueError):
        stack = _stack(sys._getframe().f_back)
        if event == "open":
            path, _, flags = arguments
            openings.note_file(path, flags, stack)
        else:
            openings.note_socket(arguments[0], stack)


def _stack(frame: FrameType | None) -> Stack:
    found: list[tuple[str, int, str]] = []
    while frame is not None and len(found) < FRAMES:
        if str(frame.f_globals.get("__name__")).startswith(RUNNERS):
            break
        found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return tuple(found)
