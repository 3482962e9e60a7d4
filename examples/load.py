"""Clients that ask a web server without pause and never retry: used by restart_web_server.py.

Each request is a connection of its own.  What becomes of it: an answer, no connection (refused),
a connection that is reset or closed without an answer (reset), or anything else.
"""

import socket
import threading
import time
from collections import Counter

OUTCOMES = ("succeeded", "refused", "reset", "other")


class Load:
    """``with Load(port) as load:`` four clients ask as long as the block runs."""

    def __init__(self, port, clients=4):
        self.port = port
        self.outcomes = Counter()
        self.bodies = set()  # of all answers, ...
        self._known = set()  # ... and of those that were there when one was waited for last
        self.longest_stall = 0.0  # seconds that one client went without an answer
        self._over, self._lock = threading.Event(), threading.Lock()
        self._clients = [threading.Thread(target=self._client) for _ in range(clients)]

    def ask(self):
        """One request: its outcome."""
        answer = b""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 60) as sock:
                sock.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
                while data := sock.recv(4096):
                    answer += data
        except ConnectionRefusedError:
            return "refused"
        except (ConnectionResetError, BrokenPipeError):
            return "reset"
        except OSError:
            return "other"
        head, _, body = answer.partition(b"\r\n\r\n")
        if not head.startswith((b"HTTP/1.0 200 ", b"HTTP/1.1 200 ")):
            return "other" if answer else "reset"
        self.bodies.add(body)
        return "succeeded"

    def wait_for_a_new_answer(self):
        """Until there is an answer that there was not when this was called last."""
        deadline = time.monotonic() + 60
        while self.bodies <= self._known:
            if not self._clients[0].is_alive():
                self.ask()
            if time.monotonic() > deadline:
                raise TimeoutError("the server does not answer")
            time.sleep(0.01)
        self._known = set(self.bodies)

    def _client(self):
        last = time.monotonic()
        while not self._over.is_set():
            outcome, now = self.ask(), time.monotonic()
            with self._lock:
                self.outcomes[outcome] += 1
                self.longest_stall = max(self.longest_stall, now - last)
            if outcome == "succeeded":
                last = now

    def __enter__(self):
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        for client in self._clients:
            client.join()
