"""Shares: each uid that is held to a quota has a fifth of the broker's time while others are there.

What it takes, by one long turn or by many, it makes up for in the time after that.  Who has taken a
millisecond more than its share is put off until it has done so; but not for long: who loses its
head is not locked out for as long as that went on.

A uid for which five could stand has five shares, and nobody's share grows while others ask for
nothing: so the broker is idle most of the time, and whoever asks then is answered at once.
"""

from __future__ import annotations

from fdbroker.lender.model import SECOND

LONG = SECOND // 1000  # of the loop's own time: a usual request takes a hundredth of that
OTHERS = 4  # times as long as one has taken belongs to the others
MOST = SECOND // 4  # that one is put off, whatever it took
UIDS = 1000  # of which we know when they were served, until we look which of these matter still


def with_others(took: int) -> int:
    """How long it takes to make up for so much, nanoseconds as all times here."""
    return took + OTHERS * took


class Shares:
    """Who has taken how much."""

    __slots__ = ("_paid_at", "charged", "put_off")

    def __init__(self) -> None:
        self._paid_at: dict[int, int] = {}  # by uid: when it has made up for what it took
        self.put_off: dict[int, int] = {}  # of these, who is not served until then
        self.charged = 0  # in all

    def charge(self, uid: int, took: int, now: int, *, alone: bool) -> bool:
        """It has taken so much: whether it is put off, which nobody is who is `alone`."""
        self.charged += took
        until = max(now, self._paid_at.get(uid, 0)) + with_others(took)
        most = now + with_others(LONG)
        if late := until > most and not alone:
            until = self.put_off[uid] = min(until, now + MOST)
        if len(self._paid_at) > UIDS:
            self._paid_at = {uid: at for uid, at in self._paid_at.items() if at > now}
        self._paid_at[uid] = min(until, most) if alone else until
        return late

    def forgive(self, now: int) -> None:
        """Nobody is put off any longer."""
        self.put_off = dict.fromkeys(self.put_off, now)

    def over(self, now: int) -> bool:
        """Whether somebody was put off until now, who is not any more."""
        over = [uid for uid, until in self.put_off.items() if until <= now]
        for uid in over:
            del self.put_off[uid]
        return bool(over)
