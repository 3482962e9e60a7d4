"""LifetimeRegistry: what it counts, and what it says of a leak."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from fdbroker.rc import FD, LifetimeRegistry


def never_fails(sysfd: int) -> None:
    pass


def fails(sysfd: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def tracked(registry: LifetimeRegistry | None, sysfd: int, close: Any = never_fails) -> FD:
    fd = FD()
    fd.track_lifetime(registry)
    fd.init(sysfd, close)
    return fd


def test_an_init_is_recorded() -> None:
    registry = LifetimeRegistry()
    fd = tracked(registry, 42)
    assert registry.stats().initialized == 1
    assert registry.stats().closed == 0
    fd.close()


def test_a_close_is_recorded_when_it_has_happened() -> None:
    registry = LifetimeRegistry()
    fd = tracked(registry, 42)
    with fd.use():
        fd.retire()
        assert registry.stats().closed == 0
    assert registry.stats().closed == 1
    assert registry.stats().close_failed == 0


def test_a_failed_close_is_recorded() -> None:
    registry = LifetimeRegistry()
    fd = tracked(registry, 42, fails)
    with pytest.raises(OSError, match="Input/output error"):
        fd.close()
    assert (registry.stats().closed, registry.stats().close_failed) == (0, 1)
    assert registry.stats().report() == ""


def test_no_leak_no_report() -> None:
    registry = LifetimeRegistry()
    for sysfd in (1, 2):
        tracked(registry, sysfd).close()
    stats = registry.stats()
    assert (stats.initialized, stats.closed, stats.close_failed) == (2, 2, 0)
    assert stats.report() == ""


def adopts_and_closes(registry: LifetimeRegistry) -> FD:
    fd = tracked(registry, 42)
    fd.close()
    return fd


def adopts_and_forgets(registry: LifetimeRegistry) -> FD:
    return tracked(registry, 43)


def forgets_as_well(registry: LifetimeRegistry) -> FD:
    return tracked(registry, 44)


def test_a_leak_is_reported_with_the_stack_of_its_init() -> None:
    registry = LifetimeRegistry()
    fds = [adopts_and_closes(registry), adopts_and_forgets(registry), forgets_as_well(registry)]
    stats = registry.stats()
    assert (stats.initialized, stats.closed) == (3, 1)
    report = stats.report()
    assert report.startswith("2 of 3 FDs were never closed")
    assert "FD 43, adopted at" in report
    assert "FD 44, adopted at" in report
    assert "in adopts_and_forgets" in report
    assert "in forgets_as_well" in report
    assert "adopts_and_closes" not in report
    assert f'File "{__file__}"' in report
    for fd in fds[1:]:
        fd.close()
    assert registry.stats().report() == ""
    assert stats.report() == report, "stats are of their moment"


def test_no_registry() -> None:
    fd = tracked(None, 42)
    fd.close()
    assert fd.closed


def test_no_registry_any_more() -> None:
    registry = LifetimeRegistry()
    fd = FD(42, never_fails)
    fd.track_lifetime(registry)
    fd.track_lifetime(None)
    fd.close()
    assert (registry.stats().initialized, registry.stats().closed) == (1, 1)


def test_tracked_after_init() -> None:
    registry = LifetimeRegistry()
    fd = FD(42, never_fails)
    fd.track_lifetime(registry)
    assert registry.stats().initialized == 1
    assert "test_tracked_after_init" in registry.stats().report()
    fd.close()
    assert registry.stats().closed == 1


def test_a_collected_one_counts_as_closed() -> None:
    registry = LifetimeRegistry()
    fd = tracked(registry, 42)
    with pytest.warns(ResourceWarning):
        del fd
    assert registry.stats().closed == 1


def test_a_refused_init_is_not_recorded() -> None:
    registry = LifetimeRegistry()
    fd = tracked(registry, 42)
    with pytest.raises(ValueError, match="another FD"):
        fd.init(43, never_fails)
    assert registry.stats().initialized == 1
    fd.close()
