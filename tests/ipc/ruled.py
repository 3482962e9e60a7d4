"""What the tests of the rules stand on: a broker that is told its rules, and other people.

Everybody is a forked child of the test, so that it needs not be allowed to read the interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import pickle
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from support import BORROW, PATIENCE, RETURN, Raw, become, in_fork, start_fork

import fdbroker
from fdbroker.ipc.client.client import forget_client_at
from fdbroker.ipc.client.pool import disconnect_all
from fdbroker.ipc.protocol.codec import HEAD, template
from fdbroker.ipc.server.server import Server
from fdbroker.ipc.server.tuning import TUNING, Tuning
from fdbroker.ipc.transport.unix_listener import Listener
from fdbroker.ipc.transport.unix_port import Watched
from fdbroker.lender import Ledger, Lender
from fdbroker.lender.accounting import Charge
from fdbroker.lender.rules import Rule

ALICE, BOB, MAPPED = 65533, 65532, 50_000  # uids; nobody has an account for any of them
STAFF, AUDIO = 64_050, 64_029  # gids
CLONE_NEWUSER = 0x10000000  # linux/sched.h
SIZES = 128, 8192, 8192  # of the ledger


class Ruled:
    """A broker process behind a socket that everybody may open."""

    def __init__(
        self,
        *,
        own_uid: int = 0,
        user_namespace: bool = False,
        plant: Callable[[], object] = lambda: None,  # is called in it, before it serves
        tuning: Tuning = TUNING,
    ) -> None:
        self.folder = tempfile.mkdtemp(prefix="fdbroker-rules-")
        self.address = f"{self.folder}/socket"
        os.chmod(self.folder, 0o711)
        os.chown(self.folder, own_uid, -1)
        self._log = open(f"{self.folder}/log", "a+")  # noqa: SIM115 - until close
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(PATIENCE)

        def run() -> None:
            self._control.close()
            os.dup2(self._log.fileno(), 2)
            if user_namespace:
                unshare(theirs)
            os.setgroups([])
            os.setuid(own_uid)
            plant()
            serve(self.address, theirs, tuning)

        self._wait = start_fork(run)
        theirs.close()
        if user_namespace:
            pid = self._hear()
            for kind in "ug":
                with open(f"/proc/{pid}/{kind}id_map", "w") as file:
                    file.write(f"0 0 {MAPPED + 1}")
            self._control.send(b"mapped")
        self.pid = self._hear()
        self.client = fdbroker.Client(self.address)

    def set_rules(self, *rules: Rule) -> None:
        """They hold when this returns."""
        with self.tell(rules):
            pass

    @contextlib.contextmanager
    def tell(self, what: Any) -> Iterator[None]:
        """Tell it rules, or None to drain; it has done so when the block has ended."""
        self._control.send(pickle.dumps(what))
        yield
        assert self._hear() == (what if what is None else len(what))

    def limit_descriptors(self, number: int) -> None:
        """As if it had so many for its clients."""
        self._control.send(pickle.dumps(number))
        assert self._hear() == number

    def limit_closes(self, uid: int, by: int = 1) -> None:
        """As if what it may have of them were stuck, or no longer."""
        self._control.send(pickle.dumps({uid: by}))
        assert self._hear() == {uid: by}

    def put(self, *names: str) -> None:
        """Entries of those names."""
        for name in names:
            with memory() as number:
                self.client.put(name, number)

    def drain(self) -> None:
        """It lends nothing new from now on, and ends when all is back."""
        with self.tell(None):
            pass

    def log(self) -> list[str]:
        """Its lines so far."""
        self._log.seek(0)
        return self._log.read().splitlines()

    def refusals(self) -> list[str]:
        """The lines about what was refused, without the pid."""
        return [
            line.partition("uid=")[2] for line in self.log() if line.startswith("event=refused")
        ]

    def _hear(self) -> Any:
        return pickle.loads(self._control.recv(1000))

    def __enter__(self) -> Ruled:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        forget_client_at(self.address)
        disconnect_all(self.address)
        self._control.close()  # it drains then
        self._wait()
        said = "\n".join(self.log())
        self._log.close()
        shutil.rmtree(self.folder)
        assert "Traceback" not in said, said
        assert "event=error" not in said, said


def unshare(control: socket.socket) -> None:
    """Into a user namespace of our own, of which our maker writes the maps."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    control.send(pickle.dumps(os.getpid()))
    assert control.recv(100) == b"mapped"


