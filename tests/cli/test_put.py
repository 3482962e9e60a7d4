"""put: each kind, as the broker then lends it; if absent, replaced, raced for."""

from __future__ import annotations

import os
import socket
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from support import children, open_files

import fdbroker
from fdbroker import openers
from fdbroker.cli import making, put, status
from fdbroker.errors import NameTaken

from .kit import command, complaint, put_memory, start, succeeds


def entry(broker: fdbroker.Broker, name: str) -> fdbroker.ipc.client.EntryInfo:
    (found,) = (e for e in broker.entries() if e.name == name and not e.retired)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


# --- each kind -------------------------------------------------------------------------------


def test_a_port_that_outlives_the_command(broker: fdbroker.Broker) -> None:
    assert succeeds(broker, "put", "web", "--listen", "127.0.0.1:0") == ""
    host, _, port = entry(broker, "web").where.rpartition(":")
    with socket.create_connection((host, int(port))) as client, broker.borrow("web") as loan:
        listener = loan.as_socket()
        served, _ = listener.accept()
        with served:
            served.sendall(b"hello")
            assert client.recv(9) == b"hello"


def test_a_unix_socket(broker: fdbroker.Broker, tmp_path: Path) -> None:
    succeeds(broker, "put", "app", "--listen", f"unix:{tmp_path}/s")
    assert entry(broker, "app").where == f"unix:{tmp_path}/s"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/s")


def test_datagrams(broker: fdbroker.Broker) -> None:
    succeeds(broker, "put", "log", "--listen", "udp:127.0.0.1:0")
    assert entry(broker, "log").kind == "datagram socket"


def test_a_file(broker: fdbroker.Broker, tmp_path: Path) -> None:
    succeeds(broker, "put", "log", "--open", "log:a", cwd=tmp_path)
    assert entry(broker, "log").where == f"{tmp_path}/log"
    with broker.borrow("log") as loan:
        os.write(loan.fileno(), b"x")
    assert (tmp_path / "log").read_bytes() == b"x"


def test_memory(broker: fdbroker.Broker) -> None:
    succeeds(broker, "put", "memory", "--memfd", "64K")
    with broker.borrow("memory") as loan:
        assert os.fstat(loan.fileno()).st_size == 65536


def test_what_the_shell_has_opened(broker: fdbroker.Broker, data_file) -> None:
    succeeds(broker, "put", "seven", "--fd", "0", stdin=data_file)
    with broker.borrow("seven") as loan:
        assert os.path.sameopenfile(loan.fileno(), data_file.fileno())


# --- when there is one -----------------------------------------------------------------------


def test_replaced(broker: fdbroker.Broker) -> None:
    old = put_memory(broker)
    with broker.borrow("data"):
        succeeds(broker, "put", "data", "--memfd", "7", "--replace")
        assert entry(broker, "data").generation > old
        assert [(e.generation, e.retired) for e in broker.entries() if e.retired] == [(old, True)]
        succeeds(broker, "put", "new", "--memfd", "7", "--replace")


def test_if_absent_nothing_is_made_when_there_is_one(
    broker: fdbroker.Broker, tmp_path: Path
) -> None:
    generation = put_memory(broker)
    for how, what in [
        ("--open", f"{tmp_path}/file:rw"),
        ("--listen", f"unix:{tmp_path}/s"),
        ("--memfd", "1"),
        ("--fd", "0"),
    ]:
        assert succeeds(broker, "put", "data", how, what, "--if-absent") == ""
        assert entry(broker, "data").generation == generation
    assert os.listdir(tmp_path) == []


def test_if_absent_is_put_when_there_is_a_retired_one(broker: fdbroker.Broker) -> None:
    generation = put_memory(broker)
    with broker.borrow("data"):
        broker.retire("data")
        succeeds(broker, "put", "data", "--memfd", "1", "--if-absent")
        assert entry(broker, "data").generation == generation + 1


