"""fdbroker serve: the broker itself, in the foreground."""

from __future__ import annotations

import argparse
import signal

from fdbroker.cli.options import add_socket, seconds
from fdbroker.cli.output import printable, write
from fdbroker.errors import BadResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fdbroker.daemon.config import Resource

FORMS = {  # of the options that make an entry; and what each is for
    "listen": ("NAME=ADDR", "a listening socket: 8000, :8000, [::]:8000, unix:/path, udp:..."),
    "open": ("NAME=PATH[:r|rw|a]", "a file or device, for reading if it does not say otherwise"),
    "memfd": ("NAME=SIZE", "shared memory: 4096, 64K, 16M"),
    "fd": ("NAME=N", "the descriptor N, which is open already; the broker takes it over"),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.description = (
        "Run a broker in the foreground.  SIGTERM waits for the loans, for at most the\n"
        "drain time; a second one stops it now.  SIGHUP reads the configuration anew.\n"
        "Sockets that systemd hands over (LISTEN_FDS) become entries too."
    )
    parser.epilog = (
        "examples:\n"
        "  fdbroker serve --listen web=:8000 --open log=/var/log/app.log:a\n"
        "  fdbroker serve --config /etc/fdbroker/fdbroker.toml\n"
        "  fdbroker serve --config fdbroker.toml --check"
    )
    parser.set_defaults(misuse=parser.error)
    add_socket(parser)
    parser.add_argument("--config", metavar="FILE", help="read entries, rules, settings from it")
    parser.add_argument(
        "--check", action="store_true", help="only look for mistakes in the configuration"
    )
    for how, (form, help_) in FORMS.items():
        parser.add_argument(f"--{how}", metavar=form, action="append", default=[], help=help_)
    parser.add_argument("--ready-fd", metavar="N", type=int, help="write a newline to N when ready")
    parser.add_argument("--owner-fd", metavar="N", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--drain",
        metavar="SECONDS",
        type=seconds,
        help="how long the end waits for loans (default: 10, or as the configuration says)",
    )


def run(options: argparse.Namespace) -> int:
    """Serve until drained."""
    resources = _resources(options)
    if options.check:
        if options.config is None:
            options.misuse("--check takes --config FILE too")
        return _check(options.config)

    from fdbroker.daemon import log
    from fdbroker.daemon.serve import serve

    # who starts us may have signals blocked, as the owner of a private broker has; a hang-up waits
    # until it can be acted upon
    signal.pthread_sigmask(signal.SIG_SETMASK, (signal.SIGHUP,))
    # for good: what is said from the background, to the last line, must not stop the process
    # (termios(3), TOSTOP)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # and while it ends
    with log.to_stderr(verbose=options.verbose):
        serve(
            options.socket,
            config_path=options.config,
            resources=resources,
            ready_fd=options.ready_fd,
            owner_fd=options.owner_fd,
            drain_seconds=options.drain,
        )
    return 0


def _check(path: str) -> int:
    """Say what is in the file, or what is wrong with it."""
    from fdbroker.daemon.config import read

    config = read(path)
    entries, rules = _many(config.entries, "entry", "entries"), _many(config.rules, "rule", "rules")
    write(f"{printable(path)}: ok, {entries}, {rules}\n")
    return 0


def _many(things: tuple[object, ...], one: str, more: str) -> str:
    return f"{len(things)} {one if len(things) == 1 else more}"


def _resources(options: argparse.Namespace) -> list[Resource]:
    """The entries that are given as options.  `BadResource`, `BadName`."""
    given = [(how, words) for how in FORMS for words in getattr(options, how)]
    if not given:
        return []

    from fdbroker import openers
    from fdbroker.daemon.config import Resource
    from fdbroker.lender.names import check_name

    found = []
    for how, words in given:
        name, equals, what = words.partition("=")
        if not equals:
            raise BadResource(f"--{how}", words, f"it is {FORMS[how][0]}")
        check_name(name)
        openers.check(how, what)
        found.append(Resource(name, how, what))
    return found
