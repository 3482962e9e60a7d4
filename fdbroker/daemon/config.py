"""fdbroker.toml: what a broker keeps, who may have it, and where it listens.

    [server]                        # all optional
    socket = "/run/fdbroker/broker.sock"
    mode = "0660"                   # of the socket
    group = "www-data"
    drain = 30                      # seconds

    [entry.web]                     # a name; then one of listen, open, memfd (openers.py)
    listen = ":8000"

    [quota]                         # what each uid may have at most
    sessions = 100                  # loans, entries, waiting, bytes, closes, inflight

    [[rule]]                        # to whom: a uid, a gid, or everyone
    uid = "deploy"
    names = ["web*"]                # patterns; all names if it is left out
    verbs = ["borrow", "list"]
    quota = { loans = 8 }           # in place of the one for all

The file is read as a whole, into values that never change; or it has a mistake, and then nothing
is made of it: `ConfigError` says where, and what would be right.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from fdbroker import openers
from fdbroker.errors import BadAddress, BadName, BadResource, ConfigError
from fdbroker.ipc.transport.address import check_path
from fdbroker.lender.accounting import DEFAULT, NO_LIMIT, RESOURCES, Quota
from fdbroker.lender.names import check_name
from fdbroker.lender.rules import Rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HOWS = ("listen", "open", "memfd")
VERBS = ("borrow", "put", "retire", "list", "admin")
UID_MAX = 2**32 - 2  # -1 means nobody in particular (chown(2))
SHOWN_CHARS = 60  # of a value, in a message

Keys = tuple[str | int, ...]  # the way to a value: ("rule", 0, "uid")


class Resource(NamedTuple):
    """What becomes an entry: `openers.make` has the words."""

    name: str
    how: str
    what: str


class Settings(NamedTuple):
    """The [server] table."""

    socket: str | None = None
    mode: int | None = None
    group: int | None = None
    drain: float | None = None
    """Seconds."""


class Config(NamedTuple):
    """What a file says."""

    settings: Settings = Settings()
    entries: tuple[Resource, ...] = ()
    rules: tuple[Rule, ...] = ()
    quota: Quota = DEFAULT


class Mistake(Exception):
    """What is wrong, and with which value."""

    def __init__(self, keys: Keys, reason: str) -> None:
        self.keys = keys
        self.reason = reason
        super().__init__(reason)


def read(path: str) -> Config:
    """The configuration in the file at `path`.  `ConfigError`."""
    import tomllib  # only who has a file pays for it

    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        reason = f"it cannot be read ({error.strerror}): is it the right file?"
        raise ConfigError(path, 0, reason) from None
    try:
        text = data.decode()
        return _config(tomllib.loads(text))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(path, line, "this is no UTF-8: save it as that") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(path, *_place(str(error), text)) from None
    except ValueError:  # int() has a limit (sys.set_int_max_str_digits)
        raise ConfigError(path, 0, "a number has too many digits: write a shorter one") from None
    except RecursionError:
        raise ConfigError(path, 0, "it is nested too deeply: use plain tables") from None
    except Mistake as mistake:
        line = line_of(text, mistake.keys)
        raise ConfigError(path, line, _printable(mistake.reason)) from None


def _place(said: str, text: str) -> tuple[int, str]:
    """(line, reason) of a TOMLDecodeError, whose text ends with where it is."""
    found = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", said)
    if found is None:
        return 0, _printable(said)
    line = int(found[1]) if found[1] else text.count("\n") + (not text.endswith("\n"))
    reason = said[: found.start()]
    return line, _printable(f"{reason[:1].lower()}{reason[1:]}: see https://toml.io")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# --- what may be in it -----------------------------------------------------------------------


class Table:
    """A table of the file.  What is taken out of it is checked; what is left is a mistake."""

    def __init__(self, value: Any, keys: Keys = ()) -> None:
        if not isinstance(value, dict):
            raise Mistake(keys, f"{_said(keys)} is a table, not {_shown(value)}")
        self._values = value
        self._known: list[str] = []
        self.keys = keys

    def take(self, key: str, check: Callable[[Any], Any], default: Any = None) -> Any:
        """The value of `key`, as `check` returns it; ValueError from that says what it is."""
        self._known.append(key)
        if key not in self._values:
            return default
        value = self._values[key]
        try:
            return check(value)
        except ValueError as error:
            raise self.mistake(f"{key} is {error}, not {_shown(value)}", key) from None

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def items(self) -> Iterator[tuple[str, Any]]:
        """All that is in it."""
        yield from self._values.items()

    def check_all_known(self) -> None:
        """Raise for a key that nobody asked for."""
        for key in self._values:
            if key not in self._known:
                known = ", ".join(self._known)
                where = _said(self.keys) or "the file"
                raise self.mistake(f"unknown key {_shown(key)}: {where} has {known}", key)

    def mistake(self, reason: str, *keys: str) -> Mistake:
        """A mistake in this table, in the value of a key if one is given."""
        return Mistake((*self.keys, *keys), reason)


def _config(document: dict[str, Any]) -> Config:
    top = Table(document)
    settings = _settings(Table(top.take("server", _any, {}), ("server",)))
    named = Table(top.take("entry", _any, {}), ("entry",))
    entries = tuple(
        _entry(named, name, Table(value, ("entry", name))) for name, value in named.items()
    )
    rules = top.take("rule", _list, [])
    found = tuple(_rule(Table(rule, ("rule", index))) for index, rule in enumerate(rules))
    quota = DEFAULT._replace(**dict(_quota(Table(top.take("quota", _any, {}), ("quota",)))))
    top.check_all_known()
    return Config(settings, entries, found, quota)


def _settings(table: Table) -> Settings:
    settings = Settings(
        socket=table.take("socket", _socket),
        mode=table.take("mode", _mode),
        group=table.take("group", gid),
        drain=table.take("drain", _seconds),
    )
    table.check_all_known()
    return settings


def _entry(named: Table, name: str, table: Table) -> Resource:
    try:
        check_name(name)
    except BadName as error:
        raise named.mistake(str(error), name) from None
    given = {how: table.take(how, CHECKS[how]) for how in HOWS}
    table.check_all_known()
    words = [(how, what) for how, what in given.items() if what is not None]
    if len(words) != 1:
        raise table.mistake(f'entry "{name}" takes exactly one of {", ".join(HOWS)}')
    return Resource(name, *words[0])


def _rule(table: Table) -> Rule:
    user, group = table.take("uid", uid), table.take("gid", gid)
    everyone = table.take("everyone", _true, False)
    if (user is not None) + (group is not None) + everyone != 1:
        raise table.mistake("a rule takes exactly one of uid, gid, everyone = true")
    names = table.take("names", _patterns, ("*",))
    verbs = table.take("verbs", _verbs)
    if verbs is None:
        raise table.mistake(f"a rule takes verbs, a list of {', '.join(VERBS)}")
    mode = table.take("mode", _read_only, "")
    if mode and "borrow" not in verbs:
        raise table.mistake('mode = "r" is about what is borrowed: verbs take "borrow" then')
    listeners = table.take("listeners", _true, False)
    if listeners and "borrow" not in verbs:
        reason = 'listeners = true is about what is borrowed: verbs take "borrow" then'
        raise table.mistake(reason, "listeners")
    if listeners and mode:
        reason = 'listeners = true does not go with mode = "r": no socket can be lent read-only'
        raise table.mistake(reason, "listeners")
    quota = _quota(Table(table.take("quota", _any, {}), (*table.keys, "quota")))
    table.check_all_known()
    return Rule(verbs, names, user, group, everyone, mode, listeners, quota)


def _quota(table: Table) -> tuple[tuple[str, int], ...]:
    given = {what: table.take(what, _count) for what in RESOURCES}
    table.check_all_known()
    return tuple((what, most) for what, most in given.items() if most is not None)


# --- values: each returns what is meant, or says in a ValueError what it should be ------------


def _any(value: Any) -> Any:
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("given as [[rule]], once for each")
    return value


def _true(value: Any) -> bool:
    if value is not True:
        raise ValueError("true or left out")
    return True


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(value: Any) -> int:
    if not (_is_integer(value) and 0 <= value < NO_LIMIT):
        raise ValueError("a number, 0 or more")
    return int(value)


def _socket(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a path")
    try:
        check_path(value)
    except BadAddress as error:
        raise ValueError(f"a path ({error.reason})") from None
    return value


def _mode(value: Any) -> int:
    """0o660 or "0660", but not 660, which is another number than it seems to be (chmod(1))."""
    if isinstance(value, str) and re.fullmatch("0?o?[0-7]{3}", value):
        return int(value[-3:], 8)
    if _is_integer(value) and 0 <= value <= 0o777:
        return int(value)
    raise ValueError('a mode like "0660" or 0o660')


def _seconds(value: Any) -> float:
    if (_is_integer(value) or isinstance(value, float)) and 0 <= value < 2**31:
        return float(value)
    raise ValueError("a number of seconds, 0 or more")


def uid(value: Any) -> int:
    from pwd import getpwnam

    return _id(value, "user", lambda name: getpwnam(name).pw_uid)


def gid(value: Any) -> int:
    from grp import getgrnam

    return _id(value, "group", lambda name: getgrnam(name).gr_gid)


def _id(value: Any, kind: str, look_up: Callable[[str], int]) -> int:
    if _is_integer(value) and 0 <= value <= UID_MAX:
        return int(value)
    if isinstance(value, str):
        try:
            return look_up(value)
        except (KeyError, ValueError):  # ValueError: a NUL
            raise ValueError(f"a {kind} of this system (it knows none of that name)") from None
    raise ValueError(f"the number or the name of a {kind}")


def _strings(value: Any) -> list[str]:
    if not (isinstance(value, list) and value and all(isinstance(one, str) for one in value)):
        raise ValueError('a list like ["one", "other"]')
    return value


def _patterns(value: Any) -> tuple[str, ...]:
    return tuple(_strings(value))


def _read_only(value: Any) -> str:
    if value != "r":
        raise ValueError('"r", or left out')
    return "r"


def _verbs(value: Any) -> frozenset[str]:
    verbs = frozenset(_strings(value))
    if not verbs <= frozenset(VERBS):
        raise ValueError(f"a list of {', '.join(VERBS)}")
    return verbs


def _words(how: str, noun: str, *, number: bool) -> Callable[[Any], str]:
    """What `openers` understands, and is only looked at here; a plain number need not be quoted."""

    def check(value: Any) -> str:
        if number and _is_integer(value):
            value = str(value)
        if not isinstance(value, str):
            raise ValueError(f"{noun}, in quotes")
        try:
            openers.check(how, value)
        except BadResource as error:
            raise ValueError(f"{noun} ({error.reason})") from None
        return value

    return check


CHECKS = {
    "listen": _words("listen", "an address", number=True),
    "open": _words("open", "a path", number=False),
    "memfd": _words("memfd", "a size", number=True),
}


# --- where it is, and how it is said ---------------------------------------------------------


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= SHOWN_CHARS else shown[: SHOWN_CHARS - 3] + "..."


def _said(keys: Keys) -> str:
    """``[entry.web]``, ``[[rule]]``."""
    if not keys:
        return ""
    if keys[0] == "rule":
        return f"[[rule]] {' '.join(map(str, keys[2:]))}".rstrip()
    return f"[{'.'.join(map(str, keys))}]"


def line_of(text: str, keys: Keys) -> int:
    """The line that has the key at the end of `keys`, or of the table it is in; 0 if none has.

    Each line is looked at by itself, so one within a string of several lines may seem to be it.
    """
    table: Keys = ()
    counts: dict[Keys, int] = {}  # of the tables that are given as [[...]]
    best, line = 0, 0
    for number, content in enumerate(text.split("\n"), 1):
        found = _keys_in(content)
        if content.lstrip().startswith("["):
            if not found:
                continue
            if content.lstrip().startswith("[["):
                counts[found] = counts.get(found, -1) + 1
            found = table = _with_numbers(found, counts)
        else:
            found = (*table, *found) if found else ()
        common = min(len(found), len(keys))
        if common > best and keys[:common] == found[:common]:
            best, line = common, number
    return line


def _with_numbers(keys: Keys, counts: dict[Keys, int]) -> Keys:
    """A table is in the last one of those that were given so far: [rule.quota] in that [[rule]]."""
    found: Keys = ()
    for place, key in enumerate(keys, 1):
        found = (*found, key)
        if keys[:place] in counts:
            found = (*found, counts[keys[:place]])
    return found


def _keys_in(line: str) -> Keys:
    """The keys that a line of TOML names: of a table, or before its first ``=``."""
    import tomllib

    start = line.lstrip()
    if not start.startswith("["):
        start, equals, _ = start.partition("=")
        if not equals:
            return ()
        start += "= 0"
    try:
        value = tomllib.loads(start)
    except tomllib.TOMLDecodeError:
        return ()
    keys: list[str | int] = []
    while isinstance(value, dict) and value:
        ((key, value),) = value.items()
        keys.append(key)
    return tuple(keys)
