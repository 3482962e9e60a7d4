"""python -m benchmarks [TOPIC] [--rounds N] [--json FILE]: measures, keeps the rounds, prints them.

`python -m benchmarks table FILE` prints the table of an earlier run, and `plot FILE FOLDER` draws
it.  The exit status is 1 if the run is void.
"""

from __future__ import annotations

import argparse
import json
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
from benchmarks.harness import POLICIES, Result, machine, place
from benchmarks.plot import plot
from benchmarks.table import VOID, judge, table

MODULES = cycle, layers, sessions, names, clients, pool, peers, rc, startup, scale, memory
TOPICS = {module.TOPIC.name: module.TOPIC for module in MODULES}
FILES = {"table": ["FILE"], "plot": ["FILE", "FOLDER"]}  # that these take


def main() -> int:
    asked = arguments()
    if asked.what in FILES:
        result: Result = json.loads(asked.files[0].read_text())
    else:
        result = run(asked)
    if asked.what == "plot":
        for file in plot(result, asked.files[1]):
            print(file)
        return 0
    print(table(result))
    void = any(judge(topic)[0] == VOID for topic in result["topics"].values())
    return 1 if void else 0


def run(asked: argparse.Namespace) -> Result:
    """Measure; each topic is kept as soon as it is done."""
    cpu = None if asked.unpinned else place(asked.cpu, asked.policy)
    result = {"machine": machine(cpu, asked.policy), "rounds": asked.rounds, "topics": {}}
    for topic in [TOPICS[asked.what]] if asked.what else TOPICS.values():
        result["topics"][topic.name] = topic.measure(asked.rounds)
        if asked.json:
            asked.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", nargs="?", choices=[*TOPICS, *FILES], help="default: every topic")
    parser.add_argument(
        "files", nargs="*", type=Path, help="for table and plot: the JSON of a run; for plot: where"
    )
    parser.add_argument("--rounds", type=int, default=31, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to keep the raw rounds")
    parser.add_argument("--cpu", type=int, metavar="N", help="default: the last one allowed")
    parser.add_argument("--policy", choices=POLICIES, default="batch", help="of the scheduler")
    parser.add_argument(
        "--unpinned", action="store_true", help="on all CPUs, under the default policy"
    )
    asked = parser.parse_args()
    if len(asked.files) != len(wanted := FILES.get(asked.what, [])):
        parser.error(f"{asked.what or 'a run'} takes {' and '.join(wanted) or 'no file'}")
    if asked.rounds < 2:
        parser.error("a spread takes two rounds at least")
    if asked.unpinned:
        asked.policy = "other"
    return asked


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
