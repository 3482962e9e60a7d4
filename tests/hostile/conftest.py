from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .target import Target


@pytest.fixture(scope="session")
def shared_target() -> Iterator[Target]:
    """One broker for all that need no other."""
    if os.geteuid() != 0:
        pytest.skip("attackers and the good client have other uids: run as root")
    with Target() as target:
        yield target


@pytest.fixture
def target(shared_target: Target) -> Iterator[Target]:
    """A broker that is attacked, while a good client is served: see target.py."""
    with shared_target.unharmed():
        yield shared_target
