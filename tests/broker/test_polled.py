"""The broker never polls a descriptor that it lends.

A registration with epoll outlives the close of the descriptor while a dup of it lives (epoll(7)),
and a borrower has one.  What is registered is in /proc/PID/fdinfo of the epoll (proc(5)).
"""

from __future__ import annotations

import os
import pty
import re
import socket
from pathlib import Path

import pytest
from support import is_same_file, open_files, wait_until

import fdbroker
from fdbroker.errors import BorrowTimeout


def polled(pid: int) -> set[int]:
    """The numbers of all that its epolls wait for."""
    return {
        int(number)
        for epoll, target in open_files(pid).items()
        if target == "anon_inode:[eventpoll]"
        for number in re.findall(
            r"^tfd: *(\d+) ", Path(f"/proc/{pid}/fdinfo/{epoll}").read_text(), re.M
        )
    }


def test_no_entry_is_polled_whatever_becomes_of_it(broker: fdbroker.Broker) -> None:
    reader, writer = os.pipe()
    master, slave = pty.openpty()
    event = os.eventfd(0)
    server = socket.create_server(("127.0.0.1", 0))
    caller = socket.create_connection(server.getsockname())
    callee, _ = server.accept()
    mine = {
        "reader": reader,
        "writer": writer,
        "master": master,
        "slave": slave,
        "event": event,
        "server": server.fileno(),
        "caller": caller.fileno(),
    }
    lendable: set[int] = set()

    def look() -> None:
        """At the sessions it does, so it is looked at in the right place."""
        numbers = polled(broker.pid)
        assert numbers
        assert not numbers & lendable

    broker.stats()
    for name, number in mine.items():
        before = set(open_files(broker.pid))
        broker.put(name, number)
        came = {
            one for one in set(open_files(broker.pid)) - before if leads_to(broker.pid, one, number)
        }
        assert len(came) == 1
        lendable |= came
        look()
    with broker.borrow_all(list(mine)):
        look()
        for name in mine:
            with pytest.raises(BorrowTimeout):
                broker.borrow(name, exclusive=True, timeout=0.01)
        look()
    os.write(writer, b"x")  # there is something to be told of now
    caller.send(b"x")
    loans = [broker.borrow(name) for name in mine]
    for name in mine:
        broker.retire(name)
    look()
    assert all(is_same_file(loan.fileno(), mine[loan.entry]) for loan in loans)
    for loan in loans:
        loan.close()
    wait_until(lambda: not broker.entries())
    look()
    for number in (reader, writer, master, slave, event):
        os.close(number)
    for sock in (server, caller, callee):
        sock.close()


def leads_to(pid: int, number: int, mine: int) -> bool:
    return os.path.samestat(os.stat(f"/proc/{pid}/fd/{number}"), os.fstat(mine))
