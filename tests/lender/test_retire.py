"""How an entry begins and ends: put, replace, retire, the deferred close, and who waits for it."""

from __future__ import annotations

import pytest

from fdbroker.errors import (
    BrokerFull,
    ClosedFDError,
    NameTaken,
    UnknownEntry,
    UnknownTicket,
    WouldDeadlock,
)
from fdbroker.lender.ledger import COMMIT, Ledger
from fdbroker.lender.model import FREE, IDLE

from .kit import SECOND, Rig

TICKET = b"0123456789abcdef"


# --- retire


def test_a_retired_entry_refuses_at_once_and_its_name_is_free(rig: Rig):
    holder, late = rig.clients(2)
    old = rig.put("web")
    rig.borrow(holder, "web")
    assert rig.retire("web") is old
    with pytest.raises(UnknownEntry):
        rig.borrow(late, "web")
    with pytest.raises(ClosedFDError):
        old.fd.incref()
    new = rig.put("web")
    assert rig.borrow(late, "web")
    assert late.entries == [new]
    assert holder.entries == [old]


def test_the_close_is_deferred_until_the_last_loan_is_back(rig: Rig):
    one, two = rig.clients(2)
    entry = rig.put("web")
    rig.borrow(one, "web")
    rig.borrow(two, "web")
    rig.retire("web")
    rig.return_loan(one)
    assert rig.close_all() == []
    assert not entry.fd.closed
    rig.end(two)
    assert rig.descriptors.closed == []  # never in the event itself: a close may be slow
    assert rig.close_all() == ["web"]
    assert entry.fd.closed
    assert rig.descriptors.closed == [1001]
    assert rig.lender.entries == {}


def test_the_close_is_deferred_until_the_broker_itself_has_let_go(rig: Rig):
    (one,) = rig.clients(1)
    entry = rig.put("web")
    rig.borrow(one, "web")
    rig.lender.pin([entry, entry])
    rig.lender.pin([entry])
    rig.retire("web")
    rig.lender.unpin([entry])
    rig.end(one)
    assert rig.close_all() == []
    assert not entry.fd.closed
    rig.lender.unpin([entry, entry])
    assert rig.close_all() == ["web"]
    assert rig.descriptors.closed == [1001]


def test_the_close_is_deferred_until_the_loan_is_back_that_the_broker_let_go_of(rig: Rig):
    (one,) = rig.clients(1)
    entry = rig.put("web")
    rig.borrow(one, "web")
    rig.lender.pin([entry])
    rig.retire("web")
    rig.lender.unpin([entry])
    assert rig.close_all() == []
    rig.end(one)
    assert rig.close_all() == ["web"]


def test_an_entry_without_loans_is_to_be_closed_at_once(rig: Rig):
    entry = rig.put("web")
    rig.retire("web")
    assert list(rig.lender.pending_closes) == [entry]
    assert rig.close_all() == ["web"]


def test_the_generation_grows_with_every_entry(rig: Rig):
    generations = [rig.put(name).generation for name in "ab"]
    for _ in range(3):
        rig.retire("a")
        rig.close_all()
        generations.append(rig.put("a").generation)
    assert generations == sorted(set(generations))
    assert rig.lender.names["a"].slot == 0  # the slot is used again, the generation is not


def test_who_waits_for_an_entry_is_told_when_it_retires(rig: Rig):
    holder, both, elsewhere = rig.clients(3)
    rig.put("a")
    rig.put("b")
    rig.borrow(holder, "a", exclusive=True)
    rig.borrow(both, "b", "a", exclusive=True)
    rig.borrow(elsewhere, "b")
    rig.retire("a")
    told = rig.decided()
    assert sorted(told, key=lambda one: one[0].slot) == [
        (both, ("EntryRetired", "a")),
        (elsewhere, None),  # who waited behind it for the other entry
    ]
    assert both.state == IDLE


def test_who_waits_for_a_retiring_entry_is_not_granted_it_on_the_way(rig: Rig):
    """The first who is told makes way, in the line of `b`, for one who wants `a` as well."""
    holder, first, second = rig.clients(3)
    for name in "abc":
        rig.put(name)
    rig.borrow(holder, "c", exclusive=True)
    rig.borrow(first, "a", "b", "c", exclusive=True)
    rig.borrow(second, "a", "b", exclusive=True)
    rig.retire("a")
    assert rig.decided() == [(first, ("EntryRetired", "a")), (second, ("EntryRetired", "a"))]
    assert rig.close_all() == ["a"]


