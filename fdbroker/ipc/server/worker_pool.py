"""The broker's few threads, for system calls that can take seconds: never on the event loop.

close(2) waits for SO_LINGER, FUSE and NFS; so do open(2) and fstat(2) on a file system that hangs.
Each such call is a job.  It runs in a thread and touches nothing that the loop uses; then the pool
posts its completion to the loop, with the thread CPU time that it took.

Closing has threads of its own, so a hanging inspection never delays a close.  Nor does one user
delay the others: a user has at most half of the threads that nobody else has, and its other jobs
wait.  When all threads are busy and a user has none, one more thread is tried.
"""

from __future__ import annotations

import errno
import logging
import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from time import monotonic, thread_time_ns

from fdbroker.ipc.server.tuning import TUNING, Tuning

# The kinds of threads.  A DEDICATED job has a thread of its own: it may hang, it is the broker's
# own, and the end of the broker never waits for it.
INSPECT, CLOSE, DEDICATED = "inspect", "close", "dedicated"

log = logging.getLogger("fdbroker")


def start_thread(run: Callable[..., None], *arguments: object) -> threading.Thread:
    """Start a thread that does not hold up the end of the process; OSError if there can be none."""
    thread = threading.Thread(target=run, args=arguments, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        what = "no thread can be started: raise RLIMIT_NPROC, or pids.max of its cgroup"
        raise OSError(errno.EAGAIN, what) from None
    return thread


class Job(ABC):
    """One slow thing."""

    # Which threads run it.
    queue = INSPECT
    # Whether the end of a drain waits for it.
    drain_waits = True
    # For whom it is done; None: for the broker itself.
    user: Hashable = None
    # What `run` raised, by a mistake of ours.
    crash = ""
    # Nanoseconds of thread CPU time that `run` took.
    took = 0
    # What the pool calls on the loop when the job is back.
    done: Callable[[], object]

    @abstractmethod
    def run(self) -> None:
        """Do the slow part, in a thread.  Errors that can be expected are kept for later."""


Done = Callable[[], object]


class WorkQueue:
    """The threads for one kind of job, and the jobs that wait for one."""

    def __init__(self, work: Callable[[SimpleQueue[Job | None]], None], most: int) -> None:
        self.jobs: SimpleQueue[Job | None] = SimpleQueue()
        self.threads: list[threading.Thread] = []
        self._work = work
        self._most = most
        self._free = 0
        self._busy: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, deque[Job]] = {}

    def add_thread(self) -> None:
        """Start one more thread; OSError if there can be none."""
        self.threads.append(start_thread(self._work, self.jobs))
        self._free += 1

    def put(self, job: Job) -> None:
        """Queue a job behind those of its user, and start it if the user may have a thread."""
        self._waiting.setdefault(job.user, deque()).append(job)
        self._start(job.user)

    def finished(self, job: Job) -> None:
        """The job's thread is free: give it to the user who was not served for longest."""
        self._free += 1
        self._busy[job.user] -= 1
        if not self._busy[job.user]:
            del self._busy[job.user]
        for user in list(self._waiting):
            self._start(user)

    def _start(self, user: Hashable) -> None:
        """Start as many of a user's jobs as it may have threads."""
        waiting, started = self._waiting[user], False
        if not self._free and not self._busy[user] and len(self.threads) < self._most:
            with suppress(OSError):
                self.add_thread()
        # At most half of the threads that nobody else has.
        while waiting and self._busy[user] < self._free:
            self._free -= 1
            self._busy[user] += 1
            self.jobs.put(waiting.popleft())
            started = True
        if started:
            # The user goes behind all others who wait.
            del self._waiting[user]
            if waiting:
                self._waiting[user] = waiting

    def end(self) -> None:
        """Let each thread end once all that waits is done."""
        for waiting in self._waiting.values():
            for job in waiting:
                self.jobs.put(job)
        self._waiting.clear()
        for _ in self.threads:
            self.jobs.put(None)


class WorkerPool:
    """The threads.  `post` is called from them, with what is to be done on the loop.

    OSError if a thread cannot be started.
    """

    def __init__(self, post: Callable[[Done], None], tuning: Tuning = TUNING) -> None:
        self._post = post
        self._tuning = tuning
        self._queues: dict[str, WorkQueue] = {}
        self._dedicated: list[threading.Thread] = []
        # Jobs that are not back yet: of the shared threads, of dedicated ones, and those of the
        # shared threads that the end of a drain waits for.
        self.pending = 0
        self.dedicated = 0
        self.drain_waits = 0
        # Called after the completion of each job, once somebody waits for all of them.
        self.on_done: Done | None = None
        try:
            for kind in (INSPECT, CLOSE):
                queue = self._queues[kind] = WorkQueue(self._work, tuning.most_threads)
                for _ in range(tuning.threads):
                    queue.add_thread()
        except BaseException:
            self.close()
            raise

    def submit(self, job: Job, done: Done) -> None:
        """Run `job` in a thread, then call `done` on the loop.

        OSError if the job wants a thread of its own and there can be none.
        """
        job.done = done
        if job.queue == DEDICATED:
            self._dedicated = [thread for thread in self._dedicated if thread.is_alive()]
            self._dedicated.append(start_thread(self._run, job))
            self.dedicated += 1
        else:
            self.pending += 1
            self.drain_waits += job.drain_waits
            self._queues[job.queue].put(job)

    def close(self) -> bool:
        """Let the threads end.  Returns whether all have: one that is stuck ends with the process,
        and may still post what it has done."""
        for queue in self._queues.values():
            queue.end()
        deadline = monotonic() + self._tuning.join_seconds
        threads = [thread for queue in self._queues.values() for thread in queue.threads]
        for thread in (*self._dedicated, *threads):
            thread.join(max(0.0, deadline - monotonic()))
        return not any(thread.is_alive() for thread in (*self._dedicated, *threads))

    def _work(self, jobs: SimpleQueue[Job | None]) -> None:
        while (job := jobs.get()) is not None:
            self._run(job)

    def _run(self, job: Job) -> None:
        begun = thread_time_ns()
        try:
            job.run()
        except Exception as error:
            log.exception("event=job-failed job=%s", type(job).__name__)
            job.crash = repr(error)
        job.took = thread_time_ns() - begun
        self._post(partial(self._finished, job))

    def _finished(self, job: Job) -> None:
        """On the loop: the job is back."""
        if job.queue == DEDICATED:
            self.dedicated -= 1
        else:
            self.pending -= 1
            self.drain_waits -= job.drain_waits
            self._queues[job.queue].finished(job)
        job.done()
        if self.on_done is not None:
            self.on_done()
