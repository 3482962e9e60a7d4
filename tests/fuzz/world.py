"""The real broker in this process, served turn by turn, and what is around it.

`Server.run` is what runs, at a port that ends the run where the loop would sleep with nothing to
do.  Sockets, descriptors, worker threads and the ledger are the real ones.  Only the clock can be
put forward, and the kernel can be one before 6.16, which has no SO_PASSRIGHTS: then the sockets are
not told to refuse descriptors.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence

import support
from lender.kit import reload, view

from fdbroker import descriptors
from fdbroker.ipc.server.server import Server
from fdbroker.ipc.server.tuning import TUNING
from fdbroker.ipc.transport import Port, Source, now_ns, parcel, unix_channel
from fdbroker.ipc.transport.unix_listener import Listener
from fdbroker.lender import Lender
from fdbroker.lender.ledger import Ledger
from fdbroker.lender.model import LIVE
from fdbroker.lender.rules import Rule
from fdbroker.rc import FD
from fuzz import contract
from fuzz.steps import CLIENTS

ROOM = CLIENTS - 1, 100, 6000  # sessions (one too few), entries, cells
NAMES = ["a", "b", "s-1", "x" * 255, *(f"n{number:02}" for number in range(66))]
RULES = (
    Rule(frozenset({"borrow", "put", "retire", "list"}), ("a", "s-*"), everyone=True),
    Rule(frozenset({"borrow"}), ("b",), everyone=True, mode="r"),
)
NOBODY = 65_534
# generous: a page of 64 KiB can become 4 MB of empty dicts before it is refused
TURN_BYTES = 16 * 2**20
TURN_SECONDS = 2.0  # of this thread's own CPU time
TURNS = 20_000  # that a bounded number of messages can take


class Found(AssertionError):
    """The broker did what it must not do."""


class Quiet(BaseException):
    """The loop would sleep now, and nothing could wake it."""


class Impatient(Port):
    """A port that never sleeps for want of clients."""

    def __init__(self) -> None:
        super().__init__()
        # How many more times the loop may wait.
        self.left = 0
        self.server: Server

    def wait(self, seconds: float | None) -> Sequence[tuple[Source, int]]:
        self.left -= 1
        if self.left < 0:
            raise Found("the loop spins")
        happened = super().wait(0)
        if happened or seconds == 0:
            return happened
        if self.server.workers.pending:
            happened = super().wait(support.PATIENCE)
            if not happened:
                raise Found("a worker is stuck")
            return happened
        raise Quiet


class Complaints(logging.Handler):
    """What the broker logs of its own mistakes."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.formatter = logging.Formatter()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        said = self.format(record)
        if record.exc_info or "event=error" in said or "-failed" in said or "not-sent" in said:
            self.found.append(said)


