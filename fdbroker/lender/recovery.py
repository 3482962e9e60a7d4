"""Recovery: rebuild a lender from its ledger, as the successor of a broker that died does.

Peers and descriptors are not in the ledger.  The kernel tells the peers again from the sockets
that were kept, and the descriptors come from custody.  A broker that was killed in the middle of an
event has written some records and not others.  Each event that was cut in two is completed here:

    two live entries of one name            a replace: the older generation retires
    an entry newer than its creator's seq   a put whose request was not noted: the seq follows
    an ephemeral entry without its session  that session has ended: the entry retires
    a wait for the close of a live entry    a retire: the entry retires
    a wait for a retiring entry             the session is notified of that
    a wait with nothing in its way          it is granted
    a retiring entry without loans          it becomes a pending close
    an entry without its descriptor         a put without a reply, or a close that was done
    a session without its socket            it has ended, and its loan with it
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

from fdbroker.lender.ledger import COMMIT, Slots
from fdbroker.lender.lender import Lender
from fdbroker.lender.model import (
    CLOSING,
    ENTRY_EPHEMERAL,
    ENTRY_NAMELESS,
    FOREVER,
    FREE,
    LENT,
    LIVE,
    LOAN_EXCLUSIVE,
    LOAN_READONLY,
    RETIRING,
    WAITING,
    Entry,
    LoanRequest,
    Session,
)
from fdbroker.lender.state import hold

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fdbroker.lender.ledger import Ledger
    from fdbroker.lender.model import Peer
    from fdbroker.lender.state import LenderState
    from fdbroker.rc import FD


def recover(
    ledger: Ledger, peers: Mapping[int, Peer], descriptors: Mapping[int, FD], now: int
) -> Lender:
    """Return a lender in the state that `ledger` tells.

    `peers` is by session slot and `descriptors` by entry slot.  Each FD must be without references,
    and is the lender's from now on.  Records without a peer or descriptor there are freed.

    Every session has the charge for its connection (`Session.charge`), which the connection that
    takes it over releases.
    """
    lender = Lender(ledger)
    state = lender.state
    entries = _read_entries(state, descriptors)
    sessions = _read_sessions(state, peers, entries)
    state.session_slots = Slots(ledger.sessions, "sessions", {one.slot for one in sessions})
    state.entry_slots = Slots(ledger.entries, "entries", set(entries))
    state.cells.restore(sessions)
    for session in sessions:
        _add_session(state, session)
    retiring = _add_entries(lender, entries, {session.id: session for session in sessions})
    waiting = [session for session in sessions if session.state == WAITING]
    for session in sorted(waiting, key=attrgetter("arrival")):
        state.enqueue(session)
    for entry in retiring.values():
        state.start_retiring(entry, now)
    refused: set[int] = set()
    for entry in entries.values():
        state.wake_waiters_of(entry, now, refused)
    return lender


def _read_entries(state: LenderState, descriptors: Mapping[int, FD]) -> dict[int, Entry]:
    """Return all entries by slot; free the records that have no descriptor."""
    entries: dict[int, Entry] = {}
    for slot, slot_state in enumerate(state.ledger.entry_states()):
        if slot_state == FREE:
            continue
        if slot in descriptors:
            entries[slot] = _read_entry(state, slot, descriptors[slot])
        else:
            state.ledger.commit_entry(slot, 0, FREE)
    return entries


def _read_entry(state: LenderState, slot: int, fd: FD) -> Entry:
    generation, entry_state, record = state.ledger.read_entry(slot)
    nameless = record.flags & ENTRY_NAMELESS
    name, ticket = ("", record.name) if nameless else (record.name.decode(), b"")
    entry = Entry(slot, name, ticket, generation, fd)
    entry.state, entry.kind = entry_state, record.kind
    entry.since, entry.uid = record.since, record.uid
    entry.creator, entry.creator_seq = record.creator, record.creator_seq
    entry.ephemeral = bool(record.flags & ENTRY_EPHEMERAL)
    entry.account = state.accounting.account(entry.uid) if entry.creator else None
    return entry


def _read_sessions(
    state: LenderState, peers: Mapping[int, Peer], entries: Mapping[int, Entry]
) -> list[Session]:
    """Return all sessions; free the records that have no peer."""
    sessions: list[Session] = []
    for slot, session_state in enumerate(state.ledger.session_states()):
        if session_state == FREE:
            continue
        if slot in peers:
            sessions.append(_read_session(state, slot, peers[slot], entries))
        else:
            state.ledger.record(slot)[COMMIT] = FREE
    return sessions


def _read_session(
    state: LenderState, slot: int, peer: Peer, entries: Mapping[int, Entry]
) -> Session:
    ledger = state.ledger
    seq, session_state, id, record = ledger.read_session(slot)
    session = Session(slot, id, peer, ledger.record(slot), state.accounting.account(peer.uid))
    session.seq, session.state = seq, session_state
    if session_state in (WAITING, CLOSING):
        session.asked, session.asked_seq = record.asked, record.borrow_seq
        session.deadline = record.deadline
    if session_state == CLOSING:
        session.awaited = entries.get(record.entry)
    if session_state in (WAITING, LENT):
        cells, others = ledger.read_cells(record.cell, record.members - 1)
        members = [entries[number] for number in (record.entry, *others)]
        # The timeout of the request is not in the ledger, since the deadline is.
        session.request = LoanRequest(
            tuple(entry.name or entry.ticket for entry in members),
            bool(record.flags & LOAN_EXCLUSIVE),
            bool(record.flags & LOAN_READONLY),
            None,
            record.purpose.decode(),
        )
        session.entries, session.cells = members, cells
        session.borrow_seq, session.since = record.borrow_seq, record.since
        session.arrival = record.arrival
    return session


def _add_session(state: LenderState, session: Session) -> None:
    """Add a session to the tables, with its loan or its wait for a close."""
    state.sessions[session.slot] = session
    session.charge = state.accounting.charge(session.account, "sessions")
    if session.state == LENT:
        hold(session)
    if session.state == CLOSING and session.awaited is not None:
        state.wait_for_close(session, session.awaited)
    elif session.state == CLOSING:
        # The record of the entry is free, so its final close has happened.
        state.stop_waiting_for_close(session)
        state.notifications.append((session, session.asked_seq, None))
    if session.deadline != FOREVER:
        state.deadlines.add(session)


def _add_entries(
    lender: Lender, entries: Mapping[int, Entry], creators: Mapping[int, Session]
) -> dict[int, Entry]:
    """Add all entries to the tables, the oldest first; return those that retire, by slot."""
    retiring: dict[int, Entry] = {}
    for entry in sorted(entries.values(), key=attrgetter("generation")):
        creator = creators.get(entry.creator)
        if creator is not None and entry.creator_seq > creator.seq:
            lender.advance(creator, entry.creator_seq)
        replaced = lender.names.get(entry.name) if entry.state == LIVE else None
        if replaced is not None:
            retiring[replaced.slot] = replaced
        if creator is not None:
            creator.last_put = entry
        if entry.ephemeral:
            entry.owner = creator
        orphaned = entry.ephemeral and creator is None
        if entry.state == RETIRING or entry.close_waiters or orphaned:
            retiring[entry.slot] = entry
        lender.state.add_entry(entry)
    return retiring
