"""The units under a real systemd: socket activation, readiness, reload, restart, names of sockets.

It runs as process 1 of namespaces of its own, by a script that is not part of this project: the
environment variable FDBROKER_SYSTEMD_RIG says where that is, or it is found in a folder above.
`rig start DIR`, `rig run DIR COMMAND...` and `rig stop DIR` do what they say, over DIR/units.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Peer, wait_until

import fdbroker

from .kit import open_for_writing

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "systemd"
ABOVE = [parent / "shared" / "systemd-rig" / "rig" for parent in ROOT.parents]
CAP_NET_BIND_SERVICE = 10
EXPOSURE = 2.0  # at most, as `systemd-analyze security` counts

has_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (Debian: systemd)"
)


# --- the files ---


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", "--no-pager", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@has_analyze
@pytest.mark.parametrize("name", sorted(path.name for path in UNITS.iterdir()))
def test_systemd_finds_nothing_wrong_with_a_unit(name, tmp_path):
    for path in UNITS.iterdir():
        shutil.copy(path, tmp_path)
    done = analyze("verify", tmp_path / name)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    with open(tmp_path / name, "a") as file:
        file.write("[Service]\nNoSuchSetting=yes\n[Socket]\nNoSuchSetting=yes\n")
    assert "NoSuchSetting" in analyze("verify", tmp_path / name).stderr  # it does look


@has_analyze
def test_the_broker_is_confined():
    done = analyze("security", "--offline=true", UNITS / "fdbroker.service")
    (exposure,) = re.findall(r"Overall exposure level for fdbroker.service: ([0-9.]+)", done.stdout)
    assert float(exposure) <= EXPOSURE


# --- the rig ---


class Rig:
    """A systemd with our units, and drop-ins for where this Python is."""

    def __init__(self, script: str, folder: Path) -> None:
        self._script = script
        self.folder = folder
        self.config = folder / "fdbroker.toml"
        self.config.write_text("")
        for path in UNITS.iterdir():
            self.unit(path.name, path.read_text())
        self.drop_in("fdbroker.socket", "[Unit]\nDefaultDependencies=no\n")
        self.drop_in(
            "fdbroker.service",
            f"""[Unit]
                DefaultDependencies=no
                [Service]
                Environment=PATH={Path(sys.executable).parent}:/usr/bin:/bin
                Environment=PYTHONPATH={ROOT} PYTHONWARNINGS=error
                PrivateTmp=no
                ProtectHome=no
                StandardError=append:{folder}/said
                ExecStart=
                ExecStart=/usr/bin/env fdbroker serve --config {self.config} --drain 5
            """,
        )

    def unit(self, name: str, text: str) -> None:
        path = self.folder / "units" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(line.strip() for line in text.splitlines()) + "\n")

    def drop_in(self, name: str, text: str) -> None:
        folder = self.folder / "units" / f"{name}.d"
        folder.mkdir(exist_ok=True)
        (folder / "test.conf").write_text("\n".join(line.strip() for line in text.splitlines()))

    def start(self) -> None:
        with open(self.folder / "starting", "w") as log:
            command = [self._script, "start", str(self.folder)]
            status = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=60
            ).returncode
        assert status == 0, (self.folder / "starting").read_text()
        self._root = f"/proc/{(self.folder / 'leader').read_text().strip()}/root"

    def stop(self) -> None:
        command = [self._script, "stop", str(self.folder)]
        subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)

    def path(self, path: str) -> str:
        """How we see a path of its file system."""
        return self._root + path

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        command = [self._script, "run", str(self.folder), "systemctl", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if check:
            log = (self.folder / "log").read_text()[-5000:]
            assert done.returncode == 0, f"{done.stderr}\n{log}"
        return done.stdout.strip()

    def show(self, unit: str, what: str) -> str:
        return self.systemctl("show", "--value", "-p", what, unit)

    def inside(self, *command: str) -> str:
        run = [self._script, "run", str(self.folder), *command]
        done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout


@pytest.fixture(scope="module")
def booted() -> Iterator[Rig]:
    found = [str(path) for path in ABOVE if path.exists()]
    script = os.environ.get("FDBROKER_SYSTEMD_RIG") or (found or [str(ABOVE[0])])[0]
    if os.geteuid() != 0:
        pytest.skip("a systemd of its own needs root")
    if not os.access(script, os.X_OK):
        pytest.skip(f"no systemd to test with: there is no {script}, and no FDBROKER_SYSTEMD_RIG")
    if not os.access("/lib/systemd/systemd", os.X_OK) or shutil.which("nsenter") is None:
        pytest.skip("no systemd to test with: it needs the packages systemd and util-linux")
    with tempfile.TemporaryDirectory(prefix="fdbroker-rig-") as folder:
        rig = Rig(script, Path(folder))
        try:
            rig.start()
            yield rig
        finally:
            rig.stop()


@pytest.fixture
def rig(booted: Rig) -> Iterator[Rig]:
    """The rig, with nothing running but what a test starts."""
    booted.config.write_text('[entry.memory]\nmemfd = "4K"\n')
    booted.systemctl("start", "fdbroker.socket")
    yield booted
    units = ["fdbroker-exec@web", "fdbroker.socket", "web.socket", "api.socket", "fdbroker"]
    booted.systemctl("stop", *units, check=False)
    booted.systemctl("reset-failed", check=False)
    for name in ("web.socket", "api.socket"):
        (booted.folder / "units" / name).unlink(missing_ok=True)
    booted.systemctl("daemon-reload")


def is_active(rig: Rig) -> bool:
    return rig.show("fdbroker.service", "ActiveState") == "active"


@contextlib.contextmanager
def connected(rig: Rig) -> Iterator[fdbroker.Client]:
    with fdbroker.Client(rig.path("/run/fdbroker/broker.sock")) as client:
        yield client


def names(client: fdbroker.Client) -> set[str]:
    return {entry.name for entry in client.entries() if not entry.retired}


# --- what it does ---


def test_who_connects_starts_it(rig):
    assert not is_active(rig)
    with connected(rig) as client:
        assert names(client) == {"memory"}
        with client.borrow("memory") as loan:
            assert os.fstat(loan.fileno()).st_size == 4096
    assert is_active(rig)
    assert rig.show("fdbroker.service", "StatusText") == "serving 1 entry"
    assert rig.inside("stat", "-c", "%a", "/run/fdbroker/broker.sock").strip() == "600"


def test_it_is_confined_as_the_unit_says(rig):
    rig.systemctl("start", "fdbroker.service")
    status = rig.inside("cat", f"/proc/{rig.show('fdbroker.service', 'MainPID')}/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    for name in ("CapBnd", "CapEff", "CapPrm"):
        assert int(fields[name], 16) == 1 << CAP_NET_BIND_SERVICE
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")


def test_it_is_active_when_it_is_ready_and_not_before(rig):
    """Its configuration is a FIFO: until that is written it cannot be ready."""
    rig.config.unlink()
    os.mkfifo(rig.config)
    rig.systemctl("start", "--no-block", "fdbroker.service")
    fifo = wait_until(lambda: open_for_writing(rig.config))
    assert rig.show("fdbroker.service", "ActiveState") == "activating"
    with open(fifo, "w") as file:
        file.write("[entry.late]\nmemfd = 1\n")
    wait_until(lambda: rig.show("fdbroker.service", "ActiveState") != "activating")
    assert is_active(rig)
    with connected(rig) as client:
        assert names(client) == {"late"}
    rig.config.unlink()


def test_a_start_that_fails_is_said(rig):
    rig.config.write_text("[entry.web]\nlisten = 'http'\n")
    rig.systemctl("start", "fdbroker.service", check=False)
    assert rig.show("fdbroker.service", "ActiveState") != "active"
    assert f"{rig.config}:2: listen is an address" in (rig.folder / "said").read_text()


def test_reload(rig):
    with connected(rig) as client:
        assert names(client) == {"memory"}
        pid = rig.show("fdbroker.service", "MainPID")
        rig.config.write_text("[entry.other]\nmemfd = 1\n[entry.more]\nmemfd = 1\n")
        rig.systemctl("reload", "fdbroker.service")
        wait_until(lambda: names(client) == {"other", "more"})
        status = "serving 2 entries"
        wait_until(lambda: rig.show("fdbroker.service", "StatusText") == status)
        rig.config.write_text("[entry.other]\nmemfd = 'much'\n")
        rig.systemctl("reload", "fdbroker.service")
        failed = f"{status}; the last reload failed: {rig.config}:2: memfd is a size"
        wait_until(lambda: rig.show("fdbroker.service", "StatusText").startswith(failed))
        assert names(client) == {"other", "more"}
        assert is_active(rig)
        assert rig.show("fdbroker.service", "MainPID") == pid


def ask_often(address: str, stop: str) -> dict[str, int]:
    """New sessions, one after the other, until the file `stop` is there: how each came out."""
    outcomes: dict[str, int] = {}
    while not os.path.exists(stop):
        try:
            with fdbroker.Client(address) as client:
                client.stats()
            outcome = "answered"
        except (OSError, fdbroker.errors.FDBrokerError) as error:
            outcome = type(error).__name__
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


def test_a_restart_ends_nobody_who_connects_anew(rig, tmp_path, peer: Peer):
    """The listener is systemd's, so it keeps its queue while there is no broker."""
    address = rig.path("/run/fdbroker/broker.sock")
    with connected(rig) as client:
        client.stats()
    before = os.stat(address)
    pids = {rig.show("fdbroker.service", "MainPID")}
    peer.start(ask_often, address, str(tmp_path / "stop"))
    for _ in range(3):
        rig.systemctl("restart", "fdbroker.service")
        pids.add(rig.show("fdbroker.service", "MainPID"))
    (tmp_path / "stop").touch()
    outcomes = peer.result()
    assert len(pids) == 4
    print(outcomes)
    assert outcomes.pop("answered") > 10
    # in the middle of a request the old broker may end: that is told, and no refusal
    assert outcomes.keys() <= {"BrokerGone", "BrokerClosing"}
    assert os.path.samestat(os.stat(address), before)


