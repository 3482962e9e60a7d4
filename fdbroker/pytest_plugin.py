"""The pytest plugin: sockets for servers under test, and a check for leaked descriptors.

    lent_socket, lent_port   a listening socket whose port nobody can take between "chosen" and
                             "used": the test has it open all the time, and its server gets it by
                             descriptor
    lent_socket_factory      several, or for longer than a test
    fd_leak_check            fails a test that leaves a descriptor open, and says which

Each session, and so each worker of pytest-xdist, has a private broker of its own, which starts at
the first socket and keeps them too; the kernel gives no port twice.  Nothing but this file is
imported until a fixture is used: pytest loads it in every project that has fdbroker installed.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from fdbroker.embedded import Broker
    from fdbroker.ipc.client import Loan
    from fdbroker.leaks import LeakCheck

HOST = "127.0.0.1"

# a test has raised, and its traceback keeps the variables of its functions
_raised = pytest.StashKey[bool]()


class LentSocket:
    """A TCP socket that listens on 127.0.0.1, at a port that the kernel chose.

    It belongs to the test, whose process closes it at its end, and the broker keeps it too.  A
    connection made before the server is there, or between one server and the next, waits in the
    socket's queue.  Give it to a server as a descriptor, never as a port to bind:

        subprocess.Popen([*command, "--fd", str(lent_socket.fd)], pass_fds=[lent_socket.fd])

    A server that cannot inherit borrows it: `borrow`, or from another program the entry `name` of
    the broker at ``broker.address`` (``fdbroker exec``, with it in FDBROKER_SOCKET).

    It is one open file description for all who have it: a server makes it non-blocking for all.
    """

    def __init__(self, broker: Broker, name: str, sock: socket.socket) -> None:
        self.broker = broker
        self.name = name
        self.port: int = sock.getsockname()[1]
        self._sock = sock
        broker.put(name, sock)

    @property
    def fd(self) -> int:
        """The number in this process, close-on-exec, -1 when it is closed."""
        return self._sock.fileno()

    def fileno(self) -> int:
        """As `fd`, for what asks for it so."""
        return self.fd

    @property
    def address(self) -> tuple[str, int]:
        """What `socket.create_connection` takes."""
        return HOST, self.port

    @property
    def url(self) -> str:
        """``http://127.0.0.1:40123``, without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    def borrow(
        self, *, exclusive: bool = False, timeout: float | None = None, purpose: str = ""
    ) -> Loan:
        """`Client.borrow` of it."""
        return self.broker.borrow(self.name, exclusive=exclusive, timeout=timeout, purpose=purpose)

    def close(self) -> None:
        """Close it here, and retire its entry; a server that has it keeps its port in use."""
        from fdbroker.errors import UnknownEntry

        if self.fd < 0:
            return
        self._sock.close()
        with contextlib.suppress(UnknownEntry):  # the test has retired it
            self.broker.retire(self.name)

    def __enter__(self) -> LentSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<LentSocket {self.name} {HOST}:{self.port}, fd {self.fd}>"


@pytest.fixture(scope="session")
def lent_socket_factory() -> Iterator[Callable[[], LentSocket]]:
    """Call it for one more `LentSocket`; each is open until its `close`, or the session's end."""
    import socket
    from itertools import count

    from fdbroker.embedded import Broker

    with Broker(drain=1.0) as broker, contextlib.ExitStack() as sockets:
        numbers = count(1)

        def lend() -> LentSocket:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            try:
                # without SO_REUSEADDR, which until listen() would let others bind the port as well
                sock.bind((HOST, 0))
                sock.listen(socket.SOMAXCONN)
                lent = LentSocket(broker, f"socket-{next(numbers)}", sock)
            except BaseException:
                sock.close()
                raise
            return sockets.enter_context(lent)

        yield lend


@pytest.fixture
def lent_socket(lent_socket_factory: Callable[[], LentSocket]) -> Iterator[LentSocket]:
    """A `LentSocket` for this test: ``fd``, ``port``, ``address``, ``url``, ``borrow()``."""
    with lent_socket_factory() as lent:
        yield lent


@pytest.fixture
def lent_port(lent_socket: LentSocket) -> int:
    """The port of `lent_socket`, which listens there already: hand over its ``fd``."""
    return lent_socket.port


@pytest.fixture
def fd_leak_check(request: pytest.FixtureRequest) -> Iterator[LeakCheck]:
    """Fail this test, at its teardown, if it leaves descriptors open; say what and whence.

    For all tests of a module: ``pytestmark = pytest.mark.usefixtures("fd_leak_check")``; of a
    project: ``usefixtures = fd_leak_check`` in its ini file.  ``fd_leak_check.keep(file)`` is for
    what is meant to stay.  A test that has raised is not checked: its traceback may be what keeps
    a file open.
    """
    from fdbroker.leaks import LeakCheck

    request.node.stash[_raised] = False
    with LeakCheck() as check:
        yield check
        if request.node.stash[_raised]:
            return
        leaks = check.leaks()
    if leaks:
        many = "a descriptor" if len(leaks) == 1 else f"{len(leaks)} descriptors"
        said = "\n\n".join(map(str, leaks))
        pytest.fail(f"this test has left {many} open\n\n{said}", pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Note that a test has raised, for `fd_leak_check`."""
    if call.excinfo is not None:
        item.stash[_raised] = True
