"""Fork is a share: what parent and child have of a loan, and when it ends."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from types import FrameType
from typing import IO

import pytest
import support

import fdbroker
from fdbroker.errors import ForkedLoanError
from fdbroker.ipc.client import fork as hooks


def loans(broker: fdbroker.Client) -> int:
    return broker.stats()["loans"]


class Child:
    """A forked child that lets go of what it has when it is told to."""

    def __init__(self, let_go: Callable[[], object]) -> None:
        self._go_reader, self.go = os.pipe()
        self._wait = support.start_fork(lambda: self._run(let_go))
        os.close(self._go_reader)

    def _run(self, let_go: Callable[[], object]) -> None:
        os.close(self.go)
        os.read(self._go_reader, 1)
        let_go()

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it was told before, and has ended
            os.write(self.go, b"x")  # its siblings may have a copy, so no end-of-file
        os.close(self.go)
        self._wait()


def is_open(number: int) -> bool:
    return number in support.open_files()


def test_parent_first(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file)
    loan = broker.borrow("data")
    child = Child(lambda: (os.pread(loan.fileno(), 1, 0), loan.close()))
    assert os.pread(loan.fileno(), 3, 0) == bytes([0, 1, 2])
    loan.close()
    assert loans(broker) == 1
    child.end()
    support.wait_until(lambda: loans(broker) == 0)


def test_child_first(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file)
    with broker.borrow("data") as loan:
        child = Child(loan.close)
        child.end()
        assert loans(broker) == 1
        assert os.pread(loan.fileno(), 1, 0) == b"\0"
    support.wait_until(lambda: loans(broker) == 0)


def test_a_child_that_just_ends_lets_go(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file)
    loan = broker.borrow("data")
    children = [Child(lambda: None) for _ in range(3)]
    loan.close()
    for child in children:
        assert loans(broker) == 1
        child.end()
    support.wait_until(lambda: loans(broker) == 0)


def test_grandchildren_share_too(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file)
    loan = broker.borrow("data")
    reader, writer = os.pipe()

    def fork_again() -> None:
        if os.fork() == 0:
            os.close(writer)
            os.read(reader, 1)
            os.pread(loan.fileno(), 1, 0)
            os._exit(0)
        loan.close()

    support.in_fork(fork_again)
    loan.close()
    os.close(reader)
    assert loans(broker) == 1
    os.close(writer)
    support.wait_until(lambda: loans(broker) == 0)


@pytest.mark.parametrize("several", [False, True])
def test_an_exclusive_loan_stays_with_the_parent(
    broker: fdbroker.Broker, data_file: IO[bytes], several: bool
) -> None:
    for name in "ab":
        broker.put(name, data_file)
    names = ["a", "b"] if several else ["a"]
    with broker.borrow_all(names, exclusive=True) as loan:
        numbers = [loan.fileno(name) for name in names]

        def in_the_child() -> None:
            for verb in (loan.fileno, loan.open, loan.mmap, loan.detach, loan.pass_fds):
                with pytest.raises(ForkedLoanError):
                    verb()
            assert loan.closed
            assert not any(map(is_open, numbers))
            loan.close()

        support.in_fork(in_the_child)
        assert os.pread(loan.fileno(), 1, 5) == b"\5"
        assert loans(broker) == 1
    assert loans(broker) == 0  # by its own message: it was not split
    with broker.borrow("a", exclusive=True, timeout=0):
        pass


def test_dropped_in_the_child_it_warns_of_nothing(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    found = [broker.borrow("data", exclusive=True)]
    support.in_fork(found.clear)
    found.pop().close()


def test_what_an_exclusive_wrapper_buffered_is_written_once(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    """The child drops its copy of the buffer: the parent's own will be flushed."""
    reader, writer = os.pipe()
    broker.put("pipe", writer)
    os.close(writer)
    with broker.borrow("pipe", exclusive=True) as loan:
        binary, text = loan.open("wb"), loan.open("w")
        binary.write(b"once")
        text.write(",")
        support.in_fork(lambda: None)
    broker.retire("pipe", wait=True)
    assert os.read(reader, 99) == b"once,"
    os.close(reader)


