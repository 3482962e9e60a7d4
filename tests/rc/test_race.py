"""Every small step of several threads against every other, and whether this test would notice."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fdbroker.rc
from fdbroker.errors import (
    ClosedFDError,
    MultipleInitError,
    ReferencedFDError,
    UninitializedFDError,
)

from . import kit
from .scheduler import Scheduler


class Round:
    """One pipe, a few threads that use and retire the FD of its write end, in the seed's order."""

    def __init__(self, rc: ModuleType, seed: int) -> None:
        whole = ("load", "store") if isinstance(rc.FD._sysfd, property) else ()
        assert rc.__file__ is not None
        self.scheduler = Scheduler(seed, rc.__file__, whole)
        self.random = self.scheduler.random
        self.rc: Any = rc
        self.closes: list[int] = []
        self.told: list[OSError | None] = []
        self.retired = 0
        self.wrong: list[str] = []

    def close(self, sysfd: int) -> None:
        self.closes.append(sysfd)
        os.close(sysfd)

    def use(self) -> None:
        for _ in range(self.random.randint(1, 2)):
            try:
                sysfd = self.fd.incref()
            except ClosedFDError:
                continue
            if self.fd.closed:
                self.wrong.append("a reference to a closed FD")
            if self.random.random() < 0.3:
                self.scheduler.pause()
            if not kit.is_open(sysfd):
                self.wrong.append("closed while a reference was out")
            self.fd.decref()

    def use_in_a_block(self) -> None:
        try:
            with self.fd.use() as sysfd:
                if not kit.is_open(sysfd):
                    self.wrong.append("closed within use()")
        except ClosedFDError:
            pass

    def retire(self) -> None:
        try:
            self.fd.retire(self.told.append)
        except ClosedFDError:
            return
        self.retired += 1

    def close_and_wait(self) -> None:
        try:
            self.fd.close()
        except ClosedFDError:
            return
        self.retired += 1
        self.told.append(None)
        if not self.closes:
            self.wrong.append("close() came back before the close")

    def wait(self) -> None:
        self.fd.wait_closed()
        if not self.closes:
            self.wrong.append("wait_closed() came back before the close")

    def run(self) -> list[str]:
        """What went wrong."""
        wrong = self.wrong
        bodies = self.random.choice(SCENES)(self)
        with kit.Pipe() as pipe:
            self.rc.close_func = self.close
            self.fd = self.rc.FD(pipe.write)
            self.scheduler.run(*bodies)
            self.rc.close_func = os.close
            if self.scheduler.steps < 50:
                wrong.append(f"only {self.scheduler.steps} opcodes were seen")
            wrong += [repr(error) for error in self.scheduler.errors]
            if len(self.closes) != 1:
                wrong.append(f"closed {len(self.closes)} times")
            if not pipe.ended():
                wrong.append("the pipe did not end")
            if self.retired != 1:
                wrong.append(f"retired {self.retired} times")
            if self.told != [None]:
                wrong.append(f"on_closed was told {self.told}")
            if self.fd.refs:
                wrong.append(f"{self.fd.refs} references at the end")
            if not self.fd.closed:
                wrong.append("never closed")
                os.close(pipe.write)
                self.fd._sysfd = self.rc._CLOSED
        return wrong


# Small scenes, in which one stall decides, and a large one.
SCENES = (
    lambda on: [on.use, on.retire],
    lambda on: [on.use, on.use, on.retire],
    lambda on: [on.wait, on.wait, on.wait, on.retire],
    lambda on: [on.use_in_a_block, on.close_and_wait, on.retire],
    lambda on: [on.use, on.use, on.use_in_a_block, on.retire, on.close_and_wait, on.wait],
)


def survives(rc: ModuleType, seeds: range) -> None:
    for seed in seeds:
        wrong = Round(rc, seed).run()
        assert not wrong, f"seed {seed}: {wrong}"


def test_rounds() -> None:
    survives(fdbroker.rc, range(400))


def test_rounds_under_the_lock() -> None:
    survives(kit.guarded(), range(100))


@pytest.mark.long
def test_many_rounds() -> None:
    survives(fdbroker.rc, range(10_000))


