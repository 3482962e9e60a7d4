"""fdbroker exec: borrow, put the descriptors where a program looks for them, become the program.

The session of the loan stays open in the program, at a high number that nobody uses: so the loan
lasts as long as any process has it, the program or a child that it forked, and the broker is told
of the end by the kernel.  This process and all that it imports are gone by then; what it imports
is what everybody waits for who starts a server, so it is kept short.
"""

from __future__ import annotations

import os
from _signal import SIG_DFL, SIGPIPE, SIGXFSZ, signal  # type: ignore[import-not-found]
from fcntl import LOCK_EX, flock
from time import monotonic, sleep

from fdbroker.cli import placing
from fdbroker.cli.status import CANNOT_EXECUTE, NOT_FOUND, Misuse, status_of
from fdbroker.errors import (
    BorrowTimeout,
    BrokerClosing,
    BrokerGone,
    NameTaken,
    NoBroker,
    UnknownEntry,
)
from fdbroker.ipc.client import Client
from fdbroker.lean import suppress
from fdbroker.lender.names import check_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import NoReturn

    from fdbroker.ipc.loan import Loan

FIRST_LISTEN_FD = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)
IGNORED_BY_PYTHON = SIGPIPE, SIGXFSZ  # at its start, and an exec would pass that on (signal(7))
PAUSE = 0.02  # seconds between two looks for a broker that is not there yet

DESCRIPTION = """\
Borrow descriptors, put them where CMD looks for them, and become CMD.  The loan
lasts until CMD has ended, and all its children that have the descriptors."""
EXAMPLES = """\
{NAME} in CMD and its arguments is the number of that descriptor.

  fdbroker exec --listen web=:8000 -- uvicorn app:app --fd '{web}'
  fdbroker exec --fd web --listen-fds -- gunicorn app:app
  fdbroker exec --fd web -- hypercorn app:app --bind 'fd://{web}'
  fdbroker exec --fd web -- env NGINX='{web};' nginx -c "$PWD/nginx.conf"
  fdbroker exec --fd serial=0,exclusive --wait 60 -- ./read-meter

The loan's own descriptor has its number in $FDBROKER_LOAN_FD (several of them
are joined by ":").  A program that closes all it does not know at its start
gives the loan back early: it loses nothing, only the count is short then."""


class Options:
    """What was asked for, as far as nothing was said."""

    def __init__(self) -> None:
        self.fd: list[str] = []
        self.listen: list[str] = []
        self.listen_fds = False
        self.wait = 0.0
        self.purpose = ""
        self.socket: str | None = None
        self.command: list[str] = []


