"""Accounting: how much of the broker each uid uses, and how much of it each uid may use.

Every uid that uses something has an account, with one number for each resource:

    sessions   connections, from the accept until the socket is closed
    loans      entries on loan or waited for; a loan of three entries counts three times
    entries    entries that the uid has put, until they are closed
    waiting    requests that wait for a grant or for a final close
    bytes      bytes of replies that the uid's clients have not read
    closes     descriptors in the broker's hands that are no entries: received with a message,
               opened for a read-only loan, or being closed.  A close that is stuck stays counted
    inflight   descriptors that were sent to the uid's clients and not received by them

Two things limit an account.  The rules give each uid a quota (`Quota`).  Beyond that, no uid gets
**more than half of what is free**: with `used` rows of a table of its own and `free` rows left, it
may have ``(used + free + 1) // 2``.  The first uid that takes all it can gets one half of the
table, the next a quarter, and there is always something left for a newcomer.  Sessions, entries
and closes are descriptors of the broker, of which there is one supply.  A uid may exceed its share
because others took descriptors later.  It may still have `GRACE` closes then, but no more than
half of the free descriptors, so that its remaining requests can be served.

Use is counted by charges.  `Accounting.check` raises if there would be too much, and
`Accounting.charge` counts it and returns a `Charge`.  The object that causes the use keeps its
charge and releases it, so no other place has to know how much there is to subtract.

The broker's own uid and root are counted but have no limits, because they may do everything and
could stop the broker as well.  Entries of the broker's configuration are charged to no account.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fdbroker.errors import QuotaExceeded, TooManyFiles

RESOURCES = ("sessions", "loans", "entries", "waiting", "bytes", "closes", "inflight")

# How many of the broker's descriptors one more of each resource takes.  A descriptor that is put is
# among the closes until it is an entry, so an entry takes no further one.
DESCRIPTORS = {"sessions": 1, "entries": 0, "closes": 1}

NO_LIMIT = 2**53

# Closes that a uid may have beyond its half of all descriptors.
GRACE = 16

# Bytes of unread replies to all uids together.
BYTES = 64 * 1024 * 1024


class Quota(NamedTuple):
    """The most that one uid may have of each resource."""

    sessions: int = 1024
    loans: int = 4096
    entries: int = 1024
    waiting: int = 1024
    bytes: int = 4 * 1024 * 1024
    closes: int = 1024
    inflight: int = 1024


DEFAULT = Quota()
UNLIMITED = Quota(*[NO_LIMIT] * len(RESOURCES))


class Account:
    """How much one uid uses of each resource.

    Besides the resources there are two internal counts: `members`, the entries of loans of several
    beyond the first of each, and `closing`, the closes of descriptors that are still entries.

    `limited` tells whether the uid has limits at all.  `most_loans` equals ``quota.loans``; it has
    an attribute of its own because every borrow reads it.
    """

    __slots__ = ("closing", "limited", "members", "most_loans", "quota", "uid", *RESOURCES)

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.clear_limit()
        self.members = self.closing = 0
        self.sessions = self.loans = self.entries = self.waiting = 0
        self.bytes = self.closes = self.inflight = 0

    def clear_limit(self) -> None:
        """Let the uid have whatever there is."""
        self.limited = False
        self.quota = UNLIMITED
        self.most_loans = NO_LIMIT

    def set_limit(self, quota: Quota) -> None:
        """Limit the uid to `quota`; if it has a quota already, to the larger of both.

        Sessions of one uid can have different rights, since rules can depend on groups.
        """
        if self.limited:
            quota = Quota(*map(max, self.quota, quota))
        self.limited = True
        self.quota = quota
        self.most_loans = quota.loans

    @property
    def descriptors(self) -> int:
        """The number of the broker's descriptors that the uid takes."""
        return self.sessions + self.entries + self.closes - self.closing

    @property
    def idle(self) -> bool:
        """Whether the uid uses nothing."""
        return not (
            self.sessions
            or self.loans
            or self.entries
            or self.waiting
            or self.bytes
            or self.closes
            or self.inflight
        )

    def __repr__(self) -> str:
        used = " ".join(f"{resource}={getattr(self, resource)}" for resource in RESOURCES)
        return f"<Account of uid {self.uid}: {used}>"


class Charge:
    """The use that an account is charged with for one thing, until the charge is released.

    `account` is None for the broker itself.
    """

    __slots__ = ("_accounting", "account", "count", "resource")

    def __init__(
        self, accounting: Accounting, account: Account | None, resource: str, count: int
    ) -> None:
        self._accounting = accounting
        self.account = account
        self.resource = resource
        self.count = count
        accounting.add(account, resource, count)

    def set(self, count: int) -> None:
        """Change how much the account is charged with."""
        change, self.count = count - self.count, count
        if change:
            self._accounting.add(self.account, self.resource, change)

    def become(self, resource: str) -> None:
        """Charge the same count as another resource from now on."""
        accounting, count = self._accounting, self.count
        accounting.add(self.account, resource, count)
        accounting.add(self.account, self.resource, -count)
        self.resource = resource

    def release(self) -> None:
        """Charge nothing any more.  A second call has no effect."""
        count, self.count = self.count, 0
        if count:
            self._accounting.add(self.account, self.resource, -count)

    def __repr__(self) -> str:
        uid = "none" if self.account is None else self.account.uid
        return f"<Charge of {self.count} {self.resource} to uid {uid}>"


