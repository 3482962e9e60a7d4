from __future__ import annotations

from collections.abc import Iterator

import pytest

from .kit import Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A lender; afterwards it must still be what its ledger says."""
    rig = Rig()
    yield rig
    rig.check()
    rig.descriptors.abandon(rig.lender)
