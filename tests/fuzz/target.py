"""The fuzz target: play one input at the real broker, and see that nothing gives way.

While it runs, every reply is held against contract.py, and so is every message: what is malformed
ends its session with a fault that says so, what is not is never refused as malformed.  After each
step the ledger tells what is in memory.  Afterwards all clients go, and nothing of them is left: no
session, loan, wait or job, and no descriptor more or less than before.

`Target.play` raises `Found` for the first thing that is not so.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence

import msgpack

from fdbroker.errors import ProtocolError, QuotaExceeded
from fdbroker.ipc.protocol.messages import MESSAGE_BYTES, REPLY_BYTES
from fdbroker.ipc.transport.received import ReceivedFDs
from fdbroker.ipc.transport.unix_socket import ANCILLARY_BYTES, RECEIVE_NOW
from fdbroker.lender.model import LENT, Entry
from fuzz import contract, steps
from fuzz.palette import BROKERS_LISTENER, KINDS, MOST, OTHER_CONNECTION, OWN_CONNECTION, Palette
from fuzz.steps import Input, Step
from fuzz.world import Found, World

LONGEST = 200_000  # bytes that a client tries to send in one message
HELLO_SECONDS = READ_SECONDS = 10
FLOODED = 1100  # requests of all floods of an input: more than the broker remembers
MANY_ENTRIES = 99  # on loan: the books are only compared at the end
WIDE = b"\xcf"  # the seq in nine bytes, as the broker remembers requests


class Client:
    """One connection, what it sent, and what came of it."""

    def __init__(self, sock: socket.socket, *, stranger: bool) -> None:
        self.sock = sock
        self.stranger = stranger
        self.seq = 0  # of the next request
        self.asked: dict[int, list[int]] = {}  # verbs by seq
        self.pages = False  # whether it has asked for any
        self.batch: list[bool] = []  # of the messages since all was served and read: malformed?
        self.sent: bytes = b""  # the last message
        self.over = False  # its end was read
        self.excused = False  # the broker may end it without a word
        self.brought = False  # it has sent descriptors on a kernel that lets everybody do so
        self.greeted_by = 0.0  # put-forward seconds until it must have said hello
        self.read_by = 0.0  # and until it must have read, if it has sent something since it did
        self.fault = ""  # the reason of the last message, if that was a fault
        self.refused = False  # the last message was a refusal
        self.greeted = False  # its hello was accepted
        self.turned_away = False  # it came when there was no room


class Target:
    """Plays inputs, one after the other, at one broker.

    thorough: compare ledger and memory after each step, not only at the end of each input.
    """

    def __init__(self, *, thorough: bool = True) -> None:
        self.thorough = thorough
        self.world = World()
        try:
            self.palette = Palette(self.world.folder, self.world.long_path)
        except BaseException:
            self.world.close()
            raise
        self.world.targets = self.world.now_open()
        self.clients: dict[int, Client] = {}
        self.tickets: list[bytes] = []
        self.unflooded = 0  # requests that may still come in floods

    def close(self) -> None:
        """End it all; nothing is left open."""
        self.palette.close()
        self.world.close()

    def play(self, it: Input) -> None:
        """One input."""
        self.world.begin(old_kernel=bool(it.kernel & steps.OLD_KERNEL))
        self.tickets.clear()
        self.unflooded = FLOODED
        try:
            for step in it.steps:
                ACTIONS[step.op](self, step)
                if step.how != steps.HELD:
                    self.world.serve()
                if step.how == steps.ANSWERED:
                    self._read_all()
            self.world.serve()
            self._read_all()
            self.world.check_books()
        finally:
            for number in list(self.clients):
                self._drop(number)
        self.world.serve()
        self.world.check_books()
        self.world.check_empty()

    # --- steps ---

    def _connect(self, step: Step) -> None:
        self._drop(step.client)
        (flags,) = step.numbers
        stranger = bool(flags & steps.STRANGER)
        sock = self.world.connect(stranger=stranger)
        if sock is None:
            return
        client = self.clients[step.client] = Client(sock, stranger=stranger)
        client.greeted_by = self.world.offset / 1e9 + HELLO_SECONDS
        if flags & steps.WITH_HELLO:
            puts = bool(flags & steps.PUTS)
            self._send(client, msgpack.packb([contract.HELLO, 0, 1, puts]))

    def _there(self, step: Step) -> Client | None:
        """The client, which comes first, or comes again, if it must."""
        client = self.clients.get(step.client)
        if client is None or client.over:
            self._connect(Step(steps.CONNECT, step.client, 0, (steps.WITH_HELLO | steps.PUTS,)))
            self.world.serve()
            self._read_all()
        return self.clients.get(step.client)

    def _send_raw(self, step: Step) -> None:
        if client := self._there(step):
            (times,) = step.numbers
            times = min(max(times, 1), LONGEST // max(len(step.data), 1))
            self._send(client, step.data * times, self._numbers(client, step.descriptors))

    def _request(self, step: Step) -> None:
        if client := self._there(step):
            verb, shift, count = step.numbers
            seq = max(0, client.seq + shift)
            data = self._head(verb % 128, seq, count) + step.data
            self._send(client, data, self._numbers(client, step.descriptors))

    def _many(self, step: Step) -> None:
        if client := self._there(step):
            count, size, flags, purpose, junk = step.numbers
            names = ["a" if size <= 1 else "x" * size] * min(count, 5000)
            fields = [names, flags, None, "p" * purpose]
            data = self._head(contract.BORROW, client.seq, len(fields))
            self._send(client, data + b"".join(map(msgpack.packb, fields)) + bytes(junk))

    def _flood(self, step: Step) -> None:
        client = self._there(step)
        for number in range(min(step.numbers[0], self.unflooded)):
            if client is None or client.over:
                return
            self.unflooded -= 1
            fields = ["", 2**20 + number, 0]
            data = self._head(contract.LOANS, client.seq, len(fields))
            self._send(client, data + b"".join(map(msgpack.packb, fields)))
            self.world.serve()
            self._read(client)

    def _rest(self, step: Step) -> None:
        pass

    def _shut_down(self, step: Step) -> None:
        if client := self.clients.get(step.client):
            client.excused = True
            client.sock.shutdown(step.numbers[0] % 3)

    def _close(self, step: Step) -> None:
        self._drop(step.client)

    def _time(self, step: Step) -> None:
        self.world.offset += 2 ** (step.numbers[0] % 16) * 125_000_000
        for client in self.clients.values():
            deadlines = client.greeted_by if client.seq == 0 else 0, client.read_by
            if any(deadline and self.world.offset / 1e9 >= deadline - 1 for deadline in deadlines):
                client.excused = True

    def _ticket(self, step: Step) -> None:
        client = self._there(step)
        if client is None or not self.tickets:
            return
        verb, which = step.numbers
        ticket = self.tickets[which % len(self.tickets)]
        fields = [ticket, False, None] if verb % 2 else [ticket, 0, 0, ""]
        verb = contract.RETIRE if verb % 2 else contract.BORROW
        data = self._head(verb, client.seq, len(fields))
        self._send(client, data + b"".join(map(msgpack.packb, fields)))

    @staticmethod
    def _head(verb: int, seq: int, fields: int) -> bytes:
        count = fields + 2
        array = bytes((0x90 + count,)) if count < 16 else b"\xdc" + count.to_bytes(2, "big")
        return array + bytes((verb,)) + WIDE + seq.to_bytes(8, "big")

    def _numbers(self, client: Client, groups: Iterable[tuple[int, int]]) -> list[int]:
        numbers: list[int] = []
        for kind, count in groups:
            kind %= KINDS
            if kind == BROKERS_LISTENER:
                number = self.world.listener.sock.fileno()
            elif kind == OWN_CONNECTION:
                number = client.sock.fileno()
            elif kind == OTHER_CONNECTION:
                others = [other for other in self.clients.values() if other is not client]
                number = (others or [client])[0].sock.fileno()
            else:
                number = self.palette.numbers[kind]
            numbers += [number] * count
        return numbers[: MOST + 1]

    def _send(self, client: Client, data: bytes, numbers: Sequence[int] = ()) -> None:
        """Send it if that can be; note what must come of it."""
        try:
            if numbers:
                socket.send_fds(client.sock, [data], numbers, socket.MSG_NOSIGNAL)
            else:
                client.sock.send(data, socket.MSG_NOSIGNAL)
        except OSError:  # the kernel refuses it: too long, too many, nobody there, no room
            return
        if not data:
            client.excused = True  # it looks like the end
        client.read_by = client.read_by or self.world.offset / 1e9 + READ_SECONDS
        client.brought |= self.world.old_kernel and bool(numbers)
        request = contract.parse(data, len(numbers))
        client.batch.append(request is None)
        client.sent = data
        if request is not None:
            client.asked.setdefault(request.seq, []).append(request.verb)
            client.pages |= request.verb in contract.PAGES
            if request.seq == client.seq:
                client.seq += 1

    def _drop(self, number: int) -> None:
        client = self.clients.pop(number, None)
        if client is not None:
            client.sock.close()

    # --- what comes back ---

    def _read_all(self) -> None:
        """Let the broker do, and every client read, all that there is; then look at it."""
        while True:
            came = [self._read(client) for client in self.clients.values()]
            if not any(came):
                break
            self.world.serve()
        for client in self.clients.values():
            self._judge(client)
        sessions = self.world.server.lender.sessions.values()
        if self.thorough and sum(len(session.entries) for session in sessions) < MANY_ENTRIES:
            self.world.check_books()

    def _read(self, client: Client) -> bool:
        """Read what is there, with as much room as the real client has: whether there was any."""
        came = False
        while not client.over:
            size = MESSAGE_BYTES if client.pages else REPLY_BYTES
            received = ReceivedFDs()
            try:
                received.messages.append(client.sock.recvmsg(size, ANCILLARY_BYTES, RECEIVE_NOW))
                came = True
                self._look_at(client, received)
            except BlockingIOError:
                break
            except ConnectionResetError:  # it ended with our messages unread; what it sent follows
                continue
            except (OSError, MemoryError, OverflowError) as error:
                raise Found(f"a client has no room for a reply ({error!r})") from None
            finally:
                received.close()
        return came

    def _look_at(self, client: Client, received: ReceivedFDs) -> None:
        """One reply."""
        flags = received.messages[-1][2]
        data, numbers, lost = received.parse_last()
        if lost or flags & socket.MSG_TRUNC:
            raise Found("a reply is larger than what a client has room for")
        if not data:
            client.over = True
            return
        message = msgpack.unpackb(data)
        if type(message) is not list or len(message) < 2 or type(message[0]) is not int:
            raise Found(f"no reply: {data!r}")
        code, seq = message[:2]
        verbs = client.asked.get(seq, [])
        client.refused, client.fault = code != 0, ""
        if code == ProtocolError.code:
            if mistake := contract.reply_mistake(contract.HELLO, data, message, len(numbers)):
                raise Found(f"a fault: {mistake}")
            client.fault = message[3]
            return
        if code == QuotaExceeded.code and not client.greeted:  # at the door, whatever it has sent
            client.turned_away = client.excused = True
            verbs = [contract.HELLO]
        client.greeted |= code == 0
        mistakes = [contract.reply_mistake(verb, data, message, len(numbers)) for verb in verbs]
        if not verbs and True in client.batch:
            raise Found(f"malformed, but accepted: {_brief(client)}")
        if not verbs:
            raise Found(f"a reply to seq {seq}, which was not sent")
        if all(mistakes):
            raise Found(f"the reply to verb {verbs[0]}, {len(data)} bytes: {mistakes[0]}")
        if code == 0 and verbs == [contract.PUT] and message[3]:
            self.tickets.append(message[3])
        if code == 0 and len(verbs) == 1 and len(client.batch) <= 1 and not client.excused:
            self._look_behind(client, verbs[0], message, numbers)

    def _look_behind(
        self, client: Client, verb: int, message: list[object], numbers: tuple[int, ...]
    ) -> None:
        """A reply to a single request, held against the books."""
        lender = self.world.server.lender
        if verb in (contract.BORROW, contract.MORE):
            total, count, since = message[2:5]
            offset = msgpack.unpackb(client.sent)[2] if verb == contract.MORE else 0
            if count != min(contract.DESCRIPTORS, total - offset):
                raise Found(f"{count} descriptors of {total} from {offset} on")
            loans = [
                session.entries[offset:]
                for session in lender.sessions.values()
                if session.state == LENT and session.since == since
            ]
            if not any(self._are_of(entries, numbers) for entries in loans):
                raise Found(f"a loan of others, or of nobody: {_brief(client)}")
        elif verb == contract.ENTRIES and message[2] == 0:
            (cursor,) = msgpack.unpackb(client.sent)[2:]
            looks = sum(1 for slot in lender.entries if slot >= cursor)
            self._check_looks(looks)
        elif verb == contract.LOANS and message[2:4] == [0, 0]:
            _, cursor, index = msgpack.unpackb(client.sent)[2:]
            looks = 0
            for session in lender.sessions.values():
                if session.state == LENT and session.slot >= cursor:
                    looks += max(0, len(session.entries) - index * (session.slot == cursor))
            self._check_looks(looks)

    @staticmethod
    def _are_of(entries: Sequence[Entry], numbers: tuple[int, ...]) -> bool:
        """Whether the kernel says that these are the descriptors of the entries."""
        some = list(zip(entries, numbers, strict=False))[:8]
        return all(os.path.sameopenfile(entry.sysfd, number) for entry, number in some)

    @staticmethod
    def _check_looks(looks: int) -> None:
        if looks > contract.PAGE_LOOKS:
            raise Found(f"one page has looked at {looks} places")

    def _judge(self, client: Client) -> None:
        """All that it sent was served, and all that came was read: is that what must be?"""
        batch, client.batch, client.read_by = client.batch, [], 0.0
        malformed = batch.index(True) if True in batch else None
        if client.fault:
            said = f"{client.fault}: {_brief(client)}"
            of_the_turn = client.fault.startswith(contract.TURN_FAULTS)
            if of_the_turn and malformed == 0:
                raise Found(
                    f"malformed, but refused for its turn: {client.fault}: {_brief(client)}"
                )
            unasked = client.brought and client.fault == contract.UNASKED_FAULT
            if not of_the_turn and not unasked and malformed is None:
                raise Found(f"not malformed, but refused: {said}")
            if not client.over:
                raise Found(f"after a fault ({client.fault}) the session goes on")
        elif malformed == 0 and not client.excused:
            raise Found(f"malformed, but accepted: {_brief(client)}")
        elif client.over and not (client.excused or client.refused or not batch):
            raise Found(f"ended without a word: {_brief(client)}")
        if client.turned_away and not client.over:
            raise Found("who was turned away at the door is in")
        client.fault = ""
        if client.over:
            client.excused = True


def _brief(client: Client) -> str:
    data = client.sent
    return f"{data[:60]!r}{'...' * (len(data) > 60)} ({len(data)} bytes)"


ACTIONS = {
    steps.CONNECT: Target._connect,
    steps.SEND: Target._send_raw,
    steps.REQUEST: Target._request,
    steps.MANY: Target._many,
    steps.FLOOD: Target._flood,
    steps.REST: Target._rest,
    steps.SHUTDOWN: Target._shut_down,
    steps.CLOSE: Target._close,
    steps.TIME: Target._time,
    steps.TICKET: Target._ticket,
}
