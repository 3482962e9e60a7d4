"""What a piece of code left open: the descriptors of this process before and after it, and where
each of the new ones was opened.

What is open, the kernel says (/proc/self/fd).  Where it was opened, only Python can know, and of
two things only: an audit hook (`sys.addaudithook`) is told of each opening of a file, with its
path, and of each new socket object.  Neither has a number yet, so a file is found again by its
path and a socket by its object.  Of a pipe, a dup, a memfd, an epoll, of what was received, and of
what C code opens, nobody is told: that is said to be unknown rather than guessed.

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
FRAMES = 10  # of a stack that are remembered, the innermost
STACKS = 3  # that are shown of one path that was opened in many places
GRACE_SECONDS = 1.0  # for other threads to close what they have open just now
RUNNERS = ("_pytest.", "pluggy.")  # the stack of a test ends where these begin

Stack = tuple[tuple[str, int, str], ...]  # file, line, function; the innermost first


class Leak(NamedTuple):
    """A descriptor that is open, and was not before."""

    number: int
    kind: str
    """As `descriptors.Kind.label` has it: ``listening socket``."""
    where: str
    """The path of a file, the address of a socket; what /proc says of the rest."""
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

    For one thread at a time.  What this process's clients of brokers keep for the next request is
    no leak, and neither are the helpers that multiprocessing starts once; a loan is.
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
        """This one is meant to stay open: it is no leak."""
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        self._kept |= {one for one in _open_descriptors() if one.number == number}

    def leaks(self) -> list[Leak]:
        """What was opened since the block began and is open still, by number.

        What seems to leak is given two chances: a garbage collection, since objects of a cycle
        close late, and in a process with several threads `GRACE_SECONDS`, since what another
        thread has open just now may be closed the next instant.
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
        except OSError:  # another thread has closed it just now
            return None
        return Leak(number, kind, where or link, self._openings.of(number, link))


class Identity(NamedTuple):
    """What makes a descriptor the same one as before; not its path, which may have changed."""

    number: int
    device: int
    inode: int
    anonymous: str  # what it is, where all have one inode: an eventfd, an epoll


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
    """The numbers that libraries keep until the process ends, for whoever was the first to ask."""
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
    """What the audit hook was told of files and sockets.  Any thread may tell."""

    def __init__(self) -> None:
        self._files: deque[tuple[str, bool, Stack]] = deque(maxlen=OPENINGS)
        self._sockets: WeakKeyDictionary[socket, Stack] = WeakKeyDictionary()

    def note_file(self, path: Any, flags: int, stack: Stack) -> None:
        """A file is about to be opened; `path` may be a number, which is open already."""
        if not isinstance(path, int):
            nameless = flags & os.O_TMPFILE == os.O_TMPFILE  # then the path is that of its folder
            self._files.append((os.path.abspath(os.fsdecode(path)), nameless, stack))

    def note_socket(self, sock: Any, stack: Stack) -> None:
        """A socket object is about to get its descriptor."""
        self._sockets[sock] = stack

    def of(self, number: int, link: str) -> list[Stack]:
        """Where descriptor `number`, of which /proc/self/fd says `link`, may have been opened."""
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
    """From now on the audit hook tells `openings`, or nobody.  The result is whom it told so far.

    A check within a check, as of a test that runs pytest, hears all the while it lasts.
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
    # What a hook raises, the open itself would raise.  So what cannot be noted is not: the working
    # directory is gone, the socket takes no weak reference, the event has another form.
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
