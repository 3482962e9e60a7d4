"""The broker's few threads, for system calls that can take seconds: never on the event loop.

close(2) waits for SO_LINGER, FUSE and NFS; so do open(2) and fstat(2) on a file system that hangs.
Each such call is a job: it runs in a thread and touches nothing that the loop uses; then it is
back on the loop, where it is finished.
"""

from __future__ import annotations

import logging
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from queue import SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdbroker.ipc.server import Server

THREADS = 4
END_SECONDS = 0.5  # in which jobs are done at the end, unless they are stuck

log = logging.getLogger("fdbroker")


class Job(ABC):
    """One slow thing."""

    @abstractmethod
    def run(self) -> None:
        """In a thread: the slow part.  Errors are kept for `finish`."""

    @abstractmethod
    def finish(self, server: Server) -> None:
        """On the loop: what follows from it."""


class Workers:
    """Threads that are started when there is work, and an eventfd that tells of finished jobs."""

    def __init__(self) -> None:
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._done: deque[Job] = deque()
        self._threads: list[threading.Thread] = []
        self.pending = 0  # jobs that are not finished

    def submit(self, job: Job) -> None:
        """Have a thread run `job`; it comes back in `finished`."""
        self.pending += 1
        self._jobs.put(job)
        if len(self._threads) < min(self.pending, THREADS):
            name = f"fdbroker-worker-{len(self._threads)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def finished(self) -> Iterator[Job]:
        """The jobs that are back."""
        try:
            os.eventfd_read(self.wake)
        except BlockingIOError:
            return
        while self._done:
            self.pending -= 1
            yield self._done.popleft()

    def close(self) -> None:
        """Let the threads end; one that is stuck ends with the process."""
        for _ in self._threads:
            self._jobs.put(None)
        deadline = monotonic() + END_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            os.close(self.wake)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.run()
            except Exception:
                log.exception("event=job-failed job=%s", type(job).__name__)
            self._done.append(job)
            os.eventfd_write(self.wake, 1)
