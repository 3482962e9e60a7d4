"""A program that makes a client, gives up its rights or its root, and then calls everything.

    python dropped.py setuid ADDRESS UID     a forked child becomes UID
    python dropped.py chroot FOLDER          the process itself changes its root

It prints one line for each call that failed, and nothing if none did.  By then the package cannot
be read any more, so whatever is imported late fails.
"""

from __future__ import annotations

import inspect
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import fdbroker

Calls = dict[str, Callable[[], object]]


def public(cls: type) -> set[str]:
    """The names of all public methods and properties, inherited ones too."""
    return {name for name, _ in inspect.getmembers_static(cls) if not name.startswith("_")}


class Stage:
    """A client and loans, made while everything could be imported.

    Nothing else is done with them by then, since that might import what is needed later.
    """

    def __init__(self, client: fdbroker.Client) -> None:
        self.client = client
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - until the process ends
        self.loan = client.borrow("data")
        self.web = client.borrow("web")
        self.given_away = client.borrow("data")
        self.dropped = [client.borrow("data")]
        self.mapped = client.borrow("data")
        self.shared: list[fdbroker.SharedFD] = []

    def share(self) -> fdbroker.SharedFD:
        """A reference, made at the first call."""
        if not self.shared:
            self.shared.append(self.client.share(self.file))
        return self.shared[0]

    def connect(self) -> None:
        """Have sessions for all that comes, since no socket can be reached any more then."""
        self.share().borrow().close()
        for loan in [self.client.borrow("data") for _ in range(8)]:
            loan.close()

    def end_mapping(self) -> None:
        """A mapping that outlives its loan."""
        mapping = self.mapped.mmap()
        self.mapped.close()
        mapping.close()

    def calls(self) -> dict[type, Calls]:
        """How each public method is called, by class."""
        client, loan, file = self.client, self.loan, self.file
        found: dict[type, Calls] = {
            fdbroker.Client: {
                "put": lambda: client.put("new", file),
                "share": lambda: client.share(file).close(),
                "borrow": lambda: client.borrow("data", mode="r").close(),
                "borrow_all": lambda: client.borrow_all(["data", "web"]).close(),
                "borrow_ticket": lambda: client.borrow_ticket(self.share()._ticket).close(),
                "retire": lambda: client.retire("old", wait=True, timeout=5),
                "entries": client.entries,
                "loans": lambda: [one.process for one in client.loans()],
                "stats": client.stats,
                "usage": client.usage,
                "close": client.close,
            },
            fdbroker.Loan: {
                "entry": lambda: loan.entry,
                "entries": lambda: loan.entries,
                "since": lambda: loan.since,
                "closed": lambda: loan.closed,
                "fileno": loan.fileno,
                "as_socket": self.web.as_socket,
                "open": lambda: (loan.open("rb").read(1), loan.open("r", encoding="utf-8").read(1)),
                "mmap": lambda: loan.mmap().close(),
                "pass_fds": loan.pass_fds,
                "detach": lambda: os.close(self.given_away.detach()),
                "close": loan.close,
            },
            fdbroker.SharedFD: {
                "borrow": lambda: self.share().borrow().close(),
                "close": lambda: self.share().close(),
            },
        }
        if type(client) is not fdbroker.Client:
            found[type(client)] = found.pop(fdbroker.Client) | {"pid": lambda: client.pid}
        return found

    def others(self) -> Calls:
        """What is not a method, or a method that fails."""
        client = self.client
        return {
            "a name that is nearly right": lambda: refused(LookupError, client.borrow, "dato"),
            "a directory": lambda: refused(TypeError, client.put, "x", os.open("/", os.O_RDONLY)),
            "names of the package": lambda: (fdbroker.errors.NoBroker, fdbroker.rc, fdbroker.Loan),
            "a loan that is dropped": self.dropped.clear,
            "a mapping that outlives its loan": self.end_mapping,
            "repr": lambda: (repr(client), repr(self.loan), repr(self.share())),
        }


def put_entries(client: fdbroker.Client) -> None:
    """The entries that there must be."""
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryFile() as file:
        file.write(bytes(4096))
        file.flush()
        client.put("web", server)
        client.put("data", file)
        client.put("old", file)


def refused(kind: type[Exception], verb: Callable[..., object], *arguments: object) -> None:
    try:
        verb(*arguments)
    except kind as error:
        str(error)
    else:
        raise AssertionError(f"it raised no {kind.__name__}")


def problems(stage: Stage) -> Iterator[str]:
    """Call everything; what has "close" in its name comes last."""
    warnings.simplefilter("always")
    todo: list[tuple[str, Callable[[], object]]] = list(stage.others().items())
    for cls, calls in stage.calls().items():
        yield from (f"{cls.__name__}.{name}: say how to call it" for name in public(cls) - {*calls})
        todo += [(f"{cls.__name__}.{name}", call) for name, call in calls.items()]
    todo.sort(key=lambda one: (one[0].endswith(".close"), one[0].startswith(("Client", "Broker"))))
    for name, call in todo:
        try:
            call()
        except Exception as error:
            yield f"{name}: {type(error).__name__}: {error}"


def is_readable() -> bool:
    """Whether the package can be read still."""
    return os.access(str(fdbroker.__file__), os.R_OK)


def main(way: str, place: str, uid: str = "0") -> None:
    ignored: list[Any] = []
    sys.unraisablehook = lambda found: ignored.append(found.exc_value)
    if way == "setuid":
        stage = Stage(fdbroker.Client(place))
        pid = os.fork()
        if pid:
            _, status = os.waitpid(pid, 0)
            sys.exit(os.waitstatus_to_exitcode(status))
        os.setgroups([])
        os.setresgid(int(uid), int(uid), int(uid))
        os.setresuid(int(uid), int(uid), int(uid))
    else:
        broker = fdbroker.Broker()
        put_entries(broker)
        stage = Stage(broker)
        stage.connect()
        os.chroot(place)
        os.chdir("/")
    found = list(problems(stage))
    if is_readable():
        found.append("the package can be read still: this shows nothing")
    found += [f"in a finalizer: {error!r}" for error in ignored]
    print(*found, sep="\n", end="")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
