"""The broker's threads: there from its start, and whatever a job does, the loop goes on.

What never goes wrong by itself is planted into the broker before it serves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import BORROW, CANCEL, PUT, STATS, Raw, open_files, stopped, targets, wait_until

import fdbroker
from fdbroker.errors import BrokerGone, CloseFailed, RetireTimeout
from fdbroker.ipc.protocol.messages import EPHEMERAL, READONLY
from fdbroker.ipc.server.jobs import Discard
from fdbroker.ipc.server.tuning import TUNING
from fdbroker.ipc.server.worker_pool import Job, WorkQueue
from fdbroker.lender.accounting import Account

from .planted import broker_with
from .puppet import Puppet

SOON = 5.0


def complaints(folder: Path) -> int:
    """How often the broker there has said that what was planted failed."""
    return (folder / "stderr").read_text().count("\nValueError: planted\n")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_thread_that_cannot_start_is_an_error_at_the_start(tmp_path, threads):
    """Of the log or of the workers.  RLIMIT_NPROC counts a uid's threads, but root's not
    (setrlimit(2)): as root another uid is taken, which has no process yet."""
    with open(tmp_path / "stderr", "wb") as said, Puppet(stderr=said) as server:
        server.do(f"""
            import argparse, resource
            from fdbroker import cli
            from fdbroker.cli import options, serve  # which the other uid may not be able to read
            from fdbroker.daemon import log, serve
            os.mkdir({str(tmp_path / "folder")!r})
            os.chdir({str(tmp_path / "folder")!r})
            ready, told = os.pipe()
            if os.geteuid() == 0:
                os.chown(".", 65533, 65533)
                os.setgroups([])
                os.setgid(65533)
                os.setuid(65533)
            resource.setrlimit(resource.RLIMIT_NPROC, ({threads}, {threads}))
        """)
        assert server.do("cli.main(['serve', '--socket', 'socket', '--ready-fd', str(told)])") == 1
        assert server.do("(os.close(told), os.read(ready, 1))") == (None, b"")
        assert server.do("threading.active_count()") == 1
    assert not (tmp_path / "folder" / "socket").exists()
    lines = (tmp_path / "stderr").read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("fdbroker: ")
    assert "RLIMIT_NPROC" in lines[0]


HANG = """
    from fdbroker import descriptors
    def hang_in(name):
        function = getattr(descriptors, name)
        def hang(fd):
            if os.readlink(f"/proc/self/fd/{{fd}}").startswith("/memfd:stuck"):
                open(folder + "/go").close()  # a fifo, so it waits until the test opens it, too
            return function(fd)
        setattr(descriptors, name, hang)
    hang_in("{}")
