"""python -m benchmarks.guard [--write]: what a cycle costs, in numbers that do not vary.

Times vary with the machine.  These do not, so whoever changes what a cycle costs changes
``guard.json`` too, with ``--write``; else this says what differs, and its exit status is 1.

    calls           system calls of the broker and of the client, by name (strace)
    instructions    that they take beside those (valgrind's callgrind)
    bytes           that they take at the most, and keep (tracemalloc)

A run with more cycles is compared with one that has fewer, so a start costs nothing; the broker's,
which is never twice the same, is not in its instructions at all.  It is asked by hand, and has
slept before each request, or it would be left to chance what it finds when it looks for the next
one.  Calls are those of one kind of kernel, instructions and bytes those of one build of Python and
of what it runs on: where the file does not know these, they are left out aloud.

CPython's cache of methods goes by addresses, and what is where in memory by the length of paths
and of the environment.  So both are always as long: a copy of the package is measured (`copy`).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from compileall import compile_dir
from contextlib import contextmanager, suppress
from fcntl import ioctl
from importlib.metadata import version
from importlib.resources import files
from itertools import count
from pathlib import Path

from benchmarks.base import lent_file
from benchmarks.crowd import sessions
from benchmarks.harness import Result, field, patience
from fdbroker import Client
from fdbroker.descriptors import Kind
from fdbroker.ipc.protocol.messages import (
    BORROW,
    HEAD,
    HELLO,
    REPLY_BYTES,
    RETURN,
    STATS,
    VERSION,
    encode,
    template,
)
from fdbroker.ipc.server.server import Server
from fdbroker.ipc.transport.unix_listener import Listener
from fdbroker.ipc.transport.unix import INT, SIOCOUTQ, refuse_descriptors
from fdbroker.lender import Ledger, Lender
from fdbroker.rc import FD

FILE = Path(__file__).with_name("guard.json")
FEW, MANY = 100, 600  # cycles
WARM = 300  # the seq is above CPython's small numbers then
PYTHON = [os.path.realpath(sys.executable), "-S"]  # no environment that was made for it
ENVIRONMENT = {"PATH": os.defpath, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
STRACE = ["strace", "-f", "-qq", "-c", "-U", "calls,name", "-o"]
CALLGRIND = ["valgrind", "-q", "--tool=callgrind"]
EPOLL_WAIT = {"x86_64": 232}.get(os.uname().machine, -1)
PROGRAMS = "setarch", "strace", "valgrind"
CLIENT = """\
import sys
from fdbroker import Client
with Client(sys.argv[1]) as client:
    for _ in range(int(sys.argv[2])):
        client.borrow("x").close()
"""
MARK = "opendir"  # a function that only `stats` calls, of all that is asked here
ROOM = 16, 16, 16  # of the ledger
Numbers = dict[str, int]
Step = Callable[[], object]


# --- who is measured -------------------------------------------------------------------------


@contextmanager
def copy() -> Iterator[str]:
    """A folder, whose name is as long as every other time, with all that is measured in `code`."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        for name in "fdbroker", "msgpack":
            code = f"{folder}/code/{name}"
            shutil.copytree(str(files(name)), code, ignore=shutil.ignore_patterns("*.pyc"))
        compile_dir(f"{folder}/code", quiet=1)
        yield folder


def broker(address: str) -> list[str]:
    serve = ["serve", "--socket", address, "--memfd", "x=4096", "--ready-fd", "1"]
    return [*PYTHON, "-m", "fdbroker", *serve]


def ask(sock: socket.socket, pid: int, seq: int, cycles: int) -> int:
    """Borrow and return so often, by hand, beginning with that seq; before each request the broker
    sleeps.  The next seq."""
    head, tail = template(BORROW, "x", 0, None, "")
    return_head, _ = template(RETURN)
    for at in range(seq, seq + 2 * cycles, 2):
        wait_until_asleep(sock, pid)
        sock.send(HEAD.pack(head, at) + tail)
        _, [number], _, _ = socket.recv_fds(sock, 100, 1)
        os.close(number)
        wait_until_asleep(sock, pid)
        sock.send(HEAD.pack(return_head, at + 1))
    wait_until_asleep(sock, pid)
    return seq + 2 * cycles


def wait_until_asleep(sock: socket.socket, pid: int) -> None:
    """Until the broker has received all that was sent, and waits for more (proc_pid_syscall(5))."""
    unread = bytearray(INT.size)
    while ioctl(sock.fileno(), SIOCOUTQ, unread) or any(unread):
        pass
    while not asleep(pid):
        pass


def asleep(pid: int) -> bool:
    number = Path(f"/proc/{pid}/syscall").read_text().split()[0]
    return number == str(EPOLL_WAIT)


# --- under what ------------------------------------------------------------------------------


