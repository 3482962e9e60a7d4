"""Rules that a SIGHUP changes, at a broker as a user starts it: what was granted stays, the next
request is looked at by the new ones, and a file with a mistake changes nothing.

The others are sessions spoken by hand, which say what a client of ours never would.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon.kit import Served, served
from ruled import ALICE, BOB, Alike, memory, session_as
from support import BORROW, CANCEL, ENTRIES, LOANS, MORE, PUT, RETIRE, RETURN, SHARED, STATS
from support import wait_until as wait

from fdbroker.ipc.client.client import forget_client_at
from fdbroker.ipc.client.pool import disconnect_all

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs other uids")

NOT_PERMITTED, TIMED_OUT, UNKNOWN_TICKET, EXCEEDED = 29, 25, 22, 35
EXCLUSIVE, READONLY = 1, 2  # flags of BORROW
NAMELESS_EPHEMERAL = 6  # flags of PUT
MEMORY = "memfd = 4096"
LISTEN = 'listen = "127.0.0.1:0"'


class Reloaded:
    """A broker behind a socket that everybody may open, and its file."""

    def __init__(self, folder: Path, broker: Served) -> None:
        self._path = folder / "f.toml"
        self.broker = broker
        self.address = broker.address
        self.client = broker.client

    def write(self, *rules: str, **entries: str) -> None:
        """Rules as in the file, without their head."""
        write(self._path, *rules, **entries)

    def reload(self, *rules: str, **entries: str) -> None:
        """They hold when this returns."""
        self.write(*rules, **entries)
        assert f"rules={len(rules)}" in self.broker.reload("event=configured")

    def session(self, uid: int = ALICE, *, puts: bool = False) -> Alike:
        """A session of somebody else."""
        return Alike(session_as(self.address, uid, puts=puts))

    def count(self, what: str) -> int:
        return self.client.stats()[what]


def write(path: Path, *rules: str, **entries: str) -> None:
    path.write_text(
        '[server]\nmode = "0666"\n'
        + "".join(f"[entry.{name}]\n{words}\n" for name, words in entries.items())
        + "".join(f"[[rule]]\n{words}\n" for words in rules)
    )


@contextlib.contextmanager
def configured(*rules: str, **entries: str) -> Iterator[Reloaded]:
    folder = Path(tempfile.mkdtemp(prefix="fdbroker-reload-"))
    folder.chmod(0o711)
    try:
        write(folder / "f.toml", *rules, **entries)
        with served(folder, "--config", folder / "f.toml") as broker:
            yield Reloaded(folder, broker)
            forget_client_at(broker.address)
            disconnect_all(broker.address)
    finally:
        shutil.rmtree(folder)


def rule(verbs: list[str], more: str = "", *, uid: int = ALICE) -> str:
    return f"uid = {uid}\nverbs = {verbs}\n{more}"


def refused(verb: str, name: str, uid: int = ALICE) -> list[Any]:
    return [NOT_PERMITTED, uid, verb, name]


def close_all(numbers: list[int]) -> None:
    for number in numbers:
        os.close(number)


# --- its rule is gone -------------------------------------------------------------------------


def test_a_loan_stays_with_its_later_parts_until_it_is_returned() -> None:
    entries = {f"m{number}": MEMORY for number in range(300)}
    with configured(rule(["borrow", "list"]), **entries) as it:
        alice, other = it.session(), it.session()
        with alice.raw, other.raw:
            answer, first = alice.ask(BORROW, list(entries), *SHARED)
            assert (answer[1:3], len(first)) == ([300, 253], 253)
            assert other.borrow("m1") == []

            it.reload(rule(["list"]), **entries)
            assert {loan.uid for loan in it.client.loans()} == {ALICE}
            assert len(it.client.loans()) == 300
            answer, rest = alice.ask(MORE, 253)
            assert (answer[1:3], len(rest)) == ([300, 47], 47)
            assert os.fstat(rest[-1]).st_size == 4096
            (_, _, _, rows), _ = alice.ask(LOANS, "m1", 0, 0)
            assert [(row[0], row[3]) for row in rows] == [("m1", ALICE)]
            assert other.borrow("m1") == refused("borrow", "m1")

            it.reload(rule(["borrow"], uid=BOB), **entries)  # nor is it admitted
            answer, again = alice.ask(MORE, 299)
            assert answer[:3] == [0, 300, 1]
            assert alice.ask(LOANS, "m1", 0, 0) == (refused("list", "m1"), [])
            close_all(first + rest + again)
            alice.send(RETURN)
            wait(lambda: not it.client.loans())
            assert alice.borrow("m1") == refused("borrow", "m1")
            assert alice.borrow(list(entries)) == refused("borrow", "m0")
        wait(lambda: it.count("sessions") == 1)


def test_a_loan_ends_with_its_session_and_its_entry_with_its_last_loan() -> None:
    with configured(rule(["borrow"]), web=MEMORY, db=MEMORY) as it:
        alice, other = it.session(), it.session()
        inode = it.broker.inode("web")
        for session in (alice, other):
            close_all(session.ask(BORROW, "web", *SHARED)[1])
        it.reload(db=MEMORY)  # the entry is gone, too
        assert it.broker.number_of(inode)
        with alice.raw:
            pass
        wait(lambda: len(it.client.loans()) == 1)
        assert it.broker.number_of(inode)
        with other.raw:
            pass
        wait(lambda: not it.broker.number_of(inode))


def test_who_waits_keeps_the_place_in_the_line() -> None:
    """Turn after turn, shared and exclusive, with its deadline, and can give up."""
    with (
        configured(rule(["borrow"]), tty=MEMORY, db=MEMORY) as it,
        contextlib.ExitStack() as stack,
    ):
        waiting = [it.session() for _ in range(5)]
        for session in waiting:
            stack.enter_context(session.raw)
        turn = it.client.borrow("tty", exclusive=True)
        requests = [
            ("tty", EXCLUSIVE, None, ""),
            (["db", "tty"], 0, None, ""),
            ("tty", READONLY, None, ""),
            ("tty", EXCLUSIVE, None, ""),
            ("tty", 0, 1, ""),
        ]
        exclusive, several, readonly, gives_up, timed = waiting
        for number, (session, request) in enumerate(zip(waiting, requests, strict=True), 1):
            session.send(BORROW, *request)
            wait(
                lambda number=number: (
                    it.count("waiting") == number or select.select([timed.raw.sock], [], [], 0)[0]
                )
            )

        it.reload(tty=MEMORY, db=MEMORY)
        assert it.count("waiting") >= 4
        gives_up.send(CANCEL)
        for session in (timed, gives_up):
            message, fds = session.raw.receive()
            assert message is not None
            assert (message[:2], fds) == ([TIMED_OUT, 1], [])
        turn.close()
        for session, count in ((exclusive, 1), (several, 2), (readonly, 1)):
            message, fds = session.raw.receive()
            assert message is not None
            assert (message[:3], len(fds)) == ([0, 1, count], count)
            close_all(fds)
            session.send(RETURN)
        for session in waiting:
            assert session.borrow("tty") == refused("borrow", "tty")
        wait(lambda: (it.count("waiting"), it.count("loans")) == (0, 0))


def test_who_waits_for_a_close_is_told_of_it() -> None:
    with configured(rule(["borrow", "retire"]), web=MEMORY) as it:
        alice = it.session()
        with alice.raw:
            with it.client.borrow("web"):
                alice.send(RETIRE, "web", True, None)
                wait(lambda: it.client.entries()[0].retired)
                it.reload()
            assert alice.raw.receive() == ([0, 1], [])
            assert alice.borrow("web") == refused("borrow", "web")


def test_who_is_admitted_no_more_may_return_and_gets_nothing() -> None:
    rules = rule(["borrow", "put", "retire", "list", "admin"])
    with configured(rules, web=MEMORY) as it, memory() as number:
        alice = it.session(puts=True)
        with alice.raw:
            alice.raw.send(PUT, 1, "", NAMELESS_EPHEMERAL, fds=[number])
            message, _ = alice.raw.receive()
            assert message is not None
            ticket, alice.seq = message[3], 1
            everything = [
                (BORROW, "web", *SHARED),
                (BORROW, ticket, *SHARED),
                (RETIRE, "web", False, None),
                (ENTRIES, 0),
                (LOANS, "", 0, 0),
                (LOANS, "web", 0, 0),
                (STATS,),
            ]
            for _ in range(2):  # they are known then
                for request in everything[3:]:
                    assert alice.ask(*request)[0][0] == 0
                assert [alice.borrow("web"), alice.borrow(ticket)] == [[], []]
            assert it.count("entries") == 2

            it.reload(web=MEMORY)
            refusals = [alice.ask(*request) for request in everything]
            assert refusals == [
                (refused(verb, name), [])
                for verb, name in [
                    ("borrow", "web"),
                    ("connect", "*"),
                    ("retire", "web"),
                    ("list", "*"),
                    ("list", "*"),
                    ("list", "web"),
                    ("admin", "*"),
                ]
            ]
            alice.raw.send(PUT, alice.seq + 1, "new", 0, fds=[number])
            message, _ = alice.raw.receive()
            assert message == [NOT_PERMITTED, alice.seq + 1, ALICE, "put", "new"]
            alice.seq += 1
            newcomer = session_as(it.address, ALICE, hello=False)
            with newcomer:
                told = newcomer.say_hello()
                assert told == [NOT_PERMITTED, 0, ALICE, "connect", "*"]
            assert it.count("entries") == 2  # what it has put is there as long as it is
        wait(lambda: (it.count("entries"), it.count("sessions")) == (1, 1))


def test_what_it_put_is_its_own_to_retire_by_the_ticket() -> None:
    """That gives something up.  It needs no right, not even to be admitted any more."""
    with configured(rule(["put"]), rule(["borrow"], uid=BOB)) as it, memory() as number:
        alice, other, bob = it.session(puts=True), it.session(), it.session(BOB)
        with alice.raw, other.raw, bob.raw:
            alice.raw.send(PUT, 1, "", NAMELESS_EPHEMERAL, fds=[number])
            message, _ = alice.raw.receive()
            assert message is not None
            ticket = message[3]
            assert bob.borrow(ticket) == []
            it.reload(rule(["retire"], 'names = ["w*"]', uid=BOB))
            assert bob.ask(RETIRE, ticket, False, None) == (refused("retire", "*", BOB), [])
            assert bob.borrow(ticket) == []
            assert other.ask(RETIRE, ticket, False, None) == ([0], [])
            assert bob.borrow(ticket) == [UNKNOWN_TICKET]
            wait(lambda: it.count("entries") == 0)


# --- its rule is narrower ---------------------------------------------------------------------


def test_read_only_from_now_on() -> None:
    with configured(rule(["borrow"]), web=MEMORY, tty=MEMORY) as it:
        holder, waiter, asker = it.session(), it.session(), it.session()
        with holder.raw, waiter.raw, asker.raw:
            _, (lent,) = holder.ask(BORROW, "web", *SHARED)
            for _ in range(3):
                assert asker.borrow("web") == []
            turn = it.client.borrow("tty", exclusive=True)
            waiter.send(BORROW, "tty", *SHARED)
            wait(lambda: it.count("waiting") == 1)

            it.reload(rule(["borrow"], 'mode = "r"'), web=MEMORY, tty=MEMORY)
            for name in ("web", "tty"):
                for _ in range(2):
                    assert asker.borrow(name, 0, 0) == refused("borrow", name)
            assert asker.borrow("web", READONLY) == []
            os.pwrite(lent, b"still", 0)
            turn.close()
            message, (waited,) = waiter.raw.receive()
            assert message is not None
            assert message[:2] == [0, 1]
            os.pwrite(waited, b"still", 0)
            close_all([lent, waited])
            for session, name in ((holder, "web"), (waiter, "tty")):
                session.send(RETURN)
                assert session.borrow(name) == refused("borrow", name)
                _, (fresh,) = session.ask(BORROW, name, READONLY, None, "")
                assert os.pread(fresh, 5, 0) == b"still"
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.pwrite(fresh, b"no", 0)
                os.close(fresh)
            wait(lambda: it.count("jobs") == 0)
        wait(lambda: it.count("loans") == 0)


def test_no_listeners_from_now_on() -> None:
    listeners = rule(["borrow"], "listeners = true")
    with configured(listeners, web=LISTEN, db=MEMORY) as it:
        holder, waiter, asker = it.session(), it.session(), it.session()
        port = int(it.broker.entries()["web"].where.rpartition(":")[2])
        with holder.raw, waiter.raw, asker.raw:
            for _ in range(3):
                assert asker.borrow("web") == []
            _, (lent,) = holder.ask(BORROW, "web", EXCLUSIVE, None, "")
            waiter.send(BORROW, "web", *SHARED)
            wait(lambda: it.count("waiting") == 1)

            it.reload(rule(["borrow"]), web=LISTEN, db=MEMORY)
            for _ in range(2):
                assert asker.borrow("web") == refused("listen", "web")
                assert asker.borrow(["db", "web"], 0, 0) == refused("listen", "web")
                assert asker.borrow("db") == []
            with (
                socket.create_connection(("127.0.0.1", port)),
                socket.socket(fileno=lent) as listener,
            ):
                listener.accept()[0].close()
            holder.send(RETURN)
            message, (waited,) = waiter.raw.receive()
            assert message is not None
            assert message[:2] == [0, 1]
            os.close(waited)
            waiter.send(RETURN)
            for session in (holder, waiter):
                assert session.borrow("web") == refused("listen", "web")
            it.reload(listeners, web=LISTEN, db=MEMORY)
            assert asker.borrow("web") == []


def test_a_name_becomes_a_listener_by_the_file() -> None:
    """What the broker knows of its clients' words was said of another entry."""
    lends = rule(["borrow"])
    with configured(lends, web=MEMORY, db=MEMORY) as it:
        asker = it.session()
        with asker.raw:
            for _ in range(3):
                assert asker.borrow("web") == asker.borrow(["db", "web"]) == []
            it.reload(lends, web=LISTEN, db=MEMORY)
            for _ in range(3):
                assert asker.borrow("web") == refused("listen", "web")
                assert asker.borrow(["db", "web"]) == refused("listen", "web")
            it.reload(lends, web=MEMORY, db=MEMORY)
            assert asker.borrow("web") == []
            it.client.retire("web")
            it.reload(lends, db=MEMORY)
            it.reload(lends, web=LISTEN)
            assert asker.borrow("web") == refused("listen", "web")


