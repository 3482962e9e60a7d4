"""The same attacks on any broker: each is a function of a subject's class, and tells what happened.

What it tells is short and measured: whether the process lives, how many of the three entries that
it must not lose are still to be had, whether a good client of another uid was served meanwhile and
how fast, and the broker's share of a CPU (/proc/PID/stat), memory, and descriptors.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import fdbroker
import fdbroker.ipc.client.client  # imported before anybody is a user who cannot read it
from benchmarks.subjects import (
    CROWD,
    EACH,
    GOOD,
    HOLDERS,
    KEPT,
    ROOT,
    Fdbroker,
    Lost,
    Subject,
    as_uid,
    last_line,
)

LIMIT = 30  # descriptors of the broker
CLIENTS = 60
SILENT_SECONDS = 12.0  # longer than fdbroker gives to who says nothing
FLOOD_SECONDS = 3.0


class Told(dict[str, str]):
    """What is told of an attack, by column."""


def good(subject: Subject, tries: int = 20, seconds: float = 2.0) -> str:
    """What becomes of a good client that comes, asks for an entry, and goes, so many times."""
    took, lost = [], 0
    for _ in range(tries):
        begun = time.perf_counter()
        try:
            with subject.connect(GOOD, seconds=seconds) as sock:
                os.close(subject.borrow(sock, KEPT[0]))
        except (OSError, Lost):
            lost += 1
            if lost == 3 and not took:
                return "not served"
            continue
        took.append(time.perf_counter() - begun)
    if not took:
        return "not served"
    return f"{len(took)} of {tries}, median {statistics.median(took) * 1000:.1f} ms"


def busy(subject: Subject, seconds: float) -> str:
    """Its share of a CPU in that time."""
    before, since = subject.cpu_seconds(), time.monotonic()
    time.sleep(seconds)
    return f"{(subject.cpu_seconds() - before) / (time.monotonic() - since):.1%}"


def state(subject: Subject) -> str:
    if subject.is_alive:
        return "alive"
    return f"dead, status {subject.process.returncode}: {last_line(subject.log())}"


def after(subject: Subject) -> Told:
    """When the attack is over."""
    time.sleep(0.3)
    return Told({"the broker": state(subject), "entries kept": f"{subject.kept()} of {len(KEPT)}"})


# --- too many ---


def crowd(kind: type[Subject]) -> Told:
    """60 connections of one uid that stay, at a broker of 30 descriptors."""
    with kind(LIMIT) as subject, contextlib.ExitStack() as stack:
        inside = 0
        for _ in range(CLIENTS):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, subject.kind))
            sock.settimeout(0.1)
            with contextlib.suppress(OSError, Lost):
                with as_uid(CROWD):
                    sock.connect(subject.address)
                subject.greet(sock)
                os.close(subject.borrow(sock, KEPT[0]))
                inside += 1
        told = Told({"of 60 were served": str(inside), "CPU meanwhile": busy(subject, 3.0)})
        told["a good client meanwhile"] = good(subject)
        stack.close()
        return told | after(subject)


# --- sixty real clients ---


def sixty(kind: type[Subject], seconds: float, uids: str = "each", look: float = 5.0) -> Told:
    """60 client processes that come, borrow, hold, return and go, again and again; then all room
    is held by others while the 60 wait; then these leave, and each of the 60 must be served."""
    with kind(LIMIT) as subject, tempfile.TemporaryFile() as told:
        started = [start_client(subject, number, uids, told.fileno()) for number in range(CLIENTS)]
        try:
            time.sleep(seconds)
            cycles = served(told)
            told_all = Told({"loans in all": f"{sum(cycles.values()):,}"})
            told_all["clients served"] = f"{len(cycles)} of {CLIENTS}"
            least = min((cycles.get(number, 0) for number in range(CLIENTS)), default=0)
            told_all["fewest of one client"] = str(least)
            told_all |= no_room(subject, told, look)
        finally:
            for pid in started:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return told_all | after(subject)


def no_room(subject: Subject, told: object, look: float) -> Told:
    """Have all room held by others, look at the CPU for so many seconds; then let the 60 in."""
    found = Told()
    with contextlib.ExitStack() as stack:
        held = 0
        last = time.monotonic()
        while time.monotonic() < last + look + 4 and subject.is_alive:
            # each by another uid, so that no quota of one uid is in the way
            try:
                sock = stack.enter_context(subject.connect(HOLDERS + held, seconds=3))
                os.close(subject.borrow(sock, KEPT[0]))
                held, last = held + 1, time.monotonic()
            except (OSError, Lost):
                time.sleep(0.01)
        before = sum(served(told).values())
        found["CPU while there is no room"] = busy(subject, look)
        waiting = sum(served(told).values()) - before
        found["(held by others / loans of the 60 meanwhile)"] = f"{held} / {waiting}"
    since, seen = served(told), time.monotonic()
    left = set(range(CLIENTS))
    while left and time.monotonic() < seen + 20 and subject.is_alive:
        time.sleep(0.1)
        now = served(told)
        left = {number for number in left if now.get(number, 0) == since.get(number, 0)}
    found["served in the end"] = f"{CLIENTS - len(left)} of {CLIENTS}"
    return found


def served(told: object) -> dict[int, int]:
    """How many loans each client has had: one byte each, its number."""
    data = os.pread(told.fileno(), 1 << 24, 0)  # type: ignore[attr-defined]
    return {number: count for number in range(CLIENTS) if (count := data.count(bytes([number])))}


def start_client(subject: Subject, number: int, uids: str, tell: int) -> int:
    """A process: come, borrow, hold 20 ms, return, go; for ever: its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        uid = {"each": EACH + number, "one": CROWD, "own": os.geteuid()}[uids]
        if ROOT:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        name = KEPT[number % len(KEPT)]
        visit = visit_with_client if isinstance(subject, Fdbroker) else visit_by_hand
        while True:
            try:
                visit(subject, name)
            except (OSError, Lost):  # refused, or nobody is there
                time.sleep(0.2)
            else:
                os.write(tell, bytes([number]))
    finally:
        os._exit(1)


