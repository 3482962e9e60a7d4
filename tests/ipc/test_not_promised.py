"""What docs/security.md says is *not* promised is so, and what protects all the same does."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from ruled import Ruled, ask_as, rule
from support import wait_until

import fdbroker
from fdbroker import openers

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs other uids")

F_ADD_SEALS, F_SEAL_FUTURE_WRITE = 1033, 0x10  # linux/fcntl.h


def test_a_copy_outlives_the_loan_and_its_entry(broker: fdbroker.Broker) -> None:
    """The broker counts zero, and has closed; the borrower still reads, and listens."""
    number = os.memfd_create("kept")
    os.write(number, b"kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        broker.put("data", number)
        broker.put("web", server)
    os.close(number)
    with broker.borrow_all(["data", "web"]) as loan:
        copy = os.dup(loan.fileno("data"))
        listener = socket.socket(fileno=os.dup(loan.fileno("web")))
    broker.retire("data", wait=True)
    broker.retire("web", wait=True)
    assert broker.stats()["entries"] == 0
    assert os.pread(copy, 9, 0) == b"kept"
    with listener, socket.create_connection(address):
        listener.accept()[0].close()
    os.close(copy)


def untouched(number: int) -> None:
    """As memfd_create(2) makes it."""


def mode_taken(number: int) -> None:
    os.fchmod(number, 0o644)


def sealed(number: int) -> None:
    fcntl.fcntl(number, F_ADD_SEALS, F_SEAL_FUTURE_WRITE)


@as_root
@pytest.mark.parametrize(
    ("protect", "own_can", "other_can"),
    [(untouched, True, True), (mode_taken, True, False), (sealed, False, False)],
)
def test_who_has_a_read_only_loan_of_a_memfd_may_write(
    ruled: Ruled, protect: Callable[[int], None], own_can: bool, other_can: bool
) -> None:
    """By opening it anew: its mode and its seals say whether, not that of the loan."""
    number = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
    os.truncate(number, 10)
    protect(number)
    ruled.client.put("memory", number)
    ruled.set_rules(rule("borrow", mode="r"))
    assert ask_as(ruled.address, can_write, uid=0) is own_can
    assert ask_as(ruled.address, can_write) is other_can
    expected = (b"x" if own_can or other_can else b"\0") + b"\0" * 9
    assert os.pread(number, 10, 0) == expected
    os.close(number)


@as_root
def test_the_memory_that_a_broker_makes_is_for_its_own_user_to_write(ruled: Ruled) -> None:
    """Of ``memfd = ...`` and ``--memfd``: under `mode = "r"` others only read it."""
    number = openers.make("memfd", "10")
    ruled.client.put("memory", number)
    os.close(number)
    ruled.set_rules(rule("borrow", mode="r"))
    assert ask_as(ruled.address, can_write) is False
    ruled.set_rules(rule("borrow"))
    ask_as(ruled.address, write)
    with ruled.client.borrow("memory", mode="r") as loan:
        assert os.read(loan.fileno(), 9) == b"written\0\0"


def can_write(client: fdbroker.Client) -> bool:
    """Whether who has it on a read-only loan can write to it."""
    with client.borrow("memory", mode="r") as loan:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(loan.fileno(), b"x", 0)
        try:
            number = os.open(f"/proc/self/fd/{loan.fileno()}", os.O_RDWR)
        except PermissionError:
            return False
        try:
            return os.pwrite(number, b"x", 0) == 1
        except PermissionError:
            return False
        finally:
            os.close(number)


def write(client: fdbroker.Client) -> None:
    with client.borrow("memory") as loan:
        os.pwrite(loan.fileno(), b"written", 0)


def test_a_plain_loan_is_the_same_open_file(broker: fdbroker.Broker, tmp_path: Path) -> None:
    """Its flags and its locks are everybody's."""
    with open(tmp_path / "f", "w+b") as file:
        broker.put("data", file)
        fcntl.flock(file, fcntl.LOCK_EX)
        with broker.borrow("data") as loan, open(tmp_path / "f", "rb") as other:
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.set_blocking(loan.fileno(), False)
            fcntl.flock(loan.fileno(), fcntl.LOCK_UN)
            assert not os.get_blocking(file.fileno())
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_an_exclusive_loan_is_a_turn_and_no_lock(broker: fdbroker.Broker, tmp_path: Path) -> None:
    with open(tmp_path / "f", "w+b") as file:
        broker.put("data", file)
        with broker.borrow("data", exclusive=True) as loan:
            os.pwrite(loan.fileno(), b"mine", 0)
            (tmp_path / "f").write_bytes(b"ours")
            assert os.pread(loan.fileno(), 9, 0) == b"ours"
    wait_until(lambda: not broker.loans())
