"""fdbroker loans: who has what on loan."""

from __future__ import annotations

import argparse
from time import time

from fdbroker.cli.options import add_socket
from fdbroker.cli.output import complain, print_json, print_table, user
from fdbroker.errors import UnknownEntry, duration
from fdbroker.ipc.client import Client, LoanInfo
from fdbroker.lender.names import check_name

HEADER = (
    *("ENTRY", "GENERATION", "ID", "PID", "USER", "SINCE"),
    *("EXCLUSIVE", "PROCESS", "PURPOSE"),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.description = (
        "List the loans that are out: which entry, who has it, for how long, and what\n"
        "for.  What was borrowed in one call has one ID."
    )
    parser.epilog = """examples:
  fdbroker loans                      all of them
  fdbroker loans tty                  who has the serial port, and since when
  fdbroker loans web --json | jq '.[].pid'"""
    parser.add_argument("name", metavar="NAME", nargs="?", help="of this entry only")
    parser.add_argument("--json", action="store_true", help="for programs: an array of objects")
    add_socket(parser)


def run(options: argparse.Namespace) -> int:
    """Print them, by entry and age."""
    if options.name is not None:
        check_name(options.name)
    with Client(options.socket) as client:
        found = client.loans(options.name)
        if not found and options.name is not None:
            _check_entry(client, options.name)
    found.sort(key=lambda loan: (loan.entry, loan.since))
    if options.json:
        print_json([loan._asdict() | {"process": loan.process} for loan in found])
    elif found:
        now = time()
        print_table(HEADER, (_row(loan, now) for loan in found))
    elif options.name is not None:
        complain(f'nobody has "{options.name}" on loan')
    else:
        complain(f"no loans at {client.address}")
    return 0


def _check_entry(client: Client, name: str) -> None:
    names = {entry.name for entry in client.entries()}
    if name not in names:
        from difflib import get_close_matches

        raise UnknownEntry(name, get_close_matches(name, names, 2))


def _row(loan: LoanInfo, now: float) -> tuple[object, ...]:
    held = duration(round(max(0.0, now - loan.since)))
    exclusive = "yes" if loan.exclusive else "no"
    who = loan.pid or "unknown", user(loan.uid), held
    return (loan.entry, loan.generation, loan.id, *who, exclusive, loan.process, loan.purpose)
