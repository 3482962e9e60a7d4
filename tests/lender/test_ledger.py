"""The ledger: what is where in the buffer, what is one word, and what it refuses."""

from __future__ import annotations

import gc
import mmap
import os
import struct

import pytest

from fdbroker.errors import BrokerFull
from fdbroker.lender.ledger import (
    ENTRY_WORDS,
    HEADER_WORDS,
    MAGIC,
    SESSION_WORDS,
    Ledger,
    SessionRecord,
    Slots,
    shape,
)
from fdbroker.lender.lender import Lender
from fdbroker.lender.model import (
    CLOSING,
    FREE,
    IDLE,
    LENT,
    LIVE,
    RETIRING,
    WAITING,
    LoanRequest,
    Peer,
)
from fdbroker.lender.recovery import recover

from .kit import CountingFD, CutLedger, Descriptors, Rig, buffer_for, come, reload, view


def words(buffer) -> list[int]:
    return list(memoryview(bytes(buffer)).cast("Q"))


def changed(before: bytes, after) -> set[int]:
    """Which 64-bit words differ."""
    pairs = zip(words(before), words(after), strict=True)
    return {place for place, (one, other) in enumerate(pairs) if one != other}


def session_at(slot: int) -> int:
    return HEADER_WORDS + slot * SESSION_WORDS


def entry_at(rig: Rig, slot: int) -> int:
    return HEADER_WORDS + rig.ledger.sessions * SESSION_WORDS + slot * ENTRY_WORDS


# --- what is one word


def test_a_return_is_one_word(rig: Rig):
    (client,) = rig.clients(1)
    rig.put("a")
    rig.borrow(client, "a", purpose="to see")
    before = bytes(rig.ledger.buffer)
    rig.return_loan(client)
    assert changed(before, rig.ledger.buffer) == {session_at(client.slot)}


def test_a_grant_is_one_word_and_the_time_of_it(rig: Rig):
    """All else of the loan was written when it began to wait."""
    holder, waiting = rig.clients(2)
    rig.put("a")
    rig.borrow(holder, "a", exclusive=True)
    rig.borrow(waiting, "a")
    rig.time_passes(1)
    before = bytes(rig.ledger.buffer)
    rig.return_loan(holder)
    commits = {session_at(holder.slot), session_at(waiting.slot)}
    assert changed(before, rig.ledger.buffer) - commits == {session_at(waiting.slot) + 3}
    assert rig.ledger.read_session(waiting.slot)[3].since == rig.now


def test_a_grant_holds_from_its_commit_word_on(rig: Rig):
    (client,) = rig.clients(1)
    rig.put("a")
    before = bytes(rig.ledger.buffer)
    rig.borrow(client, "a", exclusive=True)
    after = words(rig.ledger.buffer)
    uncommitted = after.copy()
    uncommitted[session_at(0)] = words(before)[session_at(0)]
    states = []
    for all_words in (uncommitted, after):
        buffer = bytearray(struct.pack(f"={len(all_words)}Q", *all_words))
        states.append(reload(Ledger(buffer), {0: client.peer}, rig.now).sessions[0].state)
    assert states == [IDLE, LENT]


def test_a_retire_is_one_word(rig: Rig):
    entry = rig.put("a")
    before = bytes(rig.ledger.buffer)
    rig.retire("a")
    assert changed(before, rig.ledger.buffer) == {entry_at(rig, entry.slot)}


def test_a_cancel_is_one_word(rig: Rig):
    """Were its seq noted before the wait has ended, a kill in between would lose it."""
    holder, waiting = rig.clients(2)
    rig.put("a")
    rig.borrow(holder, "a", exclusive=True)
    rig.borrow(waiting, "a")
    ledger = CutLedger(bytearray(rig.ledger.buffer))
    loaded = reload(ledger, {0: holder.peer, 1: waiting.peer}, rig.now)
    loaded.cancel(loaded.sessions[waiting.slot], 2, rig.now)
    assert len(ledger.copies) == 1


def test_the_id_of_a_session_is_never_rewritten(rig: Rig):
    """It has a meaning in every state, and a write of a record is not one instant."""
    (client,) = rig.clients(1)
    rig.put("a")
    ledger = CutLedger(bytearray(rig.ledger.buffer))
    loaded = reload(ledger, {0: client.peer}, rig.now)
    loaded.borrow(loaded.sessions[0], 1, LoanRequest(("a",), purpose="to see"), rig.now)
    assert len(ledger.copies) > 2
    for copy in ledger.copies:
        assert words(copy)[session_at(0) + 1] == client.id


# --- the layout


