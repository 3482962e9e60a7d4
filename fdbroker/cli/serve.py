"""fdbroker serve: the broker itself, in the foreground."""

from __future__ import annotations

import argparse
import signal

from fdbroker.ipc.address import default_address


def arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.description = (
        "Run a broker in the foreground.  SIGTERM waits for the loans, for at most the\n"
        "drain time; a second one stops it now."
    )
    parser.add_argument(
        "--socket", metavar="PATH", help="where to listen (default: see the README)"
    )
    parser.add_argument("--ready-fd", metavar="N", type=int, help="write a newline to N when ready")
    parser.add_argument("--owner-fd", metavar="N", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--drain", metavar="SECONDS", type=float, default=10.0, help="(default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Serve until drained."""
    from fdbroker.daemon import log
    from fdbroker.daemon.serve import serve

    # who starts us may have signals blocked, as the owner of a private broker has
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
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
