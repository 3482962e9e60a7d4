"""`fdbroker exec`: the right file at the right number, for as long as any process has it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from support import PATIENCE, open_files, wait_until

import fdbroker
from fdbroker.cli import _parser, exec

FDBROKER = Path(sys.executable).parent / "fdbroker"
LOOK = """
import json, os
found = {}
for number in map(int, os.listdir("/proc/self/fd")):
    try:
        status = os.fstat(number)
    except OSError:
        continue  # the listing's own
    found[number] = [status.st_dev, status.st_ino]
os.write({out}, json.dumps({"files": found, "environment": dict(os.environ)}).encode())
"""


@contextlib.contextmanager
def exec_(address: str, *arguments: str, **popen: Any) -> Iterator[subprocess.Popen[str]]:
    """The command with these arguments after ``exec``, ended at the end of the block."""
    words = [sys.executable, "-W", "error", "-m", "fdbroker", "exec", "--socket", address]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*words, *arguments], text=True, **(pipes | popen)) as process:
        try:
            yield process
        finally:
            process.kill()


def run(address: str, *arguments: str, **popen: Any) -> tuple[int, str, str]:
    """Its exit status, what it printed, and what it said to stderr."""
    with exec_(address, *arguments, **popen) as process:
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err


def look(address: str, *arguments: str, **popen: Any) -> tuple[dict[int, tuple[int, int]], Any]:
    """Which files CMD has by number, and its environment."""
    with tempfile.TemporaryFile() as file:
        os.set_inheritable(file.fileno(), True)
        code = LOOK.replace("{out}", str(file.fileno()))
        command = [sys.executable, "-I", "-c", code]
        status, _, err = run(address, *arguments, "--", *command, pass_fds=[file.fileno()], **popen)
        assert (status, err) == (0, "")
        found = json.loads(os.pread(file.fileno(), 1 << 20, 0))
        files = {int(number): tuple(inode) for number, inode in found["files"].items()}
        del files[file.fileno()]
        return files, found["environment"]


def inode(file: Any) -> tuple[int, int]:
    status = os.fstat(file if isinstance(file, int) else file.fileno())
    return status.st_dev, status.st_ino


@pytest.fixture
def files(broker: fdbroker.Broker, tmp_path: Path) -> dict[str, tuple[int, int]]:
    """Entries a to e, each another file: their inodes."""
    inodes = {}
    for name in "abcde":
        with open(tmp_path / name, "w+") as file:
            file.write(f"this is {name}\n")
            file.seek(0)
            broker.put(name, file)
            inodes[name] = inode(file)
    return inodes


# --- placing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers",
    [
        {"a": 10},
        {"a": 3, "b": 4, "c": 5, "d": 6, "e": 7},
        {"a": 7, "b": 6, "c": 5, "d": 4, "e": 3},
        {"a": 4, "b": 5, "c": 6, "d": 7, "e": 3},
        {"a": 0, "b": 1, "c": 2},
        {"a": 2, "b": 0, "c": 1, "d": 3, "e": 100},
        {"a": 100, "b": 101, "c": 102, "d": 103, "e": 104},
        {"a": 5, "b": 1023},
    ],
    ids=lambda numbers: ",".join(f"{name}={number}" for name, number in numbers.items()),
)
def test_each_file_is_where_it_was_asked_for(broker, files, numbers):
    """Numbers that swap what the loan had, overlap with its session, are the standard ones."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = [f"--fd={name}={number}" for name, number in numbers.items()]

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))

    found, environment = look(broker.address, *wanted, preexec_fn=lower)
    session = int(environment["FDBROKER_LOAN_FD"])
    assert {name: found[number] for name, number in numbers.items()} == {
        name: files[name] for name in numbers
    }
    assert 100 <= session < 1024
    assert session not in numbers.values()
    assert found.keys() == {0, 1, 2, session, *numbers.values()}  # nothing else came along


def test_every_permutation_of_three_low_numbers(broker, files):
    for numbers in permutations((3, 4, 5)):
        placed = dict(zip("abc", numbers, strict=True))
        found, _ = look(broker.address, *(f"--fd={name}={n}" for name, n in placed.items()))
        assert {name: found[n] for name, n in placed.items()} == {n: files[n] for n in "abc"}


