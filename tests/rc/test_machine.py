"""FD against a naive model, over real pipes: any sequence of calls, one thread."""

from __future__ import annotations

import os
import warnings

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fdbroker import rc
from fdbroker.errors import (
    ClosedFDError,
    CloseTimeout,
    FDBrokerError,
    MultipleInitError,
    ReferencedFDError,
    StolenFDError,
    UnbalancedDecrefError,
    UninitializedFDError,
)

from . import kit


class Model:
    """What an FD is, said with an `if` for each case."""

    def __init__(self) -> None:
        self.state = "uninitialized"
        self.refs = 0
        self.tells: list[str] = []  # who is to be told of the close
        self.told: list[str] = []
        self.stolen = False

    def error(self, *allowed: str) -> type[FDBrokerError] | None:
        if self.state in allowed:
            return None
        return UninitializedFDError if self.state == "uninitialized" else ClosedFDError

    def end(self) -> None:
        if self.state == "retired" and not self.refs:
            self.state = "closed"
            self.told += self.tells


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pipe = kit.Pipe()
        self.stranger: kit.Pipe | None = None
        self.registry = rc.LifetimeRegistry()
        self.fd = rc.FD()
        self.fd.track_lifetime(self.registry)
        self.model = Model()
        self.adopted = False
        self.told: list[str] = []
        self.errors: list[OSError | None] = []

    def call(self, error: type[BaseException] | None, method: object, *args: object) -> object:
        """Call, and see that it raises `error` or nothing."""
        result, raised = None, None
        try:
            result = method(*args)  # type: ignore[operator]
        except FDBrokerError as refused:
            raised = refused
        assert type(raised) is (error or type(None))
        return result

    @property
    def close_error(self) -> type[BaseException] | None:
        return StolenFDError if self.model.stolen else None

    @rule()
    def init(self) -> None:
        if self.model.state == "uninitialized":
            self.call(None, self.fd.init, self.pipe.write)
            self.model.state, self.adopted = "live", True
        else:
            live = self.model.state == "live"
            mine = os.dup(self.pipe.read)
            self.call(MultipleInitError if live else ClosedFDError, self.fd.init, mine)
            os.close(mine)

    @rule()
    def incref(self) -> None:
        error = self.model.error("live")
        given = self.call(error, self.fd.incref)
        if error is None:
            assert given == self.pipe.write
            self.model.refs += 1

    @rule()
    def decref(self) -> None:
        if not self.model.refs:
            self.call(UnbalancedDecrefError, self.fd.decref)
            return
        self.call(None, self.fd.decref)
        self.model.refs -= 1
        self.model.end()

    @rule(name=st.none() | st.sampled_from("abc"))
    def retire(self, name: str | None) -> None:
        def on_closed(error: OSError | None) -> None:
            assert name is not None
            self.told.append(name)
            self.errors.append(error)

        error = self.model.error("live")
        self.call(error, self.fd.retire, None if name is None else on_closed)
        if error is None:
            self.model.state = "retired"
            self.model.tells += [] if name is None else [name]
            self.model.end()

    @rule()
    def close(self) -> None:
        error = self.model.error("live")
        if error is not None:
            self.call(error, self.fd.close, 0)
            return
        self.model.state = "retired"
        self.call(CloseTimeout if self.model.refs else self.close_error, self.fd.close, 0)
        self.model.end()

    @rule()
    def wait_closed(self) -> None:
        error: type[BaseException] | None
        if self.model.state == "uninitialized":
            error = UninitializedFDError
        elif self.model.state in ("live", "retired"):
            error = CloseTimeout
        else:
            error = self.close_error if self.model.state == "closed" else None
        self.call(error, self.fd.wait_closed, 0)

    @rule()
    def use(self) -> None:
        def inside() -> None:
            with self.fd.use() as sysfd:
                assert sysfd == self.pipe.write
                assert self.fd.refs == self.model.refs + 1

        self.call(self.model.error("live"), inside)

    @rule()
    def detach(self) -> None:
        error = self.model.error("live")
        if error is None and self.model.refs:
            error = ReferencedFDError
        given = self.call(error, self.fd.detach)
        if error is None:
            assert given == self.pipe.write
            self.model.state = "detached"

    @precondition(lambda self: self.model.state in ("live", "retired") and not self.stranger)
    @rule()
    def steal(self) -> None:
        """Somebody closes the number, and it becomes another pipe."""
        self.stranger = kit.Pipe()
        os.dup2(self.stranger.write, self.pipe.write)
        os.close(self.stranger.write)
        self.model.stolen = True

    @invariant()
    def agrees(self) -> None:
        state = self.model.state
        assert self.fd.refs == self.model.refs
        assert self.fd.closed == (state in ("closed", "detached"))
        assert self.told == self.model.told
        for error in self.errors:
            assert isinstance(error, StolenFDError) == self.model.stolen
        assert (str(self.pipe.write) if state == "live" else state) in repr(self.fd)
        stats = self.registry.stats()
        assert stats.initialized == self.adopted
        ended = state in ("closed", "detached")
        assert stats.closed + stats.close_failed == ended
        assert stats.close_failed == (state == "closed" and self.model.stolen)
        assert bool(stats.report()) == (self.adopted and not ended)

    @invariant()
    def kernel_agrees(self) -> None:
        if self.stranger is not None:
            assert not self.stranger.ended(), "a stranger was closed"
            assert self.pipe.ended()
        else:
            assert self.pipe.ended() == (self.model.state == "closed")

    def teardown(self) -> None:
        adopted_and_open = self.model.state in ("live", "retired")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if adopted_and_open and not self.model.stolen:
                self.fd.__del__()
                assert self.pipe.ended()
                assert self.fd.closed
            elif adopted_and_open:
                while self.model.refs:
                    self.decref()
                if self.model.state == "live":
                    self.fd.retire()
        warned = adopted_and_open and not self.model.stolen
        assert len(caught) == warned
        if self.stranger is not None or self.model.state in ("uninitialized", "detached"):
            os.close(self.pipe.write)
        self.pipe.__exit__()
        if self.stranger is not None:
            assert self.stranger.ended()
            self.stranger.__exit__()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=150,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