def test_a_lower_quota_takes_nothing_away() -> None:
    """Who is over it gets nothing more until it is below; one that is raised holds at once."""
    may = ["borrow", "put", "list"]
    generous = rule(may, "quota = { sessions = 4, loans = 3, waiting = 2 }")
    with configured(generous, web=MEMORY, tty=MEMORY) as it:
        one, two, three, four = (it.session() for _ in range(4))
        with one.raw, two.raw, three.raw, four.raw:
            for session in (one, two):
                close_all(session.ask(BORROW, "web", *SHARED)[1])
            turn = it.client.borrow("tty", exclusive=True)
            four.send(BORROW, "tty", *SHARED)
            wait(lambda: it.count("waiting") == 1)
            for _ in range(2):  # what is known is held to it as well
                assert three.borrow(["web", "web"]) == [EXCEEDED, "loans", 3, 3]

            it.reload(
                rule(may, "quota = { sessions = 2, loans = 1, waiting = 0 }"),
                web=MEMORY,
                tty=MEMORY,
            )
            (usage,) = (usage for usage in it.client.usage() if usage.uid == ALICE)
            now = usage.used["sessions"], usage.used["loans"], usage.used["waiting"]
            assert now == (4, 3, 1)
            assert [usage.limits[what] for what in ("sessions", "loans", "waiting")] == [2, 1, 0]
            assert turned_away(it.address) == [EXCEEDED, 0, "sessions", 4, 2]
            assert three.borrow("web") == [EXCEEDED, "loans", 3, 1]
            turn.close()
            message, fds = four.raw.receive()  # it has kept its place
            assert message is not None
            assert message[:2] == [0, 1]
            close_all(fds)
            four.send(RETURN)
            two.send(RETURN)
            wait(lambda: it.count("loans") == 1)
            assert three.borrow("web") == [EXCEEDED, "loans", 1, 1]
            one.send(RETURN)
            wait(lambda: it.count("loans") == 0)
            assert three.borrow("web") == []

            it.reload(generous, web=MEMORY, tty=MEMORY)
            for session in (one, two, three):
                close_all(session.ask(BORROW, "web", *SHARED)[1])
            assert four.borrow("web") == [EXCEEDED, "loans", 3, 3]
        it.reload(rule(may, "[quota]\nsessions = 1"), web=MEMORY)  # of all uids
        wait(lambda: ALICE not in {usage.uid for usage in it.client.usage()})
        with it.session().raw:
            assert turned_away(it.address) == [EXCEEDED, 0, "sessions", 1, 1]
        it.reload(rule(may, "quota.sessions = 2"), "everyone = true\nverbs = ['list']", web=MEMORY)
        wait(lambda: ALICE not in {usage.uid for usage in it.client.usage()})
        with it.session().raw, it.session().raw:  # a rule that says nothing of it changes nothing
            assert turned_away(it.address) == [EXCEEDED, 0, "sessions", 2, 2]


