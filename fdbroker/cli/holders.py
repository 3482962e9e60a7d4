"""Holders: says on stderr who has an entry on loan, while somebody waits for it.

A thread of its own asks the broker at a low rate and says so when the answer is another one: in
a line that is written over, on a terminal, and else in one line each time.  What ends within a
moment is waited for in silence.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from threading import Event, Thread
from typing import TYPE_CHECKING

from fdbroker.cli.output import complain, printable
from fdbroker.errors import FDBrokerError

if TYPE_CHECKING:
    from fdbroker.ipc.client import Client

MOMENT_SECONDS = 0.2
EVERY_SECONDS = 0.5
NAMED = 8  # processes in a line; of more, their number
ERASE_LINE = "\r\x1b[K"  # ECMA-48, EL


class Holders:
    """``with Holders(client, name, generation):``, for as long as the wait lasts.

    `generation` tells the entry from one that takes its name meanwhile; None says nothing.
    """

    def __init__(self, client: Client, name: str, generation: int | None) -> None:
        self._client = client
        self._name = name
        self._generation = generation
        self._over = Event()
        self._thread = Thread(target=self._watch, daemon=True)
        self._processes: dict[int, str] = {}  # by pid, as they were when first seen
        self._in_line = False  # what was said last can be written over

    def __enter__(self) -> Holders:
        if self._generation is not None and sys.stderr is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(1.0)  # a broker that does not answer is not waited for
        if self._in_line:
            print(ERASE_LINE, end="", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        with suppress(FDBrokerError, OSError):  # who waits is told the same, and says it
            self._tell_until_over()

    def _tell_until_over(self) -> None:
        said, before, pause = "", "", MOMENT_SECONDS
        while not self._over.wait(pause):
            pause = EVERY_SECONDS
            now = self._whom()
            closes = not now and before != ""  # it follows the last return and takes no time ...
            before = now
            sentence = f"{self._name}: waiting for {now or 'its close'}"  # ... unless it does
            if sentence != said and not closes and not self._over.is_set():
                self._say(sentence)
                said = sentence

    def _whom(self) -> str:
        """For whom we wait, by when they came; nobody is empty."""
        loans = self._client.loans(self._name)
        loans = [loan for loan in loans if loan.generation == self._generation]
        for loan in loans:
            if loan.pid not in self._processes:
                self._processes[loan.pid] = loan.process
        pids = list(dict.fromkeys(loan.pid for loan in sorted(loans, key=lambda one: one.since)))
        named = [self._described(pid) for pid in pids[:NAMED]]
        if len(pids) > NAMED:
            named.append(f"and {len(pids) - NAMED} more")
        return ", ".join(named)

    def _described(self, pid: int) -> str:
        process = printable(self._processes[pid])
        return f"pid {pid or 'unknown'}" + (f" ({process})" if process else "")

    def _say(self, sentence: str) -> None:
        if not sys.stderr.isatty():
            complain(sentence)
            return
        self._in_line = True
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        print(f"{ERASE_LINE}{sentence[: columns - 1]}", end="", file=sys.stderr, flush=True)
