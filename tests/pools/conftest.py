"""The processes that multiprocessing starts once and keeps: they are there before any test."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker

import pytest


@pytest.fixture(scope="session", autouse=True)
def helpers_of_multiprocessing() -> Iterator[None]:
    """The fork server and the resource tracker, so that no test is blamed for them."""
    resource_tracker.ensure_running()
    forkserver.ensure_running()
    yield
    forkserver._forkserver._stop()
