"""Rules by themselves: of whom they speak, what they add up to, and who is nobody."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.lender.accounting import DEFAULT, RESOURCES
from fdbroker.lender.names import check_name
from fdbroker.lender.rules import ALL_RIGHTS, LISTEN, NO_RIGHTS, READ, VERBS, Rule, Rules

OWN, ALICE, BOB, UNKNOWN = 500, 1000, 1001, 65534
STAFF, AUDIO = 50, 29
BORROW = frozenset({"borrow"})


def rights(*rules: Rule, uid: int = ALICE, groups: set[int] | None = None):
    return Rules(rules, OWN).rights(uid, groups or set())


def test_without_rules_only_root_and_the_brokers_own_uid_may_anything() -> None:
    rules = Rules((), OWN)
    assert rules.rights(0) is rules.rights(OWN) is ALL_RIGHTS
    assert rules.rights(ALICE) is rules.rights(UNKNOWN) is NO_RIGHTS
    for verb in VERBS:
        for name in ("web", ""):
            assert ALL_RIGHTS.may(verb, name)
            assert not NO_RIGHTS.may(verb, name)
        assert ALL_RIGHTS.may_somewhere(verb)
        assert not NO_RIGHTS.may_somewhere(verb)
    assert ALL_RIGHTS.admitted
    assert not NO_RIGHTS.admitted


@pytest.mark.parametrize(
    ("who", "uid", "groups", "applies_to"),
    [
        ({}, ALICE, {STAFF}, False),
        ({"uid": ALICE}, ALICE, set(), True),
        ({"uid": ALICE}, BOB, {ALICE}, False),
        ({"gid": STAFF}, BOB, {AUDIO, STAFF}, True),
        ({"gid": STAFF}, STAFF, {AUDIO}, False),
        ({"gid": 0}, ALICE, set(), False),
        ({"gid": 0}, ALICE, {0}, True),
        ({"everyone": True}, BOB, set(), True),
        ({"uid": ALICE, "gid": STAFF}, ALICE, set(), False),
        ({"uid": ALICE, "gid": STAFF}, BOB, {STAFF}, False),
        ({"uid": ALICE, "gid": STAFF}, ALICE, {STAFF}, True),
        ({"uid": ALICE, "everyone": True}, BOB, set(), False),
        ({"gid": STAFF, "everyone": True}, BOB, set(), False),
    ],
)
def test_of_whom_a_rule_speaks(who, uid, groups, applies_to) -> None:
    found = rights(Rule(BORROW, **who), uid=uid, groups=groups)
    assert found.admitted is found.may("borrow", "web") is applies_to
    assert not found.unlimited


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("*", ["web", "a/b", "", "."], []),
        ("web", ["web"], ["Web", "web2", "aweb", ""]),
        ("web*", ["web", "web2", "web/a"], ["aweb", ""]),
        ("cam?", ["cam1", "cam/"], ["cam", "cam12"]),
        ("tty[AU]*", ["ttyUSB0", "ttyA"], ["ttyS0", "tty[AU]"]),
        ("a.b", ["a.b"], ["axb"]),
        ("", [""], ["a"]),
    ],
)
def test_patterns(pattern, matches, others) -> None:
    found = rights(Rule(BORROW, (pattern,), everyone=True))
    assert [found.may("borrow", name) for name in matches + others] == [True] * len(matches) + [
        False
    ] * len(others)


def test_what_several_rules_allow_adds_up_but_does_not_mix() -> None:
    found = rights(
        Rule(frozenset({"borrow", "list"}), ("web", "log*"), uid=ALICE),
        Rule(frozenset({"retire"}), ("tmp/*",), everyone=True),
        Rule(frozenset({"put"}), uid=BOB),
        Rule(frozenset({"borrow"}), ("aux",), gid=AUDIO),
        groups={AUDIO},
    )
    names = ["web", "log1", "aux", "tmp/x", ""]
    may = {verb: [name for name in names if found.may(verb, name)] for verb in VERBS}
    assert may == {
        "borrow": ["web", "log1", "aux"],
        "list": ["web", "log1"],
        "retire": ["tmp/x"],
        "put": [],
        "admin": [],
    }
    assert {verb for verb in VERBS if found.may_somewhere(verb)} == {"borrow", "list", "retire"}


def test_what_listens_takes_a_rule_that_says_so_for_that_name() -> None:
    lends = Rule(BORROW, uid=ALICE)
    assert not rights(lends).may_somewhere(LISTEN)
    found = rights(lends, Rule(BORROW, ("web*",), everyone=True, listeners=True))
    assert [name for name in ("web", "web2", "db", "") if found.may(LISTEN, name)] == [
        "web",
        "web2",
    ]
    assert found.may("borrow", "db")
    for says_nothing in (
        Rule(VERBS - BORROW, uid=ALICE, listeners=True),
        Rule(BORROW, uid=ALICE, mode="r", listeners=True),
        Rule(BORROW, uid=BOB, listeners=True),
    ):
        assert not rights(lends, says_nothing).may(LISTEN, "web")
    assert ALL_RIGHTS.may(LISTEN, "web")
    assert not NO_RIGHTS.may(LISTEN, "web")


def test_a_rule_for_reading_allows_to_borrow_no_more_than_that() -> None:
    found = rights(
        Rule(frozenset({"borrow", "list"}), ("log*",), uid=ALICE, mode="r"),
        Rule(BORROW, ("web",), uid=ALICE),
        Rule(frozenset({"put"}), ("tmp",), uid=ALICE, mode="r"),
    )
    names = ["log1", "web", "tmp"]
    may = {verb: [name for name in names if found.may(verb, name)] for verb in (*VERBS, READ)}
    assert may == {
        "borrow": ["web"],
        READ: ["log1", "web"],
        "list": ["log1"],
        "put": ["tmp"],
        "retire": [],
        "admin": [],
    }


def test_a_rule_by_itself_tells_what_it_allows() -> None:
    """To those of whom it speaks: it is asked after that."""
    rule = Rule(BORROW, ("log*",), uid=BOB, mode="r")
    assert rule.allows(READ, "log1")
    assert not rule.allows("borrow", "log1")
    assert not rule.allows(READ, "web")


def test_a_rule_without_verbs_or_names_only_admits() -> None:
    for rule in (Rule(frozenset(), uid=ALICE), Rule(BORROW, (), uid=ALICE)):
        found = rights(rule)
        assert found.admitted
        assert not any(found.may(verb, "web") or found.may_somewhere(verb) for verb in VERBS)


def test_who_cannot_be_told_is_nobody_whatever_the_rules_say() -> None:
    everything = (
        Rule(VERBS, uid=UNKNOWN),
        Rule(VERBS, everyone=True),
        Rule(VERBS, gid=STAFF),
    )
    told = Rules(everything, OWN)
    assert told.rights(UNKNOWN).may("borrow", "web")  # every uid is mapped: it is one of them
    rules = Rules(everything, OWN, unknown_uid=UNKNOWN, unknown_gid=UNKNOWN)
    assert rules.rights(UNKNOWN, {STAFF}) is NO_RIGHTS
    assert rules.rights(ALICE).may("borrow", "web")
    assert Rules(everything, UNKNOWN, unknown_uid=UNKNOWN).rights(UNKNOWN) is NO_RIGHTS


def test_a_group_that_cannot_be_told_is_none() -> None:
    rule = Rule(BORROW, gid=UNKNOWN)
    assert Rules((rule,), OWN).rights(ALICE, {UNKNOWN}).admitted
    rules = Rules((rule,), OWN, unknown_gid=UNKNOWN)
    assert rules.rights(ALICE, {UNKNOWN}) is NO_RIGHTS
    assert rules.gids == set()


def test_peers_of_whom_the_same_rules_speak_have_the_same_rights() -> None:
    rules = Rules((Rule(BORROW, everyone=True), Rule(BORROW, ("x",), gid=STAFF)), OWN)
    assert rules.gids == {STAFF}
    assert rules.rights(ALICE) is rules.rights(BOB, {AUDIO})
    assert rules.rights(ALICE, {STAFF}) is rules.rights(BOB, {STAFF, AUDIO})
    assert rules.rights(ALICE) is not rules.rights(ALICE, {STAFF})


names = st.text("ab/.@-", max_size=4)
patterns = st.lists(st.text("ab/*?[]!.@-", max_size=5), max_size=3).map(tuple)
some_rules = st.lists(
    st.builds(
        Rule,
        st.frozensets(st.sampled_from(sorted(VERBS))),
        patterns,
        st.sampled_from([None, ALICE, BOB]),
        st.sampled_from([None, STAFF, AUDIO]),
        st.booleans(),
        st.sampled_from(["", "r"]),
        st.booleans(),
        quota=st.lists(st.tuples(st.sampled_from(RESOURCES), st.integers(0, 3))).map(tuple),
    ),
    max_size=4,
)


@given(some_rules, names, st.sampled_from([ALICE, BOB]), st.sets(st.sampled_from([STAFF, AUDIO])))
def test_against_the_plain_reading(rules, name, uid, groups) -> None:
    found = Rules(rules, OWN).rights(uid, groups)
    about = [
        rule
        for rule in rules
        if (rule.uid is not None or rule.gid is not None or rule.everyone)
        and (rule.uid is None or rule.uid == uid)
        and (rule.gid is None or rule.gid in groups)
    ]
    assert found.admitted == bool(about)
    speak = about
    about = [rule for rule in about if any(fnmatchcase(name, pattern) for pattern in rule.names)]
    for verb in VERBS - {"borrow"}:
        assert found.may(verb, name) == any(verb in rule.verbs for rule in about)
    lend = [rule for rule in about if "borrow" in rule.verbs]
    assert found.may(READ, name) == bool(lend)
    assert found.may("borrow", name) == any(not rule.mode for rule in lend)
    assert found.may(LISTEN, name) == any(rule.listeners and not rule.mode for rule in lend)
    for what, most in zip(RESOURCES, found.quota, strict=True):
        said = [most for rule in speak for named, most in rule.quota if named == what]
        assert most == max(said, default=getattr(DEFAULT, what))


def test_what_a_refusal_suggests_is_a_pattern_for_that_name_alone() -> None:
    for name in ("/dev/ttyUSB0", "web@8000", "a.b-c_d"):
        check_name(name)
        found = rights(Rule(BORROW, (name,), uid=ALICE))
        assert found.may("borrow", name)
        assert not found.may("borrow", name + "x")