class Accounting:
    """The accounts of all uids, and the supplies that they share.

    `total` has the sums of all accounts and of the broker's own use.  Only its `loans` are not a
    sum, because loans that were granted are counted on the account alone (see `state.hold`).

    `capacity` is what all uids together can have of a resource.  `descriptors` is the number of
    descriptors that clients and entries may take, and `own` the number that the broker keeps for
    itself; the server sets both.
    """

    def __init__(self, sessions: int, entries: int, members: int) -> None:
        self.accounts: dict[int, Account] = {}
        self.total = Account(-1)
        self.capacity = {
            "sessions": sessions,
            "entries": entries,
            "waiting": sessions,
            "bytes": BYTES,
            "members": members,
        }
        self.descriptors = NO_LIMIT
        self.own = 0
        # Called after each release, while the acceptor waits for a descriptor.
        self.on_release: Callable[[], None] | None = None

    def account(self, uid: int) -> Account:
        """Return the account of `uid`, a new one if there is none."""
        account = self.accounts.get(uid)
        if account is None:
            account = self.accounts[uid] = Account(uid)
        return account

    @property
    def free_descriptors(self) -> int:
        """The number of descriptors that are left for clients and entries."""
        return self.descriptors - self.total.descriptors

    def limit(self, account: Account, resource: str) -> int:
        """Return the most that the account may have of `resource` at present."""
        most: int = getattr(account.quota, resource)
        if not account.limited:
            return most
        used: int = getattr(account, resource)
        if resource in self.capacity:
            free = self.capacity[resource] - getattr(self.total, resource)
            most = min(most, fair_share(used, free))
        if resource in DESCRIPTORS:
            free = self.free_descriptors
            share = used + fair_share(account.descriptors, free) - account.descriptors
            if resource == "closes":
                # A uid that has nothing in hand must not be cut off because others took more.
                share = max(share, min(GRACE, fair_share(used, free)))
            most = min(most, share + (1 - DESCRIPTORS[resource]))
        return max(0, most)

    def check(self, account: Account, resource: str, count: int = 1) -> None:
        """Raise if the account may not have `count` more of `resource`.

        Raises `QuotaExceeded` if its limit is reached, and `TooManyFiles` if the account has no
        limit but the broker has no descriptor left.
        """
        used: int = getattr(account, resource)
        if account.limited:
            limit = self.limit(account, resource)
            if used + count > limit:
                raise QuotaExceeded(resource, used, limit)
        elif resource in DESCRIPTORS and count * DESCRIPTORS[resource] > self.free_descriptors:
            raise TooManyFiles(
                "broker", self.own + self.descriptors, self.own + self.total.descriptors
            )

    def charge_receive(self, account: Account) -> Charge:
        """Charge for the descriptor that a message may bring: for one, or none if there is no room.

        Raises `QuotaExceeded` if too much is in hand.  A few closes may always be pending.  Those
        of entries do not count here: a client that ends can cause any number of them at once.
        """
        if account.limited and account.closes - account.closing >= GRACE:
            self.check(account, "closes")
        return self.charge(account, "closes", int(self.free_descriptors > 0))

    def charge(self, account: Account | None, resource: str, count: int = 1) -> Charge:
        """Count `count` more of `resource`, and return the charge, which the caller releases.

        Nothing is refused here: `check` comes before.  The resource is one of `RESOURCES`, or
        ``"closing"`` for a close of a descriptor that stays an entry until it is closed.  Such a
        close is charged as one of ``"closes"`` too, and takes no further descriptor.
        """
        return Charge(self, account, resource, count)

    def add(self, account: Account | None, resource: str, count: int) -> None:
        """Change what is counted.  Code outside of this module charges instead."""
        total = self.total
        setattr(total, resource, getattr(total, resource) + count)
        if account is not None:
            setattr(account, resource, getattr(account, resource) + count)
            # Most releases happen while the uid still has a session, so it is not idle.
            if count < 0 and not account.sessions:
                self.drop_idle(account)
        if count < 0 and self.on_release is not None:
            self.on_release()

    def drop_idle(self, account: Account) -> None:
        """Forget the account if its uid uses nothing."""
        if account.idle and self.accounts.get(account.uid) is account:
            del self.accounts[account.uid]

    def check_members(self, account: Account, count: int) -> None:
        """Raise `QuotaExceeded` if a loan may not have `count` entries beyond the first."""
        if account.limited:
            free = self.capacity["members"] - self.total.members
            room = fair_share(account.members, free) - account.members
            if count > room:
                raise QuotaExceeded("loans", account.loans, account.loans + 1 + room)

    def add_members(self, account: Account, count: int) -> None:
        """Count `count` more entries of loans beyond the first of each.

        Every loan of several entries comes here twice, and a charge takes three times as long.  The
        two calls that balance each other are in `cells.py`.
        """
        account.members += count
        self.total.members += count


def fair_share(used: int, free: int) -> int:
    """Return half of what would be free if the uid that has `used` had none of it."""
    return (used + max(0, free) + 1) // 2
