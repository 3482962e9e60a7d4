"""Whose turn it is: the broker's time is shared by those who want it, uid by uid.

Of each uid that is held to a quota one request is taken up, then one of the next.  Who has used a
millisecond more than its share, by one long request or by many, is put off until it has made up for
that, unless nobody else is there: so the others find the broker idle most of the time, however much
that one asks.  Both what it asks and what it is to be told wait; only its end does not.

A request is long by what it says, such as thousands of names, or by what the kernel does for it in
our thread: of each message it tells every epoll that watches the client's end of the session
(epoll(7)), and there can be a hundred thousand.  Whatever can be long, for whomever, is followed by
a turn of the others.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict, deque
from time import thread_time_ns
from typing import TYPE_CHECKING, Any

from fdbroker.ipc.answers import EMPTIED, GONE, NOTHING, Answers
from fdbroker.ipc.connection import ENDED, UNREAD
from fdbroker.ipc.loop import LONG, READABLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from fdbroker.errors import FDBrokerError
    from fdbroker.ipc.connection import Connection
    from fdbroker.ipc.listener import Listener
    from fdbroker.ipc.loop import Action
    from fdbroker.lender import Lender
    from fdbroker.lender.parts import Session
    from fdbroker.lender.quotas import Account

OTHERS = 4  # times as long as one has taken belongs to the others: its share is a fifth
DECISION = 10_000  # nanoseconds of a request that are not its own, for each who waited for it
UIDS = 1000  # of which we know when they were served, until we look which of these matter still
UNWATCHED: tuple[Any, Any] = None, None


class Turns(Answers):
    """Answers, of which everybody gets some."""

    def __init__(self, listener: Listener, lender: Lender) -> None:
        super().__init__(listener, lender)
        self._served_last: set[Account] = set()
        self._paid_at: dict[int, int] = {}  # by uid: when it has made up for the time it took
        self._put_off: dict[int, int] = {}  # of these, who is not served until then
        self._unheard: dict[int, OrderedDict[Connection, None]] = {}  # who has said something
        self._untold: list[tuple[Session, int, FDBrokerError | None]] = []  # what they are to hear
        self._gone: deque[Connection] = deque()  # who ended meanwhile

    @abstractmethod
    def _serve(self, connection: Connection, events: int) -> None:
        """Receive a message, and act upon it."""

    @abstractmethod
    def admit(self, connection: Connection) -> None:
        """As `Door.begin`."""

    @abstractmethod
    def _finish_jobs(self, about: None, events: int) -> None:
        """Workers have done something."""

    def serving(self, connection: Connection) -> Action:
        """What to do when it can be received from."""
        return self._serve_in_turn if connection.account.limited else self._serve

    def _serve_in_turn(self, connection: Connection, events: int) -> None:
        """As `_serve`, but for who is put off."""
        if self.is_put_off(connection):
            self._hear_later(connection)
            self.rewatch(connection.number, NOTHING, self._leave, connection)
        else:
            self.in_time(connection, self._serve, connection, events)

    def in_turn(self, happened: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """One request of each uid that is held to a quota, and all of the others.

        So who keeps many sessions busy is ahead of nobody by more than one of each batch (`EVENTS`)
        that epoll hands out.  First come those of whom nothing was taken up the last time, last who
        wants to come in, what waited until it was read, and what workers have done.
        """
        now: list[tuple[int, int]] = []
        later: list[tuple[int, int]] = []
        served: set[Account] = set()
        serve, last = self._serve_in_turn, (self._accept, self._send_unsent, self._finish_jobs)
        for event in happened:
            action, about = self._watched.get(event[0], UNWATCHED)
            if action == serve and not self.is_put_off(about):
                account = about.account
                if account in served:
                    continue
                served.add(account)
                if account in self._served_last:
                    later.append(event)
                    continue
            elif action in last:
                later.append(event)
                continue
            now.append(event)
        self._served_last = served
        return now + later

    # --- who takes long ---

    def in_time(self, connection: Connection, act: Callable[..., None], *about: Any) -> None:
        """Do that for it, and see how much of our time it takes.

        Not by the clock: that we were not running is nobody's fault.  What it does for those who
        waited for it is theirs.
        """
        begun, decided = thread_time_ns(), len(self.lender.decisions)
        act(*about)
        took = thread_time_ns() - begun - DECISION * (len(self.lender.decisions) - decided)
        account = connection.account
        if account.limited and took > 0:
            self._charge(account, took)

    def _charge(self, account: Account, took: int) -> None:
        """It has used so much: until when is that paid for?"""
        uid, most = account.uid, self.now + LONG + OTHERS * LONG
        until = max(self.now, self._paid_at.get(uid, 0)) + took + OTHERS * took
        if until > most:
            if self.lender.quotas.total.sessions > account.sessions:
                self._put_off[uid] = until
                self._set_alarm()
            else:
                until = most
        elif len(self._paid_at) > UIDS:
            self._paid_at = {uid: at for uid, at in self._paid_at.items() if at > self.now}
        self._paid_at[uid] = until

    def begin(self, connection: Connection) -> None:
        """The same for who comes; then others may not come either."""
        begun = thread_time_ns()
        try:
            self.admit(connection)
        finally:
            took = thread_time_ns() - begun
            if connection.account.limited:
                self._charge(connection.account, took)
            if took > LONG and not connection.rights.unlimited:
                self.pause_for(took + OTHERS * took)

    def is_put_off(self, connection: Connection) -> bool:
        """Whether it is the others' time."""
        return connection.account.uid in self._put_off

    def tell_later(self, session: Session, seq: int, error: FDBrokerError | None) -> None:
        """Keep a decision for one who is put off."""
        self._untold.append((session, seq, error))

    def _hear_later(self, connection: Connection) -> None:
        self._unheard.setdefault(connection.account.uid, OrderedDict())[connection] = None

    def _send_unsent(self, connection: Connection, events: int) -> None:
        if self.is_put_off(connection) and not events & GONE:
            self._hear_later(connection)
        else:
            self.in_time(connection, super()._send_unsent, connection, events)

    def _leave(self, connection: Connection, events: int) -> None:
        """It is gone: soon, since many can go at once."""
        if events & GONE:
            self._gone.append(connection)
            self._set_alarm()

    def ring(self) -> None:
        """Also: the others have had their time."""
        over = [uid for uid, until in self._put_off.items() if until <= self.now]
        for uid in over:
            del self._put_off[uid]
        if over:
            self.lender.decisions.extend(self._untold)  # who is still put off, is so again
            self._untold.clear()
            self.settle()
        for uid in [uid for uid in self._unheard if uid not in self._put_off]:
            if uid in self._unheard:  # what was decided for it may have been its end
                self._hear_one(uid)
                self.settle()
        if self._gone:
            connection = self._gone.popleft()
            if connection.state != ENDED:
                self.in_time(connection, self.end, connection)
        super().ring()

    def _hear_one(self, uid: int) -> None:
        """One of its connections, since after that it may be put off again."""
        connection = next(iter(self._unheard[uid]))
        self.forget_turn(connection)
        if connection.state == UNREAD:
            self.rewatch(connection.number, EMPTIED, self._send_unsent, connection)
        else:
            self.listen(connection)
            if connection.apart is None:
                self._serve_in_turn(connection, READABLE)
            else:
                self._take_up(connection)

    def forget_turn(self, connection: Connection) -> None:
        """It is heard now, or has ended."""
        uid = connection.account.uid
        if (unheard := self._unheard.get(uid)) is not None:
            unheard.pop(connection, None)
            if not unheard:
                del self._unheard[uid]

    def _set_alarm(self) -> None:
        super()._set_alarm()
        if self._gone or self._unheard or self._put_off:
            due = self._gone or self._unheard.keys() - self._put_off.keys()
            at = self.now if due else min(self._put_off.values())
            self.alarm = min(self.alarm or at, at)
