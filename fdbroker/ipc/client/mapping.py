"""A mapping of what was lent, which holds its loan until it is unmapped."""

from __future__ import annotations

import contextlib
import mmap

from fdbroker.ipc.client.fork import GATE, catching_up, in_finalizer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fdbroker.ipc.client.holding import Lifeline
    from fdbroker.ipc.client.session import Session


class Mapping(mmap.mmap):
    """The loan ends when it is closed, and this is too, or was garbage-collected."""

    of: tuple[Session, Lifeline] | None = None

    def close(self) -> None:
        """Unmap; BufferError while an array or a memoryview still looks at it."""
        with catching_up, GATE:  # a mapping has a descriptor of its own, which ends here
            super().close()
            self.of = None

    def _end(self) -> None:
        with contextlib.suppress(BufferError):  # what looks at it ends with it: they are a cycle
            self.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        in_finalizer(self._end)
