"""python -m benchmarks.against_s6 [--seconds N] [ATTACK ...]: the same attacks on both brokers.

Prints a table for each attack, in Markdown (docs/comparison.md has the last one).  As root the
attackers and the good client are different users; else they are one, and what depends on a uid's
quota cannot show.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import signal
import sys
import time

import fdbroker
import fdbroker.ipc.client.client
from benchmarks.attacks import ATTACKS, Told, sixty
from benchmarks.harness import commit
from benchmarks.subjects import ROOT, SUBJECTS, Fdbroker, missing, version

SIXTY = {"each": "a uid each", "one": "all of one uid", "own": "all of the broker's own uid"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against_s6")
    parser.add_argument("attack", nargs="*", choices=[*ATTACKS, "sixty", []], help="default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the 60 clients")
    asked = parser.parse_args()
    if absent := missing():
        print(f"not here: {', '.join(absent)} (apt-get install s6)", file=sys.stderr)
        return 1
    chosen = asked.attack or [*ATTACKS, "sixty"]
    print(
        f"fdbroker {fdbroker.__version__} ({commit()}), {version()}; "
        f"Linux {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} CPUs, "
        f"{'different users' if ROOT else 'one user'}, {time.strftime('%Y-%m-%d')}\n"
    )
    for name in chosen:
        if name != "sixty":
            attack = ATTACKS[name]
            show(attack.__doc__, {kind.label: attack(kind) for kind in SUBJECTS})
    if "sixty" in chosen:
        results = {}
        for kind in SUBJECTS:
            for uids, words in SIXTY.items():
                if uids == "each" or (kind is Fdbroker and ROOT):
                    attack = functools.partial(sixty, seconds=asked.seconds, uids=uids)
                    results[f"{kind.label}, {words}"] = attack(kind)
        show(f"{sixty.__doc__} {asked.seconds:g} s.", results)
    return 0


def show(what: str | None, results: dict[str, Told]) -> None:
    """A table: a row for each thing that was told, a column for each broker."""
    print(f"**{' '.join((what or '').split())}**\n")
    rows = dict.fromkeys(row for told in results.values() for row in told)
    print("| | " + " | ".join(results) + " |")
    print("|---" * (len(results) + 1) + "|")
    for row in rows:
        print(f"| {row} | " + " | ".join(told.get(row, "–") for told in results.values()) + " |")
    print(flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing is left running
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
