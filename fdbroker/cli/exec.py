"""fdbroker exec: borrow, put the descriptors where a program looks for them, become the program.

The session of the loan stays open in the program, at a high number that nothing else uses.  So
the loan lasts as long as the program or a child that it forked has the session, and the kernel
tells the broker of its end.

The start of a server waits for the imports of this module.  So it borrows with `Pool` and
`borrow`, and has a `Client` only where one is needed: to make an entry, and to suggest a name.
"""

from __future__ import annotations

import os
import sys
from _signal import SIG_DFL, SIGPIPE, SIGXFSZ, signal  # type: ignore[import-not-found]
from time import monotonic, sleep

from fdbroker._lazy import suppress
from fdbroker.cli import placing
from fdbroker.cli.output import printable
from fdbroker.cli.status import CANNOT_EXECUTE, NOT_FOUND, Misuse, status_of
from fdbroker.errors import (
    BorrowTimeout,
    BrokerClosing,
    BrokerGone,
    EntryRetired,
    FDBrokerError,
    NameTaken,
    NoBroker,
    UnknownEntry,
)
from fdbroker.ipc.client.borrow import borrow, encode_borrow
from fdbroker.ipc.client.pool import Pool
from fdbroker.ipc.transport.address import default_address
from fdbroker.lender.names import check_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import NoReturn

    from fdbroker.ipc.client import Client, Loan

FIRST_LISTEN_FD = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)
IGNORED_BY_PYTHON = SIGPIPE, SIGXFSZ  # at its start, and an exec would pass that on (signal(7))
LONGEST_NUMBER = 10  # in digits
FLAGS = {"exclusive", "nonblocking"}  # of a --fd
PAUSE = 0.02  # seconds between two attempts to reach a broker that is not there yet

DESCRIPTION = """\
Borrow descriptors, put them where CMD looks for them, and become CMD.  The loan
lasts until CMD has ended, and all that inherited its descriptors by fork."""
EXAMPLES = """\
{NAME} in CMD and its arguments is the number of that descriptor.

  fdbroker exec --listen web=:8000 -- uvicorn app:app --fd '{web}'
  fdbroker exec --fd web --listen-fds -- gunicorn app:app
  fdbroker exec --fd web -- hypercorn app:app --bind 'fd://{web}'
  fdbroker exec --fd web,nonblocking -- env NGINX='{web};' nginx -c "$PWD/nginx.conf"
  fdbroker exec --fd serial=0,exclusive --wait 60 -- ./read-meter

The loan's own descriptor has its number in $FDBROKER_LOAN_FD (several of them
are joined by ":").  A program that closes all it does not know at its start
gives the loan back early: it loses nothing, only the count is short then.  Nor
does a child count that gets only some descriptors (uvicorn --workers)."""


class Options:
    """The options of the command line, with their defaults."""

    def __init__(self) -> None:
        self.fd: list[str] = []
        self.listen: list[str] = []
        self.listen_fds = False
        self.wait = 0.0
        self.purpose = ""
        self.socket: str | None = None
        self.command: list[str] = []


