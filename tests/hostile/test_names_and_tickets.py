"""What is another's, and what looks like something else: names, purposes, paths, tickets."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import BORROW, LOANS, PUT, RETIRE, SHARED, Raw, in_fork

import fdbroker
from fdbroker.errors import NotPermitted, UnknownTicket
from fdbroker.ipc.protocol.messages import TICKET_BYTES

from .target import ALICE, BOB, EVE, Target, become, meanwhile

NOT_PERMITTED, BAD_NAME, UNKNOWN_TICKET, PROTOCOL_ERROR = 29, 20, 22, 60
EVIL = [
    "\n",
    "alice/x\nfdbroker: event=ready uid=0",
    "\x1b[31malice",
    "\x1b]0;title\x07",
    "\x1b[2J\x1b[H",
    "alice/\r",
    "alice/\x00",
    "alice/\x85",
    "alice/\u2028line",
    "alice/\u202eesrever",
    "alice/\U000e0041",
    "..\\..\\",
    "alice/x y",
    'alice/" name="web',
    "%s%n%d",
    "\x7f",
]


def test_names_with_line_ends_and_escapes(target: Target) -> None:
    """They are refused, in all requests that have one; and what is refused so is not logged."""

    def strike(address: str) -> None:
        number = os.open(os.devnull, os.O_RDONLY)
        with Raw(address) as raw:
            seq = 0
            for name in EVIL:
                for message, fds in (
                    ([PUT, name, 0], [number]),
                    ([BORROW, name, *SHARED], []),
                    ([BORROW, [name], *SHARED], []),
                    ([RETIRE, name, False, None], []),
                    ([LOANS, name, 0, 0], []),
                ):
                    seq += 1
                    raw.send(message[0], seq, *message[1:], fds=fds)
                    answer, _ = raw.receive()
                    assert answer in ([BAD_NAME, seq, name], [0, seq, 0, 0, []])
        os.close(number)

    target.attack(strike, rounds=5)


def test_a_name_as_bytes_is_a_ticket(target: Target) -> None:
    """So the rules for names are not got around by another type."""

    def strike(address: str) -> None:
        with Raw(address) as raw:
            for seq, name in enumerate((b"good/file", b"public/memory", b"x", b"\xff" * 16), 1):
                raw.send(BORROW, seq, name, *SHARED)
                assert raw.receive() == ([UNKNOWN_TICKET, seq], [])

    target.attack(strike)


def test_refusals_are_one_line_each(target: Target) -> None:
    def strike(address: str) -> None:
        with Raw(address) as raw:
            for seq, name in enumerate(("good/file", "bob/x", "x" * 255), 1):
                raw.send(BORROW, seq, name, *SHARED)
                assert raw.receive() == ([NOT_PERMITTED, seq, ALICE, "borrow", name], [])

    target.attack(strike, why=f"uid={ALICE} verb=borrow name=", lines=3)


def command(address: str, *arguments: str) -> str:
    """What the command prints."""
    run = [sys.executable, "-m", "fdbroker", *arguments, "--socket", address]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout


def test_what_a_list_shows_of_others_is_on_one_line(target: Target) -> None:
    """Purposes, paths and process names are whatever somebody has made of them."""
    evil = target.folder / "x\n\x1b[31mpublic"
    evil.write_bytes(b"")
    evil.chmod(0o644)

    def put(test: socket.socket) -> None:
        Path("/proc/self/comm").write_text("\x1b[2J\nroot")
        become(ALICE)
        with open(evil) as file, Raw(target.address) as raw:
            raw.send(PUT, 1, "alice/evil", 2, fds=[file.fileno()])
            raw.receive()
            raw.send(BORROW, 2, "alice/evil", 0, None, "\x1b[2J\nfine, \u202eesrever")
            _, (number,) = raw.receive()
            test.send(b"borrowed")
            test.recv(1)
            os.close(number)

    with meanwhile(put) as other:
        assert other.recv(100) == b"borrowed"
        for arguments, first in (("ls", "NAME"), ("loans", "ENTRY"), ("stats", "USER")):
            shown = command(target.address, arguments)
            assert shown.replace("\n", "").isprintable()
            header, *rows = shown.splitlines()
            assert header.startswith(first)
            if arguments != "stats":
                assert sum("alice/evil" in row for row in rows) == 1
                assert all(row.startswith(("alice/", "good/", "public/")) for row in rows)
    evil.unlink()


# --- what is another's ------------------------------------------------------------------------


def test_other_peoples_tickets(target: Target) -> None:
    """A ticket lets its bearer borrow, who must be admitted; it lets nobody retire.  It cannot be
    guessed."""
    number = os.memfd_create("shared")

    def share(test: socket.socket) -> None:
        become(ALICE)
        with fdbroker.Client(target.address) as client, client.share(number) as ref:
            test.send(ref._ticket)
            test.recv(1)
            ref.borrow().close()  # it is there still

    def ask() -> None:
        become(EVE)
        with fdbroker.Client(target.address) as client:
            client.borrow_ticket(ticket)

    def strike(address: str) -> None:
        with fdbroker.Client(address) as client:
            with client.borrow_ticket(ticket) as loan:
                assert os.path.sameopenfile(loan.fileno(), number)
            with pytest.raises(NotPermitted):
                client.retire(ticket)
            for changed in range(TICKET_BYTES):
                near = bytearray(ticket)
                near[changed] ^= 1
                for guess in (bytes(near), secrets.token_bytes(TICKET_BYTES)):
                    with pytest.raises(UnknownTicket):
                        client.borrow_ticket(guess)

    with meanwhile(share) as owner:
        ticket = owner.recv(100)
        assert len(ticket) == TICKET_BYTES
        target.attack(strike, rounds=10, uid=BOB, why=f"uid={BOB} verb=retire")
        with pytest.raises(NotPermitted) as caught:
            in_fork(ask)
        assert caught.value.data == (EVE, "connect", "*")
    os.close(number)


def test_who_is_not_admitted_gets_no_session(target: Target) -> None:
    def strike(address: str) -> None:
        with Raw(address, hello=False) as raw:
            assert raw.is_refused(NOT_PERMITTED)[:2] == [EVE, "connect"]

    target.attack(strike, uid=EVE, why=f"uid={EVE} verb=connect")


def test_the_loan_of_another_is_left_alone(target: Target) -> None:
    """Whatever somebody else says, who has it keeps it, and who waits is served in turn."""

    def strike(address: str) -> None:
        with Raw(address) as raw:
            raw.send(RETIRE, 1, "bob/none", False, None)
            assert raw.receive() == ([NOT_PERMITTED, 1, ALICE, "retire", "bob/none"], [])
            raw.send(BORROW, 2, "public/busy", 1, 0, "")
            message, fds = raw.receive()
            assert message is not None
            assert (message[:2], fds) == ([25, 2], [])  # BorrowTimeout
            raw.send(LOANS, 3, "good/file", 0, 0)
            assert raw.receive() == ([NOT_PERMITTED, 3, ALICE, "list", "good/file"], [])

    with (
        fdbroker.Client(target.address) as holder,
        holder.borrow("public/busy", exclusive=True) as loan,
    ):
        target.attack(strike)
        (found,) = target.client.loans("public/busy")
        assert (found.pid, found.exclusive) == (os.getpid(), True)
        os.fstat(loan.fileno())
