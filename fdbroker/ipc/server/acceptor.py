"""The door: who comes to the broker, until they have said hello.

It accepts while there are descriptors for more than the broker itself, and waits a moment where it
cannot: EMFILE, ENFILE, ENOBUFS and ENOMEM leave the connection queued (accept(2)), and a
level-triggered epoll would spin on it.  Who may not come, or has enough already, is told so and
turned away; after some of these nobody is accepted for a moment, since they may come again.

Who is let in and says nothing is shown out again; so is who asks on and does not read what it was
sent: nothing is received from that one, and what it sent last may be all that keeps its own end
open.
"""

from __future__ import annotations

import contextlib
import logging
from abc import abstractmethod
from typing import TYPE_CHECKING

from fdbroker.errors import FDBrokerError
from fdbroker.ipc.protocol.messages import encode_error
from fdbroker.ipc.server.connection import GREETING, Connection
from fdbroker.ipc.server.event_loop import Loop
from fdbroker.ipc.server.jobs import HangUp
from fdbroker.ipc.server.policy import log_refusal
from fdbroker.ipc.transport import unix
from fdbroker.ipc.transport.rlimit import descriptors_in_use, limit
from fdbroker.lender.accounting import GRACE
from fdbroker.lender.model import SECOND, Peer

if TYPE_CHECKING:
    from fdbroker.ipc.transport.listener import Listener
    from fdbroker.lender import Lender
    from fdbroker.lender.accounting import Account

# descriptors that are the broker's own: to accept one more, to look at /proc, to reload
RESERVE = 4
OFFENCES = 4  # by those who may not do all, after which nobody is accepted for the time of a REST,
REST = SECOND // 125  # which is short: who comes behind a queue full of such waits for all of them
ASK = SECOND // 4  # until we ask again who was hung up on whether that has read
PAUSE = SECOND  # until a listener that could not accept is tried again
HELLO_TIME = 10 * SECOND  # in which a connection must have said hello, or read what it was sent

log = logging.getLogger("fdbroker")


