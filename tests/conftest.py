"""Every test is checked for what it leaves behind: descriptors and child processes."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import support

import fdbroker


def pytest_configure() -> None:
    """Ctrl-C works, also where a shell started us in the background, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Each test collects garbage: not once more through all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def what_is_there_stays() -> None:
    """The same for what earlier modules have left to pytest and hypothesis."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """No descriptor and no child process more or less than before."""
    if "broker" in request.fixturenames:  # it stays for the tests to come
        request.getfixturevalue("shared_broker").get()
    gc.collect()
    files, children = support.open_files(), support.children()
    yield
    gc.collect()
    files_now, children_now = support.open_files(), support.children()
    assert _own(files_now) == _own(files)
    assert children_now - children == set()


def _own(files: dict[int, str]) -> dict[int, str]:
    """All but what hypothesis opens for good: the folder of examples, its own source files."""
    return {number: link for number, link in files.items() if "/.hypothesis" not in link}


class SharedBroker:
    """One broker process for all tests, each of which must leave it as it was."""

    def __init__(self) -> None:
        self._file: IO[str] | None = None
        self._broker: fdbroker.Broker | None = None
        self._targets: Counter[str] = Counter()

    def get(self) -> fdbroker.Broker:
        """The broker, started anew if a test has ended it."""
        if self._broker is None:
            self._file = tempfile.TemporaryFile("w+")  # noqa: SIM115 - until close
            with stderr_to(self._file):
                self._broker = fdbroker.Broker(drain=1.0)
            self._broker.stats()
            let_go(self._broker)
            self._targets = Counter()
        return self._broker

    def check(self) -> None:
        """Nothing is lent, waited for or kept any more, and it has complained of nothing."""
        assert self._broker is not None
        assert self._file is not None
        broker = self._broker
        try:
            self._file.seek(0)
            said = self._file.read()
            assert "Traceback" not in said, said
            assert os.path.exists(f"/proc/{broker.pid}/fd/0"), "the broker has ended"
            assert "event=job-failed" not in said, said
            for entry in broker.entries():
                with contextlib.suppress(fdbroker.errors.UnknownEntry):
                    broker.retire(entry.name)
            let_go(broker)
            support.wait_until(lambda: self._is_as_before(broker))
        except BaseException:
            self.close()
            raise
        finally:
            let_go(broker)

    def _is_as_before(self, broker: fdbroker.Broker) -> bool:
        stats = broker.stats()
        names = ("loans", "waiting", "entries", "jobs")
        self.last = stats
        if any(stats[name] for name in names) or stats["sessions"] != 1:
            return False
        now = support.targets(broker.pid)
        self._targets = self._targets or now
        return now == self._targets

    def close(self) -> None:
        if self._broker is not None:
            let_go(self._broker)
            self._broker.close()
            self._broker = None
        if self._file is not None:
            self._file.close()
            self._file = None


@contextlib.contextmanager
def stderr_to(file: IO[str]) -> Iterator[None]:
    """What is started in the block writes its errors into `file`."""
    sys.stderr.flush()
    before = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def let_go(broker: fdbroker.Broker) -> None:
    """End what a process keeps for its brokers until it ends: idle sessions, owners."""
    from fdbroker.ipc.client import client, connection, pool

    gc.collect()
    for other in [broker, *client._clients.values()]:
        for sessions in (other._pool.idle, other._pool.put_sessions):
            while sessions:
                sessions.pop().end()
    client._clients.clear()
    pool._orphans.clear()
    while connection.kept_until_exit:
        connection.kept_until_exit.pop().end()


@pytest.fixture(scope="session")
def shared_broker() -> Iterator[SharedBroker]:
    shared = SharedBroker()
    yield shared
    shared.close()


@pytest.fixture
def broker(shared_broker: SharedBroker) -> Iterator[fdbroker.Broker]:
    """A broker in another process, which after the test is as it was before."""
    yield shared_broker.get()
    shared_broker.check()


@pytest.fixture
def peer() -> Iterator[support.Peer]:
    """Another process."""
    with support.Peer() as other:
        yield other


@pytest.fixture
def data_file(tmp_path: Path) -> Iterator[IO[bytes]]:
    """A file of 100 known bytes, open for reading and writing."""
    path = tmp_path / "data"
    path.write_bytes(bytes(range(100)))
    with open(path, "r+b") as file:
        yield file
