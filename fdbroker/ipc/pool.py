"""A client's sessions: those that are idle, and new ones when none is.

Two kinds are kept apart.  Most carry one request or loan after the other.  The *owners* have put
an ephemeral entry, which retires when its session ends: they never carry a loan, since a fork
would give a copy to a child, and they live as long as the process.
"""

from __future__ import annotations

from collections import deque

from fdbroker.errors import ClosedClientError
from fdbroker.ipc import forks
from fdbroker.ipc.session import Session

IDLE_SESSIONS = 64  # kept for the next request; more of them end when they come back

_until_exit: list[Session] = []  # owners of closed clients, sessions of detached descriptors


class Pool:
    """The sessions of one client with the broker at `address`; for any number of threads."""

    __slots__ = ("_idle", "_owners", "address", "closed")

    def __init__(self, address: str) -> None:
        self.address = address
        self.closed = False
        self._idle: deque[Session] = deque()
        self._owners: deque[Session] = deque()

    def take(self) -> Session:
        """An idle session, or a new one; the caller's alone until it gives it back."""
        return self._take(self._idle)

    def take_owner(self) -> Session:
        """The same, of those that own ephemeral entries."""
        return self._take(self._owners)

    def _take(self, idle: deque[Session]) -> Session:
        if self.closed:
            raise ClosedClientError()
        if forks.later:  # what an interrupted finalizer left
            forks.catch_up()
        while True:
            try:
                session = idle.pop()
            except IndexError:
                return Session.open(self.address, self)
            if not session.over:  # a fork may have ended it
                return session

    def give(self, session: Session) -> None:
        """Take an idle session back."""
        if session.over:
            return
        if self.closed or len(self._idle) >= IDLE_SESSIONS:
            session.end()
        else:
            self._idle.append(session)

    def give_owner(self, session: Session) -> None:
        """Take back a session that owns ephemeral entries."""
        if not session.over:
            (_until_exit if self.closed else self._owners).append(session)

    def close(self) -> None:
        """End the idle sessions; those on loan end when they come back."""
        self.closed = True
        while self._idle:
            self._idle.pop().end()
        while self._owners:
            _until_exit.append(self._owners.pop())


def keep_until_exit(session: Session) -> None:
    """Keep a session open as long as the process lives, and in its forked children."""
    session.kept = True
    _until_exit.append(session)


def end_kept(address: str) -> None:
    """End the sessions that were kept for the broker at `address`, which itself ends now."""
    for session in [session for session in _until_exit if session.address == address]:
        _until_exit.remove(session)
        session.end()
