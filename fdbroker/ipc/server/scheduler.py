"""Whose turn it is: the broker's time is shared by those who want it, uid by uid.

Of each uid that is held to a quota one request is taken up, then one of the next, and each has its
share of the broker's time (shares.py).  Who is put off has to wait with what it asks and with what
it is to be told; only its end does not.  So has who has more than one session ready at a time, with
all but one of them, in order: else we would look at the same thousand of them for each request.

A request is long by what it says, such as thousands of names, or by what the kernel does for it in
our thread: of each message it tells every epoll that watches the client's end of the session
(epoll(7)), and there can be a hundred thousand.  Whatever can be long, for whomever, is followed by
a turn of the others.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from time import thread_time_ns
from typing import TYPE_CHECKING, Any

from fdbroker.ipc.server.connection import ENDED, UNREAD
from fdbroker.ipc.server.event_loop import READABLE
from fdbroker.ipc.server.sender import EMPTIED, GONE, NOTHING, Answers
from fdbroker.ipc.server.shares import LONG, Shares, with_others

if TYPE_CHECKING:
    from collections.abc import Callable

    from fdbroker.errors import FDBrokerError
    from fdbroker.ipc.server.connection import Connection
    from fdbroker.ipc.server.event_loop import Action
    from fdbroker.ipc.transport.listener import Listener
    from fdbroker.lender import Lender
    from fdbroker.lender.accounting import Account
    from fdbroker.lender.model import Session

NEXT = LONG // 2  # until another one is let in, after one of a uid that is put off
UNWATCHED: tuple[Any, Any] = None, None


class Turns(Answers):
    """Answers, of which everybody gets some."""

    def __init__(self, listener: Listener, lender: Lender) -> None:
        super().__init__(listener, lender)
        self._served_last: set[Account] = set()
        self.shares = Shares()
        self._unheard: dict[int, OrderedDict[Connection, None]] = {}  # who has said something
        self._untold: list[tuple[Session, int, FDBrokerError | None]] = []  # what they are to hear
        self._gone: OrderedDict[Connection, None] = OrderedDict()  # who ended meanwhile

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
            self._park(connection)
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
                    self._park(about)
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
        if self._unheard:
            self._set_alarm()
        return now + later

    # --- who takes long ---

    def in_time(self, connection: Connection, act: Callable[..., None], *about: Any) -> None:
        """Do that for it, and see how much of our time it takes.

        Measured in CPU time of this thread, so that preemption is not charged.
        """
        begun, charged = thread_time_ns(), self.shares.charged
        act(*about)
        self._charge(connection.account, thread_time_ns() - begun + charged - self.shares.charged)

    def _charge(self, account: Account, took: int) -> None:
        if not account.limited:
            self.shares.charged += took
        elif took > 0:
            alone = self.draining or self.lender.accounting.total.sessions <= account.sessions
            if self.shares.charge(account.uid, took, self.now, alone=alone):
                self._set_alarm()

    def begin(self, connection: Connection) -> None:
        """The same for who comes; then others may not come either, for a moment."""
        begun = thread_time_ns()
        try:
            self.admit(connection)
        finally:
            took = thread_time_ns() - begun
            self._charge(connection.account, took)
            if took > LONG and not connection.rights.unlimited:
                self.pause_for(with_others(took))
            elif self.is_put_off(connection):
                self.pause_for(NEXT)

    def drain(self, seconds: float | None) -> None:
        """As `Door.drain`.  Nobody is put off from now on: what was returned is to be known."""
        self.shares.forgive(self.now)
        self._serve_again()
        self._set_alarm()
        super().drain(seconds)

    def is_put_off(self, connection: Connection) -> bool:
        """Whether it is the others' time."""
        return connection.account.uid in self.shares.put_off

    def tell_later(self, session: Session, seq: int, error: FDBrokerError | None) -> None:
        """Keep a decision for one who is put off."""
        self._untold.append((session, seq, error))

    def _hear_later(self, connection: Connection) -> None:
        self._unheard.setdefault(connection.account.uid, OrderedDict())[connection] = None

    def _park(self, connection: Connection) -> None:
        """The same for one who asks: it makes no events meanwhile."""
        self._hear_later(connection)
        self.rewatch(connection.number, NOTHING, self._leave, connection)

    def is_parked(self, connection: Connection) -> bool:
        """Whether it has done something, and that was not taken up."""
        return connection in self._unheard.get(connection.account.uid, ())

    def _send_unsent(self, connection: Connection, events: int) -> None:
        if self.is_put_off(connection) and not events & GONE:
            self._hear_later(connection)
        else:
            self.in_time(connection, super()._send_unsent, connection, events)

    def _leave(self, connection: Connection, events: int) -> None:
        """It is gone: soon, since many can go at once."""
        if events & GONE:
            self.unwatch(connection.number)  # or each time it shuts down again is an event
            self._gone[connection] = None
            self._set_alarm()

    def ring(self) -> None:
        """Also: the others have had their time."""
        self._serve_again()
        for uid in [uid for uid in self._unheard if uid not in self.shares.put_off]:
            if uid in self._unheard:  # what was decided for it may have been its end
                self._hear_one(uid)
                self.settle()
        if self._gone:
            connection, _ = self._gone.popitem(last=False)
            if connection.state != ENDED:
                self.in_time(connection, self.end, connection)
        super().ring()

    def _serve_again(self) -> None:
        """Tell those whose time has come what they are to hear."""
        if self.shares.over(self.now):
            self.lender.notifications.extend(self._untold)  # who is still put off, is so again
            self._untold.clear()
            self.settle()

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
        put_off = self.shares.put_off
        if self._gone or self._unheard or put_off:
            due = self._gone or self._unheard.keys() - put_off.keys()
            at = self.now if due else min(put_off.values())
            self.alarm = min(self.alarm or at, at)
