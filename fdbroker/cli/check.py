"""fdbroker check: what the rules of a configuration file say of one request."""

from __future__ import annotations

import argparse
import json
import os

from fdbroker.cli import status
from fdbroker.cli.output import printable, write
from fdbroker.lender.names import check_name
from fdbroker.lender.rules import LISTEN, READ, ROOT, VERBS, Rule, Rules
from fdbroker.openers import listens

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from fdbroker.daemon.config import Config

CONNECT = "connect"  # which takes any rule that speaks of the peer


def arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.description = (
        "Say by which rule of a configuration file a request is allowed, or that none\n"
        "allows it.  No broker is asked.  To borrow a socket that listens takes a rule with\n"
        "listeners = true.  That an entry is one is known if the file has it, with listen = ...;\n"
        "of another one --listening says so.  For connect the quota is said, too."
    )
    parser.epilog = f"""examples:
  fdbroker check --config fdbroker.toml --uid www-data borrow web
  fdbroker check --config fdbroker.toml --uid 1000 --gid dialout borrow tty
  fdbroker check --config fdbroker.toml --uid 1000 --listening borrow api
  fdbroker check --config fdbroker.toml --uid 1000 connect

exit status {status.DONE} if it is allowed, {status.NOT_PERMITTED} if not"""
    parser.add_argument("--config", metavar="FILE", required=True, help="with the rules")
    parser.add_argument("--uid", metavar="USER", type=_user, required=True, help="name or number")
    parser.add_argument(
        "--gid",
        metavar="GROUP",
        type=_group,
        action="append",
        help="one of its groups, name or number (default: those that this system knows)",
    )
    parser.add_argument("--mode", choices=["r"], help="r: what it borrows is read-only")
    parser.add_argument("--listening", action="store_true", help="NAME is a socket that listens")
    parser.add_argument(
        "verb", metavar="VERB", choices=[*sorted(VERBS), CONNECT], help="%(choices)s"
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="of the entry")


def run(options: argparse.Namespace) -> int:
    """Print it."""
    from fdbroker.daemon.config import read

    if options.name is not None:
        check_name(options.name)
    elif options.verb != CONNECT:
        raise status.Misuse(f"check: {options.verb} takes the NAME of an entry")
    allowed, said = _answer(read(options.config), options)
    write(f"{'allowed' if allowed else 'refused'}: {said}\n")
    return status.DONE if allowed else status.NOT_PERMITTED


def _answer(config: Config, options: argparse.Namespace) -> tuple[bool, str]:
    """(whether it is allowed, by what)."""
    rules, uid, name = config.rules, options.uid, options.name
    if uid in (ROOT, os.geteuid()):
        return True, "root and the broker's own uid may do all"
    groups = options.gid or _groups_of(uid)
    verb = READ if options.mode and options.verb == "borrow" else options.verb
    number, note = _allowing(rules, uid, groups, verb, name), ""
    if number is None:
        return False, _none_of(rules, uid, groups)
    if options.verb == CONNECT:
        quota = Rules(rules, os.geteuid(), config.quota).rights(uid, groups).quota
        note = f"; its quota: {_listed(quota._asdict().items())}"
    if options.verb == "borrow":
        listener = _allowing(rules, uid, groups, LISTEN, name)
        if said := _said_to_listen(config, name, options.listening):
            if listener is None:
                return False, (
                    f"rule {number + 1} allows it but for a socket that listens, as this one does "
                    f"({printable(said)}): that takes listeners = true"
                )
            number, note = listener, f"; it listens ({printable(said)})"
        elif listener is None and all(entry.name != name for entry in config.entries):
            note = "; not if it is a socket that listens (see --listening)"
    return True, f"rule {number + 1}, {printable(_described(rules[number]))}{note}"


def _said_to_listen(config: Config, name: str, told: bool) -> str:
    """Who says that the entry is a socket that listens; empty if nobody does."""
    for entry in config.entries:
        if entry.name == name and listens(entry.how, entry.what):
            return f"listen = {json.dumps(entry.what)} in the file"
    return "--listening" if told else ""


def _allowing(
    rules: Sequence[Rule], uid: int, groups: Collection[int], verb: str, name: str | None
) -> int | None:
    """The first that allows it; for a connection any that speaks of the peer."""
    for number, rule in enumerate(rules):
        if rule.applies_to(uid, groups) and (verb == CONNECT or rule.allows(verb, name or "")):
            return number
    return None


def _none_of(rules: Sequence[Rule], uid: int, groups: Collection[int]) -> str:
    about = [str(number + 1) for number, rule in enumerate(rules) if rule.applies_to(uid, groups)]
    if not about:
        return f"no rule speaks of uid {uid}, so it may not even connect"
    return f"of those that speak of uid {uid} (rule {', '.join(about)}) none allows it"


def _described(rule: Rule) -> str:
    """As it is in the file."""
    who = [
        f"{key} = {value}" for key in ("uid", "gid") if (value := getattr(rule, key)) is not None
    ]
    who += ["everyone = true"] * rule.everyone
    who += [f"names = {json.dumps(rule.names)}", f"verbs = {json.dumps(sorted(rule.verbs))}"]
    who += [f'mode = "{rule.mode}"'] * bool(rule.mode)
    who += ["listeners = true"] * rule.listeners
    who += [f"quota = {{ {_listed(rule.quota)} }}"] * bool(rule.quota)
    return ", ".join(who)


def _listed(quota: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{what} = {most}" for what, most in quota)


def _groups_of(uid: int) -> set[int]:
    """All that this system knows; none of a uid that it does not know."""
    from pwd import getpwuid

    try:
        user = getpwuid(uid)
    except KeyError:
        return set()
    return set(os.getgrouplist(user.pw_name, user.pw_gid))


def _user(text: str) -> int:
    from fdbroker.daemon.config import uid

    return _meant(uid, text)


def _group(text: str) -> int:
    from fdbroker.daemon.config import gid

    return _meant(gid, text)


def _meant(look_up: Callable[[object], int], text: str) -> int:
    number = text.isascii() and text.isdigit() and len(text) <= len(str(2**32))
    try:
        return look_up(int(text) if number else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not {error}") from None
