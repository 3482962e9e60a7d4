"""What the service manager is told (sd_notify(3)): the test is the manager."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time

import pytest
from support import PATIENCE, wait_until

import fdbroker

from .kit import COMMAND, open_for_writing, served, wait_for_newline


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """(its address as in the environment, and a function that waits for the next message)."""
    address = f"{tmp_path}/notify" if request.param == "path" else f"@fdbroker-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address.replace("@", "\0"))
        sock.settimeout(PATIENCE)

        def hear() -> dict[str, str]:
            return dict(line.split("=", 1) for line in sock.recv(4096).decode().split("\n"))

        yield address, hear


def microseconds() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_it_tells_how_it_is(tmp_path, manager):
    address, hear = manager
    path = tmp_path / "f.toml"
    path.write_text("[entry.a]\nmemfd = 1\n")
    environment = os.environ | {"NOTIFY_SOCKET": address}
    with served(tmp_path, "--config", path, env=environment) as broker:
        assert hear() == {"READY": "1", "STATUS": "serving 1 entry"}
        path.write_text("[entry.a]\nmemfd = 1\n[entry.b]\nmemfd = 1\n")
        before = microseconds()
        broker.hang_up()
        message = hear()
        assert message.keys() == {"RELOADING", "MONOTONIC_USEC"}
        assert before <= int(message["MONOTONIC_USEC"]) <= microseconds()
        assert hear() == {"READY": "1", "STATUS": "serving 2 entries"}
        path.write_text("nothing")
        broker.hang_up()
        assert hear().keys() == {"RELOADING", "MONOTONIC_USEC"}
        message = hear()
        assert message["READY"] == "1"
        assert message["STATUS"].startswith("serving 2 entries; the last reload failed: ")
        broker.process.send_signal(signal.SIGTERM)
        assert hear() == {"STOPPING": "1", "STATUS": "waiting for loans"}
        assert broker.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("address", ["/none/such", "@fdbroker-nobody", "vsock:2:1", "x" * 200])
def test_a_manager_that_cannot_be_told_is_no_harm(tmp_path, address):
    environment = os.environ | {"NOTIFY_SOCKET": address}
    with served(tmp_path, "--memfd", "a=1", env=environment) as broker:
        assert broker.entries().keys() == {"a"}


def test_one_that_does_not_read_holds_up_for_a_moment_at_most(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"{tmp_path}/notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.connect(f"{tmp_path}/notify")
            other.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while other.send(b"x"):
                    pass
        environment = os.environ | {"NOTIFY_SOCKET": f"{tmp_path}/notify"}
        with served(tmp_path, "--memfd", "a=1", env=environment) as broker:
            assert broker.entries().keys() == {"a"}


def test_a_private_broker_does_not_speak_for_its_owner(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"{tmp_path}/notify")
        monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
        with fdbroker.Broker() as broker:
            broker.stats()
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(99)


def test_a_hang_up_before_it_is_ready_does_not_end_it(tmp_path):
    """It waits for its configuration, a FIFO, when the signal comes."""
    fifo = tmp_path / "f.toml"
    os.mkfifo(fifo)
    ready, told = os.pipe()
    command = [*COMMAND, "serve", "--socket", f"{tmp_path}/s", "--config", str(fifo)]
    process = subprocess.Popen([*command, "--ready-fd", str(told)], pass_fds=[told])
    try:
        os.close(told)
        number = wait_until(lambda: open_for_writing(fifo))
        process.send_signal(signal.SIGHUP)
        os.write(number, b"[entry.a]\nmemfd = 1\n")
        os.close(number)
        wait_for_newline(ready)
        with fdbroker.Client(f"{tmp_path}/s") as client:
            assert [entry.name for entry in client.entries()] == ["a"]
            number = wait_until(lambda: open_for_writing(fifo))  # and now it is acted upon
            os.write(number, b"[entry.b]\nmemfd = 1\n")
            os.close(number)
            wait_until(lambda: [entry.name for entry in client.entries()] == ["b"])
        process.terminate()
        assert process.wait(PATIENCE) == 0
    finally:
        os.close(ready)
        process.kill()
        process.wait()
