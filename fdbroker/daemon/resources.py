"""The broker's own entries: made at its start, and again when its file has changed.

What the file says can be read anew while the broker serves.  Then what it no longer has is
retired, what is said in other words is replaced, what is new is added, and the rest is not touched.
All that is new is opened first, by a worker, for that can take long; a mistake in the file, or
something that cannot be opened, changes nothing.

Only an entry that was made of the file is ever retired or replaced because of the file.  A name
that somebody else has taken meanwhile, or had before, stays theirs.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from fdbroker import descriptors, openers
from fdbroker.daemon import config
from fdbroker.errors import BadResource, BrokerFull, FDBrokerError, UnsupportedKind
from fdbroker.ipc.server.worker_pool import CLOSE, DEDICATED, Job
from fdbroker.lender.names import check_name
from fdbroker.rc import FD

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fdbroker.daemon.config import Config, Resource
    from fdbroker.daemon.systemd import Handed, Manager
    from fdbroker.ipc.server.server import Server
    from fdbroker.lender.model import Entry

log = logging.getLogger("fdbroker")


class Opened(NamedTuple):
    """A descriptor that will be an entry.  `how` it was made says how it is to be discarded."""

    name: str
    how: str
    fd: FD
    kind: descriptors.Kind
    where: str

    def discard(self) -> None:
        """Close it, since nobody took it."""
        openers.discard(self.how, self.fd.detach())


def adopt(name: str, how: str, sysfd: int) -> Opened:
    """Take over the descriptor `sysfd`, for good.  `UnsupportedKind`, OSError: it is closed."""
    try:
        kind, where = descriptors.inspect(sysfd)
        return Opened(name, how, FD(sysfd), kind, where)
    except BaseException:
        openers.discard(how, sysfd)
        raise


def open_all(resources: Iterable[Resource]) -> list[Opened]:
    """Open each of them, or none: errors name which could not be.  `BadResource`, OSError,
    `UnsupportedKind`."""
    opened: list[Opened] = []
    try:
        for name, how, what in resources:
            try:
                opened.append(adopt(name, how, openers.make(how, what)))
            except BadResource as error:
                raise BadResource(f'entry "{name}": {how}', what, error.reason) from None
            except UnsupportedKind as error:
                raise _named(error, f'entry "{name}": {how} {what!r}') from None
            except OSError as error:
                said = f'entry "{name}": {how} {what!r}: {error.strerror}'
                raise OSError(error.errno, said) from None
    except BaseException:
        discard_all(opened)
        raise
    return opened


def _named(error: UnsupportedKind, which: str) -> UnsupportedKind:
    return UnsupportedKind(error.kind, f"{error.reason} ({which})")


def adopt_numbers(resources: Iterable[Resource], keep: set[int | None]) -> list[Opened]:
    """Take over descriptors that are open here by their numbers, none of which is of those in
    `keep`; 0 and 1 then lead to /dev/null.  Raises what `open_all` does: nothing has changed."""
    resources = list(resources)
    opened = open_all(resources)
    for number in {int(resource.what) for resource in resources} - keep:
        let_go(number)  # or the entry's final close would not be the last one
    return opened


def let_go(number: int) -> None:
    """Close it; a standard stream leads to /dev/null then, so that it is never anything else."""
    if number > 2:
        os.close(number)
    else:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, number)
        os.close(null)


def adopt_handed_over(handed: Sequence[Handed]) -> list[Opened]:
    """Take over what the service manager gave.  `UnsupportedKind`, OSError: all of it is closed."""
    opened: list[Opened] = []
    left = list(handed)
    try:
        while left:
            name, number = left.pop(0)
            try:
                opened.append(adopt(name, "fd", number))
            except UnsupportedKind as error:
                raise _named(error, f'LISTEN_FDNAMES "{name}"') from None
    except BaseException:
        for one in opened:
            one.discard()
        for one_left in left:
            os.close(one_left.number)
        raise
    return opened


def check_names(names: Iterable[str]) -> None:
    """Raise `BadName` for what is no name, `BadResource` for one that is there twice."""
    seen: set[str] = set()
    for name in names:
        check_name(name)
        if name in seen:
            reason = "two entries cannot have it, use another one (systemd: FileDescriptorName=)"
            raise BadResource("name", name, reason)
        seen.add(name)


def discard_all(opened: list[Opened]) -> None:
    """Close what nobody took."""
    while opened:
        opened.pop().discard()


def enter(server: Server, opened: Opened, *, replace: bool = False) -> Entry:
    """Make it an entry of the broker itself.  `NameTaken`, `BrokerFull`: it is not taken."""
    entry = server.lender.put(
        None,
        0,
        opened.name,
        b"",
        opened.fd,
        opened.kind,
        server.now,
        uid=os.geteuid(),
        replace=replace,
    )
    server.keep(entry, opened.where)
    return entry


class Resources:
    """The entries that were made of the configuration file at `path`; None: there is no file.

    Its methods are called on the loop.
    """

    def __init__(self, server: Server, path: str | None, manager: Manager) -> None:
        self._server = server
        self._path = path
        self._manager = manager
        self._made: dict[str, tuple[Resource, Entry]] = {}
        self._settings = config.Settings()
        self._reloading = False
        self._again = False  # another reload was asked for meanwhile

    def start(self, others: list[Opened], first: Config) -> None:
        """Enter `others`, and what the file says.

        Raises `BadResource`, `UnsupportedKind`, `BrokerFull`, OSError; then nothing was taken.
        """
        opened = open_all(first.entries)
        try:
            self._check_room(len(others) + len(opened))
        except BaseException:
            discard_all(opened)
            raise
        for one in others:
            enter(self._server, one)
        others.clear()
        self._commit(first, opened)
        self._settings = first.settings

    def status(self) -> str:
        """For people."""
        count = len(self._server.lender.names)
        return f"serving {count} {'entry' if count == 1 else 'entries'}"

    def reload(self) -> None:
        """Read the file anew, and act upon it as soon as all of it is there."""
        if self._path is None:
            log.info('event=reload-ignored reason="there is no --config to read anew"')
        elif self._reloading:
            self._again = True
        elif not self._server.draining:
            self._reloading = True
            self._manager.reloading()
            names = self._server.lender.names
            ours = {
                name: resource
                for name, (resource, entry) in self._made.items()
                if names.get(name) is entry
            }
            theirs = names.keys() - ours.keys()
            try:
                job = Reload(self._path, ours, theirs)
                self._server.workers.submit(job, partial(self._finish_reload, job))
            except OSError as error:  # no thread can be started
                self._reloading = False
                self._tell(error)

    def _finish_reload(self, job: Reload) -> None:
        self._reloading = False
        if job.crash:
            job.error = OSError(job.crash)
        if self._server.draining:
            self._discard(job.opened)
            return
        error = job.error
        if job.config is not None:
            try:
                self._check_room(len(job.opened))
            except BrokerFull as full:
                error = full
            else:
                self._commit(job.config, job.opened)
                if job.config.settings != self._settings:
                    log.warning('event=restart-needed reason="[server] has changed"')
        self._discard(job.opened)
        self._tell(error)
        if self._again:
            self._again = False
            self.reload()

    def _discard(self, opened: list[Opened]) -> None:
        if opened:
            self._server.workers.submit(Discard(opened), _nothing_more)

    def _tell(self, error: FDBrokerError | OSError | None) -> None:
        """Say how the reload went."""
        if error is None:
            self._manager.ready(self.status())
            return
        reason = getattr(error, "strerror", None) or str(error)
        log.error('event=reload-failed reason=%r note="nothing has changed"', reason)
        self._manager.ready(f"{self.status()}; the last reload failed: {reason}")

    def _check_room(self, count: int) -> None:
        """So that `_commit` does all or nothing."""
        ledger = self._server.lender.ledger
        if len(self._server.lender.entries) + count > ledger.entries:
            raise BrokerFull("entries", ledger.entries)

    def _commit(self, wanted: Config, opened: list[Opened]) -> None:
        """Take what is in `opened`; what the name is no longer free for stays in it."""
        lender, now = self._server.lender, self._server.now
        resources = {resource.name: resource for resource in wanted.entries}
        self._server.set_rules(wanted.rules, wanted.quota)
        vanished = self._made.keys() - resources.keys()
        for name in vanished:
            _, entry = self._made.pop(name)
            if lender.names.get(name) is entry:
                lender.retire(name, now)
        left = [one for one in opened if self._is_theirs(one.name)]
        for one in opened:
            if not self._is_theirs(one.name):
                entry = enter(self._server, one, replace=True)
                self._made[one.name] = resources[one.name], entry
        log.info(
            "event=configured entries=%d opened=%d vanished=%d rules=%d",
            *(len(resources), len(opened) - len(left), len(vanished), len(wanted.rules)),
        )
        opened[:] = left
        # what a client has retired meanwhile was not opened
        self._again = self._again or not resources.keys() <= lender.names.keys()
        for name in filter(self._is_theirs, resources):
            log.warning(
                'event=left-alone entry=%s reason="somebody else has put it: retire it, then '
                'reload"',
                name,
            )

    def _is_theirs(self, name: str) -> bool:
        """Whether the name is that of an entry which was not made here."""
        there, ours = self._server.lender.names.get(name), self._made.get(name)
        return there is not None and (ours is None or ours[1] is not there)


class Discard(Job):
    """Close what nobody took."""

    queue = CLOSE

    def __init__(self, opened: list[Opened]) -> None:
        self._opened = opened

    def run(self) -> None:
        discard_all(self._opened)


def _nothing_more() -> None:
    """Do nothing when the descriptors are closed."""


class Reload(Job):
    """Read the file, and open what is new in it."""

    # What clients have inspected may hang, and must not delay a reload that takes rights away.
    queue = DEDICATED

    def __init__(
        self,
        path: str,
        ours: dict[str, Resource],
        theirs: set[str],
    ) -> None:
        self._path = path
        self._ours = ours
        self._theirs = theirs
        self.config: Config | None = None
        self.opened: list[Opened] = []
        self.error: FDBrokerError | OSError | None = None

    def run(self) -> None:
        try:
            read = config.read(self._path)
            self.opened = open_all(
                resource
                for resource in read.entries
                if self._ours.get(resource.name) != resource and resource.name not in self._theirs
            )
            self.config = read
        except (FDBrokerError, OSError) as error:
            self.error = error
