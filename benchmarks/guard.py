"""python -m benchmarks.guard: what one cycle (borrow + return) costs, in numbers that repeat.

    calls           system calls of the broker and of the client, by name (strace)
    instructions    in user space, of both and of BASE (valgrind's callgrind)
    kept            bytes that each keeps of a cycle (tracemalloc)

The result is compared with ``guard.json``, and the exit status is 1 if a cost has changed; then
``--write`` records the new one.  ``--package DIR`` measures the fdbroker package of another
checkout and only prints its costs.

A process is run with few cycles and with many, and the cost is the difference divided by the number
of additional cycles: what its start and its end cost cancels out.  The process that is counted is
20 to 100 times slower than normal, and the other one is not, so the client is always ahead of the
broker: the broker finds the next request behind each return, as it does with a busy client.

Instructions may differ by `TOLERANCE`.  They depend a little on the processor, on the number of
digits in the time since boot, and on addresses (CPython's method cache is indexed by them).  The
last is kept out: address randomisation is off, and a copy of the package is measured, in a folder
whose name always has the same length.

System calls depend on the kernel, instructions and bytes on the build of Python.  What guard.json
has no numbers for is not compared, and the output says so.  BASE is the control: it is this
folder's code alone, so where its count differs, it is the build that differs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from compileall import compile_dir
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Result, checkout, patience

FILE = Path(__file__).with_name("guard.json")
FEW, MANY = 300, 2300  # cycles
TOLERANCE = 0.01  # of a number of instructions
ATTEMPTS = 3  # a machine that is busy elsewhere can hold up the client, which costs the broker more
PYTHON = [os.path.realpath(sys.executable), "-S"]  # without the site-packages of an environment
ENVIRONMENT = {"PATH": os.defpath, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
FIXED_ADDRESSES = ["setarch", "-R"]
STRACE = [*FIXED_ADDRESSES, "strace", "-f", "-qq", "-c", "-U", "calls,name", "-o"]
CALLGRIND = [*FIXED_ADDRESSES, "valgrind", "-q", "--tool=callgrind"]
PROGRAMS = "setarch", "strace", "valgrind"
BASE_FILES = "__init__.py", "base.py", "harness.py"
SO_PASSRIGHTS = 83  # Linux 6.16

CLIENT = """\
import sys
from fdbroker import Client
with Client(sys.argv[1]) as client:
    for _ in range(int(sys.argv[2])):
        client.borrow("x").close()
"""
BASE_CLIENT = """\
import sys
from benchmarks.base import base
with base(sys.argv[2:]) as run:
    run(int(sys.argv[1]))
"""
BROKER_THAT_TELLS = """\
import os, runpy, threading, tracemalloc
out = os.dup(1)  # the broker closes 1 when it has said that it is ready
def tell():
    while os.read(0, 1):
        os.write(out, b"%d\\n" % tracemalloc.get_traced_memory()[0])
threading.Thread(target=tell, daemon=True).start()
tracemalloc.start()
runpy.run_module("fdbroker", run_name="__main__")
"""
CLIENT_THAT_TELLS = """\
import sys, tracemalloc
from fdbroker import Client
with Client(sys.argv[1]) as client:
    tracemalloc.start()
    for cycles in sys.argv[2:]:
        for _ in range(int(cycles)):
            client.borrow("x").close()
        print(tracemalloc.get_traced_memory()[0])
"""
Numbers = dict[str, int]


# --- what runs -------------------------------------------------------------------------------


@contextmanager
def copy_of(package: Path) -> Iterator[Path]:
    """A folder with a copy of this package and of all that it and BASE need, compiled."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        code = Path(folder, "code")
        ignore = shutil.ignore_patterns("*.pyc")
        shutil.copytree(package / "fdbroker", code / "fdbroker", ignore=ignore)
        shutil.copytree(str(files("msgpack")), code / "msgpack", ignore=ignore)
        (code / "benchmarks").mkdir()
        for name in BASE_FILES:
            shutil.copy(Path(__file__).with_name(name), code / "benchmarks")
        compile_dir(code, quiet=1)
        yield code


