"""The storm: borrowers that are killed, hundreds of them, eight at a time.

Half of them die while they hold a loan, the others anywhere in their loop of borrowing and
returning.  Afterwards the broker holds what it held before, and strace has seen each descriptor
that it was given closed exactly once.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
from support import open_files, wait_until

import fdbroker

from . import storm
from .puppet import Puppet
from .trace import Trace

HERE = Path(__file__).parent


@pytest.fixture
def own_broker():
    """A broker for one test, with the entries of the storm; it must be as before in the end."""
    with fdbroker.Broker() as broker:
        for name in storm.NAMES:
            storm.put(broker, name)
        broker.borrow(storm.NAMES[0], mode="r").close()
        wait_until(lambda: broker.stats()["jobs"] == 0)
        before, sessions = Counter(open_files(broker.pid).values()), broker.stats()["sessions"]
        yield broker
        wait_until(lambda: broker.stats()["sessions"] == sessions, 5.0)
        wait_until(lambda: broker.stats()["jobs"] == 0, 5.0)
        stats = broker.stats()
        assert (stats["loans"], stats["waiting"], stats["entries"]) == (0, 0, len(storm.NAMES))
        assert broker.loans() == []
        wait_until(lambda: Counter(open_files(broker.pid).values()) == before, 5.0)
        for name in storm.NAMES:
            broker.retire(name, wait=True, timeout=5.0)


def storm_over(broker: fdbroker.Broker, kills: int, seed: int) -> storm.Report:
    with Puppet() as killer, Puppet() as good:
        for puppet in (killer, good):
            puppet.do(f"sys.path.insert(0, {str(HERE)!r}); import storm")
        good.do(f"good = storm.Good({broker.address!r})")
        begun = time.monotonic()
        killer.begin(f"tuple(storm.run({broker.address!r}, {kills}, {seed}))")
        report = storm.Report(*killer.result(300))
        took = time.monotonic() - begun
        borrowed, slowest, errors = good.do("good.stop()")
    print(
        f"\nseed {seed}: {report.kills} kills in {took:.1f} s, {report.held} of who held a loan, "
        f"{report.put} descriptors put; the good client borrowed {borrowed} times, "
        f"at most {slowest * 1000:.0f} ms each"
    )
    assert report.kills == kills
    assert kills * 0.3 <= report.held <= kills * 0.7
    assert errors == []
    assert borrowed >= kills / 10
    return report


def test_a_storm_leaves_nothing(own_broker):
    storm_over(own_broker, 60, 1)


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [2, 3])
def test_a_long_storm_leaves_nothing(own_broker, seed):
    storm_over(own_broker, 1000, seed)


def test_each_descriptor_is_closed_once(own_broker, tmp_path):
    closed_once(own_broker, tmp_path, 60, 4)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_each_descriptor_is_closed_once_in_a_long_storm(own_broker, tmp_path):
    closed_once(own_broker, tmp_path, 1000, 5)


def closed_once(broker: fdbroker.Broker, tmp_path: Path, kills: int, seed: int) -> None:
    with Trace(broker.pid, tmp_path / "trace") as trace:
        report = storm_over(broker, kills, seed)
        ours = 2  # one that puts, one that lends
        wait_until(lambda: broker.stats()["sessions"] <= ours, 5.0)
        wait_until(lambda: broker.stats()["jobs"] == 0, 5.0)
    print(f"the broker was given {trace.received} descriptors and closed {trace.closed} of them")
    assert trace.faults == []
    assert trace.received == report.put
    assert 0 <= trace.received - trace.closed <= len(storm.NAMES)
