"""Every error, as fdbroker itself raises it in another process: its data, text, code, and travels.

`SCENARIOS` has one function per class.  Each runs in a process of its own, against a broker in a
third one, and does what a user might; none of them raises the error itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import resource
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import support
from support import Peer, wait_until

import fdbroker
from fdbroker import errors, openers
from fdbroker.daemon.serve import serve
from fdbroker.errors import FDBrokerError, NoBroker, by_code
from fdbroker.ipc.client.pool import Pool
from fdbroker.ipc.client.session import Session
from fdbroker.ipc.protocol.codec import check_reply, decode_reply, encode_error
from fdbroker.ipc.protocol.messages import LOANS, STATS
from fdbroker.ipc.server.server import Server
from fdbroker.ipc.transport.unix_listener import Listener
from fdbroker.lender import Ledger, Lender
from fdbroker.rc import FD

NOBODY = 65534
SCENARIOS: dict[type[FDBrokerError], Callable[[str], object]] = {}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs another uid")


def raises(kind: type[FDBrokerError]) -> Callable[[Any], Any]:
    def note(scenario: Callable[[str], object]) -> Callable[[str], object]:
        SCENARIOS[kind] = scenario
        return scenario

    return note


# --- what the scenarios are made of ----------------------------------------------------------


def put_data(address: str, name: str = "data") -> fdbroker.Client:
    client = fdbroker.Client(address)
    number = os.memfd_create("data")
    client.put(name, number)
    os.close(number)
    return client


@contextlib.contextmanager
def another(do: Callable[[], Sequence[Any]]) -> Iterator[None]:
    """A forked process that does something, and closes what came of it at the end of the block."""
    stay, leave = os.pipe()
    done, tell = os.pipe()

    def run() -> None:
        os.close(leave)
        kept = do()
        os.write(tell, b"x")
        os.read(stay, 1)
        for one in kept:
            one.close()

    wait = support.start_fork(run)
    os.close(tell)
    os.close(stay)
    try:
        assert os.read(done, 1), "it failed"
        yield
    finally:
        os.close(leave)
        os.close(done)
        wait()


def holding(address: str, exclusive: bool) -> contextlib.AbstractContextManager[None]:
    return another(lambda: [fdbroker.Client(address).borrow("data", exclusive=exclusive)])


# --- rc --------------------------------------------------------------------------------------


@raises(errors.UninitializedFDError)
def use_before_init(address: str) -> None:
    FD().incref()


@raises(errors.MultipleInitError)
def init_twice(address: str) -> None:
    fd = FD(os.dup(0))
    try:
        fd.init(0)
    finally:
        fd.close()


@raises(errors.ClosedFDError)
def use_after_close(address: str) -> None:
    fd = FD(os.dup(0))
    fd.close()
    fd.incref()


@raises(errors.UnbalancedDecrefError)
def decref_too_often(address: str) -> None:
    fd = FD(os.dup(0))
    try:
        fd.decref()
    finally:
        fd.close()


@raises(errors.ReferencedFDError)
def detach_with_references(address: str) -> None:
    fd = FD(os.dup(0))
    try:
        with fd.use():
            fd.detach()
    finally:
        fd.close()


@raises(errors.StolenFDError)
def close_behind_its_back(address: str) -> None:
    reader, writer = os.pipe()
    fd = FD(reader)
    os.close(reader)
    stranger = os.open("/dev/null", os.O_RDONLY)
    assert stranger == reader
    try:
        fd.close()
    finally:
        os.close(stranger)
        os.close(writer)


@raises(errors.CloseTimeout)
def close_with_references(address: str) -> None:
    fd = FD(os.dup(0))
    with fd.use():
        fd.close(timeout=0.01)


# --- lending ---------------------------------------------------------------------------------


@raises(errors.BadName)
def borrow_a_bad_name(address: str) -> None:
    fdbroker.Client(address).borrow("no name")


@raises(errors.UnknownEntry)
def borrow_an_unknown_name(address: str) -> None:
    put_data(address).borrow("date")


@raises(errors.UnknownTicket)
def borrow_with_an_unknown_ticket(address: str) -> None:
    fdbroker.SharedFD(address, bytes(16)).borrow()


@raises(errors.NameTaken)
def put_a_name_twice(address: str) -> None:
    put_data(address)
    put_data(address)


@raises(errors.UnsupportedKind)
def put_a_directory(address: str) -> None:
    number = os.open("/", os.O_RDONLY)
    try:
        fdbroker.Client(address).put("root", number)
    finally:
        os.close(number)


@raises(errors.BorrowTimeout)
def borrow_what_is_busy(address: str) -> None:
    client = put_data(address)
    with holding(address, exclusive=True):
        client.borrow("data", timeout=0.01)


@raises(errors.WouldDeadlock)
def wait_for_oneself(address: str) -> None:
    client = put_data(address)
    with client.borrow("data", exclusive=True):
        client.borrow("data")


@raises(errors.EntryRetired)
def wait_for_what_retires(address: str) -> None:
    client = put_data(address)

    def retire_when_waited_for() -> list[fdbroker.Loan]:
        mine = fdbroker.Client(address)
        loan = mine.borrow("data")
        if os.fork() == 0:
            wait_until(lambda: mine.stats()["waiting"])
            mine.retire("data")
            os._exit(0)
        return [loan]

    with another(retire_when_waited_for):
        client.borrow("data", exclusive=True)


@raises(errors.RetireTimeout)
def retire_what_is_lent(address: str) -> None:
    client = put_data(address)
    with holding(address, exclusive=False):
        client.retire("data", wait=True, timeout=0.01)


@raises(errors.NotPermitted)
def ask_as_somebody_else(address: str) -> None:
    """The socket's mode would let it in: so the broker itself refuses."""
    folder = os.path.dirname(address)
    os.chmod(folder, 0o711)
    os.chmod(address, 0o666)

    client = fdbroker.Client(address)  # now, since NOBODY may not be able to read the package

    def ask() -> None:
        os.setuid(NOBODY)
        client.stats()

    try:
        support.in_fork(ask)
    finally:
        os.chmod(address, 0o600)
        os.chmod(folder, 0o700)


