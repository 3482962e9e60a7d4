"""python -m tests.chaos [--seconds N] [--seed S] | --seed S --plan FILE | --replay FILE

The exit status is 1 if anything was wrong; what was, and how to do it again, is printed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `support` is


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--seconds", type=float, default=60.0, help="default: 60")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plan", type=Path, metavar="FILE", help="write the plan, do nothing")
    parser.add_argument("--record", metavar="FILE", help="keep the recording there")
    parser.add_argument("--replay", metavar="FILE", help="feed a recording into a fresh lender")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds; default: 30")
    parser.add_argument("--planted", default="-", metavar="NAME", help="a mistake of planted.py")
    asked = parser.parse_args()
    if asked.plan is not None:
        from .plan import fingerprint, text

        asked.plan.write_text(text(asked.seed))
        print(f"seed {asked.seed}, plan {fingerprint(asked.seed)}: {asked.plan}")
        return 0
    if asked.replay is not None:
        return again(asked.replay)
    from .run import Run, interrupted

    interrupted()
    how = {"patience": asked.patience, "planted": asked.planted, "keep": asked.record}
    return 0 if Run(asked.seconds, asked.seed, **how).run() else 1


def again(path: str) -> int:
    from .replay import Different, replay

    try:
        same = replay(path)
    except Different as error:
        print(f"not the same: {error}")
        return 1
    end = "" if same.whole else "; it was cut off there"
    print(f"{same.events:,} events, {same.digests} digests: the same{end}; {same.digest.hex()}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
