"""The broker's log on stderr, for which the loop never waits.

Whoever has the other end may stop reading: a pipe that nobody empties, a terminal after Ctrl-S, a
file on a file system that hangs.  So a line only goes into a queue, and one thread writes.  The
queue holds so many bytes; lines for which there is no room are counted, and where they are missing
a line says how many.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from queue import SimpleQueue

from fdbroker.descriptors import wait_writable
from fdbroker.ipc.server.worker_pool import start_thread

QUEUE_BYTES = 64 * 1024  # as much again as a pipe takes (pipe(7))
LINE_BYTES = 8 * 1024  # of one record, with its traceback
END_SECONDS = 0.5  # for the rest, at the end


class Writer(logging.Handler):
    """Writes to the descriptor `fd`, which stays the caller's.  OSError if there is no thread."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("fdbroker: %(message)s"))
        self._fd = fd
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        self._bytes = 0  # of the lines that are not written
        self._lost = 0  # lines since the last one that was queued
        self._patience = END_SECONDS
        self._thread = start_thread(self._work)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue its line, or count it.  Called with the lock (logging.Handler.handle)."""
        try:
            text = self.format(record)
        except Exception as error:  # the standard handlers would print that, and wait
            text = f"fdbroker: event=bad-log at={record.filename}:{record.lineno} error={error!r}"
        line = text.encode(errors="backslashreplace")[: LINE_BYTES - 1] + b"\n"
        if self._bytes + len(line) > QUEUE_BYTES:
            self._lost += 1
            return
        line = self._tell_lost() + line
        self._bytes += len(line)
        self._lines.put(line)

    def close(self) -> None:
        """Write what is left, unless that waits for too long."""
        self._lines.put(None)
        self._thread.join(self._patience)
        self._patience = 0.0  # logging.shutdown() closes it once more
        super().close()

    def _tell_lost(self) -> bytes:
        lost, self._lost = self._lost, 0
        return f"fdbroker: event=log-lines-lost count={lost}\n".encode() if lost else b""

    def _work(self) -> None:
        while (line := self._lines.get()) is not None:
            self._write(line)
            self.acquire()
            try:
                self._bytes -= len(line)
                told = self._tell_lost() if self._lines.empty() else b""
            finally:
                self.release()
            self._write(told)

    def _write(self, line: bytes) -> None:
        while line:
            try:
                line = line[os.write(self._fd, line) :]
            except BlockingIOError:  # whoever shares it has made it so
                wait_writable(self._fd)
            except OSError:  # nobody reads it any more (EPIPE), and nobody can be told
                return


@contextlib.contextmanager
def to_stderr(*, verbose: bool) -> Iterator[None]:
    """While the block runs, what is logged is written to stderr, if there is one."""
    if sys.stderr is None:  # it was closed, so its number may be that of something else
        yield
        return
    root = logging.getLogger()
    level, writer = root.level, Writer(sys.stderr.fileno())
    root.addHandler(writer)
    root.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(writer)
        writer.close()
