"""What a broker has when it starts: from options, from its file, from who started it; and where
and for whom it listens."""

from __future__ import annotations

import contextlib
import grp
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support import PATIENCE, in_fork, is_same_file, open_files, wait_until

import fdbroker
from fdbroker.daemon import systemd
from fdbroker.daemon.serve import DRAIN_SECONDS, serve

from .kit import COMMAND, run, served, wait_for_newline

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs another uid")
NOBODY = 65534


def connects(address: tuple[str, int] | str) -> bool:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as sock:
        return sock.connect_ex(address) == 0


def port_of(where: str) -> int:
    return int(where.rpartition(":")[2])


# --- options and the file ---


def test_entries_of_options_and_of_the_file(tmp_path):
    (tmp_path / "data").write_bytes(b"what is in it")
    (tmp_path / "f.toml").write_text(
        '[entry.web]\nlisten = "127.0.0.1:0"\n[entry."log/a"]\nopen = "log:a"\n'
    )
    arguments = [
        *("--listen", "api=127.0.0.1:0", "--listen", f"app=unix:{tmp_path}/app.sock"),
        *("--open", "data=data", "--memfd", "memory=64K", "--config", tmp_path / "f.toml"),
    ]
    with served(tmp_path, *arguments, cwd=tmp_path) as broker:
        entries = broker.entries()
        assert {name: entry.kind for name, entry in entries.items()} == {
            **dict.fromkeys(("web", "api", "app"), "listening socket"),
            **dict.fromkeys(("log/a", "data"), "file"),
            "memory": "memfd",
        }
        assert entries["app"].where == f"unix:{tmp_path}/app.sock"
        assert entries["log/a"].where == str(tmp_path / "log")
        for name in ("web", "api"):
            assert connects(("127.0.0.1", port_of(entries[name].where)))
        assert connects(str(tmp_path / "app.sock"))
        with broker.client.borrow("data") as loan:
            assert os.pread(loan.fileno(), 99, 0) == b"what is in it"
        with broker.client.borrow("memory") as loan:
            assert os.fstat(loan.fileno()).st_size == 65536
        with broker.client.borrow("log/a") as loan, pytest.raises(OSError, match="descriptor"):
            os.read(loan.fileno(), 1)


def test_an_entry_of_the_broker_is_closed_when_it_has_retired(tmp_path):
    with served(tmp_path, "--listen", "web=127.0.0.1:0") as broker:
        port = port_of(broker.entries()["web"].where)
        loan = broker.client.borrow("web")
        broker.client.retire("web")
        assert connects(("127.0.0.1", port))
        loan.close()
        wait_until(lambda: not connects(("127.0.0.1", port)))


def test_a_descriptor_by_number_is_taken_over(tmp_path):
    reader, writer = os.pipe()
    arguments = ["--fd", f"pipe={writer}", "--fd", f"same={writer}", "--fd", "in=0"]
    with served(tmp_path, *arguments, pass_fds=[writer], stdin=reader) as broker:
        os.close(writer)
        assert broker.inode("pipe") == broker.inode("same")
        with broker.client.borrow("in") as loan:
            assert is_same_file(loan.fileno(), reader)
        with broker.client.borrow("pipe") as loan:
            os.write(loan.fileno(), b"through it")
        assert os.read(reader, 99) == b"through it"
        assert open_files(broker.pid)[0] == os.devnull
        for name in ("pipe", "same"):
            broker.client.retire(name, wait=True)
        assert os.read(reader, 1) == b"", "the broker has another one"
    os.close(reader)


def test_no_number_is_of_the_broker_itself(tmp_path):
    """Nothing is open in it yet when the numbers are taken."""
    for number in (3, 4, 5, 6, 8, 12):
        done = run("serve", "--socket", tmp_path / "s", "--fd", f"x={number}")
        assert done.returncode in (1, 2)
        assert "Bad file descriptor" in done.stderr
    assert os.listdir(tmp_path) == []


def test_what_is_handed_over_has_no_copy_that_is_inherited(tmp_path):
    """Nothing that the broker keeps would survive an exec."""
    with served(tmp_path, "--memfd", "a=1", "--listen", "b=127.0.0.1:0") as broker:
        broker.entries()  # by now it has closed what told us that it is ready
        for number in open_files(broker.pid).keys() - {0, 1, 2}:
            info = Path(f"/proc/{broker.pid}/fdinfo/{number}").read_text()
            flags = int(next(line for line in info.splitlines() if "flags" in line).split()[1], 8)
            assert flags & os.O_CLOEXEC, (number, open_files(broker.pid)[number])