def turned_away(address: str) -> list[Any]:
    with session_as(address, ALICE, hello=False) as raw:
        return raw.say_hello()


# --- it has a mistake -------------------------------------------------------------------------


MISTAKES = [  # the rule, which is in line 5; the line of the mistake; what is said
    ("uid = 65532\nverbs = ['steal']", 7, "verbs is a list of borrow, put, retire, list, admin"),
    ("uid = 'nobody at all'\nverbs = ['borrow']", 6, "uid is a user of this system"),
    ("everyone = true\nverbs = ['borrow']\nmode = 'w'", 8, 'mode is "r"'),
    ("everyone = true\nverbs = ['borrow']\nlistners = true", 8, "unknown key 'listners'"),
    ("everyone = true\nverbs = ['list']\nlisteners = true", 8, 'verbs take "borrow" then'),
    (
        "everyone = true\nverbs = ['borrow']\nmode = 'r'\nlisteners = true",
        9,
        'does not go with mode = "r"',
    ),
    ("everyone = true\nverbs = ['borrow'", 7, "toml.io"),
    (
        "everyone = true\nverbs = ['borrow']\nquota = { loans = -1 }",
        8,
        "loans is a number, 0 or more",
    ),
    ("everyone = true\nverbs = ['borrow']\n[quota]\nloan = 1", 9, "unknown key 'loan'"),
]


