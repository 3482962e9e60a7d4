"""Two brokers to be attacked in the same way: fdbroker, and s6-fdholderd as several set it up.

A subject is a running broker and how one speaks to it: what it takes to connect and be known, to
ask for a descriptor, to ask for a list.  Everything else is in attacks.py.

s6's messages, as s6-fdholder-retrieve and -list send them: a length (32 bits) and a number of
descriptors (16 bits), big-endian; then ``R``, whether to delete, the length of the name, the name
and a zero; or ``L``.  An answer begins with a status, 0 if all is well.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import msgpack

ROOT = os.geteuid() == 0
GOOD, CROWD = 64_561, 64_562  # uids without an account; 60 more begin with
EACH = 64_600
HOLDERS = 64_700  # so do those who hold all room
KEPT = ("kept0", "kept1", "kept2")  # the entries that must not be lost
HELLO, BORROW, ENTRIES = 0, 1, 7  # verbs of fdbroker/ipc/protocol/messages.py
REPOSITORY = Path(__file__).parents[1]


class Lost(Exception):
    """The broker hung up, or refused."""


@contextlib.contextmanager
def as_uid(uid: int) -> Iterator[None]:
    """What is connected in here is connected by that user, as the kernel says (SO_PEERCRED)."""
    if ROOT:
        os.seteuid(uid)
    try:
        yield
    finally:
        if ROOT:
            os.seteuid(0)


class Subject:
    """A broker process in a folder of its own.  `limit` is its RLIMIT_NOFILE."""

    label: ClassVar[str]
    kind: ClassVar[socket.SocketKind]
    most: ClassVar[int] = 1000  # entries that it was told to have

    def __init__(self, limit: int = 1024, names: Sequence[str] = KEPT) -> None:
        self.limit = limit
        self.folder = tempfile.mkdtemp(prefix="fdbroker-against-")
        os.chmod(self.folder, 0o711)
        self.address = f"{self.folder}/socket"
        self._log = open(f"{self.folder}/log", "wb")  # noqa: SIM115 - until close
        self.process = subprocess.Popen(
            self.command(names),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            preexec_fn=self._limit_files,
        )
        try:
            deadline = time.monotonic() + 10
            while not self._is_up():
                if time.monotonic() > deadline or not self.is_alive:
                    raise RuntimeError(f"{self.label} did not start:\n{self.log()}")
                time.sleep(0.02)
            self.fill(names)
            while self.kept() < len(KEPT):  # it may listen before it has them
                time.sleep(0.02)
        except BaseException:
            self.close()
            raise

    def command(self, names: Sequence[str]) -> list[str]:
        raise NotImplementedError

    def fill(self, names: Sequence[str]) -> None:
        """Put the entries, if the command has not."""

    def _limit_files(self) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (self.limit, self.limit))

    def _is_up(self) -> bool:
        with socket.socket(socket.AF_UNIX, self.kind) as sock:
            return sock.connect_ex(self.address) == 0

    # --- what can be seen from outside ---

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def log(self) -> str:
        return Path(f"{self.folder}/log").read_text(errors="replace")

    def cpu_seconds(self) -> float:
        if not self.is_alive:
            return 0.0
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss(self) -> int:
        """Bytes."""
        if not self.is_alive:
            return 0
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd")) if self.is_alive else 0

    # --- how one speaks to it ---

    def connect(self, uid: int, *, greet: bool = True, seconds: float = 2.0) -> socket.socket:
        """A connection of that user.  OSError, `Lost`."""
        sock = socket.socket(socket.AF_UNIX, self.kind)
        sock.settimeout(seconds)
        try:
            with as_uid(uid):
                sock.connect(self.address)
            if greet:
                self.greet(sock)
        except BaseException:
            sock.close()
            raise
        return sock

    def greet(self, sock: socket.socket) -> None:
        """Whatever must be said first."""

    def asks(self, seq: int, name: str) -> bytes:
        """The request for one descriptor."""
        raise NotImplementedError

    def lists(self, seq: int) -> bytes:
        """The request for a list."""
        raise NotImplementedError

    def borrow(self, sock: socket.socket, name: str, seq: int = 1) -> int:
        """The descriptor, which is the caller's.  `Lost` if there is none."""
        try:
            sock.send(self.asks(seq, name))
            data, numbers, _, _ = socket.recv_fds(sock, 70_000, 16)
        except OSError as error:
            raise Lost(str(error)) from None
        if len(numbers) != 1:
            raise Lost(f"{data!r}")
        return numbers[0]

    def kept(self) -> int:
        """How many of the entries that must not be lost are still to be had, by a new client."""
        found = 0
        for name in KEPT:
            with contextlib.suppress(OSError, Lost), self.connect(GOOD) as sock:
                os.close(self.borrow(sock, name))
                found += 1
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Fdbroker(Subject):
    """`fdbroker serve`, with a rule for everyone."""

    label = "fdbroker"
    kind = socket.SOCK_SEQPACKET

    def command(self, names: Sequence[str]) -> list[str]:
        lines = ["[server]", 'mode = "0666"', "[[rule]]", "everyone = true"]
        lines.append('verbs = ["borrow", "list"]')
        for name in names:
            lines += [f"[entry.{name}]", 'memfd = "64"']
        config = Path(f"{self.folder}/fdbroker.toml")
        config.write_text("\n".join(lines) + "\n")
        serve = ["serve", "--socket", self.address, "--config", str(config)]
        return [sys.executable, "-m", "fdbroker", *serve]

    def greet(self, sock: socket.socket) -> None:
        sock.send(msgpack.packb([HELLO, 0, 1, False]))
        answer = sock.recv(1000)
        if not answer or msgpack.unpackb(answer)[0] != 0:
            raise Lost(f"{answer!r}")

    def asks(self, seq: int, name: str) -> bytes:
        data: bytes = msgpack.packb([BORROW, seq, name, 0, None, ""])
        return data

    def lists(self, seq: int) -> bytes:
        data: bytes = msgpack.packb([ENTRIES, seq, 0])
        return data


