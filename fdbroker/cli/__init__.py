"""The fdbroker command: one module for each of its commands, imported only for that one.

A command's module has `arguments`, which describes it to argparse, and `run`, which does it and
returns the exit status.  Errors are one line on stderr.
"""

from __future__ import annotations

import sys

from fdbroker import __version__
from fdbroker.cli.status import Misuse, status_of
from fdbroker.errors import FDBrokerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

COMMANDS = {  # and what the list of them says
    "serve": "run a broker in the foreground",
    "exec": "borrow descriptors and become the program that uses them",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the result is its exit status (status.py)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["exec"]:
            from fdbroker.cli import exec

            usual = exec.quickly(arguments[1:])
            if usual is not None:
                return exec.run(usual)
        options = _parser(arguments).parse_args(arguments)
        return int(options.run(options))
    except (Misuse, FDBrokerError, OSError, KeyboardInterrupt) as error:
        print(f"fdbroker: {str(error) or 'interrupted'}", file=sys.stderr)
        return status_of(error)


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    """Knows all commands by name, and the first one that is named by its options."""
    import argparse
    from functools import partial
    from importlib import import_module

    # with a width of its own: to ask the terminal, argparse imports shutil, so zlib, bz2 and lzma
    formatter = partial(argparse.RawDescriptionHelpFormatter, width=78)
    parser = argparse.ArgumentParser(
        prog="fdbroker",
        description="Keep open file descriptors under names and lend them to other processes.",
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=f"fdbroker {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what happens")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    named = next((word for word in arguments if not word.startswith("-")), None)
    for name, does in COMMANDS.items():
        command = commands.add_parser(name, help=does, formatter_class=formatter)
        if name == named:
            module = import_module(f"fdbroker.cli.{name}")
            module.arguments(command)
            command.set_defaults(run=module.run)
    return parser
