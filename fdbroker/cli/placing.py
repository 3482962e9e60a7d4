"""Where descriptors are when a program starts: put at the numbers that it is told of.

A number that is wanted may be taken by another descriptor that is still to be placed, or by the
session that carries the loan: put one after the other, two that swap would both be the same file.
So everything is first copied out of the way of all numbers that are wanted, and only then put at
them.  The copies, and whatever else we have open, are close-on-exec; what is placed is not.  (To
place a copy also avoids ``dup2(n, n)``, which does nothing, so it leaves n close-on-exec: dup(2).)
"""

from __future__ import annotations

import errno
import os
from fcntl import F_DUPFD_CLOEXEC, fcntl

from fdbroker.cli.status import Misuse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

LEAST = 3  # 0 to 2 are taken only by who is told to
HIGH = 100  # a session's least number: out of the way of what programs expect at low ones


def place(wanted: Iterable[tuple[int, int | None]], targets: Collection[int]) -> list[int]:
    """Put each descriptor at its number, or at any that is free and no target; the numbers.

    They are inheritable; the descriptors given stay open unless their number is a target.  All
    that is to survive must be out of the way first.
    """
    copies = [(out_of_the_way(fd, targets), number) for fd, number in wanted]
    return [_put_at(copy, number) for copy, number in copies]


def out_of_the_way(fd: int, targets: Collection[int], least: int = LEAST) -> int:
    """A copy of `fd`, close-on-exec, at a number that is no target, `least` or more."""
    while True:
        copy = fcntl(fd, F_DUPFD_CLOEXEC, least)
        if copy not in targets:
            return copy
        os.close(copy)
        least = copy + 1


def high_and_inheritable(fd: int, targets: Collection[int]) -> int:
    """A copy that survives an exec, at a number that nobody will expect anything at."""
    try:
        copy = out_of_the_way(fd, targets, HIGH)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EMFILE):  # above RLIMIT_NOFILE (fcntl(2))
            raise
        copy = out_of_the_way(fd, targets)
    os.set_inheritable(copy, True)
    return copy


def _put_at(copy: int, number: int | None) -> int:
    if number is None:
        os.set_inheritable(copy, True)
        return copy
    try:
        os.dup2(copy, number)
    except OSError as error:
        if error.errno != errno.EBADF:  # which can only mean the number (dup(2))
            raise
        raise Misuse(f"{number} is no number for a descriptor: the limit is lower") from None
    return number
