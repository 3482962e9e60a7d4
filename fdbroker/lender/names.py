"""The rule for names: printable, short, and safe in a shell, a path and a terminal."""

from __future__ import annotations

from fdbroker.errors import BadName

NAME_CHARS = 255  # as a file's name (NAME_MAX)
_ALLOWED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._/@-")


def check_name(name: str) -> None:
    """Raise `BadName` unless `name` can be an entry's."""
    if not (0 < len(name) <= NAME_CHARS and _ALLOWED.issuperset(name)):
        raise BadName(name)
