"""Clients that never retry: threads that each ask again and again, and count what became of it."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from typing import Any

PATIENCE = 60.0  # seconds that one request may take
REQUEST = b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"


class Load:
    """``with Load(family, address) as load:`` runs the clients for as long as the block."""

    def __init__(self, family: int, address: Any, clients: int = 4) -> None:
        self.outcomes: Counter[str] = Counter()
        self.pids: Counter[int] = Counter()  # of who answered
        self.connected = [False] * clients  # and has no answer yet
        self.longest = 0.0  # seconds
        self._family, self._address = family, address
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(clients)]

    def _ask(self, client: int) -> None:
        while not self._over.is_set():
            begun, outcome = time.monotonic(), "succeeded"
            try:
                with socket.socket(self._family) as sock:
                    sock.settimeout(PATIENCE)
                    sock.connect(self._address)
                    self.connected[client] = True
                    sock.sendall(REQUEST)
                    answer = b""
                    while data := sock.recv(4096):
                        answer += data
                head, _, body = answer.partition(b"\r\n\r\n")
                if head.startswith(b"HTTP/1.1 200 "):
                    self.pids[int(body)] += 1
                else:
                    outcome = "reset"  # or closed with no answer, which is no better
            except (ConnectionRefusedError, FileNotFoundError):
                outcome = "refused"
            except (ConnectionResetError, BrokenPipeError):
                outcome = "reset"
            except OSError as error:
                outcome = repr(error)
            self.connected[client] = False
            with self._lock:
                self.outcomes[outcome] += 1
                self.longest = max(self.longest, time.monotonic() - begun)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
