"""The pools of the standard library behind one face, and what their workers do in these tests.

A worker function must be importable by a fresh interpreter, so they all are here.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple, Protocol

import support

import fdbroker


class Kind(NamedTuple):
    """One sort of pool."""

    method: str
    executor: bool

    def __str__(self) -> str:
        return f"{self.method}-{'executor' if self.executor else 'pool'}"


METHODS = ("fork", "spawn", "forkserver")
KINDS = [Kind(method, executor) for method in METHODS for executor in (False, True)]


class Answer(Protocol):
    """Wait (seconds) for what a worker returns; what it raised is raised here."""

    def __call__(self, patience: float = ...) -> Any: ...


class Workers:
    """A pool; `begin` and `call` hand it work."""

    def __init__(self, kind: Kind, count: int, start: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context(kind.method)
        self.kind = kind
        self.pool: Any
        if kind.executor:
            self.pool = ProcessPoolExecutor(count, context, start, args)
        else:
            self.pool = context.Pool(count, start, args)

    def begin(self, function: Callable[..., Any], *args: Any) -> Answer:
        if self.kind.executor:
            future = self.pool.submit(function, *args)
            return lambda patience=support.PATIENCE: future.result(patience)
        result = self.pool.apply_async(function, args)
        return lambda patience=support.PATIENCE: result.get(patience)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.begin(function, *args)()

    def close(self, kill: bool) -> None:
        """End it in good order, or if `kill` however it can be ended."""
        if self.kind.executor:
            self.pool.shutdown(cancel_futures=kill)
            return
        self.pool.terminate() if kill else self.pool.close()
        self.pool.join()


@contextlib.contextmanager
def workers(
    kind: Kind, count: int, start: Callable[..., Any] = int, *args: Any, broken: bool = False
) -> Iterator[Workers]:
    """A pool for as long as the block runs.  broken: the test leaves work in it undone."""
    pool = Workers(kind, count, start, *args)
    good = False
    try:
        yield pool
        good = not broken
    finally:
        pool.close(kill=not good)


# --- what the workers do ---------------------------------------------------------------------


class Found(NamedTuple):
    """What a worker found: its descriptors on the file before, with and after the loan."""

    pid: int
    before: int
    during: int
    after: int
    content: bytes


def descriptors_on(file: os.stat_result) -> int:
    """How many descriptors this process has on a file."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            found += os.path.samestat(os.fstat(int(number)), file)
    return found


def look(borrow: Callable[[], fdbroker.Loan], file: os.stat_result) -> Found:
    before = descriptors_on(file)
    with borrow() as loan:
        during = descriptors_on(file)
        content = os.pread(loan.fileno(), 1000, 0)
    return Found(os.getpid(), before, during, descriptors_on(file), content)


def look_by_ref(ref: fdbroker.SharedFD, file: os.stat_result) -> Found:
    return look(ref.borrow, file)


def look_by_name(name: str, file: os.stat_result) -> Found:
    return look(lambda: fdbroker.borrow(name), file)


def count_files(*_: Any) -> int:
    """The open files of a worker that was given something."""
    return len(support.open_files())


def borrow_often(ref: fdbroker.SharedFD, times: int) -> tuple[int, int]:
    """Open files after the first loan, and after all of them."""
    ref.borrow().close()
    first = count_files()
    for _ in range(times):
        ref.borrow(mode="r").close()
        with ref.borrow() as loan:
            loan.open("rb").read(1)
    return first, count_files()


def close_ref(ref: fdbroker.SharedFD) -> None:
    with ref:
        pass


def take(ref: fdbroker.SharedFD, how: dict[str, Any]) -> int:
    """Borrow and keep the loan until this worker ends or is told to `drop` it."""
    support.kept["loan"] = ref.borrow(**how)
    return os.getpid()


def drop() -> None:
    support.kept.pop("loan").close()


def hold(ref: fdbroker.SharedFD, how: dict[str, Any]) -> None:
    """Borrow, and never come back."""
    with ref.borrow(**how):
        signal.pause()


def write(data: bytes) -> int:
    """Write into the loan that this worker keeps."""
    return os.write(support.kept["loan"].fileno(), data)


def raise_unknown_entry(name: str) -> None:
    fdbroker.borrow(name)


def take_pipe_read_only() -> None:
    reader, writer = os.pipe()
    try:
        fdbroker.put("pool/pipe", reader, ephemeral=True)
        fdbroker.borrow("pool/pipe", mode="r")
    finally:
        os.close(reader)
        os.close(writer)


def connect(address: str) -> None:
    fdbroker.Client(address).stats()


def write_and_wait(data: bytes) -> None:
    """The same, to be killed after it.

    Not between two tasks: a worker that dies while it waits for one takes the lock of the queue
    along, and multiprocessing.Pool hangs.
    """
    write(data)
    signal.pause()


def use_parents_loan() -> int:
    return int(support.kept["parent"].fileno())


def churn(ref: fdbroker.SharedFD, seconds: float, dies_after: float) -> None:
    """Borrow and return all the time; SIGALRM ends this worker on the spot, if told so."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, dies_after)
    end, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        rounds += 1
        with ref.borrow(exclusive=rounds % 7 == 0) as loan:
            assert os.pread(loan.fileno(), 1, 7) == b"\x07"
    signal.setitimer(signal.ITIMER_REAL, 0)
