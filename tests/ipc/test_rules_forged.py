"""What the rules hide, and who tries to get around them: messages made by hand."""

from __future__ import annotations

import os
from typing import Any

import pytest
from ruled import (
    ALICE,
    BOB,
    Ruled,
    ask_as,
    memory,
    put,
    rule,
    session_as,
)
from support import (
    BORROW,
    ENTRIES,
    LOANS,
    PUT,
    RETIRE,
    RETURN,
    SHARED,
    STATS,
    Raw,
    wait_until,
)

from fdbroker.errors import NotPermitted, UnknownEntry
from fdbroker.ipc.protocol.codec import HEAD, template
from fdbroker.ipc.protocol.messages import REPLACE
from fdbroker.lender.rules import VERBS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs other uids")

NOT_PERMITTED, BAD_NAME = 29, 20
NAMELESS_EPHEMERAL = 6


# --- what is not learned, and what is forged --------------------------------------------------


def answers(raw: Raw, *messages: list[Any]) -> list[list[Any]]:
    """The answers to those requests, without their seq."""
    found = []
    for seq, (verb, *fields) in enumerate(messages, 1):
        raw.send(verb, seq, *fields)
        message, fds = raw.receive()
        assert message is not None
        assert (message[1], fds) == (seq, [])
        found.append([message[0], *message[2:]])
    return found


def test_who_is_refused_does_not_learn_whether_it_is_there(ruled: Ruled) -> None:
    ruled.put("here")
    ruled.set_rules(rule(*VERBS, names=("mine/*",)))
    here, gone = (
        [
            [BORROW, name, *SHARED],
            [BORROW, name, 1, 0, ""],
            [BORROW, ["mine/none", name], 0, None, ""],
            [RETIRE, name, False, None],
            [RETIRE, name, True, 0],
            [LOANS, name, 0, 0],
        ]
        for name in ("here", "gone")
    )
    with (
        ruled.client.borrow("here", exclusive=True),
        session_as(ruled.address, ALICE) as one,
        session_as(ruled.address, ALICE) as other,
    ):
        here, gone = answers(one, *here), answers(other, *gone)
    verbs = ["borrow", "borrow", "borrow", "retire", "retire", "list"]
    assert here == [[NOT_PERMITTED, ALICE, verb, "here"] for verb in verbs]
    assert gone == [[NOT_PERMITTED, ALICE, verb, "gone"] for verb in verbs]
    for name in ("here", "gone"):
        for how in ({}, {"replace": True}):
            with pytest.raises(NotPermitted) as caught:
                ask_as(ruled.address, lambda client, n=name, how=how: put(client, n, **how))
            assert caught.value.data == (ALICE, "put", name)
    with pytest.raises(UnknownEntry):  # of what it may have it does
        ask_as(ruled.address, lambda client: client.borrow("mine/none"))


def test_a_bad_name_is_never_logged(ruled: Ruled) -> None:
    ruled.set_rules(rule(*VERBS, names=("mine",)))
    evil = "\x1b[31m\nevent=ready uid=0"
    with session_as(ruled.address, ALICE) as raw:
        found = answers(
            raw,
            [BORROW, evil, *SHARED],
            [RETIRE, evil, False, None],
            [LOANS, evil, 0, 0],
            [BORROW, [""], *SHARED],
            [STATS],
        )
    assert found == [
        [BAD_NAME, evil],
        [BAD_NAME, evil],
        [BAD_NAME, evil],
        [NOT_PERMITTED, ALICE, "borrow", "*"],
        [NOT_PERMITTED, ALICE, "admin", "*"],
    ]
    assert ruled.refusals() == [f"{ALICE} verb={verb} name=*" for verb in ("borrow", "admin")]
    assert not any("\x1b" in line or line.startswith("event=ready") for line in ruled.log())


def test_nothing_goes_before_hello(ruled: Ruled) -> None:
    ruled.put("web")
    ruled.set_rules(rule(*VERBS))
    for message in ([BORROW, 1, "web", *SHARED], [STATS, 0], [RETIRE, 1, "web", False, None]):
        with session_as(ruled.address, ALICE, hello=False) as raw:
            raw.send(*message)
            raw.is_refused(60)
    assert [entry.name for entry in ruled.client.entries()] == ["web"]


def test_what_others_said_before_is_no_way_around_the_rules(ruled: Ruled) -> None:
    """The broker knows a request by its bytes: so each uid sends the same bytes, and again."""
    ruled.put("web", "db")
    ruled.set_rules(rule("borrow", names=("web",)), rule("borrow", names=("db",), uid=BOB))
    sessions = {
        uid: (Raw(ruled.address) if uid == 0 else session_as(ruled.address, uid))
        for uid in (0, ALICE, BOB)
    }
    may = {0: ("web", "db"), ALICE: ("web",), BOB: ("db",)}
    for turn in range(4):
        for uid in (0, ALICE, 0, BOB, ALICE):
            for name in ("web", "db"):
                raw = sessions[uid]
                seq = getattr(raw, "seq", 0) + 1
                head, tail = template(BORROW, name, *SHARED)
                raw.send_bytes(HEAD.pack(head, seq) + tail)
                message, fds = raw.receive()
                assert message is not None
                assert message[1] == seq
                if name in may[uid]:
                    assert message[0] == 0, (turn, uid, name)
                    os.close(*fds)
                    seq += 1
                    head, tail = template(RETURN)
                    raw.send_bytes(HEAD.pack(head, seq) + tail)
                else:
                    assert (message, fds) == ([NOT_PERMITTED, seq, uid, "borrow", name], [])
                raw.seq = seq  # type: ignore[attr-defined]
    for raw in sessions.values():
        raw.sock.close()


