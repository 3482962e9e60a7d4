"""Quotas between real users: who is refused, with which figures, and that all comes back."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from ruled import (
    ALICE,
    BOB,
    STAFF,
    Ruled,
    ask_as,
    connected_as,
    memory,
    rule,
    session_as,
)
from support import (
    BORROW,
    ENTRIES,
    LOANS,
    PUT,
    RETIRE,
    SHARED,
    Raw,
    become,
    cpu_seconds,
    stopped,
    wait_until,
)

import fdbroker
from fdbroker.errors import QuotaExceeded
from fdbroker.ipc.server.event_loop import EventLoop
from fdbroker.ipc.server.server import Server
from fdbroker.ipc.transport.unix_listener import Listener
from fdbroker.ipc.transport.unix_port import Watched
from fdbroker.lender.accounting import DEFAULT, RESOURCES
from fdbroker.lender.rules import VERBS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs other uids")

EXCEEDED = 35  # the code of QuotaExceeded


def all_allowed(uid: int = ALICE, **quota: int) -> Any:
    return rule(*VERBS, uid=uid)._replace(quota=tuple(quota.items()))


def used(ruled: Ruled, uid: int) -> dict[str, int]:
    """What it uses, as the broker says; nothing of it: all zero."""
    found = {usage.uid: usage.used for usage in ruled.client.usage()}
    return found.get(uid, dict.fromkeys(RESOURCES, 0))


def is_free(ruled: Ruled, *uids: int) -> bool:
    return not {usage.uid for usage in ruled.client.usage()} & set(uids)


def turned_away(address: str, uid: int) -> list[Any]:
    """The answer to who connects as `uid`."""
    with session_as(address, uid, hello=False) as raw:
        return raw.say_hello()


def test_sessions(ruled: Ruled) -> None:
    ruled.set_rules(all_allowed(sessions=3), all_allowed(BOB))
    crowd = [session_as(ruled.address, ALICE) for _ in range(3)]  # each of another process
    assert used(ruled, ALICE)["sessions"] == 3
    for _ in range(20):
        assert turned_away(ruled.address, ALICE) == [EXCEEDED, 0, "sessions", 3, 3]
    with pytest.raises(QuotaExceeded, match="uses 3 of the 3 sessions"):
        ask_as(ruled.address, lambda client: client.entries())
    session_as(ruled.address, BOB).sock.close()
    crowd.pop().sock.close()
    wait_until(lambda: used(ruled, ALICE)["sessions"] == 2)
    crowd.append(session_as(ruled.address, ALICE))
    for raw in crowd:
        raw.sock.close()
    wait_until(lambda: is_free(ruled, ALICE, BOB))
    assert len([line for line in ruled.refusals() if "3 of the 3 sessions" in line]) == 21


def test_who_may_not_connect_holds_no_session(ruled: Ruled) -> None:
    ruled.set_rules(all_allowed(BOB))
    crowd = [connected_as(ruled.address, ALICE) for _ in range(20)]  # and say nothing
    wait_until(lambda: used(ruled, ALICE)["sessions"] == 0)
    assert ruled.client.stats()["connections"] == 1
    assert is_free(ruled, ALICE)
    for sock in crowd:
        assert sock.recv(1000)[1] == 29
        assert sock.recv(1000) == b""
        sock.close()


def test_half_of_what_is_free(ruled: Ruled) -> None:
    """The broker's own descriptors are left to it, and to whoever comes."""
    ruled.set_rules(all_allowed(sessions=10**6), all_allowed(BOB, sessions=10**6))
    ruled.limit_descriptors(20)
    crowd: dict[int, list[socket.socket]] = {ALICE: [], BOB: []}
    try:
        for uid, socks in crowd.items():
            while (sock := come_as(ruled.address, uid)) is not None:
                socks.append(sock)
        # one is taken: by the client that has set the limit
        assert [len(socks) for socks in crowd.values()] == [10, 5]
        ruled.client.stats()  # root is served
        for sock in crowd[ALICE]:
            sock.close()
        crowd[ALICE] = []
        wait_until(lambda: used(ruled, ALICE)["sessions"] == 0)
        while (sock := come_as(ruled.address, BOB)) is not None:
            crowd[BOB].append(sock)
        assert len(crowd[BOB]) == 10
    finally:
        for socks in crowd.values():
            for sock in socks:
                sock.close()


