"""A client's sessions: those that are idle, and new ones when none is.

Two kinds are kept apart.  Most *lend*: they carry one request or loan after the other.  Those
that *put* (putter.py) send descriptors and never carry a loan, since a fork would give a copy of
them to a child, and with it a part in the ephemeral entries that they own.
"""

from __future__ import annotations

from collections import defaultdict, deque

from fdbroker._lazy import suppress
from fdbroker.errors import ClosedClientError
from fdbroker.ipc.client import fork
from fdbroker.ipc.client.connection import until_exit
from fdbroker.ipc.client.putter import Putter
from fdbroker.ipc.client.session import Session

IDLE_SESSIONS = 64  # kept for the next request
TRIES = IDLE_SESSIONS + 8  # with another session, where one after the other turns out to be over

# putters of clients that were closed, which live on for what they own: the next client's to use
_owning: defaultdict[str, deque[Putter]] = defaultdict(deque)


class Pool:
    """The sessions of one client with the broker at `address`; for any number of threads.

    Who gives a session back appends it first and then looks whether the pool was closed, and who
    closes it does so first and then ends what is there: one of the two sees it.
    """

    __slots__ = ("address", "closed", "idle", "putters")

    def __init__(self, address: str) -> None:
        self.address = address
        self.closed = False
        self.idle: deque[Session] = deque(maxlen=IDLE_SESSIONS)  # the oldest is dropped, so it ends
        self.putters: deque[Putter] = deque()

    def take(self) -> Session:
        """An idle session that lends, or a new one; the caller's alone until it gives it back."""
        try:
            return self.idle.pop()
        except IndexError:
            return self.open()

    def open(self) -> Session:
        """A new one."""
        if self.closed:
            raise ClosedClientError()
        return Session.open(self.address, self)

    def give(self, session: Session) -> None:
        """Take an idle session back."""
        if not session.over:
            self.idle.append(session)
            if self.closed:
                self.close()

    def take_putter(self) -> Putter:
        """A session that puts."""
        if self.closed:
            raise ClosedClientError()
        for putters in (self.putters, _owning[self.address]):
            with suppress(IndexError):
                return putters.pop()
        return Putter.open(self.address)

    def give_putter(self, putter: Putter) -> None:
        """Take it back, unless its last put went wrong: then it only goes on living."""
        if putter.over:
            return
        if not putter.spoilt:
            self.putters.append(putter)
            if self.closed:
                self.close()

    def close(self) -> None:
        """End the idle sessions; those on loan end when they come back, and those that own
        ephemeral entries with the process."""
        self.closed = True
        with suppress(IndexError):  # another thread may take them out at the same time
            while True:
                self.idle.pop().end()
        with suppress(IndexError):
            while True:
                putter = self.putters.pop()
                if putter.owns:
                    _owning[self.address].append(putter)
                else:
                    putter.end()


def cut_off(address: str) -> None:
    """End what this process has of the broker at `address`, which itself ends now and would wait
    for it.  Loans that are open keep their descriptors."""
    _owning.pop(address, None)
    for wire in [wire for wire in list(until_exit) if wire.address == address]:
        until_exit.discard(wire)
        wire.end()
    with fork.catching_up, fork.GATE:  # no other thread makes one meanwhile
        sessions = list(fork.sessions)
    for session in sessions:
        if isinstance(session, Session) and session.address == address:
            session.cut_off()
