"""A broker of 30 descriptors, with 60 clients at it: benchmarks/against_s6.py does it for a minute,
and to s6-fdholderd as well."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.attacks import KEPT, crowd, sixty
from benchmarks.subjects import ROOT, Fdbroker

ALL = f"{len(KEPT)} of {len(KEPT)}"


@pytest.mark.long
@pytest.mark.timeout(200)
def test_sixty_clients_of_a_broker_of_thirty_descriptors() -> None:
    told = sixty(Fdbroker, 2, "each" if ROOT else "own", look=2)
    print(told)
    assert told["the broker"] == "alive"
    assert told["entries kept"] == ALL
    assert told["served in the end"] == "60 of 60"
    assert told["(held by others / loans of the 60 meanwhile)"].endswith(" / 0")
    assert float(told["CPU while there is no room"].rstrip("%")) < 20


@pytest.mark.long
@pytest.mark.skipif(not ROOT, reason="two users take root")
def test_a_crowd_of_one_user_leaves_room_for_another() -> None:
    told = crowd(Fdbroker)
    print(told)
    assert told["entries kept"] == ALL
    assert told["a good client meanwhile"].startswith("20 of 20")