def test_who_connects_after_its_end_starts_it_again(rig):
    for _ in range(2):
        with connected(rig) as client:
            assert names(client) == {"memory"}
        rig.systemctl("stop", "fdbroker.service")
        assert not is_active(rig)
        assert os.path.exists(rig.path("/run/fdbroker/broker.sock"))


def test_a_killed_one_is_followed_by_another(rig):
    with connected(rig) as client:
        client.stats()
        pid = rig.show("fdbroker.service", "MainPID")
        rig.systemctl("kill", "--signal=KILL", "fdbroker.service")
        wait_until(lambda: rig.show("fdbroker.service", "MainPID") not in ("0", pid))
    with connected(rig) as client:
        assert names(client) == {"memory"}


def inode(client: fdbroker.Client, name: str) -> int:
    with client.borrow(name) as loan:
        return os.fstat(loan.fileno()).st_ino


WEB_SOCKET = """[Unit]
    DefaultDependencies=no
    [Socket]
    ListenStream=/run/web.sock
    FileDescriptorName=web
    Service=fdbroker.service
"""
SERVER = """
import os, socket, sys

with socket.socket(fileno=int(sys.argv[1])) as listener:
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(str(os.getpid()).encode())
"""


def test_a_server_behind_exec_is_restarted_and_so_is_the_broker_under_it(rig):
    """The template for a server, whose socket systemd holds: nobody is refused by either."""
    rig.unit("web.socket", WEB_SOCKET)
    (rig.folder / "server.py").write_text(SERVER)
    command = f"{sys.executable} {rig.folder}/server.py {{web}}"
    (rig.folder / "web.env").write_text(f"BORROW=--fd web\nCOMMAND={command}\n")
    rig.drop_in(
        "fdbroker-exec@.service",
        f"""[Unit]
            DefaultDependencies=no
            [Service]
            Environment=PATH={Path(sys.executable).parent}:/usr/bin:/bin
            Environment=PYTHONPATH={ROOT}
            EnvironmentFile=
            EnvironmentFile={rig.folder}/%i.env
        """,
    )
    rig.systemctl("daemon-reload")
    rig.systemctl("start", "web.socket", "fdbroker-exec@web.service")

    def answer() -> str:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(60)
            sock.connect(rig.path("/run/web.sock"))
            return sock.recv(99).decode()

    first = answer()
    with connected(rig) as client:
        (loan,) = client.loans("web")
        assert str(loan.pid) == rig.show("fdbroker-exec@web.service", "MainPID") == first
    rig.systemctl("restart", "fdbroker-exec@web.service")
    second = answer()
    assert second != first
    rig.systemctl("restart", "fdbroker.service")  # the server has its copy, and goes on
    assert answer() == second
    rig.systemctl("restart", "fdbroker-exec@web.service")
    assert answer() not in (first, second)
    rig.systemctl("stop", "fdbroker-exec@web.service")


def test_sockets_that_are_handed_over_are_entries_by_name(rig):
    rig.unit("web.socket", WEB_SOCKET)
    rig.unit(
        "api.socket",
        """[Unit]
        DefaultDependencies=no
        [Socket]
        ListenStream=/run/api.sock
        Service=fdbroker.service
        """,
    )
    rig.systemctl("daemon-reload")
    rig.systemctl("start", "web.socket", "api.socket")
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(rig.path("/run/web.sock"))  # it starts the broker, and waits in the queue
        with connected(rig) as client:
            assert names(client) == {"memory", "web", "api.socket"}
            kinds = {entry.name: (entry.kind, entry.where) for entry in client.entries()}
            assert kinds["web"] == ("listening socket", "unix:/run/web.sock")
            before = inode(client, "web"), inode(client, "api.socket")
        rig.systemctl("restart", "fdbroker.service")
        with connected(rig) as client:
            assert (inode(client, "web"), inode(client, "api.socket")) == before
            with client.borrow("web") as loan, loan.as_socket() as listener:
                accepted, _ = listener.accept()  # the one from before the restart
                with accepted:
                    accepted.sendall(b"at last")
        assert waiting.recv(99) == b"at last"
