"""A broker that has no descriptor left: it waits without spinning, says so, and recovers.

Its limit is made low by the process that starts it; what uses it up is sessions, or entries.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import time

import pytest
from support import connect_to, open_files, wait_until

import fdbroker
from fdbroker.errors import TooManyFiles
from fdbroker.ipc.protocol.codec import encode
from fdbroker.ipc.protocol.messages import HELLO, VERSION

from .puppet import Process, Puppet

LIMIT = 40  # descriptors of the broker, of which it needs about 13 itself
SOON = 2.0


@pytest.fixture
def small():
    """A client of a broker with few descriptors, and its process in `small.process`."""
    with Puppet() as owner:
        owner.do(f"""
            import resource
            resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, {LIMIT}))
            broker = fdbroker.Broker()
        """)
        with (
            fdbroker.Client(owner.do("broker.address")) as client,
            Process(owner.do("broker.pid")) as client.process,
            open(os.devnull) as null,
        ):
            client.put("null", null)
            client.loans()
            before = sorted(open_files(client.process.pid).values())
            yield client
            # in one look: a connection that was queued may still come, and go
            wait_until(lambda: sorted(open_files(client.process.pid).values()) == before, SOON)
            assert client.stats()["loans"] == 0
        owner.do("broker.close()")


class Crowd:
    """Connections that say hello and then nothing more, until one gets no answer."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.served = []
        self.queued = []

    def come(self) -> None:
        """One more."""
        sock = connect_to(self.address)
        sock.send(encode([HELLO, 0, VERSION]))
        (self.served if is_answered(sock, 0.3) else self.queued).append(sock)

    def leave(self, number: int) -> None:
        for _ in range(number):
            self.served.pop().close()

    def __enter__(self) -> Crowd:
        while not self.queued:
            self.come()
            assert len(self.served) < LIMIT
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self.served + self.queued:
            sock.close()


def is_answered(sock, seconds: float = 0.0) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def busy(process: Process, seconds: float = 0.5) -> float:
    """The share of that time in which the process had a CPU."""
    before, since = process.cpu_seconds(), time.monotonic()
    time.sleep(seconds)
    return (process.cpu_seconds() - before) / (time.monotonic() - since)


def test_a_full_table_does_not_spin_and_the_queue_is_served_when_others_leave(small):
    with Crowd(small.address) as crowd:
        for _ in range(4):
            crowd.come()
        assert len(crowd.queued) == 5
        share = busy(small.process)
        print(f"\n{len(crowd.served)} sessions, 5 wait: the broker uses {share:.0%} of a CPU")
        assert share < 0.1
        small.borrow("null").close()  # who is in goes on
        crowd.leave(2)
        wait_until(lambda: sum(map(is_answered, crowd.queued)) == 2, SOON)
        assert busy(small.process) < 0.1
        crowd.leave(5)
        wait_until(lambda: all(map(is_answered, crowd.queued)), SOON)
        small.borrow("null").close()


def test_who_gives_up_in_the_queue_is_in_nobodys_way(small):
    with Crowd(small.address) as crowd:
        for _ in range(20):
            connect_to(small.address).close()
        crowd.come()
        crowd.leave(3)
        wait_until(lambda: all(map(is_answered, crowd.queued)), SOON)


def test_when_entries_use_it_up_a_retirement_makes_room(small):
    names = []
    with contextlib.ExitStack() as stack:
        memory = os.memfd_create("m")
        stack.callback(os.close, memory)
        with contextlib.suppress(TooManyFiles):
            for number in range(LIMIT):
                small.put(f"m{number}", memory)
                names.append(f"m{number}")
        assert 20 < len(names) < LIMIT
        crowd = stack.enter_context(Crowd(small.address))
        small.retire(names.pop())
        wait_until(lambda: all(map(is_answered, crowd.queued)), SOON)
        for name in names:
            small.retire(name, wait=True)


