"""Who somebody is: what the kernel said at the connect, and nothing else."""

from __future__ import annotations

import ctypes
import os
import socket

import pytest
from support import BORROW, PATIENCE, RETIRE, RETURN, SHARED, Raw, in_fork

import fdbroker
from fdbroker.errors import BorrowTimeout, NotPermitted

from .serving import CLONE_NEWPID
from .target import ALICE, ANSWERS, BOB, EVE, Target, become, meanwhile, unshare

CLONE_NEWUSER = 0x10000000  # linux/sched.h
PR_SET_DUMPABLE = 4  # linux/prctl.h
NOT_PERMITTED = 29
REFUSED = f"uid={ALICE} verb=borrow name=good/file"


def ask(raw: Raw, seq: int, name: str) -> object:
    """Borrow and return: 0, or the code and the data of the refusal."""
    raw.send(BORROW, seq, name, *SHARED)
    message, fds = raw.receive()
    assert message is not None
    for number in fds:
        os.close(number)
    if message[0] == 0:
        raw.send(RETURN, seq + 1)
        return 0
    return [message[0], *message[2:]]


def test_root_of_a_user_namespace_is_who_made_it(target: Target) -> None:
    """Inside it everybody can be root; outside the uid stays what it was."""

    def strike(address: str) -> None:
        def be_root() -> None:
            uid = os.geteuid()
            # one that has changed its uid may not write its maps: its /proc/self is root's
            ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
            unshare(CLONE_NEWUSER)
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
            assert os.geteuid() == 0
            with Raw(address) as raw:
                assert ask(raw, 1, "good/file") == [NOT_PERMITTED, ALICE, "borrow", "good/file"]
                assert ask(raw, 2, "public/memory") == 0
                raw.send(RETIRE, 4, "good/file", False, None)
                message, _ = raw.receive()
                assert message == [NOT_PERMITTED, 4, ALICE, "retire", "good/file"]

        in_fork(be_root)

    try:
        in_fork(lambda: unshare(CLONE_NEWUSER))
    except OSError as error:
        pytest.skip(f"no user namespace can be had here: {error}")
    target.attack(strike, rounds=5, why=REFUSED)


@pytest.mark.usefixtures("shared_target")  # which skips
def test_a_peer_in_a_sibling_pid_namespace() -> None:
    """Its pid is unknown, and shown as 0.  Two such are not taken for one process."""

    def hold(test: socket.socket) -> None:
        unshare(CLONE_NEWPID)

        def borrow() -> None:
            become(ALICE)
            with (
                fdbroker.Client(target.address) as client,
                client.borrow("public/busy", exclusive=True, purpose="sibling"),
            ):
                test.send(b"borrowed")
                test.recv(1)

        in_fork(borrow)

    def strike(address: str) -> None:
        with fdbroker.Client(address) as client:
            with pytest.raises(BorrowTimeout) as caught:
                client.borrow("public/busy", exclusive=True, timeout=0)
            assert caught.value.holders[0][0] == 0
            client.borrow("public/memory").close()

    with (
        Target(pid_namespace=True) as target,
        target.unharmed(),
        meanwhile(hold) as holder,
    ):
        assert holder.recv(100) == b"borrowed"
        (loan,) = target.client.loans("public/busy")
        assert (loan.pid, loan.uid, loan.purpose) == (0, ALICE, "sibling")
        target.attack(strike)
        target.attack(strike, uid=BOB)


def test_who_changes_its_uid_after_connecting(target: Target) -> None:
    """The session stays that of who connected: nobody gains by it, and root, who passes a socket
    on, passes its rights on (unix(7), SO_PEERCRED)."""

    def down() -> None:
        with Raw(target.address) as raw:
            become(ALICE)
            assert ask(raw, 1, "good/file") == 0  # it is root's session
            with Raw(target.address) as new:
                assert ask(new, 1, "good/file") == [NOT_PERMITTED, ALICE, "borrow", "good/file"]

    def back() -> None:
        os.setgroups([])
        os.setresuid(ALICE, ALICE, 0)  # it can become root again
        with Raw(target.address) as raw:
            os.setresuid(0, 0, 0)
            assert ask(raw, 1, "good/file") == [NOT_PERMITTED, ALICE, "borrow", "good/file"]
            assert ask(raw, 2, "public/memory") == 0

    enough = target.good.answers + ANSWERS
    before = told = target.told(REFUSED)
    while target.good.answers < enough or told - before < 10:
        in_fork(down)
        in_fork(back)
        told += 2
    assert target.told(REFUSED) == told


def test_a_socket_that_somebody_else_has_connected(target: Target) -> None:
    """Nor is one admitted by what a friend hands over, beyond what the friend may itself."""

    def strike(address: str) -> None:
        ours, theirs = socket.socketpair()

        def connect() -> None:
            with ours, theirs, Raw(address, hello=False) as raw:
                socket.send_fds(theirs, [b"x"], [raw.sock.fileno()])

        in_fork(connect)
        _, (number,), _, _ = socket.recv_fds(ours, 1, 1)
        ours.close()
        theirs.close()
        raw = Raw.__new__(Raw)
        raw.sock = socket.socket(fileno=number)
        raw.sock.settimeout(PATIENCE)
        with raw:
            raw.send(0, 0, 1, False)
            raw.receive()
            assert ask(raw, 1, "good/file") == [NOT_PERMITTED, BOB, "borrow", "good/file"]

    target.attack(strike, rounds=10, uid=BOB, why=f"uid={BOB} verb=borrow name=good/file")

    def refused() -> None:
        become(EVE)
        with fdbroker.Client(target.address) as client:
            client.entries()

    with pytest.raises(NotPermitted):
        in_fork(refused)
