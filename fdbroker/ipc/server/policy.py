"""Access policy: the rules as they hold for each peer.

The kernel says who a peer is, and says what was true at its connect for as long as the socket is
there.  So nothing of that is kept: when the rules change, the rights of every connection are asked
for anew (`AccessPolicy.rights_of`).

Rights are checked at each request, by the rules that hold when it is taken up.  What was granted
before stays: a loan until it is returned, and a place in a waiting line.  So does the connection of
a peer that is no longer admitted: it may return what it has, and gets nothing.

A request is checked before anything is looked for, so that a peer that may not have an entry does
not learn whether it is there.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fdbroker.descriptors import LISTENERS
from fdbroker.errors import NotPermitted
from fdbroker.ipc.protocol.messages import VERBS
from fdbroker.ipc.transport import unknown_ids
from fdbroker.lender.accounting import DEFAULT, Quota
from fdbroker.lender.names import check_name
from fdbroker.lender.rules import LISTEN, READ, ROOT, Rights, Rule, Rules

if TYPE_CHECKING:
    from fdbroker.ipc.transport import Channel
    from fdbroker.lender.accounting import Account
    from fdbroker.lender.model import Entry, Peer


class AccessPolicy:
    """The rules of one broker, and what each user may use."""

    def __init__(self, rules: tuple[Rule, ...] = (), quota: Quota = DEFAULT) -> None:
        unknown_uid, unknown_gid = unknown_ids()
        self._rules = Rules(
            rules, os.geteuid(), quota, unknown_uid=unknown_uid, unknown_gid=unknown_gid
        )

    def rights_of(self, channel: Channel, peer: Peer, account: Account) -> Rights:
        """The rights of a peer.  Its account may use what these say; of what several peers of one
        uid may use, the most."""
        groups = set[int]()
        if self._rules.gids and peer.uid != ROOT:
            groups = {peer.gid, *channel.groups_among(self._rules.gids)}
        rights = self._rules.rights(peer.uid, groups)
        _limit(account, rights)
        return rights

    def limit(self, account: Account) -> None:
        """Have an account use no more than its uid may, whatever groups its processes are in."""
        _limit(account, self._rules.rights(account.uid))

    def check_connect(self, peer: Peer, rights: Rights) -> None:
        """Raise `NotPermitted` unless the peer may connect."""
        if not rights.admitted:
            known = peer.uid != self._rules.unknown_uid
            raise NotPermitted(peer.uid if known else -1, "connect")


def _limit(account: Account, rights: Rights) -> None:
    if rights.admitted and not rights.unlimited:
        account.set_limit(rights.quota)


def check(
    rights: Rights, peer: Peer, verb: int, name: str | bytes, *, readonly: bool = False
) -> None:
    """Raise `NotPermitted` unless the peer may do that with the entry `name`, if there is one.

    A ticket is itself the permission, as long as its bearer is admitted.  An empty name stands for
    everything that has none.  `BadName` for a string that is no name, so that a refusal can be
    logged as it is.
    """
    right = VERBS[verb].right
    if isinstance(name, bytes):
        if not rights.admitted:
            raise NotPermitted(peer.uid, "connect")
    elif not rights.may(READ if readonly else right, name):
        if name:
            check_name(name)
        raise NotPermitted(peer.uid, right, name or "*")


def check_listener(rights: Rights, peer: Peer, entry: Entry | None) -> None:
    """Raise `NotPermitted` if the entry is a listening socket and the peer may not borrow such.

    None: there is no entry, and nothing to protect.
    """
    if entry is not None and entry.kind in LISTENERS and not rights.may(LISTEN, entry.name):
        raise NotPermitted(peer.uid, LISTEN, entry.name)


def check_somewhere(rights: Rights, peer: Peer, verb: int) -> None:
    """Raise `NotPermitted` if there is no name that the peer may do that with."""
    right = VERBS[verb].right
    if not rights.may_somewhere(right):
        raise NotPermitted(peer.uid, right)