def test_a_put_at_the_limit_is_refused_and_leaks_nothing(small):
    with Crowd(small.address) as crowd, open(os.devnull) as null:
        full = open_files(small.process.pid)
        for _ in range(50):
            with pytest.raises(TooManyFiles) as caught:
                small.put("x", null)
            assert (caught.value.side, caught.value.limit) == ("broker", LIMIT)
        wait_until(lambda: open_files(small.process.pid) == full, SOON)
        assert [entry.name for entry in small.entries()] == ["null"]
        crowd.leave(3)
        wait_until(lambda: len(open_files(small.process.pid)) == len(full) - 2, SOON)  # one came in
        small.put("x", null)
        small.retire("x", wait=True)


def test_a_read_only_loan_at_the_limit_is_refused_and_leaks_nothing(small, data_file):
    small.put("data", data_file)
    with Crowd(small.address) as crowd:
        full = open_files(small.process.pid)
        for _ in range(50):
            with pytest.raises(TooManyFiles) as caught:
                small.borrow("data", mode="r")
            assert caught.value.side == "broker"
        assert small.loans() == []
        assert open_files(small.process.pid) == full
        with small.borrow("data") as loan:  # which needs none of the broker's
            assert os.pread(loan.fileno(), 2, 0) == b"\0\1"
        crowd.leave(3)
        wait_until(lambda: len(open_files(small.process.pid)) == len(full) - 2, SOON)  # one came in
        with small.borrow("data", mode="r") as loan:
            assert os.read(loan.fileno(), 2) == b"\0\1"
    small.retire("data", wait=True)


def test_questions_at_the_limit_are_answered(small):
    """Whatever else needs a descriptor in the broker must not be its end."""
    with Crowd(small.address):
        assert small.stats()["entries"] == 1
        assert [entry.name for entry in small.entries()] == ["null"]
        assert small.loans() == []
        with pytest.raises(LookupError):
            small.retire("nul")


def test_it_drains_at_the_limit(small):
    """Its end needs no descriptor either.  The fixture's own checks come too late for it."""
    with Puppet() as owner:
        owner.do(f"""
            import resource
            resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, {LIMIT}))
            broker = fdbroker.Broker()
        """)
        with Process(owner.do("broker.pid")) as process:
            with Crowd(owner.do("broker.address")):
                owner.do("broker.close()")
            assert process.gone()


def test_a_borrower_at_its_own_limit_is_told_so_and_nothing_stays_on_loan(broker):
    with Puppet() as borrower, open(os.devnull) as null:
        broker.put("null", null)
        resource.prlimit(borrower.pid, resource.RLIMIT_NOFILE, (30, 30))
        borrower.do(f"""
            client = fdbroker.Client({broker.address!r})
            client.borrow("null").close()
            full = []
            try:
                while True:
                    full.append(os.dup(0))
            except OSError:
                pass
        """)
        for _ in range(3):
            with pytest.raises(TooManyFiles) as caught:
                borrower.do("client.borrow('null')")
            assert (caught.value.side, caught.value.limit) == ("client", 30)
            wait_until(lambda: broker.stats()["loans"] == 0)
        borrower.do("os.close(full.pop()); os.close(full.pop())")
        borrower.do("client.borrow('null').close()")


def test_a_shortage_that_ends_unseen_is_seen():
    """ENFILE is of the whole system, and a limit can be raised: nothing tells the broker."""
    with fdbroker.Broker() as broker:
        broker.stats()
        soft, hard = resource.prlimit(broker.pid, resource.RLIMIT_NOFILE)
        lowest_free = min(set(range(soft)) - set(open_files(broker.pid)))
        resource.prlimit(broker.pid, resource.RLIMIT_NOFILE, (lowest_free, hard))
        with contextlib.closing(connect_to(broker.address)) as sock:
            sock.send(encode([HELLO, 0, VERSION]))
            assert not is_answered(sock, 0.3)
            resource.prlimit(broker.pid, resource.RLIMIT_NOFILE, (soft, hard))
            assert is_answered(sock, 3 * SOON)
