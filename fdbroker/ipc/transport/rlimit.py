"""The limit of descriptors that every process has, and how much of it is used."""

from __future__ import annotations

import os

from fdbroker.errors import TooManyFiles

# fs.nr_open as it is if nobody has set it (proc_sys_fs(5)).
NR_OPEN = 1_048_576


def too_many_files(side: str) -> TooManyFiles:
    """Return the error that names the limit of this process, and its use."""
    return TooManyFiles(side, limit(), descriptors_in_use())


def limit() -> int:
    """Return the soft RLIMIT_NOFILE (sysconf(3); a client has no number left to import
    `resource` when it needs this)."""
    return os.sysconf("SC_OPEN_MAX")


def descriptors_in_use() -> int:
    """Return how many descriptors this process has; the limit, if no number is left to look."""
    try:
        # One of them is the listing's own.
        return len(os.listdir("/proc/self/fd")) - 1
    except OSError:
        return limit()


def raise_limit() -> int:
    """Raise the soft limit of open files as far as it goes, and return what it is then."""
    # Only a broker that starts needs it.
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = most_files(hard, _nr_open())
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except ValueError as error:
        # EPERM: there is no /proc, and fs.nr_open is less than its usual value.
        import logging

        log = logging.getLogger("fdbroker")
        log.warning('event=file-limit-not-raised limit=%d reason="%s"', soft, error)
        return soft
    return most


def most_files(hard: int, nr_open: int) -> int:
    """Return the most files that can be had.

    The hard limit may be none at all (-1), or be left from a time when fs.nr_open was higher, which
    is above it everywhere: in open(2), and in setrlimit(2), where to ask for more is EPERM.
    """
    return nr_open if hard < 0 else min(hard, nr_open)


def _nr_open() -> int:
    try:
        with open("/proc/sys/fs/nr_open") as file:
            return int(file.read())
    except OSError:
        return NR_OPEN