def come_as(address: str, uid: int) -> socket.socket | None:
    """A session, unless it is turned away because of its quota."""
    sock = connected_as(address, uid)
    with contextlib.suppress(BrokenPipeError):
        sock.send(b"\x94\0\0\1\xc2")
    try:
        answer = sock.recv(1000)
    except ConnectionResetError:
        answer = sock.recv(1000)
    if answer[1] == 0:
        return sock
    assert answer[1] == EXCEEDED
    sock.close()
    return None


def test_entries(ruled: Ruled) -> None:
    ruled.set_rules(all_allowed(entries=2))

    def put_three(client: fdbroker.Client) -> tuple[Any, ...]:
        with memory() as number:
            client.put("a", number)
            client.put("b", number)
            with pytest.raises(QuotaExceeded) as caught:
                client.put("c", number)
            with pytest.raises(QuotaExceeded):
                client.put("a", number, replace=True)  # for a moment there would be three
            client.retire("a", wait=True)
            client.put("c", number)
            return caught.value.data

    assert ask_as(ruled.address, put_three) == ("entries", 2, 2)
    wait_until(lambda: used(ruled, ALICE) == dict.fromkeys(RESOURCES, 0) | {"entries": 2})
    for name in "bc":
        ruled.client.retire(name, wait=True)
    wait_until(lambda: is_free(ruled, ALICE))


def test_loans_and_waiting(ruled: Ruled) -> None:
    ruled.put("a", "b", "c")
    ruled.set_rules(all_allowed(loans=3, waiting=1))

    def ask(client: fdbroker.Client) -> list[Any]:
        with client.borrow_all(["a", "b"]):
            with pytest.raises(QuotaExceeded) as caught:
                client.borrow_all(["a", "c"])
            return [caught.value.data, used(ruled, ALICE)["loans"]]

    assert ask_as(ruled.address, ask)[0] == ("loans", 2, 3)
    with ruled.client.borrow("a", exclusive=True):
        waiting, other = (session_as(ruled.address, ALICE) for _ in range(2))
        waiting.send(BORROW, 1, "a", *SHARED)
        wait_until(lambda: used(ruled, ALICE)["waiting"] == 1)
        other.send(BORROW, 1, "a", *SHARED)
        assert other.receive() == ([EXCEEDED, 1, "waiting", 1, 1], [])
        other.send(RETIRE, 2, "b", True, None)
        assert other.receive() == ([EXCEEDED, 2, "waiting", 1, 1], [])
        waiting.sock.close()
        wait_until(lambda: used(ruled, ALICE)["waiting"] == 0)
        other.sock.close()
    wait_until(lambda: is_free(ruled, ALICE))


def test_bytes_that_nobody_reads(ruled: Ruled) -> None:
    """Many sessions, each with less unread than the kernel would queue for one."""
    with memory() as number:
        for count in range(64):
            ruled.client.put(f"{'x' * 200}{count:03}", number)
    ruled.set_rules(all_allowed(bytes=300_000), all_allowed(BOB))
    good = session_as(ruled.address, BOB)
    crowd = [session_as(ruled.address, ALICE) for _ in range(8)]
    for seq in range(1, 5):
        for raw in crowd:
            with contextlib.suppress(BrokenPipeError):
                raw.send(ENTRIES, seq, 0)
        good.send(ENTRIES, seq, 0)
        message, _ = good.receive()
        assert message is not None
        assert len(message[3]) == 64
    ended = wait_until(lambda: [line for line in ruled.log() if "reads-too-little" in line])
    assert all(f"uid={ALICE}" in line for line in ended)
    now = used(ruled, ALICE)
    assert 0 < now["sessions"] < 8
    assert now["bytes"] <= 300_000
    for raw in crowd:  # who reads has its answers
        raw.sock.close()
    good.sock.close()
    wait_until(lambda: is_free(ruled, ALICE, BOB))


