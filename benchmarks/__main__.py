"""python -m benchmarks [TOPIC] [--rounds N] [--json [FILE]]: measures, and prints a table.

With --json FILE the raw rounds are kept there, without FILE they are printed in its place.
`python -m benchmarks table FILE` prints the table of an earlier run, `plot FILE FOLDER` draws it,
`goals FILE ...` says what several reached.  A topic that is void is measured again, some times; the
exit status is 1 if one still is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks import (
    clients,
    cycle,
    layers,
    memory,
    names,
    peers,
    pool,
    rc,
    scale,
    sessions,
    startup,
)
from benchmarks.harness import POLICIES, Figures, Result, Topic, install, machine, place
from benchmarks.plot import plot
from benchmarks.table import VOID, goals, judge, table

MODULES = cycle, layers, sessions, names, clients, pool, peers, rc, startup, scale, memory
TOPICS = {module.TOPIC.name: module.TOPIC for module in MODULES}
PRINTED = Path("-")
AGAIN = 9  # times that a topic is measured anew because it was void
FILES = {"table": "FILE", "plot": "FILE and FOLDER", "goals": "FILE ..."}  # what these take


def main() -> int:
    asked = arguments()
    if asked.what == "goals":
        print(goals([json.loads(file.read_text()) for file in asked.files]))
        return 0
    if asked.what in FILES:
        result: Result = json.loads(asked.files[0].read_text())
    else:
        result = run(asked)
    if asked.what == "plot":
        for file in plot(result, asked.files[1]):
            print(file)
        return 0
    print(raw(result) if asked.json == PRINTED else table(result))
    void = any(judge(topic)[0] == VOID for topic in result["topics"].values())
    return 1 if void else 0


def run(asked: argparse.Namespace) -> Result:
    """Measure; each topic is kept as soon as it is done."""
    install()
    cpu = None if asked.unpinned else place(asked.cpu, asked.policy)
    result = {"machine": machine(cpu, asked.policy), "rounds": asked.rounds, "topics": {}}
    again = AGAIN if asked.policy == "batch" else 0  # under another one most are
    for topic in [TOPICS[asked.what]] if asked.what else TOPICS.values():
        result["topics"][topic.name] = believable(topic, asked.rounds, again)
        if asked.json not in (None, PRINTED):
            asked.json.write_text(raw(result) + "\n")
    return result


def believable(topic: Topic | Figures, rounds: int, again: int) -> Result:
    """What was measured the first time that it was not void, or the last; and what was void."""
    voided: list[Result] = []
    while True:
        found = topic.measure(rounds)
        if judge(found)[0] != VOID or len(voided) == again:
            return found | {"voided": voided}
        voided.append(found)


def raw(result: Result) -> str:
    """The JSON of a run: a line for each variant's rounds, so that a change of them can be seen."""
    text = json.dumps(result, indent=1)
    return re.sub(r"\[[\d,\s]+\]", lambda found: " ".join(found[0].split()), text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", nargs="?", choices=[*TOPICS, *FILES], help="default: every topic")
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        help="the JSON of runs; for plot: where",
    )
    parser.add_argument("--rounds", type=int, default=31, metavar="N")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=PRINTED,
        metavar="FILE",
        help="keep the raw rounds there; without FILE print them",
    )
    parser.add_argument("--cpu", type=int, metavar="N", help="default: the last one allowed")
    parser.add_argument("--policy", choices=POLICIES, default="batch", help="of the scheduler")
    parser.add_argument(
        "--unpinned", action="store_true", help="on all CPUs, under the default policy"
    )
    asked = parser.parse_args()
    takes = {"table": 1, "plot": 2, "goals": max(1, len(asked.files))}.get(asked.what, 0)
    if len(asked.files) != takes:
        parser.error(f"{asked.what or 'a run'} takes {FILES.get(asked.what, 'no file')}")
    if asked.rounds < 2:
        parser.error("a spread takes two rounds at least")
    if asked.unpinned and asked.cpu is not None:
        parser.error("--unpinned leaves no CPU to choose")
    if asked.unpinned:
        asked.policy = "other"
    return asked


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