@pytest.mark.parametrize(("mistake", "line", "said"), MISTAKES, ids=lambda value: str(value)[-24:])
def test_a_mistake_changes_nothing_of_what_anybody_may(mistake: str, line: int, said: str) -> None:
    """Nor does what cannot be opened, beside rules that are right."""
    lends = rule(["borrow"], 'names = ["web"]')
    with configured(lends, web=MEMORY, tty=LISTEN) as it:
        alice, holder = it.session(), it.session()
        with alice.raw, holder.raw:
            close_all(holder.ask(BORROW, "web", *SHARED)[1])

            def check_all_is_as_before() -> None:
                for _ in range(2):
                    assert alice.borrow("web") == []
                    assert alice.borrow("tty") == refused("borrow", "tty")
                    assert alice.ask(STATS) == (refused("admin", "*"), [])
                assert [loan.uid for loan in it.client.loans()] == [ALICE]
                newcomer = session_as(it.address, BOB, hello=False)
                with newcomer:
                    told = newcomer.say_hello()
                    assert told == [NOT_PERMITTED, 0, BOB, "connect", "*"]
                assert it.broker.entries().keys() == {"web", "tty"}

            check_all_is_as_before()
            it.write(mistake, web=MEMORY)  # tty is gone, and so is what it may
            told = it.broker.reload("event=reload-failed")
            assert f"f.toml:{line}: " in told
            assert said.replace("'", "\\'") in told or said in told
            check_all_is_as_before()
            it.write(rule(["list"], uid=BOB), web='open = "/none/such"')
            assert "/none/such" in it.broker.reload("event=reload-failed")
            check_all_is_as_before()
            it.reload(rule(["borrow"], uid=BOB), web=MEMORY)
            assert alice.borrow("web") == refused("borrow", "web")
