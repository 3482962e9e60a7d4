from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .target import Target

LONG = 5  # times as much in the long tier


@pytest.fixture(scope="package")
def shared_target() -> Iterator[Target]:
    """One broker for all that need no other."""
    if os.geteuid() != 0:
        pytest.skip("attackers and the good client have other uids: run as root")
    with Target() as target:
        yield target


@pytest.fixture(params=[1, pytest.param(LONG, marks=pytest.mark.long)], ids=["fast", "long"])
def target(shared_target: Target, request: pytest.FixtureRequest) -> Iterator[Target]:
    """A broker that is attacked, while a good client is served: see target.py."""
    shared_target.volume = request.param
    with shared_target.unharmed():
        yield shared_target


FAST = ("test_cases.py", "test_unasked.py", "test_identity.py", "test_long_turns.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fast tier has the files of `FAST`, as far as they are not long by themselves."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name not in FAST:
            item.add_marker(pytest.mark.long)
