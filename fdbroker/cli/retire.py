"""fdbroker retire: the end of an entry, and who it waits for."""

from __future__ import annotations

import argparse
import math

from fdbroker.cli import status
from fdbroker.cli.holders import Holders
from fdbroker.cli.options import add_socket, seconds
from fdbroker.cli.output import complain
from fdbroker.errors import NotPermitted
from fdbroker.ipc.client import Client
from fdbroker.lender.names import check_name


def arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.description = (
        "Retire an entry: nobody can borrow it any more, its name is free at once, and\n"
        "it is closed when the last loan is back.  With --wait the command ends after\n"
        "that close, and tells on stderr for whom it waits.  Ctrl-C, and the end of the\n"
        "time, end only the waiting."
    )
    parser.epilog = f"""examples:
  fdbroker retire web                 now, and wait for nobody
  fdbroker retire web --wait          until the port is really free
  fdbroker retire web --wait 30 || fdbroker loans web
                                      exit status {status.TIMED_OUT} after 30 seconds"""
    parser.add_argument("name", metavar="NAME", help="of the entry")
    parser.add_argument(
        "--wait",
        metavar="S",
        nargs="?",
        type=_wait,
        const=math.inf,
        help="until it is closed, for at most S seconds (default: for ever); NAME comes before it",
    )
    add_socket(parser)


def run(options: argparse.Namespace) -> int:
    """Retire it, and wait if that is asked for."""
    check_name(options.name)
    with Client(options.socket) as client:
        if options.wait is None:
            client.retire(options.name)
        else:
            _wait_for_close(client, options.name, options.wait)
    return status.DONE


def _wait_for_close(client: Client, name: str, timeout: float) -> None:
    generation = _live_generation(client, name)
    try:
        with Holders(client, name, generation):
            client.retire(name, wait=True, timeout=timeout)
    except KeyboardInterrupt:
        if generation is not None and _live_generation(client, name) == generation:
            complain(f'interrupted before "{name}" was retired: it is as it was')
        else:
            complain(f'interrupted: "{name}" is retired all the same, its last return closes it')
        raise


def _live_generation(client: Client, name: str) -> int | None:
    """Of the entry that can be borrowed under that name; None, too, if that may not be known."""
    try:
        entries = client.entries()
    except NotPermitted:  # to list; perhaps it may retire
        return None
    live = (entry.generation for entry in entries if entry.name == name and not entry.retired)
    return next(live, None)


def _wait(text: str) -> float:
    try:
        return seconds(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error} (NAME comes before --wait)") from None