def test_a_ticket_ends_with_its_entry(rig: Rig):
    (client,) = rig.clients(1)
    rig.put("", ticket=TICKET)
    rig.retire(TICKET)
    with pytest.raises(UnknownTicket):
        rig.borrow(client, TICKET)
    with pytest.raises(UnknownTicket):
        rig.retire(TICKET)
    assert rig.close_all() == [""]


def test_what_is_not_there_cannot_be_retired(rig: Rig):
    rig.put("web")
    rig.retire("web")
    with pytest.raises(UnknownEntry):
        rig.retire("web")
    assert len(rig.lender.pending_closes) == 1


# --- retire, and wait for the close


def test_waiting_for_the_close_ends_with_the_close(rig: Rig):
    holder, watcher = rig.clients(2)
    rig.put("web")
    rig.borrow(holder, "web")
    rig.retire_and_wait(watcher, "web")
    rig.return_loan(holder)
    assert rig.decided() == []
    assert rig.close_all() == ["web"]
    assert rig.decided() == [(watcher, None)]
    assert watcher.state == IDLE


def test_a_close_that_fails_is_told(rig: Rig):
    (watcher,) = rig.clients(1)
    rig.put("web")
    rig.retire_and_wait(watcher, "web")
    rig.close_all(fails=True)
    assert rig.decided() == [
        (watcher, ("CloseFailed", "web", "[Errno 5] Input/output error")),
    ]
    assert rig.lender.entries == {}


def test_of_the_reason_why_a_close_failed_as_much_is_told_as_fits(rig: Rig):
    (watcher,) = rig.clients(1)
    entry = rig.put("web")
    rig.retire_and_wait(watcher, "web")
    rig.lender.pending_closes.clear()
    entry.fd.decref()
    rig.lender.closed(entry, OSError("x" * 10_000))
    assert rig.decided() == [(watcher, ("CloseFailed", "web", "x" * 100))]
    assert entry.state == FREE


def test_waiting_for_the_close_has_its_deadline_and_stays_retired(rig: Rig):
    one, two, watcher = rig.clients(3)
    rig.put("web")
    rig.borrow(one, "web")
    rig.borrow(two, "web")
    rig.retire_and_wait(watcher, "web", timeout=5 * SECOND)
    rig.return_loan(one)
    rig.time_passes(5)
    assert rig.decided() == [(watcher, ("RetireTimeout", "web", 5.0, 1))]
    assert "web" not in rig.lender.names
    rig.return_loan(two)
    assert rig.close_all() == ["web"]
    assert rig.decided() == []


def test_waiting_for_the_close_can_be_cancelled(rig: Rig):
    holder, watcher = rig.clients(2)
    rig.put("web")
    rig.borrow(holder, "web")
    rig.retire_and_wait(watcher, "web")
    rig.cancel(watcher)
    assert rig.decided() == [(watcher, ("RetireTimeout", "web", 0.0, 1))]
    assert (watcher.state, watcher.seq) == (IDLE, 2)


def test_a_borrower_does_not_wait_for_its_own_return(rig: Rig):
    holder, same = rig.client(7), rig.client(7)
    entry = rig.put("web")
    rig.borrow(holder, "web")
    with pytest.raises(WouldDeadlock) as caught:
        rig.retire_and_wait(same, "web")
    assert caught.value.data == ("web", 7)
    assert rig.lender.names["web"] is entry  # nothing happened
    rig.retire_and_wait(rig.client(8), "web")
    assert "web" not in rig.lender.names


def test_a_watcher_that_ends_is_not_told(rig: Rig):
    (watcher,) = rig.clients(1)
    rig.put("web")
    rig.retire_and_wait(watcher, "web")
    rig.end(watcher)
    assert rig.close_all() == ["web"]
    assert rig.decided() == []


def test_a_retire_that_was_cut_short_is_finished_by_the_load(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    """The watcher's record says that it waits for the close, the entry's that it lives."""
    watcher, waiting, holder = rig.clients(3)
    rig.put("web")
    rig.borrow(holder, "web", exclusive=True)
    rig.borrow(waiting, "web")

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "commit_entry", kill)
        with pytest.raises(Killed):
            rig.retire_and_wait(watcher, "web")
    loaded = rig.reload()
    assert loaded.names == {}
    assert [type(error).__name__ for _, _, error in loaded.notifications] == ["EntryRetired"]
    rig.lender.start_retiring(rig.lender.names["web"], rig.now)


# --- put, and replace


