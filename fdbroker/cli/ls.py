"""fdbroker ls: the entries of a broker."""

from __future__ import annotations

import argparse
from fnmatch import fnmatchcase

from fdbroker.cli.options import add_socket
from fdbroker.cli.output import complain, print_json, print_table
from fdbroker.ipc.client import Client, EntryInfo

HEADER = ("NAME", "KIND", "STATE", "GENERATION", "LOANS", "WAITING", "WHERE")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.description = (
        "List the entries: what each is, how many have it on loan, how many wait for\n"
        "it, and where it leads.  A retired one is listed until its last loan is back."
    )
    parser.epilog = """examples:
  fdbroker ls                         all of them
  fdbroker ls web 'tty/*'             some: * stands for anything, ? for one letter
  fdbroker ls --json | jq -r '.[] | select(.loans == 0) | .name'"""
    parser.add_argument("patterns", metavar="NAME-PATTERN", nargs="*", help="(default: all)")
    parser.add_argument("--json", action="store_true", help="for programs: an array of objects")
    add_socket(parser)


def run(options: argparse.Namespace) -> int:
    """Print them, by name."""
    with Client(options.socket) as client:
        found = [entry for entry in client.entries() if _is_meant(entry, options.patterns)]
    found.sort(key=lambda entry: (entry.name, entry.generation))
    if options.json:
        print_json([entry._asdict() for entry in found])
    elif found:
        print_table(HEADER, map(_row, found))
    elif options.patterns:
        complain(f"no entry is named {' or '.join(options.patterns)} at {client.address}")
    else:
        complain(f"no entries at {client.address}")
    return 0


def _is_meant(entry: EntryInfo, patterns: list[str]) -> bool:
    return not patterns or any(fnmatchcase(entry.name, pattern) for pattern in patterns)


def _row(entry: EntryInfo) -> tuple[object, ...]:
    state = "retired" if entry.retired else "live"
    counts = entry.generation, entry.loans, entry.waiting
    return (entry.name, entry.kind, state, *counts, entry.where)