def test_who_reads_is_not_held_to_what_it_had_unread(ruled: Ruled) -> None:
    ruled.put("a")
    ruled.set_rules(all_allowed(bytes=5000))
    with session_as(ruled.address, ALICE) as raw:
        for turn in range(100):
            raw.send(ENTRIES, 2 * turn + 1, 0)
            raw.send(LOANS, 2 * turn + 2, "", 0, 0)  # the answer to the first may be unread then
            for _ in range(2):
                message, _ = raw.receive()
                assert message is not None
                assert message[0] == 0


def test_all_counts_are_zero_after_any_number_of_killed_clients(ruled: Ruled) -> None:
    ruled.put("a", "b", "c")
    ruled.set_rules(all_allowed(), all_allowed(BOB))
    ways = [hold, hold_several, wait_for_a_turn, put_and_share, lie_unread]
    with ruled.client.borrow("a", exclusive=True):
        victims = [
            start_as(uid, ruled.address, way)
            for _ in range(3)
            for way in ways
            for uid in (ALICE, BOB)
        ]
        # three of the loans are there only when their turn comes
        all_there = {"sessions": 15, "loans": 12, "entries": 3, "waiting": 3}
        try:
            for uid in (ALICE, BOB):
                wait_until(lambda uid=uid: used(ruled, uid).items() >= all_there.items())
                wait_until(lambda uid=uid: used(ruled, uid)["bytes"] > 0)
        finally:
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    for entry in ruled.client.entries():
        ruled.client.retire(entry.name)
    wait_until(lambda: is_free(ruled, ALICE, BOB))
    wait_until(lambda: ruled.client.stats()["entries"] == 0)
    stats = ruled.client.stats()
    assert (stats["loans"], stats["waiting"]) == (0, 0)


def hold(raw: Raw) -> None:
    raw.borrow(1, "b")


def hold_several(raw: Raw) -> None:
    raw.send(BORROW, 1, ["b", "c"], *SHARED)
    raw.receive()


def wait_for_a_turn(raw: Raw) -> None:
    raw.send(BORROW, 1, "a", *SHARED)


def put_and_share(raw: Raw) -> None:
    with memory() as number:
        raw.send(PUT, 1, "", 6, fds=[number])
        raw.receive()


def lie_unread(raw: Raw) -> None:
    for seq in range(1, 9):
        raw.send(ENTRIES, seq, 0)


def start_as(uid: int, address: str, way: Callable[[Raw], None]) -> int:
    """A process of that user which does so, and stays."""
    pid = os.fork()
    if pid:
        return pid
    try:
        become(uid)
        raw = Raw(address)
        way(raw)
        while True:
            signal.pause()
    finally:
        os._exit(1)


def test_one_request_of_each_at_a_time(ruled: Ruled) -> None:
    """Who asks last, behind 45 requests of another, has waited for a few of them only."""
    ruled.put("a")
    ruled.set_rules(all_allowed(), all_allowed(BOB))
    crowd = [session_as(ruled.address, ALICE) for _ in range(45)]
    good = session_as(ruled.address, BOB)
    with stopped(ruled.pid):
        for raw in (*crowd, good):
            raw.send(BORROW, 1, "a", *SHARED)
    times = {}
    for raw in (*crowd, good):
        message, fds = raw.receive()
        assert message is not None
        times[raw] = message[4]
        os.close(*fds)
    earlier = sum(times[raw] < times[good] for raw in crowd)
    assert earlier <= 4
    for raw in (*crowd, good):
        raw.sock.close()
    wait_until(lambda: is_free(ruled, ALICE, BOB))


def test_usage_says_what_each_may_have(ruled: Ruled) -> None:
    ruled.set_rules(all_allowed(loans=7))
    with session_as(ruled.address, ALICE):
        usage = {one.uid: one for one in ruled.client.usage()}
        assert usage[0].limits == dict.fromkeys(RESOURCES)  # root: whatever there is
        assert usage[ALICE].used == dict.fromkeys(RESOURCES, 0) | {"sessions": 1}
        assert usage[ALICE].limits["loans"] == 7
        limits = usage[ALICE].limits.items()
        assert all(0 < limit <= getattr(DEFAULT, what) for what, limit in limits if limit)