def run(code: Path, command: Sequence[str]) -> str:
    """Run it to its end; the result is its standard output."""
    return subprocess.check_output(command, cwd=code, env=ENVIRONMENT, text=True, timeout=60)


@contextmanager
def broker(
    code: Path, prefix: Sequence[str] = (), start: Sequence[str] = ("-m", "fdbroker")
) -> Iterator[subprocess.Popen[str]]:
    """A broker that lends "x" at `socket` in that folder, run by the command `prefix`."""
    serve = ["serve", "--socket", "socket", "--memfd", "x=4096", "--ready-fd", "1"]
    command = [*prefix, *PYTHON, *start, *serve]
    options: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with patience(), subprocess.Popen(command, cwd=code, env=ENVIRONMENT, **options) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError(f"{' '.join(command)} did not start")
            yield process
        finally:
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended already
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
                # strace runs the broker as its child; setarch and valgrind become the broker
                os.kill(int(children or process.pid), signal.SIGTERM)
            process.wait()


def client(cycles: int) -> list[str]:
    return [*PYTHON, "-c", CLIENT, "socket", str(cycles)]


# --- what is counted -------------------------------------------------------------------------


def cost(count: Callable[[int], int]) -> int:
    """What one cycle costs, where `count` says what so many and a start cost."""
    few, many = count(FEW), count(MANY)
    return round((many - few) / (MANY - FEW))


def instructions(code: Path) -> Numbers:
    found = code / "callgrind"
    callgrind = [*CALLGRIND, f"--callgrind-out-file={found}"]

    def total() -> int:
        return int(re.findall(r"^(?:summary|totals): (\d+)", found.read_text(), re.M)[-1])

    def of_broker(cycles: int) -> int:
        with broker(code, callgrind):
            run(code, client(cycles))
        return total()

    def of_client(cycles: int) -> int:
        with broker(code):
            run(code, [*callgrind, *client(cycles)])
        return total()

    def of_base_server(cycles: int) -> int:
        run(code, [*PYTHON, "-c", BASE_CLIENT, str(cycles), *callgrind])
        return total()

    def of_base_client(cycles: int) -> int:
        run(code, [*callgrind, *PYTHON, "-c", BASE_CLIENT, str(cycles)])
        return total()

    return {
        "broker": cost(of_broker),
        "client": cost(of_client),
        "BASE": cost(of_base_server) + cost(of_base_client),
    }


def calls(code: Path) -> dict[str, Numbers]:
    found = code / "strace"

    def by_name() -> Numbers:
        rows = re.findall(r"^\s*(\d+)\s+(\w+)$", found.read_text(), re.M)
        return {name: int(count) for count, name in rows if name != "total"}

    def of_broker(cycles: int) -> Numbers:
        with broker(code, [*STRACE, str(found)]):
            run(code, client(cycles))
        return by_name()

    def of_client(cycles: int) -> Numbers:
        with broker(code):
            run(code, [*STRACE, str(found), *client(cycles)])
        return by_name()

    def costs(count: Callable[[int], Numbers]) -> Numbers:
        few, many = count(FEW), count(MANY)
        each = {
            name: round((many[name] - few.get(name, 0)) / (MANY - FEW)) for name in sorted(many)
        }
        return {name: calls for name, calls in each.items() if calls}

    return {"broker": costs(of_broker), "client": costs(of_client)}


