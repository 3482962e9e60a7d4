"""Descriptors made from words: each form, as the kernel sees what came of it; each bad word; and
that nothing is left of what failed."""

from __future__ import annotations

import errno
import os
import socket
import stat
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from fcntl import F_GETFD, F_GETFL, FD_CLOEXEC, LOCK_EX, fcntl, flock
from pathlib import Path

import pytest
from support import Peer, in_fork, open_files, start_fork

from fdbroker import openers
from fdbroker.errors import BadResource

ABSTRACT = f"fdbroker-test-{uuid.uuid4()}"


@contextmanager
def made(how: str, what: str) -> Iterator[int]:
    """What is made, which must be close-on-exec and blocking."""
    number = openers.make(how, what)
    try:
        assert fcntl(number, F_GETFD) & FD_CLOEXEC
        assert not fcntl(number, F_GETFL) & os.O_NONBLOCK
        yield number
    finally:
        os.close(number)


@contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    """The socket that is made, to be asked questions."""
    with made("listen", address) as number, socket.socket(fileno=os.dup(number)) as sock:
        yield sock


def accepts(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# --- ports -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "family", "host"),
    [
        ("0", socket.AF_INET, "127.0.0.1"),
        ("127.0.0.1:0", socket.AF_INET, "127.0.0.1"),
        ("127.0.0.2:0", socket.AF_INET, "127.0.0.2"),
        ("0.0.0.0:0", socket.AF_INET, "0.0.0.0"),
        ("[::]:0", socket.AF_INET6, "::"),
        ("[::1]:0", socket.AF_INET6, "::1"),
        (":0", socket.AF_INET6, "::"),
    ],
)
@pytest.mark.parametrize("udp", [False, True])
def test_a_port(address: str, family: int, host: str, udp: bool) -> None:
    with listening("udp:" + address if udp else address) as sock:
        assert (sock.family, sock.getsockname()[0]) == (family, host)
        assert sock.type == (socket.SOCK_DGRAM if udp else socket.SOCK_STREAM)
        assert accepts(sock) is not udp
        assert sock.getsockname()[1] > 0


def test_a_port_alone_is_that_port_on_the_loopback() -> None:
    port = free_port()
    with listening(str(port)) as sock:
        assert sock.getsockname() == ("127.0.0.1", port)
        socket.create_connection(("127.0.0.1", port)).close()


def test_localhost_is_one_of_its_addresses() -> None:
    with listening("localhost:0") as sock:
        assert sock.getsockname()[0] in ("127.0.0.1", "::1")


def test_all_addresses_are_those_of_both_families() -> None:
    with listening(":0") as sock:
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, sock.getsockname()[1])).close()


def test_all_addresses_take_datagrams_of_both_families() -> None:
    with listening("udp::0") as sock:
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with socket.socket(family, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"x", (host, sock.getsockname()[1]))
                assert sock.recv(9) == b"x"


def test_without_the_other_family_all_addresses_are_those_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with listening(":0") as sock:
        assert sock.getsockname()[0] == "0.0.0.0"


@pytest.mark.parametrize("prefix", ["", "udp:"])
def test_a_port_that_is_taken(prefix: str) -> None:
    with listening(f"{prefix}127.0.0.1:0") as sock:
        before = open_files()
        with pytest.raises(OSError, match="in use") as caught:
            openers.make("listen", f"{prefix}127.0.0.1:{sock.getsockname()[1]}")
        assert caught.value.errno == errno.EADDRINUSE
        assert open_files() == before


def test_a_port_whose_last_connection_lingers_is_taken_again() -> None:
    """TIME_WAIT: the end that closes first is in it (socket(7), SO_REUSEADDR)."""
    with listening("127.0.0.1:0") as sock:
        port = sock.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            sock.accept()[0].close()
            assert client.recv(1) == b""
    with listening(f"127.0.0.1:{port}"):
        pass


# --- Unix sockets ----------------------------------------------------------------------------


@pytest.mark.parametrize("udp", [False, True])
def test_a_path(tmp_path: Path, udp: bool) -> None:
    path = tmp_path / "s"
    with listening(f"{'udp:' * udp}unix:{path}") as sock:
        assert sock.getsockname() == str(path)
        assert accepts(sock) is not udp
        assert stat.S_ISSOCK(path.stat().st_mode)
        with socket.socket(socket.AF_UNIX, sock.type) as client:
            client.connect(str(path))
    assert os.listdir(tmp_path) == ["s"], "something was left beside it"


@pytest.mark.parametrize("udp", [False, True])
def test_an_abstract_name(udp: bool) -> None:
    with listening(f"{'udp:' * udp}unix:@{ABSTRACT}") as sock:
        assert sock.getsockname() == b"\0" + ABSTRACT.encode()
        assert accepts(sock) is not udp
        with pytest.raises(OSError, match="in use"):
            openers.make("listen", f"{'udp:' * udp}unix:@{ABSTRACT}")