# --- what does not depend on the others, and what follows from offences ------------------------


def test_a_refused_connect_raises_no_quota(ruled: Ruled) -> None:
    """Only in the group it is admitted, and held to what the rule of the group says."""
    group = rule(*VERBS, gid=STAFF)._replace(quota=(("sessions", 2),))
    ruled.set_rules(group)
    crowd = [session_as(ruled.address, ALICE, STAFF) for _ in range(2)]
    with session_as(ruled.address, ALICE, hello=False) as raw:
        assert raw.say_hello()[0] == 29
    with session_as(ruled.address, ALICE, STAFF, hello=False) as raw:
        assert raw.say_hello() == [EXCEEDED, 0, "sessions", 2, 2]
    for raw in crowd:
        raw.sock.close()
    wait_until(lambda: is_free(ruled, ALICE))


def test_who_has_only_entries_is_held_to_the_new_rules_too(ruled: Ruled) -> None:
    ruled.set_rules(all_allowed())
    with session_as(ruled.address, ALICE, puts=True) as raw, memory() as number:
        raw.send(PUT, 1, "a", 0, fds=[number])
        raw.receive()
    wait_until(lambda: used(ruled, ALICE)["sessions"] == 0)
    ruled.set_rules(all_allowed(entries=7))
    assert {one.uid: one.limits["entries"] for one in ruled.client.usage()}[ALICE] == 7
    ruled.set_rules()  # it is not admitted any more, and what it has stays as it was
    assert {one.uid: one.limits["entries"] for one in ruled.client.usage()}[ALICE] == 7
    ruled.client.retire("a", wait=True)
    assert is_free(ruled, ALICE)


def test_broker_after_protocol_faults_is_idle_and_open(ruled: Ruled) -> None:
    """After any number of them it neither spins nor refuses others."""
    ruled.set_rules(all_allowed(), all_allowed(BOB))
    for number in (1, 2, 12):
        crowd = [session_as(ruled.address, ALICE) for _ in range(number)]
        for raw in crowd:
            raw.send_bytes(b"junk")
            raw.is_refused(60)
            raw.sock.close()
        before = cpu_seconds(ruled.pid)
        time.sleep(0.2)  # in which it has nothing to do
        assert cpu_seconds(ruled.pid) - before < 0.1, f"it spins after {number}"
        session_as(ruled.address, BOB).sock.close()
    wait_until(lambda: is_free(ruled, ALICE, BOB))


def test_who_has_no_closes_may_not_come(ruled: Ruled) -> None:
    ruled.set_rules(all_allowed(closes=0))
    assert turned_away(ruled.address, ALICE) == [EXCEEDED, 0, "closes", 0, 0]
    wait_until(lambda: is_free(ruled, ALICE))


def test_who_comes_over_its_closes_is_told_and_hung_up(ruled: Ruled) -> None:
    """Lowered while it is in: what it sends then is not even received."""
    ruled.set_rules(all_allowed())
    with session_as(ruled.address, ALICE, puts=True) as raw, memory() as number:
        for seq in range(1, 4):
            raw.send(PUT, seq, f"a{seq}", 0, fds=[number])
            raw.receive()
        ruled.limit_closes(ALICE)
        raw.send(PUT, 4, "b", 0, fds=[number])
        assert raw.is_refused(EXCEEDED)[0] == "closes"
    assert [line for line in ruled.refusals() if "closes" in line]
    for name in ("a1", "a2", "a3"):
        ruled.client.retire(name)
    ruled.limit_closes(ALICE, -1)
    wait_until(lambda: is_free(ruled, ALICE))


