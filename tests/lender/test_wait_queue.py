"""Who gets an entry when: shared, exclusive, several at once, and how a wait ends."""

from __future__ import annotations

import pytest

from fdbroker.errors import (
    BadName,
    BorrowTimeout,
    BrokerFull,
    ProtocolError,
    QuotaExceeded,
    UnknownEntry,
    UnknownTicket,
    WouldDeadlock,
)
from fdbroker.lender import wait_queue
from fdbroker.lender.accounting import DEFAULT
from fdbroker.lender.model import IDLE, LENT, NO_REQUEST, WAITING, LoanRequest
from fdbroker.lender.wait_queue import HOLDERS_NAMED

from .kit import SECOND, Rig


@pytest.fixture
def lot(rig: Rig) -> Rig:
    """With the entries a, b and c."""
    for name in "abc":
        rig.put(name)
    return rig


# --- shared and exclusive


def test_shared_loans_run_together(lot: Rig):
    clients = lot.clients(4)
    assert [lot.borrow(client, "a") for client in clients] == [True] * 4
    assert lot.lender.loans == 4
    assert lot.lender.names["a"].fd.refs == 5  # theirs, and the closer's


def test_a_wish_without_more_is_shared_for_reading_and_writing_and_waits_for_ever():
    request = LoanRequest(("a",))
    assert (request.exclusive, request.readonly, request.timeout, request.purpose) == (
        False,
        False,
        None,
        "",
    )


def test_an_exclusive_loan_is_alone(lot: Rig):
    one, shared, exclusive = lot.clients(3)
    assert lot.borrow(one, "a", exclusive=True)
    assert not lot.borrow(shared, "a")
    assert not lot.borrow(exclusive, "a", exclusive=True)
    assert lot.decided() == []
    assert lot.lender.waiting == 2


def test_an_exclusive_loan_waits_until_the_last_shared_one_is_back(lot: Rig):
    one, two, exclusive = lot.clients(3)
    lot.borrow(one, "a")
    lot.borrow(two, "a")
    assert not lot.borrow(exclusive, "a", exclusive=True)
    lot.return_loan(one)
    assert lot.granted() == []
    lot.return_loan(two)
    assert lot.granted() == [exclusive]


def test_a_return_says_whether_others_are_concerned(lot: Rig):
    one, two, other = lot.clients(3)
    lot.borrow(one, "a")
    assert not lot.return_loan(one)
    lot.borrow(one, "a")
    lot.borrow(two, "a")
    lot.borrow(other, "a", exclusive=True)
    assert lot.return_loan(one)
    assert lot.return_loan(two)
    lot.granted()
    lot.retire("a")
    assert lot.return_loan(other)


def test_a_waiting_exclusive_loan_holds_back_later_shared_ones(lot: Rig):
    holder, exclusive, later, latest = lot.clients(4)
    lot.borrow(holder, "a")
    assert not lot.borrow(exclusive, "a", exclusive=True)
    assert not lot.borrow(later, "a")
    assert not lot.borrow(latest, "a")
    lot.return_loan(holder)
    assert lot.granted() == [exclusive]
    lot.return_loan(exclusive)
    assert lot.granted() == [later, latest]


def test_the_line_is_served_in_the_order_of_arrival(lot: Rig):
    holder, *others = lot.clients(6)
    turns = [True, False, False, True, False]
    lot.borrow(holder, "a", exclusive=True)
    for client, exclusive in zip(others, turns, strict=True):
        assert not lot.borrow(client, "a", exclusive=exclusive)
    lot.return_loan(holder)
    first, second, third, fourth, fifth = others
    assert lot.granted() == [first]
    lot.return_loan(first)
    assert lot.granted() == [second, third]
    lot.return_loan(third)
    assert lot.granted() == []
    lot.return_loan(second)
    assert lot.granted() == [fourth]
    lot.return_loan(fourth)
    assert lot.granted() == [fifth]


def test_a_session_that_ends_gives_its_turn_to_the_next(lot: Rig):
    holder, waiting, last = lot.clients(3)
    lot.borrow(holder, "a", exclusive=True)
    lot.borrow(waiting, "a", exclusive=True)
    lot.borrow(last, "a")
    lot.end(waiting)
    assert lot.granted() == []
    lot.end(holder)
    assert lot.granted() == [last]
    assert lot.lender.sessions == {last.slot: last}