def quickly(words: list[str]) -> Options | None:
    """Parse the usual form of the options: each in full, its value after it, then ``-- CMD``.

    Returns None for any other form.  That is left to argparse, whose import takes as long as
    everything else that this command does.
    """
    options, rest = Options(), iter(words)
    for word in rest:
        if word == "--":
            options.command = list(rest)
            return options
        if word == "--listen-fds":
            options.listen_fds = True
            continue
        value = next(rest, "-")
        if value.startswith("-"):
            return None
        if word in ("--fd", "--listen"):
            getattr(options, word[2:]).append(value)
        elif word in ("--purpose", "--socket"):
            setattr(options, word[2:], value)
        elif word == "--wait":
            try:
                options.wait = float(value)
            except ValueError:
                return None
        else:
            return None
    return None


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of exec to argparse."""
    parser.description = DESCRIPTION
    parser.epilog = EXAMPLES
    parser.usage = "fdbroker exec --fd NAME[=N][,exclusive][,nonblocking] ... [options] -- CMD ..."
    add = parser.add_argument
    add(
        "--fd",
        metavar="NAME[=N][,exclusive][,nonblocking]",
        action="append",
        default=[],
        help="borrow this one, to be descriptor N or any; in turns with others; with O_NONBLOCK, "
        "which all have who have it",
    )
    add(
        "--listen",
        metavar="NAME=ADDR",
        action="append",
        default=[],
        help="make this one if there is none, then borrow it: 8000, :8000, HOST:PORT, unix:PATH",
    )
    add(
        "--listen-fds",
        action="store_true",
        help="those without =N from 3 on, told to CMD as systemd does (LISTEN_FDS)",
    )
    add("--wait", metavar="S", type=float, default=0.0, help="seconds for broker and turn (0)")
    add("--purpose", metavar="TEXT", default="", help="shown by fdbroker loans")
    add("--socket", metavar="PATH", help="the broker's (default: see the README)")
    parser.add_argument("command", metavar="CMD", nargs="...", help="and its arguments")


def run(options: argparse.Namespace | Options) -> int:
    """Borrow, place the descriptors and become the program; returns only by raising."""
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command or not command[0]:
        raise Misuse("exec: after -- comes the command that gets the descriptors")
    listen = dict(_listening(word) for word in options.listen)
    if len(listen) < len(options.listen):
        raise Misuse("exec: --listen names an entry twice, one address is enough")
    wanted = [Wanted(word) for word in options.fd]
    named = {one.name for one in wanted}
    wanted += [Wanted(name) for name in listen if name not in named]
    if not wanted:
        raise Misuse("exec: nothing to borrow, name it with --fd NAME or --listen NAME=ADDR")
    environment = dict(os.environ)
    if options.listen_fds:
        environment |= _number_from_three(wanted)
    targets = _targets(wanted)
    if not options.wait >= 0:
        raise Misuse(f"exec: --wait takes seconds, 0 or more, not {options.wait}")
    borrower = Borrower(options.socket, options.wait, options.purpose, listen)
    try:
        loans = borrower.borrow(wanted)
    except ValueError as error:  # a name or a purpose is wrong
        raise Misuse(f"exec: {error}") from None
    _become(command, environment, wanted, targets, loans)


class Wanted:
    """One ``--fd``: which entry, at which number, and how.  Raises `Misuse`, `BadName`."""

    __slots__ = ("exclusive", "name", "nonblocking", "number")

    def __init__(self, word: str) -> None:
        described, *flags = word.split(",")
        name, equals, number = described.partition("=")
        check_name(name)
        if not FLAGS.issuperset(flags):
            raise Misuse(f"exec: --fd {word}: after a comma comes exclusive or nonblocking")
        digits = number.isascii() and number.isdigit() and len(number) <= LONGEST_NUMBER
        if equals and not (digits and int(number) < 2**31):
            raise Misuse(f"exec: --fd {word}: after = comes the number of a descriptor")
        self.name = name
        self.number = int(number) if equals else None
        self.exclusive = "exclusive" in flags
        self.nonblocking = "nonblocking" in flags


def _listening(word: str) -> tuple[str, str]:
    name, equals, address = word.partition("=")
    if not equals:
        raise Misuse(f"exec: --listen {word}: it is NAME=ADDR, for example web=:8000")
    check_name(name)
    return name, address


def _number_from_three(wanted: list[Wanted]) -> dict[str, str]:
    """Number the descriptors without a number as sd_listen_fds(3) expects them.

    Returns the environment variables that tell the program.
    """
    told = [one for one in wanted if one.number is None]
    for number, one in enumerate(told, FIRST_LISTEN_FD):
        one.number = number
    return {
        "LISTEN_FDS": str(len(told)),
        "LISTEN_PID": str(os.getpid()),  # it stays the same across an exec
        "LISTEN_FDNAMES": ":".join(one.name for one in told),
    }


def _targets(wanted: list[Wanted]) -> set[int]:
    targets: set[int] = set()
    for one in wanted:
        if one.number is not None:
            if one.number in targets:
                raise Misuse(f"exec: two descriptors cannot both be number {one.number}")
            targets.add(one.number)
    return targets


class Borrower:
    """Borrows entries that may have to be made, from a broker that may not be there yet."""

    def __init__(
        self, address: str | None, wait: float, purpose: str, listen: dict[str, str]
    ) -> None:
        self._pool = Pool(default_address() if address is None else address)
        self._deadline = monotonic() + wait
        self._purpose = purpose
        self._listen = listen
        self._made: set[str] = set()

    def borrow(self, wanted: list[Wanted]) -> list[Loan]:
        """Return one loan of all entries, or one of the exclusive ones and one of the shared ones.

        A process that has a shared one may be waiting for an exclusive one.  So the exclusive loan
        is given back while a shared entry cannot be had.
        """
        names = dict.fromkeys(one.name for one in wanted)
        exclusive = list(dict.fromkeys(one.name for one in wanted if one.exclusive))
        shared = [name for name in names if name not in exclusive]
        if not exclusive or not shared:
            return [self._borrow(exclusive or shared, exclusive=bool(exclusive))]
        while True:
            first = self._borrow(exclusive, exclusive=True)
            try:
                return [first, self._borrow(shared, exclusive=False, waits=False)]
            except BorrowTimeout:
                first.close()
                if not self._left():
                    raise
                sleep(PAUSE)
            except BaseException:
                first.close()
                raise

    def _left(self) -> float:
        return max(0.0, self._deadline - monotonic())

    def _borrow(self, names: list[str], *, exclusive: bool, waits: bool = True) -> Loan:
        while True:
            try:
                timeout = self._left() if waits else 0.0
                try:
                    key = tuple(names), exclusive, None, timeout, self._purpose
                    return borrow(self._pool, encode_borrow(key))
                except UnknownEntry as error:
                    self._make(error)
            except (NoBroker, BrokerClosing, BrokerGone, EntryRetired):
                if not self._left():
                    raise
                sleep(min(PAUSE, self._left()))

    def _make(self, missing: UnknownEntry) -> None:
        """Make the missing entry if ``--listen`` says how, unless another process does so first."""
        from fdbroker.ipc.client.client import Client, with_nearest

        name = missing.name
        address = self._listen.get(name)
        with Client(self._pool.address) as client:
            if address is None or (name in self._made and not self._left()):
                raise with_nearest(client, missing)
            self._made.add(name)
            self._put_listener(client, name, address)

    def _put_listener(self, client: Client, name: str, address: str) -> None:
        from fdbroker.cli import making

        try:
            fd = making.make_unless_there(client, name, "listen", address)
        except OSError as error:
            if not isinstance(error, FDBrokerError):
                error.filename = address
            raise
        if fd is not None:
            with suppress(NameTaken):
                making.put(client, name, "listen", fd)


def _become(
    command: list[str],
    environment: dict[str, str],
    wanted: list[Wanted],
    targets: set[int],
    loans: list[Loan],
) -> NoReturn:
    """Place what was borrowed and execute the command; exit if that cannot be done."""
    complaints = -1 if sys.stderr is None else 2  # it was closed, and may be the session by now
    if complaints in targets:
        complaints = placing.out_of_the_way(2, targets)
    inherited = [_kept(number, targets) for number in _inherited_sessions()]
    lent = {name: loan.fileno(name) for loan in loans for name in loan.entries}
    sessions = [placing.high_and_inheritable(loan.pass_fds()[-1], targets) for loan in loans]
    environment["FDBROKER_LOAN_FD"] = ":".join(map(str, [*inherited, *sessions]))
    try:
        numbers = placing.place([(lent[one.name], one.number) for one in wanted], targets)
        for one, number in zip(wanted, numbers, strict=True):
            if one.nonblocking:
                os.set_blocking(number, False)
        words = _filled_in(command, [one.name for one in wanted], numbers)
        for number in IGNORED_BY_PYTHON:
            signal(number, SIG_DFL)
        os.execvpe(words[0], words, environment)
    except BaseException as error:
        # No descriptor is where Python thinks it is, so nothing can be undone.  The end of this
        # process returns the loans.
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            status, text = NOT_FOUND, f"{command[0]}: not found"
        elif isinstance(error, OSError):
            status, text = CANNOT_EXECUTE, f"{command[0]}: cannot be executed: {error.strerror}"
        else:
            status, text = status_of(error), str(error)
        with suppress(OSError):
            os.write(complaints, f"fdbroker: {printable(text)}\n".encode(errors="replace"))
        os._exit(status)


def _filled_in(command: list[str], names: list[str], numbers: list[int]) -> list[str]:
    """Return the command with the number of each descriptor in the place of its name in braces."""
    words = []
    for word in command:
        for name, number in zip(names, numbers, strict=True):
            word = word.replace(f"{{{name}}}", str(number))
        words.append(word)
    return words


def _inherited_sessions() -> list[int]:
    """Return the sessions of loans that this process was started with by another exec."""
    found = []
    for word in os.environ.get("FDBROKER_LOAN_FD", "").split(":"):
        with suppress(ValueError, OSError, OverflowError):
            os.fstat(int(word))
            found.append(int(word))
    return found


def _kept(session: int, targets: set[int]) -> int:
    return placing.high_and_inheritable(session, targets) if session in targets else session