def test_what_others_take_ends_nobodys_session(ruled: Ruled) -> None:
    """Alice, within her half, puts Bob over the new one; and he goes on."""
    ruled.set_rules(all_allowed(sessions=10**6), all_allowed(BOB, sessions=10**6))
    ruled.limit_descriptors(22)
    bob = [session_as(ruled.address, BOB, puts=True) for _ in range(9)]
    alice = []
    while (sock := come_as(ruled.address, ALICE)) is not None:
        alice.append(sock)
    usage = {one.uid: one for one in ruled.client.usage()}[BOB]
    assert usage.used["sessions"] > (usage.limits["sessions"] or 0)
    with memory() as number:
        for raw in bob:
            raw.send(PUT, 1, f"b{raw.sock.fileno()}", 0, fds=[number])
            message, _ = raw.receive()
            assert message is not None
            assert message[:3] == [EXCEEDED, 1, "entries"]
            raw.send(ENTRIES, 2, 0)
            message, _ = raw.receive()
            assert message is not None
            assert message[:2] == [0, 2]
    for sock in (*alice, *(raw.sock for raw in bob)):
        sock.close()
    wait_until(lambda: is_free(ruled, ALICE, BOB))


def lasting() -> None:
    """In the broker: its listener stays when it ends, and SIGUSR1 has it drain."""

    def drain(server: Server, *_: object) -> None:
        reader, writer = os.pipe()
        told = Watched(reader)
        server.loop.watch(
            told, lambda subject, events: (server.loop.unwatch(told), server.drain(30))
        )
        signal.signal(signal.SIGUSR1, lambda *_: os.write(writer, b"x"))
        run(server)

    run, Server.run = Server.run, drain  # type: ignore[method-assign]
    Listener.lasting = property(lambda self: True, lambda self, value: None)  # type: ignore


def test_a_drain_that_leaves_newcomers_to_the_next_broker_stays_shut() -> None:
    with Ruled(plant=lasting) as ruled:
        ruled.put("a")
        ruled.set_rules(all_allowed())
        crowd = [session_as(ruled.address, ALICE) for _ in range(5)]
        os.close(crowd[0].borrow(1, "a"))
        ruled.client.entries()  # with a session that it will ask again
        os.kill(ruled.pid, signal.SIGUSR1)
        wait_until(lambda: [entry.retired for entry in ruled.client.entries()] == [True])
        for raw in crowd[1:]:
            raw.send_bytes(b"junk")
            raw.is_refused(60)
            raw.sock.close()
        with connected_as(ruled.address, ALICE) as newcomer:
            newcomer.send(b"\x94\0\0\1\xc2")
            assert not select.select([newcomer], [], [], 0.3)[0]  # it is queued
        crowd[0].sock.close()
        wait_until(lambda: not os.path.exists(f"/proc/{ruled.pid}/fd/0"))  # it has drained


def no_watches() -> None:
    """In the broker: after SIGUSR1 epoll watches nothing more, as at max_user_watches (epoll(7)),
    which would take 10 GB to reach; after the next one it does again."""

    def watch_if_there_is_one(loop: EventLoop, *arguments: Any) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        watch(loop, *arguments)

    def toggle(*_: object) -> None:
        full.pop() if full else full.append(True)

    full: list[bool] = []
    watch, EventLoop.watch = EventLoop.watch, watch_if_there_is_one  # type: ignore[method-assign]
    signal.signal(signal.SIGUSR1, toggle)


def test_who_comes_waits_until_there_are_watches_again() -> None:
    with Ruled(plant=no_watches) as ruled:
        ruled.put("a")
        ruled.set_rules(all_allowed(), all_allowed(BOB))
        with session_as(ruled.address, ALICE) as raw:
            os.kill(ruled.pid, signal.SIGUSR1)
            session_as(ruled.address, BOB, hello=False).sock.close()  # which has it pause
            with connected_as(ruled.address, BOB) as newcomer:
                newcomer.send(b"\x94\0\0\1\xc2")
                assert not select.select([newcomer], [], [], 1.5)[0]  # it has tried again
                os.close(raw.borrow(1, "a"))
                os.kill(ruled.pid, signal.SIGUSR1)
                assert select.select([newcomer], [], [], 10)[0]
        assert sum("accept-paused" in line for line in ruled.log()) == 1
