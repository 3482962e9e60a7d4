"""The fdbroker command: one module for each of its commands, imported only for that one.

A command's module has `arguments`, which describes it to argparse, and `run`, which does it and
returns the exit status (status.py).  Errors are one line on stderr.
"""

from __future__ import annotations

import sys
from errno import EPIPE

from fdbroker import __version__
from fdbroker.cli import output, status
from fdbroker.cli.status import Misuse
from fdbroker.errors import FDBrokerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

COMMANDS = {  # and what the list of them says
    "serve": "run a broker in the foreground",
    "check": "say by which rule a request would be allowed",
    "put": "put one more descriptor into a running broker",
    "ls": "list the entries",
    "loans": "list who has what on loan",
    "stats": "show what each user uses of the broker",
    "retire": "take an entry out; its last return closes it",
    "exec": "borrow descriptors and become the program that uses them",
}

EXAMPLES = """\
  fdbroker serve --listen web=:8000 &
  fdbroker exec --wait 5 --fd web -- uvicorn app:app --fd '{web}'\
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the result is its exit status, one of `status.MEANINGS`."""
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except output.Unwritable as error:
        number, reason = error.args
        if number == EPIPE:
            return status.NO_READER
        output.complain(f"the output cannot be written: {reason}")
        return status.FAILED
    except KeyboardInterrupt:
        return status.INTERRUPTED


def _run(arguments: list[str]) -> int:
    try:
        if arguments[:1] == ["exec"]:
            from fdbroker.cli import exec

            usual = exec.quickly(arguments[1:])
            if usual is not None:
                return exec.run(usual)
        options = _parser(arguments).parse_args(arguments)
        return int(options.run(options))
    except SystemExit as end:  # argparse has said why
        return int(end.code or 0)
    except (Misuse, FDBrokerError, OSError) as error:
        output.complain(status.sentence(error))
        return status.status_of(error)


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    """Knows all commands by name, and the first one that is named by its options."""
    from importlib import import_module

    from fdbroker.cli.options import Parser

    parser = Parser(
        prog="fdbroker",
        description="Keep open file descriptors under names and lend them to other processes.",
        epilog=f"examples:\n{EXAMPLES}\n\nexit status:\n{status.table()}",
    )
    parser.add_argument("--version", action="version", version=f"fdbroker {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what happens")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    named = next((word for word in arguments if not word.startswith("-")), None)
    for name, does in COMMANDS.items():
        command = commands.add_parser(name, help=does)
        if name == named:
            module = import_module(f"fdbroker.cli.{name}")
            module.arguments(command)
            command.set_defaults(run=module.run)
    return parser
