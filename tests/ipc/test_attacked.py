"""What an attack on the server's parts has found, each with its smallest form."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgpack
import pytest
from ruled import ALICE, Ruled, memory, put, rule, session_as
from support import BORROW, PUT, RETURN, become, in_fork, wait_until

from fdbroker import descriptors
from fdbroker.errors import BrokerClosing
from fdbroker.ipc.transport.unix_listener import Listener

READONLY = 2
TRIES = 1500
WAITERS = 30


def modes_of_read_only_loans(address: str) -> Counter[int]:
    """How the descriptors of read-only loans are open, if the client reads just when it is looked
    at what it has not read."""
    become(ALICE)
    modes: Counter[int] = Counter()
    pause = random.Random(1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(20)
        sock.connect(address)
        sock.send(msgpack.packb((0, 0, 1, False)))
        sock.recv(100)
        for seq in range(1, 3 * TRIES, 3):
            sock.send(msgpack.packb((BORROW, seq, "nope", READONLY, None, "")))
            sock.send(msgpack.packb((BORROW, seq + 1, "secret", READONLY, None, "")))
            until = time.perf_counter() + pause.uniform(0, 0.0004)
            while time.perf_counter() < until:
                pass
            sock.recv(1000)
            _, numbers, _, _ = socket.recv_fds(sock, 1000, 1)
            for number in numbers:
                modes[fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE] += 1
                os.close(number)
            sock.send(msgpack.packb((RETURN, seq + 2)))
    return modes


def test_read_only_loan_is_never_the_descriptor_that_was_put(ruled: Ruled) -> None:
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
        file.write(b"secret")
        file.flush()
        ruled.client.put("secret", file)
        ruled.set_rules(rule("borrow", mode="r"))
        modes = in_fork(lambda: modes_of_read_only_loans(ruled.address))
    assert set(modes) == {os.O_RDONLY}


def test_drain_that_ends_at_once_answers_all_who_wait_for_their_turn(ruled: Ruled) -> None:
    ruled.set_rules(rule("borrow"))
    ruled.put("x")
    with ExitStack() as stack:
        loan = stack.enter_context(ruled.client.borrow("x", exclusive=True))
        waiters = [stack.enter_context(session_as(ruled.address, ALICE)) for _ in range(WAITERS)]
        for waiter in waiters:
            waiter.send(BORROW, 1, "x", 0, None, "")
        wait_until(lambda: ruled.client.stats()["waiting"] == WAITERS)
        ruled.drain()
        loan.close()
        for waiter in waiters:
            assert waiter.receive() == ([BrokerClosing.code, 1], [])


@pytest.fixture
def hindered(tmp_path: Path) -> Iterator[Ruled]:
    """A broker whose inspections and read-only opens hang until somebody opens a fifo, `go`."""
    os.mkfifo(tmp_path / "go")

    def hinder() -> None:
        def hang(function: Any) -> Any:
            def wait_first(sysfd: int) -> Any:
                with open(tmp_path / "go"):
                    return function(sysfd)

            return wait_first

        descriptors.reopen_read_only = hang(descriptors.reopen_read_only)

    with Ruled(plant=hinder) as broker:
        yield broker


def test_what_is_opened_for_a_client_that_dies_stays_on_its_account(
    hindered: Ruled, tmp_path: Path
) -> None:
    put(hindered.client, "x")
    hindered.set_rules(rule("borrow"))
    with session_as(hindered.address, ALICE) as raw:
        raw.send(BORROW, 1, "x", READONLY, None, "")
        wait_until(lambda: hindered.client.stats()["jobs"] == 1)

    def used() -> dict[str, int]:
        (usage,) = [usage for usage in hindered.client.usage() if usage.uid == ALICE]
        return usage.used

    wait_until(lambda: used()["sessions"] == 0)
    assert used()["closes"] == 1
    with open(tmp_path / "go", "w"):
        wait_until(lambda: ALICE not in {usage.uid for usage in hindered.client.usage()})


def test_drain_does_not_wait_for_a_put_whose_inspection_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")

    def hinder() -> None:
        def hang(sysfd: int) -> Any:
            with open(tmp_path / "go"):
                raise ValueError

        descriptors.inspect = hang

    with Ruled(plant=hinder) as broker:
        broker.set_rules(rule("put"))
        with session_as(broker.address, ALICE, puts=True) as raw, memory() as number:
            raw.send(PUT, 1, "new", 0, fds=[number])
            wait_until(lambda: broker.client.stats()["jobs"] == 1)
            broker.drain()
            # With the broker, which has nothing on loan.
            assert raw.receive() == (None, [])


def test_connection_made_before_the_listener_was_taken_over_is_received_from_by_a_worker(
    tmp_path: Path,
) -> None:
    address = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as bound, ExitStack() as stack:
        bound.bind(address)
        bound.listen(8)
        clients = []
        for _ in range(2):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            sock.connect(address)
            clients.append(sock)
        listener = Listener(address, bound=bound)
        channels = [listener.accept() for _ in clients]
        late = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        late.connect(address)
        channels.append(listener.accept())
        assert [channel.predates_refusal for channel in channels if channel] == [
            *(True, True, False)
        ]
        for channel in channels:
            assert channel is not None
            channel.close()
        listener.close()