class Door(Loop):
    """A loop that accepts connections at `listener`."""

    def __init__(self, listener: Listener, lender: Lender) -> None:
        super().__init__(lender)
        self.listener = listener
        self._shut = False  # for good
        self._told = False  # that it cannot accept, and since then it could not
        self._resume_at = 0  # if it pauses, and nothing becomes free before
        self._rest_until = 0
        self._offences = 0  # since the last rest
        self._hung_up: set[Connection] = set()  # that are not closed yet
        self._ask_at = 0  # whether these were read, if any of them has something in flight
        self._awaited: dict[Connection, int] = {}  # until when each must have done so, in order
        unix.refuse_descriptors(listener.sock)  # connections inherit it
        self.watch(self._number, self._accept)

    @property
    def _number(self) -> int:
        """The listener's.  No attribute: an object with thirty of them is slower (CPython 3.11)."""
        return self.listener.sock.fileno()

    @abstractmethod
    def begin(self, connection: Connection) -> None:
        """It has come.  OSError, `FDBrokerError`: it cannot be served."""

    @abstractmethod
    def end(self, connection: Connection) -> None:
        """It is over."""

    @abstractmethod
    def is_parked(self, connection: Connection) -> bool:
        """Whether it has done something, and that was not taken up."""

    def run(self) -> None:
        """As `Loop.run`.  What is left of the limit of descriptors, clients may use from now on."""
        quotas = self.lender.accounting
        quotas.own = descriptors_in_use() - quotas.total.descriptors + RESERVE
        quotas.descriptors = max(0, limit() - quotas.own)
        quotas.capacity["inflight"] = limit()  # as the kernel has it for the broker's uid
        super().run()

    def drain(self, seconds: float | None) -> None:
        """As `Loop.drain`.  Who connects from now on waits for the next broker, if there is one."""
        if self.listener.lasting:
            self._shut = True
            self._pause()
        super().drain(seconds)

    def _accept(self, about: None, events: int) -> None:
        if self.lender.accounting.free_descriptors <= 0:
            self._cannot_accept("every descriptor is in use")
            return
        try:
            sock = self.listener.accept()
        except OSError as error:
            self._cannot_accept(error.strerror)
            self._resume_after(PAUSE)  # it may be somebody else's shortage, and end unseen
            return
        if sock is None:
            return
        connection = Connection(sock, Peer(*unix.credentials(sock)), self.lender.accounting)
        try:
            self.begin(connection)
        except FDBrokerError as refusal:
            self._turn_away(connection, refusal)
            return
        except OSError as error:  # max_user_watches (epoll(7)), which others can use up
            sock.close()
            self.lender.accounting.drop_idle(connection.account)
            self._cannot_accept(error.strerror)
            self._resume_after(PAUSE)
            return
        self._told = False
        self.wait_for(connection)

    def _cannot_accept(self, why: str | None) -> None:
        if not self._told:
            log.warning("event=accept-paused error=%r", why)
        self._told = True
        self._pause()

    def _pause(self) -> None:
        """Who connects now is queued by the kernel."""
        self._resume_at = 0
        self.unwatch(self._number)

    def _resume_after(self, nanoseconds: int) -> None:
        self._resume_at = self.now + nanoseconds
        self._set_alarm()

    def _turn_away(self, connection: Connection, refusal: FDBrokerError) -> None:
        """Tell it why, as the answer to its hello, and hang up."""
        log_refusal(connection, refusal)
        self.rest(connection)
        with contextlib.suppress(OSError):
            connection.sock.send(encode_error(0, refusal), unix.SEND_NOW)
        self.lender.accounting.add(connection.account, "sessions", 1)
        self._hang_up(connection)

    def _hang_up(self, connection: Connection) -> None:
        """The end of its session: close what it sent and we had not received, then its socket.

        Few of what comes out of it get numbers, if there is room on its account, and as much again.
        """
        self._hung_up.add(connection)
        self.unwatch(connection.number)
        unix.shut_down(connection.sock)
        if not connection.brings_descriptors:
            unix.drain(connection.sock)
            self.part(connection)
            return
        most = GRACE if connection.rights.admitted else 0
        try:
            self.lender.accounting.check(connection.account, "closes", 2 * most)
        except FDBrokerError:
            most = 0
        self.lender.accounting.add(connection.account, "closes", most)
        self.workers.submit(HangUp(connection, most))

    def part(self, connection: Connection) -> None:
        """Nothing is in its socket any more: close it, now or when no descriptors are in flight to
        it any more.  Once it is closed, we could not ask.

        It is not watched meanwhile, since its peer could make events as it likes.
        """
        if connection not in self._hung_up:  # a worker had found it empty, and we looked
            return
        if connection.apart is not None and connection.apart.begun:  # so it is in use
            return
        if connection.inflight and connection.unread_bytes():
            self._ask_at = self._ask_at or self.now + ASK
            self._set_alarm()
            return
        self._hung_up.remove(connection)
        connection.sock.close()
        self.lender.accounting.add(connection.account, "inflight", -connection.inflight)
        self.release(connection.account, "sessions", 1)

    def rest(self, connection: Connection) -> None:
        """It was turned away, or broke the rules, and may come again at once: not so fast.

        Who waits meanwhile is queued by the kernel; who is in, is served.
        """
        self.note_offences(connection, 1)
        if self._offences >= OFFENCES:
            self._offences = 0
            self.pause_for(REST)

    def pause_for(self, nanoseconds: int) -> None:
        """Accept nobody meanwhile."""
        if not self._shut:
            self._pause()
            self._rest_until = max(self._rest_until, self.now + nanoseconds)
            self._resume_after(self._rest_until - self.now)

    def note_offences(self, connection: Connection, count: int) -> None:
        """It did what costs as much as so many."""
        if not connection.rights.unlimited:
            self._offences += count

    def wait_for(self, connection: Connection) -> None:
        """It must say hello in time, or read."""
        self._awaited[connection] = self.now + HELLO_TIME
        self._set_alarm()

    def has_come(self, connection: Connection) -> None:
        """It has done so, or is over."""
        if self._awaited.pop(connection, None) is not None:
            self._set_alarm()

    def release(self, account: Account | None, what: str, count: int) -> None:
        """It has so many less of the broker's descriptors, which may be what somebody waits for."""
        self.lender.accounting.add(account, what, -count)
        self.resume_accepting()

    def resume_accepting(self) -> None:
        """A descriptor has become free, or the pause is over."""
        if self._shut or self._number in self._watched or self.now < self._rest_until:
            return
        if self.lender.accounting.free_descriptors > 0:
            self._resume_at = 0
            try:
                self.watch(self._number, self._accept)
            except OSError as error:  # as in `_accept`
                self._cannot_accept(error.strerror)
                self._resume_after(PAUSE)

    def ring(self) -> None:
        """The pause is over, or somebody has done nothing for too long."""
        if self._resume_at and self.now >= self._resume_at:
            self._resume_at = 0
            self.resume_accepting()
        if self._ask_at and self.now >= self._ask_at:
            self._ask_at = 0
            for connection in [one for one in self._hung_up if not one.brings_descriptors]:
                self.part(connection)
        for connection, until in self._awaited.items():
            if until <= self.now and self.is_parked(connection):
                self.has_come(connection)
                self.wait_for(connection)
            elif until <= self.now:
                reason = "it-said-no-hello" if connection.state == GREETING else "it-does-not-read"
                log.warning("event=ended %s reason=%s", connection, reason)
                self.end(connection)
            break  # the next one after the others had their turn: to end one may take long
        self._set_alarm()

    def _set_alarm(self) -> None:
        times = next(iter(self._awaited.values()), 0), self._resume_at, self._ask_at
        self.alarm = min(filter(None, times), default=0)
