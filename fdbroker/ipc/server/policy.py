"""Admission: the rules, as they hold for each connection.

Who a peer is, the kernel says, and it says what was true at the connect, for as long as the socket
is there.  So nothing of that is kept: when rules change, it is asked again.

A request is looked at by the rules that hold when it is taken up.  What was granted before stays:
a loan until it is returned, a place in the waiting line, a put that a worker looks at.  So does
the connection of a peer that is no longer admitted: it may return what it has, and gets nothing.

A request that is said again by a peer who may do everything is not looked at twice (messages.py).
That holds for the others as well, but what *they* said before, and were not refused, is remembered
apart, one table for all who have the same rights, and forgotten with the rules.  It is forgotten,
too, when a socket that listens becomes an entry: who might borrow what had its name before may not
have the right to that.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from typing import TYPE_CHECKING

from fdbroker.descriptors import LISTENERS
from fdbroker.errors import FDBrokerError, NotPermitted
from fdbroker.ipc.protocol.messages import KNOWN, VERBS
from fdbroker.ipc.transport import unix
from fdbroker.lender.accounting import DEFAULT, Quota
from fdbroker.lender.names import check_name
from fdbroker.lender.rules import LISTEN, READ, ROOT, Rights, Rule, Rules

if TYPE_CHECKING:
    from fdbroker.ipc.protocol.messages import Known
    from fdbroker.ipc.server.connection import Connection
    from fdbroker.lender.accounting import Account
    from fdbroker.lender.model import Entry

log = logging.getLogger("fdbroker")


class Admission:
    """Who may do what at one broker."""

    def __init__(self, rules: tuple[Rule, ...] = (), quota: Quota = DEFAULT) -> None:
        unknown_uid, unknown_gid = unix.unknown_ids()
        self.rules = Rules(
            rules, os.geteuid(), quota, unknown_uid=unknown_uid, unknown_gid=unknown_gid
        )
        self._known: dict[Rights, Known] = {}

    def look_at(self, connection: Connection) -> None:
        """Note what its peer may do, and have: of what sessions of one uid may, the most."""
        peer, groups = connection.peer, set[int]()
        if self.rules.gids and peer.uid != ROOT:
            groups = {peer.gid, *unix.groups_among(self.rules.gids, connection.sock)}
        rights = connection.rights = self.rules.rights(peer.uid, groups)
        _hold(connection.account, rights)
        known = KNOWN if rights.unlimited else self._known.setdefault(rights, OrderedDict())
        connection.known = known

    def hold(self, account: Account) -> None:
        """Hold an account to what its uid may have, whoever it is in which groups."""
        _hold(account, self.rules.rights(account.uid))

    def forget(self) -> None:
        """Look at everything anew, whoever says it, as far as he may not do everything."""
        for known in self._known.values():
            known.clear()

    def check_come(self, connection: Connection) -> None:
        """Raise `NotPermitted` unless it may connect, `QuotaExceeded` if its uid has enough."""
        if not connection.rights.admitted:
            uid = connection.peer.uid
            raise NotPermitted(-1 if uid == self.rules.unknown_uid else uid, "connect")
        for what in ("sessions", "closes"):
            connection.quotas.check(connection.account, what)


def _hold(account: Account, rights: Rights) -> None:
    if rights.admitted and not rights.unlimited:
        account.set_limit(rights.quota)


def check_right(at: Connection, verb: int, name: str | bytes, *, readonly: bool = False) -> None:
    """Raise `NotPermitted` unless its peer may do that with the entry `name`, which need not exist.

    A ticket says by itself that one may, as long as its bearer is admitted.  "" is what has no
    name.  `BadName` for a name that is none: so what is refused can be logged as it is.
    """
    rights, right = at.rights, VERBS[verb].right
    if isinstance(name, bytes):
        if not rights.admitted:
            raise NotPermitted(at.peer.uid, "connect")
    elif not rights.may(READ if readonly else right, name):
        if name:
            check_name(name)
        raise NotPermitted(at.peer.uid, right, name or "*")


def log_refusal(at: Connection, error: FDBrokerError) -> None:
    """One line of who was refused what."""
    if isinstance(error, NotPermitted):  # its name is one, so it is shown as it is
        log.warning("event=refused %s verb=%s name=%s", at, error.verb, error.name)
    else:
        log.warning('event=refused %s reason="%s"', at, error)


def check_listener(at: Connection, entry: Entry | None) -> None:
    """Raise `NotPermitted` unless its peer, who may borrow the entry by its name, may do so also if
    that listens.  None: there is none, and nothing to protect."""
    if entry is not None and entry.kind in LISTENERS and not at.rights.may(LISTEN, entry.name):
        raise NotPermitted(at.peer.uid, LISTEN, entry.name)


def check_right_somewhere(at: Connection, verb: int) -> None:
    """Raise `NotPermitted` if there is no name that its peer may do that with."""
    right = VERBS[verb].right
    if not at.rights.may_somewhere(right):
        raise NotPermitted(at.peer.uid, right)
