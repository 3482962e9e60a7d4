"""The log: the loop never waits for whoever reads it, and nothing is missing without a word."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time

import pytest
from support import wait_until

import fdbroker
from fdbroker.daemon.log import LINE_BYTES, QUEUE_BYTES, Writer

from .puppet import Process, is_served

SOON = 3.0
LOST = re.compile(rb"event=log-lines-lost count=(\d+)\n")


class Reader:
    """A pipe, and what was read of it so far."""

    def __init__(self) -> None:
        self.end, self.theirs = os.pipe()
        self.said = b""

    def read(self, seconds: float = SOON) -> bool:
        """Read once; False at the end."""
        assert select.select([self.end], [], [], seconds)[0], "nobody writes"
        new = os.read(self.end, 65536)
        self.said += new
        return bool(new)

    def lost(self) -> int:
        return sum(map(int, LOST.findall(self.said)))

    def close(self) -> None:
        for end in (self.end, self.theirs):
            with contextlib.suppress(OSError):
                os.close(end)


@pytest.fixture
def pipe():
    with contextlib.closing(Reader()) as reader:
        yield reader


@pytest.fixture
def logger():
    logger = logging.Logger("test")
    yield logger
    for handler in logger.handlers:
        handler.close()


# --- a broker ---


@pytest.fixture
def served(tmp_path, pipe):
    """(address, process) of a broker whose stderr is the pipe."""
    address = str(tmp_path / "socket")
    command = [sys.executable, "-m", "fdbroker", "serve", "--socket", address]
    with subprocess.Popen(command, stderr=pipe.theirs) as popen, Process(popen.pid) as process:
        os.close(pipe.theirs)
        wait_until(lambda: is_served(address))
        yield address, process
        if not process.gone(SOON):
            popen.kill()
            pytest.fail("it has not ended")
        assert popen.wait() == 0


def send_junk(address: str, times: int) -> None:
    """What the broker has something to say about."""
    for _ in range(times):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(SOON)
            sock.connect(address)
            sock.send(b"\xc1")
            sock.recv(4096)


def test_nobody_reads_and_the_broker_serves_on(served, pipe):
    address, process = served
    times = 3000
    send_junk(address, times)
    with fdbroker.Client(address) as client, open(os.devnull) as null:
        client.put("null", null)
        client.borrow("null").close()
    while pipe.said.count(b"event=fault") + pipe.lost() < times:
        pipe.read()
    assert pipe.lost() > 0
    assert len(pipe.said) < QUEUE_BYTES * 2 + 70_000
    send_junk(address, 1)
    before = pipe.lost()
    process.signal(signal.SIGTERM)
    while pipe.read():
        pass
    assert pipe.said.count(b"event=fault") + pipe.lost() == times + 1
    assert pipe.lost() == before
    assert all(line.startswith(b"fdbroker: ") for line in pipe.said.splitlines())


def test_nobody_reads_and_it_ends_all_the_same(served, pipe):
    address, process = served
    send_junk(address, 2000)
    process.signal(signal.SIGTERM)
    assert process.gone(SOON)


def test_the_reader_is_gone_and_the_broker_serves_on(served, pipe):
    address, process = served
    os.close(pipe.end)
    send_junk(address, 100)
    with fdbroker.Client(address) as client:
        assert client.stats()["entries"] == 0
    process.signal(signal.SIGTERM)
    assert process.gone(SOON)


# --- the handler ---


def fill(end: int) -> None:
    os.set_blocking(end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(end, b"x" * 4096)
    os.set_blocking(end, True)


def test_at_the_end_all_is_written(pipe, logger):
    logger.addHandler(Writer(pipe.theirs))
    for number in range(500):
        logger.warning("number=%d", number)
    logger.handlers[0].close()
    os.close(pipe.theirs)
    while pipe.read():
        pass
    assert pipe.said.splitlines() == [b"fdbroker: number=%d" % number for number in range(500)]


def test_the_end_is_not_waited_for_if_nobody_reads(pipe, logger):
    fill(pipe.theirs)
    logger.addHandler(Writer(pipe.theirs))
    logger.warning("never seen")
    before = time.monotonic()
    logger.handlers[0].close()
    logger.handlers[0].close()  # as at the exit of a process
    assert time.monotonic() - before < 1.0
    os.close(pipe.end)  # so that its thread ends


def test_missing_lines_are_counted_where_they_are_missing(pipe, logger):
    fill(pipe.theirs)
    logger.addHandler(Writer(pipe.theirs))
    text = "x" * 990
    for number in range(100):
        logger.warning("%s %03d", text, number)
    while b"\n" not in pipe.said:
        pipe.read()
    wait_until(lambda: logger.handlers[0]._bytes < QUEUE_BYTES // 2)
    logger.warning("after")
    while not pipe.said.endswith(b"after\n"):
        pipe.read()
    told = [line[-3:] for line in pipe.said.splitlines()]
    assert 20 < pipe.lost() < 99
    kept = 100 - pipe.lost()
    assert told[:kept] == [b"%03d" % number for number in range(kept)]
    assert LOST.fullmatch(pipe.said.splitlines(keepends=True)[kept].removeprefix(b"fdbroker: "))
    assert told[kept + 1 :] == [b"ter"]


def test_a_pipe_that_somebody_has_made_non_blocking_loses_nothing(pipe, logger):
    fcntl.fcntl(pipe.theirs, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(pipe.theirs, False)
    logger.addHandler(Writer(pipe.theirs))
    for number in range(500):
        logger.warning("number=%03d", number)
    while not pipe.said.endswith(b"number=499\n"):
        pipe.read()
    assert pipe.said.splitlines() == [b"fdbroker: number=%03d" % number for number in range(500)]


def test_a_record_is_bounded_and_one_that_cannot_be_formatted_is_no_error(pipe, logger):
    logger.addHandler(Writer(pipe.theirs))
    logger.warning("x" * 100_000)
    logger.warning("%d", "no number")
    logger.warning("\udcff \N{SNOWMAN}")
    while pipe.said.count(b"\n") < 3:
        pipe.read()
    long, bad, odd = pipe.said.splitlines()
    assert len(long) == LINE_BYTES - 1
    assert b"event=bad-log at=test_log.py:" in bad
    assert odd == "fdbroker: \\udcff \N{SNOWMAN}".encode()