def test_standard_streams_are_taken_only_when_they_are_named(broker, files):
    """Not even if they are closed, so that they are the lowest free numbers."""

    def close_all() -> None:
        os.closerange(0, 3)

    found, _ = look(broker.address, "--fd", "a", "--fd", "b=6", preexec_fn=close_all)
    assert found.keys() & {0, 1, 2} == set()
    assert sorted(found.values()).count(files["a"]) == 1
    assert found[6] == files["b"]
    status, out, err = run(broker.address, "--fd", "c=0", "--", "cat")
    assert (status, out, err) == (0, "this is c\n", "")


def test_one_entry_at_several_numbers(broker, files):
    found, _ = look(broker.address, "--fd", "a=0", "--fd", "a=7", "--fd", "a=9", "--fd", "b")
    assert [found[number] for number in (0, 7, 9)] == [files["a"]] * 3


def test_the_number_stands_for_the_name_in_braces(broker, files):
    script = 'for word; do echo "$word"; done'
    words = ["{a}", "fd://{b}/{a}", "{c}", "{}", "{ a }", "{{a}}", "{a", "$a"]
    status, out, err = run(
        *(broker.address, "--fd", "b=9", "--fd", "a", "--", "sh", "-c", script, "sh", *words)
    )
    assert (status, err) == (0, "")
    a = out.splitlines()[0]
    assert int(a) >= 3
    assert out.splitlines() == [a, f"fd://9/{a}", "{c}", "{}", "{ a }", f"{{{a}}}", "{a", "$a"]


@pytest.mark.parametrize("flags", ["", ",nonblocking", ",exclusive,nonblocking"])
def test_nonblocking_is_a_flag_of_the_description(broker, flags):
    """Which the kernel keeps for all who have it (fcntl(2), F_SETFL)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        broker.put("web", listener)
    look = "import os, sys; print(os.get_blocking(int(sys.argv[1])))"
    words = ["--fd", f"web{flags}", "--", sys.executable, "-c", look, "{web}"]
    blocks = not flags.endswith("nonblocking")
    assert run(broker.address, *words) == (0, f"{blocks}\n", "")
    with broker.borrow("web") as loan:
        assert os.get_blocking(loan.fileno()) == blocks


def test_listen_fds(broker, files):
    """As sd_listen_fds(3) has it, in the order given; a numbered one is not among them."""
    arguments = ["--fd", "c", "--fd", "a", "--fd", "d=0", "--fd", "b", "--listen-fds"]
    code = LOOK.replace("{out}", "1") + "print(end=str(os.getpid()))"
    with exec_(broker.address, *arguments, "--", sys.executable, "-c", code) as process:
        out, _ = process.communicate(timeout=PATIENCE)
    answer, end = json.JSONDecoder().raw_decode(out)
    assert int(out[end:]) == process.pid
    found, environment = answer["files"], answer["environment"]
    assert [tuple(found[n]) for n in "0345"] == [files[name] for name in "dcab"]
    assert environment["LISTEN_FDS"] == "3"
    assert environment["LISTEN_FDNAMES"] == "c:a:b"
    assert environment["LISTEN_PID"] == str(process.pid)
    assert "6" not in found


def test_what_the_caller_passes_on_stays(broker, files, data_file):
    number = data_file.fileno()
    look_at = ["--", "stat", "-L", "-c", "%d %i", f"/proc/self/fd/{number}"]
    status, out, err = run(broker.address, "--fd", "a", *look_at, pass_fds=[number])
    assert (status, err) == (0, "")
    assert tuple(map(int, out.split())) == inode(data_file)


def test_the_session_finds_a_number_below_a_low_limit(broker, files):
    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    found, environment = look(broker.address, "--fd", "a=39", preexec_fn=lower)
    assert found[39] == files["a"]
    assert 3 <= int(environment["FDBROKER_LOAN_FD"]) < 39


def test_signals_that_python_ignores_are_as_usual(broker, files):
    script = "grep ^SigIgn: /proc/self/status"
    status, out, _ = run(broker.address, "--fd", "a", "--", "sh", "-c", script)
    assert status == 0
    ignored = int(out.split()[1], 16)
    assert not ignored & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)


# --- the loan --------------------------------------------------------------------------------


def is_lent(broker: fdbroker.Broker, pid: int) -> bool:
    return pid in {loan.pid for loan in broker.loans()}


def test_the_loan_is_the_programs(broker, files):
    """All of them are one loan, of the pid that becomes the program, until it ends."""
    arguments = ["--fd", "a", "--fd", "b=0", "--purpose", "to look at"]
    with exec_(broker.address, *arguments, "--", "sleep", "1000") as process:
        wait_until(lambda: is_lent(broker, process.pid))
        loans = broker.loans()
        assert {loan.entry for loan in loans} == {"a", "b"}
        assert len({loan.id for loan in loans}) == 1
        assert {loan.purpose for loan in loans} == {"to look at"}
        assert not any(loan.exclusive for loan in loans)
        wait_until(lambda: "sleep" in Path(f"/proc/{process.pid}/comm").read_text())
        assert is_lent(broker, process.pid)
        process.kill()
        process.wait(PATIENCE)
        wait_until(lambda: not broker.loans())


def test_the_loan_lasts_until_the_last_child_has_gone(broker, files):
    """A server's master is killed: its workers have the descriptor, so they have the loan."""
    code = """
import os, signal
children = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        signal.pause()
    children.append(pid)
print(*children, flush=True)
signal.pause()
"""
    command = [sys.executable, "-c", code]
    with exec_(broker.address, "--fd", "a", "--", *command) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        held = [os.pidfd_open(pid) for pid in pids]
        try:
            process.kill()
            process.wait(PATIENCE)
            assert len(pids) == 3
            for pid, child in zip(pids, held, strict=True):
                assert is_lent(broker, process.pid), f"the loan went before {pid}"
                # all that has happened until now has come to the broker
                broker.put("witness", 0)
                broker.retire("witness", wait=True, timeout=PATIENCE)
                assert is_lent(broker, process.pid), f"the loan went before {pid}"
                signal.pidfd_send_signal(child, signal.SIGKILL)
        finally:
            for child in held:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(child, signal.SIGKILL)
                os.close(child)
        wait_until(lambda: not broker.loans())