@pytest.mark.parametrize("udp", [False, True])
def test_a_stale_socket_is_replaced(tmp_path: Path, udp: bool) -> None:
    address = f"{'udp:' * udp}unix:{tmp_path / 's'}"
    with listening(address):
        pass
    inode = (tmp_path / "s").stat().st_ino, (tmp_path / "s").stat().st_ctime_ns
    with listening(address) as sock:
        assert inode != ((tmp_path / "s").stat().st_ino, (tmp_path / "s").stat().st_ctime_ns)
        with socket.socket(socket.AF_UNIX, sock.type) as client:
            client.connect(str(tmp_path / "s"))


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
@pytest.mark.parametrize("udp", [False, True])
def test_a_live_socket_is_left_alone(tmp_path: Path, kind: socket.SocketKind, udp: bool) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, kind) as live:
        live.bind(path)
        if kind != socket.SOCK_DGRAM:
            live.listen(0)
        before = open_files()
        for _ in range(3):  # its backlog fills: it is no staler for that
            with pytest.raises(OSError, match="in use") as caught:
                openers.make("listen", f"{'udp:' * udp}unix:{path}")
            assert caught.value.errno == errno.EADDRINUSE
        assert open_files() == before
        with socket.socket(socket.AF_UNIX, kind) as client:
            client.setblocking(False)
            try:
                client.connect(path)
            except BlockingIOError:
                assert kind != socket.SOCK_DGRAM


@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, what: str) -> None:
    path = tmp_path / "s"
    if what == "file":
        path.write_text("mine")
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(OSError, match="in use"):
        openers.make("listen", f"unix:{path}")
    assert path.is_dir() or path.is_symlink() or path.read_text() == "mine"


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with listening("unix:s"):
        assert os.listdir() == ["s"]


def test_a_folder_that_is_missing_or_not_ours_to_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        openers.make("listen", f"unix:{tmp_path}/none/s")
    if os.geteuid() == 0:
        tmp_path.chmod(0o711)

        def listen_as_nobody() -> str:
            os.setuid(65534)
            try:
                openers.make("listen", f"unix:{tmp_path}/s")
            except OSError as error:
                return errno.errorcode[error.errno or 0]
            return "none"

        assert in_fork(listen_as_nobody) == "EACCES"


