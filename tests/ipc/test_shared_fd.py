"""SharedFD: a ticket that pickles."""

from __future__ import annotations

import os
import pickle
from typing import IO

import pytest
import support
from support import Peer, wait_until

import fdbroker
from fdbroker.errors import UnknownTicket


def entries(broker: fdbroker.Client) -> int:
    return broker.stats()["entries"]


def look(ref: fdbroker.SharedFD, times: int) -> bytes:
    found = b""
    for _ in range(times):
        with ref.borrow(purpose="look") as loan:
            found += os.pread(loan.fileno(), 1, 7)
    return found


def unpickle_often(data: bytes, times: int) -> tuple[int, int]:
    before = support.open_files()
    refs = [pickle.loads(data) for _ in range(times)]
    now = support.open_files()
    assert all(isinstance(ref, fdbroker.SharedFD) for ref in refs)
    return len(before), len(now)


def test_it_borrows_in_another_process(
    broker: fdbroker.Broker, data_file: IO[bytes], peer: Peer
) -> None:
    with broker.share(data_file) as ref:
        assert entries(broker) == 1
        assert broker.entries() == []  # it has no name
        assert peer.call(look, ref, 3) == b"\7\7\7"
        assert peer.call(look, ref, 1) == b"\7"
        with ref.borrow() as loan:
            assert loan.entry == ""
            assert [found.entry for found in broker.loans()] == [""]
    wait_until(lambda: entries(broker) == 0)


def test_unpickling_borrows_nothing(
    broker: fdbroker.Broker, data_file: IO[bytes], peer: Peer
) -> None:
    with broker.share(data_file) as ref:
        before, after = peer.call(unpickle_often, pickle.dumps(ref), 50)
        assert before == after
        assert broker.stats()["loans"] == 0
    with broker.share(data_file) as ref:
        again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(ref))))
        again.close()  # not the owner: does nothing
        with again:
            pass
        assert look(again, 1) == b"\7"


def test_after_its_end_the_ticket_is_unknown(
    broker: fdbroker.Broker, data_file: IO[bytes], peer: Peer
) -> None:
    with broker.share(data_file) as ref, ref.borrow() as loan:
        ref.close()
        ref.close()
        os.pread(loan.fileno(), 1, 0)
        with pytest.raises(UnknownTicket):
            ref.borrow()
    with pytest.raises(UnknownTicket):
        peer.call(look, ref, 1)
    wait_until(lambda: entries(broker) == 0)


def test_a_ticket_is_for_one_broker(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    with fdbroker.Broker() as another, broker.share(data_file) as ref:
        address, ticket = ref.__reduce__()[1]
        assert address == broker.address
        foreign = fdbroker.SharedFD(another.address, ticket)
        with pytest.raises(UnknownTicket):
            foreign.borrow()
        forged = fdbroker.SharedFD(broker.address, bytes(16))
        with pytest.raises(UnknownTicket):
            forged.borrow()


def test_closing_it_in_a_forked_child_does_nothing(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    with broker.share(data_file) as ref:
        support.in_fork(ref.close)
        assert look(ref, 1) == b"\7"
        assert support.in_fork(lambda: look(ref, 1)) == b"\7"
    wait_until(lambda: entries(broker) == 0)


def share_and_wait(address: str, path: str) -> bytes:
    client = support.kept["client"] = fdbroker.Client(address)
    with open(path, "rb") as file:
        ref = support.kept["ref"] = client.share(file)
    return pickle.dumps(ref)


def test_the_end_of_its_owner_ends_it(
    broker: fdbroker.Broker, data_file: IO[bytes], peer: Peer
) -> None:
    ref = pickle.loads(peer.call(share_and_wait, broker.address, data_file.name))
    assert look(ref, 1) == b"\7"
    with ref.borrow() as loan:
        peer.kill()
        wait_until(lambda: _is_unknown(ref))
        assert os.pread(loan.fileno(), 1, 7) == b"\7"
    wait_until(lambda: entries(broker) == 0)


def _is_unknown(ref: fdbroker.SharedFD) -> bool:
    try:
        ref.borrow().close()
    except UnknownTicket:
        return True
    return False


def test_exclusive_and_read_only(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    with broker.share(data_file) as ref, ref.borrow(exclusive=True, mode="r", timeout=0) as loan:
        assert os.read(loan.fileno(), 1) == b"\0"


def test_a_broker_that_was_closed_leaves_no_session_of_its_client(data_file: IO[bytes]) -> None:
    """Nothing of a private broker stays open in its owner: the autouse check sees it."""
    with fdbroker.Broker() as private:
        with private.share(data_file) as ref:
            assert look(ref, 1) == b"\7"
        private.put("mine", data_file, ephemeral=True)
        private.borrow("mine").close()
        number = private.borrow("mine").detach()
    os.pread(number, 1, 0)  # that one was given away
    os.close(number)
