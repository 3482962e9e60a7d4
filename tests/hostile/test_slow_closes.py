"""Closes that take for ever: the good client does not notice."""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401 - another uid may not read it
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from support import BORROW, PATIENCE, PUT, STATS, Raw, stopped, targets, wait_until

from fdbroker.lender.accounting import GRACE

from .fuse import FLUSH, GETATTR, Hanging, mounted
from .target import ALICE, ANSWERS, Target, become, meanwhile

EPHEMERAL = 2
EXCLUSIVE = 1
MOST = 253
SMALL = 64  # descriptors of a broker
LIMIT = 900  # the same, of a larger one
SESSIONS = 100  # of one uid
MANY = 12  # more than the broker has threads for it


def full_socket() -> tuple[socket.socket, socket.socket]:
    """One whose close waits half a minute for its peer, who does not read; and that peer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(65536))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
    return sock, peer


def test_lingering_sockets(target: Target) -> None:
    """Put and dropped, unasked, and behind what is refused: each time the broker has the last."""

    def strike(address: str) -> None:
        with ExitStack() as stack:
            for verb, name in ((PUT, "alice/slow"), (PUT, "not/mine"), (PUT, "!"), (STATS, "")):
                sock, peer = full_socket()
                stack.enter_context(peer)
                with Raw(address) as raw:
                    fields = [name, EPHEMERAL] if verb == PUT else []
                    raw.send(verb, 1, *fields, fds=[sock.fileno()])
                    raw.receive()
                    sock.close()  # not the last: it does not wait

    target.attack(strike, rounds=5)


def test_more_lingering_sockets_in_a_message_than_the_broker_has_room_for() -> None:
    """The kernel closes all but one while a worker receives.  Before Linux 6.16 it does so in the
    loop's thread if the session does not put, which nothing can be done about."""

    def send(test: socket.socket) -> None:
        become(ALICE)
        test.recv(1)
        with ExitStack() as stack:
            pairs = [full_socket() for _ in range(SMALL)]
            for _, peer in pairs:
                stack.enter_context(peer)
            raw = stack.enter_context(Raw(target.address))
            test.send(b"ready")
            test.recv(1)
            raw.send(PUT, 1, "alice/slow", EPHEMERAL, fds=[sock.fileno() for sock, _ in pairs])
            for sock, _ in pairs:
                sock.close()  # not the last: it does not wait
            test.send(b"sent")
            test.recv(1)

    with Target(limit=SMALL) as target, target.unharmed():
        with meanwhile(send) as attacker:
            attacker.send(b"x")
            assert attacker.recv(100) == b"ready"
            with stopped(target.pid):
                attacker.send(b"x")
                assert attacker.recv(100) == b"sent"
            be_served(target)
            assert target.counts()["jobs"] >= 1
        wait_until(lambda: not uses(target, ALICE))


@contextlib.contextmanager
def mounted_at(target: Target) -> Iterator[Hanging]:
    with ExitStack() as stack:
        try:
            found = stack.enter_context(mounted(target.folder / "hanging"))
        except OSError as error:
            pytest.skip(f"no FUSE can be mounted here: {error}")
        yield found


@pytest.fixture
def hanging(target: Target) -> Iterator[Hanging]:
    with mounted_at(target) as found:
        yield found


@contextlib.contextmanager
def hangs(
    target: Target,
    hanging: Hanging,
    call: int,
    attacker: socket.socket,
    says: bytes,
    jobs: int = MANY,
) -> Iterator[None]:
    """The attacker goes on until it `says` so, and the broker's threads hang in that call; the good
    client was served meanwhile.  After the block they go on."""
    hanging.hang(call)
    try:
        attacker.send(b"x")
        assert attacker.recv(100) == says
        wait_until(lambda: hanging.hang(call) >= 1)
        be_served(target)
        assert target.counts()["jobs"] >= jobs
        yield
    finally:
        hanging.let_go()


def test_a_file_system_that_hangs_in_flush(target: Target, hanging: Hanging) -> None:
    """close(2) of its files waits for ever; so do those of one uid, and of nobody else."""

    def put(test: socket.socket) -> None:
        become(ALICE)
        with open(hanging.file) as file, Raw(target.address) as raw:
            for seq in range(1, MANY + 1):
                raw.send(PUT, seq, f"alice/{seq}", EPHEMERAL, fds=[file.fileno()])
                message, _ = raw.receive()
                assert message is not None
                assert message[:2] == [0, seq]
            test.send(b"put")
            test.recv(1)
            raw.sock.shutdown(socket.SHUT_RDWR)
            test.send(b"gone")
            test.recv(1)

    with meanwhile(put) as attacker:
        assert attacker.recv(100) == b"put"
        with hangs(target, hanging, FLUSH, attacker, b"gone"):
            # What its session may have left unreceived waits behind these for a thread.
            (usage,) = (one for one in target.client.usage() if one.uid == ALICE)
            assert MANY <= usage.used["closes"] <= MANY + GRACE
    wait_until(lambda: not uses(target, ALICE))


