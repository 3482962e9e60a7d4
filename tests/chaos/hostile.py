"""The hostile: they say nothing, too much, or nonsense, read nothing, bring what nobody asked for.

None of them checks much: what matters is that nobody else notices.  Each attack lasts as long as
the plan says, and leaves its sockets to be closed by its end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import msgpack

from .actor import Cast, fork, kill

HELLO, BORROW, MORE, RETURN, CANCEL, PUT, RETIRE, ENTRIES, LOANS, STATS = range(10)
VERBS = range(12)
EPHEMERAL, REPLACE = 2, 1
ENOUGH = 60  # sockets, or entries, of one attack
BOMBS = (
    b"\x91" * 5000,  # nested
    b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1
    b"\x93\x01\xcf\xff\xff\xff\xff\xff\xff\xff\xff\xdb\x7f\xff\xff\xff",
    b"\xc9\x00\x00\x00\x01\x05x",  # an extension
    b"\x92\x01\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",  # NaN as a seq
    b"\x96\x01\x01\xa2\xff\xfe\x00\xc0\xa0",  # no UTF-8
    b"\x82\x01\x02\x01\x03",  # a map, with the same key twice
)
STRANGE = (None, True, -1, 2**63, 1.5, float("nan"), "", "x" * 300, "a\nb\x1b[31m", b"", b"t" * 16)


class Hostile(Cast):
    """One of them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.name = f"hostile/{self.number}"
        self.sent = 0

    def note(self) -> None:
        """It counts what it has sent, not what was right."""
        self.board.note(self.index, step=self.at, right=0, slowest=0)

    # --- the tools ---

    def connect(self, *, hello: bool = True, puts: bool = False) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(0.5)
        try:
            sock.connect(self.address)
            if hello:
                self.say(sock, HELLO, 0, 1, puts)
                sock.recv(1000)
        except BaseException:
            sock.close()
            raise
        return sock

    def say(self, sock: socket.socket, *message: Any, fds: tuple[int, ...] = ()) -> None:
        self.send(sock, msgpack.packb(message), fds)

    def send(self, sock: socket.socket, data: bytes, fds: tuple[int, ...] = ()) -> None:
        socket.send_fds(sock, [data], fds)
        self.sent += 1

    @contextlib.contextmanager
    def attack(self, ms: float) -> Iterator[Callable[[], bool]]:
        """Whether it is to go on; that the broker hangs up is what it is for."""
        until = time.monotonic() + ms / 1000
        with contextlib.suppress(OSError):
            yield lambda: time.monotonic() < until and not self.board.stopped

    def crowd(self, stack: contextlib.ExitStack, count: int, **how: bool) -> list[socket.socket]:
        return [stack.enter_context(self.connect(**how)) for _ in range(count)]

    def own_entry(self) -> None:
        """There is one of that name, which may be borrowed."""
        with self.connect(puts=True) as sock:
            fd = os.memfd_create("hostile")
            self.say(sock, PUT, 1, self.name, REPLACE, fds=(fd,))
            os.close(fd)
            sock.recv(1000)

    def linger(self, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            time.sleep(0.005)

    # --- who says nothing, or half of it ---

    def silent(self, seed: int, ms: float) -> None:
        with self.attack(ms) as goes_on, contextlib.ExitStack() as stack:
            self.crowd(stack, Random(seed).randint(1, ENOUGH), hello=False)
            self.linger(goes_on)

    def half_hello(self, seed: int, ms: float) -> None:
        random, hello = Random(seed), msgpack.packb([HELLO, 0, 1, False])
        with self.attack(ms) as goes_on:
            while goes_on():
                with self.connect(hello=False) as sock:
                    self.send(sock, hello[: random.randint(1, len(hello) - 1)])
                    if random.random() < 0.5:
                        self.send(sock, hello)
                    time.sleep(0.002)

    def stopped(self, seed: int, ms: float) -> None:
        """Asks, and is stopped before it reads."""
        count = Random(seed).randint(1, 20)

        def ask() -> None:
            with contextlib.suppress(OSError):
                self.own_entry()
                socks = [self.connect() for _ in range(count)]
                for sock in socks:
                    self.say(sock, BORROW, 1, self.name, 0, None, "")
            os.kill(os.getpid(), signal.SIGSTOP)

        pid = fork(ask)
        with self.attack(ms) as goes_on:
            self.linger(goes_on)
        kill(pid)

    # --- who says nonsense ---

    def garbage(self, seed: int, ms: float) -> None:
        random = Random(seed)
        with self.attack(ms) as goes_on:
            while goes_on():
                with self.connect(hello=random.random() < 0.7) as sock:
                    data = random.choice(BOMBS)
                    if random.random() < 0.6:
                        size = random.choice([1, 3, 12, 100, 5000, 65_536, 65_537, 100_000])
                        data = random.randbytes(size)
                    self.send(sock, data)
                    sock.recv(1000)

    def malformed(self, seed: int, ms: float) -> None:
        """Good messages with something wrong in them."""
        random = Random(seed)
        with self.attack(ms) as goes_on:
            while goes_on():
                with self.connect(puts=random.random() < 0.3) as sock, contextlib.suppress(OSError):
                    for seq in range(1, 10):
                        message = self.request(random, seq)
                        for _ in range(random.randint(0, 2)):
                            message[random.randrange(len(message))] = random.choice(STRANGE)
                        if random.random() < 0.2:
                            message.append(random.choice(STRANGE))
                        self.say(sock, *message)
                        if message[0] not in (RETURN, CANCEL):
                            sock.settimeout(0.05)
                            sock.recv(65_536)

    def request(self, random: Random, seq: int) -> list[Any]:
        """A request that might be one."""
        name = random.choice([self.name, "common/file", "turn/0", "secret", "none"])
        fields: dict[int, list[Any]] = {
            BORROW: [random.choice([name, [name, name]]), random.randrange(4), 0.01, "x"],
            MORE: [random.randrange(3)],
            RETIRE: [name, random.random() < 0.5, 0.01],
            ENTRIES: [random.randrange(100)],
            LOANS: [name, 0, 0],
        }
        verb = random.choice(VERBS)
        return [verb, seq, *fields.get(verb, [])]

    def seq_games(self, seed: int, ms: float) -> None:
        """Repeated, left out, wrapped, as of yesterday."""
        random = Random(seed)
        with self.attack(ms) as goes_on:
            self.own_entry()
            while goes_on():
                with self.connect() as sock, contextlib.suppress(OSError):
                    sock.settimeout(0.02)
                    seq = 1
                    for _ in range(12):
                        said = max(
                            0, seq + random.choice([0, 0, 0, 0, -1, -1, 1, 2**53, 2**64 - 5])
                        )
                        verb = random.choice([BORROW, BORROW, RETURN, CANCEL, MORE, HELLO])
                        fields = {BORROW: [self.name, 0, 0, ""], MORE: [0], HELLO: [1, False]}
                        self.say(sock, verb, min(said, 2**64 - 1), *fields.get(verb, []))
                        if random.random() < 0.7:
                            receive(sock)
                        seq += 1

    def foreign(self, seed: int, ms: float) -> None:
        """Tickets that it was not given, names that are not its own."""
        random = Random(seed)
        names = ["secret", "common/file", "turn/0", "good/0/file", "published/0", "dying/0/put0"]
        with self.attack(ms) as goes_on:
            while goes_on():
                with self.connect() as sock:
                    for seq in range(1, 20):
                        what = random.choice([random.randbytes(16), *names])
                        request = random.choice([[BORROW, 0, 0, ""], [RETIRE, False, None]])
                        verb, *rest = request
                        self.say(sock, verb, seq, what, *rest)
                        message, fds = receive(sock)
                        self.check(
                            message is None or (message[0] != 0 and not fds),
                            f"{what!r} was granted to who may not have it: {message}",
                        )

    # --- who does not read ---

    def never_reading(self, seed: int, ms: float) -> None:
        random = Random(seed)
        with self.attack(ms) as goes_on, contextlib.ExitStack() as stack:
            socks = self.crowd(stack, 8)
            seq = 0
            while goes_on():
                seq += 1
                for sock in list(socks):
                    sock.setblocking(False)
                    asks = random.choice([[ENTRIES, seq, 0], [LOANS, seq, "", 0, 0]])
                    try:
                        self.say(sock, *asks)
                    except BlockingIOError:
                        time.sleep(0.001)
                    except OSError:
                        socks.remove(sock)
                if not socks:
                    return

    def borrowing_blindly(self, seed: int, ms: float) -> None:
        """Asks for descriptors, again and again, and never takes one."""
        with self.attack(ms) as goes_on, contextlib.ExitStack() as stack:
            self.own_entry()
            for sock in self.crowd(stack, Random(seed).randint(1, 30)):
                sock.setblocking(False)
                with contextlib.suppress(OSError):
                    for seq in range(1, 40, 2):
                        self.say(sock, BORROW, seq, self.name, 0, None, "")
                        self.say(sock, RETURN, seq + 1)
            self.linger(goes_on)

    # --- who brings what nobody asked for ---

    def unasked(self, seed: int, ms: float) -> None:
        random = Random(seed)
        null = os.open(os.devnull, os.O_RDONLY)
        with self.attack(ms) as goes_on:
            while goes_on():
                count = random.choice([1, 2, 253])
                with (
                    contextlib.suppress(OSError),
                    self.connect(hello=random.random() < 0.7, puts=True) as sock,
                ):
                    asks = random.choice([[BORROW, 1, self.name, 0, 0, ""], [HELLO, 0, 1, True]])
                    self.say(sock, *asks, fds=(null,) * count)
                    receive(sock)
        os.close(null)

    def itself(self, seed: int, ms: float) -> None:
        """Sends its own connection, and sockets that are sent through each other."""
        with self.attack(ms) as goes_on:
            while goes_on():
                with self.connect(puts=True) as sock, contextlib.suppress(OSError):
                    self.say(sock, PUT, 1, f"{self.name}/itself", REPLACE, fds=(sock.fileno(),))
                    receive(sock)
                one, other = socket.socketpair()
                with one, other, self.connect(puts=True) as sock, contextlib.suppress(OSError):
                    socket.send_fds(one, [b"x"], [one.fileno(), other.fileno()])
                    fds = (other.fileno(),)
                    self.say(sock, PUT, 1, f"{self.name}/pair", REPLACE, fds=fds)
                    receive(sock)

    def puts_of_many(self, seed: int, ms: float) -> None:
        """Fills the broker, as far as that lets it."""
        with self.attack(ms) as goes_on, self.connect(puts=True) as sock:
            fd = os.memfd_create("hostile")
            try:
                for seq in range(1, ENOUGH):
                    name = f"{self.name}/many{seq}"
                    self.say(sock, PUT, seq, name, EPHEMERAL | REPLACE, fds=(fd,))
                    receive(sock)
                    if not goes_on():
                        break
            finally:
                os.close(fd)

    # --- who is too much ---

    def flood(self, seed: int, ms: float) -> None:
        """As many requests as go through, and each is right."""
        with self.attack(ms) as goes_on:
            self.own_entry()
            with self.connect() as sock:
                seq = 1
                while goes_on():
                    self.say(sock, BORROW, seq, self.name, 0, 0, "")
                    self.say(sock, RETURN, seq + 1)
                    receive(sock)
                    seq += 2

    def comings_and_goings(self, seed: int, ms: float) -> None:
        random = Random(seed)
        with self.attack(ms) as goes_on:
            while goes_on():
                with self.connect(hello=random.random() < 0.5):
                    pass

    def hoarding(self, seed: int, ms: float) -> None:
        """As many loans as go, and keeps them."""
        with self.attack(ms) as goes_on, contextlib.ExitStack() as stack:
            self.own_entry()
            for sock in self.crowd(stack, Random(seed).randint(1, ENOUGH)):
                self.say(sock, BORROW, 1, [self.name] * 20, 0, 0, "")
                receive(sock)
            self.linger(goes_on)

    def crowd_in_line(self, seed: int, ms: float) -> None:
        """Waits in a long line, and leaves all at once."""
        with self.attack(ms) as goes_on, contextlib.ExitStack() as stack:
            self.own_entry()
            for sock in self.crowd(stack, Random(seed).randint(2, ENOUGH)):
                self.say(sock, BORROW, 1, self.name, 1, random_timeout(seed), "")
            self.linger(goes_on)


def random_timeout(seed: int) -> float | None:
    return None if seed % 2 else seed % 100 / 1000


def receive(sock: socket.socket) -> tuple[list[Any] | None, int]:
    """A message if one comes, and how many descriptors came with it, which are closed."""
    try:
        data, ancillary, _, _ = sock.recvmsg(65_536, socket.CMSG_SPACE(253 * 4))
    except TimeoutError:
        return None, 0
    count = 0
    for _, _, numbers in ancillary:
        for (number,) in struct.iter_unpack("i", numbers):
            os.close(number)
            count += 1
    if not data:
        raise ConnectionResetError
    return msgpack.unpackb(data), count
