"""What the tests share: questions to the kernel, another process to play with, a bounded wait.

Run as a program (``python -m support``) it is that other process: it takes functions by name from
its standard input, calls them, and answers with what they return or raise.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack

import fdbroker
from fdbroker.ipc.transport import unix_channel

PATIENCE = 20.0  # seconds; what takes longer has failed
kept: dict[str, Any] = {}  # what the functions of another process leave for the next ones


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Ask until `condition()` is true; AssertionError if it still is not after `seconds`."""
    deadline = time.monotonic() + seconds
    pause = 0.0005
    while not (result := condition()):
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
    return result


# --- what the kernel says --------------------------------------------------------------------


def open_files(pid: int | str = "self") -> dict[int, str]:
    """The descriptors of a process and where each leads."""
    files = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            files[int(number)] = os.readlink(f"/proc/{pid}/fd/{number}")
    return files


def targets(pid: int | str = "self") -> Counter[str]:
    """Where the descriptors of a process lead, sockets and pipes by kind only."""
    return Counter(link.split(":[")[0] for link in open_files(pid).values())


def children() -> set[int]:
    """The child processes of this one, of all its threads, zombies included."""
    found: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with (
            contextlib.suppress(FileNotFoundError),
            open(f"/proc/self/task/{thread}/children") as file,
        ):
            found.update(map(int, file.read().split()))
    return found


def process_state(pid: int) -> str:
    """One letter: R, S, T (stopped), Z, ... (proc_pid_stat(5))."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def cpu_seconds(pid: int) -> float:
    """What the process has used of a CPU so far, in user and in kernel mode (proc_pid_stat(5))."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_of(pid: int) -> int:
    """Bytes of a process's own, file pages and shared libraries apart."""
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(found) << 10 for found in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", status))


def become(uid: int, gid: int | None = None, groups: tuple[int, ...] = ()) -> None:
    """Another user, for good."""
    os.setgroups(groups)
    gid = uid if gid is None else gid
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def is_same_file(one: int, other: int) -> bool:
    """Whether two descriptors are of one inode."""
    return os.path.sameopenfile(one, other)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process is stopped for as long as the block runs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: process_state(pid) == "T")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# --- another process -------------------------------------------------------------------------


class Peer:
    """Another Python process, which calls functions of the test modules for us.

    A function is found by its module and name; arguments and results are pickled.  What it must
    keep for later (a loan) it puts into `support.kept`.
    """

    def __init__(self, **popen: Any) -> None:
        path = [entry for entry in sys.path if entry]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "support"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            **popen,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have `function` called; `result` waits for it."""
        assert self.process.stdin is not None
        named = function.__module__, function.__qualname__
        pickle.dump((*named, arguments), self.process.stdin)
        self.process.stdin.flush()

    def result(self, seconds: float = PATIENCE) -> Any:
        """What the function that was started returned; what it raised is raised here."""
        assert self.process.stdout is not None
        assert self.is_done(seconds), "the other process gives no answer"
        good, value = pickle.load(self.process.stdout)
        if not good:
            raise value
        return value

    def is_done(self, seconds: float = 0.0) -> bool:
        """Whether the function that was started has ended."""
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Start and wait."""
        self.start(function, *arguments)
        return self.result(100.0)

    def kill(self) -> None:
        """SIGKILL, and wait for it to be gone."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        killed = self.process.poll() is not None
        if error is not None:
            self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        assert error is not None or killed or status == 0, f"it ended with status {status}"


# --- the wire, spoken by hand ----------------------------------------------------------------

HELLO, BORROW, MORE, RETURN, CANCEL, PUT, RETIRE, ENTRIES, LOANS, STATS = range(10)
SHARED = [0, None, ""]  # the fields of a plain borrow after the name


def can_refuse_descriptors() -> bool:
    """Whether the kernel has SO_PASSRIGHTS (Linux 6.16)."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        return unix_channel.refuse_descriptors(one)