def kept(code: Path) -> Numbers:
    """Bytes per cycle that are still allocated after many more cycles."""
    with broker(code, start=["-c", BROKER_THAT_TELLS]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        told = []
        for cycles in (MANY, MANY):
            run(code, client(cycles))
            process.stdin.write("?")
            process.stdin.flush()
            told.append(int(process.stdout.readline()))
    with broker(code):
        command = [*PYTHON, "-c", CLIENT_THAT_TELLS, "socket", str(MANY), str(MANY)]
        told_by_client = [int(line) for line in run(code, command).split()]
    return {
        name: round((after - before) / MANY)
        for name, (before, after) in {"broker": told, "client": told_by_client}.items()
    }


# --- what it is compared with ----------------------------------------------------------------


def measure(package: Path) -> Result:
    with copy_of(package) as code:
        here = {"instructions": instructions(code), "kept": kept(code)}
        return {"calls": {kernel(): calls(code)}, "builds": {build(): here}}


def kernel() -> str:
    """What the system calls depend on: a socket that cannot refuse descriptors is received from in
    another way."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        try:
            ours.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        except OSError:
            return "cannot refuse descriptors"
        return "refuses descriptors"


def build() -> str:
    """What instructions and bytes depend on."""
    _, when = platform.python_build()
    return ", ".join(
        (
            f"{platform.python_implementation()} {platform.python_version()} of {when}",
            str(os.confstr("CS_GNU_LIBC_VERSION")),
            f"msgpack {version('msgpack')}",
            platform.machine(),
            kernel(),
        )
    )


def differences(known: Result, found: Result) -> list[str]:
    """One line for each cost that has changed.  What cannot be compared is printed."""
    lines = []
    for kernel, calls in found["calls"].items():
        if kernel not in known["calls"]:
            print(f"not compared: system calls, {FILE.name} has none of a kernel that {kernel}")
            continue
        lines += changes("system calls", known["calls"][kernel], calls, 0)
    for build, costs in found["builds"].items():
        before = known["builds"].get(build, {"instructions": {"BASE": 0}})
        base, now = before["instructions"]["BASE"], costs["instructions"]["BASE"]
        if not close(base, now, TOLERANCE):
            print(f"not compared: instructions and bytes, {FILE.name} has none of {build}", end="")
            print(f" where BASE takes {now}" if base else "")
            continue
        lines += changes("instructions", before["instructions"], costs["instructions"], TOLERANCE)
        lines += changes("bytes kept", before["kept"], costs["kept"], 0)
    return lines


def changes(what: str, before: Result, now: Result, tolerance: float) -> list[str]:
    return [
        f"{what} of the {name}: {before[name]} became {now[name]}"
        for name in now
        if not close(before[name], now[name], tolerance)
    ]


def close(before: object, now: object, tolerance: float) -> bool:
    if isinstance(before, int) and isinstance(now, int):
        return abs(now - before) <= tolerance * before
    return before == now


def table(found: Result) -> str:
    (calls,), (costs,) = found["calls"].values(), found["builds"].values()
    of = costs["instructions"]
    lines = [build(), f"instructions: broker {of['broker']:,}, client {of['client']:,}, "]
    lines[-1] += f"both {of['broker'] + of['client']:,}; BASE {of['BASE']:,}"
    for name, counts in calls.items():
        by_name = ", ".join(f"{call} {count}" for call, count in counts.items())
        lines.append(f"system calls of the {name}: {sum(counts.values())} ({by_name})")
    lines.append(f"bytes kept: broker {costs['kept']['broker']}, client {costs['kept']['client']}")
    return "\n".join(lines)


def missing() -> str:
    """What has to be there to count anything, and is not."""
    without = [program for program in PROGRAMS if shutil.which(program, path=os.defpath) is None]
    if not without and subprocess.run([*FIXED_ADDRESSES, "true"], check=False).returncode:
        without = ["the right to fix addresses (personality(2))"]
    return " and ".join(without)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help=f"record the costs in {FILE.name}")
    action.add_argument("--package", metavar="DIR", type=checkout, help="only print those of DIR")
    asked = parser.parse_args()
    if without := missing():
        print(f"not compared: anything; {without} is missing")
        return int(asked.write or asked.package is not None)
    if asked.package is not None:
        print(table(measure(asked.package)))
        return 0
    known = json.loads(FILE.read_text())
    for _ in range(ATTEMPTS):
        found = measure(ROOT)
        print(table(found))
        if asked.write:
            found = {kind: known[kind] | found[kind] for kind in found}
            FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
            return 0
        lines = differences(known, found)
        if not lines:
            return 0
    for line in lines:
        print(line, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
