"""Who comes to the broker and says nothing is shown out again, and nobody else is."""

from __future__ import annotations

import os
import select
import socket

from support import BORROW, RETURN, Raw, connect_to, start_fork, wait_until

from .planted import broker_with

SOON = 5.0
EXCLUSIVE = [1, None, ""]  # the fields of such a borrow after the name
SHORT = "from fdbroker.ipc.server.tuning import Tuning"
IMPATIENT = ", tuning=Tuning(handshake=300_000_000)"


def is_over(sock: socket.socket) -> bool:
    sock.settimeout(SOON)
    return sock.recv(99) == b""


def test_who_says_nothing_is_shown_out_and_who_has_said_hello_stays(tmp_path):
    with broker_with(tmp_path, SHORT, IMPATIENT) as (client, server):
        before = client._pool.idle[0]
        silent = [connect_to(client.address) for _ in range(3)]
        assert all(map(is_over, silent))
        for sock in silent:
            sock.close()
        assert client.stats()["connections"] == 1
        assert client._pool.idle[0] is before
        said = (tmp_path / "stderr").read_text()
        assert said.count("reason=it-said-no-hello") == 3
        used = server.cpu_seconds()
        late = connect_to(client.address)  # as long as that takes nothing happens
        assert is_over(late)
        late.close()
        assert server.cpu_seconds() - used < 0.2


def test_one_that_leaves_before_is_not_spoken_of(tmp_path):
    with broker_with(tmp_path, SHORT, IMPATIENT) as (client, _):
        connect_to(client.address).close()
        silent = connect_to(client.address)
        assert is_over(silent)
        silent.close()
        wait_until(lambda: client.stats()["connections"] == 1)
        assert (tmp_path / "stderr").read_text().count("it-said-no-hello") == 1


def stay_deaf(address: str) -> None:
    """Ask on and read nothing, until it is over."""
    with Raw(address, puts=False) as raw:
        raw.send(BORROW, 1, "data", *EXCLUSIVE)
        raw.send(RETURN, 2)
        raw.send(BORROW, 3, "data", *EXCLUSIVE)
        over = select.poll()
        over.register(raw.sock, 0)
        assert over.poll(SOON * 1000)


def test_who_does_not_read_is_shown_out_and_the_next_one_has_its_turn(tmp_path):
    with (
        broker_with(tmp_path, SHORT, IMPATIENT) as (client, _),
        (tmp_path / "data").open("wb") as file,
    ):
        client.put("data", file)
        wait = start_fork(lambda: stay_deaf(client.address))
        wait_until(lambda: [loan.id.split(".")[1] for loan in client.loans()] == ["3"])
        with Raw(client.address, puts=False) as raw:
            raw.send(BORROW, 1, "data", *EXCLUSIVE)  # and nobody says anything from now on
            message, (number,) = raw.receive()
            os.close(number)
            assert message[:2] == [0, 1]
        wait()
        assert (tmp_path / "stderr").read_text().count("reason=it-does-not-read") == 1