def test_the_layout_is_what_the_magic_number_stands_for():
    """Another layout wants another MAGIC: a successor of another version must refuse it."""
    assert struct.pack("=Q", MAGIC) == b"fledger2"
    assert (HEADER_WORDS, SESSION_WORDS, ENTRY_WORDS) == (8, 25, 37)
    assert (FREE, IDLE, WAITING, LENT, CLOSING) == (0, 1, 2, 3, 4)
    assert (FREE, LIVE, RETIRING) == (0, 1, 2)
    assert Ledger.size(3, 2, 5) == 8 * (8 + 3 * 25 + 2 * 37 + 5)
    rig = Rig((2, 2, 2))
    client = rig.client(uid=4)
    rig.put("web", by=client)
    rig.put("tty")
    rig.now = 7
    rig.borrow(client, "tty", "web", exclusive=True, readonly=True, purpose="x")
    seen = words(rig.ledger.buffer)
    assert seen[:8] == [MAGIC, 2, 2, 2, 2, 3, 1, 0]  # next: session 2, generation 3, arrival 1
    assert seen[8:12] == [2 << 8 | LENT, 1, 2, 7]  # commit, id, seq, since
    fields = struct.unpack("=IHBBQ", bytes(rig.ledger.buffer[12 * 8 : 14 * 8]))
    assert fields == (1, 2, 3, 1, 0)  # entry, members, flags, size of the purpose, cell
    assert bytes(rig.ledger.buffer[17 * 8 : 17 * 8 + 2]) == b"x\0"
    web = 8 + 2 * 25
    assert seen[web : web + 4] == [1 << 8 | 1, client.id, 1, 1000 * 10**9]
    name = bytes(rig.ledger.buffer[(web + 5) * 8 : (web + 5) * 8 + 3])
    assert name == b"web"
    assert seen[-2:] == [0, 0]  # the second of the loan is entry 0
    rig.check()
    rig.descriptors.abandon(rig.lender)


def test_records_are_of_fixed_width():
    """The longest names and purposes touch nothing beside their own record."""
    rig = Rig((3, 3, 1))
    rig.clients(3)
    middle = rig.lender.sessions[1]
    before = bytes(rig.ledger.buffer)
    rig.put("a")
    first = changed(before, rig.ledger.buffer)
    before = bytes(rig.ledger.buffer)
    rig.put("n" * 255)
    rig.borrow(middle, "n" * 255, purpose="ü" * 64)
    mine = {*range(session_at(1), session_at(2)), *range(entry_at(rig, 1), entry_at(rig, 2))}
    assert changed(before, rig.ledger.buffer) <= mine | {5}
    assert first <= {*range(entry_at(rig, 0), entry_at(rig, 1)), 5}
    loaded = rig.reload()
    assert loaded.sessions[1].request.purpose == "ü" * 64
    assert set(loaded.names) == {"a", "n" * 255}
    rig.check()
    rig.descriptors.abandon(rig.lender)


def test_a_shorter_purpose_does_not_show_the_end_of_a_longer_one(rig: Rig):
    (client,) = rig.clients(1)
    rig.put("a")
    for purpose in ("a long story", "short", ""):
        rig.borrow(client, "a", purpose=purpose)
        assert rig.reload().sessions[0].request.purpose == purpose
        rig.return_loan(client)


def test_records_come_back_as_they_were_written():
    ledger = Ledger(buffer_for((2, 2, 8)), 2, 2, 8)
    record = SessionRecord(1, 2, 3, 4, 5, 6, 7, 8, 9, b"why?")
    words = 2**53 << 8 | LENT, 12, 1, 2, shape(4, 5, 4) | 3, 6, 7, 8, 9
    for word, value in enumerate(words):
        ledger.record(1)[word] = value
    ledger.write_purpose(1, b"why?")
    assert ledger.read_session(1) == (2**53, LENT, 12, record)
    assert ledger.session_states() == [0, LENT]
    ledger.write_cells([2, 5, 6], [1, 0, 1])
    assert ledger.read_cells(2, 3) == ([2, 5, 6], [1, 0, 1])
    assert ledger.words[-8:].tolist() == [0, 0, 2 << 32 | 1, 0, 0, 0, 1, 0]
    ledger.write_cells(range(3, 6), [1, 1, 0])
    assert ledger.read_cells(3, 3) == ([3, 4, 5], [1, 1, 0])
    assert ledger.read_cells(0, 0) == ([], [])


def test_no_number_is_given_twice():
    buffer = buffer_for()
    ledger = Ledger(buffer, 6, 6, 3)
    given = [ledger.count(4) for _ in range(3)]
    given += [Ledger(buffer).count(4) for _ in range(3)]
    assert given == [1, 2, 3, 4, 5, 6]


# --- what it refuses


