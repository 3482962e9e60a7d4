"""python -m benchmarks.hostile: what one good client sees of fifty hostile ones.

The broker and the good client are on one CPU, the hostile ones on another.  Measured is the
broker's **service time**: from the instant that the good client sends its borrow (its request is
readable then) to the instant that the broker's sendmsg with the answer has returned, which a hook
in the broker process notes; both read CLOCK_MONOTONIC.  The good client asks at irregular times,
and checks each answer.

    alone      nobody else is there
    attack     ten each: silent; stopped with requests unanswered; half a hello, again and again;
               253 descriptors that nobody asked for, again and again; a flood of borrows
    flood      the ten that flood, alone
    no quotas  the same as the broker's own uid, which is held to no quota and no turn

Needs root, since the two are different users.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fdbroker.ipc.protocol.codec import HEAD, encode, template
from fdbroker.ipc.protocol.messages import BORROW, RETURN

GOOD, HOSTILE, OWN = 60_001, 60_002, 0
BROKER_CPU, HOSTILE_CPU = 0, 1
EACH = 10
TIMES = 200_000  # of answers, that there is room for
LOOKUP = struct.Struct("Q")
CONFIG = f"""
[server]
mode = "0666"

[entry.a]
memfd = "4K"

[[rule]]
uid = {GOOD}
names = ["a"]
verbs = ["borrow"]

[[rule]]
uid = {HOSTILE}
verbs = ["borrow", "put", "list"]
"""


# --- the broker: the same program, with a hook -----------------------------------------------


def broker(folder: str) -> None:
    """Serve, and note when each answer to the good client was sent."""
    from fdbroker.daemon.serve import serve
    from fdbroker.ipc.server.sender import Sender

    os.sched_setaffinity(0, {BROKER_CPU})
    with open(f"{folder}/times", "r+b") as file:
        times = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
    send_grant, now = Sender.send_grant, time.monotonic_ns

    def noted(self, connection, *rest):
        outcome = send_grant(self, connection, *rest)
        if connection.peer.uid == GOOD:
            times[0] += 1
            times[times[0]] = now()
        return outcome

    Sender.send_grant = noted  # type: ignore[method-assign]
    serve(f"{folder}/socket", config_path=f"{folder}/fdbroker.toml", ready_fd=1)


# --- clients ---------------------------------------------------------------------------------


def connect(path: str, puts: bool = False) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(path)
    sock.send(encode([0, 0, 1, puts]))
    answer = sock.recv(1000)
    if answer[1]:
        sock.close()
        raise ConnectionError(answer)
    return sock


def good(path: str, rounds: int, seed: int) -> list[int]:
    """Borrow and return so often: when each borrow was sent."""
    pause = random.Random(seed)
    head, tail = template(BORROW, "a", 0, None, "")
    return_head, _ = template(RETURN)
    sent = []
    with connect(path) as sock:
        for seq in range(1, 2 * rounds, 2):
            time.sleep(pause.uniform(0.0002, 0.003))
            request = HEAD.pack(head, seq) + tail
            sent.append(time.monotonic_ns())
            sock.send(request)
            answer, (number,), _, _ = socket.recv_fds(sock, 1000, 1)
            if answer[:2] != b"\x95\0" or os.fstat(number).st_size != 4096:
                raise AssertionError(answer)
            os.close(number)
            sock.send(HEAD.pack(return_head, seq + 1))
    return sent


def again(attack: Callable[[], None]) -> None:
    while True:
        with contextlib.suppress(OSError):
            attack()


def silent(path: str) -> None:
    kept = connect(path)
    signal.pause()
    kept.close()


def stopped(path: str) -> None:
    sock = connect(path)
    head, tail = template(BORROW, "a", 0, None, "")
    for seq in range(1, 50):
        sock.send(HEAD.pack(head, seq) + tail, socket.MSG_DONTWAIT)
    os.kill(os.getpid(), signal.SIGSTOP)


def half_message(path: str) -> None:
    def attack() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(path)
            sock.send(b"\x94\0")
            sock.recv(1000)

    again(attack)


def spam(path: str) -> None:
    numbers = [os.open(os.devnull, os.O_RDONLY)] * 253

    def attack() -> None:
        with connect(path, puts=True) as sock:
            for seq in range(1, 1000):
                socket.send_fds(sock, [encode([BORROW, seq, "a", 0, None, ""])], numbers)

    again(attack)


def flood(path: str) -> None:
    head, tail = template(BORROW, "a", 0, None, "")
    return_head, _ = template(RETURN)

    def attack() -> None:
        with connect(path) as sock:
            for seq in range(1, 10**9, 2):
                sock.send(HEAD.pack(head, seq) + tail)
                _, numbers, _, _ = socket.recv_fds(sock, 1000, 1)
                for number in numbers:
                    os.close(number)
                sock.send(HEAD.pack(return_head, seq + 1))

    again(attack)


ATTACK = (silent, stopped, half_message, spam, flood)


def start(uid: int, run: Callable[[str], None], path: str) -> int:
    """A process of `uid` on the other CPU: its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.sched_setaffinity(0, {HOSTILE_CPU})
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        run(path)
    finally:
        os._exit(1)