def visit_with_client(subject: Subject, name: str) -> None:
    with fdbroker.Client(subject.address) as client, client.borrow(name, timeout=60):
        time.sleep(0.02)


def visit_by_hand(subject: Subject, name: str) -> None:
    with socket.socket(socket.AF_UNIX, subject.kind) as sock:
        sock.settimeout(60)
        sock.connect(subject.address)
        os.close(subject.borrow(sock, name))
        time.sleep(0.02)


# --- who says nothing, and who does not read ---


def silent(kind: type[Subject]) -> Told:
    """50 connections that say nothing; how many are still open 12 s later."""
    with kind() as subject, contextlib.ExitStack() as stack:
        socks = []
        for _ in range(50):
            with contextlib.suppress(OSError):
                socks.append(stack.enter_context(subject.connect(CROWD, greet=False)))
        told = Told({"a good client meanwhile": good(subject)})
        told["CPU meanwhile"] = busy(subject, SILENT_SECONDS)
        told["still open after 12 s"] = f"{sum(map(is_open, socks))} of {len(socks)}"
        stack.close()
        return told | after(subject)


def is_open(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def never_reading(kind: type[Subject]) -> Told:
    """10 connections that ask for lists of all entries for 3 s, and read none of them."""
    names = [*KEPT, *(f"more{number}" for number in range(297))]
    names = names[: kind.most]
    with kind(names=names) as subject:
        before = subject.rss()
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(subject.connect(CROWD)) for _ in range(10)]
            for sock in socks:
                sock.setblocking(False)
            until, seq, asked, since = time.monotonic() + FLOOD_SECONDS, 0, 0, subject.cpu_seconds()
            while time.monotonic() < until and subject.is_alive:
                seq += 1
                for sock in socks:
                    with contextlib.suppress(OSError):
                        asked += sock.send(subject.lists(seq)) > 0
                time.sleep(0)
            cpu = (subject.cpu_seconds() - since) / FLOOD_SECONDS
            grown = (subject.rss() - before) / 1e6
            told = Told({"entries that it has": str(len(names))})
            told |= Told({"asked for, unread": f"{asked:,}", "CPU meanwhile": f"{cpu:.0%}"})
            told["its memory grew by"] = f"{grown:.1f} MB"
            told["a good client meanwhile"] = good(subject)
            told["still open"] = f"{sum(map(is_open_unread, socks))} of {len(socks)}"
        return told | after(subject)


def is_open_unread(sock: socket.socket) -> bool:
    """Whether its other end has not hung up, whatever lies unread."""
    poll = select.poll()
    poll.register(sock, select.POLLHUP)
    return not poll.poll(0)


