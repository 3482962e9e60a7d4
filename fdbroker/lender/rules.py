"""Rules: which peers may do what with which names.

The broker's own uid and root may do everything, and all other peers only what a rule allows.  A
rule has peers (a uid, a gid, or everyone), patterns of names, and verbs.  Rules never forbid, so
more rules allow more, and their order does not matter.  A peer that any rule applies to is
*admitted*: it may connect, and borrow by a ticket, even if the rule has no verbs.

    borrow   borrow by name; of several names at once each must be allowed.  A rule can allow it
             with mode="r" only (which protects a file if its owner or its seals do so as well, see
             docs/security.md), and it allows listening sockets only with `listeners`
    put      put a new entry; replacing one takes `retire` too, since the old entry retires
    retire   retire an entry, also one that another peer has put
    list     see the entry and its loans in a list
    admin    see the counts of the whole broker

Objects without a name (a shared object, the broker itself) are matched as the empty name, so they
take a pattern like ``*``.  In a pattern ``*`` is any number of characters, ``/`` among them, ``?``
is one character, ``[ab]`` is one of these, and case matters (fnmatch).

The kernel shows every user that the broker's user namespace does not map as the overflow uid
(user_namespaces(7)).  So this uid is no identity, and nothing is allowed to it: no rule applies to
it, not even a rule for everyone.  The overflow gid is treated likewise.

This module does not ask the kernel.  The peer's ids and the overflow ids are arguments.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import translate
from typing import NamedTuple

from fdbroker.lender.accounting import DEFAULT, Quota

VERBS = frozenset({"borrow", "put", "retire", "list", "admin"})

# The right to borrow with mode="r".  Every rule for `borrow` gives it too.
READ = "read"

# The right to borrow listening sockets, in any mode.  It comes on top of `borrow` or READ.
LISTEN = "listen"

ROOT = 0


class Rule(NamedTuple):
    """Allows `verbs` on all names that match one of the patterns `names`.

    It applies to a uid, a gid (also a supplementary one), or everyone.  If both ids are given, both
    must match; a rule with none of the three applies to no peer.

    mode        "r": it allows borrowing with mode="r" only
    listeners   whether listening sockets may be borrowed, which a borrower can shut down for all
    quota       the limits of each uid that it applies to, in place of the general ones
    """

    verbs: frozenset[str]
    names: tuple[str, ...] = ("*",)
    uid: int | None = None
    gid: int | None = None
    everyone: bool = False
    mode: str = ""
    listeners: bool = False
    quota: tuple[tuple[str, int], ...] = ()

    def applies_to(self, uid: int, groups: Collection[int]) -> bool:
        """Tell whether it applies to a peer with this uid and these groups."""
        if self.uid is None and self.gid is None:
            return self.everyone
        return self.uid in (None, uid) and (self.gid is None or self.gid in groups)

    @property
    def grants(self) -> frozenset[str]:
        """Its rights: the verbs, with READ added to `borrow` or in its place, and LISTEN."""
        if "borrow" not in self.verbs:
            return self.verbs
        if self.mode == "r":
            return self.verbs - {"borrow"} | {READ}
        return self.verbs | ({READ, LISTEN} if self.listeners else {READ})

    def allows(self, verb: str, name: str) -> bool:
        """Tell whether it allows the peers that it applies to `verb` on `name`."""
        return Rights([self]).may(verb, name)


class Rights:
    """The sum of the rules that apply to a peer.  It is never changed.

    admitted    whether the peer may connect at all
    unlimited   whether it may do everything, without any limits
    quota       its limits otherwise; if several rules have one, the highest
    """

    __slots__ = ("_patterns", "admitted", "quota", "unlimited")

    def __init__(
        self, rules: Iterable[Rule] = (), quota: Quota = DEFAULT, *, unlimited: bool = False
    ) -> None:
        rules = tuple(rules)
        self.unlimited = unlimited
        self.admitted = unlimited or bool(rules)
        own: dict[str, int] = {}
        for rule in rules:
            for what, most in rule.quota:
                own[what] = max(most, own.get(what, 0))
        self.quota = quota._replace(**own)
        self._patterns = {
            verb: re.compile("|".join(map(translate, patterns)))
            for verb in (*VERBS, READ, LISTEN)
            if (patterns := [name for rule in rules if verb in rule.grants for name in rule.names])
        }

    def may(self, verb: str, name: str) -> bool:
        """Tell whether the peer may do `verb` with the entry `name`; "" is the empty name."""
        if self.unlimited:
            return True
        pattern = self._patterns.get(verb)
        return pattern is not None and pattern.match(name) is not None

    def may_somewhere(self, verb: str) -> bool:
        """Tell whether there can be a name that the peer may do `verb` with."""
        return self.unlimited or verb in self._patterns


NO_RIGHTS = Rights()
ALL_RIGHTS = Rights(unlimited=True)


class Rules:
    """All rules of a broker that runs as `own_uid`.

    `unknown_uid` and `unknown_gid` are the overflow ids, or None if every id is mapped.  `gids` are
    the groups in the rules: other groups of a peer need not be asked for.
    """

    def __init__(
        self,
        rules: Iterable[Rule],
        own_uid: int,
        quota: Quota = DEFAULT,
        *,
        unknown_uid: int | None = None,
        unknown_gid: int | None = None,
    ) -> None:
        self.unknown_uid = unknown_uid
        self._quota = quota
        self._rules = [rule for rule in rules if rule.gid is None or rule.gid != unknown_gid]
        self._unlimited = {ROOT, own_uid} - {unknown_uid}
        # By the numbers of the rules that apply.
        self._rights: dict[tuple[int, ...], Rights] = {(): NO_RIGHTS}
        self.gids = frozenset(rule.gid for rule in self._rules if rule.gid is not None)

    def rights(self, uid: int, groups: Collection[int] = ()) -> Rights:
        """Return the rights of a peer; peers that the same rules apply to get the same object."""
        if uid in self._unlimited:
            return ALL_RIGHTS
        if uid == self.unknown_uid:
            return NO_RIGHTS
        applying = tuple(n for n, rule in enumerate(self._rules) if rule.applies_to(uid, groups))
        rights = self._rights.get(applying)
        if rights is None:
            rules = [self._rules[number] for number in applying]
            rights = self._rights[applying] = Rights(rules, self._quota)
        return rights
