"""Rules between real users: who is refused, what it is told, and what it does not learn."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pickle
import socket
from typing import Any

import pytest
from ruled import (
    ALICE,
    AUDIO,
    BOB,
    MAPPED,
    STAFF,
    Ruled,
    ask_as,
    become,
    connected_as,
    memory,
    put,
    rule,
    session_as,
    share,
)
from support import (
    BORROW,
    MORE,
    PUT,
    RETURN,
    SHARED,
    in_fork,
    start_fork,
    wait_until,
)

import fdbroker
from fdbroker import descriptors
from fdbroker.errors import NameTaken, NotPermitted, UnknownTicket
from fdbroker.ipc.protocol.codec import HEAD
from fdbroker.lender.rules import VERBS, Rule

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs other uids")

NOT_PERMITTED = 29
TICKET = bytes(16)


# --- by default -------------------------------------------------------------------------------


def test_by_default_another_uid_is_refused_and_told_which_rule_it_needs(ruled: Ruled) -> None:
    """Though it may open the socket."""
    ruled.put("web")
    for question in (
        lambda client: client.borrow("web"),
        lambda client: client.borrow("nothing"),
        lambda client: client.stats(),
        lambda client: client.put("x", 0),
    ):
        with pytest.raises(NotPermitted, match=f"a rule with uid = {ALICE} would admit") as caught:
            ask_as(ruled.address, question)
        assert caught.value.data == (ALICE, "connect", "*")
    assert ruled.refusals() == [f"{ALICE} verb=connect name=*"] * 4
    assert ask_as(ruled.address, lambda client: client.stats()["entries"], uid=0) == 1
    wait_until(lambda: ruled.client.stats()["sessions"] == 2)  # the client's own, and its putter


def test_a_broker_of_another_uid_serves_that_and_root() -> None:
    with Ruled(own_uid=BOB) as ruled:
        ruled.put("web")
        ask_as(ruled.address, lambda client: client.retire("web"), uid=BOB)
        with pytest.raises(NotPermitted):
            ask_as(ruled.address, lambda client: client.stats())
        ruled.set_rules(rule("list"))
        assert ask_as(ruled.address, lambda client: client.entries()) == []
        assert ask_as(ruled.address, lambda client: client.stats(), uid=BOB)["entries"] == 0


# --- verbs and names --------------------------------------------------------------------------


REQUESTS = {  # what it takes
    "borrow web": ("borrow", lambda client: client.borrow("web").close()),
    "borrow web read-only": ("borrow", lambda client: client.borrow("web", mode="r").close()),
    "borrow db": ("borrow db", lambda client: client.borrow("db").close()),
    "borrow both": ("borrow db", lambda client: client.borrow_all(["web", "db"]).close()),
    "put": ("put", lambda client: put(client, "web-new")),
    "put elsewhere": ("put db", lambda client: put(client, "db-new")),
    "replace": ("put retire", lambda client: put(client, "web", replace=True)),
    "share": ("put *", share),
    "retire": ("retire", lambda client: client.retire("web")),
    "retire db": ("retire db", lambda client: client.retire("db")),
    "entries": ("list", lambda client: client.entries()),
    "loans": ("list", lambda client: client.loans()),
    "loans of web": ("list", lambda client: client.loans("web")),
    "loans of db": ("list db", lambda client: client.loans("db")),
    "stats": ("admin *", lambda client: client.stats()),
}


def outcomes(address: str) -> dict[str, str]:
    """Of every request, as ALICE."""

    def attempt(question: Any) -> str:
        try:
            ask_as(address, question)
        except NotPermitted as error:
            refusals.append(error)
            return f"{error.verb} {error.name}"
        return "done"

    refusals: list[NotPermitted] = []

    found = {what: attempt(question) for what, (_, question) in REQUESTS.items()}
    for error in refusals:
        assert f'uid {ALICE} may not {error.verb} "{error.name}": a rule' in str(error)
        assert f'verbs = ["{error.verb}"] would allow it' in str(error)
    return found


@pytest.mark.parametrize("verb", sorted(VERBS))
@pytest.mark.parametrize("names", [("web*",), ("*",)])
def test_a_rule_allows_its_verbs_on_its_names_and_nothing_else(
    ruled: Ruled, verb: str, names: tuple[str, ...]
) -> None:
    ruled.put("web", "db")
    ruled.set_rules(rule(verb, names=names))
    found = outcomes(ruled.address)
    everywhere = names == ("*",)
    for what, (needs, _) in REQUESTS.items():
        first, *rest = needs.split()
        allowed = first == verb and (not rest or (rest[0] != "retire" and everywhere))
        assert (found[what] == "done") is allowed, (what, found[what])
    assert len(ruled.refusals()) == sum(outcome != "done" for outcome in found.values())


def test_a_rule_can_let_borrow_read_only(ruled: Ruled) -> None:
    """Asked again too, when the broker knows the request; another rule may allow more."""
    ruled.put("web", "db")
    read = rule("borrow", "list", names=("web*",), mode="r", uid=ALICE)
    ruled.set_rules(read)
    allowed = {what for what, outcome in outcomes(ruled.address).items() if outcome == "done"}
    assert allowed == {"borrow web read-only", "entries", "loans", "loans of web"}

    def borrow_in_turn(client: fdbroker.Client) -> list[str]:
        done = []
        for mode in ("r", None, "r", None):
            try:
                with client.borrow("web", mode=mode) as loan:
                    assert fcntl.fcntl(loan.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
                done.append("lent")
            except NotPermitted as error:
                done.append(error.verb)
        return done

    assert ask_as(ruled.address, borrow_in_turn) == ["lent", "borrow", "lent", "borrow"]
    ruled.set_rules(read, rule("borrow", names=("db",)))
    allowed = {what for what, outcome in outcomes(ruled.address).items() if outcome == "done"}
    assert {"borrow db", "borrow web read-only"} <= allowed
    assert not {"borrow web", "borrow both"} & allowed


def test_what_is_missing_is_named(ruled: Ruled) -> None:
    ruled.put("web", "db")
    ruled.set_rules(rule("borrow", "put", "list", names=("web*",)))
    found = {
        what: outcome for what, outcome in outcomes(ruled.address).items() if outcome != "done"
    }
    assert found == {
        "borrow db": "borrow db",
        "borrow both": "borrow db",
        "put elsewhere": "put db-new",
        "replace": "retire web",
        "share": "put *",
        "retire": "retire web",
        "retire db": "retire db",
        "loans of db": "list db",
        "stats": "admin *",
    }
    assert ruled.refusals() == [
        f"{ALICE} verb={verb} name={name}" for verb, name in map(str.split, found.values())
    ]


def test_the_rule_that_the_refusal_asks_for_is_the_one(ruled: Ruled) -> None:
    """Add it, and so on, until it is done: every request ends so."""
    ruled.put("web", "db")
    rules: list[Rule] = [rule()]
    ruled.set_rules(*rules)
    for _, question in list(REQUESTS.values())[::-1]:  # retire comes before borrow
        ruled.client.put("web", 2, replace=True)
        ruled.client.put("db", 2, replace=True)
        for _ in range(4):
            try:
                ask_as(ruled.address, question)
                break
            except NotPermitted as error:
                rules.append(rule(error.verb, names=(error.name,)))
                ruled.set_rules(*rules)
            except NameTaken:
                break
            except fdbroker.errors.UnsupportedKind:  # /dev/stderr is no file here
                break
        else:
            pytest.fail("refused again and again")


# --- whom -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "uid", "gid", "groups", "admitted"),
    [
        ({"uid": ALICE}, ALICE, ALICE, (), True),
        ({"uid": ALICE}, BOB, ALICE, (ALICE,), False),
        ({"gid": STAFF}, ALICE, STAFF, (), True),
        ({"gid": STAFF}, ALICE, AUDIO, (1, STAFF, 2), True),
        ({"gid": STAFF}, STAFF, AUDIO, (AUDIO,), False),
        ({"gid": STAFF}, ALICE, AUDIO, (*range(1, 400), STAFF), True),
        ({"gid": STAFF}, ALICE, AUDIO, tuple(range(1, 400)), False),
        ({"gid": 0}, ALICE, ALICE, (), False),
        ({"everyone": True}, BOB, BOB, (), True),
        ({"everyone": True}, 65534, 65534, (), True),  # all uids are mapped here: it is nobody's
    ],
)
def test_whom_a_rule_is_about(ruled: Ruled, who, uid, gid, groups, admitted) -> None:
    ruled.put("web")
    ruled.set_rules(rule("borrow", names=("web",), **who) if "uid" not in who else rule("borrow"))
    sock = connected_as(ruled.address, uid, gid, groups)
    with sock:
        with contextlib.suppress(BrokenPipeError):  # it was turned away, and has been told why
            sock.send(HEAD.pack(b"\x94\0\xcf", 0) + b"\1\xc2")  # hello, version 1, puts nothing
        answer = sock.recv(1000)
        assert (answer[1] == 0) is admitted
        assert (answer[1] == NOT_PERMITTED) is not admitted


def test_groups_are_those_of_the_connect(ruled: Ruled) -> None:
    """As the kernel has it: who has left a group since is still in it, and the other way round."""
    ruled.put("web")
    ruled.set_rules(rule("borrow", gid=STAFF))

    def ask() -> str:
        os.setgroups([STAFF])
        with fdbroker.Client(ruled.address) as client:
            os.setresgid(ALICE, ALICE, ALICE)
            os.seteuid(ALICE)
            client.borrow("web").close()
            os.seteuid(0)
            os.setgroups([])
            os.seteuid(ALICE)
            client.borrow("web").close()
            with fdbroker.Client(ruled.address) as other, pytest.raises(NotPermitted):
                other.borrow("web")
        return "done"

    assert in_fork(ask) == "done"


def test_a_uid_that_the_brokers_namespace_does_not_map_is_nobody() -> None:
    try:
        ruled = Ruled(user_namespace=True)
    except (OSError, pickle.UnpicklingError, EOFError) as error:
        pytest.skip(f"no user namespace can be had here: {error}")
    with ruled:
        ruled.put("web")
        everything = tuple(VERBS)
        ruled.set_rules(
            rule(*everything, everyone=True),
            rule(*everything, uid=65534),
            rule(*everything, gid=65534),
        )
        borrow = lambda client: client.borrow("web").close()  # noqa: E731
        ask_as(ruled.address, borrow, uid=MAPPED)
        with pytest.raises(NotPermitted, match="cannot tell your uid") as caught:
            ask_as(ruled.address, borrow, uid=ALICE, groups=(MAPPED,))
        assert caught.value.data == (-1, "connect", "*")
        assert ruled.refusals() == ["65534 verb=connect name=*"]
        ruled.set_rules(rule(*everything, gid=65534))
        with pytest.raises(NotPermitted, match=f"a rule with uid = {MAPPED}"):
            ask_as(ruled.address, borrow, uid=MAPPED, gid=ALICE)


def test_a_socket_that_cannot_be_asked_for_groups_is_in_none() -> None:
    """Nobody is in a group by a failure of the kernel."""
    from fdbroker.ipc.transport import unix_peer

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as alone:
        with pytest.raises(OSError, match="No data") as caught:
            alone.getsockopt(socket.SOL_SOCKET, unix_peer.SO_PEERGROUPS, 100)
        assert caught.value.errno == errno.ENODATA
        assert unix_peer.groups_among(frozenset({0}), alone) == set()
        assert unix_peer._many_groups(alone) == b""


# --- rules that change ------------------------------------------------------------------------


def test_other_rules_hold_for_the_next_request_of_an_open_session(ruled: Ruled) -> None:
    """One session of a real client in another process, which is told between its requests."""
    ruled.put("web")
    ruled.set_rules(rule("borrow", names=("web",)))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def run() -> None:
        ours.close()
        become(ALICE)
        with theirs, fdbroker.Client(ruled.address) as client:
            while theirs.recv(10):
                try:
                    client.borrow("web").close()
                    theirs.send(b"lent")
                except NotPermitted as error:
                    theirs.send(f"{error.verb} {error.name}".encode())

    def ask() -> str:
        ours.send(b"again")
        return ours.recv(100).decode()

    wait = start_fork(run)
    theirs.close()
    ours.settimeout(20)
    with ours:  # its end is the child's, too
        assert [ask(), ask(), ask()] == ["lent"] * 3
        sessions = ruled.client.stats()["sessions"]
        for _ in range(3):
            ruled.set_rules(rule("borrow", names=("db",)))
            assert [ask(), ask()] == ["borrow web"] * 2
            ruled.set_rules()
            assert [ask(), ask()] == ["borrow web"] * 2
            ruled.set_rules(rule("borrow", names=("w*",), gid=ALICE))
            assert [ask(), ask()] == ["lent"] * 2
        assert ruled.client.stats()["sessions"] == sessions  # it was one session all along
    wait()


def test_what_was_granted_stays(ruled: Ruled) -> None:
    """A loan, its later parts, its return, and a place in the waiting line."""
    names = [f"web{number}" for number in range(300)]
    ruled.put(*names, "tty")
    ruled.set_rules(rule("borrow"))
    holder, waiter = session_as(ruled.address, ALICE), session_as(ruled.address, ALICE)
    turn = ruled.client.borrow("tty", exclusive=True)
    with holder, waiter:
        holder.send(BORROW, 1, names, 0, None, "")
        message, fds = holder.receive()
        assert message is not None
        assert message[2:4] == [300, 253]
        waiter.send(BORROW, 1, "tty", 1, None, "")
        wait_until(lambda: ruled.client.stats()["waiting"] == 1)

        ruled.set_rules()
        holder.send(MORE, 2, 253)
        message, more = holder.receive()
        assert message is not None
        assert message[:4] == [0, 2, 300, 47]
        for number in fds + more:
            os.close(number)
        turn.close()
        message, fds = waiter.receive()
        assert message is not None
        assert message[:2] == [0, 1]
        os.close(*fds)
        assert {loan.uid for loan in ruled.client.loans()} == {ALICE}
        for raw, seq in ((holder, 3), (waiter, 2)):
            raw.send(RETURN, seq)
            raw.send(BORROW, seq + 1, "tty", *SHARED)
            assert raw.receive() == ([NOT_PERMITTED, seq + 1, ALICE, "borrow", "tty"], [])
    wait_until(lambda: ruled.client.stats()["loans"] == 0)


def test_put_under_inspection_is_refused_by_the_rules_of_its_end() -> None:
    """The rule that allowed it is gone before the worker, which is held up here, is done."""
    go_on, tell = os.pipe()
    inspect = descriptors.inspect

    def inspect_later(number: int) -> tuple[descriptors.Kind, str]:
        os.read(go_on, 1)
        return inspect(number)

    def plant() -> None:
        descriptors.inspect = inspect_later

    with Ruled(plant=plant) as ruled, memory() as number:
        ruled.set_rules(rule("put", "borrow"))
        with session_as(ruled.address, ALICE, puts=True) as raw:
            raw.send(PUT, 1, "web", 0, fds=[number])
            wait_until(lambda: ruled.client.stats()["jobs"] == 1)
            ruled.set_rules()
            os.write(tell, b"x")
            message, _ = raw.receive()
            assert message is not None
            assert message == [NOT_PERMITTED, 1, ALICE, "put", "web"]
            raw.send(BORROW, 2, "web", *SHARED)
            assert raw.receive() == ([NOT_PERMITTED, 2, ALICE, "borrow", "web"], [])
        assert ruled.client.entries() == []
    os.close(go_on)
    os.close(tell)


def test_root_needs_no_rule_and_loses_nothing_by_them(ruled: Ruled) -> None:
    ruled.put("web")
    for rules in ((), (rule("borrow", uid=0, names=("db",)),), (rule(everyone=True),)):
        ruled.client.borrow("web").close()
        ruled.set_rules(*rules)
        ruled.client.borrow("web").close()
        ruled.client.stats()


# --- tickets ----------------------------------------------------------------------------------


def test_a_ticket_lets_its_bearer_borrow_if_any_rule_admits_it(ruled: Ruled) -> None:
    with memory() as number, ruled.client.share(number) as ref:
        ticket = ref._ticket
        borrow = lambda client: client.borrow_ticket(ticket).close()  # noqa: E731
        with pytest.raises(NotPermitted) as caught:
            ask_as(ruled.address, borrow)
        assert caught.value.verb == "connect"
        ruled.set_rules(rule())
        ask_as(ruled.address, borrow)
        with session_as(ruled.address, ALICE) as raw:
            ruled.set_rules(rule(uid=BOB))
            raw.send(BORROW, 1, ticket, *SHARED)
            assert raw.receive() == ([NOT_PERMITTED, 1, ALICE, "connect", "*"], [])
            ruled.set_rules(rule())
            os.close(raw.borrow(2, ticket))  # type: ignore[arg-type]
    with pytest.raises(UnknownTicket):
        ask_as(ruled.address, borrow)


def test_a_ticket_is_retired_by_its_maker_or_by_a_rule(ruled: Ruled) -> None:
    with memory() as number, ruled.client.share(number) as ref:
        ticket = ref._ticket
        retire = lambda client: client.retire(ticket)  # noqa: E731
        for rules in ((rule(),), (rule("retire", names=("web*",)),)):
            ruled.set_rules(*rules)
            with pytest.raises(NotPermitted) as caught:
                ask_as(ruled.address, retire)
            assert caught.value.data == (ALICE, "retire", "*")
            ref.borrow().close()
        with pytest.raises(UnknownTicket):
            ask_as(ruled.address, lambda client: client.retire(TICKET))
        ruled.set_rules(rule("retire"))
        ask_as(ruled.address, retire)
        with pytest.raises(UnknownTicket):
            ref.borrow()
    ruled.set_rules(rule("put"))
    ask_as(ruled.address, share)  # whose end retires what it made
    wait_until(lambda: ruled.client.stats()["entries"] == 0)
