"""Every error of fdbroker, each with its wire code.

An error here is part of the interface.  It carries its data as attributes, in the order in which
they travel on the wire; its text is one sentence that says what happened and what to do next; it
survives pickling, so it crosses a process pool; and beside `FDBrokerError` it is the builtin that
a plain ``except`` expects (`TimeoutError`, `LookupError`, `PermissionError`, ...).

A class is written like a dataclass: annotated names are its data, `says` is its sentence.  `code`
is what stands for it on the wire; a code is never used again for something else.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, dataclass_transform
else:  # what it is at run time; `typing` itself costs more to import than all of this package

    def dataclass_transform(**_: object) -> Any:
        return lambda cls: cls


@dataclass_transform(eq_default=False)
class FDBrokerError(Exception):
    """What all errors of fdbroker have in common; never raised itself."""

    code = 0
    says = ""
    fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls.fields = (*cls.fields, *cls.__annotations__)

    def __init__(self, *data: Any, **named: Any) -> None:
        given = dict(zip(self.fields, data, strict=False)) | named
        if len(data) > len(self.fields) or not given.keys() <= set(self.fields):
            raise TypeError(f"{type(self).__name__} takes {', '.join(self.fields) or 'nothing'}")
        for field in self.fields:
            if field in given:
                setattr(self, field, given[field])
            elif not hasattr(self, field):
                raise TypeError(f"{type(self).__name__} needs {field}")
        super().__init__(str(self))

    @property
    def data(self) -> tuple[Any, ...]:
        """The attributes in the order of the wire."""
        return tuple(getattr(self, field) for field in self.fields)

    def __str__(self) -> str:
        return self.says.format(self=self)

    def __reduce__(self) -> tuple[type[FDBrokerError], tuple[Any, ...]]:
        return type(self), self.data


def by_code() -> dict[int, type[FDBrokerError]]:
    """The class that stands behind each wire code."""

    def below(cls: type[FDBrokerError]) -> list[type[FDBrokerError]]:
        return [cls, *(deeper for sub in cls.__subclasses__() for deeper in below(sub))]

    return {cls.code: cls for cls in below(FDBrokerError) if cls.code}


def duration(seconds: float) -> str:
    """`seconds` as people say it: ``0.2 s``, ``4 min``, ``3 h``."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.3g} s"


# --- rc: a descriptor used against its rules -------------------------------------------------


class UninitializedFDError(FDBrokerError, ValueError):
    """The FD was used before `init`."""

    code = 1
    says = "this FD has no descriptor yet: call init() first"


class MultipleInitError(FDBrokerError, ValueError):
    """`init` was called a second time; the number given stays the caller's."""

    code = 2
    sysfd: int
    says = "this FD has a descriptor already, {self.sysfd} stays yours: use another FD for it"


class ClosedFDError(FDBrokerError, ValueError):
    """The FD is closed or retired; it takes no new reference."""

    code = 3
    says = "this FD is closed or retired: take the reference before that"


class UnbalancedDecrefError(FDBrokerError, RuntimeError):
    """`decref` was called more often than `incref`."""

    code = 4
    says = "decref() without an incref(): call it once for each incref()"


class ReferencedFDError(FDBrokerError, RuntimeError):
    """`detach` was called while references are out."""

    code = 5
    refs: int
    says = "cannot detach an FD with {self.refs} references out: return them first"


class StolenFDError(FDBrokerError, OSError):
    """At close the number was another descriptor than the one adopted; it was left alone."""

    code = 6
    sysfd: int
    says = (
        "descriptor {self.sysfd} was closed behind its FD and now belongs to somebody else, so it "
        "is left alone: find who calls os.close() on a number that an FD owns"
    )


class CloseTimeout(FDBrokerError, TimeoutError):
    """References were still out at the deadline of `close`; the last one back still closes."""

    code = 7
    seconds: float
    refs: int
    says = (
        "not closed after {self.seconds:g} s, {self.refs} references are out: the last decref() "
        "closes it, or wait again with wait_closed()"
    )


# --- lending: what the broker answers --------------------------------------------------------


class BadName(FDBrokerError, ValueError):
    """The name breaks the rule for names."""

    code = 20
    name: str
    says = "{self.name!a} is no name: use 1 to 255 of the characters A-Z a-z 0-9 . _ / @ -"