# --- sockets that are handed over, as sd_listen_fds(3) has it ---


@contextlib.contextmanager
def handed_over(folder: Path, names: str | None, count: int | str, *arguments, fds=(), pid="$$"):
    """A broker that was given `fds`, from 3 on, by who started it."""
    ready, told = os.pipe()
    moves = " ".join(f"{3 + index}<&{fd}" for index, fd in enumerate(fds))
    named = "" if names is None else f"LISTEN_FDNAMES='{names}'"
    script = (
        f"export LISTEN_FDS={count} LISTEN_PID={pid} {named}; exec {moves} "
        f"{' '.join(f'{fd}<&-' for fd in {*fds} - set(range(3, 3 + len(fds))))}\n"
        f"exec {' '.join(map(str, (*COMMAND, 'serve', *arguments)))} --ready-fd {told}"
    )
    with open(folder / "said", "w") as said:
        process = subprocess.Popen(
            ["/bin/bash", "-c", script], stderr=said, pass_fds=[told, *fds], cwd=folder
        )
    os.close(told)
    try:
        wait_for_newline(ready)
        yield process
        process.terminate()
        assert process.wait(PATIENCE) == 0
    except BaseException:
        print((folder / "said").read_text())
        raise
    finally:
        os.close(ready)
        process.kill()
        process.wait()


@pytest.fixture
def sockets():
    """Numbers above those that are handed over, of three listening sockets; and their inodes."""
    import fcntl

    with contextlib.ExitStack() as stack:
        numbers = []
        for _ in range(3):
            with socket.create_server(("127.0.0.1", 0)) as sock:
                number = fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 100)
            stack.callback(os.close, number)
            numbers.append(number)
        yield numbers


def same_socket(client: fdbroker.Client, name: str, number: int) -> bool:
    with client.borrow(name) as loan:
        return is_same_file(loan.fileno(), number)


def test_handed_over_sockets_are_entries_by_their_names(tmp_path, sockets):
    arguments = ["--socket", "broker.sock", "--memfd", "memory=1"]
    with (
        handed_over(tmp_path, "web:api.socket:unknown", 3, *arguments, fds=sockets) as process,
        fdbroker.Client(str(tmp_path / "broker.sock")) as client,
    ):
        assert {entry.name for entry in client.entries()} == {
            *("web", "api.socket", "fd5", "memory")
        }
        for name, number in zip(("web", "api.socket", "fd5"), sockets, strict=True):
            assert same_socket(client, name, number)
        sockets_now = {f"socket:[{os.fstat(number).st_ino}]" for number in sockets}
        links = [link for link in open_files(process.pid).values() if link in sockets_now]
        assert len(links) == 3, "a copy would stay when the entry has retired"


def test_without_names_they_have_their_numbers(tmp_path, sockets):
    with (
        handed_over(tmp_path, None, 2, "--socket", "broker.sock", fds=sockets[:2]),
        fdbroker.Client(str(tmp_path / "broker.sock")) as client,
    ):
        assert {entry.name for entry in client.entries()} == {"fd3", "fd4"}


def test_what_is_for_another_process_is_left_alone(tmp_path, sockets):
    with (
        handed_over(tmp_path, "web", 1, "--socket", "s", fds=sockets[:1], pid=1) as process,
        fdbroker.Client(str(tmp_path / "s")) as client,
    ):
        assert list(client.entries()) == []
        assert open_files(process.pid)[3] == f"socket:[{os.fstat(sockets[0]).st_ino}]"


