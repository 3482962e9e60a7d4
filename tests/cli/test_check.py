"""`fdbroker check`: it says what the broker would do, by which rule."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdbroker.cli import check, status
from fdbroker.lender.rules import LISTEN, READ, VERBS, Rule, Rules

RULES = """
[[rule]]
uid = 60001
names = ["web*", "api"]
verbs = ["borrow", "list"]

[[rule]]
gid = 60007
verbs = ["put"]

[[rule]]
everyone = true
names = ["public/*"]
verbs = ["borrow"]

[[rule]]
uid = 60003
names = ["log"]
mode = "r"
verbs = ["borrow"]

[[rule]]
uid = 60004
verbs = ["borrow"]

[[rule]]
uid = 60004
names = ["api", "udp"]
verbs = ["borrow"]
listeners = true

[entry.api]
listen = 8000

[entry.web1]
listen = "unix:/run/web"

[entry.udp]
listen = "udp:8000"

[entry.log]
memfd = 1
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "fdbroker.toml"
    path.write_text(RULES)
    return path


def run(*words: str | Path) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "fdbroker", "check", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--uid 60001 borrow webcam",
            'allowed: rule 1, uid = 60001, names = ["web*", "api"], verbs = ["borrow", "list"]',
        ),
        (
            "--uid 60001 --gid 60007 put tty",
            'allowed: rule 2, gid = 60007, names = ["*"], verbs = ["put"]',
        ),
        (
            "--uid 60002 borrow public/a",
            'allowed: rule 3, everyone = true, names = ["public/*"], verbs = ["borrow"]',
        ),
        (
            "--uid 60002 connect",
            'allowed: rule 3, everyone = true, names = ["public/*"], verbs = ["borrow"]',
        ),
        (
            "--uid 60003 --mode r borrow log",
            'allowed: rule 4, uid = 60003, names = ["log"], verbs = ["borrow"], mode = "r"',
        ),
        ("--uid 60001 --mode r borrow webcam", "allowed: rule 1, uid = 60001"),
        (
            "--uid 60003 borrow log",
            "refused: of those that speak of uid 60003 (rule 3, 4) none allows it",
        ),
        ("--uid root admin x", "allowed: root and the broker's own uid may do all"),
        (
            "--uid 60001 borrow tty",
            "refused: of those that speak of uid 60001 (rule 1, 3) none allows it",
        ),
        (
            "--uid 60004 borrow api",
            (
                'allowed: rule 6, uid = 60004, names = ["api", "udp"], verbs = ["borrow"], '
                'listeners = true; it listens (listen = "8000" in the file)\n'
            ),
        ),
        (
            "--uid 60004 borrow web1",
            (
                "refused: rule 5 allows it but for a socket that listens, as this one does "
                '(listen = "unix:/run/web" in the file): that takes listeners = true\n'
            ),
        ),
        (
            "--uid 60004 --listening borrow tty",
            (
                "refused: rule 5 allows it but for a socket that listens, as this one does "
                "(--listening): that takes listeners = true\n"
            ),
        ),
        (
            "--uid 60003 --mode r --listening borrow log",
            "refused: rule 4 allows it but for a socket that listens",
        ),
        (
            "--uid 60004 borrow tty",
            (
                'allowed: rule 5, uid = 60004, names = ["*"], verbs = ["borrow"]; not if it is a '
                "socket that listens (see --listening)\n"
            ),
        ),
        (
            "--uid 60004 borrow log",
            'allowed: rule 5, uid = 60004, names = ["*"], verbs = ["borrow"]\n',
        ),
        (
            "--uid 60004 borrow udp",
            'allowed: rule 5, uid = 60004, names = ["*"], verbs = ["borrow"]\n',
        ),
        (
            "--uid 60001 --listening borrow tty",
            "refused: of those that speak of uid 60001 (rule 1, 3) none allows it\n",
        ),
        (
            "--uid 60001 --listening list web1",
            'allowed: rule 1, uid = 60001, names = ["web*", "api"], verbs = ["borrow", "list"]\n',
        ),
        ("--uid root --listening borrow web1", "allowed: root and the broker's own uid"),
        ("--uid 60001 put web1", "refused: of those that speak of uid 60001 (rule 1, 3) none"),
    ],
)
def test_by_which_rule(config: Path, words: str, said: str) -> None:
    code, out, err = run("--config", config, *words.split())
    assert code == (status.DONE if said.startswith("allowed") else status.NOT_PERMITTED)
    assert out.startswith(said)
    assert out.count("\n") == 1
    assert err == ""