"""


@pytest.fixture
def stuck():
    memory = os.memfd_create("stuck")
    yield memory
    os.close(memory)


@contextlib.contextmanager
def as_many_as_threads(client: fdbroker.Client, work: Callable[[int], Any], folder: Path):
    """So many jobs of a kind that hangs, while the block runs."""
    with ThreadPoolExecutor(TUNING.threads) as pool:
        doing = [pool.submit(work, number) for number in range(TUNING.threads)]
        wait_until(lambda: client.stats()["jobs"] == TUNING.threads)
        try:
            yield
        finally:
            with open(folder / "go", "w"):
                wait_until(lambda: client.stats()["jobs"] == 0)
            for one in doing:
                one.result()


def test_while_looking_hangs_closing_goes_on(tmp_path, stuck, data_file):
    os.mkfifo(tmp_path / "go")
    with broker_with(tmp_path, HANG.format("inspect")) as (client, _):
        client.put("data", data_file)
        with as_many_as_threads(client, lambda n: client.put(f"stuck-{n}", stuck), tmp_path):
            client.retire("data", wait=True, timeout=SOON)


def test_close_that_hangs_is_charged_to_who_put_the_entry(tmp_path, stuck):
    os.mkfifo(tmp_path / "go")
    with broker_with(tmp_path, HANG.format("switch_linger_off")) as (client, _):
        client.put("stuck", stuck)
        client.retire("stuck")
        wait_until(lambda: client.stats()["jobs"] == 1)
        [usage] = client.usage()
        assert (usage.used["entries"], usage.used["closes"]) == (1, 1)
        with open(tmp_path / "go", "w"):
            wait_until(lambda: client.stats()["jobs"] == 0)
        [usage] = client.usage()
        assert (usage.used["entries"], usage.used["closes"]) == (0, 0)


def test_while_looking_hangs_messages_are_received(tmp_path, stuck, data_file):
    """Those of every session that does not put."""
    os.mkfifo(tmp_path / "go")
    with broker_with(tmp_path, HANG.format("inspect")) as (client, _):
        client.put("data", data_file)
        hanging = as_many_as_threads(client, lambda n: client.put(f"stuck-{n}", stuck), tmp_path)
        with hanging, Raw(client.address, puts=False) as raw:
            raw.sock.settimeout(SOON)
            os.close(raw.borrow(1, "data"))


def test_while_opening_hangs_closing_goes_on(tmp_path, stuck, data_file):
    os.mkfifo(tmp_path / "go")
    with broker_with(tmp_path, HANG.format("reopen_read_only")) as (client, _):
        client.put("data", data_file)
        client.put("stuck", stuck)

        def borrow(_: int) -> None:
            client.borrow("stuck", mode="r").close()

        with as_many_as_threads(client, borrow, tmp_path):
            client.retire("data", wait=True, timeout=SOON)


def test_while_closing_hangs_looking_and_opening_go_on(tmp_path, stuck, data_file):
    os.mkfifo(tmp_path / "go")
    with broker_with(tmp_path, HANG.format("switch_linger_off")) as (client, _):
        for number in range(TUNING.threads):
            client.put(f"stuck-{number}", stuck)
        with as_many_as_threads(client, lambda n: client.retire(f"stuck-{n}"), tmp_path):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(client.put, "data", data_file).result(SOON)
                loan = pool.submit(client.borrow, "data", mode="r").result(SOON)
            with loan:
                assert os.read(loan.fileno(), 2) == b"\0\1"


@pytest.mark.parametrize("cancels", [False, True])
def test_who_dies_while_its_put_hangs_has_returned_its_loan(tmp_path, stuck, data_file, cancels):
    """What it made for itself is gone, too.  Of the put nothing comes, and nothing is left."""
    os.mkfifo(tmp_path / "go")
    with broker_with(tmp_path, HANG.format("inspect")) as (client, server):
        client.put("web", data_file)
        before = targets(server.pid)
        with Raw(client.address) as raw:
            raw.send(PUT, 1, "own", EPHEMERAL, fds=[data_file.fileno()])
            raw.receive()
            os.close(raw.borrow(2, "web"))
            raw.send(PUT, 3, "late", 0, fds=[stuck])
            if cancels:
                raw.send(CANCEL, 4)
            wait_until(lambda: client.stats()["jobs"] == 1)
            assert [loan.entry for loan in client.loans()] == ["web"]
        client.borrow("web", exclusive=True, timeout=SOON).close()
        assert client.loans() == []
        wait_until(lambda: client.stats()["jobs"] == 1)
        assert [entry.name for entry in client.entries()] == ["web"]
        with open(tmp_path / "go", "w"):
            wait_until(lambda: client.stats()["jobs"] == 0)
        assert [entry.name for entry in client.entries()] == ["web"]
        wait_until(lambda: targets(server.pid) == before)


def test_who_dies_while_its_file_is_opened_anew_has_returned_its_loan(tmp_path, stuck):
    """Only the close waits: the thread must not find another file under that number."""
    os.mkfifo(tmp_path / "go")
    with broker_with(tmp_path, HANG.format("reopen_read_only")) as (client, server):
        client.put("stuck", stuck)
        with Raw(client.address, puts=False) as raw:
            raw.send(BORROW, 1, "stuck", READONLY, None, "")
            wait_until(lambda: client.stats()["jobs"] == 1)
            assert [loan.entry for loan in client.loans()] == ["stuck"]
        client.borrow("stuck", exclusive=True, timeout=SOON).close()
        assert client.loans() == []
        with pytest.raises(RetireTimeout):
            client.retire("stuck", wait=True, timeout=0)
        assert targets(server.pid)["/memfd:stuck (deleted)"] == 1
        with open(tmp_path / "go", "w"):
            wait_until(lambda: client.stats()["jobs"] == client.stats()["entries"] == 0)
        assert "/memfd:stuck (deleted)" not in targets(server.pid)


FAIL = """
    from fdbroker import descriptors
    def fail(fd):
        raise ValueError("planted")
    descriptors.{} = fail
