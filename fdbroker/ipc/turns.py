"""Whose turn it is: the broker's time is shared by those who want it, uid by uid.

Of each uid that is held to a quota one request is taken up, then one of the next.  Who has one take
long is put off for some times as long afterwards, unless nobody else is there: so the others have
most of the time, however often that one asks.  Both what it asks and what it is to be told wait.

A request is long by what it says, such as thousands of names, or by what the kernel does for it in
our thread: of each message it tells every epoll that watches the client's end of the session
(epoll(7)), and there can be a hundred thousand.
"""

from __future__ import annotations

from abc import abstractmethod
from time import thread_time_ns
from typing import TYPE_CHECKING, Any

from fdbroker.ipc.answers import NOTHING, Answers
from fdbroker.ipc.connection import ENDED
from fdbroker.lender.books import SECOND

if TYPE_CHECKING:
    from collections.abc import Callable

    from fdbroker.errors import FDBrokerError
    from fdbroker.ipc.connection import Connection
    from fdbroker.ipc.listener import Listener
    from fdbroker.ipc.loop import Action
    from fdbroker.lender import Lender
    from fdbroker.lender.parts import Session
    from fdbroker.lender.quotas import Account

LONG = SECOND // 1000  # of our thread's own time; a usual request takes a hundredth of that
OTHERS = 8  # times as long as it has taken belongs to the others
UNWATCHED: tuple[Any, Any] = None, None


class Turns(Answers):
    """Answers, of which everybody gets some."""

    def __init__(self, listener: Listener, lender: Lender) -> None:
        super().__init__(listener, lender)
        self._served_last: set[Account] = set()
        self._put_off: dict[int, int] = {}  # uids, and until when
        self._unheard: set[Connection] = set()  # which are put off and have said something, ...
        self._untold: list[tuple[Session, int, FDBrokerError | None]] = []  # ... or are to be told

    @abstractmethod
    def _serve(self, connection: Connection, events: int) -> None:
        """Receive a message, and act upon it."""

    def serving(self, connection: Connection) -> Action:
        """What to do when it can be received from."""
        return self._serve_in_turn if connection.account.limited else self._serve

    def _serve_in_turn(self, connection: Connection, events: int) -> None:
        """As `_serve`, but for who is put off."""
        if self.is_put_off(connection):
            self._unheard.add(connection)
            self.rewatch(connection.number, NOTHING, self._leave, connection)
        else:
            self.in_time(connection, self._serve, connection, events)

    def _send_unsent(self, connection: Connection, events: int) -> None:
        self.in_time(connection, super()._send_unsent, connection, events)

    def in_turn(self, happened: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """One request of each uid that is held to a quota, and all of the others.

        So who keeps many sessions busy is ahead of nobody by more than one of each batch (`EVENTS`)
        that epoll hands out.  First come those of whom nothing was taken up the last time, last who
        wants to come in.
        """
        now: list[tuple[int, int]] = []
        later: list[tuple[int, int]] = []
        served: set[Account] = set()
        for event in happened:
            action, about = self._watched.get(event[0], UNWATCHED)
            if action == self._accept or action == self._send_unsent:
                later.append(event)
                continue
            if action == self._serve_in_turn and not self.is_put_off(about):
                if about.account in served:
                    continue
                served.add(about.account)
                if about.account in self._served_last:
                    later.append(event)
                    continue
            now.append(event)
        self._served_last = served
        return now + later

    # --- who takes long ---

    def in_time(self, connection: Connection, act: Callable[..., None], *about: Any) -> None:
        """Do that for it, and see how much of our time it takes.

        Not by the clock: that we were not running is nobody's fault.
        """
        begun = thread_time_ns()
        act(*about)
        took = thread_time_ns() - begun
        account = connection.account
        others = self.lender.quotas.total.sessions > account.sessions
        if took > LONG and account.limited and others:
            self._put_off[account.uid] = self.now + took + OTHERS * took
            self._set_alarm()

    def is_put_off(self, connection: Connection) -> bool:
        """Whether it is the others' time."""
        return connection.account.uid in self._put_off

    def tell_later(self, session: Session, seq: int, error: FDBrokerError | None) -> None:
        """Keep a decision for one who is put off."""
        self._untold.append((session, seq, error))

    def ring(self) -> None:
        """Also: the others have had their time."""
        over = [uid for uid, until in self._put_off.items() if until <= self.now]
        for uid in over:
            del self._put_off[uid]
        if over:
            self.lender.decisions.extend(self._untold)  # who is still put off, is so again
            self._untold.clear()
            unheard, self._unheard = self._unheard, set()
            for connection in unheard:
                if connection.state != ENDED:
                    self.listen(connection)
                    self._take_up(connection)
        super().ring()

    def _set_alarm(self) -> None:
        super()._set_alarm()
        if self._put_off:
            first = min(self._put_off.values())
            self.alarm = min(self.alarm or first, first)
