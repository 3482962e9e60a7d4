from __future__ import annotations

from collections.abc import Iterator

import pytest
from ruled import Ruled


@pytest.fixture
def ruled() -> Iterator[Ruled]:
    """A broker without rules yet, behind a socket that everybody may open."""
    with Ruled() as broker:
        yield broker
