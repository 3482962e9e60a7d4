"""The bounded fuzz run of CI: the corpus, Hypothesis, and atheris where it is to be had."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import bounded, seeds, steps
from fuzz.target import Target
from fuzz.world import Found

ROOT = Path(__file__).parents[2]


def test_every_input_of_the_corpus() -> None:
    replay()


@pytest.mark.long
def test_what_is_long_or_deep_takes_little_memory() -> None:
    tracemalloc.start()  # then the target looks at each turn
    try:
        replay("heads", "size", "many")
    finally:
        tracemalloc.stop()


def replay(*beginnings: str) -> None:
    with bounded.player() as play:
        for name, it in bounded.corpus().items():
            if not name.startswith(beginnings or ""):
                continue
            try:
                play(it)
            except Exception as error:
                error.add_note(f"(corpus/{name})")
                raise


def test_the_corpus_is_whole_and_small() -> None:
    kept = {path.name: path.read_bytes() for path in bounded.CORPUS.iterdir()}
    made = {name: steps.encode(it) for name, it in seeds.seeds()}
    assert made == {name: kept.get(name) for name in made}, "python -m tests.fuzz --seeds"
    assert len(kept) < 200
    assert sum(map(len, kept.values())) < 200_000


def test_some_inputs_of_hypothesis() -> None:
    with bounded.player() as play:
        bounded.search(play, 60)
        assert play.played >= 60


@pytest.mark.long
def test_more_inputs_of_hypothesis() -> None:
    with bounded.player() as play:
        bounded.search(play, 300)


@settings(database=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_input(data: bytes) -> None:
    it = steps.decode(data)
    again = steps.decode(steps.encode(it))
    assert (again.kernel, list(again.steps)) == (it.kernel, list(it.steps))


needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="NOT FUZZED BY COVERAGE: atheris is not here (pip install '.[fuzz]')",
)


def fuzz(runs: int) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--runs", str(runs), "--seed", "1"],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": "/tmp"},  # the path of a socket is short
        capture_output=True,
        text=True,
        timeout=110,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-5000:]
    return said


@needs_atheris
@pytest.mark.long
def test_atheris_finds_nothing() -> None:
    said = fuzz(600)
    assert "Done 600 runs" in said
    coverage = int(said.rpartition("cov: ")[2].split()[0])
    assert coverage > 800, "the code of the broker is not instrumented"


@pytest.mark.long
def test_without_atheris_bytes_are_changed_by_chance() -> None:
    """The same command, where it cannot be found."""
    program = "import runpy\n"
    program += "import importlib.util as u; find = u.find_spec\n"
    program += "u.find_spec = lambda name, *a: None if name == 'atheris' else find(name, *a)\n"
    program += "runpy.run_module('tests.fuzz', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program, "--runs", "90"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "atheris is not here" in done.stdout
    assert "90 inputs, nothing found" in done.stdout


def test_time_that_passes_in_an_input_is_past_for_the_next_one() -> None:
    """The broker's clock never goes back, and what was to be done by then would be long after."""
    made = dict(seeds.seeds())
    again = made["turned-away-often"]
    target = Target()
    try:
        for an_hour in (list(made["time"].steps), []):
            target.play(steps.Input(0, [*an_hour, *again.steps]))
    finally:
        target.close()


# --- that it can fail ------------------------------------------------------------------------


def test_an_exception_in_the_broker_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from fdbroker.ipc.server.handlers import Handlers

    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(Handlers, "_count", fail)
    found_by_seed("seqs", "planted")


def test_a_descriptor_that_is_not_closed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from fdbroker.ipc.server.jobs import Discard

    kept: list[int] = []
    monkeypatch.setattr(Discard, "run", lambda self: kept.extend(self._fds))
    try:
        found_by_seed("stats-descriptors-1", "descriptors: ")
    finally:
        for number in kept:
            os.close(number)


def test_a_loan_that_is_not_on_the_ledger_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from fdbroker.lender import ledger
    from fdbroker.lender.lender import Lender

    borrow = Lender.borrow

    def forget(self: Lender, session, *arguments):
        granted = borrow(self, session, *arguments)
        session.record[ledger.SINCE] += 1
        return granted

    monkeypatch.setattr(Lender, "borrow", forget)
    found_by_seed("turns", "ledger and memory")


def found_by_seed(name: str, what: str) -> None:
    target = Target()
    try:
        with pytest.raises(Found, match=what):
            target.play(dict(seeds.seeds())[name])
    finally:
        target.close()