def test_the_loan_ends_when_its_descriptor_is_closed(broker, files):
    """As a program does that closes all it does not know; the file stays its own."""
    script = 'eval "exec $FDBROKER_LOAN_FD>&-"; echo closed; read line; cat <&{a}'
    with exec_(broker.address, "--fd", "a", "--", "bash", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "closed\n"
        wait_until(lambda: not broker.loans())
        out, err = process.communicate("go on\n", timeout=PATIENCE)
        assert (out, err) == ("this is a\n", "")


# --- turns -----------------------------------------------------------------------------------


def test_a_second_one_waits_for_its_turn(broker, files):
    """The holder is killed; the next one is the next program."""
    wanted = ["--fd", "a,exclusive"]
    with exec_(broker.address, *wanted, "--", "sleep", "1000") as first:
        wait_until(lambda: is_lent(broker, first.pid))
        with exec_(broker.address, *wanted, "--wait", "60", "--", "sleep", "1000") as second:
            wait_until(lambda: broker.stats()["waiting"] == 1)
            assert not is_lent(broker, second.pid)
            first.kill()
            first.wait(PATIENCE)
            wait_until(lambda: is_lent(broker, second.pid))
            assert [loan.exclusive for loan in broker.loans()] == [True]


def test_who_does_not_wait_is_told_who_has_it(broker, files):
    with exec_(broker.address, "--fd", "a=5,exclusive", "--", "sleep", "1000") as holder:
        wait_until(lambda: is_lent(broker, holder.pid))
        for arguments in (["--fd", "a"], ["--fd", "a", "--wait", "0.05"]):
            status, out, err = run(broker.address, *arguments, "--", "true")
            assert (status, out) == (7, "")
            assert re.fullmatch(rf'fdbroker: "a" is busy .*pid {holder.pid} \(\w+\) for .*\n', err)
        wait = ["--fd", "a", "--wait", "inf", "--", "true"]
        with exec_(broker.address, *wait) as waiting:
            wait_until(lambda: broker.stats()["waiting"] == 1)
            waiting.send_signal(signal.SIGINT)
            _, err = waiting.communicate(timeout=PATIENCE)
            assert (waiting.returncode, err) == (130, "")


def test_some_in_turns_and_some_not(broker, files):
    """Two loans then, and each has its descriptor."""
    arguments = ["--fd", "a", "--fd", "b,exclusive", "--fd", "c"]
    found, environment = look(broker.address, *arguments)
    sessions = [int(number) for number in environment["FDBROKER_LOAN_FD"].split(":")]
    assert len({*sessions} & found.keys()) == 2
    assert {files[name] for name in "abc"} <= {*found.values()}
    with exec_(broker.address, *arguments, "--", "sleep", "1000") as process:
        wait_until(lambda: len(broker.loans()) == 3)
        exclusive = {loan.entry: loan.exclusive for loan in broker.loans()}
        assert exclusive == {"a": False, "b": True, "c": False}
        process.kill()


def test_it_waits_for_a_broker_that_comes_later(tmp_path):
    address = str(tmp_path / "later.sock")
    with exec_(
        *(address, "--wait", "60", "--listen", "web=0", "--", "sh", "-c", "echo here; exec cat")
    ) as process:
        assert process.stdout is not None
        wait_until(lambda: Path(f"/proc/{process.pid}/wchan").exists())
        serve = [sys.executable, "-m", "fdbroker", "serve", "--socket", address, "--drain", "0"]
        with subprocess.Popen(serve, stderr=subprocess.DEVNULL) as server:
            try:
                assert process.stdout.readline() == "here\n"
                with fdbroker.Client(address) as client:
                    assert [loan.pid for loan in client.loans()] == [process.pid]
            finally:
                server.terminate()


# --- what is made ----------------------------------------------------------------------------


def test_listen_makes_what_is_missing_and_borrows_it(broker):
    command = ["--", "sh", "-c", "echo {web} {api}; exec cat"]
    arguments = ["--fd", "api=9", "--listen", "web=0", "--listen", "api=127.0.0.1:0", *command]
    with exec_(broker.address, *arguments) as process:
        assert process.stdout is not None
        web, api = map(int, process.stdout.readline().split())
        assert api == 9
        made = {entry.name: entry for entry in broker.entries()}
        assert {name: made[name].kind for name in made} == {
            "web": "listening socket",
            "api": "listening socket",
        }
        for name in ("web", "api"):
            host, _, port = made[name].where.rpartition(":")
            socket.create_connection((host, int(port)), PATIENCE).close()
        assert open_files(process.pid)[web].startswith("socket:")
        found, _ = look(broker.address, *arguments[:6])
        assert os.stat(f"/proc/{process.pid}/fd/{web}").st_ino in {ino for _, ino in found.values()}
        again = {entry.name: entry.generation for entry in broker.entries()}
        assert again == {name: made[name].generation for name in made}


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_many_that_make_the_same_at_once(broker, tmp_path, kind):
    """One makes it, all borrow it, and whoever connects reaches it."""
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        port = chosen.getsockname()[1]
    path = tmp_path / "web.sock"
    where = str(port) if kind == "tcp" else f"unix:{path}"
    arguments = ["--listen", f"web={where}", "--wait", "60", "--"]
    command = [sys.executable, "-c", "import os; print(os.fstat({web}).st_ino, flush=True)"]
    with contextlib.ExitStack() as stack:
        racing = [
            stack.enter_context(exec_(broker.address, *arguments, *command)) for _ in range(8)
        ]
        answers = [process.communicate(timeout=60) for process in racing]
    assert [err for _, err in answers] == [""] * 8
    assert len({out for out, _ in answers}) == 1
    family = socket.AF_INET if kind == "tcp" else socket.AF_UNIX
    with socket.socket(family) as client:
        client.connect(("127.0.0.1", port) if kind == "tcp" else str(path))
        with broker.borrow("web") as loan, loan.as_socket() as listener:
            listener.accept()[0].close()


# --- what goes wrong -------------------------------------------------------------------------


def test_errors_are_one_line_and_have_their_status(broker, files, tmp_path):
    script = tmp_path / "no-interpreter"
    script.write_text("#!/nowhere/to/be/found\n")
    script.chmod(0o755)
    a = ["--fd", "a"]
    cases: list[tuple[int, str, Sequence[str]]] = [
        (4, 'no entry "nothing"', ["--fd", "nothing", "--", "true"]),
        (4, r'no entry "aa" \(did you mean "a"', ["--fd", "aa", "--fd", "b", "--", "true"]),
        (127, "no-such-program: not found", [*a, "--", "no-such-program"]),
        (127, "not found", [*a, "--", str(tmp_path / "nothing")]),
        (127, "not found", [*a, "--", str(script)]),
        (126, "cannot be executed", [*a, "--", str(tmp_path)]),
        (126, "cannot be executed", ["--fd", "a=2", "--", str(tmp_path / "a")]),
        (127, "not found", ["--fd", "a=2", "--fd", "b=1", "--", "no-such-program"]),
        (2, "comes exclusive", ["--fd", "a,alone", "--", "true"]),
        (2, "number of a descriptor", ["--fd", "a=x", "--", "true"]),
        (2, "number of a descriptor", ["--fd", "a=-1", "--", "true"]),
        (2, "is no name", ["--fd", "a b", "--", "true"]),
        (2, "the limit is lower", ["--fd", "a=2000000000", "--", "true"]),
        (2, "cannot both be number 7", ["--fd", "a=7", "--fd", "b=7", "--", "true"]),
        (2, "cannot both be number 3", [*a, "--fd", "b=3", "--listen-fds", "--", "true"]),
        (2, "comes the command", [*a]),
        (2, "comes the command", [*a, "--"]),
        (2, "comes the command", [*a, "--", ""]),
        (2, "number of a descriptor", ["--fd", f"a={'7' * 5000}", "--", "true"]),
        (2, "twice", ["--listen", "w=0", "--listen", "w=1", "--", "true"]),
        (127, r"\\x1b\[31mx\\ny: not found", [*a, "--", "\x1b[31mx\ny"]),
        (2, "nothing to borrow", ["--", "true"]),
        (2, "seconds, 0 or more", [*a, "--wait=-1", "--", "true"]),
        (2, "seconds, 0 or more", [*a, "--wait", "nan", "--", "true"]),
        (2, "a purpose has at most", [*a, "--purpose", "x" * 200, "--", "true"]),
        (2, "it is NAME=ADDR", [*a, "--listen", "8000", "--", "true"]),
        (2, "ends with a port", ["--listen", "web=localhost", "--", "true"]),
        (1, "127.0.0.1.*in use", ["--listen", "web={taken}", "--", "true"]),
    ]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for expected, said, arguments in cases:
            port = str(taken.getsockname()[1])
            words = [word.replace("{taken}", f"127.0.0.1:{port}") for word in arguments]
            status, out, err = run(broker.address, *words)
            assert (status, out) == (expected, ""), (arguments, err)
            assert re.fullmatch(rf"fdbroker: .*{said}.*\n", err), (arguments, err)
            wait_until(lambda: not broker.loans())


def test_no_broker(tmp_path):
    for wait in ([], ["--wait", "0.1"]):
        address = str(tmp_path / "none")
        status, out, err = run(address, "--fd", "a", *wait, "--", "true")
        assert (status, out) == (3, "")
        assert re.fullmatch(rf"fdbroker: no broker at {address}: .*\n", err)


# --- its words, and its start ----------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--fd", "a", "--", "true"],
        ["--fd", "a=0", "--fd", "b,exclusive", "--wait", "5", "--", "cat", "--", "--fd", "x"],
        ["--listen", "w=:80", "--listen-fds", "--socket", "p", "--purpose", "why", "--", "x", "-v"],
        ["--wait", "inf", "--"],
        ["--"],
    ],
)
def test_the_quick_way_to_read_the_words_is_as_the_usual_one(words):
    usual = vars(_parser(["exec"]).parse_args(["exec", *words]))
    del usual["run"], usual["verbose"]
    assert usual["command"].pop(0) == "--"
    quick = exec.quickly(words)
    assert quick is not None
    assert vars(quick) == usual


