"""Rules: who may do what with which names.

The broker's own uid and root may do all, and everyone else only what a rule allows.  A rule speaks
of peers (a uid, a gid, or everyone), of names (patterns), and of verbs; it never forbids, so more
rules allow more, and their order does not matter.  A peer whom any rule speaks of is *admitted*: it
may connect, and borrow by a ticket, even where the rule has no verbs.

    borrow   by name, also several at once, each of which must be allowed; a rule can allow it
             with mode="r" only (where the owner of a file or its seals protect it: see
             docs/security.md), and a listening socket only if it says so (`listeners`)
    put      a new entry; to replace one takes `retire` too, since the one before it retires
    retire   an entry, whoever put it
    list     see it, and its loans, in a list
    admin    what concerns the whole broker: its counts

What has no name (a shared object, the broker itself) is matched as the empty name, so it takes a
pattern like ``*``.  In a pattern ``*`` is any number of characters, ``/`` among them, ``?`` is one,
``[ab]`` is one of these, and case matters (fnmatch).

Some uids are no one's: a user whom the user namespace of the broker does not map is shown as the
overflow uid (user_namespaces(7)), as is everyone else of that kind.  So it is no identity, and
nothing is allowed to it: no rule is about it, not even one for everyone.  So it is with groups.

Nothing here asks the kernel: who a peer is, and what stands for unknown, are arguments.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import translate
from typing import NamedTuple

from fdbroker.lender.accounting import DEFAULT, Quota

VERBS = frozenset({"borrow", "put", "retire", "list", "admin"})
READ = "read"  # to borrow with mode="r", which every rule for `borrow` allows too
LISTEN = "listen"  # to borrow what listens, in whatever mode, beside one of the two for its name
ROOT = 0


class Rule(NamedTuple):
    """Allows `verbs` on all names that match one of the patterns `names`.

    To whom: a uid, a gid (also a supplementary one), or everyone.  Of what is given all must hold;
    a rule that gives none of the three is about nobody.
    """

    verbs: frozenset[str]
    names: tuple[str, ...] = ("*",)
    uid: int | None = None
    gid: int | None = None
    everyone: bool = False
    mode: str = ""  # "r": what it allows to borrow, it allows with mode="r" only
    listeners: bool = False  # whether that may be a listening socket, which its borrower can end
    quota: tuple[tuple[str, int], ...] = ()  # of each uid it is about, in place of that for all

    def is_about(self, uid: int, groups: Collection[int]) -> bool:
        """Whether it speaks of a peer with this uid and these groups."""
        if self.uid is None and self.gid is None:
            return self.everyone
        return self.uid in (None, uid) and (self.gid is None or self.gid in groups)

    @property
    def grants(self) -> frozenset[str]:
        """Its verbs, READ beside `borrow` or in its place, and LISTEN beside both."""
        if "borrow" not in self.verbs:
            return self.verbs
        if self.mode == "r":
            return self.verbs - {"borrow"} | {READ}
        return self.verbs | ({READ, LISTEN} if self.listeners else {READ})

    def allows(self, verb: str, name: str) -> bool:
        """Whether it allows that, to those of whom it speaks."""
        return Rights([self]).may(verb, name)


class Rights:
    """What all rules that speak of a peer allow it.  Never changed: other rules make others.

    admitted: whether it may connect at all.  unlimited: whether it may do everything, and have
    what there is.  quota: what it may have, else; of what several rules say, the most.
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
        """Whether it may do that with the entry `name`; "" is what has no name."""
        if self.unlimited:
            return True
        pattern = self._patterns.get(verb)
        return pattern is not None and pattern.match(name) is not None

    def may_somewhere(self, verb: str) -> bool:
        """Whether there can be a name that it may do that with."""
        return self.unlimited or verb in self._patterns


NO_RIGHTS = Rights()
ALL_RIGHTS = Rights(unlimited=True)


class Rules:
    """All rules of a broker that runs as `own_uid`.

    unknown_uid, unknown_gid: what stands for those that the kernel cannot tell; None if there
    are no such.  `gids` are the groups that matter: other groups of a peer need not be asked for.
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
        self._rights: dict[tuple[int, ...], Rights] = {(): NO_RIGHTS}  # by the rules that apply
        self.gids = frozenset(rule.gid for rule in self._rules if rule.gid is not None)

    def rights(self, uid: int, groups: Collection[int] = ()) -> Rights:
        """The rights of a peer; peers of whom the same rules speak get the same object."""
        if uid in self._unlimited:
            return ALL_RIGHTS
        if uid == self.unknown_uid:
            return NO_RIGHTS
        about = tuple(n for n, rule in enumerate(self._rules) if rule.is_about(uid, groups))
        rights = self._rights.get(about)
        if rights is None:
            rules = [self._rules[number] for number in about]
            rights = self._rights[about] = Rights(rules, self._quota)
        return rights
