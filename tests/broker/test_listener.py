"""Where the broker listens: nothing but a socket is removed, and nobody else can put one there."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support import in_fork

from fdbroker.errors import AlreadyServing, BadAddress
from fdbroker.ipc.transport.address import PATH_BYTES
from fdbroker.ipc.transport.unix_listener import Listener

from .puppet import is_served


def listening(path: Path) -> contextlib.closing[Listener]:
    return contextlib.closing(Listener(str(path)))


def test_it_is_there_for_its_owner_alone_and_goes_with_it(tmp_path):
    path = tmp_path / "new" / "folder" / "socket"
    with listening(path):
        assert is_served(str(path))
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["socket.lock"]


def test_one_at_a_time(tmp_path):
    path = tmp_path / "socket"
    with listening(path):
        with pytest.raises(AlreadyServing):
            Listener(str(path))
        assert is_served(str(path))
    with listening(path):
        assert is_served(str(path))


def test_a_stale_socket_is_replaced(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with listening(path):
        assert is_served(str(path))


def make_file(path: Path) -> None:
    path.write_text("a thesis")


def make_link(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as elsewhere:
        elsewhere.bind(str(path.with_name("elsewhere")))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("make", [make_file, Path.mkdir, os.mkfifo, make_link])
def test_what_is_no_socket_is_left_alone(tmp_path, make):
    path = tmp_path / "thing"
    make(path)
    before = path.lstat(), os.listdir(tmp_path)
    with pytest.raises(BadAddress, match="is no socket and is left alone"):
        Listener(str(path))
    assert os.path.samestat(path.lstat(), before[0])
    assert os.listdir(tmp_path) == before[1]


def test_the_command_says_so_in_one_line(tmp_path):
    path = tmp_path / "important.txt"
    path.write_text("a thesis")
    command = [sys.executable, "-m", "fdbroker", "serve", "--socket", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("fdbroker: ")
    assert done.stderr.count("\n") == 1
    assert "left alone" in done.stderr
    assert path.read_text() == "a thesis"


def test_at_its_end_it_leaves_alone_what_took_its_place(tmp_path):
    path = tmp_path / "socket"
    with listening(path):
        path.unlink()
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"
    path.unlink()
    with listening(path), socket.socket(socket.AF_UNIX) as other:
        path.unlink()
        other.bind(str(path))
    assert path.is_socket()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o720, 0o777])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path, mode):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(BadAddress, match=f"mode {mode:04o}"):
        Listener(str(folder / "socket"))
    assert os.listdir(folder) == []
    folder.chmod(mode | stat.S_ISVTX)  # as /tmp is
    with listening(folder / "socket"):
        assert is_served(str(folder / "socket"))


def test_a_folder_that_others_can_read_will_do(tmp_path):
    tmp_path.chmod(0o755)
    with listening(tmp_path / "socket"):
        assert is_served(str(tmp_path / "socket"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another uid")
def test_a_folder_of_somebody_else_is_refused(tmp_path):
    os.chown(tmp_path, 65534, -1)
    with pytest.raises(BadAddress, match="belongs to uid 65534"):
        Listener(str(tmp_path / "socket"))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another uid")
def test_a_folder_of_roots_will_do(tmp_path, monkeypatch):
    folder = tmp_path / "roots"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.chdir(folder)  # the folders above are private

    def unprivileged() -> bool:
        os.setuid(65534)
        with listening(Path("socket")):
            return is_served("socket")

    assert in_fork(unprivileged)


def test_a_lock_file_is_not_looked_for_behind_a_link(tmp_path):
    (tmp_path / "socket.lock").symlink_to("made-by-the-broker")
    with pytest.raises(OSError, match="symbolic link"):
        Listener(str(tmp_path / "socket"))
    assert not (tmp_path / "made-by-the-broker").exists()


@pytest.mark.parametrize("path", ["", "a\0b", "/" + "x" * PATH_BYTES])
def test_what_cannot_be_a_path(path):
    with pytest.raises(BadAddress):
        Listener(path)


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_socket_that_another_program_has_is_left_to_it(tmp_path, kind):
    """It knows nothing of our lock: a service manager that holds ours while no broker runs, say."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, kind) as theirs:
        theirs.bind(path)
        if kind != socket.SOCK_DGRAM:
            theirs.listen()
        with pytest.raises(BadAddress, match="another program"):
            Listener(path)
        with socket.socket(socket.AF_UNIX, kind) as client:
            client.connect(path)
