"""Tracing by opcode, in the order of steps that each CPython from 3.11 to 3.13 wants."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

Trace = Callable[[FrameType, str, Any], Any]

# 3.12 reports opcodes only if any frame has wanted them before `sys.settrace`.
sys._getframe().f_trace_opcodes = True


def watch(frame: FrameType, local: Trace) -> Trace:
    """What a trace function returns for a frame whose opcodes `local` is to see.

    3.13 takes notice of f_trace_opcodes only in a frame that has its f_trace.
    """
    frame.f_trace = local
    frame.f_trace_lines = False
    frame.f_trace_opcodes = True
    return local
