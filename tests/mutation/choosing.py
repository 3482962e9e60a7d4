"""Which tests run which line, so that a mutant meets only its own tests.

`Recorder` is a pytest plugin for one run of all tests.  It traces by itself, for coverage.py takes
a lock at the first line of a file: an FD's finalizer that runs there waits for itself.  Some tests
do not show all their lines: those that trace, too, and those that fail because they are traced
(an interrupt comes where none could) count for every line of each file they touch; those that
touch none of the files, perhaps because another process does it, count for every line of all.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

Found = dict[str, Any]


class Recorder:
    """Records {"lines": {file: {line: [test, ...]}}, "silent": [test, ...]}."""

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self.files = {str(folder.resolve() / file): file for file in files}
        self.now = ""  # the test that is run; "" while tests are collected
        self.ran: dict[str, set[tuple[str, int]]] = defaultdict(set)
        self.partly: set[str] = set()
        self.settrace = sys.settrace
        sys.settrace(self.trace)

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        file = self.files.get(frame.f_code.co_filename)
        if file is None:
            return None
        ran = self.ran[self.now]

        def line(frame: FrameType, event: str, arg: object) -> Any:
            ran.add((file, frame.f_lineno))
            return line

        return line(frame, event, arg)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        def settrace(function: Any) -> None:
            self.partly.add(item.nodeid)
            self.settrace(function)

        self.now = item.nodeid
        threading.settrace(self.trace)
        self.settrace(self.trace)
        sys.settrace = settrace
        try:
            return (yield)
        finally:
            sys.settrace = self.settrace
            threading.settrace(None)  # type: ignore[arg-type]
            sys.settrace(None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran[report.nodeid] |= set()
        if report.failed:
            self.partly.add(report.nodeid)

    def found(self) -> Found:
        lines: dict[str, dict[str, list[str]]] = {}
        at_import = self.ran.pop("", set())
        for file in self.files.values():
            touching = {test for test, ran in self.ran.items() if any(file == at for at, _ in ran)}
            everywhere = touching & self.partly
            by_line = {line: set(touching) for at, line in at_import if at == file}
            for test, ran in self.ran.items():
                for at, line in ran:
                    if at == file:
                        by_line.setdefault(line, set(everywhere)).add(test)
            lines[file] = {str(line): sorted(by_line[line]) for line in sorted(by_line)}
            lines[file]["partly"] = sorted(everywhere)
        return {"lines": lines, "silent": sorted(test for test, ran in self.ran.items() if not ran)}


def tests_of(found: Found, file: str, lines: range) -> list[str]:
    """The tests for a mutant of these lines, the fastest first; empty if none runs any of them."""
    by_line, seconds = found["lines"][file], found["seconds"]
    run = {test for line in lines for test in by_line.get(str(line), ())}
    run |= {*by_line["partly"], *found["silent"]} if run else set(by_line["partly"])
    return sorted(run, key=lambda test: (round(seconds[test], 2), test))


class Stopwatch:
    """A pytest plugin: how long each test takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
