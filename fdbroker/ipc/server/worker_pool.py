"""The broker's few threads, for system calls that can take seconds: never on the event loop.

close(2) waits for SO_LINGER, FUSE and NFS; so do open(2) and fstat(2) on a file system that hangs.
Each such call is a job: it runs in a thread and touches nothing that the loop uses; then it is
back on the loop, where it is finished, whatever became of it.

Closing has threads of its own, and so has receiving: what hangs while it is looked at or opened,
closed or received, never stops the others.  Nor does what hangs for one uid stop all others: one
has at most half of the threads that nobody else has, and what it wants done beyond that waits.  The
first threads start with the broker, since one more may be refused later (pthread_create(3),
EAGAIN); one more is tried for a uid that has none, when all are busy.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from contextlib import suppress
from queue import SimpleQueue
from time import monotonic, thread_time_ns
from typing import TYPE_CHECKING

from fdbroker.lender.accounting import fair_share

if TYPE_CHECKING:
    from collections.abc import Callable

    from fdbroker.ipc.server.server import Server
    from fdbroker.lender.accounting import Account

THREADS = 4  # that look, and as many that close
MOST_THREADS = 64  # in each lane, if so many are stuck
LOOKING, CLOSING, RECEIVING = "look", "close", "receive"
LANES = {LOOKING: THREADS, CLOSING: THREADS, RECEIVING: 2}  # of a uid one message at a time
APART = ""  # a thread of its own, for what may hang and is the broker's own: the end never waits
END_SECONDS = 0.5  # in which jobs are done at the end, unless they are stuck

log = logging.getLogger("fdbroker")


def start_thread(run: Callable[..., None], *arguments: object) -> threading.Thread:
    """A thread that does not hold up the end of the process; OSError if there can be none."""
    thread = threading.Thread(target=run, args=arguments, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        what = "no thread can be started: raise RLIMIT_NPROC, or pids.max of its cgroup"
        raise OSError(errno.EAGAIN, what) from None
    return thread


class Job(ABC):
    """One slow thing."""

    lane = LOOKING
    awaited = True  # whether the end of a drain waits for it
    account: Account | None = None  # for whom it is done; None: for the broker itself
    failure = ""  # what `run` raised, by a mistake of ours

    @abstractmethod
    def run(self) -> None:
        """In a thread: the slow part.  Errors that can be are kept for `finish`."""

    @abstractmethod
    def finish(self, server: Server) -> None:
        """On the loop: what follows from it, also after a `failure`."""


class Lane:
    """The threads for one kind of job, and who may have them."""

    def __init__(self, work: Callable[[SimpleQueue[Job | None]], None]) -> None:
        """OSError if there can be no thread."""
        self.jobs: SimpleQueue[Job | None] = SimpleQueue()  # each has a thread, or will at once
        self.threads: list[threading.Thread] = []
        self._free = 0
        self._work = work
        self._busy: Counter[Account | None] = Counter()  # threads, by for whom
        self._waiting: dict[Account | None, deque[Job]] = {}

    def add_thread(self) -> None:
        """OSError if there can be none."""
        self.threads.append(start_thread(self._work, self.jobs))
        self._free += 1

    def put(self, job: Job) -> None:
        """One more."""
        self._waiting.setdefault(job.account, deque()).append(job)
        self._start(job.account)

    def finished(self, job: Job) -> None:
        """Its thread is free again: who waits gets it, those who were not served longest first."""
        self._free += 1
        self._busy[job.account] -= 1
        if not self._busy[job.account]:
            del self._busy[job.account]
        for account in list(self._waiting):
            self._start(account)

    def _start(self, account: Account | None) -> None:
        """As many of its jobs as may be."""
        waiting, started = self._waiting[account], False
        if not self._free and not self._busy[account] and len(self.threads) < MOST_THREADS:
            with suppress(OSError):
                self.add_thread()
        while (
            waiting
            and self._free
            and self._busy[account] < fair_share(self._busy[account], self._free)
        ):
            self._free -= 1
            self._busy[account] += 1
            self.jobs.put(waiting.popleft())
            started = True
        if started:
            del self._waiting[account]
            if waiting:
                self._waiting[account] = waiting  # behind the others

    def end(self) -> None:
        """Let each thread end, with what is waiting done before."""
        for waiting in self._waiting.values():
            for job in waiting:
                self.jobs.put(job)
        self._waiting.clear()
        for _ in self.threads:
            self.jobs.put(None)


class Workers:
    """The threads, and an eventfd that tells of finished jobs.  OSError if one cannot start."""

    def __init__(self) -> None:
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lanes: dict[str, Lane] = {}
        self._done: deque[Job] = deque()
        self._threads: list[threading.Thread] = []  # of jobs that have one of their own
        self.pending = 0  # jobs that are not finished, but for ...
        self.apart = 0  # ... those with a thread of their own
        self.awaited = 0  # of the pending ones
        try:
            for lane, threads in LANES.items():
                self._lanes[lane] = Lane(self._work)
                for _ in range(threads):
                    self._lanes[lane].add_thread()
        except BaseException:
            self.close()
            raise

    def submit(self, job: Job) -> None:
        """Have a thread run `job`; `finish` has it then.  OSError if it wants one of its own, and
        there is none."""
        if job.lane == APART:
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            self._threads.append(start_thread(self._run, job))
            self.apart += 1
        else:
            self.pending += 1
            self.awaited += job.awaited
            self._lanes[job.lane].put(job)

    def finish(self, server: Server, long: int) -> None:
        """On the loop: finish the jobs that are back; those after one that takes more than so many
        nanoseconds of its time, when others had a turn.  A mistake in one is no other's."""
        try:
            os.eventfd_read(self.wake)
        except BlockingIOError:
            return
        begun = thread_time_ns()
        while self._done:
            if thread_time_ns() - begun > long:
                os.eventfd_write(self.wake, 1)
                return
            job = self._done.popleft()
            if job.lane == APART:
                self.apart -= 1
            else:
                self.pending -= 1
                self.awaited -= job.awaited
                self._lanes[job.lane].finished(job)
            try:
                job.finish(server)
            except Exception:
                log.exception("event=error job=%s", type(job).__name__)

    def close(self) -> None:
        """Let the threads end; one that is stuck ends with the process."""
        for lane in self._lanes.values():
            lane.end()
        deadline = monotonic() + END_SECONDS
        threads = [*self._threads, *(one for lane in self._lanes.values() for one in lane.threads)]
        for thread in threads:
            thread.join(max(0.0, deadline - monotonic()))
        if not any(thread.is_alive() for thread in threads):
            os.close(self.wake)

    def _work(self, jobs: SimpleQueue[Job | None]) -> None:
        while (job := jobs.get()) is not None:
            self._run(job)

    def _run(self, job: Job) -> None:
        try:
            job.run()
        except Exception as error:
            log.exception("event=job-failed job=%s", type(job).__name__)
            job.failure = repr(error)
        self._done.append(job)
        os.eventfd_write(self.wake, 1)