@contextlib.contextmanager
def attackers(uid: int, runs: tuple[Callable[[str], None], ...], path: str) -> Iterator[None]:
    pids = [start(uid, run, path) for run in runs for _ in range(EACH)]
    try:
        time.sleep(1.0)  # the attack is under way
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


# --- measuring -------------------------------------------------------------------------------


def measure(folder: str, uid: int, runs: tuple[Callable[[str], None], ...], rounds: int, seed: int):
    """Service times in nanoseconds, beside these attackers."""
    path = f"{folder}/socket"
    with open(f"{folder}/times", "r+b") as file:
        times = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
    times[0] = 0
    with attackers(uid, runs, path):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.sched_setaffinity(0, {BROKER_CPU})
                os.setresgid(GOOD, GOOD, GOOD)
                os.setresuid(GOOD, GOOD, GOOD)
                sent = good(path, rounds, seed)
                with open(writer, "wb") as file:
                    file.write(struct.pack(f"{len(sent)}Q", *sent))
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader, "rb") as file:
            data = file.read()
        os.waitpid(pid, 0)
    sent = struct.unpack(f"{len(data) // 8}Q", data)
    if len(sent) != rounds or times[0] != rounds:
        raise AssertionError(f"{len(sent)} of {rounds} answers were right, {times[0]} were sent")
    return [times[n + 1] - sent[n] for n in range(rounds)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile")
    parser.add_argument("--borrows", type=int, default=1500, metavar="N", help="of the good client")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="interleaved")
    asked = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("this takes root: the good client and the hostile ones are different users")
    if not {BROKER_CPU, HOSTILE_CPU} <= os.sched_getaffinity(0):
        parser.error("this takes two CPUs")
    cases = {
        "alone": (HOSTILE, ()),
        "attack": (HOSTILE, ATTACK),
        "flood": (HOSTILE, (flood,)),
        "no quotas": (OWN, (flood,)),
    }
    found: dict[str, list[int]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory(prefix="fdbroker-hostile-") as folder:
        os.chmod(folder, 0o755)
        Path(f"{folder}/fdbroker.toml").write_text(CONFIG)
        with open(f"{folder}/times", "wb") as file:
            file.truncate(8 * (TIMES + 1))
        with open(f"{folder}/log", "w+b") as log, serving(folder, log) as process:
            for number in range(asked.rounds):
                for case, (uid, runs) in cases.items():
                    print(f"round {number + 1} of {asked.rounds}: {case} ...", file=sys.stderr)
                    found[case] += measure(folder, uid, runs, asked.borrows, number)
            if process.poll() is not None:
                raise AssertionError("the broker has ended")
            log.seek(0)
            if b"Traceback" in (said := log.read()):
                raise AssertionError(said[-2000:].decode())
    report(found)
    return 0


@contextlib.contextmanager
def serving(folder: str, log) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "benchmarks.hostile", "broker", folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.terminate()


def report(found: dict[str, list[int]]) -> None:
    alone = found["alone"]
    print("service time of one good client   median        99th percentile")
    for case, times in found.items():
        median, last = statistics.median(times), quantile(times)
        ratios = median / statistics.median(alone), last / quantile(alone)
        print(
            f"  {case:<12} {len(times):>8} borrows {median / 1000:8.1f} µs {ratios[0]:5.2f} x"
            f" {last / 1000:9.1f} µs {ratios[1]:5.2f} x"
        )


def quantile(times: list[int]) -> float:
    return statistics.quantiles(times, n=100)[98]


if __name__ == "__main__":
    if sys.argv[1:2] == ["broker"]:
        broker(sys.argv[2])
        sys.exit(0)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