class UnknownEntry(FDBrokerError, LookupError):
    """No entry has that name."""

    code = 21
    name: str
    nearest: list[str] = []  # noqa: RUF012 - a default, never changed

    def __str__(self) -> str:
        if not self.nearest:
            return f'no entry "{self.name}": put() it first, entries() lists what there is'
        meant = " or ".join(f'"{name}"' for name in self.nearest)
        return f'no entry "{self.name}" (did you mean {meant}?)'


class UnknownTicket(FDBrokerError, LookupError):
    """The ticket is of another broker, or its entry has retired."""

    code = 22
    says = (
        "no entry for this ticket: its owner has closed it, or it is another broker's; "
        "ask the owner to share() again"
    )


class NameTaken(FDBrokerError, FileExistsError):
    """An entry of that name is there already."""

    code = 23
    name: str
    says = 'there is an entry "{self.name}" already: retire it, or put with replace=True'


class UnsupportedKind(FDBrokerError, TypeError):
    """This kind of descriptor cannot be kept, or not be lent that way."""

    code = 24
    kind: str
    reason: str
    says = "a descriptor of kind {self.kind} will not do: {self.reason}"


class BorrowTimeout(FDBrokerError, TimeoutError):
    """The turn did not come in time.  `holders`: (pid, uid, seconds held, exclusive) of each."""

    code = 25
    name: str
    seconds: float
    holders: list[tuple[int, int, float, bool]]

    def __str__(self) -> str:
        who = ", ".join(
            f"pid {pid or 'unknown'} for {duration(held)}" for pid, _, held, _ in self.holders
        )
        return (
            f'"{self.name}" is busy after {duration(self.seconds)}: '
            f"{'held by ' + who if who else 'others wait before you'}; try again or wait longer"
        )


class WouldDeadlock(FDBrokerError, RuntimeError):
    """The wait could only end by what the waiting process itself holds."""

    code = 26
    name: str
    pid: int
    says = (
        'this process (pid {self.pid}) holds "{self.name}" itself and would wait for itself: '
        "return that loan first"
    )


class EntryRetired(FDBrokerError, LookupError):
    """The entry retired while the caller waited for it."""

    code = 27
    name: str
    says = '"{self.name}" was retired while you waited: borrow again if it was replaced'


class RetireTimeout(FDBrokerError, TimeoutError):
    """Loans were still out at the deadline; the entry stays retired, the last one closes it."""

    code = 28
    name: str
    seconds: float
    loans: int
    says = (
        '"{self.name}" is retired, but after {self.seconds:g} s {self.loans} loans are out: '
        "the last return closes it, loans() names the borrowers"
    )


class NotPermitted(FDBrokerError, PermissionError):
    """No rule of the broker allows this to the uid of this process (-1: the broker cannot tell it).

    `verb` is a rule's, or "connect", or "listen": to borrow a listening socket, which takes
    ``listeners = true``.  `name` is the entry's, or ``*`` for what has none.
    """

    code = 29
    uid: int
    verb: str
    name: str = "*"

    def __str__(self) -> str:
        if self.uid == -1:
            return (
                "the broker cannot tell your uid, which its user namespace does not map: no rule "
                "can allow you anything, connect from a uid that it knows"
            )
        if self.verb == "connect":
            return (
                f"uid {self.uid} may not connect: a rule with uid = {self.uid} would admit it, if "
                "the mode or group of the socket and its folder lets it in"
            )
        what, verbs = f'{self.verb} "{self.name}"', f'verbs = ["{self.verb}"]'
        if self.verb == "listen":
            what = f'borrow "{self.name}", a socket that listens, which it could end for all'
            verbs = 'verbs = ["borrow"], listeners = true'
        return (
            f"uid {self.uid} may not {what}: a rule with uid = {self.uid}, "
            f'names = ["{self.name}"], {verbs} would allow it'
        )


class BrokerClosing(FDBrokerError, ConnectionRefusedError):
    """The broker drains: it takes returns, and lends nothing new."""

    code = 30
    says = "the broker is closing down and lends nothing new: start another one"


class BrokerFull(FDBrokerError, OSError):
    """The broker's own tables or descriptors are used up."""

    code = 31
    what: str
    limit: int
    says = "the broker has no room for more {self.what} (limit {self.limit}): retire or return some"


