"""The door: who comes to the broker, until they have said hello.

It accepts, and waits a moment where it cannot: EMFILE, ENFILE, ENOBUFS and ENOMEM leave the
connection queued (accept(2)), and a level-triggered epoll would spin on it.  Who is let in and says
nothing is shown out again.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import TYPE_CHECKING

from fdbroker.ipc import unix
from fdbroker.ipc.connection import Connection
from fdbroker.ipc.loop import Loop
from fdbroker.lender.books import SECOND
from fdbroker.lender.parts import Peer

if TYPE_CHECKING:
    from fdbroker.ipc.listener import Listener
    from fdbroker.lender import Lender

PAUSE = SECOND  # until a listener that could not accept is tried again
HELLO_TIME = 10 * SECOND  # in which a connection must have said hello

log = logging.getLogger("fdbroker")


class Door(Loop):
    """A loop that accepts connections at `listener`."""

    def __init__(self, listener: Listener, lender: Lender) -> None:
        super().__init__(lender)
        self.listener = listener
        self._number = listener.sock.fileno()
        self._accepting = True
        self._resume_at = 0  # if it is not, and nothing becomes free before
        self._greeting: dict[Connection, int] = {}  # until when each must have said hello, in order
        unix.refuse_descriptors(listener.sock)  # connections inherit it
        self.watch(self._number, self._accept)

    @abstractmethod
    def begin(self, connection: Connection) -> None:
        """It has come.  OSError: it cannot be served."""

    @abstractmethod
    def end(self, connection: Connection) -> None:
        """It is over."""

    def drain(self, seconds: float | None) -> None:
        """As `Loop.drain`.  Who connects from now on waits for the next broker, if there is one."""
        if self.listener.lasting:
            self.unwatch(self._number)
            self._accepting = True  # so it is not resumed
        super().drain(seconds)

    def _accept(self, about: None, events: int) -> None:
        try:
            sock = self.listener.accept()
        except OSError as error:
            if self._accepting:
                log.warning("event=accept-paused error=%r", error.strerror)
            self._accepting = False
            self.unwatch(self._number)
            self._resume_at = self.now + PAUSE  # it may be somebody else's shortage, and end unseen
            self._set_alarm()
            return
        self._accepting = True
        if sock is not None:
            connection = Connection(sock, Peer(*unix.credentials(sock)))
            self.begin(connection)
            self._greeting[connection] = self.now + HELLO_TIME
            self._set_alarm()

    def has_greeted(self, connection: Connection) -> None:
        """It has said hello, or is over."""
        if self._greeting.pop(connection, None) is not None:
            self._set_alarm()

    def resume_accepting(self) -> None:
        """A descriptor has become free, or the pause is over."""
        self._resume_at = 0
        if not self._accepting and self._number not in self._watched:
            self.watch(self._number, self._accept)

    def ring(self) -> None:
        """The pause is over, or somebody has said nothing for too long."""
        if self._resume_at and self.now >= self._resume_at:
            self.resume_accepting()
        for connection in [one for one, until in self._greeting.items() if until <= self.now]:
            log.warning("event=ended %s reason=it-said-no-hello", connection)
            self.end(connection)
        self._set_alarm()

    def _set_alarm(self) -> None:
        times = next(iter(self._greeting.values()), 0), self._resume_at
        self.alarm = min(filter(None, times), default=0)
