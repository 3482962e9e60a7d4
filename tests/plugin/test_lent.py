"""lent_socket and lent_port: in one test, and in eight workers of pytest-xdist at a time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

WORKERS = 8
TESTS = 48
DOCUMENT = Path(__file__).parents[2] / "docs" / "pytest.md"

KIT = '''
import contextlib, errno, os, socket, subprocess, sys, time
import pytest

SERVER = """
import os, socket, sys
with socket.socket(fileno=int(sys.argv[1])) as listener:
    while True:
        connection, _ = listener.accept()
        connection.sendall(b"%d" % os.getpid())
        connection.close()
"""

@contextlib.contextmanager
def serving(fd):
    """A server process that has the descriptor, and answers each connection with its pid."""
    command = [sys.executable, "-I", "-S", "-c", SERVER, str(fd)]
    process = subprocess.Popen(command, pass_fds=[fd])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()

def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=30)

def who(connection):
    with connection:
        return int(connection.makefile().read())

def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
'''


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A folder for a project, with a server; warnings are errors in it."""
    pytester.makeini("[pytest]\nfilterwarnings = error\nusefixtures = fd_leak_check")
    pytester.makepyfile(kit=KIT)
    return pytester


def run(project: pytest.Pytester, text: str, *options: str) -> pytest.RunResult:
    project.makepyfile("from kit import *\n" + text)
    plain = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")  # which takes long to import
    return project.runpytest_subprocess(*plain, *options, timeout=100)


ONE = """
def test_a_connection_waits_for_its_server(lent_socket, lent_port):
    early = connect(lent_port)
    with serving(lent_socket.fd) as pid:
        assert who(early) == pid
        assert who(connect(lent_port)) == pid

def test_a_server_is_restarted_and_no_connection_is_lost(lent_socket):
    pids = set()
    for _ in range(5):
        between = socket.create_connection(lent_socket.address, timeout=30)
        with serving(lent_socket.fd) as pid:
            assert who(between) == pid
        pids.add(pid)
    assert len(pids) == 5

@pytest.mark.parametrize("option", [0, socket.SO_REUSEADDR, socket.SO_REUSEPORT])
def test_nobody_else_can_bind_the_port(lent_port, option):
    with socket.socket() as other:
        if option:
            other.setsockopt(socket.SOL_SOCKET, option, 1)
        with pytest.raises(OSError) as refusal:
            other.bind(("127.0.0.1", lent_port))
        assert refusal.value.errno == errno.EADDRINUSE

def test_it_is_not_inherited_unasked(lent_socket):
    assert not os.get_inheritable(lent_socket.fileno())

BORROWER = '''
import fdbroker, os, sys
with fdbroker.borrow(sys.argv[1]) as loan, loan.as_socket() as listener:
    connection, _ = listener.accept()
    with connection:
        connection.sendall(b"%d" % os.getpid())
'''

def test_another_process_borrows_it(lent_socket):
    environment = os.environ | {"FDBROKER_SOCKET": lent_socket.broker.address}
    command = [sys.executable, "-c", BORROWER, lent_socket.name]
    with subprocess.Popen(command, env=environment) as process:
        assert who(connect(lent_socket.port)) == process.pid
    assert process.returncode == 0

def test_this_process_borrows_it(lent_socket):
    with lent_socket.borrow(purpose="to look") as loan:
        (seen,) = lent_socket.broker.loans()
        assert (seen.entry, seen.purpose) == (lent_socket.name, "to look")
        assert os.path.sameopenfile(loan.fileno(), lent_socket.fd)

ended = []

def test_it_is_open_to_the_end(lent_socket):
    ended.append(lent_socket)
    assert lent_socket.url == f"http://127.0.0.1:{lent_socket.port}"

def test_and_then_it_is_gone(lent_socket):
    (before,) = ended
    assert before.fd == -1
    names = [entry.name for entry in lent_socket.broker.entries() if not entry.loans]
    assert names == [lent_socket.name]
    def is_refused():
        with contextlib.suppress(ConnectionRefusedError):
            connect(before.port).close()
            return False
        return True
    wait_until(is_refused)  # a broker closes beside its other work

def test_retired_by_the_test_itself(lent_socket):
    lent_socket.broker.retire(lent_socket.name, wait=True)

def test_several(lent_socket_factory, lent_socket):
    with lent_socket_factory() as one, lent_socket_factory() as other:
        assert len({one.port, other.port, lent_socket.port}) == 3
        assert len({one.name, other.name, lent_socket.name}) == 3
        with serving(one.fd) as first, serving(other.fd) as second:
            assert who(connect(one.port)) == first
            assert who(connect(other.port)) == second

@pytest.fixture(scope="session")
def served(lent_socket_factory):
    with lent_socket_factory() as lent, serving(lent.fd) as pid:
        yield lent.port, pid

@pytest.mark.parametrize("round", [1, 2])
def test_a_server_for_the_session(served, round):
    port, pid = served
    assert who(connect(port)) == pid

def test_one_that_the_session_closes(lent_socket_factory, fd_leak_check):
    fd_leak_check.keep(lent_socket_factory())
"""