def test_wrappers_of_an_exclusive_loan_end_in_the_child(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    with broker.borrow("data", exclusive=True) as loan:
        file = loan.open("r+b")
        number = file.fileno()
        text = loan.open("r")
        detached = text.detach()  # its end is the user's, and no hindrance for the others
        assert support.in_fork(lambda: is_open(number)) is False
        assert is_open(number)
    detached.close()


def test_loans_of_other_threads_stay_with_the_parent(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    found: list[fdbroker.Loan] = []
    thread = threading.Thread(target=lambda: found.append(broker.borrow("data")))
    thread.start()
    thread.join()
    (loan,) = found
    number = loan.fileno()

    def in_the_child() -> None:
        assert not is_open(number)
        with pytest.raises(ForkedLoanError, match="stayed with the parent"):
            loan.fileno()

    support.in_fork(in_the_child)
    loan.close()
    assert loans(broker) == 0


def test_the_child_starts_with_no_session_and_can_borrow(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    held = [broker.borrow("data") for _ in range(4)]
    for loan in held:
        loan.close()  # four idle sessions now
    sessions = broker.stats()["sessions"]
    assert sessions >= 4
    before = support.targets()["socket"]

    def in_the_child() -> tuple[int, int, int]:
        left = support.targets()["socket"]
        with broker.borrow("data") as loan:
            os.pread(loan.fileno(), 1, 0)
            (found,) = broker.loans()
            return left, found.pid, os.getpid()

    left, pid, child = support.in_fork(in_the_child)
    assert left == before - sessions
    assert pid == child
    assert broker.stats()["sessions"] == sessions


def test_a_mapping_in_use_keeps_the_loan_until_the_child_ends(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    with broker.borrow("data", exclusive=True) as loan:
        view = memoryview(loan.mmap())
        number = loan.fileno()
        assert not support.in_fork(lambda: view[3] != 3 or is_open(number))
        child = Child(lambda: view[3])
    view.release()
    gc.collect()
    assert loans(broker) == 1
    child.end()
    support.wait_until(lambda: loans(broker) == 0)


def test_a_mapping_in_use_ends_the_loan_when_the_child_unmaps(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    reader, writer = os.pipe()
    with broker.borrow("data", exclusive=True) as loan:
        mapping = loan.mmap()
        view = memoryview(mapping)

        def in_the_child() -> None:
            view.release()
            mapping.close()
            os.read(reader, 1)  # goes on without it

        child = Child(in_the_child)
        view.release()
        mapping.close()
    assert loans(broker) == 1
    os.write(child.go, b"x")
    support.wait_until(lambda: loans(broker) == 0)
    os.write(writer, b"x")
    child.end()
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_mapping_of_a_closed_loan_goes_through_a_fork(
    broker: fdbroker.Broker, data_file: IO[bytes], exclusive: bool
) -> None:
    broker.put("data", data_file)
    with broker.borrow("data", exclusive=exclusive) as loan:
        mapping = loan.mmap()
    view = memoryview(mapping)

    def in_the_child() -> None:
        assert view[3] == 3
        view.release()
        mapping.close()
        assert support.targets()["socket"] == sockets - 2  # the loan's, and the one that put

    sockets = support.targets()["socket"]
    support.in_fork(in_the_child)
    assert loans(broker) == 1
    view.release()
    mapping.close()
    support.wait_until(lambda: loans(broker) == 0)


def test_a_mapping_not_in_use_ends_in_the_child(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    with broker.borrow("data", exclusive=True) as loan:
        mapping = loan.mmap()
        child = Child(lambda: None)
        mapping.close()
    support.wait_until(lambda: loans(broker) == 0)
    child.end()


def test_a_shared_mapping_is_shared(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file)
    with broker.borrow("data") as loan:
        mapping = loan.mmap()
        child = Child(lambda: mapping[:3] == bytes([0, 1, 2]) or 1 / 0)
        mapping.close()
    assert loans(broker) == 1
    child.end()
    support.wait_until(lambda: loans(broker) == 0)


# --- many forks, in a process of their own ---------------------------------------------------


def unowned(baseline: dict[int, str], loan: fdbroker.Loan | None) -> dict[int, str]:
    """In a child: the descriptors that neither were there before nor are the loan's."""
    owned = set(baseline) if loan is None or loan.closed else {*baseline, *loan.pass_fds()}
    files = support.open_files().items()
    return {n: link for n, link in files if n not in owned and not link.startswith("pipe:")}


def fork_with_threads(address: str, rounds: int) -> list[dict[int, str]]:
    warnings.simplefilter("ignore", DeprecationWarning)  # of fork with threads, which is meant
    sys.setswitchinterval(1e-6)  # more threads are in the middle of something
    baseline = support.open_files()
    client = fdbroker.Client(address)
    stop = threading.Event()
    problems: list[dict[int, str]] = []
    errors: list[BaseException] = []

    def borrow_on_and_on(seed: int) -> None:
        dice = random.Random(seed)
        try:
            while not stop.is_set():
                if dice.random() < 0.3:
                    with fdbroker.Client(address) as another:
                        another.stats()
                with client.borrow("data", mode=dice.choice([None, None, "r"])) as loan:
                    file = loan.open("rb") if dice.random() < 0.3 else None
                    mappings = [loan.mmap() for _ in range(dice.choice([0, 0, 4]))]
                for mapping in mappings[::2]:
                    mapping.close()
                del file, mappings
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=borrow_on_and_on, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for round in range(rounds):
        loan = None
        if round % 3:
            loan = client.borrow("own", exclusive=round % 3 == 2)
        found = support.in_fork(lambda loan=loan: unowned(baseline, loan))
        if found:
            problems.append(found)
        if loan is not None:
            loan.close()
    stop.set()
    for thread in threads:
        thread.join()
    client.close()
    gc.collect()
    assert support.open_files() == baseline
    assert errors == []
    return problems


@pytest.mark.parametrize("rounds", [40, pytest.param(400, marks=pytest.mark.long)])
def test_no_child_has_a_descriptor_that_nobody_owns(
    broker: fdbroker.Broker, data_file: IO[bytes], peer: support.Peer, rounds: int
) -> None:
    broker.put("data", data_file)
    broker.put("own", data_file)
    assert peer.call(fork_with_threads, broker.address, rounds) == []
    support.wait_until(lambda: loans(broker) == 0)


def fork_in_handler(address: str, seconds: float) -> tuple[int, list[bytes]]:
    baseline = support.open_files()
    client = fdbroker.Client(address)
    reader, writer = os.pipe()
    forked: list[int] = []

    def fork(number: int, frame: FrameType | None) -> None:
        pid = os.fork()
        if pid == 0:
            files = support.open_files().items()
            # what the interrupted borrow has so far is a shared loan's, or nothing
            wrong = [link for n, link in files if n not in baseline and "socket:" in link]
            os.write(writer, b"y" if len(wrong) > 1 else b"n")
            os._exit(0)
        os.waitpid(pid, 0)
        forked.append(pid)
        signal.setitimer(signal.ITIMER_REAL, dice.uniform(0.0002, 0.004))

    dice = random.Random(5)
    signal.signal(signal.SIGALRM, fork)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    try:
        while len(forked) < seconds * 100:
            with client.borrow("data", exclusive=dice.random() < 0.5) as loan:
                os.pread(loan.fileno(), 1, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read()
    client.close()
    gc.collect()
    assert support.open_files() == baseline
    return len(forked), [said.replace(b"n", b"")]


def test_forks_inside_a_signal_handler(
    broker: fdbroker.Broker, data_file: IO[bytes], peer: support.Peer
) -> None:
    broker.put("data", data_file)
    forks, wrong = peer.call(fork_in_handler, broker.address, 0.5)
    assert forks >= 50
    assert wrong == [b""]
    support.wait_until(lambda: loans(broker) == 0)


# --- hooks that are cut short -----------------------------------------------------------------

INTERRUPTED = """
import ctypes, functools, os, signal, sys, warnings

def interrupt(number, frame):
    raise KeyboardInterrupt

# a C function: the signal is there, and its handler runs where Python code next begins to run,
# which is in the first of fdbroker's hooks
signal.signal(signal.SIGUSR1, interrupt)
send = functools.partial(getattr(ctypes.CDLL(None), "raise"), int(signal.SIGUSR1))
os.register_at_fork(after_in_parent=send, after_in_child=send)
cut_short = []
sys.unraisablehook = lambda found: cut_short.append(found.exc_type)

import fdbroker
client = fdbroker.Client(sys.argv[1])
for loan in [client.borrow("data") for _ in range(3)]:
    loan.close()
shared = client.borrow("data")
reader, writer = os.pipe()
pid = os.fork()
assert cut_short == [KeyboardInterrupt]
assert shared._session.shared_by_fork
if pid == 0:
    with client.borrow("data"):
        (found,) = [loan for loan in client.loans() if loan.pid == os.getpid()]
    os.write(writer, b"x")
    os._exit(0)
os.close(writer)
assert os.read(reader, 1) == b"x", "the child has not borrowed"
with client.borrow("data"):
    assert len([loan for loan in client.loans() if loan.pid == os.getpid()]) == 2
shared.close()
os.waitpid(pid, 0)
client.close()
"""


def test_an_interrupt_in_a_hook_leaves_no_session_to_two_processes(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    path = os.pathsep.join(filter(None, sys.path))
    subprocess.run(
        [sys.executable, "-c", INTERRUPTED, broker.address],
        check=True,
        env=os.environ | {"PYTHONPATH": path},
        timeout=support.PATIENCE,
    )
    support.wait_until(lambda: loans(broker) == 0)


def test_an_exception_at_one_session_spares_the_others(
    broker: fdbroker.Broker, data_file: IO[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails:
        def mark_at_fork(self, thread: int, in_child: bool) -> None:
            pass

        def close_in_child(self) -> None:
            raise KeyboardInterrupt

    broker.put("data", data_file)
    for loan in [broker.borrow("data") for _ in range(3)]:
        loan.close()
    fails = Fails()
    monkeypatch.setattr(hooks, "sessions", [fails, *hooks.sessions])

    def in_the_child() -> int:
        sys.unraisablehook = lambda found: None
        return support.targets()["socket"]

    monkeypatch.setattr(sys, "unraisablehook", lambda found: None)
    assert support.in_fork(in_the_child) == 0
