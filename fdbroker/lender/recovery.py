"""Rebuild a lender from its ledger: what a successor does, and nothing else may be needed.

Peers and descriptors are not in the ledger: the kernel tells the ones again from the kept sockets,
and the others come from wherever custody kept them.  A writer that was stopped in the middle of an
event left some records changed and others not; each such half is finished here, in the direction
in which it was going:

    two live entries of one name            a replace: the older generation retires
    an entry newer than its maker's seq     a put whose request was not noted: the seq follows
    an ephemeral entry without its session  that session has ended: the entry retires
    a wait for the close of a live entry    a retire: the entry retires
    a wait for a retiring entry             it is told so
    a wait that nothing holds back          it is granted
    a retiring entry without loans          it is to be closed
    an entry without its descriptor         a put that nobody was told of, or a close that was done
    a session without its socket            it has ended, and with it its loan
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import TYPE_CHECKING

from fdbroker.lender.ledger import COMMIT, Ledger, Slots
from fdbroker.lender.lender import Lender
from fdbroker.lender.model import (
    CLOSING,
    EPHEMERAL,
    EXCLUSIVE,
    FOREVER,
    FREE,
    LENT,
    LIVE,
    NAMELESS,
    READONLY,
    RETIRING,
    WAITING,
    Entry,
    LoanRequest,
    Peer,
    Session,
)

if TYPE_CHECKING:
    from fdbroker.rc import FD


def load(
    ledger: Ledger, peers: Mapping[int, Peer], descriptors: Mapping[int, FD], now: int
) -> Lender:
    """The lender that wrote `ledger`.  `peers` is by session slot, `descriptors` by entry slot.

    Each FD must be one without references; it is the lender's from now on.  What custody has no
    socket or no descriptor of was not yet or is no longer anybody's.
    """
    lender = Lender(ledger)
    entries: dict[int, Entry] = {}
    for slot, state in enumerate(ledger.entry_states()):
        if state == FREE:
            continue
        if slot in descriptors:
            entries[slot] = _entry(lender, slot, descriptors[slot])
        else:
            ledger.commit_entry(slot, 0, FREE)
    sessions: list[Session] = []
    for slot, state in enumerate(ledger.session_states()):
        if state == FREE:
            continue
        if slot in peers:
            sessions.append(_session(lender, slot, peers[slot], entries))
        else:
            ledger.record(slot)[COMMIT] = FREE
    cells = {cell for session in sessions for cell in session.cells}
    lender.slots_taken(
        Slots(ledger.sessions, "sessions", {session.slot for session in sessions}),
        Slots(ledger.entries, "entries", set(entries)),
        Slots(ledger.cells, "loans of several entries", cells),
    )
    for session in sessions:
        _enter_session(lender, session)
    retiring = _enter_entries(lender, entries, {session.id: session for session in sessions})
    for session in sorted(
        (session for session in sessions if session.state == WAITING),
        key=attrgetter("arrival"),
    ):
        lender.stand_in_line(session)
    for entry in retiring.values():
        lender.start_retiring(entry, now)
    refused: set[int] = set()
    for entry in entries.values():
        lender.serve_line(entry, now, refused)
    return lender


def _entry(lender: Lender, slot: int, fd: FD) -> Entry:
    generation, state, record = lender.ledger.read_entry(slot)
    name, ticket = ("", record.name) if record.flags & NAMELESS else (record.name.decode(), b"")
    entry = Entry(slot, name, ticket, generation, fd)
    entry.state, entry.kind, entry.since, entry.uid = state, record.kind, record.since, record.uid
    entry.maker, entry.maker_seq = record.maker, record.maker_seq
    entry.ephemeral = bool(record.flags & EPHEMERAL)
    entry.account = lender.quotas.account(entry.uid) if entry.maker else None
    return entry


def _session(lender: Lender, slot: int, peer: Peer, entries: dict[int, Entry]) -> Session:
    ledger = lender.ledger
    seq, state, id, record = ledger.read_session(slot)
    session = Session(slot, id, peer, ledger.record(slot), lender.quotas.account(peer.uid))
    session.seq, session.state = seq, state
    if state in (WAITING, CLOSING):
        session.asked, session.asked_seq = record.asked, record.borrow_seq
        session.deadline = record.deadline
    if state == CLOSING:
        session.awaited = entries.get(record.entry)
    if state in (WAITING, LENT):
        cells, others = ledger.read_cells(record.cell, record.members - 1)
        members = [entries[number] for number in (record.entry, *others)]
        session.request = LoanRequest(
            tuple(entry.name or entry.ticket for entry in members),
            bool(record.flags & EXCLUSIVE),
            bool(record.flags & READONLY),
            None,  # the deadline says it
            record.purpose.decode(),
        )
        session.entries, session.cells = members, cells
        session.borrow_seq, session.since = record.borrow_seq, record.since
        session.arrival = record.arrival
    return session


def _enter_session(lender: Lender, session: Session) -> None:
    lender.sessions[session.slot] = session
    lender.quotas.add(session.account, "sessions")
    lender.quotas.add_members(session.account, len(session.cells))
    if session.state == LENT:
        lender.hold(session)
    if session.state == CLOSING:
        lender.watch_again(session)
    if session.deadline != FOREVER:
        lender.note_deadline(session)


def _enter_entries(
    lender: Lender, entries: dict[int, Entry], makers: dict[int, Session]
) -> dict[int, Entry]:
    """Enter all entries, the oldest first; the result is those that retire, by slot."""
    retiring: dict[int, Entry] = {}
    for entry in sorted(entries.values(), key=attrgetter("generation")):
        maker = makers.get(entry.maker)
        if maker is not None and entry.maker_seq > maker.seq:
            lender.advance(maker, entry.maker_seq)
        replaced = lender.names.get(entry.name) if entry.state == LIVE else None
        if replaced is not None:
            retiring[replaced.slot] = replaced
        if maker is not None:
            maker.made = entry
        if entry.ephemeral:
            entry.owner = maker
        if entry.state == RETIRING or entry.watchers or (entry.ephemeral and maker is None):
            retiring[entry.slot] = entry
        lender.enter(entry)
    return retiring
