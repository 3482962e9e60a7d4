"""The broker's limit of open files, which it raises as far as it goes."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from fdbroker.ipc.transport.rlimit import most_files

from .puppet import Puppet


def test_it_raises_its_limit_to_the_hard_one():
    with Puppet() as owner:
        owner.do("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (50, 100))")
        owner.do("broker = fdbroker.Broker()")
        limits = Path(f"/proc/{owner.do('broker.pid')}/limits").read_text()
        (line,) = (line for line in limits.splitlines() if line.startswith("Max open files"))
        assert line.split()[3:5] == ["100", "100"]
        owner.do("broker.close()")


@pytest.mark.parametrize(
    ("hard", "nr_open", "limit"),
    [
        (20_000, 1_048_576, 20_000),
        (2_000_000, 1_048_576, 1_048_576),  # it was higher when the hard limit was set
        (resource.RLIM_INFINITY, 1_048_576, 1_048_576),
    ],
)
def test_a_limit_that_is_none(hard, nr_open, limit):
    """That no limit is the number -1 must not make it the least of all."""
    assert most_files(hard, nr_open) == limit