def connect_to(address: str) -> socket.socket:
    """A socket that is connected to the broker, and has said nothing yet."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(address)
    return sock


class Raw:
    """A session at a broker that sends what it is told to, right or wrong; it may put."""

    def __init__(self, address: str, *, hello: bool = True, puts: bool = True) -> None:
        self.sock = connect_to(address)
        self.sock.settimeout(PATIENCE)
        if hello:
            assert self.say_hello(puts=puts) == [0, 0, 1]

    def send(self, *message: Any, fds: Sequence[int] = ()) -> None:
        self.send_bytes(msgpack.packb(message), fds)

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        socket.send_fds(self.sock, [data], fds)

    def receive(self) -> tuple[list[Any] | None, list[int]]:
        """The next message, None at the end of the session, and what it brought."""
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, 70_000, 253)
        except ConnectionResetError:
            return None, []
        return (msgpack.unpackb(data) if data else None), list(fds)

    def say_hello(self, *, puts: bool = False) -> list[Any]:
        """The answer to it, which may have been there before."""
        with contextlib.suppress(BrokenPipeError):
            self.send(HELLO, 0, 1, puts)
        message, _ = self.receive()
        if message is None:  # our hello came too late: that is said once, then the answer
            message, _ = self.receive()
        assert message is not None
        return message

    def borrow(self, seq: int, name: str) -> int:
        """A plain loan of one entry: its descriptor."""
        self.send(BORROW, seq, name, *SHARED)
        message, (number,) = self.receive()
        assert message is not None
        assert message[:4] == [0, seq, 1, 1]
        return number

    def is_silent(self, witness: Any) -> bool:
        """Whether nothing came, once the broker has answered `witness`, a client of it."""
        witness.stats()
        return not select.select([self.sock], [], [], 0)[0]

    def is_refused(self, code: int) -> list[Any]:
        """The data of the refusal that is next, after which the session is over."""
        message, fds = self.receive()
        assert message is not None
        assert (message[0], fds) == (code, [])
        assert self.receive() == (None, [])
        return message[2:]

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


@contextlib.contextmanager
def fake_broker(address: str, *scripts: Callable[[Raw], object]) -> Iterator[None]:
    """A process that serves at `address`, and plays one script with each session that comes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()

        def play() -> None:
            for script in scripts:
                listener.settimeout(PATIENCE)
                session = Raw.__new__(Raw)
                session.sock, _ = listener.accept()
                session.sock.settimeout(PATIENCE)
                with session:
                    script(session)

        wait = start_fork(play)
    try:
        yield
    finally:
        wait()
        os.unlink(address)


def greet(session: Raw, *, puts: bool = False) -> None:
    """What every broker does first."""
    assert session.receive() == ([HELLO, 0, 1, puts], [])
    session.send(0, 0, 1)


# --- what another process is asked to do most often -----------------------------------------


def hold(address: str, name: str, exclusive: bool = False, timeout: float | None = None) -> int:
    """Borrow and keep it: the number."""
    client = kept.setdefault(address, fdbroker.Client(address))
    loan = client.borrow(name, exclusive=exclusive, timeout=timeout)
    kept.setdefault("held", []).append(loan)
    return int(loan.fileno())


def give_back() -> None:
    """Return what was kept first."""
    kept["held"].pop(0).close()


def let_go() -> None:
    """Return everything, keep nothing."""
    for loan in kept.pop("held", []):
        loan.close()
    for other in kept.values():
        if isinstance(other, fdbroker.Client):
            other.close()
    kept.clear()


# --- forks -----------------------------------------------------------------------------------


def in_fork(function: Callable[[], Any]) -> Any:
    """What `function` returns in a forked child; what it raises is raised here."""
    wait = start_fork(function)
    return wait()


def start_fork(function: Callable[[], Any]) -> Callable[[], Any]:
    """Fork, and call `function` in the child; call the result to wait for its answer."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            answer = _outcome(function)
            while answer:
                answer = answer[os.write(writer, answer) :]
        finally:
            os._exit(0)
    os.close(writer)

    def wait() -> Any:
        with open(reader, "rb") as file:
            good, value = pickle.load(file)  # not to its end: a grandchild may have a copy
        os.waitpid(pid, 0)
        if not good:
            raise value
        return value

    return wait


def _outcome(function: Callable[..., Any], *arguments: Any) -> bytes:
    ignored: list[str] = []  # what a finalizer raised: it fails too
    sys.unraisablehook = lambda found: ignored.append(f"{found.object!r}: {found.exc_value!r}")
    try:
        answer = True, function(*arguments)
        gc.collect()
        assert not ignored, ignored
    except BaseException as error:
        error.add_note(f"(in process {os.getpid()})")
        answer = False, error
    try:
        return pickle.dumps(answer)
    except Exception as error:
        return pickle.dumps((False, AssertionError(f"{answer!r}: {error!r}")))


def _serve() -> None:
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            module, name, arguments = pickle.load(requests)
        except EOFError:
            break
        __import__(module)
        answers.write(_outcome(getattr(sys.modules[module], name), *arguments))
        answers.flush()
    requests.close()
    answers.close()
    let_go()
    gc.collect()


if __name__ == "__main__":
    sys.modules["support"] = sys.modules["__main__"]  # so that `kept` is there once
    _serve()