@raises(errors.BrokerClosing)
def borrow_from_one_that_closes(_: str) -> None:
    with fdbroker.Broker() as broker:
        put_data(broker.address)
        broker.stats()
        with holding(broker.address, exclusive=False):
            os.kill(broker.pid, signal.SIGTERM)
            wait_until(lambda: broker.borrow("data").close())


@raises(errors.BrokerFull)
def use_up_the_ledger(address: str) -> None:
    client = put_data(address, "d")
    with contextlib.ExitStack() as stack:
        for _ in range(64):  # 64 times 4,095 of 262,144 cells; nobody reads what is sent
            raw = stack.enter_context(support.Raw(address))
            raw.send(support.BORROW, 1, ["d"] * 4096, 0, None, "")
        wait_until(lambda: client.stats()["loans"] == 64)
        client.borrow_all(["d"] * 200)


def serve_with_quotas(folder: str) -> None:
    with open(f"{folder}/f.toml", "w") as file:
        file.write('[server]\nmode = "0666"\n[entry.data]\nmemfd = 1\n[[rule]]\neveryone = true\n')
        file.write('verbs = ["borrow"]\nquota = { loans = 2 }\n')
    serve(f"{folder}/s", config_path=f"{folder}/f.toml")


@raises(errors.QuotaExceeded)
def borrow_more_than_ones_share(_: str) -> None:
    """Of what its own uid has, here in two processes."""
    with tempfile.TemporaryDirectory() as folder, Peer() as broker:
        os.chmod(folder, 0o711)
        broker.start(serve_with_quotas, folder)
        wait_until(lambda: _serves(f"{folder}/s"))

        def borrow_one(names: list[str]) -> list[fdbroker.Loan]:
            os.setuid(NOBODY)
            return [fdbroker.Client(f"{folder}/s").borrow_all(names)]

        try:
            with another(lambda: borrow_one(["data"])):
                support.in_fork(lambda: borrow_one(["data", "data"]))
        finally:
            broker.kill()


