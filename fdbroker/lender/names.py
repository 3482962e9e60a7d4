"""The rule for names: they are printable, short, and safe in a shell, a path and a terminal."""

from __future__ import annotations

from fdbroker.errors import BadName

# As many as a file's name has (NAME_MAX).
NAME_CHARS = 255
_ALLOWED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._/@-")


def check_name(name: str) -> None:
    """Raise `BadName` unless `name` can be an entry's name, and TypeError if it is no str."""
    if not isinstance(name, str):
        raise TypeError(f"a name is a str, not {type(name).__name__}")
    if not (0 < len(name) <= NAME_CHARS and _ALLOWED.issuperset(name)):
        raise BadName(name)
