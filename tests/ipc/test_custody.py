"""Custody is told in order: ledger, custody, answer; and at an end: cleared, told, freed."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

import pytest
from support import HELLO, Peer, Raw, kept, wait_until

import fdbroker
from fdbroker.errors import NoBroker, UnsupportedKind
from fdbroker.ipc.server.custody import Custody
from fdbroker.ipc.server.server import Server
from fdbroker.ipc.transport.unix_listener import Listener
from fdbroker.lender import Ledger, Lender
from fdbroker.lender.model import IDLE, LENT, LIVE, RETIRING

SIOCOUTQ = 0x5411


class Recorder(Custody):
    """Writes down what was true in each of its calls, as the ledger and the kernel have it."""

    def __init__(self, ledger: Ledger, path: str) -> None:
        self._ledger = ledger
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - until the process ends
        self._socks: dict[int, socket.socket] = {}
        self._sysfds: dict[int, int] = {}

    def _note(self, what: str, slot: int, **more: Any) -> None:
        print(json.dumps([what, slot, more]), file=self._file)

    def _is_answered(self, sock: socket.socket) -> bool:
        return fcntl.ioctl(sock, SIOCOUTQ, bytes(4)) != bytes(4)

    def keep_session(self, slot: int, sock: socket.socket) -> None:
        self._socks[slot] = sock
        state = self._ledger.session_states()[slot]
        self._note("keep session", slot, state=state, answered=self._is_answered(sock))

    def keep_entry(self, slot: int, sysfd: int) -> None:
        self._sysfds[slot] = sysfd
        answered = any(self._is_answered(sock) for sock in self._socks.values())
        state = self._ledger.entry_states()[slot]
        self._note("keep entry", slot, state=state, answered=answered, kind=os.fstat(sysfd).st_mode)

    def drop_session(self, slot: int) -> None:
        del self._socks[slot]
        states = self._ledger.session_states()
        self._note("drop session", slot, state=states[slot], lent=states.count(LENT))

    def drop_entry(self, slot: int) -> None:
        try:
            os.fstat(self._sysfds.pop(slot))
            closed = False
        except OSError:
            closed = True
        self._note("drop entry", slot, state=self._ledger.entry_states()[slot], closed=closed)


def serve(address: str, path: str) -> None:
    buffer = bytearray(Ledger.size(64, 64, 64))
    lender = Lender(Ledger(buffer, 64, 64, 64))
    server = kept["server"] = Server(Listener(address), lender, Recorder(lender.ledger, path))
    server.run()


def is_served(client: fdbroker.Client) -> bool:
    try:
        return bool(client.stats())
    except NoBroker:
        return False


def borrow_and_die(address: str) -> None:
    kept["client"] = fdbroker.Client(address)
    kept["loan"] = kept["client"].borrow("data")


def test_custody_is_told_in_order(tmp_path: Path, data_file: IO[bytes], peer: Peer) -> None:
    address, path = str(tmp_path / "s"), tmp_path / "told"

    def told() -> list[list[Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    with Peer() as broker:
        broker.start(serve, address, str(path))
        with fdbroker.Client(address) as client:
            wait_until(lambda: is_served(client))
            assert told().pop() == ["keep session", 0, {"state": IDLE, "answered": False}]
            client.put("data", data_file)
            what, slot, more = told().pop()
            assert (what, slot) == ("keep entry", 0)
            assert (more["state"], more["answered"]) == (LIVE, False)
            assert more["kind"] == os.fstat(data_file.fileno()).st_mode

            peer.call(borrow_and_die, address)
            before = len(told())
            peer.kill()
            wait_until(lambda: len(told()) > before)
            # its loan was cleared in the ledger, its slot was not free yet
            assert told().pop() == ["drop session", 2, {"state": IDLE, "lent": 0}]

            loan = client.borrow("data")
            client.retire("data")
            client.stats()
            assert told().pop()[0] != "drop entry"
            loan.close()
            wait_until(lambda: told()[-1][0] == "drop entry")
            assert told().pop() == ["drop entry", 0, {"state": RETIRING, "closed": True}]
        wait_until(lambda: [row[0] for row in told()].count("drop session") == 4)
        broker.kill()


def test_who_is_refused_is_never_in_custody(tmp_path: Path) -> None:
    address, path = str(tmp_path / "s"), tmp_path / "told"
    with Peer() as broker:
        broker.start(serve, address, str(path))
        with fdbroker.Client(address) as client:
            wait_until(lambda: is_served(client))
            with Raw(address, hello=False) as raw:
                raw.send(HELLO, 0, 2)
                raw.is_refused(61)
            folder = os.open(tmp_path, os.O_RDONLY)
            with pytest.raises(UnsupportedKind):
                client.put("folder", folder)
            os.close(folder)
            client.stats()
            rows = path.read_text().splitlines()  # of the good client: one lends, one puts
            assert ["keep session" in row for row in rows] == [True, True]
        broker.kill()
