"""What fdbroker stats prints: who uses how much of what, and how much each may have."""

from __future__ import annotations

import json
import os
import pwd
import sys
from collections.abc import Iterator

import pytest
from ipc.ruled import ALICE, BOB, SIZES, Ruled, become, rule, session_as
from support import BORROW, SHARED, in_fork, start_fork, wait_until

import fdbroker
from fdbroker.cli import main, options, stats, status
from fdbroker.lender.accounting import DEFAULT, RESOURCES
from fdbroker.lender.rules import VERBS

from .kit import command, complaint, put_memory, succeeds
from .test_output import table

# a fork that has become another user may not be able to read them
assert options
assert stats

HEADER = ("USER", *(what.upper() for what in RESOURCES))
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs other uids")


def test_the_brokers_own_user_is_counted_and_has_no_limits(broker: fdbroker.Broker) -> None:
    put_memory(broker)
    with broker.borrow("data"):
        text = succeeds(broker, "stats")
        counts = json.loads(succeeds(broker, "stats", "--json"))
    *lines, total = text.splitlines()
    (row,) = table("\n".join(lines))
    assert tuple(row) == HEADER
    assert row.pop("USER") == pwd.getpwuid(os.geteuid()).pw_name
    assert all(cell.isdigit() for cell in row.values())
    assert (row["LOANS"], row["ENTRIES"], row["WAITING"]) == ("1", "1", "0")
    assert int(row["SESSIONS"]) >= 2  # the command's own is one
    assert total == f"1 entry in all, {counts['broker']['descriptors']} open descriptors"
    (user,) = counts["users"]
    assert user["uid"] == os.geteuid()
    assert user["limits"] == dict.fromkeys(RESOURCES)
    assert (user["used"]["loans"], user["used"]["entries"]) == (1, 1)
    assert counts["broker"].keys() == broker.stats().keys()


def test_the_help_teaches_it(broker: fdbroker.Broker) -> None:
    text = succeeds(broker, "stats", "--help")
    for what in RESOURCES:
        assert what.upper() in text
    assert "fdbroker stats --json" in text
    assert "right to admin" in text
    assert "stats" in succeeds(broker, "--help")


@pytest.fixture
def ruled() -> Iterator[Ruled]:
    with Ruled() as broker:
        yield broker
        wait_until(lambda: broker.client.stats()["loans"] == 0)  # the end of a session is seen


@as_root
def test_each_user_with_what_it_may_have(ruled: Ruled) -> None:
    """Of whoever uses anything, by uid; some use nothing and are not there."""
    ruled.put("a", "b", "tty")
    ruled.set_rules(
        rule(*VERBS)._replace(quota=(("loans", 8), ("sessions", 2))), rule("list", uid=BOB)
    )
    before = json.loads(succeeds(ruled.client, "stats", "--json"))
    assert [user["uid"] for user in before["users"]] == [0]
    with (
        ruled.client.borrow("tty", exclusive=True),
        session_as(ruled.address, ALICE) as one,
        session_as(ruled.address, ALICE) as other,
        session_as(ruled.address, BOB),
    ):
        one.send(BORROW, 1, ["a", "b"], *SHARED)
        for number in one.receive()[1]:
            os.close(number)
        other.send(BORROW, 1, "tty", *SHARED)
        wait_until(lambda: ruled.client.stats()["waiting"] == 1)
        *lines, total = succeeds(ruled.client, "stats").splitlines()
        counts = json.loads(succeeds(ruled.client, "stats", "--json"))

    rows = table("\n".join(lines))
    assert [tuple(row) for row in rows] == [HEADER] * 3
    root, bob, alice = rows  # by uid
    assert [root["USER"], bob["USER"], alice["USER"]] == ["root", str(BOB), str(ALICE)]
    assert all(root[what.upper()].isdigit() for what in RESOURCES)
    assert (root["LOANS"], root["ENTRIES"]) == ("1", "3")
    assert (alice["SESSIONS"], alice["LOANS"]) == ("2/2", "3/8")
    assert alice["WAITING"].startswith("1/")
    assert bob["ENTRIES"] == f"0/{DEFAULT.entries}"
    used, most = bob["SESSIONS"].split("/")
    assert used == "1"
    assert int(most) <= SIZES[0] / 2  # half of what is free, which is less than the default
    assert total.startswith("3 entries in all, ")

    by_uid = {user["uid"]: user for user in counts["users"]}
    assert list(by_uid) == [0, BOB, ALICE]
    for user in by_uid.values():
        assert tuple(user) == ("uid", "used", "limits")
        assert tuple(user["used"]) == tuple(user["limits"]) == RESOURCES
    assert by_uid[0]["limits"] == dict.fromkeys(RESOURCES)
    assert by_uid[ALICE]["limits"]["sessions"] == 2
    assert by_uid[ALICE]["used"]["loans"] == 3
    assert counts["broker"]["entries"] == 3


