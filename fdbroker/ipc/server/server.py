"""The broker's server: it composes the parts of this folder, and is the only one that knows all.

    event_loop     calls handlers, timers, and what workers post
    acceptor       accepts connections while there are descriptors for them
    receiver       receives the next message: now, in the user's turn, or in a worker
    dispatcher     decodes the message and finds its handler
    handlers       one method for each verb, over the lender
    delivery       answers, and what becomes of a grant that cannot be sent yet; with the sender
    sessions       all connections and their sessions
    disconnector   from the end of a session until its socket is closed
    scheduler      the turns of the users that are held to a quota
    worker_pool    threads for system calls that can take seconds; their jobs are in jobs
    policy         the rules, as they hold for each peer

A part knows the parts that it was given, and never the server: it returns a result, or calls a
callback.  The server trusts nobody, never waits for a client, and never polls a descriptor that it
lends.  A fault of a client ends that client's session.
"""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from typing import TYPE_CHECKING

from fdbroker.errors import BrokerClosing, EntryRetired, FDBrokerError
from fdbroker.ipc.protocol.codec import encode, encode_error
from fdbroker.ipc.server.acceptor import Acceptor
from fdbroker.ipc.server.connection import ENDED, ServerConnection
from fdbroker.ipc.server.custody import Custody
from fdbroker.ipc.server.delivery import Delivery
from fdbroker.ipc.server.disconnector import Disconnector
from fdbroker.ipc.server.dispatcher import Dispatcher
from fdbroker.ipc.server.event_loop import SECOND, EventLoop
from fdbroker.ipc.server.handlers import Handlers
from fdbroker.ipc.server.jobs import CloseEntry
from fdbroker.ipc.server.log import log_refusal
from fdbroker.ipc.server.policy import AccessPolicy
from fdbroker.ipc.server.receiver import Receiver
from fdbroker.ipc.server.request_cache import RequestCache
from fdbroker.ipc.server.scheduler import FairScheduler
from fdbroker.ipc.server.sender import Sender
from fdbroker.ipc.server.sessions import Sessions
from fdbroker.ipc.server.tuning import TUNING, Tuning
from fdbroker.ipc.server.worker_pool import WorkerPool
from fdbroker.ipc.transport import Port, now_ns, parcel
from fdbroker.ipc.transport.rlimit import descriptors_in_use, limit
from fdbroker.lender.accounting import DEFAULT, Quota
from fdbroker.lender.model import LENT, Peer

if TYPE_CHECKING:
    from collections.abc import Callable

    from fdbroker.ipc.server.event_loop import Timer
    from fdbroker.ipc.transport import Channel, Listener
    from fdbroker.lender import Lender
    from fdbroker.lender.accounting import Account, Charge
    from fdbroker.lender.model import Entry, Session
    from fdbroker.lender.rules import Rights, Rule

# The scheduler's user for all who connect and are nobody yet.
NEWCOMERS = "newcomers"
# A drain that may take longer has no deadline.
LIFETIME_SECONDS = 10**10

log = logging.getLogger("fdbroker")


