"""Quotas by themselves: what is counted, who gets how much of what is free, and that all comes
back.  The machine (test_machine.py) looks at the counts after each of its steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.errors import QuotaExceeded, TooManyFiles
from fdbroker.lender.accounting import (
    BYTES,
    DEFAULT,
    FEW,
    NO_LIMIT,
    SPARE,
    WHAT,
    Quota,
    Quotas,
    half,
)

from .kit import Rig

PLENTY = DEFAULT._replace(**dict.fromkeys(WHAT, 10**9))
ALICE, BOB = 1001, 1002


def quotas(capacity: int = 10**6, descriptors: int = NO_LIMIT) -> Quotas:
    made = Quotas(capacity, capacity, capacity)
    made.descriptors = descriptors
    return made


def limited(made: Quotas, uid: int, quota: Quota = PLENTY):
    account = made.account(uid)
    account.hold_to(quota)
    return account


def may(made: Quotas, account, what: str) -> bool:
    """Whether it may have one more; the refusal says the truth."""
    try:
        made.check(account, what)
    except QuotaExceeded as error:
        told = error
    else:
        return True
    assert (told.what, told.used) == (what, getattr(account, what))
    assert told.used >= told.limit == made.limit(account, what)
    return False


def take_all(made: Quotas, account, what: str) -> int:
    """Until it is refused: how many it got."""
    got = 0
    while True:
        if not may(made, account, what):
            return got
        made.add(account, what)
        got += 1


@pytest.mark.parametrize("what", ["sessions", "entries", "waiting"])
def test_each_gets_half_of_what_the_others_left(what: str) -> None:
    made = quotas(capacity=100)
    got = [take_all(made, limited(made, uid), what) for uid in range(9)]
    assert got == [50, 25, 13, 6, 3, 2, 1, 0, 0]


def test_sessions_entries_and_closes_are_of_one_supply() -> None:
    made = quotas(descriptors=100)
    alice = limited(made, ALICE)
    made.add(alice, "closes", 20)
    made.add(alice, "entries", 20)
    assert take_all(made, alice, "sessions") == 10
    bob = limited(made, BOB)
    assert take_all(made, bob, "sessions") == 25
    assert made.limit(bob, "closes") == 13  # by themselves
    made.add(alice, "entries", -20)
    assert take_all(made, bob, "sessions") == 10  # half of the 70 that Alice leaves
    assert take_all(made, limited(made, 3), "sessions") == 18


def test_what_is_in_hand_is_of_the_share_but_for_a_few() -> None:
    made = quotas(descriptors=1000)
    alice = limited(made, ALICE)
    made.add(alice, "sessions", 400)
    made.add(alice, "entries", 50)
    assert take_all(made, alice, "closes") == 50
    made.add(alice, "closes", -50)
    made.add(made.account(0), "sessions", 300)  # which leaves 250: she has more than her half
    assert take_all(made, alice, "closes") == FEW
    made.add(alice, "closes", -FEW)
    made.add(made.account(0), "sessions", 230)  # which leaves 20
    assert take_all(made, alice, "closes") == 10  # half of what is free


def test_a_message_is_received_at_once_where_all_of_it_fits() -> None:
    made = quotas(descriptors=1000)
    alice, root = limited(made, ALICE), made.account(0)
    made.add(alice, "sessions", 247)
    assert made.has_room(alice, 253)
    made.add(alice, "sessions")
    assert not made.has_room(alice, 253)
    assert made.has_room(root, 253)
    made.add(root, "sessions", 1000 - 248 - 253 - SPARE)
    assert made.has_room(root, 253)
    made.add(root, "sessions")
    assert not made.has_room(root, 253)


def test_a_message_is_not_received_at_once_if_it_may_be_more_than_a_rule_says() -> None:
    made = quotas()
    alice = limited(made, ALICE, PLENTY._replace(closes=252))
    assert made.has_room(alice, 252)
    assert not made.has_room(alice, 253)


def test_one_more_may_come_until_too_much_is_in_hand() -> None:
    made = quotas(descriptors=100)
    alice = limited(made, ALICE)
    made.add(alice, "entries", 60)
    made.check_one(alice)
    made.add(alice, "closes", FEW - 1)
    made.check_one(alice)
    made.add(alice, "closes")
    with pytest.raises(QuotaExceeded):
        made.check_one(alice)
    made.check_one(made.account(0))


def test_what_is_being_closed_of_its_entries_is_nothing_in_hand() -> None:
    made = quotas(descriptors=100)
    alice = limited(made, ALICE)
    made.add(alice, "entries", 90)
    made.add(alice, "closes", FEW + 5)
    made.add(alice, "closing", 6)
    made.check_one(alice)
    made.add(alice, "closing", -1)
    with pytest.raises(QuotaExceeded):
        made.check_one(alice)


def test_one_more_may_come_whatever_a_rule_says_of_it() -> None:
    made = quotas()
    alice = limited(made, ALICE, PLENTY._replace(closes=0))
    made.check_one(alice)
    made.add(alice, "closes", FEW)
    with pytest.raises(QuotaExceeded):
        made.check_one(alice)


def test_one_more_may_come_to_who_may_do_all_also_if_it_gets_no_number() -> None:
    made = quotas(descriptors=FEW)
    root = made.account(0)
    made.add(root, "closes", FEW)
    made.check_one(root)


def test_an_entry_that_is_being_closed_is_one_descriptor() -> None:
    made = quotas(descriptors=100)
    alice = limited(made, ALICE)
    made.add(alice, "entries", 40)
    for what in ("closes", "closing"):
        made.add(alice, what, 40)
    assert (alice.descriptors, made.free_descriptors) == (40, 60)
    made.check_one(alice)


def test_a_descriptor_that_is_put_is_on_the_account_already() -> None:
    """It came with a message, so it is among the closes until it is an entry."""
    made = quotas(descriptors=10)
    alice = limited(made, ALICE)
    made.add(alice, "closes")
    while may(made, alice, "entries"):
        made.add(alice, "entries")
    assert alice.entries == 5


def test_what_a_rule_says_holds_below_the_half() -> None:
    made = quotas(capacity=100)
    alice = limited(made, ALICE, PLENTY._replace(sessions=3))
    assert take_all(made, alice, "sessions") == 3
    alice.hold_to(PLENTY._replace(sessions=2))  # of two rules' sessions the most
    assert made.limit(alice, "sessions") == 3
    alice.forget_quota()
    alice.hold_to(PLENTY._replace(sessions=2))
    assert made.limit(alice, "sessions") == 2


def test_who_may_do_all_is_counted_and_not_held() -> None:
    made = quotas(capacity=4, descriptors=10)
    root = made.account(0)
    for _ in range(10):
        made.check(root, "sessions")
        made.add(root, "sessions")
    assert made.total.sessions == root.sessions == 10
    with pytest.raises(TooManyFiles) as caught:
        made.check(root, "sessions")
    assert caught.value.data == ("broker", 10, 10)
    assert [made.limit(root, what) for what in WHAT] == [NO_LIMIT] * len(WHAT)
    with pytest.raises(QuotaExceeded):
        made.check(limited(made, ALICE), "sessions")


def test_who_may_do_all_can_take_the_last_descriptor() -> None:
    for what in ("sessions", "closes"):
        made = quotas(descriptors=10)
        root = made.account(0)
        made.add(root, what, 9)
        made.check(root, what)
        made.add(root, what)
        with pytest.raises(TooManyFiles):
            made.check(root, what)


def test_each_may_have_half_of_the_descriptors_in_either_way() -> None:
    for what in ("sessions", "closes"):
        made = quotas(descriptors=10)
        assert take_all(made, limited(made, ALICE), what) == 5


def test_what_everyone_may_have_if_nobody_says_otherwise() -> None:
    mib = 2**20
    assert (*DEFAULT, BYTES) == (1024, 4096, 1024, 1024, 4 * mib, 1024, 1024, 64 * mib)


def test_the_tables_of_the_ledger_are_what_is_shared_out() -> None:
    made = Quotas(20, 40, 60)
    alice = limited(made, ALICE)
    limits = {what: made.limit(alice, what) for what in ("sessions", "entries", "waiting")}
    assert limits == {"sessions": 10, "entries": 20, "waiting": 10}
    made.check_members(alice, 30)
    with pytest.raises(QuotaExceeded):
        made.check_members(alice, 31)


def test_an_account_says_what_is_used() -> None:
    made = quotas()
    made.add(made.account(ALICE), "closes", 3)
    assert repr(made.account(ALICE)) == (
        "<Account of uid 1001: sessions=0 loans=0 entries=0 waiting=0 bytes=0 closes=3 inflight=0>"
    )


@pytest.mark.parametrize("what", WHAT)
def test_an_account_lasts_whatever_it_is_that_is_used(what: str) -> None:
    account = quotas().account(ALICE)
    assert account.idle
    setattr(account, what, 1)
    assert not account.idle


def test_bytes_have_a_supply_too() -> None:
    made = quotas()
    made.add(limited(made, ALICE), "bytes", BYTES // 4)
    assert made.limit(limited(made, BOB), "bytes") == half(0, BYTES - BYTES // 4)


def test_an_account_lasts_as_long_as_it_uses_something() -> None:
    made = quotas()
    alice = made.account(ALICE)
    for what in WHAT:
        if what != "loans":  # which the lender counts itself
            made.add(alice, what, 2)
    assert made.account(ALICE) is alice
    for what in WHAT:
        if what != "loans":
            assert ALICE in made.accounts
            made.add(alice, what, -2)
    assert made.accounts == {}
    assert made.total.idle
    made.add(None, "entries")  # the broker's own is on nobody's
    assert made.accounts == {}
    assert made.total.entries == 1


steps = st.lists(
    st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from(WHAT[:1] + WHAT[2:]), st.booleans())
)


@given(steps)
def test_nobody_ever_gets_more_than_half_of_what_is_free_to_it(steps) -> None:
    made, supply = quotas(capacity=12, descriptors=15), 15
    accounts = {uid: limited(made, uid) for uid in (1, 2, 3)}
    for uid, what, more in steps:
        account = accounts[uid]
        if not more:
            if getattr(account, what):
                made.add(account, what, -1)
            continue
        used, free = getattr(account, what), made.capacity.get(what, NO_LIMIT)
        free -= sum(getattr(other, what) for other in accounts.values())
        fits = used + 1 <= max(1, (used + free) // 2 + (used + free) % 2)
        if what in ("sessions", "closes"):
            mine = account.sessions + account.entries + account.closes
            if what == "closes":  # of so small a supply they are few
                mine = account.closes
            left = supply - sum(
                one.sessions + one.entries + one.closes for one in accounts.values()
            )
            fits = fits and mine + 1 <= (mine + max(0, left) + 1) // 2
        if what in ("sessions", "closes", "waiting", "bytes"):
            assert may(made, account, what) == fits
            if not fits:
                continue
        made.add(account, what)
    for what in ("sessions", "entries", "waiting", "bytes", "closes"):
        assert getattr(made.total, what) == sum(getattr(one, what) for one in accounts.values())


# --- the lender's own counts -----------------------------------------------------------------


def test_loans_are_held_to_it_at_the_borrow_and_in_the_line(rig: Rig) -> None:
    rig.lender.quotas._members = 100
    for name in "abc":
        rig.put(name)
    one, two, three = rig.clients(3)
    one.account.hold_to(PLENTY._replace(loans=3))
    assert one.account is two.account
    rig.borrow(one, "a", "b")
    with pytest.raises(QuotaExceeded) as caught:
        rig.borrow(two, "b", "c")
    assert caught.value.data == ("loans", 2, 3)
    rig.borrow(two, "c")
    with pytest.raises(QuotaExceeded):
        rig.borrow(three, "a")
    with pytest.raises(QuotaExceeded):
        rig.borrow(three, "a", exclusive=True)  # it would wait
    rig.check()
    rig.give_back(one)
    rig.borrow(three, "a")
    for who in (one, two, three):
        rig.end(who)
    assert rig.lender.quotas.accounts == {}
    rig.check()


def test_who_waits_for_several_has_them_on_its_account_already(rig: Rig) -> None:
    """They take room in the ledger, and are granted without a further look."""
    rig.lender.quotas._members = 100
    for name in "abc":
        rig.put(name)
    one, two, three, holder = (*rig.clients(3), rig.client(uid=2000))
    account = one.account
    account.hold_to(PLENTY._replace(loans=3))
    rig.borrow(holder, "a", exclusive=True)
    assert not rig.borrow(one, "a", "b")
    for names in ("ac", "bc"):
        with pytest.raises(QuotaExceeded) as caught:
            rig.borrow(two, *names)
        assert caught.value.data == ("loans", 2, 3)
    assert not rig.borrow(two, "a")
    assert account.loans == 3
    with pytest.raises(QuotaExceeded):
        rig.borrow(three, "b")
    rig.check()
    assert rig.reload().quotas.account(account.uid).loans == 3
    rig.end(two)
    assert account.loans == 2
    rig.give_back(holder)
    assert account.loans == 2
    assert account.waiting == 0
    rig.decided()
    for who in (one, three, holder):
        rig.end(who)
    assert account.loans == 0
    assert rig.lender.quotas.accounts == {}


def test_waits_of_both_kinds_are_held_to_it(rig: Rig) -> None:
    rig.lender.quotas._members = 100
    entry = rig.put("a")
    holder, one, two, three = (*rig.clients(3), rig.client(uid=2000))
    for who in (one, three):
        who.account.hold_to(PLENTY._replace(waiting=1))
    rig.borrow(holder, "a", exclusive=True)
    assert not rig.borrow(one, "a")
    for refused in (
        lambda: rig.borrow(two, "a"),
        lambda: rig.retire_and_wait(two, "a"),
    ):
        with pytest.raises(QuotaExceeded) as caught:
            refused()
        assert caught.value.data == ("waiting", 1, 1)
    assert rig.lender.names["a"] is entry  # nothing was retired
    rig.retire_and_wait(three, "a")  # another uid's
    assert one.account.waiting == 0
    assert three.account.waiting == 1
    rig.give_back(holder)
    rig.close_all()
    assert three.account.waiting == 0
    rig.decided()
    rig.check()


def test_an_entry_is_on_the_account_of_who_put_it_until_it_is_closed(rig: Rig) -> None:
    rig.lender.quotas._members = 100
    maker = rig.client(uid=ALICE)
    account = maker.account
    account.hold_to(PLENTY._replace(entries=1))
    rig.put("a", maker)
    with pytest.raises(QuotaExceeded) as caught:
        rig.put("b", maker)
    assert caught.value.data == ("entries", 1, 1)
    rig.put("own")  # by the broker itself
    rig.retire("a")
    assert account.entries == 1
    rig.check()
    rig.close_all()
    assert account.entries == 0
    rig.put("b", maker)
    rig.end(maker)
    assert account.entries == 1  # it outlives its maker's session
    assert rig.lender.quotas.account(ALICE) is account
    assert rig.reload().quotas.account(ALICE).entries == 1
    rig.retire("b")
    rig.close_all()
    assert rig.lender.quotas.accounts == {}


def test_members_of_many_loans_are_shared_out_too(rig: Rig) -> None:
    """A loan of several takes room in the ledger; nobody gets more than half of what is left."""
    rig.lender.quotas._members = 4
    for name in "abcdef":
        rig.put(name)
    one, two = rig.clients(2)
    one.account.hold_to(PLENTY)
    with pytest.raises(QuotaExceeded) as caught:
        rig.borrow(one, *"abcd")
    assert caught.value.data == ("loans", 0, 3)
    rig.borrow(one, *"abc")
    with pytest.raises(QuotaExceeded):
        rig.borrow(two, *"ef")
    rig.borrow(two, "e")  # which takes no such room
    rig.check()


def test_members_come_back_with_their_loan_and_their_wait_and_are_there_after_a_load(
    rig: Rig,
) -> None:
    for name in "abc":
        rig.put(name)
    holder, waiting = rig.clients(2)
    account, total = holder.account, rig.lender.quotas.total
    rig.borrow(holder, *"abc", exclusive=True)
    assert account.members == 2
    rig.borrow(waiting, *"ab", exclusive=True)
    assert account.members == total.members == 3
    loaded = rig.reload().quotas
    assert loaded.account(account.uid).members == loaded.total.members == 3
    rig.cancel(waiting)
    rig.decided()
    assert account.members == total.members == 2
    rig.give_back(holder)
    assert account.members == total.members == 0
    assert rig.reload().quotas.total.members == 0