class World:
    """One broker, with entries of its own, and folder, clock and log."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="fdbroker-fuzz-")
        os.chmod(self.folder, 0o711)  # a stranger gets to the socket
        self.long_path = os.path.join(self.folder, *["d" * 100] * 2, "file")
        os.makedirs(os.path.dirname(self.long_path))
        with open(self.long_path, "wb") as file:
            file.write(b"long")
        self.complaints = Complaints()
        self.log = logging.getLogger("fdbroker")
        self.log_before = self.log.propagate, self.log.level
        self.log.addHandler(self.complaints)
        self.log.propagate = False
        self.log.setLevel(logging.WARNING)
        self.offset = 0  # nanoseconds that the clock is put forward, and never back
        self.refuse = unix_channel.refuse_descriptors
        unix_channel.refuse_descriptors = self._refuse_descriptors
        self.old_kernel = False
        self.address = os.path.join(self.folder, "socket")
        self.ledger = Ledger(bytearray(Ledger.size(*ROOM)), *ROOM)
        self.listener = Listener(self.address, mode=0o666)
        self.port = Impatient()
        self.server = self.port.server = Server(
            self.listener,
            Lender(self.ledger),
            port=self.port,
            clock=lambda: now_ns() + self.offset,
        )
        # What it has decoded, which it may remember only so much of.
        self.known = self.server._dispatcher._cache.known
        self.server.set_rules(RULES)
        self.standing: dict[str, int] = {}  # generations by name
        self.refill()
        self.serve()
        self.targets = self.now_open()

    def _refuse_descriptors(self, sock: socket.socket) -> bool:
        return not self.old_kernel and self.refuse(sock)

    def close(self) -> None:
        """Undo all of it, whatever state it is in."""
        lender = self.server.lender
        for entry in list(lender.entries.values()):
            if entry.state == LIVE:
                lender.start_retiring(entry, self.server.now)
        self.server.close()  # the workers end after what they have to do
        for entry in lender.entries.values():
            while not entry.fd.closed:
                entry.fd.decref()
        unix_channel.refuse_descriptors = self.refuse
        self.log.removeHandler(self.complaints)
        self.log.propagate = self.log_before[0]
        self.log.setLevel(self.log_before[1])
        shutil.rmtree(self.folder)

    def begin(self, *, old_kernel: bool) -> None:
        """As it was made; an input comes."""
        self.old_kernel = old_kernel
        # connections inherit it from the listener
        (unix_channel.accept_descriptors if old_kernel else self.refuse)(self.listener.sock)
        self.known.clear()
        self.server.set_rules(RULES)

    def connect(self, *, stranger: bool) -> socket.socket | None:
        """A client's socket; None: the broker's queue is full."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            if stranger and os.geteuid() == 0:
                os.seteuid(NOBODY)
            try:
                sock.connect(self.address)
            finally:
                if os.geteuid() != os.getuid():
                    os.seteuid(os.getuid())
        except BlockingIOError:
            sock.close()
            return None
        return sock

    # --- turns ---

    def serve(self) -> None:
        """Let the broker do all that there is to do, within bounds."""
        self.port.left = TURNS
        measured = tracemalloc.is_tracing()
        if measured:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
        began = time.thread_time()
        try:
            self.server.run()
        except Quiet:
            pass
        else:
            raise Found("the loop has ended")
        took = time.thread_time() - began
        if measured:
            _, peak = tracemalloc.get_traced_memory()
            if peak - before > TURN_BYTES:
                raise Found(f"a turn took {peak - before} bytes")
        if took > TURN_SECONDS:
            raise Found(f"a turn took {took:.1f} s of CPU")
        if self.complaints.found:
            raise Found(self.complaints.found[0])

    # --- what is true ---

    def check_books(self) -> None:
        """What a successor would read from the ledger is what there is; no table is too large."""
        lender = self.server.lender
        if lender.notifications or lender.pending_closes:
            raise Found("somebody is not told what was decided")
        peers = {slot: session.peer for slot, session in lender.sessions.items()}
        loaded = reload(Ledger(bytearray(self.ledger.buffer)), peers, self.server.now)
        # connections are on their accounts before they have a session
        seen, told = view(lender), view(loaded)
        for uid, (_, *used) in seen.pop("accounts").items():
            if used != list(told["accounts"].get(uid, (0, 0, 0, 0))[1:]):
                raise Found("ledger and memory tell of different accounts")
        del told["accounts"]
        if loaded.notifications or told != seen:
            raise Found("ledger and memory tell different things")
        if len(self.known) > contract.KNOWN_REQUESTS:
            raise Found(f"the broker remembers {len(self.known)} requests")
        if any(len(key) + 8 > contract.KNOWN_BYTES for key in self.known):
            raise Found("the broker remembers a long request")

    def check_empty(self) -> None:
        """All clients are gone: nothing of them is left, but entries, which we retire."""
        server, lender = self.server, self.server.lender
        # Those with something in flight are asked again later whether it was received.
        self.offset += 2 * TUNING.recheck_read
        self.serve()
        left = {name: count for name, count in server.stats().items() if count}
        for name in ("entries", "descriptors"):
            left.pop(name, None)
        if left:
            raise Found(f"of the clients that are gone there is left: {left}")
        for entry in list(lender.entries.values()):
            if entry.state != LIVE:
                raise Found(f"{entry} has retired, and is not closed")
            if self.standing.get(entry.name) != entry.generation:
                lender.start_retiring(entry, server.now)
        server.settle()
        self.serve()
        self.refill()
        accounts = list(lender.accounting.accounts.values())
        if any(account.sessions or account.closes or account.bytes for account in accounts):
            raise Found(f"clients that are gone are charged: {accounts}")
        if (now := self.now_open()) != self.targets:
            raise Found(f"descriptors: {now - self.targets} more, {self.targets - now} fewer")

    def refill(self) -> None:
        """Put back the entries that clients have retired, as the daemon does."""
        lender = self.server.lender
        for place, name in enumerate(NAMES):
            entry = lender.names.get(name)
            if entry is not None:
                continue
            if place == 0:
                sysfd = os.open(self.long_path, os.O_RDWR | os.O_CLOEXEC)
            else:
                sysfd = os.memfd_create(name[:10], os.MFD_CLOEXEC)
            kind, where = descriptors.inspect(sysfd)
            now = self.server.now
            entry = lender.put(None, 0, name, b"", FD(sysfd), kind, now, uid=os.geteuid())
            entry.target, entry.parcel = where, parcel(entry.sysfd)
            self.standing[name] = entry.generation

    def now_open(self) -> Counter[str]:
        """The descriptors of this process by where they lead."""
        found = support.targets()
        return Counter({link: n for link, n in found.items() if "/.hypothesis" not in link})