@raises(errors.TooManyFiles)
def borrow_without_room(address: str) -> None:
    client = put_data(address)
    client.stats()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(support.open_files()) + 3
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        client.borrow_all(["data"] * 50)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def serve_as_nobody(address: str, files: int) -> None:
    fdbroker.Client(address)  # what it imports, it cannot read later
    os.chown(os.path.dirname(address), NOBODY, NOBODY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    serve(address)


def keep_in_flight(count: int) -> list[socket.socket]:
    """Send descriptors that nobody reads, as the same uid (unix(7), ETOOMANYREFS)."""
    os.setuid(NOBODY)
    ends = list(socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    socket.send_fds(ends[0], [b"x"], [0] * count)
    return ends


@raises(errors.TooManyInFlight)
def fill_the_uids_flight(_: str) -> None:
    folder = tempfile.mkdtemp()
    address = f"{folder}/s"
    try:
        with Peer() as broker:
            broker.start(serve_as_nobody, address, 100)
            wait_until(lambda: _serves(address))
            client = put_data(address)
            with another(lambda: keep_in_flight(200)):
                try:
                    client.borrow("data")
                finally:
                    assert client.stats()["loans"] == 0
            client.borrow("data").close()
            broker.kill()
    finally:
        for name in os.listdir(folder):
            os.unlink(f"{folder}/{name}")
        os.rmdir(folder)


def _serves(address: str) -> bool:
    try:
        return bool(fdbroker.Client(address).stats())
    except NoBroker:
        return False


def serve_what_fails_to_close(address: str) -> None:
    def close(number: int) -> None:
        os.close(number)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    lender = Lender(Ledger(bytearray(Ledger.size(9, 9, 9)), 9, 9, 9))
    lender.put(None, 0, "data", b"", FD(os.memfd_create("data"), close), 1, 0)
    Server(Listener(address), lender).run()


@raises(errors.CloseFailed)
def retire_what_fails_to_close(_: str) -> None:
    with tempfile.TemporaryDirectory() as folder, Peer() as broker:
        broker.start(serve_what_fails_to_close, f"{folder}/s")
        wait_until(lambda: _serves(f"{folder}/s"))
        try:
            fdbroker.Client(f"{folder}/s").retire("data", wait=True)
        finally:
            broker.kill()


# --- the client ------------------------------------------------------------------------------


@raises(errors.ClosedLoanError)
def use_a_returned_loan(address: str) -> None:
    with put_data(address).borrow("data") as loan:
        pass
    loan.fileno()


@raises(errors.ForkedLoanError)
def use_the_parents_loan(address: str) -> None:
    with put_data(address).borrow("data", exclusive=True) as loan:
        support.in_fork(loan.fileno)


@raises(errors.ClosedClientError)
def use_a_closed_client(address: str) -> None:
    client = fdbroker.Client(address)
    client.close()
    client.stats()


@raises(errors.NoBroker)
def ask_nobody(_: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fdbroker.Client(f"{folder}/s").stats()


@raises(errors.BrokerGone)
def lose_the_broker(_: str) -> None:
    with fdbroker.Broker() as broker:
        put_data(broker.address)

        def kill_it_when_asked() -> list[fdbroker.Loan]:
            mine = fdbroker.Client(broker.address)
            loan = mine.borrow("data", exclusive=True)
            if os.fork() == 0:
                wait_until(lambda: mine.stats()["waiting"])
                os.kill(broker.pid, signal.SIGKILL)
                os._exit(0)
            return [loan]

        with another(kill_it_when_asked):
            broker.borrow("data")


@raises(errors.BrokerStartError)
def start_where_no_socket_can_be(_: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = f"{folder}/{'x' * 100}"
        os.mkdir(tempfile.tempdir)
        try:
            fdbroker.Broker()
        finally:
            assert os.listdir(tempfile.tempdir) == []
            tempfile.tempdir = None


@raises(errors.AlreadyServing)
def serve_twice(address: str) -> None:
    serve(address)


@raises(errors.BadAddress)
def connect_to_no_address(_: str) -> None:
    fdbroker.Client("/" + "x" * 108).stats()


@raises(errors.BadResource)
def bad_resource(address: str) -> None:
    openers.make("memfd", "much")


@raises(errors.ConfigError)
def misconfigure(_: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write("[entry.web]\nlisten = 'http'\n")
        file.flush()
        serve(config_path=file.name)


# --- the wire --------------------------------------------------------------------------------


@raises(errors.ProtocolError)
def say_what_is_in_no_table(address: str) -> None:
    Session.open(address, Pool(address).release).request(LOANS, "x" * 300, 0, 0)


@raises(errors.VersionMismatch)
def be_of_another_version(address: str) -> None:
    from fdbroker.ipc.protocol import messages

    messages.VERSION = 2
    fdbroker.Client(address).stats()


# --- the tests -------------------------------------------------------------------------------

CLASSES = sorted(by_code().values(), key=lambda kind: kind.code)
ADVICE: dict[type[FDBrokerError], str] = {  # what its sentence says to do
    errors.UninitializedFDError: "call init() first",
    errors.MultipleInitError: "use another FD for it",
    errors.ClosedFDError: "take the reference before that",
    errors.UnbalancedDecrefError: "call it once for each incref()",
    errors.ReferencedFDError: "return them first",
    errors.StolenFDError: "find who calls os.close()",
    errors.CloseTimeout: "wait again with wait_closed()",
    errors.BadName: "use 1 to 255 of the characters",
    errors.UnknownEntry: 'did you mean "data"?',
    errors.UnknownTicket: "ask the owner to share() again",
    errors.NameTaken: "retire it, or put with replace=True",
    errors.UnsupportedKind: "put the files in it",
    errors.BorrowTimeout: "try again or wait longer",
    errors.WouldDeadlock: "return that loan first",
    errors.EntryRetired: "borrow again if it was replaced",
    errors.RetireTimeout: "loans() names the borrowers",
    errors.NotPermitted: "a rule with uid = 65534",
    errors.BrokerClosing: "start another one",
    errors.BrokerFull: "retire or return some",
    errors.TooManyFiles: "close some or raise RLIMIT_NOFILE",
    errors.TooManyInFlight: "try again",
    errors.CloseFailed: "check it",
    errors.QuotaExceeded: "give some back",
    errors.ClosedLoanError: "borrow again",
    errors.ForkedLoanError: "borrow it in this process",
    errors.ClosedClientError: "make another one",
    errors.NoBroker: "start one there (fdbroker serve)",
    errors.BrokerGone: "try again, and look at its log",
    errors.BrokerStartError: "see its stderr",
    errors.AlreadyServing: "choose another --socket",
    errors.BadAddress: "path has at most 107 bytes",
    errors.BadResource: "a size is bytes",
    errors.ConfigError: "it ends with a port from 0 to 65535",
    errors.ProtocolError: "try again",
    errors.VersionMismatch: "upgrade the older of the two",
}
BUILTINS = (LookupError, ValueError, TypeError, OSError, RuntimeError)
PRIVILEGED = (errors.NotPermitted, errors.QuotaExceeded, errors.TooManyInFlight)


def every_class() -> Iterator[type[FDBrokerError]]:
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, FDBrokerError):
            yield value


def test_every_class_has_a_code_of_its_own_and_a_scenario() -> None:
    classes = [kind for kind in every_class() if kind is not FDBrokerError]
    assert len({kind.code for kind in classes}) == len(classes)
    assert all(kind.code > 0 for kind in classes)
    assert set(classes) == set(CLASSES) == set(SCENARIOS)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=as_root if kind in PRIVILEGED else ()) for kind in CLASSES],
    ids=lambda kind: kind.__name__,
)
def test_as_it_is_raised(broker: fdbroker.Broker, peer: Peer, kind: type[FDBrokerError]) -> None:
    with pytest.raises(kind) as caught:
        peer.call(SCENARIOS[kind], broker.address)
    error = caught.value
    assert type(error) is kind

    assert isinstance(error, BUILTINS)
    assert error.data == tuple(getattr(error, field) for field in kind.fields)
    text = str(error)
    assert text.isprintable()
    assert 30 < len(text) < 300
    assert "{" not in text
    assert ADVICE[kind] in text

    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.data, str(again)) == (kind, error.data, text)

    code, seq, fields = decode_reply(encode_error(7, error))
    assert (code, seq) == (kind.code, 7)
    with pytest.raises(kind) as crossed:
        check_reply(STATS, code, fields)
    assert as_lists(crossed.value.data) == as_lists(error.data)
    assert str(crossed.value) == text
    peer.kill()  # whatever it held