def test_the_quota_that_holds(tmp_path: Path) -> None:
    """Of the rules that are about it, and speak of it, the most; else that for all."""
    path = tmp_path / "f.toml"
    path.write_text("""
        [quota]
        waiting = 9
        loans = 7
        [[rule]]
        uid = 60001
        verbs = ["list"]
        quota = { sessions = 5, loans = 1 }
        [[rule]]
        gid = 60007
        verbs = ["list"]
        quota = { sessions = 6 }
        [[rule]]
        everyone = true
        verbs = ["list"]
    """)
    rule = 'uid = 60001, names = ["*"], verbs = ["list"], quota = { sessions = 5, loans = 1 }'
    rest = "entries = 1024, waiting = 9, bytes = 4194304, closes = 1024, inflight = 1024\n"
    for words, said in (
        ("--uid 60001", f"rule 1, {rule}; its quota: sessions = 5, loans = 1, {rest}"),
        ("--uid 60001 --gid 60007", f"rule 1, {rule}; its quota: sessions = 6, loans = 1, {rest}"),
        (
            "--uid 60002",
            (
                'rule 3, everyone = true, names = ["*"], verbs = ["list"]; '
                f"its quota: sessions = 1024, loans = 7, {rest}"
            ),
        ),
        ("--uid 0", "root and the broker's own uid may do all\n"),
    ):
        assert run("--config", path, *words.split(), "connect") == (0, f"allowed: {said}", "")


def test_nobody_speaks_of_it(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text('[[rule]]\nuid = 1\nverbs = ["borrow"]\n')
    said = "refused: no rule speaks of uid 60001, so it may not even connect\n"
    assert run("--config", path, "--uid", "60001", "connect") == (status.NOT_PERMITTED, said, "")


def test_the_groups_that_the_system_knows(tmp_path: Path) -> None:
    user = next(user for user in pwd.getpwall() if user.pw_uid not in (0, os.geteuid()))
    path = tmp_path / "f.toml"
    path.write_text(f'[[rule]]\ngid = {user.pw_gid}\nverbs = ["borrow"]\n')
    code, out, _ = run("--config", path, "--uid", user.pw_name, "borrow", "x")
    assert (code, out.split(",")[0]) == (status.DONE, "allowed: rule 1")


def test_a_mistake_in_the_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text("[[rule]]\nuid = 1\nverbs = 5\n")
    code, out, err = run("--config", path, "--uid", "1", "borrow", "x")
    assert (code, out) == (status.FAILED, "")
    assert err.startswith(f"fdbroker: {path}:3: ")
    assert err.count("\n") == 1


ids = st.integers(1, 3)
rules = st.builds(
    Rule,
    verbs=st.frozensets(st.sampled_from(sorted(VERBS)), max_size=2),
    names=st.lists(st.sampled_from(["*", "a", "b*", "[ab]"]), min_size=1, max_size=2).map(tuple),
    uid=st.none() | ids,
    gid=st.none() | ids,
    everyone=st.booleans(),
    mode=st.sampled_from(["", "r"]),
    listeners=st.booleans(),
    quota=st.just(()),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(rules, max_size=4),
    ids,
    st.sets(ids),
    st.sampled_from([*VERBS, READ, LISTEN, "connect"]),
)
def test_it_agrees_with_the_broker(
    found: list[Rule], uid: int, groups: set[int], verb: str
) -> None:
    rights = Rules(found, own_uid=99).rights(uid, groups)
    for name in ("a", "b", "bb", "c"):
        allowed = rights.admitted if verb == "connect" else rights.may(verb, name)
        assert (check._allowing(found, uid, groups, verb, name) is not None) == allowed
