"""What a session and an entry are before anything has happened, and where one gets them."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fdbroker.lender
from fdbroker.lender import ledger, lender, model
from fdbroker.lender.accounting import Account

from .kit import CountingFD


def is_at_first(one, **expected: object) -> None:
    """All of its attributes are set, and these are so."""
    seen = {name: getattr(one, name) for name in type(one).__slots__}
    assert {name: seen[name] for name in expected} == expected


def test_a_new_session_does_nothing_and_has_nothing() -> None:
    peer, record = model.Peer(1000, 100, 12), memoryview(bytearray(8))
    account = Account(1000)
    session = model.Session(3, 7, peer, record, account)
    is_at_first(
        session,
        slot=3,
        id=7,
        peer=peer,
        record=record,
        account=account,
        charge=None,
        seq=0,
        state=model.IDLE,
        request=model.NO_REQUEST,
        entries=(),
        cells=(),
        borrow_seq=0,
        since=0,
        arrival=0,
        awaited=None,
        asked=0,
        asked_seq=0,
        deadline=model.FOREVER,
        wait_charges=(),
        last_put=None,
        owned={},
    )
    assert repr(session) == "<Session 7 of Peer(uid=1000, gid=100, pid=12)>"


def test_a_new_entry_lives_and_nobody_has_it() -> None:
    fd = CountingFD()
    entry = model.Entry(2, "web", b"", 5, fd)  # type: ignore[arg-type]
    is_at_first(
        entry,
        slot=2,
        name="web",
        ticket=b"",
        generation=5,
        fd=fd,
        sysfd=0,
        parcel=None,
        target="",
        state=model.LIVE,
        kind=0,
        creator=0,
        creator_seq=0,
        ephemeral=False,
        owner=None,
        since=0,
        uid=0,
        account=None,
        charge=None,
        holders={},
        held_exclusively=False,
        pins=0,
        waiters={},
        exclusive_waiters={},
        close_waiters={},
    )
    assert fd.refs == 1  # the closer's
    assert repr(entry) == "<Entry 'web' generation 5>"
    nameless = model.Entry(2, "", b"\1\2", 5, fd)  # type: ignore[arg-type]
    assert repr(nameless) == "<Entry '0102' generation 5>"


def test_the_package_has_what_its_modules_have() -> None:
    assert fdbroker.lender.Lender is lender.Lender
    assert fdbroker.lender.Ledger is ledger.Ledger
    for name in ("Entry", "Peer", "Session", "LoanRequest"):
        assert getattr(fdbroker.lender, name) is getattr(model, name)
    for name in fdbroker.lender.__all__:
        assert getattr(fdbroker.lender, name).__name__ == name
    with pytest.raises(AttributeError, match=r"module 'fdbroker.lender' has no attribute 'Loan'$"):
        fdbroker.lender.Loan  # noqa: B018


def test_who_wants_a_name_checked_loads_no_lender() -> None:
    code = "import sys, fdbroker.lender.names; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "fdbroker.lender.names" in loaded
    assert not loaded & {"fdbroker.lender.lender", "fdbroker.lender.ledger", "fdbroker.rc"}


def test_a_single_request_takes_one_message_and_what_is_there() -> None:
    assert model.LoanRequest(("web",)).single
    assert model.LoanRequest(("web",), exclusive=True, timeout=5, purpose="for a test").single
    assert not model.LoanRequest(("web",), readonly=True).single
    assert not model.LoanRequest(("web", "db")).single
    assert not model.LoanRequest(("web", "db"), readonly=True).single
    assert not model.NO_REQUEST.single
