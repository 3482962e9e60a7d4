"""The rule for names: printable, short, and safe in a shell, a path and a terminal."""

from __future__ import annotations

import re

from fdbroker.errors import BadName

_NAME = re.compile(r"[A-Za-z0-9._/@-]{1,255}")


def check_name(name: str) -> None:
    """`BadName` unless `name` can be an entry's, TypeError if it is no str."""
    if not isinstance(name, str):
        raise TypeError(f"a name is a str, not {type(name).__name__}")
    if not _NAME.fullmatch(name):
        raise BadName(name)
