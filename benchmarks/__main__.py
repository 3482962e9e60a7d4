"""python -m benchmarks [TOPIC] [--rounds N] [--json FILE]: measures, keeps the rounds, prints them.

`python -m benchmarks table FILE` prints the table of an earlier run.  The exit status is 1 if the
run is void.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import cycle, rc, startup
from benchmarks.harness import POLICIES, Result, machine, measure, place
from benchmarks.table import VOID, judge, table

TOPICS = {topic.name: topic for topic in (cycle.TOPIC, rc.TOPIC, startup.TOPIC)}


def main() -> int:
    asked = arguments()
    if asked.what == "table":
        result: Result = json.loads(asked.file.read_text())
    else:
        chosen = [TOPICS[asked.what]] if asked.what else TOPICS.values()
        cpu = place(asked.cpu, asked.policy)
        result = {"machine": machine(cpu, asked.policy), "rounds": asked.rounds, "topics": {}}
        for topic in chosen:
            result["topics"][topic.name] = measure(topic, asked.rounds)
        if asked.json:
            asked.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    void = any(judge(topic)[0] == VOID for topic in result["topics"].values())
    return 1 if void else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("what", nargs="?", choices=[*TOPICS, "table"], help="default: every topic")
    parser.add_argument("file", nargs="?", type=Path, help="for table: the JSON of an earlier run")
    parser.add_argument("--rounds", type=int, default=31, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to keep the raw rounds")
    parser.add_argument("--cpu", type=int, metavar="N", help="default: the last one allowed")
    parser.add_argument("--policy", choices=POLICIES, default="batch", help="of the scheduler")
    asked = parser.parse_args()
    if (asked.what == "table") != (asked.file is not None):
        parser.error("table, and nothing else, takes a FILE")
    if asked.rounds < 2:
        parser.error("a spread takes two rounds at least")
    return asked


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