def test_one_at_a_time(project: pytest.Pytester) -> None:
    run(project, ONE).assert_outcomes(passed=ONE.count("\ndef test_") + 3)  # with parameters


MANY = f"""
from fcntl import LOCK_EX, LOCK_UN, flock

@pytest.mark.parametrize("number", range({TESTS}))
def test_serve(number, lent_socket, lent_port, request):
    begin = time.monotonic()
    worker = request.config.workerinput["workerid"]
    open(f"worker-{{worker}}", "w").close()
    wait_until(lambda: sum(name.startswith("worker-") for name in os.listdir()) == {WORKERS})
    with serving(lent_socket.fd) as pid:
        for _ in range(20):
            assert who(connect(lent_port)) == pid
    broker = lent_socket.broker.pid
    with open("log", "a") as log:
        log.write(f"{{worker}} {{broker}} {{lent_port}} {{begin}} {{time.monotonic()}}\\n")
"""


def test_eight_workers_of_xdist(project: pytest.Pytester) -> None:
    run(project, MANY, "-n", str(WORKERS)).assert_outcomes(passed=TESTS)
    rows = [line.split() for line in (project.path / "log").read_text().splitlines()]
    assert len(rows) == TESTS
    assert len({worker for worker, *_ in rows}) == WORKERS
    assert len({(worker, broker) for worker, broker, *_ in rows}) == WORKERS
    assert len({broker for _, broker, *_ in rows}) == WORKERS
    lives = [(float(begin), float(end), port) for _, _, port, begin, end in rows]
    most = 0
    for begin, _, _ in lives:
        ports = [port for other, end, port in lives if other <= begin < end]
        assert len(ports) == len(set(ports)), "two tests had one port at a time"
        most = max(most, len(ports))
    assert most == WORKERS, "they were not at work at the same time"


def test_the_broker_ends_with_the_session(project: pytest.Pytester) -> None:
    text = """
def test_it(lent_socket):
    with open("broker", "w") as file:
        file.write(f"{lent_socket.broker.pid} {lent_socket.broker.address}")
"""
    run(project, text).assert_outcomes(passed=1)
    pid, address = (project.path / "broker").read_text().split()
    assert not Path(f"/proc/{pid}").exists()
    assert not Path(address).parent.exists()


def test_the_plugin_can_be_left_out(project: pytest.Pytester) -> None:
    project.makeini("")
    text = "def test_it():\n    pass\n\ndef test_lent(lent_port):\n    pass\n"
    result = run(project, text, "-p", "no:fdbroker")
    result.assert_outcomes(passed=1, errors=1)
    assert "fixture 'lent_port' not found" in result.stdout.str()


def test_pytest_loads_one_small_file_and_the_package() -> None:
    script = """
import pytest, sys
before = {*sys.modules}
import fdbroker.pytest_plugin
print(*sorted({*sys.modules} - before))
"""
    out = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert out.split() == ["fdbroker", "fdbroker._lazy", "fdbroker.pytest_plugin"]


def test_the_fixtures_are_documented(project: pytest.Pytester) -> None:
    """By ``pytest --fixtures`` with a sentence each, and in the document by name."""
    out = run(project, "", "--fixtures").stdout.str()
    ours = re.findall(r"^(\w+).*-- .*pytest_plugin\.py:\d+\n +\S", out, re.M)
    described = {name for name in ours if name.startswith(("lent_", "fd_leak"))}
    assert described == {"lent_socket", "lent_port", "lent_socket_factory", "fd_leak_check"}
    text = DOCUMENT.read_text()
    assert [name for name in described if f"| `{name}` |" not in text] == []


def test_the_example_of_the_document(project: pytest.Pytester) -> None:
    """As it is printed there, with a real uvicorn."""
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.M | re.S)
    (example,) = [block for block in blocks if "uvicorn" in block]
    run(project, example).assert_outcomes(passed=1)
