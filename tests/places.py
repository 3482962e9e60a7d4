"""KeyboardInterrupt at each place where CPython lets it come up in some code, one after the other.

Deterministic: a tracer raises it where the interpreter looks for signals (after RESUME, a call
into C, a jump backwards; ceval.c, CHECK_EVAL_BREAKER), at the first such place, then at the
second, until the operation comes through.
"""

from __future__ import annotations

import dis
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import opcodes

LOOKS = ("RESUME", "CALL", "CALL_FUNCTION_EX", "CALL_KW", "JUMP_BACKWARD")


class Tracer:
    """Raises KeyboardInterrupt at the `at`-th place, and calls `meanwhile` at opcode `when`.

    Places and opcodes are those of the code below the path `source`, a file or a folder.
    """

    def __init__(
        self,
        source: str,
        at: int,
        when: int = -1,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        self.source = source
        self.places, self.at = 0, at
        self.opcodes, self.when, self.meanwhile = 0, when, meanwhile
        self.raised = self.acted = False
        self._last: dict[FrameType, str] = {}

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(self.source):
            return None
        caller = frame.f_back
        if caller in self._last:  # a call of Python code: nothing is looked for as it returns
            self._last[caller] = ""
        self._last[frame] = "RESUME"
        return opcodes.watch(frame, self._local)

    def _local(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "exception":  # a call that raises goes to its handler at once
            self._last[frame] = ""
        if event != "opcode":
            return self._local
        name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        last, self._last[frame] = self._last[frame], name
        if name == "RESUME":
            return self._local
        self.opcodes += 1
        if self.opcodes == self.when:
            sys.settrace(None)
            self.acted = True
            self.meanwhile()
            sys.settrace(self.trace)
        if last in LOOKS:
            self.places += 1
            if self.places == self.at:
                self.raised = True
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._local

    @contextmanager
    def running(self) -> Iterator[None]:
        gc.disable()  # or the finalizer of an earlier case is interrupted instead
        sys.settrace(self.trace)
        try:
            yield
        except KeyboardInterrupt:
            assert self.raised
        finally:
            sys.settrace(None)
            gc.enable()
            self._last.clear()


def every_place(source: str, act: Callable[[Tracer], object]) -> int:
    """Run `act` with an interrupt at its first place, its second, ...; how many there were."""
    for at in range(1, 1000):
        tracer = Tracer(source, at)
        act(tracer)
        if not tracer.raised:
            return at - 1
    raise AssertionError("no end")
