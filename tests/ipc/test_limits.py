"""Many descriptors at once, and a process that has no room for them."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
import support
from support import BORROW, MORE, Peer, Raw, wait_until

import fdbroker
from fdbroker.errors import TooManyFiles

NAMES = [f"n{number}" for number in range(300)]


@pytest.fixture(autouse=True)
def entries(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    for name in NAMES:
        broker.put(name, data_file)


def test_300_names_come_in_two_messages(broker: fdbroker.Broker) -> None:
    with Raw(broker.address) as raw:
        raw.send(BORROW, 1, NAMES, 0, None, "")
        message, fds = raw.receive()
        assert message is not None
        assert (message[:4], len(fds)) == ([0, 1, 300, 253], 253)
        for number in fds:
            os.close(number)
        raw.send(MORE, 2, 253)
        message, fds = raw.receive()
        assert message is not None
        assert (message[:4], len(fds)) == ([0, 2, 300, 47], 47)
        for number in fds:
            os.close(number)
        assert len(broker.loans()) == 300


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_our_client_takes_two_messages_with_descriptors(
    broker: fdbroker.Broker, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    code = (
        "import sys, fdbroker; client = fdbroker.Client(sys.argv[1])\n"
        "with client.borrow_all([f'n{n}' for n in range(300)]) as loan:\n"
        "    assert len({loan.fileno(name) for name in loan.entries}) == 300"
    )
    path = os.path.dirname(os.path.dirname(fdbroker.__file__))
    subprocess.run(
        ["strace", "-o", trace, "-e", "trace=recvmsg", sys.executable, "-c", code, broker.address],
        check=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    calls = trace.read_text().splitlines()
    assert sum("SCM_RIGHTS" in call for call in calls) == 2
    assert all("MSG_CMSG_CLOEXEC" in call for call in calls if "SCM_RIGHTS" in call)


def borrow_with_room_for(address: str, room: int) -> tuple[tuple[object, ...], int, int, int]:
    """(the error's data, the limit, descriptors before, after), then the same with room enough."""
    client = fdbroker.Client(address)
    client.stats()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = support.open_files()
    limit = max(before) + 1 + room
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    data: tuple[object, ...] = ()
    try:
        with client.borrow_all(NAMES):
            pass
    except TooManyFiles as error:
        data = error.data
    after = support.open_files()
    client.stats()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with client.borrow_all(NAMES) as loan:
        assert len({loan.fileno(name) for name in NAMES}) == 300
    client.close()
    return data, limit, len(before), len(after)


@pytest.mark.parametrize("room", [0, 1, 100, 252, 253, 254, 270, 299])
def test_no_room_for_the_next_one(broker: fdbroker.Broker, peer: Peer, room: int) -> None:
    data, limit, before, after = peer.call(borrow_with_room_for, broker.address, room)
    side, said_limit, used = data
    assert (side, said_limit) == ("client", limit)
    assert isinstance(used, int)
    assert before <= used <= limit
    assert after <= before  # the session has ended: nothing else is open, or gone
    wait_until(lambda: broker.stats()["loans"] == 0)


def test_exactly_enough_room(broker: fdbroker.Broker, peer: Peer) -> None:
    data, _, before, after = peer.call(borrow_with_room_for, broker.address, 300)
    assert data == ()
    assert before == after


def borrow_one_by_one(address: str) -> int:
    client = fdbroker.Client(address)
    client.stats()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = support.open_files()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before) + 4, hard))
    held = [client.borrow("n0"), client.borrow("n1")]  # each of the two has a session
    refused = 0
    for _ in range(5):
        try:
            client.borrow("n2").close()
        except TooManyFiles as error:  # of the descriptor, or of the next session's socket
            refused += error.side == "client"
    for loan in held:
        loan.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    client.close()
    assert len(support.open_files()) < len(before)
    return refused


def test_no_number_for_a_session(broker: fdbroker.Broker, peer: Peer) -> None:
    assert peer.call(borrow_one_by_one, broker.address) == 5
    wait_until(lambda: broker.stats()["loans"] == 0)
