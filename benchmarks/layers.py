"""Topic `layers`: where the time of a borrow and its return goes.

A ladder: each rung is a real exchange between two processes that does what the one before it does,
and one thing more, by the broker's own code where there is some.  A layer is what a rung takes
beyond the one before, so the sum of all is what the last one takes: a client of ours with a server
that has no other session and no other verb.  What the broker takes beyond that is its loop, and the
looks at what may have gone wrong.

    switches               two eventfds: each process waits for the other
    send                   the request, the answer and the return are sent, and stay in their queues
    receive                they are received, which is what each process waits for now, in place of
                           eventfds: so much as their four calls take, this shows too little, and
                           `switches` too much
    close                  the client closes a descriptor, one of some that it has made before
    descriptor install     the answer brings that: attached, sent, received and installed
    epoll, unread          the server waits for all it has, and asks whether the last answer was
                           read
    decode                 what this peer wants, as it was decoded when it first said so; a peer
                           that may do everything is not held to the rules
    ledger                 the words of the loan and of its end, written through
    rules, quota, count    what the lender does: the name, the turn, the quota, the count
    encode                 the answer, with the time
    client                 ours, in place of one written out by hand

Between some cycles and the next the messages of `send` are received, and descriptors for `close`
made, while the clock does not run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fcntl import ioctl
from functools import partial
from select import EPOLLIN, epoll
from time import CLOCK_BOOTTIME, clock_gettime_ns
from typing import BinaryIO

from benchmarks.base import BASE, BASE_C, C_CHECK, lent_file
from benchmarks.cycle import borrow, shared
from benchmarks.harness import Run, Topic, Variant, child
from fdbroker import Client
from fdbroker.descriptors import Kind
from fdbroker.ipc.protocol.codec import (
    GRANTED,
    HEAD,
    ONE_OF_ONE,
    encode,
    encode_grant,
    pack_grant,
    template,
)
from fdbroker.ipc.protocol.messages import BORROW, HELLO, REPLY_BYTES, RETURN, VERSION
from fdbroker.ipc.server.dispatcher import MESSAGE
from fdbroker.ipc.server.request_cache import RequestCache
from fdbroker.ipc.transport.unix_channel import LEAST_QUEUED, QUEUED, SIOCOUTQ, queued
from fdbroker.ipc.transport.unix_port import LEAST_EVENTS
from fdbroker.ipc.transport.unix_socket import INT, SEND_NOW, rights
from fdbroker.lender import Ledger, Lender
from fdbroker.lender.ledger import BORROW_SEQ, COMMIT, SHAPE, SINCE, STATE_BITS
from fdbroker.lender.model import IDLE, LENT, Peer
from fdbroker.rc import FD

SWITCHES, SEND, RECEIVE, CLOSE, INSTALL, EPOLL, DECODE, LEDGER, LEND, ENCODE, CLIENT = RUNGS = (
    "switches",
    "send",
    "receive",
    "close",
    "descriptor install",
    "epoll, unread",
    "decode",
    "ledger",
    "rules, quota, count",
    "encode",
    "client",
)
CYCLE = "fdbroker"
ROOM = 16, 16, 16  # of the ledger
SOME = 32  # cycles, between which the clock stands for what a rung does not count
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
CLEAR, END = 2**16, 2**32  # an eventfd's counts that say so


# --- the clients -----------------------------------------------------------------------------


@contextmanager
def woken(name: str) -> Iterator[Run]:
    """The rungs whose processes wake each other by eventfds."""
    with ExitStack() as stack:
        there, back = os.eventfd(0, os.EFD_CLOEXEC), os.eventfd(0, os.EFD_CLOEXEC)
        stack.callback(os.close, there)
        stack.callback(os.close, back)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(ours)
        numbers = there, back, theirs.fileno()
        command = [sys.executable, "-m", "benchmarks.layers", name, *map(str, numbers)]
        with theirs:
            stack.enter_context(child(command, pass_fds=numbers))
        stack.callback(os.eventfd_write, there, END)
        yield pulse(there, back) if name == SWITCHES else sending(there, back, ours)


def pulse(there: int, back: int) -> Run:
    def run(n: int) -> None:
        write, read = os.eventfd_write, os.eventfd_read
        for _ in range(n):
            write(there, 1)
            read(back)

    return run


def sending(there: int, back: int, sock: socket.socket) -> Run:
    head, tail = template(BORROW, "x", 0, None, "")
    return_head, _ = template(RETURN)

    def run(n: int) -> None:
        write, read, send, pack = os.eventfd_write, os.eventfd_read, sock.send, HEAD.pack
        for seq in range(1, 2 * n, 2):
            send(pack(head, seq) + tail)
            write(there, 1)
            read(back)
            send(pack(return_head, seq + 1))

    sent = 0

    def clear(n: int) -> None:
        nonlocal sent
        os.eventfd_write(there, CLEAR + sent)
        os.eventfd_read(back)
        for _ in range(sent):
            sock.recv(REPLY_BYTES)
        sent = n

    return by_the_few(clear, run)


def by_the_few(before: Callable[[int], None], run: Callable[[int], None]) -> Run:
    """Counts the time of `run`, each some cycles, and not that of what comes `before` these."""

    def counted(n: int) -> int:
        took, clock = 0, time.perf_counter_ns
        while n:
            some = min(n, SOME)
            before(some)
            start = clock()
            run(some)
            took += clock() - start
            n -= some
        return took

    return counted


@contextmanager
def rung(name: str) -> Iterator[Run]:
    """A server that does all up to that rung, and its client."""
    with (
        tempfile.TemporaryDirectory() as folder,
        lent_file() as file,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
    ):
        address = f"{folder}/socket"
        listener.bind(address)
        listener.listen()
        numbers = listener.fileno(), file.fileno()
        command = [sys.executable, "-m", "benchmarks.layers", name, *map(str, numbers)]
        with child(command, pass_fds=numbers), connected(name, address, file) as run:
            yield run


@contextmanager
def connected(name: str, address: str, file: BinaryIO) -> Iterator[Run]:
    if name == CLIENT:
        with Client(address) as client:
            yield shared(client)
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(address)
        sock.send(encode([HELLO, 0, VERSION, False]))
        sock.recv(REPLY_BYTES)
        yield by_hand(name, sock, file.fileno())


def by_hand(name: str, sock: socket.socket, lent: int) -> Run:
    """What a client must do, and no more."""
    head, tail = template(BORROW, "x", 0, None, "")
    return_head, _ = template(RETURN)
    closes, brings = (RUNGS.index(name) >= RUNGS.index(since) for since in (CLOSE, INSTALL))
    made: list[int] = []
    last = 0

    def run(n: int) -> None:
        nonlocal last
        send, recv, recvmsg, close = sock.send, sock.recv, sock.recvmsg, os.close
        space, cloexec = socket.CMSG_SPACE(INT.size), socket.MSG_CMSG_CLOEXEC
        pack, unpack = HEAD.pack, INT.unpack
        for seq in range(last + 1, last + 2 * n, 2):
            send(pack(head, seq) + tail)
            if brings:
                _, [(_, _, ancillary)], _, _ = recvmsg(REPLY_BYTES, space, cloexec)
                [number] = unpack(ancillary)
                close(number)
            else:
                recv(REPLY_BYTES)
                if closes:
                    close(made.pop())
            send(pack(return_head, seq + 1))
        last += 2 * n

    def make(n: int) -> None:
        made.extend(os.dup(lent) for _ in range(n))

    return by_the_few(make, run) if name == CLOSE else run


# --- the servers -----------------------------------------------------------------------------


def serve_woken(name: str, there: int, back: int, sock: socket.socket) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # an eventfd has no end-of-file
    data = encode_grant(0, 1, 1, 0)
    while (count := os.eventfd_read(there)) < END:
        if count >= CLEAR:
            for _ in range(2 * (count - CLEAR)):
                sock.recv_into(MESSAGE)
        elif name == SEND:
            sock.send(data, SEND_NOW)
        os.eventfd_write(back, 1)


def serve(name: str, sock: socket.socket, fd: int) -> None:
    """One session, until its end.  What a rung does not do yet is one look at a flag."""
    brings, watches, decodes, writes, lends, encodes = (
        RUNGS.index(name) >= RUNGS.index(since)
        for since in (INSTALL, EPOLL, DECODE, LEDGER, LEND, ENCODE)
    )
    writes = writes and not lends  # the lender does it itself
    lender = Lender(Ledger(bytearray(Ledger.size(*ROOM)), *ROOM))
    slot = lender.put(None, 0, "x", b"", FD(fd), Kind.FILE, 0).slot
    session = lender.open(Peer(os.geteuid(), os.getegid(), os.getppid()))
    record = session.record
    cache = RequestCache()
    split, known = cache.split, cache.known
    number, receive, ancillary = sock.fileno(), sock.recv_into, rights((fd,))
    data, seq, verb, back, now = encode_grant(0, 1, 1, 0), 0, 0, HEAD.size, 0
    greet(sock)
    sock.setblocking(not watches)
    with epoll() as watched:
        watched.register(number, EPOLLIN)
        poll = watched.poll
        while True:
            if watches:
                poll(None, LEAST_EVENTS)
            while True:
                try:
                    size = receive(MESSAGE)
                except BlockingIOError:
                    break
                if decodes:
                    try:
                        head, seq, tail = split[size](MESSAGE)
                        verb, fields = known[head + tail]
                    except KeyError:
                        if not size:
                            return
                        request = bytes(MESSAGE[:size])
                        verb, seq, fields = cache.decode(request)
                        cache.remember(request, verb, fields)
                elif size:
                    verb = RETURN if size == back else BORROW
                else:
                    return
                if verb == RETURN:
                    if lends:
                        lender.return_loan(session, seq, now)
                    elif writes:
                        record[COMMIT] = seq << STATE_BITS | IDLE
                    continue
                if encodes:
                    now = clock_gettime_ns(CLOCK_BOOTTIME)
                if lends:
                    lender.borrow(session, seq, fields, now)
                elif writes:
                    record[BORROW_SEQ] = seq
                    record[SINCE] = now
                    record[SHAPE] = fields.shape | slot
                    record[COMMIT] = seq << STATE_BITS | LENT
                if watches:
                    ioctl(number, SIOCOUTQ, QUEUED)
                    if queued[0] >= LEAST_QUEUED:
                        raise RuntimeError("the last answer was not read")
                if encodes:
                    data = pack_grant(GRANTED, seq, ONE_OF_ONE, now)
                if brings:
                    sock.sendmsg((data,), ancillary, SEND_NOW)
                else:
                    sock.send(data, SEND_NOW)
                break


def greet(sock: socket.socket) -> None:
    sock.recv(REPLY_BYTES)
    sock.send(encode([0, 0, VERSION]))


TOPIC = Topic(
    name="layers",
    unit="borrow + return of one descriptor",
    cycles=3200,
    variants=(
        BASE,
        BASE_C,
        *(Variant(name, partial(woken, name), against="base") for name in RUNGS[:2]),
        *(Variant(name, partial(rung, name), against="base") for name in RUNGS[2:]),
        Variant(CYCLE, borrow, against="base"),
    ),
    check=C_CHECK,
    ladder=(*RUNGS, CYCLE),
)


if __name__ == "__main__":
    name, *numbers = sys.argv[1:]
    if name in (SWITCHES, SEND):
        there, back, third = map(int, numbers)
        with socket.socket(fileno=third) as sock:
            serve_woken(name, there, back, sock)
    else:
        listening, fd = map(int, numbers)
        with socket.socket(fileno=listening) as listener:
            sock, _ = listener.accept()
        with sock:
            serve(name, sock, fd)
