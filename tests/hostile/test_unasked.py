"""Descriptors that nobody asked for: at most closed, and never kept."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing

import pytest
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
    Raw,
    can_refuse_descriptors,
    start_fork,
    stopped,
    wait_until,
)

from .target import ALICE, ANSWERS, Target, become

PROTOCOL_ERROR, UNSUPPORTED_KIND = 60, 24
MOST = 253  # of one message, unix(7)
EPHEMERAL = 2
UNASKED = 'reason="it sent descriptors that nobody asked for"'
TAKES_NONE = [
    [STATS, 1],
    [ENTRIES, 1, 0],
    [LOANS, 1, "", 0, 0],
    [BORROW, 1, "public/memory", *SHARED],
    [MORE, 1, 0],
    [RETURN, 1],
    [CANCEL, 1],
    [RETIRE, 1, "alice/none", False, None],
    [HELLO, 1, 1, True],
    [99, 1],
    ["no", "message"],
]


class Pipe:
    """A pipe whose writing end is sent away: whether anybody has it, the kernel says."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def is_nobodys(self) -> bool:
        """Our own copy closed; wait for the end-of-file.

        The kernel looks for cycles when a Unix socket is freed (net/unix/garbage.c), and the broker
        may have closed its copy after the last one was.  So others are, meanwhile.
        """
        os.close(self.writer)

        def ended() -> bool:
            for sock in socket.socketpair():
                sock.close()
            return bool(select.select([self.reader], [], [], 0)[0])

        wait_until(ended)
        return os.read(self.reader, 1) == b""

    def close(self) -> None:
        os.close(self.reader)


@pytest.fixture(params=["the kernel refuses them", "the kernel cannot refuse them"])
def either(request: pytest.FixtureRequest, shared_target: Target) -> Iterator[Target]:
    """A broker under a kernel with SO_PASSRIGHTS, and one under an older one."""
    if "cannot" in request.param:
        with Target(passes_rights=True) as target, target.unharmed():
            yield target
    elif can_refuse_descriptors():
        with shared_target.unharmed():
            yield shared_target
    else:
        pytest.skip("SO_PASSRIGHTS is of Linux 6.16")


def test_to_a_session_that_puts(target: Target) -> None:
    """It may bring descriptors, but one at a time, with the one request that takes it."""

    def strike(address: str) -> None:
        for message in TAKES_NONE:
            with closing(Pipe()) as pipe, Raw(address) as raw:
                raw.send(*message, fds=[pipe.writer] * MOST)
                raw.is_refused(PROTOCOL_ERROR)
                assert pipe.is_nobodys()

    target.attack(strike, rounds=5, why="event=fault", lines=len(TAKES_NONE))


def test_before_hello_and_with_it(either: Target) -> None:
    """The kernel refuses them there, or they are closed."""
    refuses = either.refuses

    def strike(address: str) -> None:
        for message in ([HELLO, 0, 1, True], [HELLO, 0, 1, False], [PUT, 1, "x", 0], [STATS, 1]):
            with closing(Pipe()) as pipe, Raw(address, hello=False) as raw:
                if refuses:
                    with pytest.raises(PermissionError):
                        raw.send(*message, fds=[pipe.writer] * MOST)
                    raw.send(PUT, 0, "x", 0)
                else:
                    raw.send(*message, fds=[pipe.writer] * MOST)
                raw.is_refused(PROTOCOL_ERROR)
                assert pipe.is_nobodys()

    either.attack(strike, why="event=fault", lines=4)


def test_to_a_session_that_puts_nothing(either: Target) -> None:
    """Where the kernel refuses them the session lives on: nothing has come."""
    refuses = either.refuses

    def strike(address: str) -> None:
        with closing(Pipe()) as pipe, Raw(address, puts=False) as raw:
            for seq in range(1, 6):
                if not refuses:
                    break
                with pytest.raises(PermissionError):
                    raw.send(PUT, seq, "alice/x", 0, fds=[pipe.writer] * MOST)
                raw.send(ENTRIES, seq, 0)
                message, fds = raw.receive()
                assert message is not None
                assert (message[:2], fds) == ([0, seq], [])
            if not refuses:
                raw.send(ENTRIES, 1, 0, fds=[pipe.writer] * MOST)
                raw.is_refused(PROTOCOL_ERROR)
            assert pipe.is_nobodys()

    either.attack(strike, why="" if refuses else UNASKED)


