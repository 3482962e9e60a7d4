"""Fuzz the broker's receive path: ``python -m tests.fuzz --seconds 60``.

The corpus is played first, then what atheris makes of it; without atheris, what chance makes of it.
What is found is written to a file ``crash-...`` in this folder and told, with status 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
LONGEST = 4096  # bytes of an input
# an input that takes longer hangs; a process that is larger leaks
BOUNDS = (f"-max_len={LONGEST}", "-timeout=120", "-rss_limit_mb=1024", "-print_final_stats=1")


def main() -> int:
    """Do what is asked for; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=0, help="for so long (0: see --runs)")
    parser.add_argument("--runs", type=int, default=10_000, help="so many inputs at most")
    parser.add_argument("--seed", type=int, default=1, help="of chance")
    parser.add_argument("--into", metavar="DIR", help="keep there what reaches new code")
    parser.add_argument("--replay", metavar="FILE", help="play one input")
    parser.add_argument(
        "--seeds", action="store_true", help="write the part of the corpus that is made by hand"
    )
    options = parser.parse_args()
    if options.seeds:
        return write_seeds()
    if options.replay:
        return replay(Path(options.replay))
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not here (pip install atheris): bytes are mutated by chance alone")
        return by_chance(options.seconds, options.runs, options.seed)
    runs = -1 if options.seconds else options.runs
    with tempfile.TemporaryDirectory(prefix="fdbroker-fuzz-") as folder:
        os.chmod(folder, 0o711)  # other uids get to the socket in it
        kept = Path(options.into or os.path.join(folder, "new")).resolve()
        kept.mkdir(parents=True, exist_ok=True)
        corpus = TESTS / "fuzz" / "corpus"
        command = [sys.executable, "-m", "fuzz.guided", str(kept), str(corpus), *BOUNDS]
        command += [f"-runs={runs}", f"-max_total_time={options.seconds}", f"-seed={options.seed}"]
        command.append(f"-artifact_prefix={os.getcwd()}/")
        # what its end leaves behind in the temporary folder goes with it
        environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "TMPDIR": folder}
        return 1 if subprocess.run(command, cwd=TESTS.parent, env=environment).returncode else 0


def write_seeds() -> int:
    from fuzz import bounded, seeds, steps

    for name, it in seeds.seeds():
        (bounded.CORPUS / name).write_bytes(steps.encode(it))
    return 0


def replay(path: Path) -> int:
    from fuzz import bounded, steps

    it = steps.decode(path.read_bytes())
    for step in it.steps:
        print(step)
    with bounded.player() as play:
        play(it)
    return 0


def by_chance(seconds: int, runs: int, seed: int) -> int:
    """Play the corpus, and then what comes of it by changes at random places."""
    from fuzz import bounded, steps

    chance = random.Random(seed)
    kept = [path.read_bytes() for path in sorted(bounded.CORPUS.iterdir())]
    deadline = time.monotonic() + seconds
    with bounded.player() as play:
        number = 0
        while time.monotonic() < deadline if seconds else number < runs:
            data = kept[number] if number < len(kept) else mutated(chance, kept)
            number += 1
            try:
                play(steps.decode(data))
            except Exception:
                Path(f"crash-{number}").write_bytes(data)
                print(f"found by input {number}, which is in crash-{number}")
                raise
    print(f"{number} inputs, nothing found")
    return 0


def mutated(chance: random.Random, kept: list[bytes]) -> bytes:
    """Two inputs joined somewhere, and some bytes of them changed."""
    one, other = chance.choices(kept, k=2)
    data = bytearray(one[: chance.randint(0, len(one))] + other[chance.randint(0, len(other)) :])
    for _ in range(chance.randint(0, 8)):
        place = chance.randint(0, len(data))
        data[place : place + chance.randint(0, 2)] = chance.randbytes(chance.randint(0, 2))
    return bytes(data[:LONGEST])


if __name__ == "__main__":
    sys.exit(main())
