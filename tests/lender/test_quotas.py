"""Accounting by itself: what is counted, who gets how much of what is free, and that all comes
back.  The machine (test_machine.py) looks at the counts after each of its steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.errors import QuotaExceeded, TooManyFiles
from fdbroker.lender.accounting import (
    BYTES,
    DEFAULT,
    GRACE,
    NO_LIMIT,
    RESOURCES,
    Accounting,
    Charge,
    Quota,
    fair_share,
)

from .kit import Rig

PLENTY = DEFAULT._replace(**dict.fromkeys(RESOURCES, 10**9))
ALICE, BOB = 1001, 1002


def quotas(capacity: int = 10**6, descriptors: int = NO_LIMIT) -> Accounting:
    made = Accounting(capacity, capacity, capacity)
    made.descriptors = descriptors
    return made


def limited(made: Accounting, uid: int, quota: Quota = PLENTY):
    account = made.account(uid)
    account.set_limit(quota)
    return account


def may(made: Accounting, account, what: str) -> bool:
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


def charge_all(made: Accounting, account, what: str) -> list[Charge]:
    """Charge the account until it is refused."""
    charges = []
    while may(made, account, what):
        charges.append(made.charge(account, what))
    return charges


def take_all(made: Accounting, account, what: str) -> int:
    """Charge the account until it is refused: how many it got."""
    return len(charge_all(made, account, what))


def release(charges: list[Charge]) -> None:
    for charge in charges:
        charge.release()


@pytest.mark.parametrize("what", ["sessions", "entries", "waiting"])
def test_each_gets_half_of_what_the_others_left(what: str) -> None:
    made = quotas(capacity=100)
    got = [take_all(made, limited(made, uid), what) for uid in range(9)]
    assert got == [50, 25, 13, 6, 3, 2, 1, 0, 0]


def test_sessions_entries_and_closes_are_of_one_supply() -> None:
    made = quotas(descriptors=100)
    alice = limited(made, ALICE)
    made.charge(alice, "closes", 20)
    entries = made.charge(alice, "entries", 20)
    assert take_all(made, alice, "sessions") == 10
    bob = limited(made, BOB)
    assert take_all(made, bob, "sessions") == 25
    assert made.limit(bob, "closes") == 13  # by themselves
    entries.release()
    assert take_all(made, bob, "sessions") == 10  # half of the 70 that Alice leaves
    assert take_all(made, limited(made, 3), "sessions") == 18


def test_what_is_in_hand_is_of_the_share_but_for_a_few() -> None:
    made = quotas(descriptors=1000)
    alice = limited(made, ALICE)
    made.charge(alice, "sessions", 400)
    made.charge(alice, "entries", 50)
    closes = charge_all(made, alice, "closes")
    assert len(closes) == 50
    release(closes)
    made.charge(made.account(0), "sessions", 300)  # which leaves 250: she has more than her half
    closes = charge_all(made, alice, "closes")
    assert len(closes) == GRACE
    release(closes)
    made.charge(made.account(0), "sessions", 230)  # which leaves 20
    assert take_all(made, alice, "closes") == 10  # half of what is free


def test_receive_is_charged_until_too_much_is_in_hand() -> None:
    made = quotas(descriptors=100)
    alice = limited(made, ALICE)
    made.charge(alice, "entries", 60)
    made.charge_receive(alice).release()
    made.charge(alice, "closes", GRACE - 1)
    assert made.charge_receive(alice).count == 1
    with pytest.raises(QuotaExceeded):
        made.charge_receive(alice)
    assert alice.closes == GRACE
    made.charge_receive(made.account(0))


def test_receive_without_a_free_descriptor_is_charged_for_none() -> None:
    made = quotas(descriptors=1)
    made.charge(None, "sessions")
    charge = made.charge_receive(made.account(0))
    assert (charge.count, made.account(0).closes) == (0, 0)


def test_charge_that_becomes_another_counts_there() -> None:
    made = quotas()
    alice = made.account(ALICE)
    charge = made.charge(alice, "closes", 2)
    charge.become("entries")
    assert (alice.closes, alice.entries, made.total.closes, made.total.entries) == (0, 2, 0, 2)
    charge.release()
    assert alice.idle
    assert made.accounts == {}


def test_release_is_told_while_somebody_waits_for_it() -> None:
    made = quotas()
    told: list[int] = []
    charge = made.charge(made.account(ALICE), "sessions")
    made.on_release = lambda: told.append(made.total.sessions)
    charge.release()
    made.charge(made.account(ALICE), "sessions")
    assert told == [0]


def test_what_is_being_closed_of_its_entries_is_nothing_in_hand() -> None:
    made = quotas(descriptors=100)
    alice = limited(made, ALICE)
    made.charge(alice, "entries", 90)
    made.charge(alice, "closes", GRACE + 5)
    closing = made.charge(alice, "closing", 6)
    made.charge_receive(alice).release()
    closing.set(5)
    with pytest.raises(QuotaExceeded):
        made.charge_receive(alice).release()


def test_one_more_may_come_whatever_a_rule_says_of_it() -> None:
    made = quotas()
    alice = limited(made, ALICE, PLENTY._replace(closes=0))
    made.charge_receive(alice).release()
    made.charge(alice, "closes", GRACE)
    with pytest.raises(QuotaExceeded):
        made.charge_receive(alice).release()


def test_one_more_may_come_to_who_may_do_all_also_if_it_gets_no_number() -> None:
    made = quotas(descriptors=GRACE)
    root = made.account(0)
    made.charge(root, "closes", GRACE)
    assert made.charge_receive(root).count == 0


def test_an_entry_that_is_being_closed_is_one_descriptor() -> None:
    made = quotas(descriptors=100)
    alice = limited(made, ALICE)
    made.charge(alice, "entries", 40)
    for what in ("closes", "closing"):
        made.charge(alice, what, 40)
    assert (alice.descriptors, made.free_descriptors) == (40, 60)
    made.charge_receive(alice).release()


def test_a_descriptor_that_is_put_is_on_the_account_already() -> None:
    """It came with a message, so it is among the closes until it is an entry."""
    made = quotas(descriptors=10)
    alice = limited(made, ALICE)
    made.charge(alice, "closes")
    while may(made, alice, "entries"):
        made.charge(alice, "entries")
    assert alice.entries == 5


def test_what_a_rule_says_holds_below_the_half() -> None:
    made = quotas(capacity=100)
    alice = limited(made, ALICE, PLENTY._replace(sessions=3))
    assert take_all(made, alice, "sessions") == 3
    alice.set_limit(PLENTY._replace(sessions=2))  # of two rules' sessions the most
    assert made.limit(alice, "sessions") == 3
    alice.clear_limit()
    alice.set_limit(PLENTY._replace(sessions=2))
    assert made.limit(alice, "sessions") == 2


def test_who_may_do_all_is_counted_and_not_held() -> None:
    made = quotas(capacity=4, descriptors=10)
    root = made.account(0)
    for _ in range(10):
        made.check(root, "sessions")
        made.charge(root, "sessions")
    assert made.total.sessions == root.sessions == 10
    with pytest.raises(TooManyFiles) as caught:
        made.check(root, "sessions")
    assert caught.value.data == ("broker", 10, 10)
    assert [made.limit(root, what) for what in RESOURCES] == [NO_LIMIT] * len(RESOURCES)
    with pytest.raises(QuotaExceeded):
        made.check(limited(made, ALICE), "sessions")


def test_who_may_do_all_can_take_the_last_descriptor() -> None:
    for what in ("sessions", "closes"):
        made = quotas(descriptors=10)
        root = made.account(0)
        made.charge(root, what, 9)
        made.check(root, what)
        made.charge(root, what)
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
    made = Accounting(20, 40, 60)
    alice = limited(made, ALICE)
    limits = {what: made.limit(alice, what) for what in ("sessions", "entries", "waiting")}
    assert limits == {"sessions": 10, "entries": 20, "waiting": 10}
    made.check_members(alice, 30)
    with pytest.raises(QuotaExceeded):
        made.check_members(alice, 31)


def test_an_account_says_what_is_used() -> None:
    made = quotas()
    made.charge(made.account(ALICE), "closes", 3)
    assert repr(made.account(ALICE)) == (
        "<Account of uid 1001: sessions=0 loans=0 entries=0 waiting=0 bytes=0 closes=3 inflight=0>"
    )


@pytest.mark.parametrize("what", RESOURCES)
def test_an_account_lasts_whatever_it_is_that_is_used(what: str) -> None:
    account = quotas().account(ALICE)
    assert account.idle
    setattr(account, what, 1)
    assert not account.idle


def test_bytes_have_a_supply_too() -> None:
    made = quotas()
    made.charge(limited(made, ALICE), "bytes", BYTES // 4)
    assert made.limit(limited(made, BOB), "bytes") == fair_share(0, BYTES - BYTES // 4)


def test_an_account_lasts_as_long_as_it_uses_something() -> None:
    made = quotas()
    alice = made.account(ALICE)
    charges = [made.charge(alice, what, 2) for what in RESOURCES]
    assert made.account(ALICE) is alice
    for charge in charges:
        assert made.accounts == {ALICE: alice}
        charge.set(1)
        charge.release()
    assert made.accounts == {}
    assert made.total.idle
    made.charge(None, "entries")  # the broker's own is on nobody's
    assert made.accounts == {}
    assert made.total.entries == 1


steps = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 3]),
        st.sampled_from([what for what in RESOURCES if what != "loans"]),
        st.booleans(),
    )
)


def test_a_charge_is_counted_until_it_is_released() -> None:
    made = quotas()
    alice = made.account(ALICE)
    charge = made.charge(alice, "bytes", 100)
    assert (charge.account, charge.resource, charge.count) == (alice, "bytes", 100)
    assert alice.bytes == made.total.bytes == 100
    for size in (250, 0, 7, 7):
        charge.set(size)
        assert alice.bytes == made.total.bytes == charge.count == size
    assert repr(charge) == "<Charge of 7 bytes to uid 1001>"
    for _ in range(2):
        charge.release()
        assert alice.bytes == made.total.bytes == charge.count == 0
    assert made.accounts == {}


def test_a_charge_of_the_broker_itself_is_in_the_total_only() -> None:
    made = quotas(descriptors=10)
    charge = made.charge(None, "closes", 4)
    assert (charge.account, made.total.closes, made.free_descriptors) == (None, 4, 6)
    assert repr(charge) == "<Charge of 4 closes to uid none>"
    charge.release()
    charge.release()
    assert (made.total.closes, made.free_descriptors, made.accounts) == (0, 10, {})


def test_an_account_that_was_dropped_is_not_taken_for_its_successor() -> None:
    made = quotas()
    old = made.account(ALICE)
    made.charge(old, "closes").release()
    new = made.account(ALICE)
    assert new is not old
    made.drop_idle(old)
    assert made.accounts == {ALICE: new}
    made.drop_idle(new)
    assert made.accounts == {}


def test_the_final_close_of_an_entry_leaves_its_account_until_it_is_released() -> None:
    made = quotas(descriptors=10)
    alice = made.account(ALICE)
    entry, close, closing = (made.charge(alice, what) for what in ("entries", "closes", "closing"))
    assert alice.descriptors == 1
    entry.release()
    assert made.accounts == {ALICE: alice}
    closing.release()
    assert (alice.descriptors, made.accounts) == (1, {ALICE: alice})
    close.release()
    assert (alice.descriptors, made.free_descriptors, made.accounts) == (0, 10, {})


@given(steps)
def test_nobody_ever_gets_more_than_half_of_what_is_free_to_it(steps) -> None:
    made, supply = quotas(capacity=12, descriptors=15), 15
    accounts = {uid: limited(made, uid) for uid in (1, 2, 3)}
    charges: dict[tuple[int, str], list[Charge]] = {}
    for uid, what, more in steps:
        account = accounts[uid]
        if not more:
            if mine := charges.get((uid, what)):
                mine.pop().release()
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
        charges.setdefault((uid, what), []).append(made.charge(account, what))
    for what in ("sessions", "entries", "waiting", "bytes", "closes"):
        assert getattr(made.total, what) == sum(getattr(one, what) for one in accounts.values())


# --- the lender's own counts -----------------------------------------------------------------


def test_loans_are_held_to_it_at_the_borrow_and_in_the_line(rig: Rig) -> None:
    rig.lender.accounting.capacity["members"] = 100
    for name in "abc":
        rig.put(name)
    one, two, three = rig.clients(3)
    one.account.set_limit(PLENTY._replace(loans=3))
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
    rig.return_loan(one)
    rig.borrow(three, "a")
    for who in (one, two, three):
        rig.end(who)
    assert rig.lender.accounting.accounts == {}
    rig.check()


def test_who_waits_for_several_has_them_on_its_account_already(rig: Rig) -> None:
    """They take room in the ledger, and are granted without a further look."""
    rig.lender.accounting.capacity["members"] = 100
    for name in "abc":
        rig.put(name)
    one, two, three, holder = (*rig.clients(3), rig.client(uid=2000))
    account = one.account
    account.set_limit(PLENTY._replace(loans=3))
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
    assert rig.reload().accounting.account(account.uid).loans == 3
    rig.end(two)
    assert account.loans == 2
    rig.return_loan(holder)
    assert account.loans == 2
    assert account.waiting == 0
    rig.decided()
    for who in (one, three, holder):
        rig.end(who)
    assert account.loans == 0
    assert rig.lender.accounting.accounts == {}


def test_waits_of_both_kinds_are_held_to_it(rig: Rig) -> None:
    rig.lender.accounting.capacity["members"] = 100
    entry = rig.put("a")
    holder, one, two, three = (*rig.clients(3), rig.client(uid=2000))
    for who in (one, three):
        who.account.set_limit(PLENTY._replace(waiting=1))
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
    rig.return_loan(holder)
    rig.close_all()
    assert three.account.waiting == 0
    rig.decided()
    rig.check()


def test_an_entry_is_on_the_account_of_who_put_it_until_it_is_closed(rig: Rig) -> None:
    rig.lender.accounting.capacity["members"] = 100
    creator = rig.client(uid=ALICE)
    account = creator.account
    account.set_limit(PLENTY._replace(entries=1))
    rig.put("a", creator)
    with pytest.raises(QuotaExceeded) as caught:
        rig.put("b", creator)
    assert caught.value.data == ("entries", 1, 1)
    rig.put("own")  # by the broker itself
    rig.retire("a")
    assert account.entries == 1
    rig.check()
    rig.close_all()
    assert account.entries == 0
    rig.put("b", creator)
    rig.end(creator)
    assert account.entries == 1  # it outlives its creator's session
    assert rig.lender.accounting.account(ALICE) is account
    assert rig.reload().accounting.account(ALICE).entries == 1
    rig.retire("b")
    rig.close_all()
    assert rig.lender.accounting.accounts == {}


def test_members_of_many_loans_are_shared_out_too(rig: Rig) -> None:
    """A loan of several takes room in the ledger; nobody gets more than half of what is left."""
    rig.lender.accounting.capacity["members"] = 4
    for name in "abcdef":
        rig.put(name)
    one, two = rig.clients(2)
    one.account.set_limit(PLENTY)
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
    account, total = holder.account, rig.lender.accounting.total
    rig.borrow(holder, *"abc", exclusive=True)
    assert account.members == 2
    rig.borrow(waiting, *"ab", exclusive=True)
    assert account.members == total.members == 3
    loaded = rig.reload().accounting
    assert loaded.account(account.uid).members == loaded.total.members == 3
    rig.cancel(waiting)
    rig.decided()
    assert account.members == total.members == 2
    rig.return_loan(holder)
    assert account.members == total.members == 0
    assert rig.reload().accounting.total.members == 0