@contextmanager
def serving(folder: str, prefix: Sequence[str] = ()) -> Iterator[int]:
    """A broker of that copy, at `socket` in there, under what `prefix` says, and its own pid."""
    command = ["setarch", "-R", *prefix, *broker(f"{folder}/socket")]
    code = f"{folder}/code"
    process = subprocess.Popen(command, cwd=code, env=ENVIRONMENT, stdout=subprocess.PIPE)
    with process, patience():
        pid = process.pid
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError(f"{' '.join(command)} did not start")
            if prefix[:1] == ["strace"]:
                (pid,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            yield pid
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            process.wait()


def calls_of_broker(folder: str, cycles: int) -> Numbers:
    found = f"{folder}/found"
    with serving(folder, [*STRACE, found]) as pid:
        (sock,) = sessions(f"{folder}/socket", 1)
        with sock:
            ask(sock, pid, 1, cycles)
    return calls(found)


def instructions_of_broker(folder: str) -> int:
    """Of a cycle, when it has done some: callgrind writes down what it counted, and begins anew,
    where a MARK is called."""
    found = f"{folder}/found"
    prefix = [*CALLGRIND, f"--dump-before={MARK}", f"--callgrind-out-file={found}"]
    with serving(folder, prefix) as pid:
        (sock,) = sessions(f"{folder}/socket", 1)
        with sock:
            seq = 1
            for cycles in (WARM, FEW, MANY):
                seq = ask(sock, pid, seq, cycles)
                sock.send(encode([STATS, seq]))
                sock.recv(REPLY_BYTES)
                seq += 1
    parts = sorted(Path(folder).glob("found.*"), key=lambda path: int(path.suffix[1:]))
    few, many = map(instructions, parts[-2:])
    return per_cycle(few, many)


def calls_of_client(folder: str, cycles: int) -> Numbers:
    run_client(folder, [*STRACE, f"{folder}/found"], cycles)
    return calls(f"{folder}/found")


def instructions_of_client(folder: str) -> int:
    def all_of(cycles: int) -> int:
        run_client(folder, [*CALLGRIND, f"--callgrind-out-file={folder}/found"], cycles)
        return instructions(f"{folder}/found")

    return per_cycle(all_of(FEW), all_of(MANY))


def run_client(folder: str, prefix: list[str], cycles: int) -> None:
    with serving(folder):
        client = [*PYTHON, "-c", CLIENT, f"{folder}/socket", str(cycles)]
        subprocess.run(
            ["setarch", "-R", *prefix, *client], check=True, cwd=f"{folder}/code", env=ENVIRONMENT
        )


def calls(found: str) -> Numbers:
    """strace's, by name."""
    rows = re.findall(r"^\s*(\d+)\s+(\w+)$", Path(found).read_text(), re.M)
    return {name: int(count) for count, name in rows if name != "total"}


def instructions(found: str | Path) -> int:
    """callgrind's, altogether."""
    return int(re.findall(r"^(?:summary|totals): (\d+)", Path(found).read_text(), re.M)[-1])


def calls_per_cycle(take: Callable[[str, int], Numbers], folder: str) -> Numbers:
    few, many = take(folder, FEW), take(folder, MANY)
    costs = {name: per_cycle(few.get(name, 0), many[name]) for name in sorted(many)}
    return {name: cost for name, cost in costs.items() if cost}


def per_cycle(few: int, many: int) -> int:
    """What each cycle more costs, rounded: a broker's threads now and then cost one call more."""
    return round((many - few) / (MANY - FEW))


# --- memory, which only the process itself can be asked about ------------------------------------


def bytes_of_client(folder: str) -> Numbers:
    with serving(folder), Client(f"{folder}/socket") as client:
        return bytes_of([lambda: client.borrow("x").close()])


def bytes_of_broker() -> Numbers:
    """The loop is here, and run until it would sleep, after each thing that is sent to it."""

    class Asleep(Exception):
        pass

    class Awake:
        """The epoll of the loop, but that it does not sleep."""

        def __init__(self, epoll: select.epoll) -> None:
            self._epoll = epoll
            self.register, self.unregister = epoll.register, epoll.unregister
            self.modify, self.close = epoll.modify, epoll.close

        def poll(self, patience: float | None, events: int) -> list[tuple[int, int]]:
            happened = self._epoll.poll(0, events)
            if not happened and not server.workers.pending:
                raise Asleep
            return happened

    def serve() -> None:
        with suppress(Asleep):
            server.run()

    def connect(address: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(address)
        sock.send(encode([HELLO, 0, VERSION, False]))
        serve()
        sock.recv(100)
        return sock

    with tempfile.TemporaryDirectory() as folder, lent_file() as file:
        ledger = Ledger(bytearray(Ledger.size(*ROOM)), *ROOM)
        server = Server(Listener(f"{folder}/socket"), Lender(ledger))
        server._epoll = Awake(server._epoll)  # type: ignore[assignment]
        fd = FD(os.dup(file.fileno()))
        entry = server.lender.put(None, 0, "x", b"", fd, Kind.FILE, server.now, uid=os.geteuid())
        server.keep(entry, "file")
        with connect(f"{folder}/socket") as sock:
            head, tail = template(BORROW, "x", 0, None, "")
            return_head, _ = template(RETURN)
            seqs = count(1)

            def borrow() -> None:
                sock.send(HEAD.pack(head, next(seqs)) + tail)

            def give_back() -> None:
                _, [number], _, _ = socket.recv_fds(sock, 100, 1)
                os.close(number)
                sock.send(HEAD.pack(return_head, next(seqs)))

            found = bytes_of([serve, serve], [borrow, give_back])
        server.lender.start_retiring(entry, server.now)
        server.settle()
        serve()
        server.close()
        return found


def bytes_of(steps: Sequence[Step], first: Sequence[Step] = ()) -> Numbers:
    """What these take at the most, and keep each time, after they were taken often; `first` come
    before each of them, and do not count for the most."""
    before_each = first or [lambda: None] * len(steps)

    def take(times: int) -> int:
        most = 0
        for _ in range(times):
            for other, step in zip(before_each, steps, strict=True):
                other()
                tracemalloc.reset_peak()
                before, _ = tracemalloc.get_traced_memory()
                step()
                _, peak = tracemalloc.get_traced_memory()
                most = max(most, peak - before)
        return most

    gc.disable()
    take(WARM)
    tracemalloc.start()
    take(FEW)  # what the first ones meet was not traced when it came
    before, _ = tracemalloc.get_traced_memory()
    most = take(MANY)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    gc.enable()
    return {"at most": most, "kept": round((after - before) / MANY)}


# --- the file --------------------------------------------------------------------------------


def measure() -> Result:
    """Where, by kind, and whose."""
    calls: Result = {}
    mine: Result = {"instructions": {}, "bytes": {}}
    found = {"calls": {kernel(): calls}, "builds": {build(): mine}}
    with copy() as folder:
        calls["broker"] = calls_per_cycle(calls_of_broker, folder)
        calls["client"] = calls_per_cycle(calls_of_client, folder)
        mine["instructions"]["broker"] = instructions_of_broker(folder)
        mine["instructions"]["client"] = instructions_of_client(folder)
        mine["bytes"] = {"broker": bytes_of_broker(), "client": bytes_of_client(folder)}
    return found


def kernel() -> str:
    """What the broker's calls depend on: where descriptors cannot be refused, it must receive with
    more (`Connection.refuse_descriptors`)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        return "refuses descriptors" if refuse_descriptors(ours) else "cannot refuse descriptors"


def build() -> str:
    """What instructions and bytes depend on: Python, the C library and what that copies and
    compares by under valgrind, valgrind itself, the kernel."""
    _, when = platform.python_build()
    flags = field(Path("/proc/cpuinfo"), "flags").split()
    copies_by = next((one for one in ("avx2", "avx") if one in flags), "sse")
    valgrind = subprocess.check_output(["valgrind", "--version"], text=True).strip()
    return ", ".join(
        (
            f"{platform.python_implementation()} {platform.python_version()} of {when}",
            f"{os.confstr('CS_GNU_LIBC_VERSION')} {copies_by}",
            f"msgpack {version('msgpack')}",
            f"{valgrind}; {kernel()}",
        )
    )


def differences(known: Result, found: Result) -> list[str]:
    """One line for each."""
    lines = []
    for kind in "calls", "builds":
        for name, mine in found[kind].items():
            if name not in known[kind]:
                print(f"not compared: {kind}, as {FILE.name} does not know {name}")
                continue
            for what, numbers in mine.items():
                before = known[kind][name][what]
                if before != numbers:
                    lines.append(f"{what}, {kind}: {before} became {numbers}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard")
    parser.add_argument("--write", action="store_true", help=f"to {FILE.name}, for this Python")
    asked = parser.parse_args()
    without = [program for program in PROGRAMS if shutil.which(program, path=os.defpath) is None]
    if not without and subprocess.run(["setarch", "-R", "true"], check=False).returncode:
        without = ["the right to fix addresses (personality(2))"]
    if without or EPOLL_WAIT < 0:
        print(f"not compared: anything; {' and '.join(without) or 'x86-64'} is missing")
        return int(asked.write)
    known = json.loads(FILE.read_text())
    found = measure()
    if asked.write:
        found = {kind: known[kind] | found[kind] for kind in found}
        FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    lines = [] if asked.write else differences(known, found)
    print(json.dumps(found, indent=1))
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