def test_what_was_never_received_and_hangs_in_flush(target: Target, hanging: Hanging) -> None:
    """It was sent behind a fault: it has no more numbers than its uid may have."""
    files = targets(target.pid)

    def send(test: socket.socket) -> None:
        become(ALICE)
        with open(hanging.file) as file, ExitStack() as stack:
            raws = [stack.enter_context(Raw(target.address)) for _ in range(MANY)]
            test.send(b"opened")
            test.recv(1)
            with stack.pop_all():
                for raw in raws:
                    raw.sock.send(b"\xc1")
                    for _ in range(2):
                        raw.send(STATS, 1, fds=[file.fileno()] * 250)
            test.send(b"gone")
            test.recv(1)

    with meanwhile(send) as attacker:
        assert attacker.recv(100) == b"opened"
        hanging.hang(FLUSH)
        try:
            with stopped(target.pid):  # else the first would be shut down before all is sent
                attacker.send(b"x")
                assert attacker.recv(100) == b"gone"
            wait_until(lambda: hanging.hang(FLUSH) >= 1)
            be_served(target)
            assert target.counts()["jobs"] >= MANY
            (usage,) = (one for one in target.client.usage() if one.uid == ALICE)
            more = (targets(target.pid) - files).total()
            assert 16 <= more <= MANY + usage.used["closes"] <= MANY + usage.limits["closes"]
        finally:
            hanging.let_go()
    wait_until(lambda: not uses(target, ALICE))


def test_what_hangs_is_within_the_share_of_who_sent_it() -> None:
    """Of a message one descriptor at most has a number, beside the sessions; of what was never
    received as many as there is room for."""

    def send(test: socket.socket) -> None:
        become(ALICE)
        with open(hanging.file) as file, ExitStack() as stack:
            raws = [stack.enter_context(Raw(target.address)) for _ in range(SESSIONS)]
            test.send(b"opened")
            test.recv(1)
            for raw in raws[:MANY]:
                raw.send(STATS, 1, fds=[file.fileno()] * MOST)
            test.send(b"sent")
            test.recv(1)

    with Target(limit=LIMIT) as target, target.unharmed(), mounted_at(target) as hanging:
        files = targets(target.pid)
        with meanwhile(send) as attacker:
            assert attacker.recv(100) == b"opened"
            with hangs(target, hanging, FLUSH, attacker, b"sent", jobs=1):
                wait_until(lambda: hanging.hang(FLUSH) >= 2)
                more = (targets(target.pid) - files).total()
                assert SESSIONS < more <= (LIMIT - files.total()) // 2 + GRACE
        wait_until(lambda: not uses(target, ALICE))


def test_a_file_system_that_hangs_while_it_is_looked_at(target: Target, hanging: Hanging) -> None:
    """fstat(2) of its files waits for ever; others put theirs meanwhile."""

    def put(test: socket.socket) -> None:
        become(ALICE)
        with open(hanging.file) as file, ExitStack() as stack:
            test.send(b"opened")
            test.recv(1)
            for number in range(MANY):
                raw = stack.enter_context(Raw(target.address))
                raw.send(PUT, 1, f"alice/{number}", EPHEMERAL, fds=[file.fileno()])
            test.send(b"put")
            test.recv(1)

    with meanwhile(put) as attacker:
        assert attacker.recv(100) == b"opened"
        with hangs(target, hanging, GETATTR, attacker, b"put"):
            pass
    wait_until(lambda: not uses(target, ALICE))


def test_who_dies_while_what_it_put_is_looked_at(target: Target, hanging: Hanging) -> None:
    """Its exclusive loan is back at once, however long fstat(2) waits."""

    def put(test: socket.socket) -> None:
        become(ALICE)
        with open(hanging.file) as file, Raw(target.address) as raw:
            raw.send(BORROW, 1, "public/busy", EXCLUSIVE, None, "")
            message, (number,) = raw.receive()
            assert message is not None
            os.close(number)
            test.send(b"borrowed")
            test.recv(1)
            raw.send(PUT, 2, "alice/late", 0, fds=[file.fileno()])
            test.send(b"put")
            test.recv(1)

    with meanwhile(put) as attacker:
        assert attacker.recv(100) == b"borrowed"
        with hangs(target, hanging, GETATTR, attacker, b"put", jobs=1):
            assert hanging.hang(GETATTR) == 1
            assert [loan.uid for loan in target.client.loans("public/busy")] == [ALICE]
            attacker.send(b"x")
            target.client.borrow("public/busy", exclusive=True, timeout=PATIENCE / 2).close()
            assert target.client.loans("public/busy") == []
            be_served(target)
            assert hanging.hang(GETATTR) == 1
    wait_until(lambda: not uses(target, ALICE))


def uses(target: Target, uid: int) -> bool:
    """Whether it has anything on account: while the file system is there it must not have."""
    return uid in [usage.uid for usage in target.client.usage()]


def be_served(target: Target) -> None:
    """The good client is, for a while."""
    enough = target.good.answers + 4 * ANSWERS
    wait_until(lambda: target.good.answers >= enough)