def test_a_port_that_a_retired_entry_keeps(broker: fdbroker.Broker) -> None:
    address = f"127.0.0.1:{free_port()}"
    succeeds(broker, "put", "web", "--listen", address)
    with broker.borrow("web"):
        broker.retire("web")
        said = complaint(command(broker, "put", "web", "--listen", address), status.FAILED)
        assert said.endswith(
            f'by the entry "web" ({address}), which is retired but on loan: fdbroker loans web'
        )
    succeeds(broker, "put", "web", "--listen", address)


@pytest.mark.parametrize("what", ["port", "path", "abstract", "memory", "file"])
def test_raced_for_by_eight(broker: fdbroker.Broker, tmp_path: Path, what: str) -> None:
    address = {
        "port": f"--listen=127.0.0.1:{free_port()}",
        "path": f"--listen=unix:{tmp_path}/s",
        "abstract": f"--listen=unix:@fdbroker-test-{os.getpid()}",
        "memory": "--memfd=1",
        "file": f"--open={tmp_path}/file:a",
    }[what]
    before = put_memory(broker, "before")
    racers = [start(broker, "put", "web", address, "--if-absent") for _ in range(8)]
    ends = [(racer.communicate(timeout=60), racer.returncode) for racer in racers]
    assert ends == [(("", ""), 0)] * 8
    assert entry(broker, "web").generation == before + 1
    assert put_memory(broker, "after") == before + 2, "more than one was put"
    if what in ("port", "path"):
        family = socket.AF_INET if what == "port" else socket.AF_UNIX
        where = entry(broker, "web").where.removeprefix("unix:")
        host, _, port = where.rpartition(":")
        with socket.socket(family) as client, broker.borrow("web") as loan:
            client.connect((host, int(port)) if what == "port" else where)
            sock = loan.as_socket()
            sock.settimeout(0)
            sock.accept()[0].close()


def test_another_is_faster_between_the_question_and_the_put(
    broker: fdbroker.Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = put_memory(broker)
    monkeypatch.setattr(making, "is_there", lambda client, name: False)
    options = Namespace(
        name="data",
        resources=[("listen", f"unix:{tmp_path}/s")],
        if_absent=True,
        replace=False,
        socket=broker.address,
    )
    before = open_files(), children()
    assert put.run(options) == 0
    options.if_absent = False
    with pytest.raises(NameTaken):
        put.run(options)
    assert (open_files(), children()) == before
    assert os.listdir(tmp_path) == [], "a socket that nobody serves is left"
    assert entry(broker, "data").generation == generation


def test_an_address_that_never_becomes_free_is_not_waited_for_long(
    broker: fdbroker.Broker,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        address = f"127.0.0.1:{foreign.getsockname()[1]}"
        done = command(broker, "put", "web", "--listen", address, "--if-absent")
        assert "by another program" in complaint(done, status.FAILED)


def test_ctrl_c_leaves_nothing(broker: fdbroker.Broker, tmp_path: Path) -> None:
    """The command waits for a broker that is stopped."""
    os.kill(broker.pid, 19)
    try:
        process = start(broker, "put", "web", "--memfd", "1")
        with process:
            while process.poll() is None:
                process.send_signal(2)
                try:
                    process.wait(0.2)
                except subprocess.TimeoutExpired:
                    continue
    finally:
        os.kill(broker.pid, 18)
    assert process.returncode in (status.INTERRUPTED, -2), "SIGINT before Python had its handler"
    assert broker.entries() == []


def test_what_may_have_been_taken_keeps_its_path(broker: fdbroker.Broker, tmp_path: Path) -> None:
    """Ctrl-C comes when the broker has the entry, and only its answer was still to be read."""

    class Interrupted(fdbroker.Client):
        def put(self, *what: Any, **how: Any) -> int:
            super().put(*what, **how)
            raise KeyboardInterrupt

    path = tmp_path / "s"
    with Interrupted(broker.address) as client:
        fd = openers.make("listen", f"unix:{path}")
        with pytest.raises(KeyboardInterrupt):
            making.put(client, "web", "listen", fd)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
        fd = openers.make("listen", f"unix:{path}2")
        with pytest.raises(NameTaken):
            making.put(broker, "web", "listen", fd)
        assert not path.with_name("s2").exists()
