"""KeyboardInterrupt at each place where CPython lets it come up, in each operation of an FD.

Deterministic: a tracer raises it where the interpreter looks for signals (after RESUME, a call
into C, a jump backwards; ceval.c, CHECK_EVAL_BREAKER), at the first such place, then at the
second, until the operation comes through.  And by real signals, wherever they hit.
"""

from __future__ import annotations

import signal
from contextlib import suppress

import pytest
from places import Tracer, every_place

import fdbroker.rc as rc
from fdbroker.errors import ClosedFDError, CloseTimeout

from . import kit


class Case:
    """An FD over a pipe; whether what came of it can be."""

    def __init__(self) -> None:
        self.pipe = kit.Pipe()
        self.fd = rc.FD()
        self.told: list[OSError | None] = []

    def is_whole(self) -> None:
        """Live with no reference, or closed once, and the kernel agrees."""
        assert self.fd.refs == 0
        assert self.pipe.ended() == self.fd.closed
        assert self.told in ([], [None])

    def end(self) -> None:
        if not self.fd.closed:
            self.fd.close(0)
        assert self.pipe.ended()
        assert not kit.is_open(self.pipe.write)
        self.pipe.__exit__()


def test_init_adopts_or_does_not() -> None:
    def act(tracer: Tracer) -> None:
        case = Case()
        with tracer.running():
            case.fd.init(case.pipe.write)
        if tracer.raised:
            assert "uninitialized" in repr(case.fd)
            case.fd.init(case.pipe.write)
        case.end()

    assert every_place(rc.__file__, act) >= 3


def test_an_interrupted_constructor_has_closed_or_has_not_begun() -> None:
    def act(tracer: Tracer) -> None:
        with kit.Pipe() as pipe:
            fd = None
            with tracer.running():
                fd = rc.FD(pipe.write)
            if fd is None:
                assert not pipe.ended()
                fd = rc.FD(pipe.write)
            fd.close()
            assert pipe.ended()

    assert every_place(rc.__file__, act) >= 3


def test_incref_leaves_no_token() -> None:
    def act(tracer: Tracer) -> None:
        case = Case()
        case.fd.init(case.pipe.write)
        sysfd = None
        with tracer.running():
            sysfd = case.fd.incref()
        if sysfd is not None:
            case.fd.decref()
        case.is_whole()
        case.end()

    assert every_place(rc.__file__, act) >= 2


def test_incref_while_it_is_retired() -> None:
    """At each opcode another thread retires it, and then the interrupt comes."""

    def act(tracer: Tracer) -> None:
        case = Case()
        case.fd.init(case.pipe.write)
        tracer.meanwhile = lambda: case.fd.retire(case.told.append)
        with tracer.running():
            try:
                case.fd.incref()
            except ClosedFDError:
                pass
            else:
                case.fd.decref()
        if tracer.acted:
            assert case.fd.closed or not tracer.raised or case.fd.refs
        if case.fd.refs:  # interrupted in the decref here, before its first instruction
            case.fd.decref()
        assert case.fd.closed == tracer.acted
        assert case.told == [None] * tracer.acted
        case.is_whole()
        case.end()

    for when in range(1, 1000):
        acted = False

        def at_opcode(tracer: Tracer, when: int = when) -> None:
            nonlocal acted
            tracer.when = when
            act(tracer)
            acted |= tracer.acted

        every_place(rc.__file__, at_opcode)
        if not acted:
            assert when > 10
            return


@pytest.mark.parametrize("users", [1, 2])
def test_the_last_decref_closes(users: int) -> None:
    def act(tracer: Tracer) -> None:
        case = Case()
        case.fd.init(case.pipe.write)
        for _ in range(users):
            case.fd.incref()
        case.fd.retire(case.told.append)
        for _ in range(users - 1):
            case.fd.decref()
        with tracer.running():
            case.fd.decref()
        if tracer.raised and tracer.at == 1:
            assert case.fd.refs == 1  # the call had not begun
            case.fd.decref()
        assert case.fd.closed
        assert case.told == [None]
        case.is_whole()
        case.end()

    assert every_place(rc.__file__, act) >= 8


@pytest.mark.parametrize("way", ["retire", "close"])
def test_retire_and_close_do_all_or_nothing(way: str) -> None:
    def act(tracer: Tracer) -> None:
        case = Case()
        case.fd.init(case.pipe.write)
        with tracer.running():
            if way == "retire":
                case.fd.retire(case.told.append)
            else:
                case.fd.close()
        case.is_whole()
        assert case.told == [None] * (case.fd.closed and way == "retire")
        case.end()

    assert every_place(rc.__file__, act) >= 8


def test_retire_with_a_reference_out() -> None:
    def act(tracer: Tracer) -> None:
        case = Case()
        case.fd.init(case.pipe.write)
        case.fd.incref()
        with tracer.running():
            case.fd.retire(case.told.append)
        retired = "retired" in repr(case.fd)
        assert case.fd.refs == 1
        assert not case.pipe.ended()
        case.fd.decref()
        assert case.fd.closed == retired
        assert case.told == [None] * retired
        case.end()

    assert every_place(rc.__file__, act) >= 4


def test_a_close_that_waits() -> None:
    def act(tracer: Tracer) -> None:
        case = Case()
        case.fd.init(case.pipe.write)
        case.fd.incref()
        with tracer.running(), suppress(CloseTimeout):
            case.fd.close(0)
        case.fd.decref()
        case.is_whole()
        case.end()
        assert not case.fd._waiters

    assert every_place(rc.__file__, act) >= 8


def test_detach_gives_it_away_or_keeps_it() -> None:
    def act(tracer: Tracer) -> None:
        case = Case()
        case.fd.init(case.pipe.write)
        given = None
        with tracer.running():
            given = case.fd.detach()
        if given is None:
            assert not case.fd.closed
            case.is_whole()
            given = case.fd.detach()
        rc.FD(given).close()
        assert case.pipe.ended()
        case.pipe.__exit__()

    assert every_place(rc.__file__, act) >= 3


def test_the_finalizer() -> None:
    """What comes up in a finalizer is reported, not raised; it closes all the same."""

    def act(tracer: Tracer) -> None:
        case = Case()
        case.fd.init(case.pipe.write)
        with tracer.running(), suppress(ResourceWarning):
            case.fd.__del__()
        if tracer.at > 1:  # at the first place it had not begun
            assert case.pipe.ended()
        case.end()

    assert every_place(rc.__file__, act) >= 4


def interrupted(rounds: int) -> int:
    """Real signals, at any time: whatever they hit, the descriptor is closed, and only once."""
    armed: list[bool] = []
    hits = 0

    def interrupt(*_: object) -> None:
        if armed:
            armed.clear()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    for number in range(rounds):
        case = Case()
        case.fd.init(case.pipe.write)
        try:
            try:
                armed.append(True)
                signal.setitimer(signal.ITIMER_REAL, (number % 199 + 1) * 0.2e-6)
                for _ in range(3):
                    case.fd.incref()
                    case.fd.decref()
                case.fd.retire(case.told.append)
            finally:
                armed.clear()
        except KeyboardInterrupt:
            hits += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        while case.fd.refs:  # that of a decref which had not begun
            case.fd.decref()
        case.is_whole()
        case.end()
    signal.signal(signal.SIGALRM, before)
    return hits


@pytest.mark.timeout(0)  # it uses the same signal
def test_real_signals() -> None:
    assert interrupted(3_000) > 100


@pytest.mark.long
@pytest.mark.timeout(0)
def test_many_real_signals() -> None:
    assert interrupted(200_000) > 10_000
