"""Options that several commands have, and how the command says that one is wrong."""

from __future__ import annotations

import argparse
from functools import partial

from fdbroker.cli import status
from fdbroker.cli.output import complain, write

# with a width of its own: to ask the terminal, argparse imports shutil, and so zlib, bz2 and lzma
HelpFormatter = partial(argparse.RawDescriptionHelpFormatter, width=78)


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated options; says in one line what is wrong."""

    def __init__(self, **how: object) -> None:
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **how)  # type: ignore[arg-type]

    def error(self, message: str) -> None:  # type: ignore[override]
        """Exit with `status.MISUSE`."""
        command = self.prog.removeprefix("fdbroker").lstrip()
        complain(f"{command + ': ' if command else ''}{message} ({self.prog} --help)")
        self.exit(status.MISUSE)

    def _print_message(self, message: str, file: object = None) -> None:
        """Help and version; argparse itself passes over what fails here."""
        write(message)


def add_socket(parser: argparse.ArgumentParser) -> None:
    """``--socket PATH``; None stands for the default address."""
    parser.add_argument(
        "--socket",
        metavar="PATH",
        help="where the broker listens (default: the first that applies of $FDBROKER_SOCKET, "
        "$RUNTIME_DIRECTORY/broker.sock, $XDG_RUNTIME_DIR/fdbroker/broker.sock, "
        "/run/fdbroker/broker.sock for root, a folder of your own below the one for temporary "
        "files)",
    )


def seconds(text: str) -> float:
    """A time to wait, at least 0; for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, 0 or more")
    return value
