"""python -m benchmarks.before_after BEFORE AFTER [SITUATION ...]: two checkouts in one run.

BEFORE and AFTER are folders with an fdbroker package each, such as worktrees of two commits.  Each
side has a broker and a client of its own from its own folder (`side.py`), all pinned to one CPU,
and they take turns in rounds.  The ratio is AFTER's time over BEFORE's in each round: its median
and quartiles are printed.

Where a process happens to lie in memory is worth some hundredths, so all is set up anew `--sets`
times, and the other side is first each time.
"""

from __future__ import annotations

import argparse
import compileall
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.harness import (
    POLICIES,
    Result,
    Run,
    Topic,
    Unavailable,
    Variant,
    checkout,
    machine,
    place,
)
from benchmarks.side import IDLE, IN_TURN, TOGETHER, names_here
from benchmarks.table import micros, ratios, spread

SIDE = Path(__file__).with_name("side.py")
SETS = 4
SITUATIONS = {  # what is done, how often in each round, and how much one time is
    "cycle": ("borrow + return", 1600, 1),
    "borrow_all": (f"the same of {TOGETHER} at once, each", 400 * TOGETHER, TOGETHER),
    "idle": (f"borrow + return beside {IDLE:,} idle sessions", 1600, 1),
    "names": (f"borrow + return of one of {names_here():,} names", 1600, 1),
    "turns": (f"borrow + return of {IN_TURN:,} names in turn", IN_TURN, 1),
    "exec": ("fdbroker exec -- true", 4, 1),
}
HEAD = """\
| what | before, µs | after, µs | after / before | its quartiles |
|---|---|---|---|---|"""


@contextmanager
def side(package: Path, situation: str) -> Iterator[Run]:
    """The client of that package, with its broker, in that situation."""
    environment = os.environ | {"PYTHONPATH": str(package)}
    with subprocess.Popen(
        [sys.executable, "-P", str(SIDE), situation],
        cwd=package,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        tell, hear = process.stdin, process.stdout
        if hear.readline() != "\n":
            raise Unavailable(f"{situation} could not be set up, as said above")

        def run(n: int) -> int:
            tell.write(f"{n}\n")
            tell.flush()
            return int(hear.readline())

        yield run
        tell.close()


def compare(situation: str, before: Path, after: Path, rounds: int, sets: int) -> Result:
    """All rounds of both sides, of which AFTER's ratio is against BEFORE."""
    unit, cycles, per = SITUATIONS[situation]
    variants = [
        Variant("before", partial(side, before, situation), against="before", per=per),
        Variant("after", partial(side, after, situation), against="before", per=per),
    ]
    found: Result = {}
    for _ in range(sets):
        one = Topic(situation, unit, cycles, tuple(variants)).measure(rounds)
        one["variants"].sort(key=lambda variant: variant["name"], reverse=True)
        if not found:
            found = one
        else:
            for all_rounds, more in zip(found["variants"], one["variants"], strict=True):
                all_rounds["ns"] += more["ns"]
                all_rounds["switches"] += more["switches"]
        variants.reverse()
    return found


def row(found: Result) -> str:
    """The median times of both, and their ratio."""
    what = found["unit"]
    if found["left_out"]:
        return f"| {what} | left out: {'; '.join(found['left_out'].values())} | | | |"
    before, after = found["variants"]
    times = [f"{median(micros(variant)):.3f}" for variant in (before, after)]
    shares = ratios(found, after)
    return f"| {what} | {' | '.join(times)} | {median(shares):.3f} | {spread(shares)} |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.before_after")
    parser.add_argument("before", type=checkout, metavar="BEFORE")
    parser.add_argument("after", type=checkout, metavar="AFTER")
    parser.add_argument("situations", nargs="*", metavar="SITUATION", help=", ".join(SITUATIONS))
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="in each set")
    parser.add_argument("--sets", type=int, default=SETS, metavar="N")
    parser.add_argument("--cpu", type=int, metavar="N", help="default: the last one allowed")
    parser.add_argument("--policy", choices=POLICIES, default="batch", help="of the scheduler")
    asked = parser.parse_args()
    if unknown := set(asked.situations) - SITUATIONS.keys():
        parser.error(f"no situation {', '.join(sorted(unknown))}: use {', '.join(SITUATIONS)}")
    if asked.rounds < 2:
        parser.error("quartiles take two rounds at least")
    return asked


def main() -> int:
    asked = arguments()
    for package in (asked.before, asked.after):
        compileall.compile_dir(package / "fdbroker", quiet=1)
    where = machine(place(asked.cpu, asked.policy), asked.policy)
    print(f"{where['cpu']}, load {where['load']:.2f}; Linux {where['kernel']}; {where['python']};")
    print(f"before {asked.before}, after {asked.after}; {asked.sets} sets of {asked.rounds} rounds")
    print("", HEAD, sep="\n", flush=True)
    for situation in asked.situations or SITUATIONS:
        found = compare(situation, asked.before, asked.after, asked.rounds, asked.sets)
        print(row(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