def test_who_stops_waiting_lets_those_behind_go(lot: Rig):
    holder, exclusive, shared = lot.clients(3)
    lot.borrow(holder, "a")
    lot.borrow(exclusive, "a", exclusive=True)
    lot.borrow(shared, "a")
    lot.cancel(exclusive)
    told = lot.decided()
    assert (shared, None) in told
    assert [error[0] for who, error in told if who is exclusive] == ["BorrowTimeout"]


# --- several at once


def test_several_entries_come_all_or_none(lot: Rig):
    holder, both = lot.clients(2)
    lot.borrow(holder, "b", exclusive=True)
    assert not lot.borrow(both, "a", "b")
    assert not lot.lender.names["a"].holders
    assert lot.lender.names["a"].fd.refs == 1
    lot.return_loan(holder)
    assert lot.granted() == [both]
    assert list(lot.lender.names["a"].holders) == list(lot.lender.names["b"].holders)
    assert lot.lender.loans == 1


def test_a_loan_of_several_is_not_starved(lot: Rig):
    """Whoever comes after it for one of its entries stands behind it."""
    on_a, on_b, both, later = lot.clients(4)
    lot.borrow(on_a, "a")
    lot.borrow(on_b, "b")
    assert not lot.borrow(both, "a", "b", exclusive=True)
    lot.return_loan(on_a)
    assert not lot.borrow(later, "a")  # a is free, but promised
    assert lot.granted() == []
    lot.return_loan(on_b)
    assert lot.granted() == [both]
    lot.return_loan(both)
    assert lot.granted() == [later]


def test_an_exclusive_one_stands_behind_a_shared_loan_of_several(lot: Rig):
    on_b, both, on_a = lot.clients(3)
    lot.borrow(on_b, "b", exclusive=True)
    assert not lot.borrow(both, "a", "b")
    assert not lot.borrow(on_a, "a", exclusive=True)
    lot.return_loan(on_b)
    assert lot.granted() == [both]
    lot.return_loan(both)
    assert lot.granted() == [on_a]


def test_waiter_of_several_is_not_granted_before_an_earlier_one_in_another_queue(lot: Rig):
    on_a, on_b, exclusive, both = lot.clients(4)
    lot.borrow(on_a, "a", exclusive=True)
    lot.borrow(on_b, "b")
    assert not lot.borrow(exclusive, "b", exclusive=True)
    assert not lot.borrow(both, "a", "b")
    lot.return_loan(on_a)
    assert lot.granted() == []
    lot.return_loan(on_b)
    assert lot.granted() == [exclusive]
    lot.return_loan(exclusive)
    assert lot.granted() == [both]


def test_who_has_nothing_in_common_with_those_that_wait_does_not_wait(lot: Rig):
    holder, both, other = lot.clients(3)
    lot.borrow(holder, "a", exclusive=True)
    lot.borrow(both, "a", "b", exclusive=True)
    assert lot.borrow(other, "c", exclusive=True)


def test_shared_loans_pass_each_other(lot: Rig):
    """Two shared loans never conflict, so one that waits elsewhere holds nobody back."""
    on_b, both, on_a = lot.clients(3)
    lot.borrow(on_b, "b", exclusive=True)
    assert not lot.borrow(both, "a", "b")
    assert lot.borrow(on_a, "a")


def test_one_entry_named_twice_is_one_holder_with_two_references(lot: Rig):
    twice, other = lot.clients(2)
    assert lot.borrow(twice, "a", "a", exclusive=True)
    entry = lot.lender.names["a"]
    assert list(entry.holders) == [twice.slot]
    assert entry.fd.refs == 3
    assert not lot.borrow(other, "a", "a")
    lot.return_loan(twice)
    assert lot.granted() == [other]
    assert entry.fd.refs == 3


def test_an_unknown_name_among_several_leaves_nothing_behind(lot: Rig):
    (client,) = lot.clients(1)
    before = bytes(lot.ledger.buffer)
    with pytest.raises(UnknownEntry) as caught:
        lot.borrow(client, "a", "nobody", exclusive=True)
    assert caught.value.name == "nobody"
    with pytest.raises(UnknownTicket):
        lot.borrow(client, "a", b"no such ticket")
    assert lot.ledger.buffer == before
    assert (client.state, client.seq, client.request) == (IDLE, 0, NO_REQUEST)


