"""python -m tests.mutation: make one mistake after the other, and see whether a test notices.

    python -m tests.mutation [--jobs N] [--keep-kills] [--sample N [--seed S]] [PATH ...]

Each mutant (mutants.py says what is changed) of fdbroker/rc.py and fdbroker/lender/*.py, or of the
PATHs, meets the tests of tests/rc and tests/lender that run its line, the fastest first.  It is
killed if one fails or does not end.  Survivors are compared with survivors.toml, which says of each
why nobody can notice it.  Exit status 1: a survivor is not explained there, an explanation fits no
survivor, or of some file less than 90 % are killed.

What was found is kept in .mutation/ and taken from there as long as neither the package nor its
tests change, so a run that was stopped goes on where it was.  With --keep-kills what was killed
counts as killed also after the *tests* have changed: for who is about to write the missing ones.

Why not one of the libraries: mutmut 3 reaches its mutants through functions that it adds to the
module, so it has none of constants, tables and properties, and tests that look at opcodes, load
rc.py under another name or count what it imports see those functions instead of the mistake.
cosmic-ray changes the tree that one works in, leaves out no statement, and runs the whole suite for
each of 2,694 mutants: eleven hours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from time import monotonic, sleep

from .children import Child, ended, in_child, run_pytest, wait
from .choosing import Found, Recorder, Stopwatch, tests_of
from .mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".mutation"
LEAST = 90  # percent of the mutants of each file
# These look at the *text* of rc.py: any change of it can make their patches fail to apply.
NOT_THESE = "test_a_mistake_is_caught"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    sources = {file: (ROOT / file).read_bytes() for file in options.path}
    todo = [one for file, source in sources.items() for one in mutants(file, source)]
    if options.sample:
        chosen = random.Random(options.seed).sample(range(len(todo)), options.sample)
        todo = [todo[number] for number in sorted(chosen)]
    KEPT.mkdir(exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell ignores it
    try:
        results = find(todo, sources, options)
    except KeyboardInterrupt:
        print("\nstopped; the next run goes on from here", file=sys.stderr)
        return 130
    explained = explanations(ROOT / "tests/mutation/survivors.toml")
    return report(todo, results, explained, whole=not options.sample)


def find(
    todo: list[Mutant], sources: dict[str, bytes], options: argparse.Namespace
) -> dict[str, str]:
    """How each of them ends, by its identity."""
    with tempfile.TemporaryDirectory(prefix="fdbroker-mutation-") as folder:
        places = [copied(Path(folder) / str(job)) for job in range(options.jobs)]
        found = choose(places[0], options)
        results = dict(kept(found, options.keep_kills))
        left = [one for one in todo if identity(one) not in results]
        if len(left) < len(todo):
            print(f"{len(todo) - len(left)} of {len(todo)} mutants are known from before")
        for mutant, how, test in run(left, found, sources, places):
            results[identity(mutant)] = how
            keep(found, mutant, how, test)
    return results


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    text, _, _ = (__doc__ or "").partition("Why not")
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutation",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--keep-kills", action="store_true")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="only so many mutants")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="which ones")
    parser.add_argument("--tests", nargs="+", default=["tests/rc", "tests/lender"], metavar="PATH")
    parser.add_argument("path", nargs="*", metavar="PATH")
    options = parser.parse_args(arguments)
    paths = [Path(path).resolve() for path in options.path]
    paths = paths or [ROOT / "fdbroker/rc.py", *sorted((ROOT / "fdbroker/lender").glob("*.py"))]
    options.path = [str(path.relative_to(ROOT)) for path in paths]
    return options


def copied(folder: Path) -> Path:
    """A copy of the package and its tests, for one mutant at a time."""
    unwanted = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for part in ("fdbroker", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def choose(folder: Path, options: argparse.Namespace) -> Found:
    """One run of all tests, as the code is: they must pass, and tell their lines."""
    shared = (ROOT / "tests").glob("*.py")
    package = digest([ROOT / "fdbroker"])
    tests = digest([*(ROOT / path for path in options.tests), *shared])
    file = KEPT / "lines.json"
    fingerprint = [package, tests, options.tests, options.path]
    if file.exists():
        found: Found = json.loads(file.read_text())
        if found["fingerprint"] == fingerprint:
            return found
    print("running all tests twice, to see how long they take and which lines they run", flush=True)
    where = ["-k", f"not {NOT_THESE}", *options.tests]

    def timed() -> int:
        watch = Stopwatch()
        status = run_pytest(folder, ["-x", *where], [watch], folder / "log")
        (folder / "seconds.json").write_text(json.dumps(watch.seconds))
        return status

    def traced() -> int:
        recorder = Recorder(folder, options.path)
        run_pytest(folder, where, [recorder], folder / "log")
        (folder / "lines.json").write_text(json.dumps(recorder.found()))
        return 0

    if wait(in_child(timed)) != 0:
        raise SystemExit((folder / "log").read_text() + "\nthe tests fail as the code is")
    if wait(in_child(traced)) != 0:
        raise SystemExit((folder / "log").read_text() + "\nno lines are known")
    found = json.loads((folder / "lines.json").read_text())
    found["seconds"] = json.loads((folder / "seconds.json").read_text())
    assert set(found["seconds"]) == {
        test for file in found["lines"].values() for tests in file.values() for test in tests
    } | set(found["silent"]), "a test was not traced"
    found["fingerprint"] = fingerprint
    file.write_text(json.dumps(found))
    return found


def digest(paths: Iterable[Path]) -> str:
    files = {file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))}
    digest = hashlib.sha256(sys.version.encode())
    for file in sorted(files):
        digest.update(f"{file.relative_to(ROOT)} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def identity(mutant: Mutant) -> str:
    return f"{mutant.file}:{mutant.start}:{mutant.end}:{mutant.text}"


def kept(found: Found, keep_kills: bool) -> Iterator[tuple[str, str]]:
    """What earlier runs found and still holds."""
    package, tests = found["fingerprint"][:2]
    file = KEPT / "results.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        one = json.loads(line)
        same = one["tests"] == tests or (keep_kills and one["how"] != "survived")
        if one["package"] == package and same:
            yield one["mutant"], one["how"]


def keep(found: Found, mutant: Mutant, how: str, test: str) -> None:
    package, tests = found["fingerprint"][:2]
    one = {"mutant": identity(mutant), "how": how, "test": test, "key": mutant.key}
    with open(KEPT / "results.jsonl", "a") as file:
        file.write(json.dumps({**one, "package": package, "tests": tests}) + "\n")


def run(
    left: list[Mutant], found: Found, sources: dict[str, bytes], places: list[Path]
) -> Iterator[tuple[Mutant, str, str]]:
    """Each mutant with "killed", "endless" or "survived", and the test that it was."""
    waiting, began, done = iter(left), monotonic(), 0
    running: dict[Path, Child] = {}
    mutant_at: dict[Path, tuple[Mutant, list[str]]] = {}
    with ended(running):
        while done < len(left):
            for place in places:
                if place in running or (mutant := next(waiting, None)) is None:
                    continue
                tests = tests_of(found, mutant.file, mutant.lines)
                if not tests:
                    done += 1
                    progress(done, len(left), monotonic() - began, mutant, "survived")
                    yield mutant, "survived", "no test runs it"
                    continue
                write(place / mutant.file, mutant.apply(sources[mutant.file]))
                mutant_at[place] = mutant, tests
                seconds = [found["seconds"][test] for test in tests]
                running[place] = Child(place, tests, seconds)
            sleep(0.01)
            for place, child in list(running.items()):
                if (result := child.poll()) is None:
                    continue
                del running[place]
                mutant, tests = mutant_at[place]
                write(place / mutant.file, sources[mutant.file])
                done += 1
                how = {"passed": "survived", "failed": "killed"}.get(result.how, result.how)
                progress(done, len(left), monotonic() - began, mutant, how)
                yield mutant, how, ["(import)", *tests][result.test]


_writes = 0


def write(file: Path, source: bytes) -> None:
    """Write a module so that no bytecode of another version of it is taken for its own."""
    global _writes
    _writes += 1
    file.write_bytes(source)
    os.utime(file, (_writes, _writes))


def progress(done: int, count: int, seconds: float, mutant: Mutant, how: str) -> None:
    line = f"{done} of {count}, {seconds:.0f} s"
    if sys.stdout.isatty():
        print(f"\r\33[K{line}", end="", flush=True)
    elif done % 50 == 0 or done == count:
        print(line, flush=True)
    if how == "survived":
        clear = "\r\33[K" if sys.stdout.isatty() else ""
        print(f"{clear}survives: {mutant.file}: {mutant.key}", flush=True)


def explanations(file: Path) -> set[tuple[str, str]]:
    """(file, key) of all that survivors.toml explains."""
    found = set()
    for one in tomllib.loads(file.read_text()).get("survivors", []):
        assert one["why"].strip(), one
        found |= {(one["file"], key) for key in one["mutants"]}
    return found


def report(
    todo: list[Mutant], results: dict[str, str], explained: set[tuple[str, str]], whole: bool
) -> int:
    wrong: list[str] = []
    survivors = {(one.file, one.key) for one in todo if results[identity(one)] == "survived"}
    print(f"\n{'file':32}{'mutants':>8}{'killed':>8}{'(endless)':>10}{'survived':>10}{'':>8}")
    files = list(dict.fromkeys(one.file for one in todo))
    for file in [*files, ""]:
        hows = Counter(results[identity(one)] for one in todo if file in ("", one.file))
        killed, count = hows["killed"] + hows["endless"], hows.total()
        figures = f"{count:8}{killed:8}{hows['endless']:10}{hows['survived']:10}"
        print(f"{file or 'in all':32}{figures}{100 * killed / count:7.1f}%")
        if file and whole and 100 * killed < LEAST * count:
            wrong.append(f"{file}: less than {LEAST} % killed")
    wrong += [f"survives: {file}: {key}" for file, key in sorted(survivors - explained)]
    if whole:
        gone = {one for one in explained - survivors if one[0] in files}
        wrong += [f"explained, but survives no more: {file}: {key}" for file, key in sorted(gone)]
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # what a set begins with is the same in every run
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.mutation", *sys.argv[1:]])
    raise SystemExit(main())
