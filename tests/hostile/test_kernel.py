"""What the kernel really does, in the cases of the design that no other test asks it about."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
from pathlib import Path

import pytest
from support import Raw, in_fork, open_files

import fdbroker
from fdbroker.ipc.transport import unix_socket
from fdbroker.ipc.transport.received import ReceivedFDs

PACKAGE = Path(fdbroker.__file__).parent


@pytest.mark.parametrize(("sent", "installed"), [(1, 1), (2, 2), (3, 2), (253, 2)])
def test_a_control_buffer_that_is_too_small(sent: int, installed: int) -> None:
    """Room for one number is room for two (CMSG_SPACE rounds up); what fits is installed and owned,
    the rest is closed, and MSG_CTRUNC says so."""
    before = open_files()
    reader, writer = os.pipe()
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        socket.send_fds(one, [b"x"], [writer] * sent)
        os.close(writer)
        received = ReceivedFDs()
        room = socket.CMSG_SPACE(struct.calcsize("i"))
        assert received.receive_exactly(other, 1, room, unix_socket.RECEIVE) == (b"x", True)
        assert (len(received.fds), received.truncated) == (installed, sent > installed)
        assert all(not os.get_inheritable(number) for number in received.fds)
        received.close()
    assert os.read(reader, 1) == b""  # nobody has it
    os.close(reader)
    assert open_files() == before


def test_nothing_is_peeked_at() -> None:
    """MSG_PEEK would install descriptors each time."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        socket.send_fds(one, [b"x"], [0])
        numbers = []
        for flags in (socket.MSG_PEEK, socket.MSG_PEEK, 0):
            _, [(_, _, data)], _, _ = other.recvmsg(1, 24, flags | unix_socket.RECEIVE)
            numbers += struct.unpack("i", data)
    assert len(set(numbers)) == 3
    for number in numbers:
        os.close(number)
    sources = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    assert not [path for path, text in sources.items() if "PEEK" in text]
    # socket.recv_fds passes on no flags before Python 3.12: what it receives is inherited
    assert not [path for path, text in sources.items() if re.search(r"\brecv_fds\(", text)]


def test_a_plain_receive_discards_descriptors() -> None:
    """So the broker receives plainly only where the kernel takes none."""
    reader, writer = os.pipe()
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        socket.send_fds(one, [b"x"], [writer])
        os.close(writer)
        assert other.recv(1) == b"x"
        assert os.read(reader, 1) == b""
    os.close(reader)


# --- what a loan shares with its owner ------------------------------------------------------------


def test_a_borrowers_settimeout_is_the_owners(broker: fdbroker.Broker) -> None:
    """O_NONBLOCK is of the description, as is the offset (tests/ipc/test_read_only.py)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(True)
        broker.put("server", server)
        with broker.borrow("server") as loan, loan.as_socket() as sock:
            assert os.get_blocking(server.fileno())
            sock.settimeout(1)
            assert not os.get_blocking(server.fileno())


def test_a_borrowers_shutdown_of_a_listener_is_everybodys(broker: fdbroker.Broker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        broker.put("server", server)
        address = server.getsockname()
        socket.create_connection(address).close()
        with broker.borrow("server") as loan, loan.as_socket() as sock:
            sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)


def test_flock_follows_the_description(broker: fdbroker.Broker, tmp_path: Path) -> None:
    """A borrower's unlock frees the owner's: no lock for who lends its file."""
    path = tmp_path / "lock"
    with open(path, "w") as owner, open(path) as other:
        broker.put("lock", owner)
        fcntl.flock(owner, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with broker.borrow("lock") as loan:
            fcntl.flock(loan.fileno(), fcntl.LOCK_UN)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_posix_locks_are_dropped_by_any_close_of_the_process(
    broker: fdbroker.Broker, tmp_path: Path
) -> None:
    """The broker has none, and its closes free nobody's; but the return of a loan frees all that
    the borrower had on that file."""

    def is_locked() -> bool:
        with open(path, "r+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    path = tmp_path / "lock"
    with open(path, "w+") as owner:
        broker.put("lock", owner)
        fcntl.lockf(owner, fcntl.LOCK_EX)
        assert in_fork(is_locked)
        broker.put("again", owner)
        broker.retire("again", wait=True)  # the broker closes one of it
        assert in_fork(is_locked)
        loan = broker.borrow("lock")
        assert in_fork(is_locked)
        loan.close()
        assert not in_fork(is_locked)


def test_a_read_only_loan_of_a_memfd_can_be_opened_for_writing(broker: fdbroker.Broker) -> None:
    """By who owns it or is root, through /proc: a mode does not protect it, a seal does."""
    number = os.memfd_create("memory", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(number, b"before")
    broker.put("memory", number)
    with broker.borrow("memory", mode="r") as loan:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(loan.fileno(), b"x")
        wide = os.open(f"/proc/self/fd/{loan.fileno()}", os.O_RDWR)
        os.pwrite(wide, b"AFTER!", 0)
        assert os.pread(number, 6, 0) == b"AFTER!"
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with pytest.raises(PermissionError):
            os.pwrite(wide, b"x", 0)
        os.close(wide)
    os.close(number)


def test_an_empty_packet_looks_like_the_end(broker: fdbroker.Broker) -> None:
    """So it is one: nobody sends any but to end."""
    with Raw(broker.address) as raw:
        raw.send_bytes(b"")
        assert raw.receive() == (None, [])
