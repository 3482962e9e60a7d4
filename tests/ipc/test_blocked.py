"""A thread that is blocked in a file of a loan holds up neither a fork nor any other loan."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from support import in_fork, wait_until

import fdbroker
from fdbroker.ipc.client import fork


@contextlib.contextmanager
def blocked_reader(broker: fdbroker.Broker) -> Iterator[fdbroker.Loan]:
    """A loan whose file another thread reads, until the block ends."""
    reader, writer = os.pipe()
    broker.put("pipe", reader)
    os.close(reader)
    loan = broker.borrow("pipe")
    file = loan.open("rb")

    def read() -> None:
        with contextlib.suppress(ValueError):  # it is closed when the read returns
            file.read(1)

    thread = threading.Thread(target=read)
    thread.start()
    where = Path(f"/proc/self/task/{thread.native_id}/wchan")
    wait_until(lambda: "pipe" in where.read_text())
    try:
        yield loan
    finally:
        os.write(writer, b"x")
        thread.join()
        os.close(writer)
        loan.close()


def test_a_fork_does_not_wait_for_it(broker: fdbroker.Broker) -> None:
    """The lock of its buffer is copied as it is, and nobody in the child will ever release it."""
    with blocked_reader(broker):
        assert in_fork(lambda: "the child lives") == "the child lives"


def test_nobody_waits_for_the_close_of_its_loan(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    with blocked_reader(broker) as loan:
        loan.close()
        with broker.borrow("data") as other:
            os.fstat(other.fileno())


def test_the_gate_is_free_while_what_interrupted_it_is_kept() -> None:
    """A traceback holds frames, and a frame whatever it has entered."""

    def interrupted() -> None:
        with fork.deferred_cleanup, fork.FORK_LOCK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        interrupted()
    got: list[bool] = []

    def take() -> None:
        got.append(fork.FORK_LOCK.acquire(timeout=5))
        fork.FORK_LOCK.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert got == [True]
    assert kept.value.__traceback__ is not None