"""


def test_a_put_that_fails_in_a_thread_ends_its_session(tmp_path, data_file):
    with broker_with(tmp_path, FAIL.format("inspect")) as (client, server):
        before = targets(server.pid)
        for _ in range(3):
            with pytest.raises(BrokerGone):
                client.put("data", data_file)
        wait_until(lambda: client.stats()["jobs"] == 0)
        assert client.entries() == []
        wait_until(lambda: targets(server.pid) == before)
    assert complaints(tmp_path) == 3


def test_a_read_only_borrow_that_fails_in_a_thread_ends_its_session(tmp_path, data_file):
    with broker_with(tmp_path, FAIL.format("reopen_read_only")) as (client, _):
        client.put("data", data_file)
        for _ in range(3):
            with pytest.raises(BrokerGone):
                client.borrow("data", mode="r")
        client.borrow("data", exclusive=True, timeout=SOON).close()  # nothing stayed on loan
    assert complaints(tmp_path) == 3


def test_an_answer_that_fails_ends_its_session(tmp_path, data_file):
    plant = """
        from fdbroker.lender import Lender
        put = Lender.put
        def fail(self, session, seq, name, *rest, **how):
            if name == "bad":
                raise ValueError("planted")
            return put(self, session, seq, name, *rest, **how)
        Lender.put = fail
    """
    with broker_with(tmp_path, plant) as (client, server):
        before = targets(server.pid)
        with pytest.raises(BrokerGone):
            client.put("bad", data_file)
        wait_until(lambda: targets(server.pid) == before)
        client.put("good", data_file)
        assert [entry.name for entry in client.entries()] == ["good"]
    assert complaints(tmp_path) == 1


def test_a_close_that_fails_in_a_thread_is_the_end_of_its_entry(tmp_path, data_file):
    with broker_with(tmp_path, FAIL.format("switch_linger_off")) as (client, _):
        client.put("data", data_file)
        with pytest.raises(CloseFailed, match="planted"):
            client.retire("data", wait=True, timeout=SOON)
        assert client.stats()["entries"] == client.stats()["jobs"] == 0


def test_a_mistake_at_the_end_of_a_job_costs_no_other_job(tmp_path, data_file):
    plant = """
        from fdbroker.lender import Lender
        closed = Lender.closed
        def fail(self, entry, error=None):
            closed(self, entry, error)
            raise ValueError("planted")
        Lender.closed = fail
    """
    with broker_with(tmp_path, plant) as (client, _):
        for number in range(20):
            client.put(f"data-{number}", data_file)
        for number in range(20):
            client.retire(f"data-{number}")
        wait_until(lambda: client.stats()["entries"] == client.stats()["jobs"] == 0)
    assert complaints(tmp_path) == 20


def test_what_is_discarded_is_closed_to_the_last():
    """Also after one whose close reports an error: here somebody else has closed it."""
    before = open_files()
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]
    os.close(fds[1])
    Discard(fds, Account(0)).run()
    assert open_files() == before


def test_while_all_of_clients_hangs_the_brokers_own_goes_on(tmp_path, stuck):
    """What a client has looked at must not hold up a revocation: that has a thread of its own."""
    os.mkfifo(tmp_path / "go")
    (tmp_path / "f.toml").write_text("[entry.a]\nmemfd = 1\n")
    arguments = f", config_path={str(tmp_path / 'f.toml')!r}"
    with (
        broker_with(tmp_path, HANG.format("inspect"), arguments) as (client, server),
        as_many_as_threads(client, lambda n: client.put(f"stuck-{n}", stuck), tmp_path),
    ):
        (tmp_path / "f.toml").write_text("[entry.b]\nmemfd = 1\n")
        server.signal(signal.SIGHUP)
        wait_until(lambda: [entry.name for entry in client.entries()] == ["b"], SOON)


class OfOne(Job):
    """A job that is for one uid."""

    def __init__(self, user: Account | None) -> None:
        self.user = user

    def run(self) -> None:
        """Nothing: the queue does not look into it."""


def started(queue: WorkQueue) -> list[Account | None]:
    """For whom the jobs are that got a thread since the last time."""
    found = []
    while not queue.jobs.empty():
        job = queue.jobs.get()
        assert job is not None
        found.append(job.user)
    return found


def test_one_uid_has_at_most_half_of_the_threads_that_others_left() -> None:
    """And one that has none gets one more, when all are busy."""
    queue = WorkQueue(
        lambda jobs: None, TUNING.most_threads
    )  # threads that end at once: what they were to do stays
    for _ in range(TUNING.threads):
        queue.add_thread()
    alice, bob, carol = (Account(uid) for uid in (1001, 1002, 1003))
    for account in (alice, bob, carol, None):
        for _ in range(2 * TUNING.threads):
            queue.put(OfOne(account))
    assert TUNING.threads == 4
    assert started(queue) == [alice] * 2 + [bob, carol, None]
    assert len(queue.threads) == 5
    # hung for ever are those of Alice and Carol
    served: list[Account | None] = []
    busy: list[Account | None] = [bob, None]
    while busy:
        queue.finished(OfOne(busy.pop(0)))
        new = started(queue)
        served += new
        busy += [account for account in new if account in (bob, None)]
    assert served.count(bob) == 2 * TUNING.threads - 1
    assert served.count(None) == 2 * TUNING.threads - 1
    assert served.count(alice) == 0
    assert served.count(carol) <= 1  # halves are rounded up
    assert len(queue.threads) == 5
    for thread in queue.threads:
        thread.join()


@pytest.mark.parametrize("before", [[], [b"\xc1"]], ids=["unasked", "behind a fault"])
def test_a_drain_does_not_wait_for_what_nobody_asked_for(tmp_path, stuck, before):
    """Its close hangs, but no entry does."""
    os.mkfifo(tmp_path / "go")
    with broker_with(tmp_path, HANG.format("is_socket")) as (client, server):
        with Raw(client.address) as raw, stopped(server.pid):
            for message in before:
                raw.send_bytes(message)
            raw.send(STATS, 1, fds=[stuck])
        wait_until(lambda: client.stats()["jobs"] == 1)
        begun = time.monotonic()
    assert time.monotonic() - begun < SOON


def test_no_queue_begins_with_one_thread() -> None:
    """One user could have all of it."""
    assert TUNING.threads >= 2