def test_a_buffer_of_another_magic_is_refused():
    buffer = buffer_for()
    buffer[:8] = b"fledger1"
    before = bytes(buffer)
    with pytest.raises(ValueError, match="another version"):
        Ledger(buffer, 6, 6, 3)
    assert buffer == before


def test_a_buffer_that_is_too_small_is_refused_and_left_alone():
    for size in (0, 7, 8, 64, Ledger.size(6, 6, 3) - 8):
        buffer = bytearray(size)
        with pytest.raises(ValueError, match="too small"):
            Ledger(buffer, 6, 6, 3)
        assert buffer == bytes(size)


def test_the_beginning_of_a_ledger_is_refused():
    buffer = buffer_for()
    Ledger(buffer, 6, 6, 3)
    with pytest.raises(ValueError, match="only the beginning"):
        Ledger(buffer[:-8])


def test_a_buffer_may_be_longer_than_it_must_be():
    """By any number of bytes: a memfd is made of pages."""
    for more in (1, 8, 4095):
        ledger = Ledger(bytearray(Ledger.size(6, 6, 3) + more), 6, 6, 3)
        ledger.write_cells([2], [5])
        assert ledger.read_cells(2, 1) == ([2], [5])


def test_a_ledger_can_have_no_room_at_all():
    ledger = Ledger(bytearray(Ledger.size(0, 0, 0)), 0, 0, 0)
    assert (ledger.session_states(), ledger.entry_states()) == ([], [])
    with pytest.raises(BrokerFull):
        Lender(ledger).open(Peer(1000, 1000, 1))


def test_there_is_room_for_1024_of_each_if_nobody_says_otherwise():
    ledger = Ledger(bytearray(Ledger.size(1024, 1024, 1024)))
    assert (ledger.sessions, ledger.entries, ledger.cells) == (1024, 1024, 1024)


def test_a_formatted_buffer_is_taken_as_it_is(rig: Rig):
    rig.put("a")
    before = bytes(rig.ledger.buffer)
    again = Ledger(rig.ledger.buffer, 1, 1, 1)
    assert (again.sessions, again.entries, again.cells) == (6, 6, 3)
    assert again.buffer == before


# --- the slots


def test_slots_give_the_lowest_that_is_free():
    slots = Slots(4, "things")
    assert [slots.take() for _ in range(3)] == [0, 1, 2]
    slots.give(2)
    slots.give(0)
    assert slots.take_many(3) == [0, 2, 3]
    with pytest.raises(BrokerFull) as caught:
        slots.take()
    assert caught.value.data == ("things", 4)


def test_many_slots_are_given_and_taken_back_in_whatever_order():
    slots = Slots(9, "things")
    first, second, third = (slots.take_many(count) for count in (3, 1, 2))
    assert (first, second, third) == (range(3), range(3, 4), range(4, 6))
    slots.give_many(second)
    slots.give_many(third)
    assert slots.fresh == 4
    assert slots.take_many(2) == [3, 4]
    slots.give_many([4, 3])
    slots.give_many([])
    slots.give_many(first)
    first, second = slots.take_many(1), slots.take_many(1)
    slots.give_many(first)
    slots.give_many(second)
    assert slots.take_many(9) == range(9)  # all were back, both times
    with pytest.raises(BrokerFull):
        slots.take_many(1)
    slots.give_many([0, 2, 8])
    assert [slots.take() for _ in range(3)] == [0, 2, 8]


def test_slots_of_a_load_are_the_same():
    slots = Slots(5, "things", taken={1, 3})
    with pytest.raises(BrokerFull):
        slots.take_many(4)
    assert slots.take_many(3) == [0, 2, 4]


# --- a large one


LARGE = 10_000, 100_000, 100_000


def use_a_little(buffer: memoryview) -> tuple[Lender, Descriptors]:
    lender, descriptors = Lender(Ledger(buffer, *LARGE)), Descriptors()
    session = come(lender, Peer(1000, 1000, 1))
    for name in "abc":
        lender.put(None, 0, name, b"", descriptors.new(), 1, 5)
    lender.borrow(session, 1, LoanRequest(("a", "b")), 5)
    return lender, descriptors


def resident() -> int:
    """Bytes of this process that have memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


def test_a_ledger_of_100_000_entries_stays_sparse():
    """The kernel counts the pages of a memfd one by one: five tables' beginnings are in use."""
    memfd = os.memfd_create("ledger")
    try:
        os.ftruncate(memfd, Ledger.size(*LARGE))
        with mmap.mmap(memfd, 0) as mapping, memoryview(mapping) as buffer:
            lender, descriptors = use_a_little(buffer)
            descriptors.abandon(lender)
            del lender
            gc.collect()  # loans and entries know each other, and a session knows its record
            assert os.fstat(memfd).st_blocks * 512 <= 5 * mmap.PAGESIZE
    finally:
        os.close(memfd)


