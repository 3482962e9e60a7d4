"""The wire as a stranger speaks it: right, wrong, and out of order.

Whatever comes, it is answered with a typed refusal or ends that one session; another client is
served before, meanwhile and afterwards.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterator
from typing import IO, Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    BORROW,
    CANCEL,
    ENTRIES,
    HELLO,
    LOANS,
    MORE,
    PUT,
    RETIRE,
    RETURN,
    SHARED,
    STATS,
    Peer,
    Raw,
    can_refuse_descriptors,
    hold,
    let_go,
    stopped,
    wait_until,
)

import fdbroker
from fdbroker.errors import by_code

PROTOCOL_ERROR, VERSION_MISMATCH, UNKNOWN_ENTRY, BAD_NAME, TIMEOUT = 60, 61, 21, 20, 25
UNSUPPORTED_KIND, ENTRY_RETIRED = 24, 27


@pytest.fixture
def raw(broker: fdbroker.Broker, data_file: IO[bytes]) -> Iterator[Raw]:
    broker.put("data", data_file)
    with Raw(broker.address, puts=False) as session:
        yield session
    with broker.borrow("data") as loan:  # others are served still
        os.fstat(loan.fileno())


def loans(broker: fdbroker.Client) -> int:
    return broker.stats()["loans"]


# --- seq -------------------------------------------------------------------------------------


def test_a_seq_below_the_last_is_ignored(broker: fdbroker.Broker, raw: Raw) -> None:
    raw.send(STATS, 1)
    raw.receive()
    raw.send(STATS, 2)
    raw.receive()
    raw.send(STATS, 1)
    raw.send(BORROW, 0, "data", *SHARED)
    assert raw.is_silent(broker)
    raw.send(STATS, 3)
    answer, _ = raw.receive()
    assert answer is not None
    assert answer[:2] == [0, 3]


def test_an_equal_seq_is_answered_again_while_its_loan_lives(
    broker: fdbroker.Broker, raw: Raw
) -> None:
    first = raw.borrow(1, "data")
    again = raw.borrow(1, "data")
    assert loans(broker) == 1
    assert os.path.sameopenfile(first, again)
    os.close(first)
    os.close(again)
    raw.send(RETURN, 2)
    raw.send(BORROW, 1, "data", *SHARED)
    raw.send(RETURN, 2)
    assert raw.is_silent(broker)
    assert loans(broker) == 0


def test_a_gap_is_a_fault(broker: fdbroker.Broker, raw: Raw) -> None:
    raw.send(STATS, 2)
    side, reason = raw.is_refused(PROTOCOL_ERROR)
    assert side == "client"
    assert "2" in reason


def test_the_refusal_of_a_fault_has_the_seq_that_is_waited_for(
    broker: fdbroker.Broker, raw: Raw
) -> None:
    raw.send(STATS, 1)
    raw.receive()
    raw.send(LOANS, 2, "x" * 300, 0, 0)
    answer, _ = raw.receive()
    assert answer is not None
    assert answer[:2] == [PROTOCOL_ERROR, 2]


# --- the state of a session ------------------------------------------------------------------


def test_nothing_comes_before_hello(broker: fdbroker.Broker) -> None:
    for message in ([STATS, 0], [BORROW, 0, "data", *SHARED], [HELLO, 1, 1], [RETURN, 0]):
        with Raw(broker.address, hello=False) as raw:
            raw.send(*message)
            raw.is_refused(PROTOCOL_ERROR)


def test_hello_comes_once(raw: Raw) -> None:
    raw.send(HELLO, 1, 1)
    raw.is_refused(PROTOCOL_ERROR)


def test_a_return_needs_a_loan(raw: Raw) -> None:
    raw.send(RETURN, 1)
    raw.is_refused(PROTOCOL_ERROR)


def test_a_session_carries_one_loan(broker: fdbroker.Broker, raw: Raw) -> None:
    os.close(raw.borrow(1, "data"))
    raw.send(BORROW, 2, "data", *SHARED)
    raw.is_refused(PROTOCOL_ERROR)
    assert loans(broker) == 0


@pytest.mark.parametrize(
    "message", [[RETURN, 2], [STATS, 2], [BORROW, 2, "data", *SHARED], [MORE, 2, 0]]
)
def test_who_waits_asks_for_nothing_else(
    broker: fdbroker.Broker, raw: Raw, peer: Peer, message: list[Any]
) -> None:
    peer.call(hold, broker.address, "data", True)
    raw.send(BORROW, 1, "data", *SHARED)
    wait_until(lambda: broker.stats()["waiting"] == 1)
    raw.send(*message)
    raw.is_refused(PROTOCOL_ERROR)
    assert broker.stats()["waiting"] == 0
    peer.call(let_go)


def test_more_needs_a_loan_of_more(broker: fdbroker.Broker, raw: Raw) -> None:
    os.close(raw.borrow(1, "data"))
    raw.send(MORE, 2, 1)
    raw.is_refused(PROTOCOL_ERROR)


def test_cancel_without_a_wait_changes_nothing(broker: fdbroker.Broker, raw: Raw) -> None:
    raw.send(CANCEL, 1)
    os.close(raw.borrow(2, "data"))
    raw.send(CANCEL, 3)
    assert raw.is_silent(broker)
    assert loans(broker) == 1
    raw.send(RETURN, 4)
    assert raw.is_silent(broker)
    assert loans(broker) == 0


@pytest.mark.parametrize("answered", [True, False])
def test_cancel_undoes_the_put_before_it(
    broker: fdbroker.Broker, data_file: IO[bytes], answered: bool
) -> None:
    """Sent before the answer, while a worker looks at the descriptor, and after it."""
    broker.put("data", data_file)
    reader, writer = os.pipe()
    with Raw(broker.address, puts=True) as raw:
        with stopped(broker.pid):
            raw.send(PUT, 1, "undone", 0, fds=[writer])
            if not answered:
                raw.send(CANCEL, 2)
        os.close(writer)
        answer, _ = raw.receive()
        assert answer is not None
        assert answer[:2] == [0, 1]
        if answered:
            raw.send(CANCEL, 2)
        assert os.read(reader, 1) == b""  # an end-of-file: nobody has it open
        os.close(reader)
        assert [entry.name for entry in broker.entries()] == ["data"]
        os.close(raw.borrow(3, "data"))
        raw.send(RETURN, 4)


def test_cancel_ends_a_wait(broker: fdbroker.Broker, raw: Raw, peer: Peer) -> None:
    peer.call(hold, broker.address, "data", True)
    raw.send(BORROW, 1, "data", *SHARED)
    raw.send(CANCEL, 2)
    answer, _ = raw.receive()
    assert answer is not None
    code, seq, name, seconds, holders = answer
    assert (code, seq, name) == (TIMEOUT, 1, "data")
    assert 0 <= seconds < 20
    assert [holder[0] for holder in holders] == [peer.pid]
    peer.call(let_go)
    os.close(raw.borrow(3, "data"))


# --- descriptors in flight -------------------------------------------------------------------


def test_the_second_descriptor_waits_until_the_first_is_read(
    broker: fdbroker.Broker, raw: Raw
) -> None:
    raw.send(BORROW, 1, "data", *SHARED)
    raw.send(RETURN, 2)
    raw.send(BORROW, 3, "data", *SHARED)
    wait_until(lambda: [loan.id.split(".")[1] for loan in broker.loans()] == ["3"])
    first, (number,) = raw.receive()
    os.close(number)
    assert first is not None
    assert first[:2] == [0, 1]
    second, (number,) = raw.receive()
    os.close(number)
    assert second is not None
    assert second[:2] == [0, 3]
    assert loans(broker) == 1


@pytest.mark.parametrize("rounds", [2_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_no_wake_up_is_lost_between_two_descriptors(
    broker: fdbroker.Broker, raw: Raw, rounds: int
) -> None:
    """Pipelining without reading, then reading: the broker notices each read, in time."""
    seq = 0
    for _ in range(rounds):
        raw.send(BORROW, seq + 1, "data", *SHARED)
        raw.send(RETURN, seq + 2)
        raw.send(BORROW, seq + 3, "data", *SHARED)
        raw.send(RETURN, seq + 4)
        for expected in (seq + 1, seq + 3):
            message, (number,) = raw.receive()
            os.close(number)
            assert message is not None
            assert message[1] == expected
        seq += 4


def test_who_goes_without_reading_leaves_nothing(broker: fdbroker.Broker, raw: Raw) -> None:
    for half in (False, True):
        with Raw(broker.address) as other:
            for seq in (1, 3, 5):
                other.send(BORROW, seq, "data", *SHARED)
                other.send(RETURN, seq + 1)
            if half:
                other.sock.shutdown(socket.SHUT_WR)
        wait_until(lambda: loans(broker) == 0)


def test_descriptors_sent_unasked_are_closed(broker: fdbroker.Broker, raw: Raw) -> None:
    for message in ([STATS, 1], [BORROW, 1, "data", *SHARED], [RETURN, 1], ["junk"]):
        reader, writer = os.pipe()
        with Raw(broker.address) as other:
            other.send(*message, fds=[writer, writer])
            os.close(writer)
            other.is_refused(PROTOCOL_ERROR)
            assert os.read(reader, 1) == b""  # an end-of-file: nobody has it open
        os.close(reader)


def test_descriptors_come_only_from_who_said_that_it_puts(
    broker: fdbroker.Broker, raw: Raw
) -> None:
    """Elsewhere the kernel refuses them, where it can: they do not even come to the broker."""
    if not can_refuse_descriptors():
        pytest.skip("SO_PASSRIGHTS is of Linux 6.16: here they come, and are closed")
    reader, writer = os.pipe()
    for hello, message in ((True, [STATS, 1]), (False, [HELLO, 0, 1, True])):
        with Raw(broker.address, hello=hello, puts=False) as other:
            with pytest.raises(PermissionError):
                other.send(*message, fds=[writer])
            other.send(*message)
            answer, _ = other.receive()
            assert answer is not None
            assert answer[0] == 0
    os.close(writer)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_a_put_brings_one_descriptor(broker: fdbroker.Broker, raw: Raw) -> None:
    for count in (0, 2, 253):
        reader, writer = os.pipe()
        with Raw(broker.address) as other:
            other.send(PUT, 1, "name", 0, fds=[writer] * count)
            os.close(writer)
            other.is_refused(PROTOCOL_ERROR)
            assert os.read(reader, 1) == b""
        os.close(reader)
    assert [entry.name for entry in broker.entries()] == ["data"]


def test_a_nameless_entry_ends_with_its_maker(broker: fdbroker.Broker, raw: Raw) -> None:
    """Its ticket is only in the reply: who else could retire it?"""
    reader, writer = os.pipe()
    with Raw(broker.address) as other:
        other.send(PUT, 1, "", 4, fds=[writer])
        os.close(writer)
        other.is_refused(PROTOCOL_ERROR)
    assert os.read(reader, 1) == b""
    os.close(reader)
    assert broker.stats()["entries"] == 1


def test_a_loan_stands_when_a_later_part_of_it_fails(broker: fdbroker.Broker, raw: Raw) -> None:
    """Its borrower has the earlier parts: only it knows when they are closed."""
    reader, writer = os.pipe()
    broker.put("pipe", reader)
    os.close(reader)
    raw.send(BORROW, 1, ["data"] * 253 + ["pipe"], 3, None, "")  # exclusive, read-only
    answer, fds = raw.receive()
    assert answer is not None
    assert (answer[:2], len(fds)) == ([0, 1], 253)
    raw.send(MORE, 2, 253)
    answer, _ = raw.receive()
    assert answer is not None
    assert answer[:2] == [UNSUPPORTED_KIND, 2]
    with pytest.raises(fdbroker.errors.WouldDeadlock):  # this process has it, says the broker
        broker.borrow("data")
    for number in fds:
        os.close(number)
    raw.send(RETURN, 3)
    wait_until(lambda: loans(broker) == 0)
    os.close(writer)


def test_who_puts_and_goes_leaves_nothing(broker: fdbroker.Broker, raw: Raw) -> None:
    reader, writer = os.pipe()
    with Raw(broker.address) as other:
        other.send(PUT, 1, "name", 2, fds=[writer])
        os.close(writer)
    assert os.read(reader, 1) == b""
    os.close(reader)


# --- messages that are none ------------------------------------------------------------------

JUNK = [
    b"\x00",
    b"\x90",
    b"\x91\x00",
    b"\xc1",
    b"\x93\x01",
    b"\xdd\xff\xff\xff\xff",
    b"\x91" * 3000,
    b"\x92\x01\x01trailing",
    b"\x80",
    b"\x92\xa1a\x01",
    b"\x92\x01\xa1a",
    b"\x92\x01\xff",
    b"\x92\xc3\x01",
    b"\x93\x01\x01\xc7\x0c\xff" + bytes(12),
    b"\x93\x01\x01\xd6\xff\xff\xff\xff\xff",
    b"\x93\x01\x01\x81\x90\x90",
    b"\x96\x01\x01\xa1\xff\x00\xc0\xa0",
    bytes(60_000),
    bytes(70_000),
    msgpack.packb([BORROW, 1, "x" * 66_000, *SHARED]),
    msgpack.packb([BORROW, 1, ["data"] * 5000, *SHARED]),
    msgpack.packb([99, 1]),
    msgpack.packb([-1, 1]),
    msgpack.packb([2**64 - 1, 1]),
    msgpack.packb([STATS, 2**53]),
    msgpack.packb([STATS, -1]),
    msgpack.packb([STATS, 1, 1]),
    msgpack.packb([BORROW, 1]),
]


@pytest.mark.parametrize("hello", [True, False])
def test_junk_ends_the_session_with_a_refusal(
    broker: fdbroker.Broker, raw: Raw, hello: bool
) -> None:
    for junk in JUNK:
        with Raw(broker.address, hello=hello) as other:
            other.send_bytes(junk)
            other.is_refused(PROTOCOL_ERROR)


def test_empty_packet_with_a_descriptor_is_the_end(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("data", data_file)
    with Raw(broker.address, puts=True) as raw:
        os.close(raw.borrow(1, "data"))
        reader, writer = os.pipe()
        raw.send_bytes(b"", [writer])
        os.close(writer)
        assert raw.receive() == (None, [])
    assert os.read(reader, 1) == b""
    os.close(reader)
    assert loans(broker) == 0


def test_empty_packet_of_a_session_that_does_not_put_is_the_end(
    broker: fdbroker.Broker, raw: Raw
) -> None:
    os.close(raw.borrow(1, "data"))
    raw.sock.send(b"")
    assert raw.receive() == (None, [])
    assert loans(broker) == 0


VALUES = [
    *(None, True, False, 0, 1, 2, 3, 4, 8, -1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1, -(2**63)),
    *(0.0, 1.5, -0.5, 1e300, float("inf"), float("nan"), "", "data", "x" * 255, "x" * 256, "bad!"),
    *("é" * 200, b"", b"x", b"x" * 16, b"x" * 256, [], ["data"], ["data", None], [[]], [""]),
    *([b"x" * 300], ["data"] * 4097, {}, {"a": 1}, msgpack.ExtType(5, b""), msgpack.Timestamp(1)),
]
GOOD: dict[int, list[Any]] = {
    HELLO: [1],
    BORROW: ["data", 0, 0, ""],
    MORE: [0],
    RETURN: [],
    CANCEL: [],
    PUT: ["new", 0],
    RETIRE: ["none", False, None],
    ENTRIES: [0],
    LOANS: ["", 0, 0],
    STATS: [],
}


@pytest.mark.parametrize("verb", GOOD)
def test_each_field_of_each_verb_with_each_wrong_value(
    broker: fdbroker.Broker, raw: Raw, data_file: IO[bytes], verb: int
) -> None:
    known = by_code()
    answered = refused = 0
    for place in range(len(GOOD[verb])):
        for value in VALUES:
            fields = GOOD[verb].copy()
            fields[place] = value
            with Raw(broker.address, hello=verb != HELLO) as other:
                other.send(
                    *(verb, int(verb != HELLO), *fields),
                    fds=[data_file.fileno()] if verb == PUT else [],
                )
                answer, fds = other.receive()
                for number in fds:
                    os.close(number)
                assert answer is not None, f"no answer to {fields}"
                if answer[0] == PROTOCOL_ERROR:
                    refused += 1
                    assert other.receive() == (None, [])
                elif answer[0]:
                    known[answer[0]](*answer[2:])
                else:
                    answered += 1
            for name in ("new", "x" * 255):
                with contextlib.suppress(fdbroker.errors.UnknownEntry):
                    broker.retire(name)
            if verb == RETIRE and not broker.entries():
                broker.put("data", data_file)
    assert not GOOD[verb] or refused


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
@given(
    junk=st.one_of(
        st.binary(min_size=1, max_size=60),
        st.lists(
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers(-5, 300)
                | st.text(max_size=9)
                | st.floats(),
                lambda deeper: st.lists(deeper, max_size=3),
            ),
            max_size=7,
        ).map(msgpack.packb),
    )
)
def test_any_bytes_are_survived(broker: fdbroker.Broker, raw: Raw, junk: bytes) -> None:
    with Raw(broker.address) as other:
        other.send_bytes(junk)
        with contextlib.suppress(BrokenPipeError):
            other.send(STATS, 1)
        other.sock.shutdown(socket.SHUT_WR)
        last = None
        while (found := other.receive())[0] is not None:
            last = found[0]
            for number in found[1]:
                os.close(number)
        assert last is not None, "neither an answer nor a refusal"


# --- versions --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2, 2**31])
def test_a_client_of_another_version_is_told(broker: fdbroker.Broker, version: int) -> None:
    with Raw(broker.address, hello=False) as raw:
        raw.send(HELLO, 0, version, "and what", "later versions", ["say"])
        assert raw.is_refused(VERSION_MISMATCH) == [version, 1]


# --- pages -----------------------------------------------------------------------------------


def test_pages_list_each_once(broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    names = [f"{'n' * 200}{number:03}" for number in range(150)]
    for name in names:
        broker.put(name, data_file)
    assert sorted(entry.name for entry in broker.entries()) == names
    with broker.borrow_all(names, purpose="p" * 128) as loan:
        assert len(loan.entries) == 150
        assert sorted(found.entry for found in broker.loans()) == names
        assert len({found.id for found in broker.loans()}) == 1
        assert [found.entry for found in broker.loans(names[7])] == [names[7]]


def test_who_never_reads_is_ended(broker: fdbroker.Broker, raw: Raw) -> None:
    """Replies pile up until the kernel takes no more: then the session ends, nobody waits."""
    raw.sock.setblocking(False)
    poll = select.poll()
    poll.register(raw.sock, select.POLLOUT)
    seq = 0
    while not poll.poll(20_000)[0][1] & select.POLLHUP:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            seq += 1
            raw.send(STATS, seq)
    assert seq > 10


def test_a_page_looks_at_so_many_slots_at_most(broker: fdbroker.Broker) -> None:
    """Empty ones too: there may be many, after a time with many entries or sessions."""
    number = os.memfd_create("data")
    for index in range(2100):
        broker.put(f"n{index}", number)
    os.close(number)
    for index in range(2099):
        broker.retire(f"n{index}")
    with Raw(broker.address) as raw:
        wait_until(lambda: broker.stats()["entries"] == 1)
        raw.send(ENTRIES, 1, 0)
        assert raw.receive() == ([0, 1, 2048, []], [])
        raw.send(ENTRIES, 2, 2048)
        (_, _, following, rows), _ = raw.receive()
        assert (following, [row[0] for row in rows]) == (0, ["n2099"])