class S6(Subject):
    """s6-fdholder-daemon with rules in a folder, and as many connections as there are."""

    label = "s6, -i -c 256"
    kind = socket.SOCK_STREAM
    options: ClassVar[tuple[str, ...]] = ("-c", "256", "-n", "1000")
    compiled = False

    def command(self, names: Sequence[str]) -> list[str]:
        rules = f"{self.folder}/rules"
        users = [GOOD, CROWD, *range(EACH, HOLDERS + 60)] if ROOT else []
        for uid in {os.geteuid(), *users}:
            folder = Path(f"{rules}/uid/{uid}/env")
            folder.mkdir(parents=True)
            (folder.parent / "allow").touch()
            (folder / "S6_FDHOLDER_LIST").write_text("1")
            (folder / "S6_FDHOLDER_RETRIEVE_REGEX").write_text("^")
            if uid == os.geteuid():
                (folder / "S6_FDHOLDER_STORE_REGEX").write_text("^")
        how = ["-i", rules]
        if self.compiled:
            subprocess.run(["s6-accessrules-cdb-from-fs", f"{rules}.cdb", rules], check=True)
            how = ["-x", f"{rules}.cdb"]
        return ["s6-fdholder-daemon", "-1", *self.options, *how, self.address]

    def fill(self, names: Sequence[str]) -> None:
        for name in names:
            store = ["s6-fdholder-store", "-d", "0", "-t", "5000", self.address, name]
            subprocess.run(store, stdin=subprocess.DEVNULL, check=True)

    def asks(self, seq: int, name: str) -> bytes:
        body = b"R\0" + bytes([len(name)]) + name.encode() + b"\0"
        return struct.pack(">IH", len(body), 0) + body

    def lists(self, seq: int) -> bytes:
        return struct.pack(">IH", 1, 0) + b"L"


class S6Compiled(S6):
    """The same with compiled rules, which it holds open."""

    label = "s6, -x -c 256"
    compiled = True


class S6Bounded(S6):
    """The same, told to accept fewer connections than it has descriptors, and to end idle ones."""

    label = "s6, -x -c 12 -n 10 -t 5000"
    compiled = True
    options = ("-c", "12", "-n", "10", "-t", "5000")
    most = 10


SUBJECTS: tuple[type[Subject], ...] = (Fdbroker, S6, S6Compiled, S6Bounded)


def missing() -> list[str]:
    """The programs of s6 that are not here."""
    programs = ("s6-fdholder-daemon", "s6-fdholder-store", "s6-accessrules-cdb-from-fs")
    return [program for program in programs if shutil.which(program) is None]


def version() -> str:
    """Of s6, as the package manager has it."""
    try:
        ask = ["dpkg-query", "-W", "-f", "${Version}", "s6"]
        return f"s6 {subprocess.check_output(ask, text=True)} (Debian)"
    except (OSError, subprocess.CalledProcessError):
        return "s6 of an unknown version"


def last_line(log: str) -> str:
    """What it said last, without its name."""
    lines = [line for line in log.splitlines() if line.strip()]
    return re.sub(r"^[\w-]+: ", "", lines[-1]) if lines else ""
