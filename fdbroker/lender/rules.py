"""Rules: who may do what with which names."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """Allows `verbs` on all names that match one of the patterns `names`, to a uid, a gid (also a
    supplementary one) or everyone."""

    verbs: frozenset[str]
    names: tuple[str, ...] = ("*",)
    uid: int | None = None
    gid: int | None = None
    everyone: bool = False
