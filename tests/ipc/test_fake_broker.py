"""Our client against a broker that breaks the rules, is of another version, or goes away."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from support import BORROW, HELLO, RETURN, STATS, Raw, fake_broker, greet

import fdbroker
from fdbroker.errors import BrokerGone, ProtocolError, TooManyFiles, VersionMismatch
from fdbroker.ipc.client.pool import TRIES


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "fake.sock")


def expect(session: Raw, verb: int) -> int:
    """The next request: its seq."""
    message, fds = session.receive()
    assert message is not None
    assert (message[0], fds) == (verb, [])
    return int(message[1])


def is_over(session: Raw) -> None:
    assert session.receive() == (None, [])


def test_a_newer_broker(address: str) -> None:
    def refuse(session: Raw) -> None:
        assert session.receive() == ([HELLO, 0, 1, False], [])
        session.send(61, 0, 1, 2)

    with fake_broker(address, refuse), fdbroker.Client(address) as client:
        with pytest.raises(VersionMismatch) as caught:
            client.stats()
        assert "speaks version 2" in str(caught.value)
        assert "this client version 1" in str(caught.value)


def test_a_broker_that_answers_as_another_version(address: str) -> None:
    def answer(session: Raw) -> None:
        session.receive()
        session.send(0, 0, 7)
        is_over(session)

    with fake_broker(address, answer), fdbroker.Client(address) as client:
        with pytest.raises(VersionMismatch) as caught:
            client.stats()
        assert caught.value.data == (1, 7)


def test_an_end_before_the_answer_to_hello_means_once_more(address: str) -> None:
    def hang_up(session: Raw) -> None:
        session.receive()

    def hang_up_at_once(session: Raw) -> None:
        pass

    def serve(session: Raw) -> None:
        greet(session)
        session.send(0, expect(session, STATS), [["loans", 5]])

    scripts = (hang_up, hang_up_at_once, hang_up, serve)
    with fake_broker(address, *scripts), fdbroker.Client(address) as client:
        assert client.stats() == {"loans": 5}


def test_it_does_not_try_for_ever(address: str) -> None:
    def hang_up(session: Raw) -> None:
        session.receive()

    with fake_broker(address, *[hang_up] * 10), fdbroker.Client(address) as client:
        with pytest.raises(BrokerGone) as caught:
            client.stats()
        assert caught.value.address == address


def test_an_idle_session_that_has_ended_is_replaced(address: str) -> None:
    def serve(session: Raw) -> None:
        greet(session)
        session.send(0, expect(session, STATS), [["loans", 0]])

    with fake_broker(address, serve, serve), fdbroker.Client(address) as client:
        client.stats()
        poll = select.poll()
        poll.register(client._pool.idle[0].link, select.POLLIN)
        assert poll.poll(20_000)[0][1] & select.POLLHUP
        client.stats()


def test_an_end_in_the_middle_of_a_request(address: str) -> None:
    def serve(session: Raw) -> None:
        greet(session)
        expect(session, STATS)

    with (
        fake_broker(address, serve),
        fdbroker.Client(address) as client,
        pytest.raises(BrokerGone),
    ):
        client.stats()


def refused_loan(
    address: str, script: Callable[[Raw, int, int], object], kind: type[Exception]
) -> None:
    """Borrow from a broker that plays `script(session, seq, a descriptor)`."""
    reader, writer = os.pipe()

    def serve(session: Raw) -> None:
        os.close(reader)
        greet(session)
        script(session, expect(session, BORROW), writer)
        os.close(writer)
        is_over(session)

    with fake_broker(address, serve), fdbroker.Client(address) as client:
        os.close(writer)
        with pytest.raises(kind):
            client.borrow("data")
        assert os.read(reader, 1) == b"", "a descriptor that came is still open"
    os.close(reader)


@pytest.mark.parametrize("promised", [0, 1])
def test_more_descriptors_than_promised(address: str, promised: int) -> None:
    refused_loan(
        address,
        lambda session, seq, fd: session.send(0, seq, 1, promised, 5, fds=[fd] * (promised + 1)),
        ProtocolError,
    )


@pytest.mark.parametrize(("promised", "sent"), [(1, 0), (2, 1)])
def test_fewer_descriptors_than_promised(address: str, promised: int, sent: int) -> None:
    refused_loan(
        address,
        lambda session, seq, fd: session.send(0, seq, promised, promised, 5, fds=[fd] * sent),
        TooManyFiles,
    )


@pytest.mark.parametrize(
    "reply",
    [
        [0],
        [0, 1],
        [0, 1, 1],
        [0, 1, "x", 1, 5],
        [0, 1, 1, "x", 5],
        [0, 1, None, None, None],
        [0, 1, 0, 0, 0],
        [0, 1, 2, 0, 0],
        [9999, 1],
        [21, 1],
        [21, 1, "a", [], "too", "many"],
        ["x", 1],
        {"a": 1},
        "x" * 5000,
    ],
)
def test_a_reply_that_is_none(address: str, reply: object) -> None:
    def script(session: Raw, seq: int, fd: int) -> None:
        import msgpack

        fds = [fd] if isinstance(reply, list) and reply[:2] == [0, 1] and 1 in reply[2:] else []
        session.send_bytes(msgpack.packb(reply), fds)

    refused_loan(address, script, ProtocolError)


def test_replies_to_another_seq_are_passed_over(address: str, data_file: IO[bytes]) -> None:
    reader, writer = os.pipe()

    def serve(session: Raw) -> None:
        os.close(reader)
        greet(session)
        seq = expect(session, BORROW)
        session.send(0, seq - 1, 1, 1, 5, fds=[writer])
        session.send(0, seq + 1, 1, 1, 5, fds=[writer, writer])
        session.send(21, seq + 7, "data", [], fds=[writer])
        session.send(0, seq, 1, 1, 5, fds=[data_file.fileno()])
        os.close(writer)
        assert expect(session, RETURN) == seq + 1
        is_over(session)

    with fake_broker(address, serve), fdbroker.Client(address) as client:
        os.close(writer)
        with client.borrow("data") as loan:
            assert os.path.sameopenfile(loan.fileno(), data_file.fileno())
            assert os.read(reader, 1) == b"", "an unasked descriptor is still open"
    os.close(reader)


def test_descriptors_with_a_reply_that_has_none(address: str) -> None:
    reader, writer = os.pipe()

    def serve(session: Raw) -> None:
        os.close(reader)
        greet(session)
        session.send(0, expect(session, STATS), [["loans", 1]], fds=[writer] * 3)
        session.send(99, 100)  # it is unsolicited, too
        os.close(writer)
        is_over(session)

    with fake_broker(address, serve), fdbroker.Client(address) as client:
        os.close(writer)
        assert client.stats() == {"loans": 1}
        assert os.read(reader, 1) == b""
    os.close(reader)


def test_the_second_part_of_many_is_refused(address: str) -> None:
    """The first part is closed again, and the session ends: that returns the loan."""
    reader, writer = os.pipe()

    def serve(session: Raw) -> None:
        os.close(reader)
        greet(session)
        seq = expect(session, BORROW)
        session.send(0, seq, 2, 1, 5, fds=[writer])
        os.close(writer)
        message, _ = session.receive()
        assert message == [2, seq + 1, 1]
        session.send(33, seq + 1)
        is_over(session)

    with fake_broker(address, serve), fdbroker.Client(address) as client:
        os.close(writer)
        with pytest.raises(fdbroker.errors.TooManyInFlight):
            client.borrow_all(["a", "b"])
        assert os.read(reader, 1) == b""
    os.close(reader)


def test_a_session_that_died_with_a_return_unread_is_replaced(
    address: str, data_file: IO[bytes]
) -> None:
    """The kernel says ECONNRESET then, and not EPIPE; the request was not sent in either case."""

    def lend_and_go(session: Raw) -> None:
        greet(session)
        seq = expect(session, BORROW)
        session.send(0, seq, 1, 1, 5, fds=[data_file.fileno()])
        select.select([session.sock], [], [])  # the RETURN is there, and stays unread

    def lend(session: Raw) -> None:
        greet(session)
        seq = expect(session, BORROW)
        session.send(0, seq, 1, 1, 5, fds=[data_file.fileno()])
        expect(session, RETURN)

    with fake_broker(address, lend_and_go, lend), fdbroker.Client(address) as client:
        client.borrow("data").close()
        (idle,) = client._pool.idle
        select.select([idle.link], [], [])  # its end
        client.borrow("data").close()


@pytest.mark.parametrize("asks", ["borrow", "stats", "put"])
def test_a_broker_that_greets_and_hangs_up_is_given_up(
    address: str, data_file: IO[bytes], asks: str
) -> None:
    def hang_up(session: Raw) -> None:
        """Before a request can come: so it was not sent, and is sent to another session."""
        session.receive()
        session.sock.shutdown(socket.SHUT_RD)
        session.send(0, 0, 1)
        is_over(session)

    with fake_broker(address, *[hang_up] * TRIES), fdbroker.Client(address) as client:
        ask = {
            "borrow": lambda: client.borrow("data"),
            "stats": client.stats,
            "put": lambda: client.put("data", data_file),
        }[asks]
        with pytest.raises(BrokerGone) as caught:
            ask()
        assert caught.value.address == address
