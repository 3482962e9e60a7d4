"""fdbroker put: one more entry in a running broker.

The descriptor is made in this process, with its rights and in its folder, and the broker keeps a
dup.  Whether the name is taken is asked first, so that a port is not bound, and a file not made,
in vain; and the answer to the put decides, since others may be faster.
"""

from __future__ import annotations

import argparse
import errno
from functools import partial

from fdbroker import openers
from fdbroker.cli import making
from fdbroker.cli.options import add_socket
from fdbroker.cli.output import complain
from fdbroker.cli.status import DONE, Misuse, status_of
from fdbroker.errors import FDBrokerError, NameTaken, NotPermitted
from fdbroker.ipc.client import Client, EntryInfo
from fdbroker.lender.names import check_name

RESOURCES = {  # how one is made: the metavar, and its help
    "listen": (
        "ADDR",
        """a listening socket: PORT (on 127.0.0.1), :PORT (all addresses), HOST:PORT, [IPV6]:PORT,
        unix:PATH, unix:@NAME (abstract); after udp: one for datagrams""",
    ),
    "open": (
        "PATH[:r|rw|a]",
        """a file or device, to read (r, the default), to read and write (rw), to append (a); made
        if there is none, but for r and below /dev""",
    ),
    "memfd": ("SIZE", "memory: bytes, or with K, M, G or T behind the number"),
    "fd": ("N", "a dup of descriptor N of this process"),
}
ADVICE = {
    ("fd", errno.EBADF): "open it in the shell, as in: fdbroker put log --fd 3 3>>log",
    ("listen", errno.EACCES): "a port below 1024 needs root or CAP_NET_BIND_SERVICE, a path its "
    "folder's permission",
    ("listen", errno.EADDRNOTAVAIL): "no interface here has that address, ip addr lists them",
    ("listen", errno.ENOENT): "make its folder first",
    ("open", errno.ENOENT): "only a file that is to be written is made, and no device",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.description = (
        "Make a descriptor here, with the rights of this process, and have the broker\n"
        "keep it as NAME.  It stays there when this command has ended."
    )
    parser.epilog = """examples:
  fdbroker put web --listen :8000 --if-absent    a port, on all addresses
  fdbroker put app --listen unix:/run/app.sock   a Unix socket
  fdbroker put tty --open /dev/ttyUSB0:rw        a serial port, to take turns
  fdbroker put log --fd 3 3>>log                 what the shell has opened"""
    parser.add_argument("name", metavar="NAME", help="A-Z a-z 0-9 . _ / @ -, at most 255")
    resource = parser.add_mutually_exclusive_group(required=True)
    for how, (metavar, text) in RESOURCES.items():
        resource.add_argument(
            f"--{how}",
            metavar=metavar,
            help=text,
            dest="resources",
            action="append",
            type=partial(_named, how),
        )
    taken = parser.add_mutually_exclusive_group()
    taken.add_argument(
        "--if-absent", action="store_true", help="nothing is done if there is an entry NAME"
    )
    taken.add_argument(
        "--replace", action="store_true", help="an entry NAME retires in the same instant"
    )
    add_socket(parser)


def _named(how: str, what: str) -> tuple[str, str]:
    return how, what


def run(options: argparse.Namespace) -> int:
    """Put it."""
    check_name(options.name)
    (how, what), *more = options.resources
    if more:
        raise Misuse(f"--{more[0][0]} {more[0][1]}: one descriptor is put at a time")
    with Client(options.socket) as client:
        try:
            fd = _made(client, options, how, what)
        except FDBrokerError:
            raise
        except OSError as error:
            complain(f"--{how} {what}: {_reason(client, how, what, error)}")
            return status_of(error)
        if fd is not None:
            _put(client, options, how, fd)
    return DONE


def _made(client: Client, options: argparse.Namespace, how: str, what: str) -> int | None:
    """The descriptor, or None if none is needed."""
    if how == "fd" or options.replace:  # a number: before there are descriptors of our own
        return openers.make(how, what)
    if options.if_absent:
        return making.make_unless_there(client, options.name, how, what)
    if making.is_there(client, options.name):
        raise NameTaken(options.name)
    return openers.make(how, what)


def _put(client: Client, options: argparse.Namespace, how: str, fd: int) -> None:
    try:
        making.put(client, options.name, how, fd, replace=options.replace)
    except NameTaken:
        if not options.if_absent:
            raise


def _entries(client: Client) -> list[EntryInfo]:
    """All, or none if this process may not list them."""
    try:
        return client.entries()
    except NotPermitted:
        return []


# --- what went wrong, and what to do ---------------------------------------------------------


def _reason(client: Client, how: str, what: str, error: OSError) -> str:
    said = str(error.strerror or error)
    if error.errno == errno.EADDRINUSE:
        return f"{said} {_in_use(_entries(client), what)}"
    advice = ADVICE.get((how, error.errno or 0))
    return f"{said}: {advice}" if advice else said


def _in_use(entries: list[EntryInfo], what: str) -> str:
    """By whom an address is used, and how that is ended."""
    for entry in entries:
        if _is_at(entry, what):
            held = f'by the entry "{entry.name}" ({entry.where})'
            if entry.retired:
                return f"{held}, which is retired but on loan: fdbroker loans {entry.name}"
            return f"{held}: fdbroker retire {entry.name} --wait, then put again"
    kind = "x" if "unix:" in what else "u" if what.startswith("udp:") else "t"
    return f"by another program, which ss -lp{kind} names"


def _is_at(entry: EntryInfo, what: str) -> bool:
    """Whether `entry` is a socket that may be in the way of one at the address `what`."""
    if what.startswith("udp:") != (entry.kind == "datagram socket"):
        return False
    what = what.removeprefix("udp:")
    if what.startswith("unix:"):
        return entry.where == what
    port = what.rpartition(":")[2]
    return not entry.where.startswith("unix:") and entry.where.rpartition(":")[2] == port