@pytest.mark.parametrize(
    ("names", "count", "said"),
    [
        ("web:web", 2, "name 'web': two entries cannot have it"),
        ("web:a b", 2, "'a b' is no name"),
        ("web", "x", "LISTEN_FDS 'x'"),
        ("web", "-1", "LISTEN_FDS '-1'"),
        ("web", 40, "descriptor 5 is not open here"),
        ("web:fdbroker", 2, "of ListenSequentialPacket="),
        ("memory:b", 2, "name 'memory': two entries cannot have it"),
    ],
)
def test_what_is_handed_over_wrongly(tmp_path, sockets, names, count, said):
    fds = sockets[:2]
    arguments = ["--socket", "broker.sock", "--memfd", "memory=1"]
    with (
        pytest.raises(AssertionError, match="it ended"),
        handed_over(tmp_path, names, count, *arguments, fds=fds),
    ):
        pass
    (line,) = (tmp_path / "said").read_text().splitlines()
    assert line.startswith("fdbroker: ")
    assert said in line


def test_the_environment_is_cleared(monkeypatch):
    def take() -> tuple[int, set[str]]:
        os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0", "LISTEN_FDNAMES": ""}
        os.environ["NOTIFY_SOCKET"] = "/none"
        found = systemd.take_handed_over()
        systemd.Manager().ready("nobody hears it")
        return len(found), {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET"} & {
            *os.environ
        }

    assert in_fork(take) == (0, set())


# --- its own socket, bound before ---


