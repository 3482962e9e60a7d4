"""Topic `peers`: other ways to come to a descriptor, each until it is closed again, against ours.

None of them counts what it lends or knows when it comes back, but ours; what each does, and what it
is used for, is in the table below.  A peer that is not installed is left out aloud.

    os.open by path             what one does who may
    os.dup                      what one does who has it
    base                        see base.py
    socket.send_fds             one request, one socket.recv_fds, no return
    send_handle                 multiprocessing.reduction: by one connection of a Pipe
    DupFd                       the same: pickled, fetched from the sharer's listening socket
    Pool.apply                  a socket is the argument of a call, which closes it
    s6-fdholderd                its protocol, spoken from Python over a connection that is kept
    s6-fdholder-retrieve        its program, which becomes `true`
    D-Bus                       a method call by way of dbus-daemon, from jeepney to jeepney
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd, recv_handle, send_handle
from pathlib import Path
from typing import Any

from benchmarks.base import BASE, BASE_C, C_CHECK, lent_file
from benchmarks.cycle import borrow
from benchmarks.harness import FAREWELL, Run, Topic, Unavailable, Variant, child, needs
from benchmarks.rc import duplicated
from benchmarks.subjects import KEPT, S6, missing

NAME = "org.example.Lender"
OBJECT = "/org/example/Lender"
BUS = """<busconfig><type>session</type><listen>unix:path={0}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*"/><allow own="*"/><allow receive_sender="*"/>
</policy></busconfig>"""


# --- without another process -----------------------------------------------------------------


@contextmanager
def opened() -> Iterator[Run]:
    with tempfile.NamedTemporaryFile() as file:

        def run(n: int) -> None:
            path, flags = file.name, os.O_RDWR | os.O_CLOEXEC
            for _ in range(n):
                os.close(os.open(path, flags))

        yield run


# --- from one process to another -------------------------------------------------------------


@contextmanager
def send_fds() -> Iterator[Run]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs, lent_file() as file:
        numbers = theirs.fileno(), file.fileno()
        command = [sys.executable, "-m", "benchmarks.peers", "send_fds", *map(str, numbers)]
        with child(command, pass_fds=numbers), ours:
            theirs.close()

            def run(n: int) -> None:
                for _ in range(n):
                    ours.send(b"x")
                    _, [number], _, _ = socket.recv_fds(ours, 1, 1)
                    os.close(number)

            yield run


def serve_send_fds(number: int, fd: int) -> None:
    with socket.socket(fileno=number) as sock:
        while sock.recv(1):
            socket.send_fds(sock, [b"x"], [fd])


@contextmanager
def process(serve: Any, *about: Any) -> Iterator[Connection]:
    """The other end of a Pipe has `serve(connection, *about)`, in a fork; it ends with the Pipe."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=serve, args=(ours, theirs, *about))
    worker.start()
    theirs.close()
    try:
        with ours:
            yield ours
    finally:
        try:
            worker.join(FAREWELL)
        finally:
            worker.kill()
            worker.join()


@contextmanager
def handles() -> Iterator[Run]:
    with lent_file() as file, process(serve_handles, file.fileno()) as connection:

        def run(n: int) -> None:
            for _ in range(n):
                connection.send_bytes(b"x")
                os.close(recv_handle(connection))

        yield run


def serve_handles(other: Connection, connection: Connection, fd: int) -> None:
    other.close()
    with suppress(EOFError):
        while connection.recv_bytes():
            send_handle(connection, fd, os.getppid())


@contextmanager
def dup_fd() -> Iterator[Run]:
    with lent_file() as file, process(serve_dup_fd, file.fileno()) as connection:

        def run(n: int) -> None:
            for _ in range(n):
                connection.send_bytes(b"x")
                os.close(connection.recv().detach())

        yield run


def serve_dup_fd(other: Connection, connection: Connection, fd: int) -> None:
    other.close()
    with suppress(EOFError):
        while connection.recv_bytes():
            connection.send(DupFd(fd))


@contextmanager
def pool_apply() -> Iterator[Run]:
    """In a process of its own: a Pool has threads, which would slow down the other variants."""
    with process(apply_in_pool) as connection:

        def run(n: int) -> None:
            connection.send(n)
            connection.recv()

        yield run


def apply_in_pool(other: Connection, connection: Connection) -> None:
    other.close()
    with multiprocessing.get_context("fork").Pool(1) as pool, socket.socket() as sock:
        with suppress(EOFError):
            while True:
                for _ in range(connection.recv()):
                    pool.apply(socket.socket.close, (sock,))
                connection.send(None)
        pool.close()
        pool.join()


