"""The chaos run: it finds nothing wrong, it finds what is planted, and the replay is exact."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import children, in_fork, wait_until

from fdbroker.lender import Ledger, Lender, LoanRequest, Peer
from fdbroker.lender.accounting import Account, Accounting
from fdbroker.rc import FD

from . import planted, record
from .board import Board, WrongAnswer
from .plan import KINDS, TURNS, plan, text
from .record import CHARGES, EVENTS, LOOKS, Recorder, recording
from .replay import Different, replay

ROOT = Path(__file__).parents[2]


def chaos(*arguments: object, timeout: float = 100.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "tests.chaos", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def test_a_short_run_finds_nothing_wrong_and_replays(tmp_path: Path) -> None:
    kept = tmp_path / "recording"
    run(2, 1, "--record", kept)
    again = chaos("--replay", kept)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "the same; " in again.stdout


@pytest.mark.long
def test_a_longer_run_finds_nothing_wrong() -> None:
    said = run(8, 3)
    for role in ("good", "dying", "hostile"):
        done = re.search(rf"^{role}: ([\d,]+) steps: (.*)", said, re.M)
        assert done is not None
        assert int(done[1].replace(",", "")) > 20


def run(seconds: float, seed: int, *options: object) -> str:
    done = chaos("--seconds", seconds, "--seed", seed, *options)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "nothing was wrong" in done.stdout
    events = re.search(r"replay: ([\d,]+) events", done.stdout)
    assert events is not None
    assert int(events[1].replace(",", "")) > 100
    return done.stdout


FOUND = {  # what is said of each, so that none is found by something else that it breaks
    "everybody-at-once": "was lent to two who exclude each other|granted, instead of WouldDeadlock",
    "another-one": "asked for .* and got|\\) was lent|has other contents",
    "still-there": "granted, instead of UnknownEntry",
    "never-closed": "it was said to be closed, and was open|everyone is gone, and the broker has",
    "no-return-at-death": "everyone is gone, and the broker has|is busy after",
    "cut-short": "asked for .* and got",
}


@pytest.mark.long
@pytest.mark.parametrize("mistake", planted.PLANTED)
def test_a_planted_mistake_is_found(mistake: str, tmp_path: Path) -> None:
    kept = tmp_path / "recording"
    what = ["--planted", mistake, "--patience", 3, "--record", kept]
    done = chaos("--seconds", 4, "--seed", 2, *what)
    assert done.returncode == 1, done.stdout + done.stderr
    wrong = [line for line in done.stdout.splitlines() if line.startswith("WRONG: ")]
    assert any(re.search(FOUND[mistake], line) for line in wrong), done.stdout
    assert "again: python -m tests.chaos --seconds 4 --seed 2" in done.stdout
    assert kept.exists()


def test_an_interrupted_run_leaves_nothing(open_folder: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos", "--seconds", "100"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(open_folder)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(
            lambda: process.poll() is not None or len(descendants(process.pid)) > 20
        )  # lives have begun
        started = descendants(process.pid)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert [pid for pid in started if session_of(pid) == process.pid] == []
    assert list(open_folder.iterdir()) == []


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other uids can look through, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o711)
        yield Path(path)


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                for child in map(int, file.read().split()):
                    found |= {child} | descendants(child)
    return found


def session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


# --- the plan ---


def test_the_seed_fixes_the_plan() -> None:
    assert text(5) == text(5)
    assert text(5) != text(6)
    done = {step[0] for actor in plan(5) for step in actor.steps}
    assert done == set(KINDS)


# --- the recorder and the replay ---


def test_every_event_is_recorded() -> None:
    """A method that is new is an event, or it is not: somebody must say so."""
    public = {name for name in dir(Lender) if not name.startswith("_")}
    assert public == {*EVENTS, *LOOKS}
    looks = {"limit", "check", "check_members", "charge_receive", "free_descriptors"}
    within = {"add_members", "charge"}  # of the lender's events, or a charge that is added
    public = {name for name in dir(Accounting) if not name.startswith("_")}
    assert public <= {*CHARGES, *looks, *within}
    changes = {name for name in vars(Account) if callable(getattr(Account, name))}
    assert {name for name in changes if not name.startswith("_")} <= {*CHARGES}


def recorded(path: Path) -> None:
    """A small recording, of two who want the same."""
    recorder = Recorder(str(path))
    room = 8, 8, 8
    ledger = Ledger(bytearray(Ledger.size(*room)), *room)
    lender = recording(recorder)(ledger)
    lender.accounting.descriptors = 100
    entry = lender.put(None, 0, "one", b"", FD(10**9, close=lambda number: None), 1, 5)
    one, other = (lender.open(Peer(1000, 1000, pid)) for pid in (7, 8))
    charge = lender.accounting.charge(one.account, "sessions", 2)
    request = LoanRequest(("one",), exclusive=True, timeout=100)
    assert lender.borrow(one, 1, request, 10)
    assert not lender.borrow(other, 1, request, 11)
    lender.return_loan(one, 2, 12)
    assert lender.notifications.popleft()[0] is other
    lender.retire("one", 13)
    lender.clear(other, 14)
    lender.free(other)
    assert lender.pending_closes.popleft() is entry
    entry.fd.decref()
    lender.closed(entry, None)
    charge.release()
    recorder.close()


def test_a_recording_is_replayed(tmp_path: Path) -> None:
    recorded(tmp_path / "recording")
    same = replay(str(tmp_path / "recording"))
    assert (same.events, same.whole) == (13, True)


def test_another_lender_does_not_do_the_same(tmp_path: Path) -> None:
    class Slower(Lender):
        def borrow(self, session, seq, request, now):
            return super().borrow(session, seq, request, now + 1)

    recorded(tmp_path / "recording")
    with pytest.raises(Different, match="the ledger has other bytes"):
        replay(str(tmp_path / "recording"), Slower)


def test_another_decision_is_found_at_once(tmp_path: Path) -> None:
    class Forgetful(Lender):
        def __init__(self, ledger):
            super().__init__(ledger)
            self.state.wake_waiters_of = lambda entry, now, refused: None

    recorded(tmp_path / "recording")
    with pytest.raises(Different, match=r"event \d+, return_loan.*session 2 in slot 1"):
        replay(str(tmp_path / "recording"), Forgetful)


def test_a_recording_may_be_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    recorded(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert not replay(str(path)).whole


def test_what_the_recorder_does_not_know_is_an_error() -> None:
    with pytest.raises(TypeError, match="does not know"):
        record.pack([object()])


# --- the witness ---


def test_the_witness_sees_two_at_a_time() -> None:
    before = children()
    board = Board(plan(1), TURNS)

    def take(exclusive: bool) -> str:
        try:
            with board.witness([TURNS[1]], exclusive=exclusive):
                return "taken"
        except WrongAnswer:
            return "wrong"

    try:
        with board.witness(TURNS[:2], exclusive=True):
            assert in_fork(lambda: [take(True), take(False)]) == ["wrong", "wrong"]
        with board.witness(TURNS[:2], exclusive=False):
            assert in_fork(lambda: [take(True), take(False)]) == ["wrong", "taken"]
        assert in_fork(lambda: take(True)) == "taken"
    finally:
        board.close()
    assert children() == before