@pytest.fixture
def own(tmp_path):
    """A listening socket at own.sock: its number."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(tmp_path / "own.sock"))
        sock.listen()
        os.chmod(tmp_path / "own.sock", 0o640)
        yield sock.fileno()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *(("fdbroker", []), ("fdbroker.socket", []), ("unknown", ["--socket", "PATH"])),
        ("fdbroker", ["--socket", "PATH"]),
    ],
)
def test_it_serves_at_a_socket_that_was_handed_over(tmp_path, own, name, arguments):
    path = str(tmp_path / "own.sock")
    before = os.lstat(path)
    client = fdbroker.Client(path)
    arguments = [path if word == "PATH" else word for word in arguments]
    for _ in range(2):  # it stays when the broker ends, so another one can follow
        with handed_over(tmp_path, name, 1, "--memfd", "a=1", *arguments, fds=[own]):
            assert [entry.name for entry in client.entries()] == ["a"]
            done = run("serve", "--socket", path)
            assert done.returncode == 1
            assert "another broker serves" in done.stderr
        assert os.path.samestat(os.lstat(path), before)
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o640
    client.close()


def test_who_connects_while_there_is_none_waits_for_the_next(tmp_path, own):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as early:
        early.connect(str(tmp_path / "own.sock"))
        early.send(b"\x94\x00\x00\x01\xc3")  # hello
        early.settimeout(PATIENCE)
        with handed_over(tmp_path, "fdbroker", 1, fds=[own]):
            assert early.recv(99) == b"\x93\x00\x00\x01"


def test_who_connects_while_it_drains_waits_for_the_next(tmp_path, own):
    """Its queue stays with who made the socket, so nobody is refused; a loan is out meanwhile."""
    path = str(tmp_path / "own.sock")
    with (
        fdbroker.Client(path) as client,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as late,
    ):
        with handed_over(tmp_path, "fdbroker", 1, "--memfd", "a=1", fds=[own]) as broker:
            loan = client.borrow("a")
            client.stats()  # in a session of its own, which is open when the drain begins
            broker.terminate()
            wait_until(lambda: is_draining(client))
            late.connect(path)
            late.send(b"\x94\x00\x00\x01\xc3")  # hello
            loan.close()
            broker.wait(PATIENCE)
        with handed_over(tmp_path, "fdbroker", 1, fds=[own]):
            late.settimeout(PATIENCE)
            assert late.recv(99) == b"\x93\x00\x00\x01"


def is_draining(client: fdbroker.Client) -> bool:
    try:
        client.borrow("a").close()
    except fdbroker.errors.BrokerClosing:
        return True
    return False


def test_its_own_socket_must_be_where_it_was_told_to_listen(tmp_path, own):
    with (
        pytest.raises(AssertionError, match="it ended"),
        handed_over(tmp_path, "fdbroker", 1, "--socket", "other.sock", fds=[own]),
    ):
        pass
    assert "not at other.sock" in (tmp_path / "said").read_text()


# --- for whom it listens ---


def modes(path: Path) -> tuple[str, str]:
    return tuple(f"{stat.S_IMODE(os.stat(p).st_mode):o}" for p in (path, path.parent))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("", ("600", "700")),
        ("mode = 0o600", ("600", "700")),
        ("mode = '0660'", ("660", "710")),
        ("mode = '0666'", ("666", "711")),
        ("mode = '0606'", ("606", "711")),
        ("group = {gid}", ("660", "710")),
        ("group = {gid}\nmode = '0666'", ("666", "711")),
        ("group = {gid}\nmode = '0600'", ("600", "700")),
    ],
)
def test_mode_and_group(tmp_path, settings, expected):
    gid = 17 if os.geteuid() == 0 else os.getegid()
    (tmp_path / "f.toml").write_text("[server]\n" + settings.format(gid=gid))
    path = tmp_path / "folder" / "socket"
    with served(tmp_path, "--config", tmp_path / "f.toml", socket=path):
        assert modes(path) == expected
        if "group" in settings:
            assert os.stat(path).st_gid == gid
            assert os.stat(path.parent).st_gid == (gid if expected[1] == "710" else os.getegid())
    with served(tmp_path, socket=path):  # the folder is left as it is
        assert modes(path) == ("600", expected[1])


def test_a_folder_that_lets_nobody_through_is_left_as_it_is_and_said(tmp_path):
    (tmp_path / "f.toml").write_text("[server]\nmode = '0666'\n")
    folder = tmp_path / "folder"
    folder.mkdir(0o700)
    path = folder / "socket"
    with served(tmp_path, "--config", tmp_path / "f.toml", socket=path) as broker:
        assert modes(path) == ("666", "700")
        broker.says("event=out-of-reach", str(folder), "mode=0700")


@as_root
def test_another_uid_gets_to_the_socket_and_is_refused_by_the_broker(tmp_path, monkeypatch):
    """The mode lets it connect; what it may do is for the broker to say."""
    os.chmod(tmp_path, 0o755)
    (tmp_path / "f.toml").write_text(f"[server]\ngroup = {NOBODY}\n")
    monkeypatch.chdir(tmp_path)  # the folders above are private

    def ask() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        fdbroker.Client("folder/socket").stats()

    with served(tmp_path, "--config", "f.toml", socket=Path("folder/socket")) as broker:
        with pytest.raises(fdbroker.errors.NotPermitted):
            in_fork(ask)
        broker.says("event=refused", f"uid={NOBODY}")


@as_root
def test_a_group_that_it_cannot_give_leaves_no_socket(tmp_path, monkeypatch):
    os.chmod(tmp_path, 0o777)
    (tmp_path / "f.toml").write_text("[server]\ngroup = 17\nmode = '0606'\nsocket = 'folder/s'\n")
    monkeypatch.chdir(tmp_path)  # the folders above are private

    def serve_as_nobody() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        serve(config_path="f.toml")

    with pytest.raises(PermissionError):
        in_fork(serve_as_nobody)
    assert os.listdir(tmp_path / "folder") == ["s.lock"]


def test_the_socket_of_the_file_and_the_option_before_it(tmp_path):
    (tmp_path / "f.toml").write_text("[server]\nsocket = 'theirs.sock'\n")
    command = [*COMMAND, "serve", "--config", "f.toml", "--ready-fd"]
    ready, told = os.pipe()
    with subprocess.Popen([*command, str(told)], pass_fds=[told], cwd=tmp_path) as process:
        try:
            os.close(told)
            wait_for_newline(ready)
            assert (tmp_path / "theirs.sock").is_socket()
        finally:
            os.close(ready)
            process.terminate()
    with served(tmp_path, "--config", tmp_path / "f.toml"):
        assert not (tmp_path / "theirs.sock").exists()


# --- one path, many brokers ---


def test_serve_on_the_socket_of_a_killed_broker_starts(tmp_path):
    for index in range(3):
        with served(tmp_path, "--memfd", f"m{index}=1") as broker:
            assert list(broker.entries()) == [f"m{index}"]
            broker.process.kill()
            broker.process.wait()
        assert (tmp_path / "broker.sock").is_socket()


@pytest.mark.parametrize("stale", [False, True])
def test_of_ten_that_race_one_lives(tmp_path, stale):
    path = tmp_path / "folder" / "broker.sock"
    if stale:
        with served(tmp_path, socket=path) as broker:
            broker.process.kill()
            broker.process.wait()
    start, go = os.pipe()
    script = (
        f"import os; os.read({start}, 1); from fdbroker.cli import main; raise SystemExit(main())"
    )
    racers = []
    for index in range(10):
        command = [sys.executable, "-c", script, "serve", "--socket", str(path)]
        command += ["--memfd", f"of-{index}=1"]
        racers.append(
            subprocess.Popen(command, pass_fds=[start], stderr=subprocess.PIPE, text=True)
        )
    try:
        os.close(start)
        os.close(go)  # all read the end at once
        wait_until(lambda: sum(racer.poll() is None for racer in racers) == 1)
        (winner,) = [index for index, racer in enumerate(racers) if racer.poll() is None]
        with fdbroker.Client(str(path)) as client:
            assert [entry.name for entry in client.entries()] == [f"of-{winner}"]
        for index, racer in enumerate(racers):
            if index != winner:
                _, said = racer.communicate()
                assert racer.returncode == 1
                assert said.startswith("fdbroker: another broker serves at ")
                assert said.count("\n") == 1
        before = os.lstat(path)
        with fdbroker.Client(str(path)) as client:
            client.stats()  # the losers' ends have taken nothing
        assert os.path.samestat(os.lstat(path), before)
        racers[winner].send_signal(signal.SIGTERM)
        assert racers[winner].wait(PATIENCE) == 0
        assert not path.exists()
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
            assert racer.stderr is not None
            racer.stderr.close()


def test_signals_one_upon_the_other_leave_no_socket(tmp_path):
    for _ in range(10):
        with served(tmp_path, "--memfd", "a=1", verbose=False) as broker:
            broker.entries()
            for _ in range(3):
                broker.process.send_signal(signal.SIGTERM)
            # the last one may find it with everything closed, and no handler any more
            assert broker.process.wait(PATIENCE) in (0, -signal.SIGTERM)
            assert not (tmp_path / "broker.sock").exists()


# --- what is wrong ---

TOML = "[entry.web]\nlisten = '127.0.0.1:0'\n"
BAD_OPTIONS = [  # and the exit status
    (2, ["--listen", "web"]),
    (2, ["--listen", "web=http"]),
    (2, ["--listen", "=80"]),
    (2, ["--listen", "a b=80"]),
    (2, ["--listen", "web=127.0.0.1:0", "--listen", "web=127.0.0.1:0"]),
    (2, ["--listen", "web=127.0.0.1:0", "--config", "f.toml"]),
    (1, ["--listen", "web=192.0.2.1:80"]),
    (1, ["--listen", "web=unix:/none/such/socket"]),
    (2, ["--open", "data"]),
    (1, ["--open", "data=/none/such"]),
    (1, ["--open", "data=/"]),
    (2, ["--memfd", "m=much"]),
    (2, ["--memfd", "m=16777216T"]),
    (2, ["--fd", "x=stdin"]),
    (1, ["--fd", "x=99"]),
    (1, ["--config", "none.toml"]),
    (1, ["--config", "bad.toml"]),
    (1, ["--config", "folder.toml"]),
    (1, ["--check", "--config", "bad.toml"]),
    (2, ["--check", "--listen", "web=http", "--config", "f.toml"]),
    (1, ["--socket", ""]),
    (2, ["--ready-fd", "99"]),
    (2, ["--ready-fd", "-1"]),
    (2, ["--ready-fd", "99999999999999999999"]),
    (2, ["--owner-fd", "99"]),
]
MISUSED = [  # which argparse finds
    ["--drain", "soon"],
    ["--drain", "-1"],
    ["--drain", "nan"],
    ["--ready-fd", "x"],
    ["--config"],
    ["--check"],
    ["--no-such-option"],
    ["word"],
]


@pytest.mark.parametrize(
    ("status", "arguments"), BAD_OPTIONS, ids=[" ".join(words) for _, words in BAD_OPTIONS]
)
def test_a_bad_option_is_one_line(tmp_path, status, arguments):
    (tmp_path / "f.toml").write_text(TOML)
    (tmp_path / "bad.toml").write_text(TOML + "listne = 1\n")
    (tmp_path / "folder.toml").write_text("[entry.data]\nopen = '/'\n")
    done = run("serve", "--socket", tmp_path / "folder" / "s", *arguments, cwd=tmp_path)
    assert done.returncode == status
    assert done.stdout == ""
    assert done.stderr.startswith("fdbroker: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "folder" / "s").exists()


def test_what_cannot_be_kept_is_said_with_its_kind_and_its_name(tmp_path):
    done = run("serve", "--socket", tmp_path / "s", "--open", "data=/")
    assert "kind directory" in done.stderr
    assert "put the files in it" in done.stderr
    assert "(entry \"data\": open '/')" in done.stderr


@pytest.mark.parametrize("arguments", MISUSED, ids=" ".join)
def test_misuse_is_said(tmp_path, arguments):
    done = run("serve", "--socket", tmp_path / "s", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fdbroker: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_what_fails_to_open_leaves_nothing_of_the_others(tmp_path):
    arguments = ["--listen", f"a=unix:{tmp_path}/a", "--listen", "b=unix:/none/such/b"]
    done = run("serve", "--socket", tmp_path / "s", *arguments)
    assert done.returncode == 1
    assert 'entry "b"' in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["s.lock"]


def test_groups_by_name(tmp_path):
    name = grp.getgrgid(os.getegid()).gr_name
    (tmp_path / "f.toml").write_text(f"[server]\ngroup = '{name}'\n")
    with served(tmp_path, "--config", tmp_path / "f.toml") as broker:
        assert os.stat(broker.address).st_gid == os.getegid()


@pytest.mark.parametrize("count", [1000])
def test_many_entries_start_soon(tmp_path, count):
    (tmp_path / "f.toml").write_text(
        "".join(f"[entry.e{index}]\nmemfd = 4096\n" for index in range(count))
    )
    with served(tmp_path, "--config", tmp_path / "f.toml") as broker:
        assert len(broker.entries()) == count


@pytest.mark.parametrize("reads", [False, True])
def test_nobody_is_waited_for_who_was_to_be_told_that_it_is_ready(tmp_path, reads):
    """Its pipe is full, or nobody has the other end: it serves all the same, and says so."""
    reader, told = os.pipe()
    os.set_blocking(told, False)
    with contextlib.suppress(BlockingIOError):
        while reads:
            os.write(told, bytes(65536))
    os.set_blocking(told, True)
    if not reads:
        os.close(reader)
    command = [*COMMAND, "serve", "--socket", f"{tmp_path}/s", "--ready-fd", str(told)]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, pass_fds=[told], stderr=said)
    os.close(told)
    try:
        wait_until(lambda: "ready-not-told" in (tmp_path / "said").read_text())
        with fdbroker.Client(f"{tmp_path}/s") as client:
            client.stats()
        process.terminate()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        if reads:
            os.close(reader)


def test_a_standard_stream_that_was_told_is_never_anything_else(tmp_path):
    """Or what is logged would go to whoever has its number next."""
    reader, told = os.pipe()
    command = [*COMMAND, "-v", "serve", "--socket", f"{tmp_path}/s", "--ready-fd", "2"]
    process = subprocess.Popen(command, stderr=told)
    os.close(told)
    try:
        with open(reader, "rb") as said:
            assert said.read().endswith(b"\n")  # to its end: the broker has let go
        assert os.readlink(f"/proc/{process.pid}/fd/2") == os.devnull
        with fdbroker.Client(f"{tmp_path}/s") as client:
            client.stats()
        process.terminate()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


def test_what_is_handed_over_is_not_what_is_told(tmp_path, sockets):
    serve = f"serve --socket {tmp_path}/s --ready-fd 3"
    script = f"export LISTEN_FDS=1 LISTEN_PID=$$; exec {' '.join(COMMAND)} {serve} 3<&{sockets[0]}"
    command = ["/bin/bash", "-c", script]
    done = subprocess.run(command, pass_fds=[sockets[0]], capture_output=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert b"use another one" in done.stderr


@pytest.mark.parametrize(("said", "arguments"), [("0.1", []), ("1000", ["--drain", "0.1"])])
def test_how_long_it_drains(tmp_path, said, arguments):
    """As the file says, if the option says nothing; a loan is out."""
    (tmp_path / "f.toml").write_text(f"[server]\ndrain = {said}\n[entry.a]\nmemfd = 1\n")
    with (
        served(tmp_path, "--config", tmp_path / "f.toml", *arguments) as broker,
        broker.client.borrow("a"),
    ):
        broker.process.terminate()
        assert broker.process.wait(DRAIN_SECONDS - 2) == 0
