"""Who takes long is put off: what others see of it, and what becomes of what it is owed."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from time import thread_time_ns

import pytest
from ruled import ALICE, BOB, Ruled, ask_as, memory, put, rule, session_as
from support import (
    BORROW,
    CANCEL,
    HELLO,
    MORE,
    PUT,
    RETURN,
    SHARED,
    Raw,
    become,
    cpu_seconds,
    in_fork,
    memory_of,
    stopped,
    targets,
    wait_until,
)

import fdbroker
from fdbroker.errors import BrokerClosing
from fdbroker.ipc.protocol.messages import VERSION, encode
from fdbroker.ipc.server import acceptor, jobs, scheduler, shares
from fdbroker.ipc.server.connection import Connection
from fdbroker.ipc.server.server import Server
from fdbroker.ipc.server.shares import LONG
from fdbroker.ipc.transport.listener import Listener
from fdbroker.lender import Ledger, Lender
from fdbroker.lender.accounting import DEFAULT, Account
from fdbroker.lender.model import Peer
from fdbroker.lender.rules import VERBS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs other uids")

MANY = 4000  # names
EXCLUSIVE = [1, None, ""]
ONCE = 60  # times as long as it takes: in which a test can look, and which ends within it
FOR_EVER = 10**9


def plant(others: int) -> None:
    """What is done in the broker before it serves."""
    shares.OTHERS, shares.MOST = others, 10**18
    scheduler.Turns.begin = Server.admit  # so that nobody is kept out for ever, by whatever chance
    charge = scheduler.Turns._charge

    def charge_for_long_ones(server: scheduler.Turns, account: Account, took: int) -> None:
        if took > 3 * LONG // 2:  # as `take_long` does: no sum of many, which chance makes
            charge(server, account, took)

    scheduler.Turns._charge = charge_for_long_ones
    run = Server.run

    def run_until_told(server: Server) -> None:
        def now_over(*_: object) -> None:
            server.shares.forgive(server.now)
            server.alarm = server.now

        signal.signal(signal.SIGUSR1, now_over)
        run(server)

    Server.run = run_until_told  # type: ignore[method-assign]


def ruled_with(others: int, more: Callable[[], object] = lambda: None) -> Iterator[Ruled]:
    def both() -> None:
        plant(others)
        more()

    with Ruled(plant=both) as ruled:
        everything = [rule(*VERBS, uid=uid, names=("*", "")) for uid in (ALICE, BOB)]
        ruled.set_rules(*everything)
        ruled.put("x", "y")
        yield ruled
        with fdbroker.Client(ruled.address) as client:
            wait_until(lambda: client.stats()["loans"] == 0)


@pytest.fixture
def patient() -> Iterator[Ruled]:
    """A broker with the entries x and y, where who has taken long once is served no more."""
    yield from ruled_with(FOR_EVER)


@pytest.fixture
def ruled() -> Iterator[Ruled]:
    """One where it is served again."""
    yield from ruled_with(ONCE)


def serve_again(ruled: Ruled) -> None:
    """The time of all who are put off is over at once, with the next request of somebody else."""
    os.kill(ruled.pid, signal.SIGUSR1)
    ruled.client.stats()


def take_long(raw: Raw, seq: int = 1, *, names: int = MANY) -> None:
    """Ask for some milliseconds of work, and get it."""
    raw.send(BORROW, seq, ["x"] * names, *SHARED)
    has_all(raw, seq, names)


def has_all(raw: Raw, seq: int, names: int = MANY) -> None:
    """The first part of that has come."""
    message, numbers = raw.receive()
    for number in numbers:
        os.close(number)
    assert message is not None
    assert message[:3] == [0, seq, names]


def is_lent(raw: Raw, seq: int) -> None:
    message, (number,) = raw.receive()
    os.close(number)
    assert message is not None
    assert message[:4] == [0, seq, 1, 1]


def wait_behind(ruled: Ruled, first: Raw, second: Raw) -> None:
    """The first has y, and the second waits for it."""
    first.send(BORROW, 1, "y", *EXCLUSIVE)
    is_lent(first, 1)
    second.send(BORROW, 1, "y", *EXCLUSIVE)
    wait_until(lambda: ruled.client.stats()["waiting"])


def test_no_session_of_its_uid_is_served_and_all_others_are(patient: Ruled) -> None:
    with (
        session_as(patient.address, ALICE) as one,
        session_as(patient.address, ALICE) as other,
        session_as(patient.address, BOB) as bobs,
    ):
        take_long(one)
        one.send(MORE, 2, 253)
        other.send(BORROW, 1, "y", *SHARED)
        assert one.is_silent(patient.client)
        os.close(bobs.borrow(1, "x"))
        assert one.is_silent(patient.client)
        assert other.is_silent(patient.client)


def test_it_is_served_again(ruled: Ruled) -> None:
    with (
        session_as(ruled.address, ALICE) as one,
        session_as(ruled.address, ALICE) as other,
        session_as(ruled.address, BOB, hello=False) as newcomer,  # who will be shown out, but later
    ):
        for turn in range(3):
            with session_as(ruled.address, ALICE) as gone:
                take_long(one, 2 * turn + 1)
                for raw in (other, gone):
                    raw.send(BORROW, 2 * turn + 1 if raw is other else 1, "y", *SHARED)
                assert other.is_silent(ruled.client)
            is_lent(other, 2 * turn + 1)
            assert newcomer.is_silent(ruled.client)
            for raw in (one, other):
                raw.send(RETURN, 2 * turn + 2)


def test_what_a_worker_has_received_meanwhile(ruled: Ruled) -> None:
    """It is taken up later, also if nothing more comes."""
    ruled.set_rules(rule(*VERBS, uid=ALICE, names=("*", ""))._replace(quota=(("closes", 2),)))
    with (
        session_as(ruled.address, ALICE) as one,
        session_as(ruled.address, ALICE, puts=True) as puts,
        open(os.devnull) as file,
    ):
        with stopped(ruled.pid):  # so that the worker is not done before the long one is begun
            puts.send(PUT, 1, "new", 0, fds=[file.fileno()])
            one.send(BORROW, 1, ["x"] * MANY, *SHARED)
        message, _ = puts.receive()
        assert message is not None
        assert message[:2] == [0, 1]
        has_all(one, 1)


@pytest.fixture
def hindered(tmp_path: Path) -> Iterator[Ruled]:
    """As `patient`; and its threads receive nothing before somebody opens a fifo, `go`."""
    os.mkfifo(tmp_path / "go")

    def hinder() -> None:
        receive = jobs.Receive.run

        def wait_first(job: jobs.Receive) -> None:
            with open(tmp_path / "go"):
                receive(job)

        jobs.Receive.run = wait_first  # type: ignore[method-assign]

    yield from ruled_with(FOR_EVER, hinder)


def test_what_a_worker_has_received_of_who_goes_is_closed(hindered: Ruled, tmp_path: Path) -> None:
    hindered.set_rules(rule(*VERBS, uid=ALICE, names=("*", ""))._replace(quota=(("closes", 2),)))
    with session_as(hindered.address, ALICE) as one, memory() as number:
        hindered.client.stats()
        before = targets(hindered.pid)
        with session_as(hindered.address, ALICE, puts=True) as puts:
            puts.send(PUT, 1, "new", 0, fds=[number])
            wait_until(lambda: hindered.client.stats()["jobs"])
            take_long(one)
            with open(tmp_path / "go", "w"):
                wait_until(lambda: not hindered.client.stats()["jobs"])
            assert puts.is_silent(hindered.client)
        wait_until(lambda: targets(hindered.pid) == before)
        (used,) = [usage.used for usage in hindered.client.usage() if usage.uid == ALICE]
        assert used["closes"] == 0


def test_what_waited_until_it_had_read_waits_on(ruled: Ruled) -> None:
    with session_as(ruled.address, ALICE) as one, session_as(ruled.address, ALICE) as other:
        other.send(BORROW, 1, "y", *SHARED)
        other.send(RETURN, 2)
        other.send(BORROW, 3, "y", *SHARED)
        wait_until(lambda: [loan.id.split(".")[1] for loan in ruled.client.loans()] == ["3"])
        take_long(one)
        is_lent(other, 1)
        assert other.is_silent(ruled.client)
        is_lent(other, 3)


def test_what_it_is_told_later_comes_before_what_it_asked_meanwhile(ruled: Ruled) -> None:
    """Also if it should not have asked yet."""
    with (
        session_as(ruled.address, ALICE) as one,
        session_as(ruled.address, ALICE) as other,
        session_as(ruled.address, BOB) as bobs,
    ):
        wait_behind(ruled, bobs, other)
        take_long(one)
        bobs.send(RETURN, 2)
        other.send(RETURN, 2)
        other.send(BORROW, 3, "x", *SHARED)
        assert other.is_silent(ruled.client)
        is_lent(other, 1)
        is_lent(other, 3)


def test_what_one_decides_the_other_is_told_before_it_is_heard(patient: Ruled) -> None:
    """When both are heard again at the same time, and it asks before it had its answer."""
    with (
        session_as(patient.address, ALICE) as one,
        session_as(patient.address, ALICE) as owner,
        session_as(patient.address, BOB) as other,
        session_as(patient.address, BOB) as waiter,
    ):
        wait_behind(patient, owner, waiter)
        take_long(one, names=MANY // 2)
        take_long(other, names=MANY // 2)
        owner.send(RETURN, 2)
        assert owner.is_silent(patient.client)
        waiter.send(RETURN, 2)
        assert waiter.is_silent(patient.client)
        serve_again(patient)
        is_lent(waiter, 1)


def test_what_one_decides_is_the_end_of_the_other(patient: Ruled) -> None:
    """Who cannot be told any more was to be heard, too."""
    with (
        session_as(patient.address, ALICE) as one,
        session_as(patient.address, ALICE) as owner,
        session_as(patient.address, BOB) as other,
    ):
        with session_as(patient.address, BOB) as waiter:
            wait_behind(patient, owner, waiter)
            take_long(one, names=MANY // 2)
            take_long(other, names=MANY // 2)
            owner.send(RETURN, 2)
            assert owner.is_silent(patient.client)
            with stopped(patient.pid):
                waiter.send(CANCEL, 2)
                waiter.sock.close()
                os.kill(patient.pid, signal.SIGUSR1)
        wait_until(lambda: not patient.client.loans("y"))
        assert not any("event=error" in line for line in patient.log())


def test_a_drain_tells_it_too() -> None:
    with Ruled(plant=lambda: plant(FOR_EVER)) as ruled:
        ruled.set_rules(rule(*VERBS, uid=ALICE))
        ruled.put("x", "y")
        with session_as(ruled.address, ALICE) as other, ruled.client.borrow("y"):
            with session_as(ruled.address, ALICE) as one:
                other.send(BORROW, 1, "y", *EXCLUSIVE)
                wait_until(lambda: ruled.client.stats()["waiting"])
                take_long(one)
            wait_until(lambda: ruled.client.stats()["loans"] == 1)
            ruled.drain()
            assert other.receive() == ([BrokerClosing.code, 1], [])


def test_who_comes_and_goes_meanwhile_is_forgotten(patient: Ruled) -> None:
    def come_and_go(times: int) -> None:
        become(ALICE)
        for _ in range(times):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(patient.address)
                sock.send(encode([HELLO, 0, VERSION, False]))

    with session_as(patient.address, ALICE) as one:
        take_long(one)
        in_fork(lambda: come_and_go(500))
        before = memory_of(patient.pid)
        in_fork(lambda: come_and_go(5000))
        assert memory_of(patient.pid) - before < 1 << 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    sizes = 8, 8, 8
    ledger = Ledger(memoryview(bytearray(Ledger.size(*sizes))), *sizes)
    made = Server(Listener(str(tmp_path / "socket")), Lender(ledger))
    yield made
    made.close()


@pytest.fixture
def connection(server: Server) -> Iterator[Connection]:
    """Of one who is held to a quota, and is not alone there."""
    quotas = server.lender.accounting
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        made = Connection(sock, Peer(ALICE, ALICE, 1), quotas)
        made.account.set_limit(DEFAULT)
        quotas.add(quotas.account(BOB), "sessions", 1)
        yield made


def work(milliseconds: float) -> None:
    """Use a CPU."""
    end = thread_time_ns() + int(milliseconds * 1e6)
    while thread_time_ns() < end:
        pass


def test_what_it_takes_adds_up(server: Server, connection: Connection) -> None:
    server.in_time(connection, work, 20)
    first = server.shares.put_off[ALICE]
    server.in_time(connection, work, 2)
    assert server.shares.put_off[ALICE] - first >= 2e6 * (1 + shares.OTHERS)


def test_so_do_many_short_ones(server: Server, connection: Connection) -> None:
    for _ in range(5):  # work takes a little more than that: half of a millisecond is less than one
        server.in_time(connection, work, 0.1)
    assert not server.shares.put_off
    for _ in range(6):
        server.in_time(connection, work, 0.1)
    paid_at = server.shares.put_off[ALICE]
    assert paid_at - server.now >= 1.1e6 * (1 + shares.OTHERS)


def test_what_is_its_share_anyway_does_not(server: Server, connection: Connection) -> None:
    for _ in range(30):
        used = -server.shares._paid_at.get(ALICE, server.now)
        server.in_time(connection, work, 0.1)
        used += server.shares._paid_at[ALICE]
        server.now += used  # that this was done in is what it is due
    assert not server.shares.put_off


def test_who_was_alone_owes_nobody_what_it_used(server: Server, connection: Connection) -> None:
    server.lender.accounting.add(server.lender.accounting.account(BOB), "sessions", -1)
    server.in_time(connection, work, 20)
    assert not server.shares.put_off
    server.lender.accounting.add(server.lender.accounting.account(BOB), "sessions", 1)
    server.in_time(connection, work, 0.1)
    assert server.shares.put_off[ALICE] - server.now < 1.5e6 * (1 + shares.OTHERS)


def test_of_how_many_it_is_known_when_they_were_served(
    server: Server, connection: Connection
) -> None:
    for uid in range(100_000, 100_000 + 3 * shares.UIDS):
        connection.account = Account(uid)
        connection.account.set_limit(DEFAULT)
        server.in_time(connection, work, 0.001)
        assert uid in server.shares._paid_at
        assert len(server.shares._paid_at) <= shares.UIDS + 1
        server.now = server.shares._paid_at[uid] + 1


def test_what_is_done_within_is_not_charged_twice(server: Server, connection: Connection) -> None:
    server.in_time(connection, lambda: server.in_time(connection, work, 0.7))
    assert not server.shares.put_off


def test_nobody_is_put_off_for_long(server: Server, connection: Connection) -> None:
    for _ in range(3):
        server.in_time(connection, work, 100)
    assert server.shares.put_off[ALICE] == server.now + shares.MOST


def test_who_has_said_hello_is_not_shown_out_for_silence() -> None:
    def impatient() -> None:
        plant(FOR_EVER)
        acceptor.HELLO_TIME = 200_000_000

    with Ruled(plant=impatient) as ruled:
        ruled.set_rules(rule(*VERBS, uid=ALICE))
        ruled.put("x")
        with (
            session_as(ruled.address, ALICE) as one,
            session_as(ruled.address, ALICE, hello=False) as silent,
            session_as(ruled.address, ALICE, hello=False) as newcomer,
        ):
            take_long(one)
            newcomer.send(HELLO, 0, VERSION, False)
            assert silent.receive() == (None, [])
            assert not select.select([newcomer.sock], [], [], 0.5)[0]
            serve_again(ruled)
            assert newcomer.receive() == ([0, 0, VERSION], [])


def test_a_drain_hears_what_was_returned() -> None:
    with Ruled(plant=lambda: plant(FOR_EVER)) as ruled:
        ruled.set_rules(rule(*VERBS, uid=ALICE))
        ruled.put("x", "y")
        with (
            session_as(ruled.address, ALICE) as owner,
            session_as(ruled.address, ALICE) as one,
        ):
            os.close(owner.borrow(1, "y"))
            take_long(one)
            one.sock.close()
            wait_until(lambda: ruled.client.stats()["loans"] == 1)
            owner.send(RETURN, 2)
            assert owner.is_silent(ruled.client)
            ruled.drain()
            assert owner.receive() == (None, [])  # with the broker


def test_what_it_is_granted_meanwhile_it_gets_later(ruled: Ruled) -> None:
    with (
        session_as(ruled.address, ALICE) as one,
        session_as(ruled.address, ALICE) as other,
        session_as(ruled.address, BOB) as bobs,
    ):
        wait_behind(ruled, bobs, other)
        take_long(one)
        bobs.send(RETURN, 2)
        wait_until(lambda: not ruled.client.stats()["waiting"])
        assert other.is_silent(ruled.client)
        is_lent(other, 1)


def test_who_goes_before_it_is_told_has_returned_its_loan(patient: Ruled) -> None:
    with session_as(patient.address, ALICE) as one, session_as(patient.address, BOB) as bobs:
        with session_as(patient.address, ALICE) as other:
            wait_behind(patient, bobs, other)
            take_long(one)
            bobs.send(RETURN, 2)
            wait_until(lambda: not patient.client.stats()["waiting"])
            assert patient.client.loans("y")[0].uid == ALICE
        wait_until(lambda: not patient.client.loans("y"))


def test_death_is_a_return_also_then(patient: Ruled) -> None:
    with session_as(patient.address, ALICE) as other:
        with session_as(patient.address, ALICE) as one:
            take_long(one)
            one.send(RETURN, 2)  # which nobody hears
            assert patient.client.stats()["loans"] == 1
        wait_until(lambda: patient.client.stats()["loans"] == 0)
        assert other.is_silent(patient.client)


def test_a_cancel_that_came_meanwhile(ruled: Ruled) -> None:
    with session_as(ruled.address, ALICE) as one, session_as(ruled.address, ALICE) as other:
        with ruled.client.borrow("y", exclusive=True):
            other.send(BORROW, 1, "y", *EXCLUSIVE)
            wait_until(lambda: ruled.client.stats()["waiting"])
            take_long(one)
            other.send(CANCEL, 2)
            assert other.is_silent(ruled.client)
            assert ruled.client.stats()["waiting"] == 1
            message, _ = other.receive()
            assert message is not None
            assert message[0] == fdbroker.errors.BorrowTimeout.code
        os.close(other.borrow(3, "y"))


def test_what_it_puts_is_entered_later(ruled: Ruled) -> None:
    with (
        session_as(ruled.address, ALICE) as one,
        session_as(ruled.address, ALICE, puts=True) as puts,
        open(os.devnull) as file,
    ):
        take_long(one)
        puts.send(PUT, 1, "new", 0, fds=[file.fileno()])
        assert puts.is_silent(ruled.client)
        message, _ = puts.receive()
        assert message is not None
        assert message[:2] == [0, 1]


def test_who_is_alone_is_put_off_for_nobody(patient: Ruled) -> None:
    patient.client.close()

    def ask() -> None:
        with session_as(patient.address, ALICE) as raw:
            for turn in range(3):
                take_long(raw, 2 * turn + 1)
                raw.send(RETURN, 2 * turn + 2)

    in_fork(ask)


def test_new_rules_are_no_way_to_be_served_sooner(patient: Ruled) -> None:
    with session_as(patient.address, ALICE) as one, session_as(patient.address, ALICE) as other:
        take_long(one)
        other.send(BORROW, 1, "y", *SHARED)
        assert other.is_silent(patient.client)
        patient.set_rules(rule(*VERBS, uid=ALICE), rule("borrow", uid=BOB))
        assert other.is_silent(patient.client)
        assert ask_as(patient.address, lambda client: client.borrow("x").close(), BOB) is None
        assert other.is_silent(patient.client)
        put(patient.client, "z")


def test_nothing_turns_while_it_waits(patient: Ruled) -> None:
    """What cannot be heard makes no events."""
    with session_as(patient.address, ALICE) as one, session_as(patient.address, ALICE) as other:
        take_long(one)
        for raw in (one, other):
            raw.send(CANCEL, 9)
        assert other.is_silent(patient.client)
        before = cpu_seconds(patient.pid)
        select.select([one.sock, other.sock], [], [], 0.5)
        assert cpu_seconds(patient.pid) - before < 0.1
