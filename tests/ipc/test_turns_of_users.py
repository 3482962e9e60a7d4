"""Users take turns: who is served when, and that nothing is lost while a user waits.

A broker that is stopped finds all that was sent meanwhile at once, in the order in which it came.
The order of its answers is that in which our own epoll reports their sockets.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from ruled import ALICE, BOB, Ruled, memory, rule, session_as
from support import (
    BORROW,
    CANCEL,
    ENTRIES,
    HELLO,
    MORE,
    PATIENCE,
    PUT,
    RETURN,
    SHARED,
    Raw,
    become,
    in_fork,
    memory_of,
    stopped,
    targets,
    wait_until,
)

from fdbroker import descriptors
from fdbroker.errors import BorrowTimeout, BrokerClosing, NotPermitted
from fdbroker.ipc.protocol.codec import encode
from fdbroker.ipc.protocol.messages import VERSION
from fdbroker.ipc.server.event_loop import SECOND
from fdbroker.ipc.server.tuning import Tuning
from fdbroker.lender.rules import VERBS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs other uids")

NAMES = 900  # of a request that takes a quantum and more
EXCLUSIVE = [1, None, ""]
ALL = [rule(*VERBS, uid=uid, names=("*", "")) for uid in (ALICE, BOB)]
IMPATIENT = Tuning(handshake=SECOND // 2)


@contextlib.contextmanager
def broker(**how: Any) -> Iterator[Ruled]:
    """One with the entries x and y, where Alice and Bob may do everything.  Nothing stays on loan
    or waits after the block."""
    with Ruled(**how) as ruled:
        ruled.set_rules(*ALL)
        ruled.put("x", "y")
        before = counts(ruled)
        yield ruled
        wait_until(lambda: counts(ruled) == before)


def counts(ruled: Ruled) -> list[int]:
    """What clients have of the broker."""
    stats = ruled.client.stats()
    return [stats[name] for name in ("sessions", "connections", "loans", "waiting", "jobs")]


@pytest.fixture
def ruled() -> Iterator[Ruled]:
    with broker() as made:
        yield made


@pytest.fixture
def sessions(ruled: Ruled) -> Iterator[ExitStack]:
    """Ends them."""
    with ExitStack() as stack:
        yield stack


def some(ruled: Ruled, stack: ExitStack, uid: int, count: int) -> list[Raw]:
    """So many sessions of a user."""
    made = [stack.enter_context(session_as(ruled.address, uid)) for _ in range(count)]
    # Until it has waited for events again, epoll may report the last one before the others.
    ruled.client.stats()
    return made


@contextlib.contextmanager
def watched(raws: Sequence[Raw]) -> Iterator[list[Raw]]:
    """Fills the list, at the end of the block, with these sessions in the order of their answers:
    the epoll is there before the first one."""
    order: list[Raw] = []
    by_number = {raw.sock.fileno(): raw for raw in raws}
    with select.epoll() as epoll:
        for number in by_number:
            epoll.register(number, select.EPOLLIN)
        yield order
        # It is asked once, when all are there: it may change the order of what comes meanwhile.
        for number in by_number:
            assert select.select([number], [], [], PATIENCE)[0], "a session is not answered"
        order += [by_number[number] for number, _ in epoll.poll(0)]


def ask_long(raw: Raw, seq: int = 1) -> None:
    raw.send(BORROW, seq, ["x"] * NAMES, *SHARED)


def is_lent(raw: Raw, seq: int) -> None:
    """The next answer is the grant of one entry."""
    message, (number,) = raw.receive()
    os.close(number)
    assert message is not None
    assert message[:4] == [0, seq, 1, 1]


def has_long(raw: Raw, seq: int = 1) -> None:
    """The next answer is the first part of what `ask_long` asked for."""
    message, numbers = raw.receive()
    for number in numbers:
        os.close(number)
    assert message is not None
    assert message[:3] == [0, seq, NAMES]


def lend_y_and_wait(ruled: Ruled, holder: Raw, waiter: Raw) -> None:
    """The holder has y, and the waiter waits for it."""
    holder.send(BORROW, 1, "y", *EXCLUSIVE)
    is_lent(holder, 1)
    waiter.send(BORROW, 1, "y", *EXCLUSIVE)
    wait_until(lambda: ruled.client.stats()["waiting"] == 1)
    # epoll asks about a session once more after each event, so now none of theirs is at hand.
    ruled.client.stats()


# --- whose turn it is ---


def test_sessions_of_a_user_are_served_in_the_order_of_their_requests(
    ruled: Ruled, sessions: ExitStack
) -> None:
    crowd = some(ruled, sessions, ALICE, 12)
    crowd = crowd[1::2] + crowd[-2::-2]
    with watched(crowd) as order, stopped(ruled.pid):
        for raw in crowd:
            raw.send(BORROW, 1, "x", *SHARED)
    assert order == crowd


def test_every_session_of_a_user_is_served_though_one_always_has_a_request(
    ruled: Ruled, sessions: ExitStack
) -> None:
    greedy, *others = some(ruled, sessions, ALICE, 6)
    with watched(others) as order, stopped(ruled.pid):
        for seq in range(1, 30):
            greedy.send(ENTRIES, seq, 0)
        for raw in others:
            raw.send(ENTRIES, 1, 0)
    assert order == others
    assert greedy.receive()[0] is not None


def test_user_with_one_request_waits_for_two_of_a_user_with_many(
    ruled: Ruled, sessions: ExitStack
) -> None:
    """One may be served at once, while nobody waits, and one in its turn."""
    crowd, [good] = some(ruled, sessions, ALICE, 20), some(ruled, sessions, BOB, 1)
    with watched([*crowd, good]) as order, stopped(ruled.pid):
        for raw in (*crowd, good):
            raw.send(BORROW, 1, "x", *SHARED)
    assert order.index(good) <= 2


def test_user_whose_requests_take_long_waits_for_short_ones_of_others(
    ruled: Ruled, sessions: ExitStack
) -> None:
    long, short = some(ruled, sessions, ALICE, 4), some(ruled, sessions, BOB, 10)
    with watched([*long, *short]) as order, stopped(ruled.pid):
        for raw in long:
            ask_long(raw)
        for raw in short:
            raw.send(BORROW, 1, "x", *SHARED)
    last = order.index(long[-1])
    assert len([raw for raw in short if order.index(raw) < last]) >= 8


def test_root_does_not_wait_for_turns(ruled: Ruled, sessions: ExitStack) -> None:
    root = sessions.enter_context(Raw(ruled.address, puts=False))
    crowd = some(ruled, sessions, ALICE, 20)
    with watched([*crowd, root]) as order, stopped(ruled.pid):
        for raw in (*crowd, root):
            raw.send(BORROW, 1, "x", *SHARED)
    assert order.index(root) <= 1


def test_user_alone_is_served_at_once_whatever_it_takes(ruled: Ruled, sessions: ExitStack) -> None:
    """It waits for nobody, however much it has used, when nobody else asks for anything."""
    crowd = some(ruled, sessions, ALICE, 4)
    for seq in range(1, 20, 2):
        for raw in crowd:
            ask_long(raw, seq)
            has_long(raw, seq)
            raw.send(RETURN, seq + 1)


def test_later_parts_of_a_long_loan_come_in_turn(ruled: Ruled, sessions: ExitStack) -> None:
    one, other = *some(ruled, sessions, ALICE, 1), *some(ruled, sessions, BOB, 1)
    ask_long(one)
    has_long(one)
    with watched([one, other]), stopped(ruled.pid):
        one.send(MORE, 2, 253)
        other.send(BORROW, 1, "y", *SHARED)
    is_lent(other, 1)
    message, numbers = one.receive()
    for number in numbers:
        os.close(number)
    assert message is not None
    assert (message[:3], len(numbers)) == ([0, 2, NAMES], 253)


# --- what is decided for a user whose turn it is not ---


def test_grant_is_sent_before_a_later_request_is_served(ruled: Ruled, sessions: ExitStack) -> None:
    """The grant waits behind what Alice has asked for before; what she asks for now comes after."""
    *fillers, waiter, later = some(ruled, sessions, ALICE, 6)
    [bobs] = some(ruled, sessions, BOB, 1)
    lend_y_and_wait(ruled, bobs, waiter)
    with watched([waiter, later]) as order:
        with stopped(ruled.pid):
            bobs.send(RETURN, 2)
            for raw in fillers:
                ask_long(raw)
        has_long(fillers[0])
        has_long(fillers[1])
        # So what Bob has returned was granted.
        later.send(ENTRIES, 1, 0)
    assert order == [waiter, later]
    is_lent(waiter, 1)


def test_grant_that_waits_for_its_turn_is_on_loan_already(
    ruled: Ruled, sessions: ExitStack
) -> None:
    *fillers, waiter = some(ruled, sessions, ALICE, 5)
    [bobs] = some(ruled, sessions, BOB, 1)
    lend_y_and_wait(ruled, bobs, waiter)
    with stopped(ruled.pid):
        bobs.send(RETURN, 2)
        for raw in fillers:
            ask_long(raw)
    has_long(fillers[1])
    assert [loan.uid for loan in ruled.client.loans("y")] == [ALICE]
    is_lent(waiter, 1)


def test_cancel_that_crosses_a_grant_leaves_it(ruled: Ruled, sessions: ExitStack) -> None:
    """The grant is decided first; the CANCEL is served before it is sent, then it is sent."""
    [bobs], [waiter] = some(ruled, sessions, BOB, 1), some(ruled, sessions, ALICE, 1)
    lend_y_and_wait(ruled, bobs, waiter)
    with stopped(ruled.pid):
        bobs.send(RETURN, 2)
        waiter.send(CANCEL, 2)
    is_lent(waiter, 1)
    waiter.send(RETURN, 3)
    os.close(bobs.borrow(3, "y"))
    assert waiter.is_silent(ruled.client)


def test_cancel_that_comes_while_its_grant_waits_leaves_it(
    ruled: Ruled, sessions: ExitStack
) -> None:
    *fillers, waiter = some(ruled, sessions, ALICE, 5)
    [bobs] = some(ruled, sessions, BOB, 1)
    lend_y_and_wait(ruled, bobs, waiter)
    with stopped(ruled.pid):
        bobs.send(RETURN, 2)
        for raw in fillers:
            ask_long(raw)
    has_long(fillers[0])
    has_long(fillers[1])
    waiter.send(CANCEL, 2)
    is_lent(waiter, 1)
    waiter.send(RETURN, 3)
    os.close(bobs.borrow(3, "y"))


def test_cancel_that_comes_first_ends_the_wait(ruled: Ruled, sessions: ExitStack) -> None:
    [bobs], [waiter] = some(ruled, sessions, BOB, 1), some(ruled, sessions, ALICE, 1)
    lend_y_and_wait(ruled, bobs, waiter)
    with stopped(ruled.pid):
        waiter.send(CANCEL, 2)
        bobs.send(RETURN, 2)
    message, _ = waiter.receive()
    assert message is not None
    assert message[:2] == [BorrowTimeout.code, 1]
    os.close(waiter.borrow(3, "y"))


def test_cancel_behind_a_grant_that_waits_until_another_is_read_is_no_fault(
    ruled: Ruled, sessions: ExitStack
) -> None:
    """Its session is not received from until it has read what came before, in turn or not."""
    *fillers, waiter = some(ruled, sessions, ALICE, 5)
    [bobs] = some(ruled, sessions, BOB, 1)
    bobs.send(BORROW, 1, "y", *EXCLUSIVE)
    is_lent(bobs, 1)
    waiter.send(BORROW, 1, "x", *SHARED)
    waiter.send(RETURN, 2)
    waiter.send(BORROW, 3, "y", *EXCLUSIVE)
    wait_until(lambda: ruled.client.stats()["waiting"] == 1)
    with stopped(ruled.pid):
        bobs.send(RETURN, 2)
        for raw in fillers:
            ask_long(raw)
    has_long(fillers[0])
    has_long(fillers[1])
    waiter.send(CANCEL, 4)
    for raw in fillers[2:]:
        has_long(raw)
    assert ruled.client.loans("y")
    is_lent(waiter, 1)
    is_lent(waiter, 3)
    waiter.send(RETURN, 5)
    os.close(bobs.borrow(3, "y"))


def test_session_that_dies_before_its_grant_is_sent_has_returned_it(
    ruled: Ruled, sessions: ExitStack
) -> None:
    *fillers, waiter = some(ruled, sessions, ALICE, 5)
    bobs, next_one = some(ruled, sessions, BOB, 2)
    lend_y_and_wait(ruled, bobs, waiter)
    next_one.send(BORROW, 1, "y", *EXCLUSIVE)
    wait_until(lambda: ruled.client.stats()["waiting"] == 2)
    with stopped(ruled.pid):
        bobs.send(RETURN, 2)
        for raw in fillers:
            ask_long(raw)
        waiter.sock.close()
    is_lent(next_one, 1)


def test_slot_of_a_session_that_dies_before_its_grant_is_sent_is_free(
    ruled: Ruled, sessions: ExitStack
) -> None:
    """Nobody who comes next is told of the grant."""
    *fillers, waiter = some(ruled, sessions, ALICE, 5)
    [bobs] = some(ruled, sessions, BOB, 1)
    lend_y_and_wait(ruled, bobs, waiter)
    with stopped(ruled.pid):
        bobs.send(RETURN, 2)
        for raw in fillers:
            ask_long(raw)
        waiter.sock.close()
    with session_as(ruled.address, ALICE) as newcomer:
        for raw in fillers:
            has_long(raw)
        assert newcomer.is_silent(ruled.client)
        os.close(newcomer.borrow(1, "y"))


def test_death_is_a_return_while_the_user_waits_for_its_turn(
    ruled: Ruled, sessions: ExitStack
) -> None:
    *fillers, holder = some(ruled, sessions, ALICE, 5)
    [bobs] = some(ruled, sessions, BOB, 1)
    lend_y_and_wait(ruled, holder, bobs)
    with stopped(ruled.pid):
        for raw in fillers:
            ask_long(raw)
        holder.send(ENTRIES, 2, 0)
        holder.sock.close()
    is_lent(bobs, 1)


def test_return_of_a_session_that_dies_next_counts_once(ruled: Ruled, sessions: ExitStack) -> None:
    *fillers, holder = some(ruled, sessions, ALICE, 5)
    one, other = some(ruled, sessions, BOB, 2)
    lend_y_and_wait(ruled, holder, one)
    with stopped(ruled.pid):
        for raw in fillers:
            ask_long(raw)
        holder.send(RETURN, 2)
        holder.sock.close()
    is_lent(one, 1)
    other.send(BORROW, 1, "y", *EXCLUSIVE)
    wait_until(lambda: ruled.client.stats()["waiting"] == 1)
    assert other.is_silent(ruled.client)
    one.send(RETURN, 2)
    is_lent(other, 1)


def test_request_that_comes_before_its_session_had_the_answer_harms_nobody(
    ruled: Ruled, sessions: ExitStack
) -> None:
    """A RETURN of what is granted, and not sent yet: the client cannot know of it."""
    bobs, [waiter] = some(ruled, sessions, BOB, 2), some(ruled, sessions, ALICE, 1)
    lend_y_and_wait(ruled, bobs[0], waiter)
    with stopped(ruled.pid):
        bobs[0].send(RETURN, 2)
        waiter.send(RETURN, 2)
        waiter.sock.shutdown(socket.SHUT_WR)
    wait_until(lambda: not ruled.client.loans("y"))
    os.close(bobs[1].borrow(1, "y"))


# --- what waits until it is read ---


def test_second_grant_comes_when_the_first_is_read(ruled: Ruled, sessions: ExitStack) -> None:
    *fillers, reader = some(ruled, sessions, ALICE, 5)
    reader.send(BORROW, 1, "y", *SHARED)
    reader.send(RETURN, 2)
    reader.send(BORROW, 3, "y", *SHARED)
    wait_until(lambda: [loan.id.split(".")[1] for loan in ruled.client.loans()] == ["3"])
    with stopped(ruled.pid):
        for raw in fillers:
            ask_long(raw)
        is_lent(reader, 1)
    is_lent(reader, 3)


def test_session_that_goes_before_it_has_read_has_returned_its_loan(
    ruled: Ruled, sessions: ExitStack
) -> None:
    *fillers, reader = some(ruled, sessions, ALICE, 5)
    [bobs] = some(ruled, sessions, BOB, 1)
    reader.send(BORROW, 1, "x", *SHARED)
    reader.send(RETURN, 2)
    reader.send(BORROW, 3, "y", *EXCLUSIVE)
    wait_until(lambda: ruled.client.loans("y"))
    bobs.send(BORROW, 1, "y", *EXCLUSIVE)
    wait_until(lambda: ruled.client.stats()["waiting"] == 1)
    with stopped(ruled.pid):
        for raw in fillers:
            ask_long(raw)
        reader.sock.close()
    is_lent(bobs, 1)


def test_client_that_has_read_in_time_is_not_ended_for_waiting_for_its_turn() -> None:
    with broker(tuning=IMPATIENT) as ruled, session_as(ruled.address, ALICE) as reader:
        reader.send(BORROW, 1, "y", *SHARED)
        reader.send(RETURN, 2)
        reader.send(BORROW, 3, "y", *SHARED)
        wait_until(lambda: [loan.id.split(".")[1] for loan in ruled.client.loans()] == ["3"])
        with stopped(ruled.pid), session_as(ruled.address, ALICE, hello=False):
            # Somebody else asks first, so that the reader has to wait for its turn.
            is_lent(reader, 1)
            pass_time(IMPATIENT)
        is_lent(reader, 3)


def pass_time(tuning: Tuning) -> None:
    """Let every deadline of a handshake pass that has begun."""
    end = time.monotonic() + 1.5 * tuning.handshake / SECOND
    while time.monotonic() < end:
        select.select([], [], [], end - time.monotonic())


def test_hello_that_has_come_in_time_is_answered_though_it_waits_for_its_turn() -> None:
    with broker(tuning=IMPATIENT) as ruled, session_as(ruled.address, ALICE) as filler:
        connections = ruled.client.stats()["connections"]
        with (
            session_as(ruled.address, ALICE, hello=False) as silent,
            session_as(ruled.address, ALICE, hello=False) as newcomer,
        ):
            # Both are in, and neither has said anything.
            wait_until(lambda: ruled.client.stats()["connections"] == connections + 2)
            with stopped(ruled.pid):
                filler.send(ENTRIES, 1, 0)
                newcomer.send(HELLO, 0, VERSION, False)
                pass_time(IMPATIENT)
            assert silent.receive() == (None, [])
            assert newcomer.receive() == ([0, 0, VERSION], [])


# --- what a worker receives ---


@pytest.fixture
def hindered(tmp_path: Path) -> Iterator[Ruled]:
    """A broker whose threads inspect no memfd named "rules" before somebody opens a fifo, `go`."""
    os.mkfifo(tmp_path / "go")

    def hinder() -> None:
        def hang(sysfd: int) -> Any:
            with open(tmp_path / "go"):
                return inspect(sysfd)

        inspect, descriptors.inspect = descriptors.inspect, hang

    with Ruled(plant=hinder) as ruled:
        ruled.set_rules(*ALL)
        yield ruled


@contextlib.contextmanager
def inspected(ruled: Ruled, raw: Raw, path: Path) -> Iterator[None]:
    """It puts `new`, and a worker inspects that until the block has ended."""
    with memory() as number:
        raw.send(PUT, 1, "new", 0, fds=[number])
    wait_until(lambda: targets(ruled.pid)["/memfd:rules (deleted)"] == 1)
    yield
    with open(path / "go", "w"):
        pass
    wait_until(lambda: not ruled.client.stats()["jobs"])


def test_descriptor_of_a_client_that_goes_is_closed(hindered: Ruled, tmp_path: Path) -> None:
    sessions, *_ = counts(hindered)
    before = targets(hindered.pid)
    raw = session_as(hindered.address, ALICE, puts=True)
    with inspected(hindered, raw, tmp_path):
        raw.sock.close()
        # Its session is gone at once.
        wait_until(lambda: counts(hindered)[0] == sessions)
    wait_until(lambda: targets(hindered.pid) == before)
    assert not hindered.client.entries()
    wait_until(lambda: ALICE not in {usage.uid for usage in hindered.client.usage()})


def test_slot_of_a_client_that_goes_is_free_while_a_worker_inspects(
    hindered: Ruled, tmp_path: Path
) -> None:
    sessions, *_ = counts(hindered)
    raw = session_as(hindered.address, ALICE, puts=True)
    with inspected(hindered, raw, tmp_path):
        raw.sock.close()
        wait_until(lambda: counts(hindered)[0] == sessions)
        newcomer = session_as(hindered.address, ALICE)
    with newcomer:
        assert newcomer.is_silent(hindered.client)
        newcomer.send(ENTRIES, 1, 0)
        assert newcomer.receive() == ([0, 1, 0, []], [])


def test_put_is_held_to_the_rules_of_when_it_was_inspected(hindered: Ruled, tmp_path: Path) -> None:
    with session_as(hindered.address, ALICE, puts=True) as raw:
        with inspected(hindered, raw, tmp_path):
            hindered.set_rules(rule("borrow", uid=ALICE))
        message, _ = raw.receive()
        assert message is not None
        assert message[:2] == [NotPermitted.code, 1]
        assert not hindered.client.entries()
        wait_until(lambda: "/memfd:rules (deleted)" not in targets(hindered.pid))


def test_cancel_behind_a_put_retires_what_it_has_entered(hindered: Ruled, tmp_path: Path) -> None:
    with session_as(hindered.address, ALICE, puts=True) as raw:
        with inspected(hindered, raw, tmp_path):
            raw.send(CANCEL, 2)
        message, _ = raw.receive()
        assert message is not None
        assert message[:2] == [0, 1]
        wait_until(lambda: not hindered.client.stats()["entries"])


def test_other_sessions_of_the_user_are_served_while_a_worker_inspects(
    hindered: Ruled, tmp_path: Path
) -> None:
    with (
        session_as(hindered.address, ALICE, puts=True) as raw,
        session_as(hindered.address, ALICE) as other,
        inspected(hindered, raw, tmp_path),
    ):
        other.send(ENTRIES, 1, 0)
        assert other.receive() == ([0, 1, 0, []], [])


def test_put_of_a_user_that_waits_for_its_turn_is_entered(
    ruled: Ruled, sessions: ExitStack
) -> None:
    fillers = some(ruled, sessions, ALICE, 4)
    with session_as(ruled.address, ALICE, puts=True) as puts, memory() as number:
        with stopped(ruled.pid):
            for raw in fillers:
                ask_long(raw)
            puts.send(PUT, 1, "new", 0, fds=[number])
        message, _ = puts.receive()
    assert message is not None
    assert message[:2] == [0, 1]


# --- rules, a drain, many clients ---


def test_request_that_waits_for_its_turn_is_held_to_the_rules_of_then(
    ruled: Ruled, sessions: ExitStack
) -> None:
    *fillers, later = some(ruled, sessions, ALICE, 5)
    with ExitStack() as done, stopped(ruled.pid):
        for raw in fillers:
            ask_long(raw)
        later.send(BORROW, 1, "y", *SHARED)
        done.enter_context(ruled.tell([rule("borrow", uid=ALICE, names=("x",))]))
    message, _ = later.receive()
    assert message is not None
    assert message[:2] == [NotPermitted.code, 1]


def test_drain_answers_every_session_that_waits() -> None:
    with Ruled() as ruled, ExitStack() as sessions:
        ruled.set_rules(*ALL)
        ruled.put("x", "y")
        *fillers, waiter = some(ruled, sessions, ALICE, 5)
        [bobs] = some(ruled, sessions, BOB, 1)
        lend_y_and_wait(ruled, bobs, waiter)
        with ExitStack() as done, stopped(ruled.pid):
            for raw in fillers:
                ask_long(raw)
            done.enter_context(ruled.tell(None))
        assert waiter.receive() == ([BrokerClosing.code, 1], [])
        for raw in fillers:
            message, numbers = raw.receive()
            for number in numbers:
                os.close(number)
            assert message is not None
            assert message[:2] in ([0, 1], [BrokerClosing.code, 1])


def test_drain_hears_what_is_returned_in_turn() -> None:
    with Ruled() as ruled, ExitStack() as sessions:
        ruled.set_rules(*ALL)
        ruled.put("x", "y")
        *others, holder = some(ruled, sessions, ALICE, 5)
        os.close(holder.borrow(1, "y"))
        with ExitStack() as done, stopped(ruled.pid):
            for raw in others:
                raw.send(ENTRIES, 1, 0)
            holder.send(RETURN, 2)
            done.enter_context(ruled.tell(None))
        # With the broker.
        assert holder.receive() == (None, [])


def test_sessions_that_come_and_go_leave_no_memory(ruled: Ruled, sessions: ExitStack) -> None:
    """Some go before it is their turn, and some after a request that nobody has read."""

    def come_and_go(times: int) -> None:
        become(ALICE)
        for _ in range(times):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(ruled.address)
                sock.send(encode([HELLO, 0, VERSION, False]))
                with contextlib.suppress(BrokenPipeError):
                    sock.send(encode([BORROW, 1, "x", *SHARED]))

    in_fork(lambda: come_and_go(500))
    before = memory_of(ruled.pid)
    in_fork(lambda: come_and_go(4000))
    assert memory_of(ruled.pid) - before < 1 << 20