def test_a_lock_that_another_has_on_the_folder_only_delays(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    flock(folder, LOCK_EX)
    with listening(f"unix:{tmp_path}/s"):
        pass
    os.close(folder)


def bind_if_first(path: str, go: int, tried: int, stay: int) -> bool:
    """Whether this process was it; then a client of that path must come to its own socket."""
    os.read(go, 1)
    try:
        number = openers.make("listen", f"unix:{path}")
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        number = -1
    os.write(tried, b".")
    os.read(stay, 1)  # the winner closes nothing before all have tried
    if number < 0:
        return False
    with socket.socket(fileno=number) as mine, socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        mine.settimeout(0)
        mine.accept()[0].close()
    return True


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_has_the_path(tmp_path: Path, stale: bool) -> None:
    for number in range(3):
        path = str(tmp_path / str(number))
        if stale:
            with listening(f"unix:{path}"):
                pass
        (go, say_go), (see, tried), (stay, leave) = os.pipe(), os.pipe(), os.pipe()

        def race(path: str = path, pipes: tuple[int, ...] = (go, tried, stay, leave)) -> bool:
            os.close(pipes[3])
            return bind_if_first(path, *pipes[:3])

        racers = [start_fork(race) for _ in range(8)]
        os.write(say_go, b"x" * 8)
        for _ in racers:
            os.read(see, 1)
        os.close(leave)
        assert sorted(wait() for wait in racers) == [False] * 7 + [True]
        for end in (go, say_go, see, tried, stay):
            os.close(end)


def test_a_socket_that_does_not_listen_yet_is_not_taken_for_a_stale_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process is halted between bind and listen, until the other waits for its turn."""
    (bound, say_bound), (go, say_go), (end, say_end) = os.pipe(), os.pipe(), os.pipe()
    address = f"unix:{tmp_path}/s"

    def be_slow() -> bool:
        def listen(sock: socket.socket) -> None:
            os.write(say_bound, b".")
            os.read(go, 1)
            sock.listen()

        monkeypatch.setattr(openers, "_listen", listen)
        with listening(address) as sock:
            os.read(end, 1)  # the other has tried
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / "s"))
                sock.settimeout(0)
                sock.accept()[0].close()
        return True

    wait = start_fork(be_slow)
    os.read(bound, 1)
    monkeypatch.setattr(openers, "sleep", lambda seconds: os.write(say_go, b"."))
    monkeypatch.setattr(openers, "TURN_SECONDS", 20.0)
    try:
        with pytest.raises(OSError, match="in use"):
            openers.make("listen", address)
    finally:
        os.write(say_go, b".")
        os.write(say_end, b".")
        assert wait()
        for number in (bound, say_bound, go, say_go, end, say_end):
            os.close(number)


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("", os.O_RDONLY),
        (":r", os.O_RDONLY),
        (":rw", os.O_RDWR),
        (":a", os.O_WRONLY | os.O_APPEND),
    ],
)
def test_modes(tmp_path: Path, mode: str, flags: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with made("open", f"{path}{mode}") as number:
        assert fcntl(number, F_GETFL) & (os.O_ACCMODE | os.O_APPEND) == flags
        assert os.path.samestat(os.fstat(number), path.stat())
    assert path.read_bytes() == b"before", "nothing is cut off"


@pytest.mark.parametrize("mode", ["rw", "a"])
def test_a_file_to_write_is_made(tmp_path: Path, mode: str) -> None:
    umask = os.umask(0o027)
    try:
        with made("open", f"{tmp_path}/new:{mode}") as number:
            assert stat.S_IMODE(os.fstat(number).st_mode) == 0o640
            os.write(number, b"x")
    finally:
        os.umask(umask)


@pytest.mark.parametrize("mode", ["", ":r"])
def test_a_file_to_read_is_not_made(tmp_path: Path, mode: str) -> None:
    with pytest.raises(FileNotFoundError):
        openers.make("open", f"{tmp_path}/new{mode}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", ["rw", "a"])
def test_a_missing_device_is_not_made(mode: str) -> None:
    path = f"/dev/{ABSTRACT}"
    with pytest.raises(FileNotFoundError):
        openers.make("open", f"{path}:{mode}")
    assert not os.path.exists(path)


def test_a_file_in_dev_shm_is_made() -> None:
    path = f"/dev/shm/{ABSTRACT}"
    with made("open", f"{path}:rw"):
        os.unlink(path)


def test_names_with_colons(tmp_path: Path) -> None:
    for name in ("a:b", "a:x", "a:"):
        (tmp_path / name).touch()
        with made("open", f"{tmp_path}/{name}") as number:
            assert os.readlink(f"/proc/self/fd/{number}") == f"{tmp_path}/{name}"
    (tmp_path / "a:r").touch()
    with made("open", f"{tmp_path}/a:r:rw") as number:
        assert os.readlink(f"/proc/self/fd/{number}") == f"{tmp_path}/a:r"


def test_a_fifo_without_its_other_end_is_not_waited_for(tmp_path: Path, peer: Peer) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert peer.call(open_a_fifo, str(tmp_path / "fifo")) is True
    with pytest.raises(OSError, match="No such device") as caught:
        openers.make("open", f"{tmp_path}/fifo:a")
    assert caught.value.errno == errno.ENXIO


def open_a_fifo(path: str) -> bool:
    with made("open", f"{path}:r"), made("open", f"{path}:rw"), made("open", f"{path}:a"):
        return True


def test_a_terminal_does_not_become_this_process_s_own() -> None:
    leader, follower = os.openpty()
    with closing(os.fdopen(leader)), closing(os.fdopen(follower)):
        path = os.ttyname(follower)

        def open_it_alone() -> bool:
            os.setsid()  # a session leader without a terminal gets the one it opens, open(2)
            with made("open", f"{path}:rw"):
                try:
                    os.close(os.open("/dev/tty", os.O_RDONLY))
                except OSError as error:
                    return error.errno == errno.ENXIO
            return False

        assert in_fork(open_it_alone)


# --- memory and numbers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "size"),
    [
        ("0", 0),
        ("1", 1),
        ("4096", 4096),
        ("64K", 2**16),
        ("16M", 2**24),
        ("1G", 2**30),
        ("2T", 2**41),
    ],
)
def test_sizes(word: str, size: int) -> None:
    with made("memfd", word) as number:
        assert os.fstat(number).st_size == size
        assert os.fstat(number).st_mode & 0o666 == 0o644
        assert os.pread(number, 9, 0) == bytes(min(size, 9))
        fcntl(number, 1033, 2)  # F_ADD_SEALS, F_SEAL_SHRINK (fcntl(2)): it can be sealed
        with pytest.raises(PermissionError) if size else memoryview(b""):
            os.ftruncate(number, 0)


def test_a_number_is_duplicated(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file, made("fd", str(file.fileno())) as number:
        assert number != file.fileno()
        assert number > 2
        assert os.path.sameopenfile(number, file.fileno())


def test_a_number_that_is_closed() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    with pytest.raises(OSError, match="Bad file descriptor"):
        openers.make("fd", str(reader))


# --- what is none ----------------------------------------------------------------------------

LONG = "9" * 5000  # more digits than int() takes
BAD = {
    "listen": [
        *("", ":", "::", "udp:", "unix:", "udp:unix:", "unix:@", "unix:a\0b", "unix", "web", "-1"),
        *("65536", "80.", " 80", "+80", "8_0", "\u0663", "http://x:80", "x:http", ":65536", LONG),
        *("[::1]", "[::1", "[]:80", "[127.0.0.1]:80", "[::1:80", "::1]:80", "::1:80", ":::80"),
        *("no such host:80", "a..b:80", "a\0b:80", f"{'x' * 300}:80", "\ud800:80", "[::zz]:80"),
        *("1.2.3.4.5:80", f"unix:/{'x' * 108}", f"unix:@{'x' * 108}", "udp:udp:80"),
    ],
    "open": ["", ":r", ":rw", ":a", "a\0b", "a\0b:rw"],
    "memfd": [
        *("", "K", "much", "-1", "+1", "1.5M", "1k", "1KB", "1MK", "K1", " 1", "1 ", "0x10", "1_0"),
        *("\u0663", str(2**63), f"{2**53}K", f"{2**23}T", LONG, LONG + "K"),
    ],
    "fd": ["", "stdin", "-1", "+1", "1.0", " 1", "1_0", "\u0663", str(2**31), LONG],
}


@pytest.mark.parametrize(("how", "word"), [(how, word) for how in BAD for word in BAD[how]])
def test_a_bad_word(how: str, word: str) -> None:
    before = open_files()
    with pytest.raises(BadResource) as caught:
        openers.make(how, word)
    assert open_files() == before
    assert caught.value.data[:2] == (how, word)
    assert str(caught.value).isprintable()


RESOLVED = {  # what only the resolver and the kernel know
    *("no such host:80", "a..b:80", "a\0b:80", f"{'x' * 300}:80", "\ud800:80", "[::zz]:80"),
    *("1.2.3.4.5:80", f"unix:/{'x' * 108}", f"unix:@{'x' * 108}", "udp:udp:80"),
}


@pytest.mark.parametrize(
    ("how", "word"),
    [(how, word) for how in BAD for word in BAD[how] if word not in RESOLVED],
)
def test_a_bad_word_is_known_before_anything_is_opened(how: str, word: str) -> None:
    with pytest.raises(BadResource) as caught:
        openers.check(how, word)
    assert caught.value.data[:2] == (how, word)


@pytest.mark.parametrize(
    ("how", "word"),
    [
        *(("listen", "80"), ("listen", "udp:[::]:80"), ("listen", "unix:@a"), ("listen", ":80")),
        *(("open", "/none/a:rw"), ("memfd", "16M"), ("fd", "1000")),
    ],
)
def test_good_words_open_nothing_when_checked(how: str, word: str) -> None:
    before = open_files()
    openers.check(how, word)
    assert open_files() == before


def test_what_cannot_be_listened_at_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(sock: socket.socket) -> None:
        raise OSError(errno.ENOBUFS, "none left")

    monkeypatch.setattr(openers, "_listen", refuse)
    before = open_files()
    for address in (f"unix:{tmp_path}/s", f"unix:@{ABSTRACT}", "127.0.0.1:0"):
        with pytest.raises(OSError, match="none left"):
            openers.make("listen", address)
    assert (open_files(), os.listdir(tmp_path)) == (before, [])


def test_a_memfd_larger_than_the_limit_of_a_file_leaves_nothing() -> None:
    def make_it_limited() -> bool:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        before = open_files()
        with pytest.raises(OSError, match="File too large"):
            openers.make("memfd", "4097")
        return open_files() == before

    assert in_fork(make_it_limited)


# --- discarding ------------------------------------------------------------------------------


def test_what_nobody_took_is_gone(tmp_path: Path) -> None:
    before = open_files()
    for how, what in [
        ("listen", f"unix:{tmp_path}/s"),
        ("listen", f"udp:unix:{tmp_path}/s"),
        ("listen", f"unix:@{ABSTRACT}"),
        ("listen", "0"),
        ("memfd", "1"),
    ]:
        openers.discard(how, openers.make(how, what))
    assert (open_files(), os.listdir(tmp_path)) == (before, [])


def test_what_was_somebody_s_own_stays(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with listening(f"unix:{path}") as sock:
        openers.discard("fd", openers.make("fd", str(sock.fileno())))
        assert os.path.exists(path)
    (tmp_path / "file").touch()
    openers.discard("open", openers.make("open", str(tmp_path / "file")))
    assert (tmp_path / "file").exists()
