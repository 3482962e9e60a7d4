"""What a borrower made of its loan: wrappers, which end with the loan, and mappings, with which
the loan ends.

Most loans have neither, so a session has a `Holding` only once there is one.
"""

from __future__ import annotations

from socket import socket
from weakref import WeakValueDictionary

from fdbroker.ipc.client import fork, wrappers
from fdbroker.ipc.client.wrappers import Wrapper

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    class Returning(Protocol):
        """What a lifeline ends: a session."""

        @property
        def let_go(self) -> Callable[[], None]: ...

        @property
        def holding(self) -> Holding | None: ...


class Lifeline:
    """Held by a loan and by each of its mappings: the last of them to go returns the loan.

    It counts as Python does, since a mapping ends where its array does, and an interrupt must not
    lose the count.
    """

    __slots__ = ()

    def __init__(self, session: Returning) -> None:
        _sessions_of[id(self)] = session

    def __del__(self) -> None:
        session = _sessions_of.pop(id(self), None)
        if session is not None and session.holding is not None and session.holding.returning:
            fork.in_finalizer(session.let_go)


# not weak references of the lifelines' own: gc clears those before it calls `__del__`
_sessions_of: WeakValueDictionary[int, Returning] = WeakValueDictionary()


class Holding:
    """The wrappers and mappings of one loan, as far as their users still have them."""

    __slots__ = ("_mappings", "_wrappers", "lifeline", "returning")

    def __init__(self) -> None:
        self._wrappers: WeakValueDictionary[int, Wrapper] = WeakValueDictionary()
        self._mappings: WeakValueDictionary[int, Wrapper] = WeakValueDictionary()
        self.lifeline: Lifeline | None = None  # the loan's own, once there is a mapping
        self.returning = False  # the loan is closed, and the last mapping returns it

    @property
    def mapped(self) -> bool:
        """Whether the loan may end later than it is closed."""
        return self.returning or self.lifeline is not None

    def add_wrapper(self, wrapper: Wrapper) -> None:
        """A socket or a file: it ends with the loan."""
        self._wrappers[id(wrapper)] = wrapper

    def add_mapping(self, mapping: Wrapper) -> None:
        """The loan ends with it."""
        self._mappings[id(mapping)] = mapping

    def flush(self) -> OSError | None:
        """Write what the wrappers have buffered, which may take its time; the first error."""
        return wrappers.flush(list(self._wrappers.values()))

    def close_wrappers(self, lent: Sequence[int]) -> OSError | None:
        """Close them, which were made of the descriptors `lent`; the first error."""
        error = wrappers.close(list(self._wrappers.values()), lent)
        self._wrappers.clear()
        return error

    def close_sockets_in_child(self, lent: Sequence[int]) -> None:
        """What can be closed while no number is free."""
        made = self._wrappers.values()
        wrappers.close([one for one in made if isinstance(one, socket)], lent)

    def drop_in_child(self) -> bool:
        """Let go of the files and mappings that stay with the parent; whether one is in use."""
        made = self._wrappers.values()
        wrappers.drop_in_child([one for one in made if not isinstance(one, socket)])
        self._wrappers.clear()
        mapped = False
        for mapping in list(self._mappings.values()):
            try:
                mapping.close()
            except BufferError:
                mapped = True  # somebody still looks at it: this copy goes with the mapping
        self.returning = mapped
        self.lifeline = None
        return mapped