def as_lists(data: Any) -> Any:
    """msgpack has one kind of array."""
    return [as_lists(part) for part in data] if isinstance(data, (list, tuple)) else data


def test_data_is_given_in_order_or_by_name() -> None:
    error = errors.BrokerFull("sessions", limit=5)
    assert (error.what, error.limit) == ("sessions", 5)
    assert errors.UnknownEntry("a").data == ("a", [])
    for wrong in ((), ("a",), ("a", 1, 2)):
        with pytest.raises(TypeError):
            errors.BrokerFull(*wrong)
    with pytest.raises(TypeError):
        errors.BrokerFull("a", 1, more=2)  # type: ignore[call-arg]


def test_durations_are_said_as_people_say_them() -> None:
    said = {0: "0 s", 0.2: "0.2 s", 59: "59 s", 60: "1 min", 240: "4 min", 3 * 3600: "3 h"}
    assert {seconds: errors.duration(seconds) for seconds in said} == said


def test_holders_are_named() -> None:
    error = errors.BorrowTimeout("tty", 5.0, [(812, 0, 240.0, True), (0, 65534, 1.0, False)])
    assert "pid 812 for 4 min" in str(error)
    assert "pid unknown for 1 s" in str(error)
    assert "others wait before you" in str(errors.BorrowTimeout("tty", 0, []))