@pytest.mark.parametrize(
    "words",
    [
        ["--fd=a", "--", "true"],
        ["--fd", "--", "true"],
        ["--fd", "a", "true"],
        ["--wait", "soon", "--", "true"],
        ["--steal", "a", "--", "true"],
        ["--help"],
        [],
    ],
)
def test_what_is_unusual_is_left_to_argparse(words):
    assert exec.quickly(words) is None


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("start", [[FDBROKER], [sys.executable, "-m", "fdbroker"]])
def test_what_is_opened_until_it_becomes_the_program(broker, files, tmp_path, start):
    """Nothing heavy, as the kernel sees it."""
    trace = tmp_path / "trace"
    strace = ["strace", "-f", "-e", "trace=openat,execve", "-o", str(trace)]
    words = ["exec", "--socket", broker.address, "--fd", "a", "--", "/bin/true"]
    done = subprocess.run([*strace, *start, *words], timeout=PATIENCE, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    before, found, _ = trace.read_text().partition('execve("/bin/true"')
    assert found
    opened = re.findall(r'openat\([^"]*"([^"]*)"[^\n]* = \d', before)
    assert any(re.search("/fdbroker/ipc/.*client", path) for path in opened), "it saw nothing"
    heavy = "asyncio multiprocessing psutil click argparse typing ssl tempfile logging subprocess"
    for module in heavy.split():
        for path in opened:
            assert not re.search(rf"/{module}(/|\.|$)", path), path


def test_it_starts_within_three_times_a_bare_python(broker, files):
    """As the contract has it; in CPU time, since that of the clock is also everybody else's."""
    python = [sys.executable, "-I", "-c", "pass"]
    words = ["exec", "--socket", broker.address, "--fd", "a", "--", "true"]
    environment = dict(os.environ)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed has its bytecode

    def seconds(*command: str | Path) -> float:
        pid = os.posix_spawn(command[0], [os.fspath(word) for word in command], environment)
        _, status, used = os.wait4(pid, 0)
        assert status == 0
        return used.ru_utime + used.ru_stime

    seconds(FDBROKER, *words)  # which writes it
    ratios = [seconds(FDBROKER, *words) / seconds(*python) for _ in range(15)]
    assert median(ratios) < 3, ratios


def test_two_that_want_what_the_other_has_do_not_wait_for_each_other(broker, files):
    """One has a alone and wants b, the other has b alone and wants a: one after the other."""
    with contextlib.ExitStack() as stack:
        loans = [broker.borrow(name) for name in ("a", "b")]
        both = [
            stack.enter_context(exec_(broker.address, *wanted, "--wait", "20", "--", "true"))
            for wanted in (
                ("--fd", "a,exclusive", "--fd", "b"),
                ("--fd", "b,exclusive", "--fd", "a"),
            )
        ]
        wait_until(lambda: broker.stats()["waiting"] == 2)
        for loan in loans:
            loan.close()
        assert [process.wait(PATIENCE) for process in both] == [0, 0]


def test_one_that_runs_another_keeps_its_loan(broker, files):
    """Also where the inner one wants the number at which the outer one's session is."""
    inner = [sys.executable, "-m", "fdbroker", "exec", "--socket", broker.address]
    outer = ["--fd", "a=5", "--", *inner, "--fd", "b=100"]
    found, environment = look(broker.address, *outer)
    assert (found[5], found[100]) == (files["a"], files["b"])
    sessions = [int(word) for word in environment["FDBROKER_LOAN_FD"].split(":")]
    assert len(set(sessions)) == 2
    assert set(sessions) <= found.keys()
    assert not {5, 100} & set(sessions)
    script = "echo here; read line"
    with exec_(broker.address, *outer, "--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        assert {loan.entry for loan in broker.loans()} == {"a", "b"}


def test_a_stderr_that_was_closed_is_not_taken_for_the_session(broker, files):
    """It may have that number; what is complained of is no message to the broker."""
    words = [sys.executable, "-m", "fdbroker", "exec", "--socket", broker.address, "--fd", "a"]
    done = subprocess.run(
        ["bash", "-c", 'exec "$@" 2>&-', "bash", *words, "--", "no-such-program"],
        stdin=subprocess.DEVNULL,
        timeout=PATIENCE,
    )
    assert done.returncode == 127


def test_what_goes_between_is_made_again(tmp_path):
    """The broker is another one when it borrows what it has just put; --listen was said once."""
    address = str(tmp_path / "s")
    with contextlib.ExitStack() as stack:
        borrower = exec.Borrower(address, PATIENCE, "", {"web": "127.0.0.1:0"})
        serve = [sys.executable, "-m", "fdbroker", "serve", "--socket", address]
        for _ in range(2):
            process = stack.enter_context(subprocess.Popen(serve))
            stack.callback(process.kill)
            (loan,) = borrower.borrow([exec.Wanted("web")])
            loan.close()
            process.kill()
            process.wait()
