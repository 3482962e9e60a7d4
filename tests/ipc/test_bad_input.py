"""What users get wrong: each has its error, and nothing is lost or leaked by it."""

from __future__ import annotations

import copy
import ctypes
import os
import pickle
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import msgpack
import pytest
import support
from support import BORROW, PUT, SHARED, Peer, Raw, wait_until

import fdbroker
from fdbroker.daemon.serve import serve
from fdbroker.errors import (
    AlreadyServing,
    BadAddress,
    BadName,
    NameTaken,
    NoBroker,
    NotPermitted,
    ProtocolError,
    UnknownEntry,
    UnsupportedKind,
)

BAD_NAMES = ["", " ", "a b", "a\n", "é", "a\0", "x" * 256, "x" * 70_000, "\ud800", "a:b", "\u202e"]
GOOD_NAMES = ["a", "x" * 255, "a/b", "/dev/ttyUSB0", "_", "-", "web@8000", ".."]


def test_an_unknown_name_is_answered_with_the_nearest(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    for name in ("web", "camera"):
        broker.put(name, data_file)
    with pytest.raises(UnknownEntry, match=r'no entry "wbe" \(did you mean "web"') as caught:
        broker.borrow("wbe")
    assert caught.value.name == "wbe"
    assert caught.value.nearest[0] == "web"
    with pytest.raises(UnknownEntry, match="put\\(\\) it first"):
        broker.borrow("zzzzzzzz")
    with pytest.raises(UnknownEntry, match="did you mean"):
        broker.retire("camra")
    with pytest.raises(LookupError):
        broker.borrow_all(["web", "nothing"])
    assert broker.stats()["loans"] == 0


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name(broker: fdbroker.Broker, data_file: IO[bytes], name: str) -> None:
    broker.put("good", data_file)
    for verb in (
        lambda: broker.put(name, data_file),
        lambda: broker.borrow(name),
        lambda: broker.borrow_all(["good", name]),
        lambda: broker.retire(name),
    ):
        with pytest.raises(BadName) as caught:
            verb()
        assert caught.value.name == name
        assert str(caught.value).isprintable()
    broker.borrow("good", exclusive=True, timeout=5).close()


@pytest.mark.parametrize("name", ["", " ", "a\n", "é"])
def test_a_bad_name_from_a_client_that_does_not_look(
    broker: fdbroker.Broker, data_file: IO[bytes], name: str
) -> None:
    for message, fds in (([PUT, 1, name, 0], [data_file.fileno()]), ([BORROW, 1, [name], 0], [])):
        with Raw(broker.address) as raw:
            raw.send(*message, *SHARED[1:] * (not fds), fds=fds)
            assert raw.receive() == ([20, 1, name], [])


def test_good_names(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    for name in GOOD_NAMES:
        broker.put(name, data_file)
        broker.borrow(name).close()
    assert sorted(entry.name for entry in broker.entries()) == sorted(GOOD_NAMES)


def test_a_name_that_is_taken(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    reader, writer = os.pipe()
    broker.put("web", data_file)
    with pytest.raises(NameTaken):
        broker.put("web", writer)
    os.close(writer)
    assert os.read(reader, 1) == b""  # what was refused is closed
    os.close(reader)


def test_what_is_true_will_do_as_a_flag(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file, ephemeral=3, replace="yes")  # type: ignore[arg-type]
    with broker.borrow("data", exclusive=2):  # type: ignore[arg-type]
        (loan,) = broker.loans("data")
        assert loan.exclusive


@pytest.mark.parametrize("size", [0, 15, 17, 300])
def test_a_ticket_of_another_length(broker: fdbroker.Broker, size: int) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        broker.borrow_ticket(bytes(size))
    with pytest.raises(ValueError, match="16 bytes"):
        broker.retire(bytes(size))


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout": -1},
        {"timeout": float("nan")},
        {"purpose": "x" * 129},
        {"purpose": "é" * 65},
        {"purpose": "\ud800"},
        {"purpose": "two\nlines"},
    ],
)
def test_a_bad_argument_is_a_value_error(
    broker: fdbroker.Broker, data_file: IO[bytes], wrong: dict[str, Any]
) -> None:
    broker.put("data", data_file)
    with pytest.raises(ValueError, match=r"timeout|purpose"):
        broker.borrow("data", **wrong)
    if "timeout" in wrong:
        with pytest.raises(ValueError, match="timeout"):
            broker.retire("data", wait=True, **wrong)
    broker.borrow("data", timeout=10**9, purpose="x" * 128).close()


def test_wrong_types_are_type_errors(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("data", data_file)
    wrongs: list[Any] = [
        lambda: broker.borrow(5),  # type: ignore[arg-type]
        lambda: broker.borrow(None),  # type: ignore[arg-type]
        lambda: broker.borrow_all([None]),  # type: ignore[list-item]
        lambda: broker.borrow_all("data"),
        lambda: broker.borrow_ticket("data"),  # type: ignore[arg-type]
        lambda: broker.borrow("data", timeout="1"),  # type: ignore[arg-type]
        lambda: broker.borrow("data", purpose=1),  # type: ignore[arg-type]
        lambda: broker.borrow("data", purpose=None),  # type: ignore[arg-type]
        lambda: broker.retire(5),  # type: ignore[arg-type]
        lambda: broker.loans(5),  # type: ignore[arg-type]
        lambda: broker.put("x", "data"),  # type: ignore[arg-type]
        lambda: broker.put("x", True),
        lambda: broker.put(1, data_file),  # type: ignore[arg-type]
        lambda: copy.copy(broker),
        lambda: pickle.dumps(broker),
    ]
    for wrong in wrongs:
        with pytest.raises((TypeError, AttributeError)):
            wrong()
    assert broker.stats()["entries"] == 1
    assert broker.stats()["loans"] == 0


def test_other_numbers_will_do_as_a_timeout(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    numpy = pytest.importorskip("numpy")
    broker.put("data", data_file)
    for timeout in (True, 1, 0.5, 10**9, 1e300, float("inf"), numpy.float32(1), numpy.int64(3)):
        broker.borrow("data", timeout=timeout).close()


def test_too_many_names_at_once(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    broker.put("d", data_file)
    with pytest.raises(ValueError, match="at least one"):
        broker.borrow_all([])
    with pytest.raises(ValueError, match="4096"):
        broker.borrow_all(["d"] * 4097)
    with pytest.raises(ValueError, match="bytes"):
        broker.borrow_all(["x" * 255] * 300)
    broker.borrow_all(["d"] * 300).close()


@pytest.mark.parametrize("puts", [False, True])
def test_a_message_that_is_too_long_is_none(broker: fdbroker.Broker, puts: bool) -> None:
    """Also if as much of it as a message may have is a good one."""
    longest = msgpack.packb([BORROW, 1, ["x" * 20] * 3118, 0, None, "p" * 48])
    assert len(longest) == 65_536
    with Raw(broker.address, puts=puts) as raw:
        raw.send_bytes(longest)
        message, _ = raw.receive()
        assert message is not None
        assert message[0] == UnknownEntry.code
    for more in (b"\0", b"\xc0" * 1000):
        with Raw(broker.address, puts=puts) as raw:
            raw.send_bytes(longest + more)
            assert raw.is_refused(ProtocolError.code)[1] == "a message has at most 65536 bytes"


def test_closed_and_negative_descriptors(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    number = os.dup(data_file.fileno())
    os.close(number)
    for wrong in (number, -1):
        with pytest.raises(OSError, match="Bad file descriptor"):
            broker.put("data", wrong)
    file = open(os.devnull)  # noqa: SIM115
    file.close()
    with pytest.raises(ValueError, match="closed"):
        broker.put("data", file)
    assert broker.entries() == []


def wrong_kinds(stack: ExitStack, folder: Path) -> Iterator[tuple[str, str, int]]:
    def opened(number: int) -> int:
        stack.callback(os.close, number)
        return number

    yield "directory", "openat", opened(os.open(folder, os.O_RDONLY))
    yield "path", "O_PATH", opened(os.open(folder, os.O_PATH))
    yield "path", "O_PATH", opened(os.open(os.devnull, os.O_PATH))
    epoll = stack.enter_context(select.epoll())
    yield "epoll", "registrations", epoll.fileno()
    for type in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
        for end in socket.socketpair(socket.AF_UNIX, type):
            stack.callback(end.close)
            yield "connected unix socket", "carry descriptors", end.fileno()
    ring = ctypes.CDLL(None, use_errno=True).syscall(425, 4, (ctypes.c_uint32 * 30)())
    if ring >= 0:  # io_uring_setup(2), where the kernel lets us
        yield "io uring", "memory", opened(ring)


def test_kinds_that_are_refused(broker: fdbroker.Broker, tmp_path: Path) -> None:
    with ExitStack() as stack:
        for kind, reason, number in wrong_kinds(stack, tmp_path):
            with pytest.raises(UnsupportedKind, match=reason) as caught:
                broker.put("it", number)
            assert caught.value.kind == kind
            with pytest.raises(UnsupportedKind):
                broker.share(number)
        assert broker.entries() == []


def test_nobody_serves_there(tmp_path: Path, data_file: IO[bytes]) -> None:
    address = str(tmp_path / "broker.sock")
    for make in (lambda: None, lambda: open(address, "w").close(), lambda: stale_socket(address)):
        make()
        with fdbroker.Client(address) as client:
            for verb in (
                lambda client=client: client.borrow("data"),
                lambda client=client: client.put("data", data_file),
                client.entries,
            ):
                with pytest.raises(NoBroker, match="start one there") as caught:
                    verb()
                assert caught.value.address == address
        if os.path.exists(address):
            os.unlink(address)
    with fdbroker.Client(f"{data_file.name}/x") as client, pytest.raises(NoBroker):
        client.stats()


def stale_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another uid")
def test_a_socket_that_others_must_not_open(broker: fdbroker.Broker) -> None:
    """The default mode: the kernel itself refuses, before the broker is asked."""

    def ask() -> None:
        os.setuid(65534)
        with fdbroker.Client(broker.address) as client:
            client.stats()

    with pytest.raises(NotPermitted) as caught:
        support.in_fork(ask)
    assert caught.value.data == (65534, "connect", "*")


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    for address in (str(tmp_path / ("x" * 108)), "/tmp/" + "é" * 60, "", "a\0b"):
        with fdbroker.Client(address) as client, pytest.raises(BadAddress):
            client.stats()
        with pytest.raises(BadAddress):
            serve(address)


def test_a_path_of_the_greatest_length(data_file: IO[bytes]) -> None:
    """107 bytes (sun_path less its NUL) will do, for the broker and for its client."""
    folder = "/tmp/fdbroker-" + "x" * (107 - len("/tmp/fdbroker-") - len("/s"))
    address = f"{folder}/s"
    assert len(address) == 107
    os.mkdir(folder, 0o700)
    try:
        with Peer() as broker:
            broker.start(serve, address)
            with fdbroker.Client(address) as client:
                wait_until(lambda: _serves(client))
            broker.kill()
    finally:
        for name in os.listdir(folder):
            os.unlink(f"{folder}/{name}")
        os.rmdir(folder)


def _serves(client: fdbroker.Client) -> bool:
    try:
        return client.stats()["sessions"] == 1
    except NoBroker:
        return False


def test_a_second_broker_is_refused_and_a_dead_one_replaced(tmp_path: Path) -> None:
    address = str(tmp_path / "broker.sock")
    with fdbroker.Client(address) as client:
        for _ in range(2):  # the second time a stale socket file is there
            with Peer() as first:
                first.start(serve, address)
                wait_until(lambda: _serves(client))
                with pytest.raises(AlreadyServing) as caught:
                    serve(address)
                assert caught.value.data == (address,)
                assert _serves(client)
                first.kill()
            assert os.path.exists(address)
