"""The limit of descriptors that every process has, and how much of it is used."""

from __future__ import annotations

import os

from fdbroker.errors import TooManyFiles


def too_many_files(side: str) -> TooManyFiles:
    """The error that names the limit of this process, and its use."""
    return TooManyFiles(side, limit(), descriptors_in_use())


def limit() -> int:
    """The soft RLIMIT_NOFILE (sysconf(3); `resource` is no module to import when none is left)."""
    return os.sysconf("SC_OPEN_MAX")


def descriptors_in_use() -> int:
    """How many descriptors this process has."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # the listing's own
    except OSError:  # no number left to open the folder with
        return limit()
