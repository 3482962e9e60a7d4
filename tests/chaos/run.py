"""A run, from start to verdict.

The broker and the crew are started, watched for the time that was asked for, and told to come to
an end.  Then nothing may be left at the broker but its own entries: no session, loan, wait, job,
descriptor, and no memory that it did not have half-way through.  At last its recording is replayed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from support import open_files

import fdbroker
from fdbroker.errors import FDBrokerError, UnknownEntry

from . import stage
from .board import PATIENCE, Board
from .crew import BrokerProcess, Crew, adopt_orphans, end_all, import_what_actors_need
from .plan import CREW, DYING, GOOD, HOSTILE, TURNS, fingerprint, plan
from .replay import Different, replay

WRONG_SECONDS = 2.0  # in which the crew must have come to its end, if something is wrong already
GROWTH = 1_000_000  # bytes, at most, in the second half
SAMPLE_SECONDS = 0.5
LINE_SECONDS = 5.0
# in the broker's log: what no client may bring about
BAD = re.compile(r"Traceback|event=error|event=job-failed|event=close-failed|event=discard-failed")
EVENT = re.compile(r"\bevent=([\w-]+)")
WARM_UP = 20.0  # seconds of a run in which memory may grow


class Sample(NamedTuple):
    """What the broker had at one time."""

    at: float
    rss: int
    cpu: float


class Run:
    """One run; `wrong` are the findings, none of which there should be."""

    def __init__(
        self,
        seconds: float,
        seed: int,
        *,
        patience: float = PATIENCE,
        planted: str = "-",
        keep: str | None = None,
    ) -> None:
        self.end_seconds = 2 * patience  # in which all come to an end, and the broker lets them go
        self.seconds = seconds
        self.seed = seed
        self.planted = planted
        self.keep = keep  # where the recording goes, if not away
        self.wrong: list[str] = []
        self.samples: list[Sample] = []
        self.folder = ""

    def run(self) -> bool:
        """Do it; True if nothing was wrong."""
        print(
            f"seed {self.seed}, plan {fingerprint(self.seed)}: "
            f"{', '.join(f'{count} {role}' for role, count in CREW.items())}; "
            f"{self.seconds:g} s, each role "
            + ("under a uid of its own" if stage.RULED else "under this uid, without rules"),
            flush=True,
        )
        adopt_orphans()
        import_what_actors_need()
        self.folder = tempfile.mkdtemp(prefix="fdbroker-chaos-")
        os.chmod(self.folder, 0o711)
        recording = self.keep or f"{self.folder}/recording"
        actors = plan(self.seed)
        board = Board(actors, TURNS, self.end_seconds / 2)
        try:
            stage.fill(self.folder)
            Path(f"{self.folder}/fdbroker.toml").write_text(stage.configuration(self.folder))
            broker = BrokerProcess(self.folder, recording, self.planted)
            try:
                self._with(broker, board)
            finally:
                end_all({broker.pid})
                if broker.is_alive:
                    broker.kill()
            if not self.wrong or self.planted == "-":
                self._replay(recording)
            return self._verdict(recording)
        finally:
            end_all(set())
            board.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _with(self, broker: BrokerProcess, board: Board) -> None:
        begun = time.monotonic()
        try:
            with fdbroker.Client(broker.address) as client:
                self._play(broker, board, client)
        except (FDBrokerError, OSError) as error:
            self.wrong.append(f"the broker does not answer us: {error!r}")
        end_all({broker.pid})
        self.took = time.monotonic() - begun
        for actor, step, pid, text in board.faults():
            self.wrong.append(f"{actor} (pid {pid}) at {step}: {text}")
        status = broker.end()
        if status != 0:
            self.wrong.append(f"the broker ended with status {status}")
        self._read_log(broker)
        self._sum_up(board)

    def _play(self, broker: BrokerProcess, board: Board, client: fdbroker.Client) -> None:
        """The crew comes, does what it does for as long as it may, and goes."""
        expected = stage.look_at_all(client)
        client.borrow("common/file", mode="r").close()  # its threads have all begun
        wait_for(lambda: client.stats()["jobs"] == 0, self.end_seconds)
        before = Counter(open_files(broker.pid).values())
        stats = client.stats()
        begun = time.monotonic()
        crew = Crew(plan(self.seed), broker, board, expected)
        self._watch(broker, board, crew, client, begun)
        board.stop()
        wrong = self.wrong or crew.failed or board.faults()
        stuck = crew.wait(WRONG_SECONDS if wrong else self.end_seconds)
        self.wrong += crew.failed + ([] if wrong else stuck)
        end_all({broker.pid})
        if broker.is_alive:
            self._look_for_leaks(client, broker, stats, before)
            self.samples.append(sample(broker, time.monotonic() - begun))

    def _watch(
        self, broker: BrokerProcess, board: Board, crew: Crew, client: fdbroker.Client, begun: float
    ) -> None:
        """Until the time is over, or something is wrong."""
        next_line = LINE_SECONDS
        while (at := time.monotonic() - begun) < self.seconds:
            time.sleep(min(SAMPLE_SECONDS, self.seconds - at))
            crew.reap()
            if not broker.is_alive:
                self.wrong.append("the broker has ended")
            if self.wrong or crew.failed or board.faults():
                return
            at = time.monotonic() - begun
            self.samples.append(sample(broker, at))
            if at >= next_line:
                next_line = at + LINE_SECONDS
                self._print_line(at, board, client)

    def _print_line(self, at: float, board: Board, client: fdbroker.Client) -> None:
        stats, counts = client.stats(), board.counts()
        earlier, now = self.samples[max(0, len(self.samples) - 10)], self.samples[-1]
        cpu = (now.cpu - earlier.cpu) / (now.at - earlier.at) if now.at > earlier.at else 0.0
        print(
            f"{at:5.0f} s: {board.right():,} answers right, {total(counts, DYING):,} deaths, "
            f"{total(counts, HOSTILE):,} attacks; broker: {now.rss / 1e6:.2f} MB, {cpu:.0%} CPU, "
            f"{stats['sessions']} sessions, {stats['loans']} loans, {stats['waiting']} waiting, "
            f"{stats['entries']} entries, {stats['descriptors']} descriptors",
            flush=True,
        )

    # --- the end ---

    def _look_for_leaks(
        self,
        client: fdbroker.Client,
        broker: BrokerProcess,
        stats: dict[str, int],
        before: Counter[str],
    ) -> None:
        """Everybody has gone: the broker has what it had at the start."""
        kept = {*stage.COMMON, *TURNS, stage.SECRET}

        def is_as_before() -> bool:
            for entry in client.entries():
                if entry.name not in kept and not entry.retired:
                    with contextlib.suppress(UnknownEntry):
                        client.retire(entry.name)
            return client.stats() == stats and descriptors() == before

        def descriptors() -> Counter[str]:
            return Counter(open_files(broker.pid).values())

        if wait_for(is_as_before, WRONG_SECONDS if self.wrong else self.end_seconds):
            users = [row.uid for row in client.usage()] if hasattr(client, "usage") else []
            if not set(users) <= {os.geteuid()}:
                self.wrong.append(f"everyone is gone, and on account: {client.usage()}")
            return
        now = descriptors()
        self.wrong.append(
            f"everyone is gone, and the broker has {client.stats()} instead of {stats}; "
            f"descriptors more: {dict(now - before)}, less: {dict(before - now)}"
        )

    def _read_log(self, broker: BrokerProcess) -> None:
        with open(broker.log, errors="replace") as log:
            lines = log.read().splitlines()
        bad = [number for number, line in enumerate(lines) if BAD.search(line)]
        for number in bad[:1]:
            self.wrong.append("in the log:\n  " + "\n  ".join(lines[number : number + 20]))
        self.logged = Counter(EVENT.findall("\n".join(lines)))

    def growth(self) -> int:
        """Bytes of memory from the middle to the end: each the median of a tenth of the run."""
        tenth = max(3, len(self.samples) // 10)
        middle = len(self.samples) // 2
        first = statistics.median(one.rss for one in self.samples[middle : middle + tenth])
        last = statistics.median(one.rss for one in self.samples[-tenth:])
        return int(last - first)

    def _sum_up(self, board: Board) -> None:
        counts = board.counts()
        for role, needs in (("good", GOOD), ("dying", DYING), ("hostile", HOSTILE)):
            done = ", ".join(f"{kind} {counts[kind]:,}" for kind in needs)
            print(f"{role}: {total(counts, needs):,} steps: {done}")
        logged = ", ".join(f"{event} {count:,}" for event, count in self.logged.most_common())
        print(f"log: {logged}")
        print(
            f"{board.right():,} answers right in {self.took:.1f} s; a shared loan took at most "
            f"{board.slowest() / 1000:.1f} ms from asking to having"
        )
        if len(self.samples) > 6:
            rss = [one.rss / 1e6 for one in self.samples]
            growth = self.growth()
            print(
                f"memory: {rss[0]:.2f} MB at first, {rss[len(rss) // 2]:.2f} in the middle, "
                f"{rss[-1]:.2f} at the end, {max(rss):.2f} at most; "
                f"{growth / 1e6:+.3f} MB in the second half; "
                f"{self.samples[-1].cpu:.1f} s of CPU"
            )
            if growth >= GROWTH and self.seconds > 2 * WARM_UP:
                self.wrong.append(f"the broker grew by {growth:,} bytes in the second half")

    def _replay(self, recording: str) -> None:
        begun = time.monotonic()
        try:
            same = replay(recording)
        except Different as error:
            self.wrong.append(f"the replay: {error}")
            return
        if not same.whole:
            self.wrong.append("the recording has no end")
        print(
            f"replay: {same.events:,} events gave the same again, {same.digests} digests of the "
            f"ledger are the same, the last {same.digest.hex()[:16]}; "
            f"{os.path.getsize(recording) / 1e6:.1f} MB, {time.monotonic() - begun:.1f} s"
        )

    def _verdict(self, recording: str) -> bool:
        if not self.wrong:
            print("nothing was wrong")
            return True
        for one in self.wrong:
            print(f"WRONG: {one}")
        if not self.keep:
            handle, self.keep = tempfile.mkstemp(prefix="fdbroker-chaos-", suffix=".recording")
            os.close(handle)
            shutil.copy(recording, self.keep)
        print(
            f"again: python -m tests.chaos --seconds {self.seconds:g} --seed {self.seed}\n"
            f"what the lender was told: python -m tests.chaos --replay {self.keep}"
        )
        return False


def sample(broker: BrokerProcess, at: float) -> Sample:
    return Sample(at, broker.rss(), broker.cpu_seconds())


def total(counts: dict[str, int], kinds: object) -> int:
    return sum(count for kind, count in counts.items() if kind in kinds)  # type: ignore[operator]


def wait_for(condition: object, seconds: float) -> bool:
    """Whether it comes true in that time."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def interrupted() -> None:
    """Ctrl-C and SIGTERM end a run in order, also where a shell has SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
