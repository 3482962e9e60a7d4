"""Quotas: what each uid uses of the broker, and how much of it it may.

    sessions   connections, from the accept until the socket is closed
    loans      entries on loan, or waited for in the line; of several at once each counts
    entries    what it has put, until that is closed
    waiting    requests that wait for a turn, or for a close
    bytes      of answers that it has not read
    closes     descriptors in the broker's hands that are no entries: what came with a message, what
               was opened for a read-only loan, what is being closed.  A close that is stuck stays
    inflight   descriptors that were sent to it, and that it has not received

Everyone has at most what the rules say (`Quota`), and **at most half of what is still free**: who
has `used` of a table with `free` rows left may have ``(used + free + 1) // 2``.  So the first one
who wants all gets a half, the next a quarter, and there is something left for whoever comes.
Sessions, entries and closes are descriptors of the broker, of which there is one supply for all.
Who has its half of these by what others took since may still have a `FEW` in hand: closes, and of
them no more than half of what is free.

The broker's own uid and root are counted, but held to no quota: they may do all, and could end the
broker as well.  What the broker keeps by its own configuration is on nobody's account.

An account is there as long as its uid uses anything.
"""

from __future__ import annotations

from typing import NamedTuple

from fdbroker.errors import QuotaExceeded, TooManyFiles

WHAT = ("sessions", "loans", "entries", "waiting", "bytes", "closes", "inflight")
# what takes how many of the broker's descriptors: one that is put is among the closes already
DESCRIPTORS = {"sessions": 1, "entries": 0, "closes": 1}
NO_LIMIT = 2**53
FEW = 16  # closes that one may have beyond its half of all descriptors
SPARE = 32  # descriptors that the broker's threads may just be using for themselves
BYTES = 64 * 1024 * 1024  # of answers that nobody has read, in all


class Quota(NamedTuple):
    """The most that one uid may have of each."""

    sessions: int = 1024
    loans: int = 4096
    entries: int = 1024
    waiting: int = 1024
    bytes: int = 4 * 1024 * 1024
    closes: int = 1024
    inflight: int = 1024


DEFAULT = Quota()
UNLIMITED = Quota(*[NO_LIMIT] * len(WHAT))


class Account:
    """What one uid uses.  `limited`: whether it is held to its quota."""

    __slots__ = ("closing", "limited", "members", "most_loans", "quota", "uid", *WHAT)

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.forget_quota()
        self.members = 0  # of loans of several, beyond the first of each
        self.closing = 0  # of the closes, those that are entries as well
        self.sessions = self.loans = self.entries = self.waiting = 0
        self.bytes = self.closes = self.inflight = 0

    def forget_quota(self) -> None:
        """Nobody has said how much it may have: whatever there is."""
        self.limited = False
        self.quota = UNLIMITED
        self.most_loans = NO_LIMIT  # quota.loans, by itself since each borrow asks

    def hold_to(self, quota: Quota) -> None:
        """It may have that much; if there was another quota before, of each the larger one."""
        if self.limited:
            quota = Quota(*map(max, self.quota, quota))
        self.limited = True
        self.quota = quota
        self.most_loans = quota.loans

    @property
    def descriptors(self) -> int:
        """How many of the broker's it takes."""
        return self.sessions + self.entries + self.closes - self.closing

    @property
    def idle(self) -> bool:
        """Whether it uses nothing."""
        used = self.descriptors or self.loans or self.waiting or self.bytes or self.inflight
        return not used

    def __repr__(self) -> str:
        used = " ".join(f"{what}={getattr(self, what)}" for what in WHAT)
        return f"<Account of uid {self.uid}: {used}>"


class Quotas:
    """The accounts of all uids, and the supplies that they share."""

    def __init__(self, sessions: int, entries: int, members: int) -> None:
        self.accounts: dict[int, Account] = {}
        self.total = Account(-1)  # but for loans, which are counted at each borrow
        self._members = members
        self.capacity = {  # all uids together
            "sessions": sessions,
            "entries": entries,
            "waiting": sessions,
            "bytes": BYTES,
        }
        self.descriptors = NO_LIMIT  # of the broker, which clients and entries may take, and ...
        self.own = 0  # ... those that they may not

    def account(self, uid: int) -> Account:
        """The account of a uid, a new one if it has none."""
        account = self.accounts.get(uid)
        if account is None:
            account = self.accounts[uid] = Account(uid)
        return account

    @property
    def free_descriptors(self) -> int:
        """How many more the broker may have."""
        return self.descriptors - self.total.descriptors

    def limit(self, account: Account, what: str) -> int:
        """The most that it may have of that, as things are now."""
        most: int = getattr(account.quota, what)
        if not account.limited:
            return most
        used: int = getattr(account, what)
        if what in self.capacity:
            free = self.capacity[what] - getattr(self.total, what)
            most = min(most, half(used, free))
        if what in DESCRIPTORS:
            free = self.free_descriptors
            share = used + half(account.descriptors, free) - account.descriptors
            if what == "closes":  # what others take, must not end who has nothing in hand
                share = max(share, min(FEW, half(used, free)))
            most = min(most, share + (1 - DESCRIPTORS[what]))
        return max(0, most)

    def has_room(self, account: Account, count: int) -> bool:
        """Whether `count` more may come for it in a message, and surely get numbers."""
        if account.limited and account.closes + count > self.limit(account, "closes"):
            return False
        return count + SPARE <= self.free_descriptors

    def check_one(self, account: Account) -> None:
        """Raise `QuotaExceeded` if it has too much in hand for one more to come in a message.

        A few may be closed just now; its entries, as they end, may be more than that.
        """
        if account.limited and account.closes - account.closing >= FEW:
            self.check(account, "closes")

    def check_members(self, account: Account, count: int) -> None:
        """Raise `QuotaExceeded` if a loan of several may not have `count` beside the first."""
        if account.limited:
            room = half(account.members, self._members - self.total.members) - account.members
            if count > room:
                raise QuotaExceeded("loans", account.loans, account.loans + 1 + room)

    def add_members(self, account: Account, count: int) -> None:
        """Note that its loans have so many more, or less, beside the first of each.

        Each loan of several does, and `add` would take three times as long.
        """
        account.members += count
        self.total.members += count

    def check(self, account: Account, what: str, count: int = 1) -> None:
        """Raise `QuotaExceeded` if it may not have `count` more, `TooManyFiles` if nobody may."""
        used: int = getattr(account, what)
        if account.limited:
            limit = self.limit(account, what)
            if used + count > limit:
                raise QuotaExceeded(what, used, limit)
        elif what in DESCRIPTORS and count * DESCRIPTORS[what] > self.free_descriptors:
            raise TooManyFiles(
                "broker", self.own + self.descriptors, self.own + self.total.descriptors
            )

    def add(self, account: Account | None, what: str, count: int = 1) -> None:
        """Note that it has `count` more, or less; None: the broker itself."""
        if account is not None:
            setattr(account, what, getattr(account, what) + count)
        setattr(self.total, what, getattr(self.total, what) + count)
        if count < 0 and account is not None:
            self.drop_idle(account)

    def drop_idle(self, account: Account) -> None:
        """Forget it if it uses nothing."""
        if account.idle:
            self.accounts.pop(account.uid, None)


def half(used: int, free: int) -> int:
    """How many in all one may have who has so many: half of what would be free without it."""
    return (used + max(0, free) + 1) // 2
