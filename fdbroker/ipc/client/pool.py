"""A client's sessions: the idle ones, and new ones when none is idle.

Sessions that carry loans and sessions that put descriptors are kept apart (session.py).
"""

from __future__ import annotations

from collections import defaultdict, deque

from fdbroker._lazy import suppress
from fdbroker.errors import ClosedClientError
from fdbroker.ipc.client import fork
from fdbroker.ipc.client.connection import kept_until_exit
from fdbroker.ipc.client.session import PutSession, Session

IDLE_SESSIONS = 64  # kept for the next request
TRIES = IDLE_SESSIONS + 8  # with another session each, where one after the other proves stale

_orphans: defaultdict[str, deque[PutSession]] = defaultdict(deque)
"""By address: put sessions of closed clients, which live on for the entries that they own.  The
next client of that address uses them."""


class Pool:
    """The sessions of one client with the broker at `address`; for any number of threads.

    `release` appends a session before it looks whether the pool is closed; `close` notes that
    before it ends the idle sessions.  So one of the two sees a session that is released meanwhile.
    """

    __slots__ = ("address", "closed", "idle", "put_sessions")

    def __init__(self, address: str) -> None:
        self.address = address
        self.closed = False
        self.idle: deque[Session] = deque(maxlen=IDLE_SESSIONS)  # the oldest is dropped, and ends
        self.put_sessions: deque[PutSession] = deque()

    def acquire(self) -> Session:
        """Return an idle session, or a new one; it is the caller's alone until its release."""
        try:
            return self.idle.pop()
        except IndexError:
            return self.open()

    def open(self) -> Session:
        """Return a new session."""
        if self.closed:
            raise ClosedClientError()
        return Session.open(self.address, self.release)

    def release(self, session: Session) -> None:
        """Take back a session that is idle again, or was closed meanwhile."""
        if not session.closed:
            self.idle.append(session)
            if self.closed:
                self.close()

    def acquire_put_session(self) -> PutSession:
        """Return an idle put session, or a new one."""
        if self.closed:
            raise ClosedClientError()
        for sessions in (self.put_sessions, _orphans[self.address]):
            with suppress(IndexError):
                return sessions.pop()
        return PutSession.open(self.address)

    def release_put_session(self, session: PutSession) -> None:
        """Take back a put session; one whose last put failed is not used again."""
        if session.closed or session.broken:
            return
        self.put_sessions.append(session)
        if self.closed:
            self.close()

    def close(self) -> None:
        """End the idle sessions.

        The sessions on loan end when they are released, and the ones that own ephemeral entries
        with the process.
        """
        self.closed = True
        with suppress(IndexError):  # another thread may take them out at the same time
            while True:
                self.idle.pop().end()
        with suppress(IndexError):
            while True:
                session = self.put_sessions.pop()
                if session.owns_ephemeral:
                    _orphans[self.address].append(session)
                else:
                    session.end()


def disconnect_all(address: str) -> None:
    """End this process's sessions with the broker at `address`, which is about to end itself.

    It would wait for them.  Loans that are open keep their descriptors.
    """
    _orphans.pop(address, None)
    for connection in [one for one in list(kept_until_exit) if one.address == address]:
        kept_until_exit.discard(connection)
        connection.end()
    with fork.deferred_cleanup, fork.FORK_LOCK:  # no other thread makes a session meanwhile
        sessions = list(fork.sessions)
    for session in sessions:
        if isinstance(session, Session) and session.address == address:
            session.disconnect()