@as_root
def test_who_is_over_a_lowered_quota_is_shown_so(ruled: Ruled) -> None:
    ruled.set_rules(rule("list"))
    with session_as(ruled.address, ALICE), session_as(ruled.address, ALICE):
        ruled.set_rules(rule("list")._replace(quota=(("sessions", 1),)))
        *lines, _ = succeeds(ruled.client, "stats").splitlines()
    assert table("\n".join(lines))[1]["SESSIONS"] == "2/1"


@as_root
def test_it_takes_the_right_to_admin(ruled: Ruled) -> None:
    def ask_as(uid: int) -> tuple[int, str, str]:
        """The command in a fork, which need not be allowed to read the interpreter."""
        out, err = os.memfd_create("out"), os.memfd_create("err")

        def run() -> int:
            become(uid)
            sys.stdout, sys.stderr = open(out, "w"), open(err, "w")  # noqa: SIM115 - it ends
            return main(["stats", "--socket", ruled.address])

        code = in_fork(run)
        said = []
        for number in (out, err):
            said.append(os.pread(number, 10_000, 0).decode())
            os.close(number)
        return code, *said

    ruled.set_rules(rule(*(VERBS - {"admin"})), rule("admin", uid=BOB))
    code, out, err = ask_as(ALICE)
    assert (code, out) == (status.NOT_PERMITTED, "")
    assert err.startswith("fdbroker: ")
    assert "admin" in err
    assert err.count("\n") == 1
    code, out, err = ask_as(BOB)
    assert (code, err) == (status.DONE, "")
    *lines, _ = out.splitlines()
    assert str(BOB) in {row["USER"] for row in table("\n".join(lines))}


@as_root
def test_more_users_than_go_into_one_answer(ruled: Ruled) -> None:
    """Their entries stay when they have gone."""
    uids = range(60_100, 60_170)  # a page is 64
    ruled.set_rules(rule("put", everyone=True))

    def put_as(uid: int) -> None:
        become(uid)
        with fdbroker.Client(ruled.address) as client:
            put_memory(client, f"of/{uid}")

    for wait in [start_fork(lambda uid=uid: put_as(uid)) for uid in uids]:
        wait()
    counts = json.loads(succeeds(ruled.client, "stats", "--json"))
    assert [user["uid"] for user in counts["users"]] == [0, *uids]
    assert {user["used"]["entries"] for user in counts["users"][1:]} == {1}
    *lines, total = succeeds(ruled.client, "stats").splitlines()
    assert len(table("\n".join(lines))) == 1 + len(uids)
    assert total.startswith(f"{len(uids)} entries in all")


def test_a_weird_user_name_is_escaped(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], broker: fdbroker.Broker
) -> None:
    """Names of users come from whoever the system asks for them (nsswitch.conf(5))."""
    entry = pwd.getpwuid(os.geteuid())
    weird = pwd.struct_passwd(("\x1b[31mx\n", *entry[1:]))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: weird)
    assert main(["stats", "--socket", broker.address]) == status.DONE
    out, err = capfd.readouterr()
    assert err == ""
    assert all(line.isprintable() for line in out.splitlines())
    assert "\\x1b[31mx\\n" in out


def test_no_broker_and_no_reader(broker: fdbroker.Broker, tmp_path) -> None:
    assert "no broker" in complaint(command(str(tmp_path / "none"), "stats"), status.NO_BROKER)
    reader, writer = os.pipe()
    os.close(reader)
    for line in ("stats", "stats --json"):
        done = command(broker, *line.split(), stdout=writer)
        assert (done.returncode, done.stderr) == (status.NO_READER, "")
    os.close(writer)