class Detaching:
    """A few threads, one of which wants the number; another uses, retires or tracks the FD."""

    def __init__(self, rc: ModuleType, seed: int) -> None:
        assert rc.__file__ is not None
        self.scheduler = Scheduler(seed, rc.__file__, ())
        self.rc: Any = rc
        self.closes: list[int] = []
        self.detached: list[int] = []
        self.retired = 0
        self.wrong: list[str] = []
        self.registry = self.rc.LifetimeRegistry()
        self.fd = self.rc.FD(7, self.closes.append)

    def use(self) -> None:
        try:
            with self.fd.use():
                self.scheduler.pause()
                if self.detached:
                    self.wrong.append("given away while a reference was out")
        except ClosedFDError:
            pass

    def detach(self) -> None:
        with contextlib.suppress(ClosedFDError, ReferencedFDError):
            self.detached.append(self.fd.detach())

    def retire(self) -> None:
        try:
            self.fd.retire()
        except ClosedFDError:
            return
        self.retired += 1

    def track(self) -> None:
        self.fd.track_lifetime(self.registry)

    def wait(self) -> None:
        self.fd.wait_closed()
        if not self.fd.closed:
            self.wrong.append("wait_closed() came back before the detach")

    def run(self) -> list[str]:
        self.scheduler.run(*self.scheduler.random.choice(DETACHING)(self))
        wrong = self.wrong + [repr(error) for error in self.scheduler.errors]
        if len(self.closes) != self.retired or self.retired + len(self.detached) > 1:
            wrong.append(f"detached {self.detached}, retired {self.retired}, closed {self.closes}")
        if not self.retired and not self.detached:
            self.fd.close()  # whoever failed has left it as it was
            if self.closes != [7]:
                wrong.append(f"{self.closes} were closed")
        stats = self.registry.stats()
        if stats.initialized != stats.closed:
            wrong.append(f"{stats.initialized} were tracked, {stats.closed} of them closed")
        return wrong


DETACHING = (
    lambda on: [on.use, on.detach],
    lambda on: [on.use, on.use, on.detach],
    lambda on: [on.detach, on.retire],
    lambda on: [on.track, on.retire],
    lambda on: [on.track, on.detach],
    lambda on: [on.wait, on.detach],
)


@pytest.mark.parametrize(
    "seeds", [range(900), pytest.param(range(900, 12_000), marks=pytest.mark.long)]
)
def test_rounds_of_detach_and_track(seeds: range) -> None:
    for seed in seeds:
        wrong = Detaching(fdbroker.rc, seed).run()
        assert not wrong, f"seed {seed}: {wrong}"


class Beginning:
    """Two threads, one of which inits the FD; `other` is what the second one calls."""

    def __init__(self, seed: int, other: str, *arguments: Any) -> None:
        self.fd = fdbroker.rc.FD()
        self.closed: list[int] = []
        self.refused: list[Exception] = []
        scheduler = Scheduler(seed, fdbroker.rc.__file__, ())
        scheduler.run(
            lambda: self.call("init", 7, self.closed.append),
            lambda: self.call(other, *arguments),
        )
        assert not scheduler.errors

    def call(self, name: str, *arguments: Any) -> None:
        try:
            getattr(self.fd, name)(*arguments)
        except fdbroker.errors.FDBrokerError as error:
            self.refused.append(error)


def test_of_two_that_init_one_adopts_and_the_other_is_told_so() -> None:
    for seed in range(100):
        closed: list[int] = []
        begun = Beginning(seed, "init", 8, closed.append)
        begun.fd.close()
        (refusal,) = begun.refused
        assert isinstance(refusal, MultipleInitError), f"seed {seed}"
        assert sorted([refusal.sysfd, *closed, *begun.closed]) == [7, 8]


@pytest.mark.parametrize("verb", ["incref", "detach", "retire"])
def test_who_comes_before_the_init_is_told_so(verb: str) -> None:
    """And not that the FD is closed."""
    early = 0
    for seed in range(100):
        begun = Beginning(seed, verb)
        assert all(isinstance(error, UninitializedFDError) for error in begun.refused), (
            f"seed {seed}: {begun.refused}"
        )
        early += len(begun.refused)
        if begun.fd.refs:
            begun.fd.decref()
        if not begun.fd.closed:
            begun.fd.close()
    assert 10 < early < 90


def test_the_same_seed_is_the_same_round() -> None:
    def choices(seed: int) -> object:
        done = Round(fdbroker.rc, seed)
        assert not done.run()
        return done.random.getstate()

    assert choices(5) == choices(5)
    assert choices(5) != choices(6)


RARE = "lost_wake_up", "looks_before_it_returns"  # which takes many rounds to be seen


@pytest.mark.parametrize(
    "patch",
    [
        pytest.param(patch, marks=pytest.mark.long if patch.stem in RARE else (), id=patch.stem)
        for patch in kit.MUTANTS
    ],
)
def test_a_mistake_is_caught(patch: Path, tmp_path: Path) -> None:
    rc = kit.mutant(patch, tmp_path)
    caught = sum(
        any(Round(rc, seed * 1000 + number).run() for number in range(400)) for seed in range(20)
    )
    assert caught >= 19


def test_there_are_mistakes_to_catch() -> None:
    assert len(kit.MUTANTS) >= 6
