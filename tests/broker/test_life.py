"""The life of a private broker: it belongs to one process, and ends with it, after the last loan.

Everything is seen from a third process, which looks at the pidfd of the broker and at its folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from support import children, open_files, wait_until

import fdbroker
from fdbroker.errors import BrokerClosing, BrokerGone, BrokerStartError, NoBroker

from .puppet import Process, Puppet, is_served

SOON = 1.0  # seconds: what "at once" is, on a busy machine


@pytest.fixture
def temp(monkeypatch):
    """The folder for temporary files, of this test alone; nothing may be left in it.

    Not `tmp_path`, which may be too long for a socket in it.
    """
    with tempfile.TemporaryDirectory(prefix="fdbroker-life-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr("tempfile.tempdir", None)
        monkeypatch.setenv("PYTHONWARNINGS", "error")  # for the broker process
        yield Path(folder)
        assert os.listdir(folder) == []


class Owner(Puppet):
    """A process with a private broker that has the entry "x"."""

    def __init__(self, drain: float | str = 10.0, **how) -> None:
        super().__init__(**how)
        self.do(f"""
            broker = fdbroker.Broker(drain={drain})
            memory = os.memfd_create("x")
            os.write(memory, b"what is in x")
            broker.put("x", memory)
        """)
        self.broker = Process(self.do("broker.pid"))
        self.address = self.do("broker.address")

    def close(self) -> None:
        super().close()
        if not self.broker.gone(SOON):
            self.broker.signal(signal.SIGKILL)
        self.broker.close()


def drains(address: str) -> bool:
    """Whether the broker there refuses new loans."""
    with fdbroker.Client(address) as client:
        try:
            client.borrow("x", timeout=0).close()
        except BrokerClosing:
            return True
        except LookupError:
            pass
        return False


# --- what it is ---


def test_it_is_another_process_and_the_same_program_as_serve(temp):
    with fdbroker.Broker() as broker:
        assert broker.pid != os.getpid()
        assert f"{broker.pid}" not in os.listdir("/proc/self/task")
        arguments = Path(f"/proc/{broker.pid}/cmdline").read_bytes().split(b"\0")
        assert arguments[arguments.index(b"-m") :][1:3] == [b"fdbroker", b"serve"]
        assert os.stat(os.path.dirname(broker.address)).st_mode & 0o777 == 0o700
        assert os.stat(broker.address).st_mode & 0o777 == 0o600


def test_it_holds_nothing_of_its_owner_but_stderr(temp):
    """Who reads a pipe of the owner's, its output for one, must see the owner's end."""
    output, theirs = os.pipe()
    with Puppet(stdout=theirs) as owner:
        os.close(theirs)
        owner.do("""
            pipe = os.pipe()
            for end in pipe:
                os.set_inheritable(end, True)
            broker = fdbroker.Broker()
        """)
        with Process(owner.do("broker.pid")) as broker:
            owner.do("broker.stats()")  # by now it has closed what told us that it is ready
            files, theirs_now = open_files(broker.pid), open_files(owner.pid)
            assert files.pop(0) == files.pop(1) == os.devnull
            assert files.pop(2) == theirs_now[2]
            pipes = {what for what in theirs_now.values() if what.startswith("pipe:")}
            assert len(pipes) == 2
            assert not pipes & set(files.values())
            assert {what for what in files.values() if what.startswith("/")} == {
                owner.do("broker.address") + ".lock"
            }
        owner.do("broker.close()")
    assert os.read(output, 1) == b""
    os.close(output)


def test_twenty_in_a_row_leave_nothing(temp):
    before, threads = (open_files(), children()), os.listdir("/proc/self/task")
    for _ in range(20):
        with fdbroker.Broker() as broker, open(os.devnull) as null:
            broker.put("null", null)
            with broker.borrow("null"):
                pass
            with Process(broker.pid) as process:
                broker.close()
                assert process.gone()
        assert os.listdir(temp) == []
    assert (open_files(), children()) == before
    assert os.listdir("/proc/self/task") == threads


# --- the death of its owner ---


def test_a_killed_owner_without_loans_ends_it_at_once(temp):
    with Owner() as owner, owner.fork() as worker:
        owner.kill()
        assert owner.broker.gone(SOON)
        assert os.listdir(temp) == []
        assert worker.do("os.getppid()") != owner.pid  # it lives


def test_a_killed_owner_with_a_loan_ends_it_with_the_loan(temp):
    with Owner() as owner, owner.fork() as worker, fdbroker.Client(owner.address) as witness:
        worker.do("loan = broker.borrow('x', purpose='work')")
        owner.kill()
        wait_until(lambda: drains(owner.address))
        assert not owner.broker.gone(0.3)
        assert [(loan.pid, loan.purpose) for loan in witness.loans()] == [(worker.pid, "work")]
        assert witness.stats()["loans"] == 1
        worker.do("loan.close()")
        assert owner.broker.gone(SOON)
        assert os.listdir(temp) == []


@pytest.mark.parametrize("end", ["loan.detach(); os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_a_dead_worker_is_a_return_after_its_owner_too(temp, end):
    with Owner() as owner, owner.fork() as worker:
        worker.do("loan = broker.borrow('x')")
        owner.kill()
        wait_until(lambda: drains(owner.address))
        assert not owner.broker.gone(0.1)
        worker.begin(end)
        assert owner.broker.gone(SOON)


def test_a_loan_of_the_owner_lives_on_in_its_forked_worker(temp):
    with Owner() as owner:
        owner.do("loan = broker.borrow('x')")
        with owner.fork() as worker, fdbroker.Client(owner.address) as witness:
            owner.kill()
            wait_until(lambda: drains(owner.address))
            assert not owner.broker.gone(0.1)
            assert witness.stats()["loans"] == 1
            assert worker.do("os.pread(loan.fileno(), 100, 0)") == b"what is in x"
            worker.do("loan.close()")
            assert owner.broker.gone(SOON)


def test_after_the_owner_no_new_loan_and_no_new_entry(temp):
    with Owner() as owner, owner.fork() as worker, fdbroker.Client(owner.address) as client:
        worker.do("loan = broker.borrow('x')")
        with Puppet() as waiting:
            waiting.do(f"client = fdbroker.Client({owner.address!r})")
            waiting.begin("client.borrow('x', exclusive=True)")
            wait_until(lambda: client.stats()["waiting"] == 1)
            owner.kill()
            with pytest.raises(BrokerClosing):
                waiting.result()
        with pytest.raises(BrokerClosing):
            client.borrow("x")
        with pytest.raises(BrokerClosing):
            worker.do("broker.borrow('x')")
        with pytest.raises(BrokerClosing):
            client.put("y", 0)
        worker.do("loan.close()")
        assert owner.broker.gone(SOON)
        with pytest.raises(NoBroker):
            fdbroker.Client(owner.address).stats()


def test_an_owner_that_dies_while_it_starts_one(temp):
    """The broker finds its owner gone as soon as it looks, and nobody to tell that it is ready."""
    told, ready = os.pipe()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    owner = os.pidfd_open(dead.pid)
    dead.wait()
    os.close(told)
    folder = temp / "fdbroker-private"
    folder.mkdir()
    arguments = ["--socket", str(folder / "broker.sock"), "--ready-fd", str(ready)]
    broker = subprocess.Popen(
        [sys.executable, "-m", "fdbroker", "serve", *arguments, "--owner-fd", str(owner)],
        pass_fds=(ready, owner),
        stderr=subprocess.PIPE,
    )
    os.close(ready)
    os.close(owner)
    _, error = broker.communicate(timeout=30)
    assert b"Traceback" not in error


# --- the end of the block ---


def test_the_end_of_the_block_waits_for_the_loans(temp):
    with Owner() as owner, Puppet() as borrower:
        borrower.do(f"client = fdbroker.Client({owner.address!r})")
        borrower.do("loan = client.borrow('x')")
        owner.begin("broker.close()")
        wait_until(lambda: drains(owner.address))
        with pytest.raises(BrokerClosing):
            borrower.do("client.borrow('x')")
        assert not owner.answered(0.2)
        borrower.do("loan.close()")
        assert owner.answered(SOON)
        owner.result()
        assert owner.broker.gone()
        assert os.listdir(temp) == []


def test_the_wait_is_bounded_and_what_is_lent_stays_valid(temp):
    with Owner(drain=0.2) as owner, Puppet() as borrower:
        borrower.do(f"client = fdbroker.Client({owner.address!r})")
        borrower.do("loan = client.borrow('x')")
        before = borrower.do("time.monotonic()")
        owner.do("broker.close()")
        assert 0.2 <= owner.do("time.monotonic()") - before < 0.2 + SOON
        assert owner.broker.gone()
        assert os.listdir(temp) == []
        assert borrower.do("os.pread(loan.fileno(), 100, 0)") == b"what is in x"
        borrower.do("loan.close()")
        assert borrower.end() == 0


def test_a_second_close_does_nothing(temp):
    broker = fdbroker.Broker()
    broker.close()
    broker.close()


# --- signals ---


def test_ctrl_c_is_for_the_owner(temp):
    """A terminal's SIGINT goes to the whole foreground process group."""
    with Owner(start_new_session=True) as owner:
        owner.do("seen = []; signal.signal(signal.SIGINT, lambda *_: seen.append(1))")
        os.killpg(owner.pid, signal.SIGINT)
        wait_until(lambda: owner.do("len(seen)") == 1)
        assert owner.do("broker.stats()['entries']") == 1
        assert not owner.broker.gone(0.2)
        assert not drains(owner.address)
        owner.do("broker.close()")