def test_what_cannot_be_a_name_is_said_to_be_none(lot: Rig):
    (client,) = lot.clients(1)
    for name in ("", "a b", "n" * 256, "a\n"):
        with pytest.raises(BadName):
            lot.borrow(client, name)


def test_a_loan_that_could_not_be_sent_is_taken_back(lot: Rig):
    holder, waiting = lot.clients(2)
    lot.borrow(holder, "a", "b", exclusive=True)
    lot.borrow(waiting, "a")
    lot.lender.roll_back_grant(holder, lot.now)
    assert lot.granted() == [waiting]
    assert (holder.state, holder.seq, holder.request) == (IDLE, 1, NO_REQUEST)


def test_a_nameless_entry_is_borrowed_by_its_ticket(lot: Rig):
    (client,) = lot.clients(1)
    lot.put("", ticket=b"0123456789abcdef")
    assert lot.borrow(client, b"0123456789abcdef", "a")
    assert set(lot.lender.names) == {"a", "b", "c"}


# --- waiting for oneself


def test_a_process_does_not_wait_for_what_it_holds_exclusively(lot: Rig):
    holder, same, other = lot.client(7), lot.client(7), lot.client(8)
    lot.borrow(holder, "b", exclusive=True)
    for exclusive in (False, True):
        with pytest.raises(WouldDeadlock) as caught:
            lot.borrow(same, "a", "b", exclusive=exclusive)
        assert caught.value.data == ("b", 7)
    assert not lot.borrow(other, "b")
    assert same.state == IDLE


def test_two_processes_of_unknown_pid_are_not_taken_for_one(lot: Rig):
    holder, other = lot.client(0), lot.client(0)
    lot.borrow(holder, "a", exclusive=True)
    assert not lot.borrow(other, "a")


def test_a_process_may_wait_for_what_it_shares(lot: Rig):
    """Another thread of it can give that back; only an exclusive loan is a sure mistake."""
    holder, same = lot.client(7), lot.client(7)
    lot.borrow(holder, "a")
    assert not lot.borrow(same, "a", exclusive=True)
    lot.return_loan(holder)
    assert lot.granted() == [same]


# --- timeouts


def test_a_timeout_names_the_holders(lot: Rig):
    holder, other, waiting = lot.client(7, uid=1), lot.client(8, uid=2), lot.client(9)
    lot.borrow(holder, "b")
    lot.time_passes(2)
    lot.borrow(other, "b")
    assert not lot.borrow(waiting, "a", "b", exclusive=True, timeout=3 * SECOND)
    assert lot.lender.next_deadline() == lot.now + 3 * SECOND
    lot.time_passes(2.5)
    assert lot.decided() == []
    lot.time_passes(0.5)
    holders = [(7, 1, 5.0, False), (8, 2, 3.0, False)]
    assert lot.decided() == [(waiting, ("BorrowTimeout", "b", 3.0, holders))]
    assert waiting.state == IDLE
    assert lot.lender.next_deadline() is None


def test_a_timeout_names_only_those_who_are_in_the_way(lot: Rig):
    on_a, on_b, waiting = lot.client(7), lot.client(8), lot.client(9)
    lot.borrow(on_a, "a")
    lot.borrow(on_b, "b", exclusive=True)
    with pytest.raises(BorrowTimeout) as caught:
        lot.borrow(waiting, "a", "b", timeout=0)
    assert caught.value.name == "b"
    assert [holder[0] for holder in caught.value.holders] == [8]


def test_a_timeout_names_each_loan_once(lot: Rig):
    both, waiting = lot.client(7), lot.client(9)
    lot.borrow(both, "a", "b", exclusive=True)
    with pytest.raises(BorrowTimeout) as caught:
        lot.borrow(waiting, "b", "a", "a", timeout=0)
    assert caught.value.data == ("b", 0, [(7, 1000, 0.0, True)])


def test_a_timeout_behind_others_names_what_they_wait_for(lot: Rig):
    on_b, both, late = lot.clients(3)
    lot.borrow(on_b, "b", exclusive=True)
    lot.borrow(both, "b", "c", exclusive=True)
    with pytest.raises(BorrowTimeout) as caught:
        lot.borrow(late, "a", "c", timeout=0)
    assert caught.value.data == ("c", 0, [])