def unasked(kind: type[Subject]) -> Told:
    """Descriptors that nobody asked for, 250 with each request, for 3 s."""
    with kind() as subject, open(os.devnull) as null:
        before, most, sent, refused = subject.descriptors(), 0, 0, 0
        rights = array.array("i", [null.fileno()] * 250)
        until, since = time.monotonic() + FLOOD_SECONDS, subject.cpu_seconds()
        while time.monotonic() < until and subject.is_alive:
            with contextlib.suppress(OSError, Lost), subject.connect(CROWD, seconds=0.5) as sock:
                request = subject.asks(1, KEPT[0])
                if subject.kind == socket.SOCK_STREAM:  # as many as it says there are
                    request = request[:4] + (250).to_bytes(2, "big") + request[6:]
                try:
                    way = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
                    sock.sendmsg([request], way)
                    sent += 250
                except PermissionError:  # the kernel has (SO_PASSRIGHTS)
                    refused += 250
                most = max(most, subject.descriptors())
        cpu = (subject.cpu_seconds() - since) / FLOOD_SECONDS
        told = Told({"taken in / refused by the kernel": f"{sent:,} / {refused:,}"})
        told["most descriptors more at one time"] = str(max(0, most - before))
        told["CPU meanwhile"] = f"{cpu:.0%}"
        told["a good client after it"] = good(subject)
        deadline = time.monotonic() + 2
        while subject.descriptors() > before and time.monotonic() < deadline:
            time.sleep(0.05)
        told["descriptors more 2 s later"] = str(max(0, subject.descriptors() - before))
        return told | after(subject)


# --- a borrower that dies, and nobody who says who may ---


def death(kind: type[Subject]) -> Told:
    """A borrower is killed: who knows that it had something, and that it is back?"""
    with kind() as subject:
        pid = start_client_that_holds(subject)
        try:
            told = Told({"loans before": loans(subject)})
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        deadline = time.monotonic() + 5
        while loans(subject) == "1" and time.monotonic() < deadline:
            time.sleep(0.001)
        told["loans after its death"] = loans(subject)
        return told | after(subject)


def start_client_that_holds(subject: Subject) -> int:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with subject.connect(GOOD) as sock:
                subject.borrow(sock, KEPT[0])
                os.write(writer, b"x")
                signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    return pid


def loans(subject: Subject) -> str:
    if not isinstance(subject, Fdbroker):
        return "it does not count"
    with fdbroker.Client(subject.address) as client:
        return str(len(client.loans()))


def without_rules(kind: type[Subject]) -> Told:
    """Nobody said who may."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"{folder}/socket"
        os.chmod(folder, 0o711)
        if kind is not Fdbroker:
            done = subprocess.run(
                ["s6-fdholder-daemon", "-1", address], capture_output=True, text=True, timeout=10
            )
            return Told({"it": f"does not start, status {done.returncode}: {done.stderr.strip()}"})
        command = [sys.executable, "-m", "fdbroker", "serve", "--socket", address]
        process = subprocess.Popen([*command, "--memfd", "kept0=64"], stderr=subprocess.DEVNULL)
        try:
            while not os.path.exists(address):
                time.sleep(0.01)
            mode = os.stat(address).st_mode & 0o777
            os.chmod(address, 0o666)  # even then
            with fdbroker.Client(address) as client:
                client.borrow("kept0").close()
            told = Told({"it": f"starts for its own uid and root; its socket has mode {mode:04o}"})
            told["another uid, the socket opened to it"] = ask_as_other(address)
            return told
        finally:
            process.terminate()
            process.wait(10)


def ask_as_other(address: str) -> str:
    if not ROOT:
        return "not tried: this is not root"
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(GOOD, GOOD, GOOD)
            try:
                fdbroker.Client(address).borrow("kept0")
                answer = "was served"
            except Exception as error:
                answer = f"is refused: {type(error).__name__}"
            os.write(writer, answer.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        answer = file.read()
    os.waitpid(pid, 0)
    return answer


ATTACKS: dict[str, Callable[[type[Subject]], Told]] = {
    "crowd": crowd,
    "silent": silent,
    "never-reading": never_reading,
    "unasked": unasked,
    "death": death,
    "without-rules": without_rules,
}
