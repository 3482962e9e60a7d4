"""A socket that listens is lent only where a rule says so, since whoever has it can end it for all:
asked by hand, also in ways that a broker which remembers its clients' words could fall for."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
from ruled import ALICE, BOB, Alike, Ruled, ask_as, memory, rule, session_as
from support import BORROW, LOANS, PUT, RETURN, SHARED, Raw, in_fork, wait_until

import fdbroker
from fdbroker.errors import NotPermitted
from fdbroker.ipc.protocol.messages import REPLACE
from fdbroker.lender.rules import VERBS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs other uids")

NOT_PERMITTED, RETIRED, UNKNOWN = 29, 27, 21
EXCLUSIVE, READONLY = 1, 2  # flags of BORROW
REFUSED = [NOT_PERMITTED, ALICE, "listen", "web"]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture
def alice(ruled: Ruled) -> Iterator[Alike]:
    """A session of somebody else, made by hand; some rule admits it."""
    ruled.set_rules(rule())
    with session_as(ruled.address, ALICE) as raw:
        yield Alike(raw)


# --- what it is about -------------------------------------------------------------------------


def tcp(stack: ExitStack) -> socket.socket:
    return stack.enter_context(socket.create_server(("127.0.0.1", 0)))


def tcp_to_be(stack: ExitStack) -> socket.socket:
    """It is bound, and will listen later: as servers do that bind first."""
    sock = stack.enter_context(socket.socket())
    sock.bind(("127.0.0.1", 0))
    return sock


def unix(kind: int) -> Callable[[ExitStack], socket.socket]:
    def make(stack: ExitStack) -> socket.socket:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
        sock.bind("")  # autobind: an abstract name (unix(7))
        sock.listen()
        return sock

    return make


def vsock(stack: ExitStack) -> socket.socket:
    try:
        sock = stack.enter_context(socket.socket(socket.AF_VSOCK))
        sock.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        sock.listen()
    except OSError as error:
        pytest.skip(f"no vsock here: {error}")
    return sock


LISTENING = {
    "tcp": tcp,
    "tcp to be": tcp_to_be,
    "unix stream": unix(socket.SOCK_STREAM),
    "unix seqpacket": unix(socket.SOCK_SEQPACKET),
    "vsock": vsock,
}


@pytest.mark.parametrize("make", LISTENING.values(), ids=LISTENING)
def test_it_takes_a_rule_that_says_so(
    ruled: Ruled, alice: Alike, stack: ExitStack, make: Callable[[ExitStack], socket.socket]
) -> None:
    ruled.client.put("web", make(stack))
    everything = rule(*VERBS)
    for rules, answer in (
        ((everything,), REFUSED),
        ((rule("borrow", mode="r"),), [NOT_PERMITTED, ALICE, "borrow", "web"]),
        ((everything, rule("borrow", names=("db",), listeners=True)), REFUSED),
        ((everything, rule("borrow", uid=BOB, listeners=True)), REFUSED),
        ((everything, rule("list", listeners=True)), REFUSED),
        ((everything, rule("borrow", names=("w*",), listeners=True)), []),
        ((rule("borrow", everyone=True, listeners=True),), []),
        ((everything,), REFUSED),
    ):
        ruled.set_rules(*rules)
        for _ in range(3):  # also when the broker knows the words
            assert alice.borrow("web") == answer
    assert [line for line in ruled.refusals() if "listen" in line] == [
        f"{ALICE} verb=listen name=web"
    ] * 15


def test_what_does_not_listen_takes_none(ruled: Ruled, alice: Alike, stack: ExitStack) -> None:
    server = tcp(stack)
    ruled.client.put("connected", stack.enter_context(closing_connection(server)))
    ruled.client.put("datagrams", stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)))
    ruled.put("memory")
    ruled.set_rules(rule("borrow"))
    for name in ("connected", "datagrams", "memory"):
        assert alice.borrow(name) == []


def closing_connection(server: socket.socket) -> Any:
    return closing(socket.create_connection(server.getsockname()))


def test_in_no_mode_and_no_company(
    ruled: Ruled, alice: Alike, listener: socket.socket, stack: ExitStack
) -> None:
    """Nothing of it is on loan or in the line, not even for the instant of a refusal."""
    ruled.client.put("web", listener)
    ruled.put("db", "log")
    ruled.set_rules(rule("borrow"))
    requests: list[tuple[Any, int, float | None]] = [
        ("web", flags, timeout)
        for flags in (0, EXCLUSIVE, READONLY, EXCLUSIVE | READONLY)
        for timeout in (None, 0, 5)
    ]
    requests += [(["db", "web"], 0, None), (["web"], 0, None), (["web", "db", "web"], EXCLUSIVE, 1)]
    stack.enter_context(ruled.client.borrow("db", exclusive=True))
    for request in requests:
        assert alice.borrow(*request) == REFUSED
    stats = ruled.client.stats()
    assert (stats["waiting"], stats["loans"]) == (0, 1)
    ruled.client.borrow("web", exclusive=True, timeout=0).close()
    assert alice.borrow("log") == []


def test_the_library_says_what_to_write(ruled: Ruled, listener: socket.socket) -> None:
    ruled.client.put("web", listener)
    ruled.set_rules(rule("borrow"))
    with pytest.raises(NotPermitted) as caught:
        ask_as(ruled.address, lambda client: client.borrow("web"))
    assert caught.value.data == (ALICE, "listen", "web")
    assert str(caught.value) == (
        f'uid {ALICE} may not borrow "web", a socket that listens, which it could end for all: '
        f'a rule with uid = {ALICE}, names = ["web"], verbs = ["borrow"], listeners = true would '
        "allow it"
    )


def test_that_is_why(ruled: Ruled, listener: socket.socket) -> None:
    """Who is allowed to has it in its hands."""
    ruled.client.put("web", listener)
    ruled.set_rules(rule("borrow", listeners=True))

    def end_it(client: fdbroker.Client) -> None:
        with client.borrow("web") as loan, loan.as_socket() as sock:
            sock.shutdown(socket.SHUT_RDWR)

    ask_as(ruled.address, end_it)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(listener.getsockname())


def test_the_brokers_own_uid_and_root_need_no_rule(listener: socket.socket) -> None:
    with Ruled(own_uid=BOB) as ruled:
        ruled.client.put("web", listener)
        ruled.set_rules(rule("borrow"))
        for uid in (0, BOB):
            ask_as(ruled.address, lambda client: client.borrow("web").close(), uid=uid)
        with pytest.raises(NotPermitted):
            ask_as(ruled.address, lambda client: client.borrow("web"))


def test_to_put_one_takes_no_more_than_to_put(ruled: Ruled, listener: socket.socket) -> None:
    """Who puts it has it already; a ticket for it is for whom its maker gives it to."""
    ruled.set_rules(rule("borrow", "put"), rule(uid=BOB))
    ask_as(ruled.address, lambda client: client.put("web", listener) and None)
    with pytest.raises(NotPermitted):
        ask_as(ruled.address, lambda client: client.borrow("web"))
    with ruled.client.share(listener) as ref:
        ticket = ref._ticket
        ask_as(ruled.address, lambda client: client.borrow_ticket(ticket).close(), uid=BOB)
        with session_as(ruled.address, ALICE) as raw:
            alice = Alike(raw)
            assert alice.borrow([ticket]) == []
            assert alice.borrow([ticket, "web"]) == REFUSED


def test_who_may_not_borrow_it_does_not_learn_that_it_listens(
    ruled: Ruled, alice: Alike, listener: socket.socket
) -> None:
    ruled.client.put("web", listener)
    ruled.put("memory")
    ruled.set_rules(rule("borrow", names=("mine",), listeners=True), rule(*VERBS - {"borrow"}))
    for name in ("web", "memory", "gone"):
        refused = [NOT_PERMITTED, ALICE, "borrow", name]
        for names in (name, [name], ["mine", name]):
            for flags in (0, EXCLUSIVE, READONLY):
                assert alice.borrow(names, flags) == refused
    ruled.set_rules(rule("borrow", names=("web",)))
    assert alice.borrow(["web", "memory"]) == [NOT_PERMITTED, ALICE, "borrow", "memory"]


# --- a name that becomes one ------------------------------------------------------------------


def replaced(ruled: Ruled, listener: socket.socket) -> None:
    ruled.client.put("web", listener, replace=True)


def retired_and_put(ruled: Ruled, listener: socket.socket) -> None:
    ruled.client.retire("web")
    ruled.client.put("web", listener)


def put_by_another(ruled: Ruled, listener: socket.socket) -> None:
    def put_it() -> None:
        with session_as(ruled.address, BOB, puts=True) as raw:
            raw.send(PUT, 1, "web", REPLACE, fds=[listener.fileno()])
            message, _ = raw.receive()
            assert message is not None
            assert message[0] == 0

    in_fork(put_it)


@pytest.mark.parametrize("becomes", [replaced, retired_and_put, put_by_another])
def test_what_was_said_of_the_one_before_it_is_no_way_to_it(
    ruled: Ruled, listener: socket.socket, becomes: Callable[[Ruled, socket.socket], None]
) -> None:
    """The broker knows these bytes as those of a request that it has granted, of others too who
    have the same rights, and from several sessions, alone and among others."""
    ruled.put("web", "db")
    ruled.set_rules(rule("borrow", everyone=True), rule("put", "retire", uid=BOB))
    with (
        session_as(ruled.address, ALICE) as one,
        session_as(ruled.address, ALICE) as two,
        session_as(ruled.address, ALICE + 10_000) as three,
    ):
        sessions = {Alike(one): ALICE, Alike(two): ALICE, Alike(three): ALICE + 10_000}
        requests: list[tuple[Any, ...]] = [
            ("web",),
            ("web", EXCLUSIVE),
            ("web", READONLY),
            ("web", 0, 1.5),
            (["db", "web"],),
        ]
        for request in requests * 3:
            for session in sessions:
                assert session.borrow(*request) == []
        becomes(ruled, listener)
        for request in requests * 2:
            for session, uid in sessions.items():
                assert session.borrow(*request) == [NOT_PERMITTED, uid, "listen", "web"]
        for session in sessions:
            assert session.borrow("db") == []
        ruled.put("log")
        with memory() as number:
            ruled.client.put("web", number, replace=True)
        for session in sessions:
            assert session.borrow("web") == []


def test_between_two_of_its_words(ruled: Ruled, alice: Alike, listener: socket.socket) -> None:
    """Its next request is on its way already when the name becomes one, in one turn of the loop."""
    ruled.put("web")
    ruled.set_rules(rule("borrow"))
    for _ in range(3):
        assert alice.borrow("web") == []
    for _ in range(20):
        answer, (number,) = alice.ask(BORROW, "web", *SHARED)
        assert answer[0] == 0
        os.close(number)
        ruled.client.put("web", listener, replace=True)
        alice.send(RETURN)  # after it the broker looks for one more
        assert alice.borrow("web") == REFUSED
        with memory() as number:
            ruled.client.put("web", number, replace=True)
        assert alice.borrow("web") == []


def test_who_waits_for_the_one_before_it_is_not_given_it(
    ruled: Ruled, alice: Alike, listener: socket.socket
) -> None:
    ruled.put("web")
    ruled.set_rules(rule("borrow"))
    with ruled.client.borrow("web", exclusive=True):
        alice.send(BORROW, "web", *SHARED)
        wait_until(lambda: ruled.client.stats()["waiting"] == 1)
        ruled.client.put("web", listener, replace=True)
        message, fds = alice.raw.receive()
    assert (message, fds) == ([RETIRED, 1, "web"], [])
    assert alice.borrow("web") == REFUSED


def test_a_name_that_is_not_there_yet(ruled: Ruled, alice: Alike, listener: socket.socket) -> None:
    ruled.set_rules(rule("borrow"))
    for _ in range(3):
        assert alice.borrow("web")[0] == UNKNOWN
    ruled.client.put("web", listener)
    assert alice.borrow("web") == REFUSED
    ruled.client.retire("web", wait=True)
    assert alice.borrow("web")[0] == UNKNOWN


def test_what_is_lent_by_a_rule_that_says_so_serves(
    ruled: Ruled, alice: Alike, listener: socket.socket
) -> None:
    """And one loan is on the ledger, as for anybody."""
    ruled.client.put("web", listener)
    ruled.set_rules(rule("borrow", "list", listeners=True))
    _, (number,) = alice.ask(BORROW, "web", *SHARED)
    with (
        socket.create_connection(listener.getsockname()) as connection,
        socket.socket(fileno=number) as lent,
    ):
        accepted, address = lent.accept()
        accepted.close()
        assert address == connection.getsockname()
    with session_as(ruled.address, ALICE) as raw:
        (_, _, _, rows), _ = Alike(raw).ask(LOANS, "web", 0, 0)
        assert [(row[0], row[3]) for row in rows] == [("web", ALICE)]
    alice.send(RETURN)
    wait_until(lambda: not ruled.client.loans())
    Raw(ruled.address).sock.close()