def test_a_timeout_names_a_few_holders_at_most():
    rig = Rig((32, 1, 1))
    rig.put("a")
    *holders, waiting = rig.clients(21)
    for holder in holders:
        rig.borrow(holder, "a")
    with pytest.raises(BorrowTimeout) as caught:
        rig.borrow(waiting, "a", exclusive=True, timeout=0)
    assert len(caught.value.holders) == HOLDERS_NAMED == 8  # more might not fit a reply
    rig.descriptors.abandon(rig.lender)


def test_a_timeout_of_zero_takes_or_leaves(lot: Rig):
    holder, other = lot.clients(2)
    assert lot.borrow(holder, "a", exclusive=True, timeout=0)
    before = bytes(lot.ledger.buffer)
    with pytest.raises(BorrowTimeout):
        lot.borrow(other, "a", timeout=0)
    assert lot.ledger.buffer == before
    assert not lot.lender.names["a"].waiters


def test_who_was_granted_in_time_is_not_timed_out(lot: Rig):
    holder, waiting = lot.clients(2)
    lot.borrow(holder, "a", exclusive=True)
    lot.borrow(waiting, "a", timeout=SECOND)
    lot.return_loan(holder)
    assert lot.granted() == [waiting]
    lot.time_passes(10)
    assert lot.decided() == []
    assert waiting.state == LENT


def test_a_wait_that_times_out_frees_the_way_before_the_next_one_does(lot: Rig):
    holder, exclusive, shared = lot.clients(3)
    lot.borrow(holder, "a")
    lot.borrow(exclusive, "a", exclusive=True, timeout=SECOND)
    lot.borrow(shared, "a", timeout=2 * SECOND)
    lot.time_passes(5)
    told = dict(lot.decided())
    assert told[exclusive][0] == "BorrowTimeout"
    assert told[shared] is None


def test_waits_that_are_over_do_not_pile_up(lot: Rig):
    """A client may ask and give up as often as it likes: the lender keeps nothing of it."""
    holder, waiting = lot.clients(2)
    lot.borrow(holder, "a", exclusive=True)
    for _ in range(1000):
        assert not lot.borrow(waiting, "a", timeout=3600 * SECOND)
        lot.cancel(waiting)
        lot.lender.notifications.clear()
    assert len(lot.lender.deadlines) < 10


def test_waits_that_are_over_do_not_pile_up_where_many_have_gone():
    rig = Rig((64, 6, 3))
    rig.put("a")
    holder, first, restless, *others = rig.clients(50)
    rig.borrow(holder, "a", exclusive=True)
    rig.borrow(first, "a", timeout=SECOND)  # what comes after its deadline is not looked at yet
    for who in others:
        rig.borrow(who, "a", timeout=3600 * SECOND)
    for who in others:
        rig.end(who)
    for _ in range(100):
        rig.borrow(restless, "a", timeout=3600 * SECOND)
        rig.cancel(restless)
    rig.decided()
    assert len(rig.lender.deadlines) < 10
    rig.check()
    rig.descriptors.abandon(rig.lender)


def test_deadlines_stay_in_order_when_those_of_waits_that_are_over_go():
    """As a heap they are in an order that one taken out of its middle can break."""
    rig = Rig((10, 6, 3))
    rig.put("a")
    holder, restless, *others = rig.clients(9)
    rig.borrow(holder, "a", exclusive=True)
    for who, seconds in zip(others, (1, 9, 2, 10, 11, 3, 4), strict=True):
        rig.borrow(who, "a", timeout=seconds * SECOND)
    rig.cancel(others[2])
    noted = rig.lender.deadlines
    for _ in range(100):
        before = len(noted)
        rig.borrow(restless, "a", timeout=3600 * SECOND)
        if len(noted) < before:
            break
        rig.cancel(restless)
    rig.decided()
    for seconds in (1, 3, 4, 9, 10, 11):
        assert rig.lender.next_deadline() == 1000 * SECOND + seconds * SECOND
        rig.time_passes(rig.lender.next_deadline() / SECOND - rig.now / SECOND)
    assert len(rig.decided()) == 6
    rig.check()
    rig.descriptors.abandon(rig.lender)


