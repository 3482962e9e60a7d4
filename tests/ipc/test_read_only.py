"""``mode="r"``: a fresh read-only description, of what can be opened anew without side effects."""

from __future__ import annotations

import errno
import os
import pty
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import pytest
from support import wait_until

import fdbroker
from fdbroker.errors import UnsupportedKind


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_it_has_an_offset_of_its_own(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file)
    os.lseek(data_file.fileno(), 50, os.SEEK_SET)
    with broker.borrow("data", mode="r") as one, broker.borrow("data", mode="r") as other:
        assert os.read(one.fileno(), 3) == bytes([0, 1, 2])
        assert os.read(other.fileno(), 1) == b"\0"
        assert os.lseek(data_file.fileno(), 0, os.SEEK_CUR) == 50


def test_a_plain_loan_shares_the_offset(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file)
    os.lseek(data_file.fileno(), 50, os.SEEK_SET)
    with broker.borrow("data") as loan:
        assert os.read(loan.fileno(), 1) == bytes([50])
    assert os.lseek(data_file.fileno(), 0, os.SEEK_CUR) == 51


def test_it_cannot_write(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file)
    with broker.borrow("data", mode="r") as loan:
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            os.write(loan.fileno(), b"x")
        assert caught.value.errno == errno.EBADF


def test_a_memfd(broker: fdbroker.Broker) -> None:
    number = os.memfd_create("m")
    os.write(number, b"abc")
    broker.put("m", number)
    os.close(number)
    with broker.borrow("m", mode="r") as loan:
        assert os.read(loan.fileno(), 9) == b"abc"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(loan.fileno(), b"x")


def test_a_deleted_file(broker: fdbroker.Broker, tmp_path: Path) -> None:
    path = tmp_path / "gone"
    path.write_bytes(b"abc")
    with open(path, "rb") as file:
        broker.put("gone", file)
    path.unlink()
    with broker.borrow("gone", mode="r") as loan:
        assert os.read(loan.fileno(), 9) == b"abc"


def test_several(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    names = [f"n{number}" for number in range(300)]
    for name in names:
        broker.put(name, data_file)
    with broker.borrow_all(names, mode="r") as loan:
        for name in names:
            assert os.read(loan.fileno(name), 1) == b"\0"


def kinds(stack: ExitStack, folder: Path) -> Iterator[tuple[str, str, int]]:
    """Things that must not be opened anew: (kind, a word of the reason, descriptor)."""
    only_files = "only files and memfds"
    reader, writer = os.pipe()
    for number in (reader, writer):
        stack.callback(os.close, number)
        yield "pipe", only_files, number
    os.mkfifo(folder / "fifo")
    fifo = os.open(folder / "fifo", os.O_RDWR)
    stack.callback(os.close, fifo)
    yield "pipe", only_files, fifo
    yield (
        "listening socket",
        only_files,
        stack.enter_context(socket.create_server(("127.0.0.1", 0))).fileno(),
    )
    for master in pty.openpty():
        stack.callback(os.close, master)
        yield "character device", only_files, master
    for path, flags, kind, reason in (
        ("/dev/zero", os.O_RDWR, "character device", only_files),
        (folder / "w", os.O_WRONLY | os.O_CREAT, "file", "for writing only"),
        ("/proc/self/status", os.O_RDONLY, "file", "side effects"),
        ("/sys/kernel/uevent_seqnum", os.O_RDONLY, "file", "side effects"),
    ):
        number = os.open(path, flags)
        stack.callback(os.close, number)
        yield kind, reason, number
    event = os.eventfd(0)
    stack.callback(os.close, event)
    yield "eventfd", only_files, event


def test_what_cannot_be_opened_anew(
    broker: fdbroker.Broker, stack: ExitStack, tmp_path: Path
) -> None:
    for kind, reason, number in kinds(stack, tmp_path):
        broker.put("it", number, replace=True)
        with pytest.raises(UnsupportedKind, match=reason) as caught:
            broker.borrow("it", mode="r")
        assert caught.value.kind == kind
        broker.borrow("it", exclusive=True, timeout=5).close()  # nothing is lent, or waits
        with pytest.raises(UnsupportedKind):
            broker.borrow_all(["it", "it"], mode="r")
    wait_until(lambda: broker.stats()["loans"] == 0)


def test_other_modes_are_refused(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file)
    for mode in ("w", "rw", "rb", ""):
        with pytest.raises(ValueError, match="mode is None or"):
            broker.borrow("data", mode=mode)


def test_waiting_for_a_read_only_turn(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    """Exclusive and read-only together: the turn is the entry's, the description one's own."""
    broker.put("data", data_file)
    with broker.borrow("data", mode="r", exclusive=True) as loan:
        assert os.read(loan.fileno(), 1) == b"\0"
        (found,) = broker.loans()
        assert found.exclusive
