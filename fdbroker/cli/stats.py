"""fdbroker stats: what each user uses of the broker."""

from __future__ import annotations

import argparse

from fdbroker.cli.options import add_socket
from fdbroker.cli.output import print_json, print_table, user, write
from fdbroker.ipc.client import Client, Usage
from fdbroker.lender.accounting import RESOURCES

HEADER = ("USER", *map(str.upper, RESOURCES))


def arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.description = (
        "Show what each user uses of the broker, and of how much (11/512): the most that\n"
        "it may have as things are now.  Root and the broker's own user are counted, but\n"
        "held to nothing.  It takes the right to admin."
    )
    parser.epilog = """columns:
  SESSIONS  connections               BYTES     of answers that it has not read
  LOANS     entries, also waited for  CLOSES    descriptors that are being closed
  ENTRIES   what it has put           INFLIGHT  descriptors that it has not received
  WAITING   requests that wait for a turn or a close

examples:
  fdbroker stats
  fdbroker stats --json | jq '.users[] | select(.used.closes > 0)'"""
    parser.add_argument("--json", action="store_true", help="for programs: an object")
    add_socket(parser)


def run(options: argparse.Namespace) -> int:
    """Print it, by uid."""
    with Client(options.socket) as client:
        usage, counts = client.usage(), client.stats()
    if options.json:
        print_json({"broker": counts, "users": [one._asdict() for one in usage]})
        return 0
    print_table(HEADER, map(_row, usage))
    entries = "1 entry" if counts["entries"] == 1 else f"{counts['entries']} entries"
    write(f"{entries} in all, {counts['descriptors']} open descriptors\n")
    return 0


def _row(usage: Usage) -> list[str]:
    cells = (
        str(usage.used[what])
        if (limit := usage.limits[what]) is None
        else f"{usage.used[what]}/{limit}"
        for what in RESOURCES
    )
    return [user(usage.uid), *cells]