def test_sigterm_drains_and_the_second_one_stops_now(temp):
    with Owner() as owner, Puppet() as borrower:
        borrower.do(f"client = fdbroker.Client({owner.address!r})")
        borrower.do("loan = client.borrow('x')")
        owner.broker.signal(signal.SIGTERM)
        wait_until(lambda: drains(owner.address))
        assert not owner.broker.gone(0.2)
        owner.broker.signal(signal.SIGTERM)
        assert owner.broker.gone(SOON)
        assert borrower.do("os.pread(loan.fileno(), 100, 0)") == b"what is in x"
        borrower.do("loan.close()")
        owner.do("broker.close()")


def test_sigterm_without_loans_ends_it_at_once(temp):
    with Owner() as owner:
        owner.broker.signal(signal.SIGTERM)
        assert owner.broker.gone(SOON)
        owner.do("broker.close()")


SLOW_TO_WAIT = """
#include <poll.h>
#include <sys/epoll.h>
#include <unistd.h>
int epoll_wait(int epfd, struct epoll_event *events, int max, int timeout)
{
    static int waits;
    if (++waits > 2)
        usleep(300000);
    return epoll_pwait(epfd, events, max, timeout, 0);
}
"""


def test_a_signal_just_before_the_loop_waits_is_not_lost(temp, tmp_path_factory):
    """Python looks for signals between instructions, so one in the instant before the system call
    would be seen when that returns; here the instant is made 0.3 s long."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("NOT TESTED: there is no C compiler for the shim that makes the instant long")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SLOW_TO_WAIT)
    shim = str(folder / "shim.so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", shim, folder / "shim.c"], check=True)
    with Owner(env=os.environ | {"LD_PRELOAD": shim}) as owner:
        where = Path(f"/proc/{owner.broker.pid}/wchan")
        wait_until(lambda: "nanosleep" in where.read_text())
        owner.broker.signal(signal.SIGTERM)
        assert owner.broker.gone(SOON + 2)
        owner.do("broker.close()")


# --- mistakes ---


def test_a_mistake_of_the_brokers_own_costs_one_session(temp):
    address = str(temp / "broker.sock")
    with Puppet(stderr=subprocess.PIPE) as server, Puppet() as borrower:
        server.begin(f"""
            from fdbroker.daemon.serve import serve
            from fdbroker.ipc.server.handlers import Handlers
            def stats(*_):
                raise ValueError("planted")
            Handlers._count = stats
            serve({address!r})
        """)
        wait_until(lambda: is_served(address))
        borrower.do(f"client = fdbroker.Client({address!r})")
        with open(os.devnull) as null:
            borrower.do("client.put('null', 0); loan = client.borrow('null')")
            with fdbroker.Client(address) as client:
                for _ in range(3):
                    with pytest.raises(BrokerGone):
                        client.stats()
                client.put("again", null)
                assert [(entry.name, entry.loans) for entry in client.entries()] == [
                    ("null", 1),
                    ("again", 0),
                ]
        borrower.do("loan.close()")
        server.signal(signal.SIGTERM)
        server.result()
        server.end()
        assert server._process.communicate()[1].count(b"ValueError: planted") == 3
    os.unlink(address + ".lock")


def test_a_request_that_outlives_its_client_hurts_nobody_who_came_after(temp):
    """Its answer comes when the client's descriptor number is another client's already."""
    address, go = str(temp / "broker.sock"), str(temp / "go")
    with Puppet() as server, Puppet() as dying, Puppet() as next_one:
        server.begin(f"""
            from fdbroker import descriptors
            from fdbroker.daemon.serve import serve
            inspect = descriptors.inspect
            def slow(fd):
                while not os.path.exists({go!r}):
                    time.sleep(0.01)
                return inspect(fd)
            descriptors.inspect = slow
            serve({address!r})
        """)
        wait_until(lambda: is_served(address))
        with fdbroker.Client(address) as witness:
            dying.do(f"client = fdbroker.Client({address!r})")
            dying.begin("client.put('x', 0)")
            wait_until(lambda: witness.stats()["jobs"] == 1)
            files = open_files(server.pid)
            dying.kill()
            wait_until(lambda: len(open_files(server.pid)) < len(files))
            next_one.do(f"client = fdbroker.Client({address!r}); client.stats()")
            assert open_files(server.pid).keys() == files.keys()
            Path(go).touch()
            wait_until(lambda: witness.stats()["jobs"] == 0)
            next_one.begin("client.stats()['connections']")
            assert next_one.result(SOON) == 2
            assert witness.entries() == []
        server.signal(signal.SIGTERM)
        server.result()
    os.unlink(address + ".lock")
    os.unlink(go)


# --- forks and forgetting ---


@pytest.mark.parametrize(
    "leave", ["broker.close()", "broker.__exit__(None, None, None)", "del broker; gc.collect()"]
)
def test_a_forked_child_does_not_end_it(temp, leave):
    with Owner() as owner:
        with owner.fork() as child:
            child.do(leave)
            assert child.end() == 0
        assert not owner.broker.gone(0.1)
        assert os.path.exists(owner.address)
        owner.do("broker.borrow('x').close()")
        owner.do("broker.close()")
        assert owner.broker.gone()


def test_a_forked_child_says_nothing_when_it_forgets_it(temp):
    with Owner(stderr=subprocess.PIPE) as owner:
        with owner.fork() as child:
            child.do("del broker; gc.collect()")
            child.end()
        owner.do("broker.close()")
        owner.end()
        assert owner._process.communicate()[1] == b""


def test_forgotten_unclosed_it_ends_with_a_warning(temp):
    with Owner() as owner, Puppet() as borrower:
        borrower.do(f"client = fdbroker.Client({owner.address!r})")
        borrower.do("loan = client.borrow('x')")
        said = owner.do("""
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                del broker
                gc.collect()
            said = [(w.category, str(w.message)) for w in seen]
        """)
        said = owner.do("said")
        assert [category for category, _ in said] == [ResourceWarning]
        assert said[0][1] == f"unclosed <Broker of {owner.address}>"
        assert owner.broker.gone(SOON)
        assert os.listdir(temp) == []
        assert borrower.do("os.pread(loan.fileno(), 100, 0)") == b"what is in x"
        with pytest.raises(ChildProcessError):  # not even a zombie
            owner.do("os.waitpid(-1, os.WNOHANG)")


def test_an_owner_that_exits_without_closing_it(temp):
    with Owner(arguments=()) as owner, owner.fork() as worker:
        worker.do("loan = broker.borrow('x')")
        owner.end()
        wait_until(lambda: drains(owner.address))
        assert not owner.broker.gone(0.1)
        worker.do("loan.close()")
        assert owner.broker.gone(SOON)


# --- the start ---


def test_the_current_folder_is_no_place_to_import_from(temp, tmp_path_factory):
    trap = tmp_path_factory.mktemp("trap")
    for name in ("msgpack", "fdbroker", "psutil", "mmap"):
        (trap / f"{name}.py").write_text("raise SystemExit('the trap')")
    with Puppet() as owner:
        owner.do(f"os.chdir({str(trap)!r})")
        owner.do("broker = fdbroker.Broker()")
        assert owner.do("broker.stats()['entries']") == 0
        owner.do("broker.close()")


def test_a_broker_that_cannot_start_says_how_it_ended(tmp_path_factory, monkeypatch):
    """The path of the socket is too long (unix(7)): the program itself says so, status 1."""
    deep = tmp_path_factory.mktemp("deep") / ("d" * 100)
    deep.mkdir()
    with Puppet(stderr=subprocess.PIPE, env=os.environ | {"TMPDIR": str(deep)}) as owner:
        with pytest.raises(BrokerStartError) as caught:
            owner.do("fdbroker.Broker()")
        assert caught.value.status == 1
        assert os.listdir(deep) == []
        with pytest.raises(ChildProcessError):
            owner.do("os.waitpid(-1, os.WNOHANG)")
        owner.end()
        said = owner._process.communicate()[1].decode()
    assert said.count("\n") == 1
    assert "at most 107 bytes" in said


def test_no_program_to_start_is_an_oserror(temp):
    with Puppet() as owner:
        before = owner.do("os.listdir('/proc/self/fd')")
        owner.do("sys.executable = '/nowhere/python'")
        with pytest.raises(FileNotFoundError):
            owner.do("fdbroker.Broker()")
        assert owner.do("os.listdir('/proc/self/fd')") == before


def test_a_program_of_its_own(temp):
    """From the outside: quiet, and gone with all it made."""
    program = textwrap.dedent("""
        import os, fdbroker
        with fdbroker.Broker() as broker, open(os.devnull) as null:
            broker.put("null", null)
            with broker.borrow("null") as loan:
                print(os.readlink(f"/proc/self/fd/{loan.fileno()}"))
    """)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, timeout=60, check=True
    )
    assert (run.stdout, run.stderr) == (b"/dev/null\n", b"")


STOPS_BACKGROUND_WRITERS = """
import socket, subprocess, sys, termios
import fdbroker