class TooManyFiles(FDBrokerError, OSError):
    """A descriptor was lost on its way because one side had no number free for it."""

    code = 32
    side: str
    limit: int
    used: int
    says = (
        "the {self.side} has too many open files ({self.used} of {self.limit}): nothing is on "
        "loan; close some or raise RLIMIT_NOFILE, then try again"
    )


class TooManyInFlight(FDBrokerError, OSError):
    """The kernel refused one more descriptor in flight for the broker's uid (ETOOMANYREFS)."""

    code = 33
    says = "too many descriptors are in flight for the broker's uid: nothing is on loan, try again"


class CloseFailed(FDBrokerError, OSError):
    """The entry is closed and gone, but its close reported an error (close(2): EIO, ENOSPC)."""

    code = 34
    name: str
    reason: str
    says = (
        '"{self.name}" is closed, but closing it reported "{self.reason}": '
        "what was written last may be lost, check it"
    )


class QuotaExceeded(FDBrokerError, OSError):
    """The uid of this process has its share of `what`, which may be half of what others left.

    `what` is one of sessions, loans, entries, waiting, bytes, closes, inflight.
    """

    code = 35
    what: str
    used: int
    limit: int
    says = (
        "your uid uses {self.used} of the {self.limit} {self.what} that it may have now: give some "
        'back, or have "quota" in a rule of the broker allow more'
    )


# --- the client's own ------------------------------------------------------------------------


class ClosedLoanError(FDBrokerError, ValueError):
    """The loan was returned or given away; its number is no longer its own."""

    code = 40
    name: str
    says = 'the loan of "{self.name}" is returned already: borrow again'


class ForkedLoanError(FDBrokerError, RuntimeError):
    """The loan stayed with the parent when this process was forked."""

    code = 41
    name: str
    says = (
        'the loan of "{self.name}" stayed with the parent process at the fork (an exclusive loan, '
        "or one of another thread): borrow it in this process"
    )


class ClosedClientError(FDBrokerError, ValueError):
    """The client was closed."""

    code = 42
    says = "this client is closed: make another one"


class NoBroker(FDBrokerError, ConnectionRefusedError):
    """Nobody serves at the address."""

    code = 43
    address: str
    says = (
        "no broker at {self.address}: start one there (fdbroker serve), "
        "or set FDBROKER_SOCKET to where it is"
    )


class BrokerGone(FDBrokerError, ConnectionResetError):
    """The broker ended the session, or itself, in the middle of a request."""

    code = 44
    address: str
    says = "the broker at {self.address} ended this session: try again, and look at its log"


class BrokerStartError(FDBrokerError, RuntimeError):
    """The private broker process ended before it was ready."""

    code = 45
    status: int
    says = "the broker process ended with status {self.status} before it was ready: see its stderr"


class AlreadyServing(FDBrokerError, OSError):
    """Another broker holds the lock of the socket path."""

    code = 46
    address: str
    says = "another broker serves at {self.address}: use it, or choose another --socket"


class BadAddress(FDBrokerError, ValueError):
    """The socket path cannot be bound or connected to."""

    code = 47
    address: str
    reason: str
    says = "{self.address!a} is no address for a broker: {self.reason}"


class BadResource(FDBrokerError, ValueError):
    """What is to be opened was said in words that mean nothing."""

    code = 48
    how: str
    what: str
    reason: str
    says = "{self.how} {self.what!r}: {self.reason}"


class ConfigError(FDBrokerError, ValueError):
    """The configuration file has a mistake in `line`, or as a whole: then that is 0."""

    code = 49
    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}" if self.line else self.path
        return f"{place}: {self.reason}"


# --- the wire --------------------------------------------------------------------------------


class ProtocolError(FDBrokerError, ConnectionError):
    """A message broke the rules of the wire.  `side` is the guilty one."""

    code = 60
    side: str
    reason: str
    says = "the {self.side} broke the protocol: {self.reason}; this session is over, try again"


class VersionMismatch(FDBrokerError, ConnectionError):
    """Client and broker speak different versions of the wire."""

    code = 61
    ours: int
    theirs: int
    says = (
        "the broker speaks version {self.theirs} of the protocol, this client version {self.ours}: "
        "upgrade the older of the two"
    )
