"""Measures variants against each other, so that what disturbs one disturbs all.

A *variant* is one way to do a thing: a name, and a context manager that sets it up and yields
`run(n)`, which does it n times.  A *topic* is a list of variants, all set up at once.  A *round*
runs each of them once, in order: A B C, A B C, ...  The ratio of two variants is taken within each
round, and the median of those ratios is the figure.

Every process is pinned to the same CPU and under the same scheduling policy (children inherit
both): where the processes are placed is worth more than anything measured here.  What they import
has its bytecode already, and the collector is off while the clock runs.  All rounds are kept raw in
the result; nothing here computes a figure.
"""

from __future__ import annotations

import compileall
import gc
import os
import platform
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
POLICIES = {"other": os.SCHED_OTHER, "batch": os.SCHED_BATCH}
PATIENCE = 60  # seconds that one variant may take to be set up, or in one round
FAREWELL = 10  # seconds that a child may take to end

Run = Callable[[int], int | None]  # ns, where not all that it does is to be counted
Result = dict[str, Any]  # what goes to the JSON file, and all that the table knows


class Unavailable(Exception):
    """This variant cannot run here, and the message says why; it is left out aloud."""


@dataclass(frozen=True)
class Variant:
    """One way to do it.  `against` names the variant that its ratio divides by."""

    name: str
    setup: Callable[[], AbstractContextManager[Run]]
    against: str
    per: int = 1  # how much one run(1) does: 32 descriptors, say
    goal: float | None = None  # the ratio to reach, at most
    beyond: float | None = None  # what would be better still
    least: float | None = None  # as `goal`, for what is to be slower: at least
    cycles: int | None = None  # in each round; None: as the topic says


@dataclass(frozen=True)
class Check:
    """A ratio that is known beforehand; a run that shows another one is void.  So is one in which
    what it is against took, in the median, so many times what it took in the best tenth."""

    variant: str
    low: float
    high: float
    steady: float = 1.08


@dataclass(frozen=True)
class Topic:
    name: str
    unit: str  # what is done once: "borrow + return"
    cycles: int  # of that unit, for each variant in each round
    variants: tuple[Variant, ...]
    check: Check | None = None
    ladder: tuple[str, ...] = ()  # variants of which each does one thing more; the last does all

    def measure(self, rounds: int) -> Result:
        return measure(self, rounds)


@dataclass(frozen=True)
class Figure:
    """Something that is counted once, not timed; `goal` is the most that it may be, `beyond` what
    would be better still."""

    name: str
    unit: str
    value: float
    goal: float | None = None
    beyond: float | None = None


@dataclass(frozen=True)
class Figures:
    """A topic of such figures."""

    name: str
    take: Callable[[], Iterator[Figure]]

    def measure(self, rounds: int) -> Result:
        return {"unit": "each once", "figures": [asdict(figure) for figure in self.take()]}


def needs(module: str, name: str) -> Any:
    """What is called `name` there, or Unavailable."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as missing:
        raise Unavailable(str(missing)) from missing


@contextmanager
def child(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends by itself when its end of our pipe or socket closes, and is reaped.

    It is in a process group of its own, so a Ctrl-C is ours alone to handle.
    """
    with subprocess.Popen(command, cwd=ROOT, bufsize=0, process_group=0, **options) as process:
        try:
            yield process
        finally:
            if process.stdin:
                process.stdin.close()
            try:
                process.wait(FAREWELL)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
    if process.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with status {process.returncode}")


def checkout(text: str) -> Path:
    """The absolute path of a folder with an fdbroker package in it: a type for argparse."""
    path = Path(text).resolve()
    if not (path / "fdbroker" / "__init__.py").is_file():
        raise ArgumentTypeError(f"there is no package fdbroker in {text}")
    return path


def install() -> None:
    """Have the bytecode of everything written before, as it is where a package is installed."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    compileall.compile_dir(ROOT / "fdbroker", quiet=1)
    compileall.compile_dir(ROOT / "benchmarks", quiet=1)


def place(cpu: int | None, policy: str) -> int:
    """Pins this process, and all that it will start, to one CPU; which one is returned."""
    cpu = max(os.sched_getaffinity(0)) if cpu is None else cpu
    os.sched_setaffinity(0, {cpu})
    os.sched_setscheduler(0, POLICIES[policy], os.sched_param(0))
    return cpu


def measure(topic: Topic, rounds: int) -> Result:
    """The topic's raw rounds.  A variant that is Unavailable is named with its reason."""
    left_out: dict[str, str] = {}
    taken: list[tuple[Run, Result]] = []
    with ExitStack() as stack:
        for variant in topic.variants:
            try:
                with patience():
                    run = stack.enter_context(variant.setup())
            except Unavailable as why:
                left_out[variant.name] = str(why)
                continue
            record: Result = {
                "name": variant.name,
                "against": variant.against,
                "goal": variant.goal,
                "beyond": variant.beyond,
                "least": variant.least,
                "per": variant.per,
                "runs": max(1, (variant.cycles or topic.cycles) // variant.per),
                "ns": [],
                "switches": [],
            }
            taken.append((run, record))
        for run, record in taken:
            timed(run, record["runs"])  # warm-up
        for number in range(rounds):
            print(f"{topic.name}: round {number + 1} of {rounds}", end="\r", file=sys.stderr)
            for run, record in taken:
                ns, switches = timed(run, record["runs"])
                record["ns"].append(ns)
                record["switches"].append(switches)
    print(file=sys.stderr)
    return {
        "unit": topic.unit,
        "check": asdict(topic.check) if topic.check else None,
        "ladder": topic.ladder,
        "left_out": left_out,
        "variants": [record for _, record in taken],
    }


def timed(run: Run, n: int) -> tuple[int, int]:
    """How many nanoseconds n times took, and how often the machine switched tasks meanwhile."""
    gc.collect()
    gc.disable()
    try:
        with patience():
            before = context_switches()
            start = time.perf_counter_ns()
            counted = run(n)
            took = time.perf_counter_ns() - start
            return took if counted is None else counted, context_switches() - before
    finally:
        gc.enable()


@contextmanager
def patience() -> Iterator[None]:
    """A peer that hangs ends the benchmark with an error instead of hanging it too."""

    def give_up(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"a variant was not set up, or did not finish a round, in {PATIENCE} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def context_switches() -> int:
    """Of all processes on all CPUs, since boot (`ctxt` in proc_stat(5))."""
    return int(field(Path("/proc/stat"), "ctxt"))


def field(file: Path, key: str) -> str:
    """What follows the key in the first line that starts with it."""
    for line in file.read_text().splitlines():
        if line.startswith(key):
            return line.removeprefix(key).strip(" \t:")
    return "unknown"


def machine(cpu: int | None, policy: str) -> Result:
    """What the figures depend on, beside the code."""
    return {
        "cpu": field(Path("/proc/cpuinfo"), "model name"),
        "cpus": os.cpu_count(),
        "pinned_to": cpu,
        "policy": policy,
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()} "
        f"({platform.python_compiler()})",
        "gil": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
    }


def commit() -> str:
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.check_output(describe, cwd=ROOT, text=True, timeout=PATIENCE).strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