settings = termios.tcgetattr(0)
settings[3] |= termios.TOSTOP
termios.tcsetattr(0, termios.TCSANOW, settings)
"""
LOGS_FAULTS = """
with fdbroker.Broker() as broker:
    for _ in range(20):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(10)
            sock.connect(broker.address)
            sock.send(b"junk")
            assert sock.recv(1000)
print("served")
"""
CANNOT_START = """
command = [sys.executable, "-m", "fdbroker", "serve", "--socket", "/" + 200 * "long"]
print("status", subprocess.run(command, process_group=0, timeout=20).returncode)
"""


def said_on_such_a_terminal(program):
    """What `program` and its background processes say on a terminal with ``stty tostop``.

    To write is SIGTTOU there for who is not in front.
    """
    pid, terminal = os.forkpty()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", STOPS_BACKGROUND_WRITERS + program])
    said = b""
    with contextlib.suppress(OSError):  # EIO: nobody has the terminal any more
        while part := os.read(terminal, 4096):
            said += part
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert status == 0, said.decode()
    return said


def test_a_terminal_does_not_stop_who_logs_from_the_background():
    said = said_on_such_a_terminal(LOGS_FAULTS)
    assert said.count(b"event=fault") == 20
    assert b"served" in said


def test_a_terminal_does_not_stop_the_last_line_from_the_background():
    said = said_on_such_a_terminal(CANNOT_START)
    assert b"at most 107 bytes" in said
    assert b"status 1" in said


def test_an_interrupted_start_leaves_nothing(temp):
    """Ctrl-C at any time of it: no process, no folder, no descriptor."""
    with Puppet() as owner:
        owner.do("""
            dice, armed, raised = __import__("random").Random(5), False, 0
            def ring(number, frame):
                global armed, raised
                if armed:
                    armed, raised = False, raised + 1
                    raise KeyboardInterrupt
            signal.signal(signal.SIGALRM, ring)
            fdbroker.Broker().close()
            before = sorted(os.listdir("/proc/self/fd"))
            started = time.perf_counter()
            fdbroker.Broker().close()
            took = time.perf_counter() - started
        """)
        for _ in range(25):
            owner.do("""
                armed = True
                signal.setitimer(signal.ITIMER_REAL, dice.uniform(0.000_1, took))
                try:
                    broker = fdbroker.Broker()
                    armed = False
                    broker.close()
                except KeyboardInterrupt:
                    pass
                gc.collect()
            """)
            assert os.listdir(temp) == []
        assert owner.do("raised") > 5
        with pytest.raises(ChildProcessError):
            owner.do("os.waitpid(-1, os.WNOHANG)")
        assert owner.do('sorted(os.listdir("/proc/self/fd"))') == owner.do("before")


@pytest.mark.parametrize("drain", ["1e9", "1e300", "inf"])
def test_a_time_longer_than_the_kernel_can_wait(temp, drain):
    """A month, for epoll_wait(2): neither a wait nor a drain of that length is too much."""
    with Owner(drain=f"float({drain!r})") as owner, Puppet() as waiting:
        with fdbroker.Client(owner.do("broker.address")) as client:
            loan = client.borrow("x", exclusive=True)
            waiting.do(f"client = fdbroker.Client({client.address!r})")
            waiting.begin('client.borrow("x", timeout=1e9).close()')
            wait_until(lambda: client.stats()["waiting"] == 1)
            loan.close()
            waiting.result()
            loan = client.borrow("x")
            owner.begin("broker.close()")
            wait_until(lambda: drains(owner.address))
            loan.close()
        owner.result()
        waiting.do("client.close()")
