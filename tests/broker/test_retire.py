"""Retire: the last reference closes, at once and never before, however it comes back.

The kernel is the witness: a port that can be bound again, a pipe whose reader sees the end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import time

import pytest
from support import wait_until

import fdbroker
from fdbroker.errors import RetireTimeout, UnknownEntry, WouldDeadlock

from .puppet import Puppet

AT_ONCE = 0.5  # seconds
A_WHILE = 0.2  # seconds in which what must not happen would have happened


@pytest.fixture
def borrowers(broker):
    """Five processes with a client of the broker, and a list for their loans."""
    with contextlib.ExitStack() as stack:
        puppets = [stack.enter_context(Puppet()) for _ in range(5)]
        for puppet in puppets:
            puppet.do(f"loans, client = [], fdbroker.Client({broker.address!r})")
        yield puppets
        del puppet, puppets


@pytest.fixture
def retirer(broker):
    """A process that is to wait in retire()."""
    with Puppet() as puppet:
        puppet.do(f"client = fdbroker.Client({broker.address!r})")
        yield puppet


class Pipe:
    """A pipe whose writing end is the entry "pipe", and is nowhere else but on loan."""

    def __init__(self, broker: fdbroker.Broker) -> None:
        self.reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        broker.put("pipe", writer)
        os.close(writer)

    def at_its_end(self) -> bool:
        """Whether the kernel knows of no writer any more."""
        try:
            return os.read(self.reader, 1) == b""
        except BlockingIOError:
            return False

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.reader)


def bind_error(port: int) -> int:
    """What the kernel says to one more who wants the port; 0 is yes."""
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError as error:
            return error.errno
    return 0


def test_with_100_loans_out_the_port_is_free_after_the_last(broker, borrowers, retirer):
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    broker.put("web", listener)
    listener.close()
    for borrower in borrowers:
        borrower.do("for _ in range(20): loans.append(client.borrow('web'))")
    assert broker.stats()["loans"] == 100
    retirer.begin("client.retire('web', wait=True) or time.monotonic()")
    wait_until(lambda: not any(e.name == "web" for e in _live(broker)))
    order = [borrower for borrower in borrowers for _ in range(20)]
    random.Random(100).shuffle(order)
    for borrower in order[:-1]:
        borrower.do("loans.pop().close()")
    assert not retirer.answered(A_WHILE)
    assert [entry.loans for entry in broker.entries()] == [1]
    assert bind_error(port) == errno.EADDRINUSE
    last = order[-1].do("loans.pop().close() or time.monotonic()")
    retired = retirer.result()
    assert bind_error(port) == 0
    print(f"\n{(retired - last) * 1000:.2f} ms from the last return to the end of retire()")
    assert retired - last < AT_ONCE


def test_with_100_loans_out_the_reader_sees_the_end_after_the_last(broker, borrowers, retirer):
    with Pipe(broker) as pipe:
        for number, borrower in enumerate(borrowers):
            how = "client.borrow_all(['pipe'])" if number % 2 else "client.borrow('pipe')"
            borrower.do(f"for _ in range(20): loans.append({how})")
        retirer.begin("client.retire('pipe', wait=True) or time.monotonic()")
        for borrower in borrowers:
            assert not pipe.at_its_end()
            assert not retirer.answered()
            borrower.do("while len(loans) > 1: loans.pop().close()")
        for borrower in borrowers:
            assert not retirer.answered(A_WHILE / 5)
            assert not pipe.at_its_end()
            last = borrower.do("loans.pop().close() or time.monotonic()")
        assert retirer.result() - last < AT_ONCE
        assert pipe.at_its_end()


def _live(broker: fdbroker.Broker) -> list[fdbroker.ipc.client.EntryInfo]:
    """The entries that can be borrowed."""
    found = []
    for entry in broker.entries():
        with contextlib.suppress(UnknownEntry):
            broker.borrow(entry.name).close()
            found.append(entry)
    return found


def test_without_loans_it_is_closed_when_retire_returns(broker):
    with Pipe(broker) as pipe:
        assert not pipe.at_its_end()
        broker.retire("pipe", wait=True)
        assert pipe.at_its_end()


# --- each way back ---


WAYS_BACK = {
    "its return": ("loan = client.borrow('pipe')", "loan.close()"),
    "the end of its block": (
        """
        gate, left = threading.Event(), threading.Event()
        def block():
            with client.borrow('pipe'):
                inside.set()
                gate.wait()
            left.set()
        inside = threading.Event()
        threading.Thread(target=block).start()
        inside.wait()
        """,
        "gate.set(); left.wait()",
    ),
    "the end of the thread that held it": (
        """
        warnings.simplefilter("ignore", ResourceWarning)
        local, gate, inside = threading.local(), threading.Event(), threading.Event()
        def hold():
            local.loan = client.borrow('pipe')
            inside.set()
            gate.wait()
        thread = threading.Thread(target=hold)
        thread.start()
        inside.wait()
        """,
        "gate.set(); thread.join()",
    ),
    "garbage collection": (
        """
        warnings.simplefilter("ignore", ResourceWarning)
        loan = client.borrow('pipe')
        """,
        "del loan",
    ),
    "garbage collection of a cycle": (
        """
        warnings.simplefilter("ignore", ResourceWarning)
        cycle = [client.borrow('pipe')]
        cycle.append(cycle)
        """,
        "del cycle; gc.collect()",
    ),
    "the last mapping": (
        """
        memory = os.memfd_create("m")
        os.truncate(memory, 4096)
        client.put("memory", memory)
        loan = client.borrow_all(['pipe', 'memory'])
        mapping = loan.mmap(name="memory")
        loan.close()
        client.retire("memory")
        """,
        "mapping.close()",
    ),
    "the end of its process": ("loan = client.borrow('pipe')", "os._exit(0)"),
    "the end of its process, detached": ("fd = client.borrow('pipe').detach()", "os._exit(0)"),
    "SIGKILL": ("loan = client.borrow('pipe')", "os.kill(os.getpid(), signal.SIGKILL)"),
    "SIGKILL, exclusive": (
        "loan = client.borrow('pipe', exclusive=True)",
        "os.kill(os.getpid(), signal.SIGKILL)",
    ),
}


@pytest.mark.parametrize("way", WAYS_BACK)
def test_the_close_waits_for(broker, way):
    take, give_back = WAYS_BACK[way]
    with Pipe(broker) as pipe, Puppet(arguments=()) as borrower:
        borrower.do(f"client = fdbroker.Client({broker.address!r})")
        borrower.do(take)
        assert broker.stats()["loans"] == 1
        broker.retire("pipe")
        assert not pipe.at_its_end()
        assert broker.stats()["loans"] == 1
        borrower.begin(give_back)
        wait_until(pipe.at_its_end, 1.0)
        wait_until(lambda: broker.stats()["entries"] == 0, 1.0)


def test_the_close_waits_for_the_last_copy_of_a_forked_loan(broker):
    with Pipe(broker) as pipe, Puppet() as borrower:
        borrower.do(f"client = fdbroker.Client({broker.address!r})")
        borrower.do("loan = client.borrow('pipe')")
        with borrower.fork() as child:
            broker.retire("pipe")
            borrower.do("loan.close()")
            assert not pipe.at_its_end()
            assert broker.stats()["loans"] == 1
            child.do("os.write(loan.fileno(), b'still')")
            assert os.read(pipe.reader, 100) == b"still"
            child.kill()
            wait_until(pipe.at_its_end, 1.0)


# --- its name, its waiting ---


def test_the_name_is_free_at_once_and_the_old_loans_stay(broker, borrowers):
    with Pipe(broker) as old:
        (before,) = broker.entries()
        for borrower in borrowers:
            borrower.do("loans.append(client.borrow('pipe'))")
        broker.retire("pipe")
        with pytest.raises(UnknownEntry):
            broker.borrow("pipe")
        with Pipe(broker) as new:
            generations = {entry.generation: entry.loans for entry in broker.entries()}
            assert generations.pop(before.generation) == 5
            ((generation, loans),) = generations.items()
            assert generation > before.generation
            assert loans == 0
            for number, borrower in enumerate(borrowers):
                borrower.do("loans.append(client.borrow('pipe'))")
                borrower.do(f"os.write(loans[0].fileno(), b'old {number} ')")
                borrower.do(f"os.write(loans[1].fileno(), b'new {number} ')")
            assert os.read(old.reader, 100) == b"old 0 old 1 old 2 old 3 old 4 "
            assert os.read(new.reader, 100) == b"new 0 new 1 new 2 new 3 new 4 "
            for borrower in borrowers:
                assert not old.at_its_end()
                borrower.do("loans.pop(0).close()")
            wait_until(old.at_its_end, 1.0)
            assert not new.at_its_end()
            for borrower in borrowers:
                borrower.do("loans.pop(0).close()")
            assert not new.at_its_end()
            broker.retire("pipe", wait=True)
            assert new.at_its_end()


def test_replace_retires_the_old_one(broker):
    with Pipe(broker) as old:
        loan = broker.borrow("pipe")
        with open(os.devnull) as null:
            broker.put("pipe", null, replace=True)
        assert not old.at_its_end()
        loan.close()
        wait_until(old.at_its_end, 1.0)
        # the worker has closed it, and is about to say so
        wait_until(lambda: [one.kind for one in broker.entries()] == ["character device"])


def test_a_wait_that_times_out_leaves_it_retired(broker, retirer):
    with Pipe(broker) as pipe:
        loan = broker.borrow("pipe")
        with pytest.raises(RetireTimeout) as caught:
            retirer.do("client.retire('pipe', wait=True, timeout=0.1)")
        assert (caught.value.name, caught.value.loans) == ("pipe", 1)
        assert not pipe.at_its_end()
        loan.close()
        wait_until(pipe.at_its_end, 1.0)


def test_who_holds_it_must_not_wait_for_itself(broker):
    with Pipe(broker) as pipe, broker.borrow("pipe"):
        with pytest.raises(WouldDeadlock):
            broker.retire("pipe", wait=True)
        broker.borrow("pipe").close()  # nothing has changed
        assert not pipe.at_its_end()


def test_several_wait_for_the_same_close(broker, retirer):
    """A second one finds no entry of that name; those who waited are all told."""
    with Pipe(broker) as pipe, Puppet() as borrower:
        borrower.do(f"client = fdbroker.Client({broker.address!r})")
        borrower.do("loan = client.borrow('pipe')")
        retirer.begin("client.retire('pipe', wait=True) or time.monotonic()")
        wait_until(lambda: not _live(broker))
        with pytest.raises(UnknownEntry):
            broker.retire("pipe", wait=True)
        borrower.do("loan.close()")
        retirer.result()
        assert pipe.at_its_end()


def test_a_waiter_that_is_killed_leaves_the_retirement(broker, retirer):
    with Pipe(broker) as pipe:
        loan = broker.borrow("pipe")
        retirer.begin("client.retire('pipe', wait=True)")
        wait_until(lambda: not _live(broker))
        retirer.kill()
        assert not pipe.at_its_end()
        loan.close()
        wait_until(pipe.at_its_end, 1.0)


def test_borrowers_race_retirements(broker, borrowers):
    """A name is put and retired all the time: who borrows gets one that is open, or is told."""
    for borrower in borrowers:
        borrower.do("""
            stop, got, refused = threading.Event(), [], []
            def race():
                while not stop.is_set():
                    try:
                        with client.borrow("pipe") as loan:
                            os.write(loan.fileno(), b"x")
                            got.append(1)
                    except LookupError as error:
                        refused.append(type(error).__name__)
            thread = threading.Thread(target=race)
            thread.start()
        """)
    deadline = time.monotonic() + 2
    rounds = 0
    while time.monotonic() < deadline or rounds < 50:
        with Pipe(broker) as pipe:
            wait_until(lambda: _drained(pipe))
            broker.retire("pipe", wait=True)
            while _drained(pipe):
                pass
            assert pipe.at_its_end()
        rounds += 1
    for borrower in borrowers:
        borrower.do("stop.set(); thread.join()")
        assert set(borrower.do("refused")) <= {"UnknownEntry"}
        assert borrower.do("len(got)") > 0


def _drained(pipe: Pipe) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return os.read(pipe.reader, 65536)
    return b""
