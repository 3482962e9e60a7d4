"""The fdbroker command."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from fdbroker import __version__
from fdbroker.errors import FDBrokerError
from fdbroker.ipc.address import default_address

# with a width of its own: to ask the terminal, argparse imports shutil, and so zlib, bz2 and lzma
HelpFormatter = partial(argparse.HelpFormatter, width=78)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the result is its exit status: 0, 1 for an error, 2 for misuse."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (FDBrokerError, OSError) as error:
        print(f"fdbroker: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fdbroker",
        description="Keep open file descriptors under names and lend them to other processes.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fdbroker {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what happens")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="run a broker in the foreground",
        description="Run a broker in the foreground.  SIGTERM waits for the loans, for at most "
        "the drain time; a second one stops it now.",
        formatter_class=HelpFormatter,
    )
    serve.add_argument("--socket", metavar="PATH", help="where to listen (default: see the README)")
    serve.add_argument("--ready-fd", metavar="N", type=int, help="write a newline to N when ready")
    serve.add_argument("--owner-fd", metavar="N", type=int, help=argparse.SUPPRESS)
    serve.add_argument(
        "--drain", metavar="SECONDS", type=float, default=10.0, help="(default: %(default)s)"
    )
    serve.set_defaults(run=_serve)
    return parser


def _serve(options: argparse.Namespace) -> int:
    import signal

    from fdbroker.daemon import log
    from fdbroker.daemon.serve import serve

    # for good: what is said from the background, to the last line, must not stop the process
    # (termios(3), TOSTOP)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    with log.to_stderr(verbose=options.verbose):
        serve(
            options.socket or default_address(),
            ready_fd=options.ready_fd,
            owner_fd=options.owner_fd,
            drain_seconds=options.drain,
        )
    return 0