# --- by a third process ----------------------------------------------------------------------


@contextmanager
def holder(names: Sequence[str] = KEPT) -> Iterator[S6]:
    if without := missing():
        raise Unavailable(f"no {', '.join(without)}: apt-get install s6")
    with S6(limit=4096, names=names) as s6:
        yield s6


@contextmanager
def s6_kept(idle: int = 0, names: Sequence[str] = KEPT) -> Iterator[Run]:
    """Over a connection that is kept, beside others that are idle."""
    with holder(names) as s6, ExitStack() as stack:
        for _ in range(idle):
            stack.enter_context(s6.connect(os.geteuid()))
        sock = stack.enter_context(s6.connect(os.geteuid()))
        sock.settimeout(None)
        request, space = s6.asks(0, "kept0"), socket.CMSG_SPACE(4)

        def run(n: int) -> None:
            cloexec = socket.MSG_CMSG_CLOEXEC
            for _ in range(n):
                sock.send(request)
                _, [(_, _, rights)], _, _ = sock.recvmsg(100, space, cloexec)
                os.close(int.from_bytes(rights, "little"))

        yield run


@contextmanager
def s6_retrieve() -> Iterator[Run]:
    with holder() as s6:
        command = ["s6-fdholder-retrieve", s6.address, "kept0", "true"]

        def run(n: int) -> None:
            for _ in range(n):
                subprocess.run(command, stdin=subprocess.DEVNULL, check=True)

        yield run


@contextmanager
def dbus() -> Iterator[Run]:
    needs("jeepney", "__version__")
    if shutil.which("dbus-daemon") is None:
        raise Unavailable("no dbus-daemon: apt-get install dbus-daemon")
    from jeepney import DBusAddress, new_method_call
    from jeepney.io.blocking import open_dbus_connection

    with tempfile.TemporaryDirectory() as folder, lent_file() as file:
        Path(f"{folder}/bus.conf").write_text(BUS.format(f"{folder}/bus"))
        daemon = ["dbus-daemon", f"--config-file={folder}/bus.conf", "--nofork", "--print-address"]
        with subprocess.Popen(daemon, stdout=subprocess.PIPE, bufsize=0) as bus:
            try:
                assert bus.stdout is not None
                bus.stdout.readline()
                address = f"unix:path={folder}/bus"
                number = file.fileno()
                command = [sys.executable, "-m", "benchmarks.peers", "dbus", address, str(number)]
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
                with child(command, pass_fds=[number], **pipes) as service:
                    assert service.stdout is not None
                    service.stdout.readline()
                    with open_dbus_connection(bus=address, enable_fds=True) as connection:
                        call = new_method_call(DBusAddress(OBJECT, NAME, NAME), "Borrow")

                        def run(n: int) -> None:
                            for _ in range(n):
                                connection.send_and_get_reply(call).body[0].close()

                        yield run
                    bus.terminate()  # by which the service ends
            finally:
                bus.terminate()


def serve_dbus(address: str, fd: int) -> None:
    from jeepney import MessageType, message_bus, new_method_return
    from jeepney.io.blocking import open_dbus_connection

    with open_dbus_connection(bus=address, enable_fds=True) as connection:
        connection.send_and_get_reply(message_bus.RequestName(NAME))
        print(flush=True)
        with suppress(EOFError, ConnectionError):
            while True:
                message = connection.receive()
                if message.header.message_type is MessageType.method_call:
                    connection.send(new_method_return(message, "h", (fd,)))


OURS = "fdbroker"
TOPIC = Topic(
    name="peers",
    unit="one descriptor, until it is closed",
    cycles=1600,
    variants=(
        BASE,
        BASE_C,
        Variant(OURS, borrow, against="base"),
        Variant("os.open by path", opened, against=OURS),
        Variant("os.dup", duplicated, against=OURS),
        Variant("socket.send_fds", send_fds, against=OURS),
        Variant("send_handle", handles, against=OURS),
        Variant("DupFd", dup_fd, against=OURS, cycles=320, least=7.5),
        Variant("Pool.apply", pool_apply, against=OURS, cycles=160, least=17),
        Variant("s6-fdholderd", s6_kept, against=OURS),
        Variant("s6-fdholder-retrieve", s6_retrieve, against=OURS, cycles=16),
        Variant("D-Bus", dbus, against=OURS, cycles=320, least=8),
    ),
    check=C_CHECK,
)


if __name__ == "__main__":
    serve, where, lent = sys.argv[1:]
    if serve == "send_fds":
        serve_send_fds(int(where), int(lent))
    else:
        serve_dbus(where, int(lent))