@pytest.mark.parametrize("many", [0, 2, 3, MOST])
def test_a_put_of_another_number_than_one(target: Target, many: int) -> None:
    def strike(address: str) -> None:
        with closing(Pipe()) as pipe, Raw(address) as raw:
            raw.send(PUT, 1, "alice/x", 0, fds=[pipe.writer] * many)
            raw.is_refused(PROTOCOL_ERROR)
            assert pipe.is_nobodys()

    target.attack(strike, why="a put brings one descriptor")


def test_spam(target: Target) -> None:
    """As much as the socket takes, without waiting for an answer: thousands of descriptors."""

    def strike(address: str) -> None:
        with closing(Pipe()) as pipe, Raw(address) as raw:
            raw.sock.setblocking(False)
            try:
                for seq in range(1, 100):
                    raw.send(PUT, seq, "alice/x", EPHEMERAL, fds=[pipe.writer] * MOST)
            except (BlockingIOError, BrokenPipeError, OSError):
                pass
            raw.sock.close()
            assert pipe.is_nobodys()

    target.attack(strike, rounds=2)


# --- sockets that can carry descriptors themselves ----------------------------------------------


def sent_over_itself(kind: int) -> Sequence[socket.socket]:
    """A pair, each end of which is under way to the other: a cycle once nobody has them open."""
    pair = socket.socketpair(socket.AF_UNIX, kind)
    for one, other in (pair, pair[::-1]):
        socket.send_fds(one, [b"x"], [one.fileno(), other.fileno()])
    return pair


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_socket_sent_over_itself(target: Target, kind: int) -> None:
    """It is put, and sent unasked; what is in it must be freed with it."""

    def strike(address: str) -> None:
        for verb in (PUT, STATS):
            one, other = sent_over_itself(kind)
            with closing(Pipe()) as pipe, Raw(address) as raw:
                socket.send_fds(one, [b"x"], [pipe.writer])
                raw.send(verb, 1, *["alice/x", 0] * (verb == PUT), fds=[one.fileno()])
                message, _ = raw.receive()
                assert message is not None
                assert message[0] == (UNSUPPORTED_KIND if verb == PUT else PROTOCOL_ERROR)
                one.close()
                other.close()
                assert pipe.is_nobodys()  # the kernel has found the cycle: nobody is in its way

    target.attack(strike, rounds=4)


def test_its_own_connection_sent_back(target: Target) -> None:
    """The broker would keep its client's end open, and never see the session end."""

    def strike(address: str) -> None:
        for verb, flags in ((PUT, 0), (PUT, EPHEMERAL), (STATS, None)):
            with Raw(address) as raw, Raw(address) as other:
                for seq, sent in ((1, other), (2, raw)):
                    fields = ["alice/x", flags] if verb == PUT else []
                    raw.send(verb, seq, *fields, fds=[sent.sock.fileno()])
                    if verb == STATS:
                        break

    target.attack(strike, rounds=10)


@pytest.mark.usefixtures("shared_target")  # which skips
def test_its_own_connection_left_in_the_queue() -> None:
    """The last thing that holds the client's end is a message that the broker does not receive,
    since the client has not read: no end-of-file can come, from a client that is dead."""

    def lose(address: str) -> None:
        with Raw(address) as raw:
            raw.send(BORROW, 1, "public/memory", *SHARED)
            raw.send(RETURN, 2)
            raw.send(BORROW, 3, "public/memory", *SHARED)
            raw.send(PUT, 4, "alice/x", 0, fds=[raw.sock.fileno()])

    with Target(patience=0.3) as target, target.unharmed():
        target.attack(lose, why="reason=it-does-not-read")
        target.client.borrow("public/memory", exclusive=True, timeout=5).close()


def test_what_comes_while_the_broker_is_stopped(target: Target) -> None:
    """All of it is in the queue at once, and who sent it is gone."""
    before = target.good.answers
    came, here = os.pipe()
    wait, proceed = os.pipe()

    def send() -> None:
        become(ALICE)
        with ExitStack() as stack, closing(Pipe()) as pipe:
            sessions = [stack.enter_context(Raw(target.address)) for _ in range(10)]
            os.write(here, b"x")
            os.read(wait, 1)
            for raw in sessions:
                raw.sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    for seq in range(1, 50):
                        fds = [pipe.writer, raw.sock.fileno(), sessions[0].sock.fileno()]
                        raw.send(*TAKES_NONE[seq % len(TAKES_NONE)], fds=fds)
                        raw.send(PUT, seq, "alice/x", 0, fds=fds[1:2])

    done = start_fork(send)
    os.read(came, 1)
    with stopped(target.pid):
        os.write(proceed, b"x")
        done()
    for number in (came, here, wait, proceed):
        os.close(number)
    wait_until(lambda: target.good.answers >= before + ANSWERS)