def test_a_name_is_taken_as_long_as_its_entry_lives(rig: Rig):
    (client,) = rig.clients(1)
    rig.put("web")
    before = bytes(rig.ledger.buffer)
    with pytest.raises(NameTaken) as caught:
        rig.put("web", by=client)
    assert caught.value.name == "web"
    assert rig.ledger.buffer == before
    with pytest.raises(NameTaken):
        rig.lender.check_put(None, "web", replace=False)
    rig.lender.check_put(None, "web", replace=True)
    rig.lender.check_put(None, "other", replace=False)


def test_replace_leaves_no_instant_without_an_entry(rig: Rig):
    holder, waiting, late = rig.clients(3)
    old = rig.put("web")
    rig.borrow(holder, "web", exclusive=True)
    rig.borrow(waiting, "web")
    new = rig.put("web", replace=True)
    assert rig.lender.names == {"web": new}
    assert new.generation > old.generation
    assert rig.decided() == [(waiting, ("EntryRetired", "web"))]
    assert rig.borrow(late, "web", exclusive=True)
    assert rig.close_all() == []
    rig.return_loan(holder)
    assert rig.close_all() == ["web"]
    assert old.fd.closed
    assert not new.fd.closed


def test_replace_of_nothing_is_a_put(rig: Rig):
    assert rig.put("web", replace=True) is rig.lender.names["web"]


def test_no_room_for_an_entry_leaves_nothing_behind():
    rig = Rig((2, 2, 1))
    (client,) = rig.clients(1)
    old = rig.put("a")
    rig.put("b")
    before = bytes(rig.ledger.buffer)
    for name, replace in (("c", False), ("a", True)):
        with pytest.raises(BrokerFull) as caught:
            rig.put(name, by=client, replace=replace)
        assert caught.value.data == ("entries", 2)
    assert rig.ledger.buffer == before
    assert rig.lender.names["a"] is old
    assert client.seq == 0
    rig.retire("a")
    with pytest.raises(BrokerFull):
        rig.put("c")  # its slot is free when it is closed
    rig.close_all()
    assert rig.put("c").slot == old.slot
    rig.descriptors.abandon(rig.lender)


def test_an_entry_knows_who_put_it(rig: Rig):
    client = rig.client(uid=1234)
    entry = rig.put("web", by=client)
    assert (entry.creator, entry.creator_seq, entry.uid) == (client.id, 1, 1234)
    assert client.seq == 1
    assert entry.since == rig.now


# --- ephemeral


def test_an_ephemeral_entry_ends_with_the_session_that_put_it(rig: Rig):
    creator, borrower = rig.clients(2)
    rig.put("mine", by=creator, ephemeral=True)
    rig.put("", by=creator, ticket=TICKET, ephemeral=True)
    rig.put("ours", by=creator)
    rig.borrow(borrower, "mine")
    rig.end(creator)
    assert set(rig.lender.names) == {"ours"}
    assert rig.lender.tickets == {}
    assert rig.close_all() == [""]
    rig.return_loan(borrower)
    assert rig.close_all() == ["mine"]


def test_an_ephemeral_entry_retires_once_only(rig: Rig):
    creator, borrower = rig.clients(2)
    rig.put("mine", by=creator, ephemeral=True)
    rig.borrow(borrower, "mine")
    rig.retire("mine")
    rig.end(creator)
    rig.end(borrower)
    assert rig.close_all() == ["mine"]


def test_the_maker_of_an_ephemeral_entry_may_have_it_on_loan(rig: Rig):
    (creator,) = rig.clients(1)
    rig.put("mine", by=creator, ephemeral=True)
    rig.borrow(creator, "mine", exclusive=True)
    rig.end(creator)
    assert rig.close_all() == ["mine"]


def test_the_brokers_own_entries_are_never_ephemeral(rig: Rig):
    entry = rig.put("web", ephemeral=True)
    assert not entry.ephemeral


def test_an_ephemeral_entry_is_its_makers_after_a_load(rig: Rig):
    creator, other = rig.clients(2)
    rig.put("mine", by=creator, ephemeral=True)
    loaded = rig.reload()
    loaded.clear(loaded.sessions[other.slot], rig.now)
    assert set(loaded.names) == {"mine"}
    loaded.clear(loaded.sessions[creator.slot], rig.now)
    assert loaded.names == {}


def test_an_ephemeral_entry_without_its_session_retires_at_the_load(rig: Rig):
    (creator,) = rig.clients(1)
    rig.put("mine", by=creator, ephemeral=True)
    rig.ledger.record(creator.slot)[COMMIT] = 0  # as if it had been forgotten without a clear
    loaded = rig.reload()
    assert loaded.names == {}
    assert [entry.name for entry in loaded.pending_closes] == ["mine"]
    rig.end(creator)