def test_descriptors_of_who_may_put_nothing_are_not_taken(ruled: Ruled) -> None:
    ruled.set_rules(rule("borrow", "retire"))
    with session_as(ruled.address, ALICE, hello=False) as raw:
        raw.send(0, 0, 1, True)  # it says that it will put
        assert raw.is_refused(NOT_PERMITTED) == [ALICE, "put", "*"]
    reader, writer = os.pipe()
    with session_as(ruled.address, ALICE, puts=False) as raw:
        try:
            raw.send(PUT, 1, "x", 0, fds=[writer])
        except PermissionError:  # the kernel refuses them (Linux 6.16)
            raw.send(PUT, 1, "x", 0)
        message, _ = raw.receive()
        assert message is not None
        assert message[0] in (60, NOT_PERMITTED)
    os.close(writer)
    assert os.read(reader, 1) == b""  # at the broker it is closed, too
    os.close(reader)
    with pytest.raises(NotPermitted, match='names = \\["x"\\], verbs = \\["put"\\]') as caught:
        ask_as(ruled.address, lambda client: put(client, "x"))
    assert caught.value.data == (ALICE, "put", "x")
    assert ruled.client.entries() == []


def test_what_a_refused_put_brought_is_closed(ruled: Ruled) -> None:
    ruled.set_rules(rule("put", names=("mine",)))
    reader, writer = os.pipe()
    with session_as(ruled.address, ALICE, puts=True) as raw:
        for seq, (name, flags) in enumerate(
            [("x", 0), ("mine", REPLACE), ("", NAMELESS_EPHEMERAL)], 1
        ):
            raw.send(PUT, seq, name, flags, fds=[writer])
            message, fds = raw.receive()
            assert message is not None
            assert (message[:3], fds) == ([NOT_PERMITTED, seq, ALICE], [])
    os.close(writer)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_a_wait_cannot_be_broken_into_by_what_is_refused(ruled: Ruled) -> None:
    """A second request before the answer is a fault, not a refusal; nothing stays behind."""
    ruled.put("web")
    ruled.set_rules(rule("borrow", names=("web",)))
    for second in ([BORROW, 2, "db", *SHARED], [RETIRE, 2, "web", False, None], [STATS, 2]):
        with ruled.client.borrow("web", exclusive=True), session_as(ruled.address, ALICE) as raw:
            raw.send(BORROW, 1, "web", *SHARED)
            wait_until(lambda: ruled.client.stats()["waiting"] == 1)
            raw.send(*second)
            assert raw.is_refused(60)
            wait_until(lambda: ruled.client.stats()["waiting"] == 0)
    assert ruled.refusals() == []


# --- lists ------------------------------------------------------------------------------------


def test_lists_show_what_may_be_listed(ruled: Ruled) -> None:
    ruled.put("web", "web2", "db")
    ruled.set_rules(rule("list", names=("web*",)), rule("list", "borrow", uid=BOB))
    with (
        ruled.client.borrow_all(["db", "web", "db", "web2"]),
        memory() as number,
        ruled.client.share(number) as ref,
        ref.borrow(),
    ):
        lists = lambda client: (  # noqa: E731
            sorted(entry.name for entry in client.entries()),
            [loan.entry for loan in client.loans()],
            [loan.entry for loan in client.loans("web2")],
        )
        assert ask_as(ruled.address, lists) == (["web", "web2"], ["web", "web2"], ["web2"])
        everything = (["db", "web", "web2"], ["db", "web", "db", "web2", ""], ["web2"])
        assert ask_as(ruled.address, lists, uid=BOB) == everything
        assert lists(ruled.client) == everything


def test_a_misspelt_name_suggests_only_what_may_be_listed(ruled: Ruled) -> None:
    ruled.put("webcam", "webapp")
    ruled.set_rules(rule("borrow"), rule("list", names=("webapp",)))
    for _ in range(2):
        with pytest.raises(UnknownEntry) as caught:
            ask_as(ruled.address, lambda client: client.borrow("webcap"))
        assert caught.value.nearest == ["webapp"]


def test_pages_of_what_is_mostly_hidden(ruled: Ruled) -> None:
    """Each page looks at so many at most, so some are empty; none of the rest is missing."""
    hidden = [f"hidden{number}" for number in range(2500)]
    shown = [f"shown{number}" for number in range(150)]
    every = [name for pair in zip(hidden, shown, strict=False) for name in pair]
    with memory() as number:
        for name in every + hidden[150:]:
            ruled.client.put(name, number)
        ruled.client.put("shown-last", number)
    shown.append("shown-last")
    ruled.set_rules(rule("list", names=("shown*",)))
    found = ask_as(ruled.address, lambda client: [entry.name for entry in client.entries()])
    assert found == shown
    assert len(ruled.client.entries()) == len(hidden) + len(shown)
    with ruled.client.borrow_all(hidden), ruled.client.borrow_all(["shown3", *hidden[:80]]):
        loans = lambda client: [loan.entry for loan in client.loans()]  # noqa: E731
        assert ask_as(ruled.address, loans) == ["shown3"]
        assert loans(ruled.client) == [*hidden, "shown3", *hidden[:80]]
    with session_as(ruled.address, ALICE) as raw:
        pages, cursor, seq = [], 0, 0
        while seq == 0 or cursor:
            seq += 1
            raw.send(ENTRIES, seq, cursor)
            message, _ = raw.receive()
            assert message is not None
            _, _, cursor, rows = message
            pages.append(len(rows))
        assert sum(pages) == len(shown)
        assert len(pages) >= 2