def test_a_load_of_100_000_entries_leaves_it_sparse():
    size = Ledger.size(*LARGE)
    before = resident()
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    lender, descriptors = use_a_little(memoryview(mapping))
    loaded = reload(Ledger(memoryview(mapping)), {0: lender.sessions[0].peer}, 5)
    assert view(loaded) == view(lender)
    descriptors.abandon(lender)
    assert resident() - before < size / 3


def reload_without(rig: Rig, *, sessions: tuple[int, ...] = (), entries: tuple[int, ...] = ()):
    """A successor that got no socket of these sessions, and no descriptor of these entries."""
    peers = {slot: one.peer for slot, one in rig.lender.sessions.items() if slot not in sessions}
    copy = Ledger(bytearray(rig.ledger.buffer))
    kept = {slot: CountingFD() for slot in rig.lender.entries if slot not in entries}
    loaded = recover(copy, peers, kept, rig.now)
    assert view(reload(copy, peers, rig.now)) == view(loaded)  # the ledger says so from now on
    return loaded


def test_a_session_without_its_socket_has_ended(rig: Rig):
    """Nobody was told of it yet, or it was over but for the slot."""
    holder, waiting, greeted = rig.clients(3)
    rig.put("a")
    rig.borrow(holder, "a", exclusive=True)
    rig.borrow(waiting, "a")
    loaded = reload_without(rig, sessions=(holder.slot, greeted.slot))
    assert set(loaded.sessions) == {waiting.slot}
    assert loaded.ledger.session_states() == [FREE, LENT, *[FREE] * 4]  # whoever loads it next
    ((who, seq, error),) = loaded.notifications  # it is its turn now
    assert (who.slot, seq, error) == (waiting.slot, waiting.seq, None)
    assert loaded.open(Peer(1, 1, 1)).slot == holder.slot


def test_a_loaded_lender_says_what_it_is_full_of(rig: Rig):
    rig.clients(6)
    for number in range(6):
        rig.put(f"n{number}")
    rig.borrow(rig.lender.sessions[0], "n0", "n1", "n2", "n3")
    loaded = rig.reload()
    whose, several = loaded.sessions[1], LoanRequest(("n0", "n1"))
    for event, what, limit in (
        (lambda: loaded.open(Peer(1000, 1000, 1)), "sessions", 6),
        (lambda: loaded.put(None, 0, "b", b"", CountingFD(), 1, 5), "entries", 6),
        (lambda: loaded.borrow(whose, 1, several, 5), "loans of several entries", 3),
    ):
        with pytest.raises(BrokerFull) as caught:
            event()
        assert caught.value.data == (what, limit)


def test_a_loaded_loan_knows_its_names_and_tickets(rig: Rig):
    (client,) = rig.clients(1)
    rig.put("a")
    rig.put("", ticket=b"0123456789abcdef")
    rig.borrow(client, b"0123456789abcdef", "a")
    assert rig.reload().sessions[0].request.names == (b"0123456789abcdef", "a")


def test_an_entry_without_its_descriptor_was_never_put(rig: Rig):
    (client,) = rig.clients(1)
    rig.put("a", by=client)
    rig.put("b", by=client)
    loaded = reload_without(rig, entries=(1,))
    assert set(loaded.names) == {"a"}
    assert set(loaded.entries) == {0}
    assert loaded.put(None, 0, "b", b"", CountingFD(), 1, rig.now).slot == 1


def test_an_entry_without_its_descriptor_was_closed(rig: Rig):
    """Who waits for that is told so."""
    (client,) = rig.clients(1)
    rig.put("a")
    rig.retire_and_wait(client, "a")
    loaded = reload_without(rig, entries=(0,))
    ((who, seq, error),) = loaded.notifications
    assert (who.slot, seq, error) == (client.slot, client.asked_seq, None)
    assert not loaded.entries
    assert not loaded.pending_closes


def test_recovered_session_keeps_the_charge_for_its_connection(rig: Rig):
    (client,) = rig.clients(1)
    rig.put("a")
    rig.borrow(client, "a")
    recovered = rig.reload()
    session = recovered.sessions[client.slot]
    account = recovered.accounting.account(client.peer.uid)
    assert (session.account, account.sessions, account.loans) == (account, 1, 1)
    recovered.clear(session, rig.now)
    recovered.free(session)
    assert account.sessions == 1
    session.charge.release()
    assert recovered.accounting.accounts == {}


def test_an_entry_of_the_broker_itself_is_its_uids(rig: Rig):
    rig.put("a", uid=1000)
    assert rig.lender.names["a"].uid == 1000
    assert rig.reload().names["a"].uid == 1000