class Looks:
    """Counts how often it is asked whether a waiter can be granted.

    `first` counts only the looks at waiters that were not refused before in the same event.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all = self.first = 0
        self._is_grantable = wait_queue.is_grantable
        monkeypatch.setattr(wait_queue, "is_grantable", self)

    def __call__(self, session, refused):
        self.all += 1
        self.first += session.slot not in refused
        return self._is_grantable(session, refused)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    return Looks(monkeypatch)


def test_a_return_asks_each_who_waits_once(looks: Looks):
    """However many entries it was of, and they wait for: else one return could take seconds."""
    rig = Rig((16, 41, 1024))
    names = [f"n{number}" for number in range(40)]
    for name in (*names, "b"):
        rig.put(name)
    holder, other, *waiting = rig.clients(10)
    rig.borrow(holder, *names, exclusive=True)
    rig.borrow(other, "b", exclusive=True)
    for client in waiting:
        assert not rig.borrow(client, *names, "b")
    looks.first = 0
    rig.return_loan(holder)
    assert not rig.decided()
    assert looks.first == len(waiting)
    rig.return_loan(other)
    assert rig.granted() == waiting
    rig.check()
    rig.descriptors.abandon(rig.lender)


# --- giving up and giving back


def test_a_cancel_ends_the_wait_as_its_deadline_would(lot: Rig):
    holder, waiting = lot.client(7), lot.client(8)
    lot.borrow(holder, "a", exclusive=True)
    lot.borrow(waiting, "a")
    lot.time_passes(1)
    lot.cancel(waiting)
    told = ("BorrowTimeout", "a", 1.0, [(7, 1000, 1.0, True)])
    assert lot.lender.notifications[0][1] == 1  # the answer is to the borrow, not to the cancel
    assert lot.decided() == [(waiting, told)]
    assert (waiting.state, waiting.seq) == (IDLE, 2)


def test_a_cancel_that_crosses_its_grant_changes_nothing(lot: Rig):
    holder, waiting = lot.clients(2)
    lot.borrow(holder, "a", exclusive=True)
    lot.borrow(waiting, "a")
    lot.return_loan(holder)
    lot.cancel(waiting)
    assert lot.granted() == [waiting]
    assert (waiting.state, waiting.seq) == (LENT, 2)
    lot.return_loan(waiting)
    assert waiting.state == IDLE


def test_a_cancel_undoes_the_put_before_it(rig: Rig):
    (client,) = rig.clients(1)
    kept, undone = rig.put("kept", by=client), rig.put("undone", by=client)
    rig.cancel(client)
    assert rig.lender.names == {"kept": kept}
    assert list(rig.lender.pending_closes) == [undone]
    assert (client.state, client.seq) == (IDLE, 3)
    rig.cancel(client)  # the put is no longer the one before
    assert rig.lender.names == {"kept": kept}
    rig.close_all()
    rig.check()


def test_a_return_without_a_loan_is_the_clients_fault(lot: Rig):
    holder, waiting = lot.clients(2)
    lot.borrow(holder, "a", exclusive=True)
    lot.borrow(waiting, "a")
    with pytest.raises(ProtocolError) as caught:
        lot.return_loan(waiting)
    assert caught.value.side == "client"
    assert waiting.state == WAITING
    lot.return_loan(holder)
    with pytest.raises(ProtocolError):
        lot.return_loan(holder)
    assert lot.granted() == [waiting]


# --- no room


def test_no_room_for_a_loan_of_several_leaves_nothing_behind():
    rig = Rig((4, 3, 3))
    for name in "abc":
        rig.put(name)
    first, second = rig.clients(2)
    rig.borrow(first, "a", "b", "c")
    before = bytes(rig.ledger.buffer)
    for exclusive in (False, True):  # to be granted, and to wait
        with pytest.raises(BrokerFull) as caught:
            rig.borrow(second, "a", "b", "c", exclusive=exclusive)
        assert caught.value.limit == 3
    assert rig.ledger.buffer == before
    assert (second.state, second.request, rig.lender.waiting) == (IDLE, NO_REQUEST, 0)
    assert rig.lender.names["a"].fd.refs == 2
    assert rig.borrow(second, "a", "b")  # one cell is left, and it is enough
    rig.return_loan(second)
    rig.return_loan(first)
    assert rig.borrow(second, "a", "b", "c", exclusive=True)
    rig.check()
    rig.descriptors.abandon(rig.lender)


def test_a_session_that_has_ended_gets_nothing_any_more(lot: Rig):
    """The caller may still have it in its hands, with a request that was read before the end."""
    (ended,) = lot.clients(1)
    lot.end(ended)
    with pytest.raises(ProtocolError):
        lot.borrow(ended, "a")
    assert not lot.lender.names["a"].holders


def test_no_room_for_a_session_leaves_nothing_behind():
    rig = Rig((2, 1, 1))
    first, _ = rig.clients(2)
    before = bytes(rig.ledger.buffer)
    with pytest.raises(BrokerFull) as caught:
        rig.client()
    assert caught.value.data == ("sessions", 2)
    assert rig.ledger.buffer == before
    rig.end(first)
    assert rig.client().slot == first.slot


# --- a long line costs little


@pytest.fixture
def crowd(looks: Looks):
    """50 shared waits for `a` and `c`, which is taken, with one end; an exclusive one behind."""
    rig = Rig((60, 6, 200))
    for name in "abc":
        rig.put(name)
    holder, *waiting = rig.clients(51)
    rig.borrow(holder, "c", exclusive=True)
    for client in waiting:
        assert not rig.borrow(client, "a", "b", "c", timeout=5 * SECOND)
    assert not rig.borrow(rig.client(), "a", exclusive=True)
    looks.all = 0
    yield rig
    rig.check()
    rig.descriptors.abandon(rig.lender)


def test_waiters_behind_an_exclusive_one_are_not_looked_at(lot: Rig, looks: Looks):
    holder, first, *others = lot.clients(6)
    lot.borrow(holder, "a", exclusive=True)
    for client in (first, *others):
        assert not lot.borrow(client, "a", exclusive=True)
    looks.all = 0
    lot.return_loan(holder)
    assert lot.granted() == [first]
    assert looks.all == 1


def test_one_wait_ends_at_a_time(crowd: Rig):
    crowd.now += 5 * SECOND
    crowd.lender.expire(crowd.now)
    assert len(crowd.decided()) == 1
    assert crowd.lender.next_deadline() == crowd.now


def test_shared_waits_that_end_have_nobody_looked_at_but_who_is_the_first_then(
    crowd: Rig, looks: Looks
):
    crowd.time_passes(5)
    assert len(crowd.decided()) == 51, "the exclusive one has its turn"
    assert looks.all <= 2


def test_an_entry_that_retires_has_each_who_waits_looked_at_once(crowd: Rig, looks: Looks):
    last = crowd.client()
    crowd.borrow(last, "b")
    behind = crowd.clients(5)
    for client in behind:
        assert not crowd.borrow(client, "b", exclusive=True)
    looks.all = 0
    crowd.retire("a")
    assert len(crowd.decided()) == 51
    assert looks.all <= len(behind) + 1


def test_an_exclusive_one_that_leaves_has_each_behind_it_looked_at_once(crowd: Rig, looks: Looks):
    first = crowd.lender.names["a"]
    crowd.cancel(list(first.waiters.values())[-1])
    assert looks.all <= 2 * 50


def test_a_shared_one_that_leaves_with_an_exclusive_one_hides_it_not(lot: Rig):
    holder, exclusive, shared, behind = lot.clients(4)
    lot.borrow(holder, "a", exclusive=True)
    assert not lot.borrow(exclusive, "a", "b", exclusive=True)
    assert not lot.borrow(shared, "a", "b")
    assert not lot.borrow(behind, "b")
    lot.retire("a")
    assert (behind, None) in lot.decided()


def test_what_is_over_the_quota_has_no_name_looked_up(lot: Rig):
    (client,) = lot.clients(1)
    client.account.set_limit(DEFAULT._replace(loans=3))
    with pytest.raises(QuotaExceeded) as caught:
        lot.borrow(client, "none", "such", "names", "here")
    assert caught.value.data == ("loans", 0, 3)


def test_the_pid_of_another_uid_is_another_process(lot: Rig):
    one, other = lot.client(pid=7, uid=1000), lot.client(pid=7, uid=2000)
    lot.borrow(one, "a", exclusive=True)
    assert not lot.borrow(other, "a")
    lot.retire_and_wait(lot.client(pid=7, uid=2000), "a")
