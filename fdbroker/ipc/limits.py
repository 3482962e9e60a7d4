"""The limit of descriptors that every process has, and how much of it is used."""

from __future__ import annotations

import os
from resource import RLIMIT_NOFILE, getrlimit  # none is left to import it when it is needed

from fdbroker.errors import TooManyFiles


def too_many_files(side: str) -> TooManyFiles:
    """The error that names the limit of this process, and its use."""
    return TooManyFiles(side, getrlimit(RLIMIT_NOFILE)[0], descriptors_in_use())


def descriptors_in_use() -> int:
    """How many descriptors this process has."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # the listing's own
    except OSError:  # no number left to open the folder with
        return getrlimit(RLIMIT_NOFILE)[0]
