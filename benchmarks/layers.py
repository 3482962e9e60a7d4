"""Topic `layers`: where the time of a borrow and its return goes.

A ladder: each rung is a real exchange between two processes that does what the one before it does,
and one thing more, by the broker's own code where there is some.  The last rung of it is a client
of ours with a server that has no other session and no other verb.  What the broker takes beyond
that is its loop, and the looks at what may have gone wrong.

    switches            two eventfds: each process waits for the other
    messages            the request, the answer and the return, sent and received
    descriptor          the answer brings one, which the client closes
    epoll, unread       the server waits for all it has, and asks whether the last answer was read
    decode, rules       what does this peer want, and may it
    lend                the name, the turn, the quota, the count
    ledger              written through
    encode              the answer, with the time
    client              ours, in place of one written out by hand
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from functools import partial
from select import EPOLLIN, epoll
from time import CLOCK_BOOTTIME, clock_gettime_ns

from benchmarks.base import BASE, BASE_C, C_CHECK, lent_file
from benchmarks.cycle import borrow, shared
from benchmarks.harness import Run, Topic, Variant, child
from fdbroker import Client
from fdbroker.descriptors import Kind
from fdbroker.ipc.connection import MESSAGE
from fdbroker.ipc.loop import EVENTS
from fdbroker.ipc.messages import (
    BORROW,
    GRANTED,
    HEAD,
    HELLO,
    KNOWN,
    ONE_OF_ONE,
    REPLY_BYTES,
    RETURN,
    SPLIT,
    VERSION,
    decode_request,
    encode,
    encode_grant,
    pack_grant,
    remember,
    template,
)
from fdbroker.ipc.unix import INT, LEAST_QUEUED, QUEUED, SEND_NOW, SIOCOUTQ, queued, rights
from fdbroker.lender import Ledger, Lender
from fdbroker.lender.ledger import SESSION_WORDS
from fdbroker.lender.parts import Peer
from fdbroker.rc import FD

SWITCHES, MESSAGES, DESCRIPTOR, EPOLL, DECODE, LEND, LEDGER, ENCODE, CLIENT = RUNGS = (
    "switches",
    "messages",
    "descriptor",
    "epoll, unread",
    "decode, rules",
    "lend",
    "ledger",
    "encode",
    "client",
)
CYCLE = "fdbroker"
ROOM = 16, 16, 16  # of the ledger
END = 2**32  # an eventfd's count that says so


# --- the clients -----------------------------------------------------------------------------


@contextmanager
def pulse() -> Iterator[Run]:
    there, back = os.eventfd(0, os.EFD_CLOEXEC), os.eventfd(0, os.EFD_CLOEXEC)
    try:
        command = [sys.executable, "-m", "benchmarks.layers", SWITCHES, str(there), str(back)]
        with child(command, pass_fds=(there, back)):

            def run(n: int) -> None:
                write, read = os.eventfd_write, os.eventfd_read
                for _ in range(n):
                    write(there, 1)
                    read(back)

            yield run
            os.eventfd_write(there, END)
    finally:
        os.close(there)
        os.close(back)


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
        with child(command, pass_fds=numbers), connected(name, address) as run:
            yield run


@contextmanager
def connected(name: str, address: str) -> Iterator[Run]:
    if name == CLIENT:
        with Client(address) as client:
            yield shared(client)
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(address)
        sock.send(encode([HELLO, 0, VERSION, False]))
        sock.recv(REPLY_BYTES)
        yield by_hand(sock, brings=RUNGS.index(name) >= RUNGS.index(DESCRIPTOR))


def by_hand(sock: socket.socket, *, brings: bool) -> Run:
    """What a client must do, and no more."""
    head, tail = template(BORROW, "x", 0, None, "")
    return_head, _ = template(RETURN)
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
            send(pack(return_head, seq + 1))
        last += 2 * n

    return run


# --- the servers -----------------------------------------------------------------------------


def serve_pulse(there: int, back: int) -> None:
    while os.eventfd_read(there) < END:
        os.eventfd_write(back, 1)


def serve(name: str, sock: socket.socket, fd: int) -> None:
    """One session, until its end.  What a rung does not do yet is one look at a flag."""
    brings, watches, decodes, lends, writes, encodes = (
        RUNGS.index(name) >= RUNGS.index(since)
        for since in (DESCRIPTOR, EPOLL, DECODE, LEND, LEDGER, ENCODE)
    )
    lender = Lender(Ledger(bytearray(Ledger.size(*ROOM)), *ROOM))
    lender.put(None, 0, "x", b"", FD(fd), Kind.FILE, 0)
    session = lender.open(Peer(os.geteuid(), os.getegid(), os.getppid()))
    if not writes:
        session.record = [0] * SESSION_WORDS  # type: ignore[assignment]
    number, receive, ancillary = sock.fileno(), sock.recv_into, rights((fd,))
    data, seq, verb, back, now = encode_grant(0, 1, 1, 0), 0, 0, HEAD.size, 0
    greet(sock)
    sock.setblocking(not watches)
    with epoll() as watched:
        watched.register(number, EPOLLIN)
        poll = watched.poll
        while True:
            if watches:
                poll(None, EVENTS)
            while True:
                try:
                    size = receive(MESSAGE)
                except BlockingIOError:
                    break
                if decodes:
                    try:
                        head, seq, tail = SPLIT[size](MESSAGE)
                        verb, fields = KNOWN[head + tail]
                    except KeyError:
                        if not size:
                            return
                        request = bytes(MESSAGE[:size])
                        verb, seq, fields = decode_request(request)
                        remember(KNOWN, request, verb, fields)
                elif size:
                    verb = RETURN if size == back else BORROW
                else:
                    return
                if verb == RETURN:
                    if lends:
                        lender.give_back(session, seq, now)
                    continue
                if encodes:
                    now = clock_gettime_ns(CLOCK_BOOTTIME)
                if lends:
                    lender.borrow(session, seq, fields, now)
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
        Variant(SWITCHES, pulse, against="base"),
        *(Variant(name, partial(rung, name), against="base") for name in RUNGS[1:]),
        Variant(CYCLE, borrow, against="base"),
    ),
    check=C_CHECK,
    ladder=(*RUNGS, CYCLE),
)


if __name__ == "__main__":
    name, *numbers = sys.argv[1:]
    first, second = map(int, numbers)
    if name == SWITCHES:
        serve_pulse(first, second)
    else:
        with socket.socket(fileno=first) as listener:
            sock, _ = listener.accept()
        with sock:
            serve(name, sock, second)
