"""Topic `sessions`: one active session beside many that are idle; and all of many active in turn.
s6-fdholderd has at most 256.

The idle ones are held by another process.  Those that are active in turn are spoken by hand, each
for one cycle, so what is measured is the broker's part of it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle

from benchmarks.base import lent_file
from benchmarks.crowd import crowd, sessions
from benchmarks.cycle import shared
from benchmarks.harness import Run, Topic, Variant, needs
from benchmarks.peers import s6_kept
from fdbroker.ipc.protocol.codec import HEAD, template
from fdbroker.ipc.protocol.messages import BORROW, RETURN

IDLE = 1, 10, 100, 250, 1000, 4000
FIRST = "beside 1 idle"
S6_IDLE = 1, 100, 250
AHEAD_FROM = 100  # idle sessions we are to be faster than s6
GOAL, BEYOND = 1.15, 1.05
IN_TURN = 1, 4000
FIRST_IN_TURN = "1 in turn"


@contextmanager
def beside(idle: int) -> Iterator[Run]:
    broker_class = needs("fdbroker", "Broker")
    with lent_file() as file, broker_class() as broker:
        broker.put("x", file)
        with crowd(broker.address, idle):
            yield shared(broker)


@contextmanager
def in_turn(count: int) -> Iterator[Run]:
    broker_class = needs("fdbroker", "Broker")
    head, tail = template(BORROW, "x", 0, None, "")
    return_head, _ = template(RETURN)
    with lent_file() as file, broker_class() as broker, ExitStack() as stack:
        broker.put("x", file)
        turns = cycle([(stack.enter_context(sock), []) for sock in sessions(broker.address, count)])

        def run(n: int) -> None:
            space, cloexec = socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
            pack, close = HEAD.pack, os.close
            for _ in range(n):
                sock, seqs = next(turns)
                seqs.append(None)
                seq = 2 * len(seqs) - 1
                sock.send(pack(head, seq) + tail)
                _, [(_, _, rights)], _, _ = sock.recvmsg(100, space, cloexec)
                close(int.from_bytes(rights, "little"))
                sock.send(pack(return_head, seq + 1))

        yield run


TOPIC = Topic(
    name="sessions",
    unit="borrow + return of one descriptor",
    cycles=1600,
    variants=(
        *(
            Variant(
                f"beside {idle} idle",
                partial(beside, idle),
                against=FIRST,
                goal=GOAL if idle == IDLE[-1] else None,
                beyond=BEYOND if idle == IDLE[-1] else None,
            )
            for idle in IDLE
        ),
        *(
            Variant(
                f"s6 beside {idle} idle",
                partial(s6_kept, idle),
                against=f"beside {idle} idle",
                least=1 if idle >= AHEAD_FROM else None,
            )
            for idle in S6_IDLE
        ),
        *(
            Variant(f"{count} in turn", partial(in_turn, count), against=FIRST_IN_TURN)
            for count in IN_TURN
        ),
    ),
)