class Server:
    """Serves the entries of `lender` at `listener`, which this owns, until it has drained.

    `port` is owned, too; None: a new one.  `clock` returns nanoseconds of the ledger's clock.
    """

    def __init__(
        self,
        listener: Listener,
        lender: Lender,
        custody: Custody | None = None,
        *,
        tuning: Tuning = TUNING,
        port: Port | None = None,
        clock: Callable[[], int] = now_ns,
    ) -> None:
        accounting = lender.accounting
        self.lender = lender
        self.custody = custody or Custody()
        self.draining = False
        self._scheduler = scheduler = FairScheduler()
        self.loop = loop = EventLoop(
            port or Port(),
            clock,
            settle=self.settle,
            work=(lender.notifications, lender.pending_closes),
            run_next=scheduler.run_next,
            backlog=scheduler.queues,
        )
        self.workers = WorkerPool(loop.post, tuning)
        self._tuning = tuning
        self._policy = AccessPolicy()
        self._deadline: Timer | None = None
        # Notifications that wait for the turn of their users.
        self._undelivered = 0
        self._sessions = Sessions(loop, lender, self.custody, scheduler, tuning, end=self.end)
        connections = self._sessions.connections
        self._sender = Sender(loop, accounting, connections.keys(), tuning)
        self._disconnector = Disconnector(loop, self.workers, scheduler, accounting, tuning)
        self._delivery = Delivery(
            *(loop, lender, self._sender, self.workers, scheduler),
            end=self.end,
            rearm=self._rearm,
        )
        self._handlers = Handlers(
            *(loop, lender, self._delivery),
            custody=self.custody,
            wait_began=self._arm_deadline,
            refresh_usage=self._sender.refresh_unread,
            stats=self.stats,
        )
        self._dispatcher = Dispatcher(
            *(loop, lender, self._sessions, self._delivery, self._sender, self._handlers),
            RequestCache(),
            end=self.end,
            rearm=self._rearm,
        )
        self._receiver = Receiver(
            *(loop, accounting, self.workers, scheduler, self._sessions),
            *(self._dispatcher, self._delivery),
            end=self.end,
            worker_is_done=self._disconnector.worker_is_done,
        )
        self._acceptor = Acceptor(
            *(loop, listener, accounting, tuning),
            on_connect=self._connect,
            schedule=self._schedule_newcomer,
        )

    @property
    def now(self) -> int:
        """When the events at hand were taken, in nanoseconds of the ledger's clock."""
        return self.loop.now

    # --- its life ---

    def run(self) -> None:
        """Serve until drained.  Clients may use what is left of the limit of descriptors."""
        accounting = self.lender.accounting
        reserved = self._tuning.reserved_fds
        accounting.own = descriptors_in_use() - accounting.total.descriptors + reserved
        accounting.descriptors = max(0, limit() - accounting.own)
        # The kernel counts those in flight by the broker's uid, against the same limit.
        accounting.capacity["inflight"] = limit()
        self.settle()
        self._arm_deadline()
        self.loop.run()

    def drain(self, seconds: float | None) -> None:
        """Lend nothing new, retire every entry, and have `run` return when the last loan is back
        and the last entry closed, or after that many seconds (None: however long it takes).  The
        earliest deadline holds."""
        if seconds is not None and seconds < LIFETIME_SECONDS:
            self.loop.call_at(self.now + int(seconds * SECOND), self.loop.stop)
        if self.draining:
            return
        self.draining = self._dispatcher.draining = self._handlers.draining = True
        if self._acceptor.listener.lasting:
            self._acceptor.stop()
        lender = self.lender
        log.info("event=drain loans=%d entries=%d", lender.loans, len(lender.entries))
        for entry in [*lender.names.values(), *lender.tickets.values()]:
            lender.start_retiring(entry, self.now)
        self.settle()
        self.workers.on_done = self._stop_if_drained
        self._stop_if_drained()

    def _stop_if_drained(self) -> None:
        if not (self.lender.entries or self.workers.drain_waits or self._undelivered):
            self.loop.stop()

    def close(self) -> None:
        """End all sessions and stop listening; what is still lent stays valid at the borrowers."""
        if self.lender.loans:
            note = "these-stay-with-their-borrowers"
            log.warning("event=end loans=%d note=%s", self.lender.loans, note)
        for connection in list(self._sessions.connections):
            self._disconnector.hang_up(connection)
        workers_ended = self.workers.close()
        self.loop.port.close(keep_waker=not workers_ended)
        self._acceptor.listener.close()
        self._disconnector.close(workers_ended=workers_ended)

    def stats(self) -> dict[str, int]:
        """Count sessions, entries, loans and more."""
        return {
            "sessions": len(self.lender.sessions),
            "entries": len(self.lender.entries),
            "loans": self.lender.loans,
            "waiting": self.lender.waiting,
            "jobs": self.workers.pending + self.workers.dedicated,
            "connections": len(self._sessions.connections),
            "descriptors": descriptors_in_use(),
        }

    # --- configuration ---

    def set_rules(self, rules: tuple[Rule, ...], quota: Quota = DEFAULT) -> None:
        """Have these say from now on who may do what and use how much, beside root and the
        broker's own uid.

        They hold for the next request of every session.  Loans and waits that were granted stay.
        """
        self._policy = policy = AccessPolicy(rules, quota)
        accounts = list(self.lender.accounting.accounts.values())
        before = {account: account.quota for account in accounts if account.limited}
        for account in accounts:
            account.clear_limit()
            policy.limit(account)
        for connection in self._sessions.connections:
            connection.rights = policy.rights_of(
                connection.channel, connection.peer, connection.account
            )
        for account, quota in before.items():
            # A user whom no rule admits any more keeps what it has, within its old quota.
            if not account.limited:
                account.set_limit(quota)

    def keep(self, entry: Entry, target: str) -> None:
        """Note of a new entry what its descriptor leads to, and tell custody.

        No request is acted on between the entry's put and this.
        """
        entry.target = target
        entry.parcel = parcel(entry.sysfd)
        self.custody.keep_entry(entry.slot, entry.sysfd)

    # --- connections ---

    def _connect(self, channel: Channel) -> None:
        """Begin a connection, or tell its peer why not.  OSError: it cannot be watched."""
        accounting, peer = self.lender.accounting, Peer(*channel.peer)
        account = accounting.account(peer.uid)
        rights = self._policy.rights_of(channel, peer, account)
        refusal = self._refusal(account, peer, rights)
        connection = ServerConnection(channel, peer, rights, accounting)
        if refusal is not None:
            log_refusal(connection, refusal)
            with contextlib.suppress(OSError):
                channel.send(encode_error(0, refusal))
            connection.state = ENDED
            self._disconnector.hang_up(connection)
            return
        try:
            self._receiver.watch(connection)
        except OSError:
            channel.close()
            connection.release_charges()
            raise
        self._sessions.add(connection)

    def _schedule_newcomer(self, accept: Callable[[], None]) -> None:
        self._scheduler.submit(NEWCOMERS, accept, self.now)

    def _refusal(self, account: Account, peer: Peer, rights: Rights) -> FDBrokerError | None:
        """Why the peer may not connect; None if it may."""
        try:
            self._policy.check_connect(peer, rights)
            for resource in ("sessions", "closes"):
                self.lender.accounting.check(account, resource)
        except FDBrokerError as refusal:
            return refusal
        return None

    def end(self, connection: ServerConnection) -> None:
        """End a connection: its loan is back, then custody is told, then its slot is free."""
        if connection.state == ENDED:
            return
        self._scheduler.discard(connection.account.uid, connection.serve)
        self._delivery.drop_pending(connection)
        self._sessions.remove(connection)
        self._disconnector.hang_up(connection)

    def _rearm(self, connection: ServerConnection) -> None:
        self._receiver.arm(connection)

    # --- what the lender has decided ---

    def settle(self) -> None:
        """Act on what the last event left to be done for others: notify the sessions that wait,
        each in its user's turn, and have entries closed."""
        lender = self.lender
        while lender.notifications or lender.pending_closes:
            while lender.notifications:
                session, seq, error = lender.notifications.popleft()
                connection = self._sessions.connection_of(session)
                if connection is None:
                    continue
                notify = partial(self._notify, connection, session, seq, error)
                self._undelivered += 1
                if connection.rights.unlimited:
                    notify()
                else:
                    self._scheduler.submit(connection.account.uid, notify, self.now)
            while lender.pending_closes:
                self._close_entry(lender.pending_closes.popleft())

    def _notify(
        self, connection: ServerConnection, session: Session, seq: int, error: FDBrokerError | None
    ) -> None:
        """Tell a session what its borrow, or its wait for a close, has come to."""
        self._undelivered -= 1
        if self.draining:
            self._stop_if_drained()
        if connection.state == ENDED or connection.session is not session:
            return
        if self.draining and isinstance(error, EntryRetired):
            error = BrokerClosing()
        try:
            if error is not None:
                self._delivery.reply(connection, encode_error(seq, error))
            elif session.state == LENT and session.borrow_seq == seq:
                self._delivery.grant(connection, seq)
            else:
                self._delivery.reply(connection, encode([0, seq]))
        except Exception:
            log.exception("event=error %s", connection)
            self.end(connection)

    def _close_entry(self, entry: Entry) -> None:
        """Have a worker give back the last reference of an entry: the final close."""
        accounting, account = self.lender.accounting, entry.account
        # Released in this order, since an account is given up with the last of its closes.
        charges = accounting.charge(account, "closing"), accounting.charge(account, "closes")
        job = CloseEntry(entry, account)
        self.workers.submit(job, partial(self._entry_closed, entry, job, charges))

    def _entry_closed(self, entry: Entry, job: CloseEntry, charges: tuple[Charge, ...]) -> None:
        error = OSError(job.crash) if job.crash else job.error
        if error is not None:
            log.error("event=close-failed entry=%s error=%r", entry.name, str(error))
        if entry.account is not None:
            self._scheduler.charge(entry.account.uid, job.took)
        self.custody.drop_entry(entry.slot)
        self.lender.closed(entry, error)
        for charge in charges:
            charge.release()

    # --- time ---

    def _arm_deadline(self) -> None:
        """Set a timer for the lender's next deadline."""
        when, timer = self.lender.next_deadline(), self._deadline
        if when is None or (timer is not None and timer.pending and timer.when <= when):
            return
        if timer is not None:
            timer.cancel()
        self._deadline = self.loop.call_at(when, self._expire)

    def _expire(self) -> None:
        """End the wait whose deadline is the earliest.  Others have a turn before the next one."""
        self._deadline = None
        self.lender.expire(self.now)
        self._arm_deadline()