def serve(address: str, control: socket.socket, tuning: Tuning) -> None:
    """What `fdbroker serve` does, but for its signals and files."""
    stream = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - until it ends
    logging.basicConfig(format="%(message)s", stream=stream, force=True)
    buffer = mmap.mmap(-1, Ledger.size(*SIZES))
    lender = Lender(Ledger(memoryview(buffer), *SIZES))
    listener = Listener(address)
    os.chmod(address, 0o777)
    server = Server(listener, lender, tuning=tuning)

    def told(subject: None, events: int) -> None:
        data = control.recv(100_000)
        if not data:
            server.loop.unwatch(watched)
            server.drain(0.5)  # in which the sessions that have just ended are seen
            return
        rules = pickle.loads(data)
        if rules is None:
            server.drain(PATIENCE)
            control.send(data)
            return
        if isinstance(rules, int):
            lender.accounting.descriptors = rules
            control.send(data)
            return
        if isinstance(rules, dict):
            for uid, by in rules.items():
                account = lender.accounting.account(uid)
                stuck.append(lender.accounting.charge(account, "closes", by * 1025))
            control.send(data)
            return
        server.set_rules(rules)
        control.send(pickle.dumps(len(rules)))

    stuck: list[Charge] = []
    watched = Watched(control.fileno())
    server.loop.watch(watched, told)
    control.send(pickle.dumps(os.getpid()))
    try:
        server.run()
    finally:
        server.close()


@contextlib.contextmanager
def memory() -> Iterator[int]:
    """A descriptor to put."""
    number = os.memfd_create("rules")
    try:
        yield number
    finally:
        os.close(number)


def connected_as(
    address: str, uid: int, gid: int | None = None, groups: tuple[int, ...] = ()
) -> socket.socket:
    """A socket that somebody else has connected: the kernel goes on saying so."""
    ours, theirs = socket.socketpair()

    def connect() -> None:
        ours.close()
        become(uid, gid, groups)
        with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(address)
            socket.send_fds(theirs, [b"x"], [sock.fileno()])

    with ours:
        with theirs:
            wait = start_fork(connect)
        _, (number,), _, _ = socket.recv_fds(ours, 1, 1)
        wait()
    sock = socket.socket(fileno=number)
    sock.settimeout(PATIENCE)
    return sock


def session_as(
    address: str,
    uid: int,
    gid: int | None = None,
    groups: tuple[int, ...] = (),
    *,
    puts: bool = False,
    hello: bool = True,
) -> Raw:
    """A session of somebody else, spoken by hand."""
    raw = Raw.__new__(Raw)
    raw.sock = connected_as(address, uid, gid, groups)
    if hello:
        assert raw.say_hello(puts=puts) == [0, 0, 1]
    return raw


def ask_as(
    address: str,
    question: Callable[[fdbroker.Client], Any],
    uid: int = ALICE,
    gid: int | None = None,
    groups: tuple[int, ...] = (),
) -> Any:
    """What the library tells somebody else; what it raises is raised here."""

    def ask() -> Any:
        become(uid, gid, groups)
        with fdbroker.Client(address) as client:
            return question(client)

    return in_fork(ask)


# --- what the tests ask for most often ---


def rule(
    *verbs: str,
    names: tuple[str, ...] = ("*",),
    uid: int | None = ALICE,
    mode: str = "",
    listeners: bool = False,
    **who: Any,
) -> Rule:
    uid = None if who else uid
    return Rule(frozenset(verbs), names, uid, mode=mode, listeners=listeners, **who)


class Alike:
    """Says the same bytes, but for the seq, as often as it is asked to: what a broker remembers."""

    def __init__(self, raw: Raw) -> None:
        self.raw = raw
        self.seq = 0

    def ask(self, verb: int, *fields: Any) -> tuple[list[Any], list[int]]:
        """The answer without its seq, and what it brought."""
        self.send(verb, *fields)
        message, fds = self.raw.receive()
        assert message is not None
        assert message[1] == self.seq
        return [message[0], *message[2:]], fds

    def send(self, verb: int, *fields: Any) -> None:
        """Ask, and hear the answer later."""
        self.seq += 1
        head, tail = template(verb, *fields)
        self.raw.send_bytes(HEAD.pack(head, self.seq) + tail)

    def borrow(self, names: Any, flags: int = 0, timeout: float | None = None) -> list[Any]:
        """Borrow and return: [] if it was lent, else the refusal."""
        answer, fds = self.ask(BORROW, names, flags, timeout, "")
        for number in fds:
            os.close(number)
        if answer[0] != 0:
            assert fds == []
            return answer
        assert fds
        self.send(RETURN)
        return []


def put(client: fdbroker.Client, name: str, **how: Any) -> None:
    with memory() as number:
        client.put(name, number, **how)


def share(client: fdbroker.Client) -> None:
    with memory() as number, client.share(number) as ref:
        ref.borrow().close()