def quickly(words: list[str]) -> Options | None:
    """The options as nearly everybody gives them, each in full, its value after it, ``-- CMD``.

    argparse takes as long to import as all the rest; it is left what is not so: None.
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
    """Its options."""
    parser.description = DESCRIPTION
    parser.epilog = EXAMPLES
    parser.usage = "fdbroker exec --fd NAME[=N][,exclusive] ... [options] -- CMD ..."
    add = parser.add_argument
    add(
        "--fd",
        metavar="NAME[=N][,exclusive]",
        action="append",
        default=[],
        help="borrow this one, to be descriptor N or any; in turns with others",
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
    """Become the program; returns only if that cannot be done."""
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise Misuse("exec: after -- comes the command that gets the descriptors")
    listen = dict(_listening(word) for word in options.listen)
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
    except ValueError as error:  # what the client says of a name or a purpose
        raise Misuse(f"exec: {error}") from None
    _become(command, environment, wanted, targets, loans)


class Wanted:
    """One ``--fd``: which entry, at which number, alone or not.  `Misuse`, `BadName`."""

    __slots__ = ("exclusive", "name", "number")

    def __init__(self, word: str) -> None:
        described, *flags = word.split(",")
        name, equals, number = described.partition("=")
        check_name(name)
        if any(flag != "exclusive" for flag in flags):
            raise Misuse(f"exec: --fd {word}: after the comma comes exclusive, nothing else")
        if equals and not (number.isascii() and number.isdigit() and int(number) < 2**31):
            raise Misuse(f"exec: --fd {word}: after = comes the number of a descriptor")
        self.name = name
        self.number = int(number) if equals else None
        self.exclusive = bool(flags)


def _listening(word: str) -> tuple[str, str]:
    name, equals, address = word.partition("=")
    if not equals:
        raise Misuse(f"exec: --listen {word}: it is NAME=ADDR, for example web=:8000")
    check_name(name)
    return name, address


def _number_from_three(wanted: list[Wanted]) -> dict[str, str]:
    """Number all that have none as sd_listen_fds(3) wants it; the environment that says so."""
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
    """Borrows from a broker that may not be there yet, entries that may have to be made."""

    def __init__(
        self, address: str | None, wait: float, purpose: str, listen: dict[str, str]
    ) -> None:
        self._client = Client(address)
        self._deadline = monotonic() + wait
        self._purpose = purpose
        self._listen = listen

    def borrow(self, wanted: list[Wanted]) -> list[Loan]:
        """One loan of all, or one of those that are exclusive and then one of the others."""
        names = dict.fromkeys(one.name for one in wanted)
        exclusive = {one.name for one in wanted if one.exclusive}
        loans = []
        for turn in (True, False):
            some = [name for name in names if (name in exclusive) == turn]
            if some:
                loans.append(self._borrow(some, exclusive=turn))
        return loans

    def _borrow(self, names: list[str], *, exclusive: bool) -> Loan:
        while True:
            left = max(0.0, self._deadline - monotonic())
            try:
                return self._client.borrow_all(
                    names, exclusive=exclusive, timeout=left, purpose=self._purpose
                )
            except UnknownEntry as error:
                address = self._listen.pop(error.name, None)
                if address is None:
                    raise
                self._make(error.name, address)
            except (NoBroker, BrokerClosing, BrokerGone):
                if not left:
                    raise
                sleep(min(PAUSE, left))

    def _make(self, name: str, address: str) -> None:
        """Make and put it, unless another process has done so meanwhile."""
        from fdbroker import openers

        lock = _lock_of(self._client.address)
        try:
            if self._exists(name):
                return
            try:
                fd = openers.listen(address)
            except OSError as error:
                error.filename = address
                raise
            try:
                self._client.put(name, fd)
            except NameTaken:
                pass
            finally:
                os.close(fd)
        finally:
            if lock is not None:
                os.close(lock)

    def _exists(self, name: str) -> bool:
        try:
            self._client.borrow(name, timeout=0).close()
        except UnknownEntry:
            return False
        except BorrowTimeout:
            pass
        return True


def _lock_of(address: str) -> int | None:
    """A lock for who makes entries at this broker, by flock(2) of its folder; ends with its close.

    Two that start at once would else both bind: the second one's bind fails, or to a path it even
    takes the first one's away, which looks stale until it listens.  Whoever may not read the folder
    goes without.
    """
    try:
        folder = os.open(os.path.dirname(address) or ".", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        flock(folder, LOCK_EX)
    except BaseException:
        os.close(folder)
        raise
    return folder


def _become(
    command: list[str],
    environment: dict[str, str],
    wanted: list[Wanted],
    targets: set[int],
    loans: list[Loan],
) -> NoReturn:
    """Place what was borrowed and execute the command; its own end if that cannot be done."""
    complaints = placing.out_of_the_way(2, targets) if 2 in targets and _is_open(2) else 2
    lent = {name: loan.fileno(name) for loan in loans for name in loan.entries}
    sessions = [placing.high_and_inheritable(loan.pass_fds()[-1], targets) for loan in loans]
    environment["FDBROKER_LOAN_FD"] = ":".join(map(str, sessions))
    try:
        numbers = placing.place([(lent[one.name], one.number) for one in wanted], targets)
        words = _filled_in(command, [one.name for one in wanted], numbers)
        for number in IGNORED_BY_PYTHON:
            signal(number, SIG_DFL)
        os.execvpe(words[0], words, environment)
    except BaseException as error:
        # nothing of ours is where Python thinks it is; the end of this process returns the loans
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            status, text = NOT_FOUND, f"{command[0]}: not found"
        elif isinstance(error, OSError):
            status, text = CANNOT_EXECUTE, f"{command[0]}: cannot be executed: {error.strerror}"
        else:
            status, text = status_of(error), str(error)
        with suppress(OSError):
            os.write(complaints, f"fdbroker: {text}\n".encode(errors="replace"))
        os._exit(status)


def _filled_in(command: list[str], names: list[str], numbers: list[int]) -> list[str]:
    """The command with the number of each descriptor, its first one, for its name in braces."""
    words = []
    for word in command:
        for name, number in zip(names, numbers, strict=True):
            word = word.replace(f"{{{name}}}", str(number))
        words.append(word)
    return words


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
