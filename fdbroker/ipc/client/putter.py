"""A session that puts: it sends descriptors, and owns the ephemeral entries that it made.

They retire when it ends, so as long as it owns any it is never ended by what goes wrong in one
more put.  Then the put is undone, if it is a new entry that nobody knows yet: CANCEL, right
after a PUT, retires what that made.  The session itself is spoilt, since an answer is still to
come on it: it lives on for the sake of its entries, and the next put takes another.
"""

from __future__ import annotations

from fdbroker.ipc.client.connection import Wire, until_exit
from fdbroker.ipc.protocol.messages import EPHEMERAL, PUT, REPLACE, check_reply, template
from fdbroker.ipc.transport import received as owned
from fdbroker.ipc.transport import unix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Putter(Wire):
    """One connection that sends descriptors and never receives any."""

    __slots__ = ("owns", "spoilt")
    puts = True

    def __init__(self, address: str) -> None:
        self.owns = False  # whether an ephemeral entry is or may be its own
        self.spoilt = False  # not to be used again
        super().__init__(address)

    def put(self, name: str, flags: int, fd: int) -> list[Any]:
        """Have the broker keep a dup of `fd`: generation and ticket."""
        seq, owned_before = self.seq, self.owns
        sent: list[int] = []
        try:
            message = (self.next(template(PUT, name, flags)),)
            self.owns = owned_before or flags & EPHEMERAL != 0
            if self.owns:
                until_exit.add(self)  # whatever becomes of its client
            # in one call into C: whoever interrupts finds it sent and noted, or not sent
            sent.extend(map(self.sock.sendmsg, (message,), (unix.rights((fd,)),), (unix.SEND,)))
            code, reply, _, _ = self.reply(self.seq)
            owned.close(self.owned)
            if not code:
                check_reply(PUT, code, reply)
        except BaseException as error:
            if not sent and isinstance(error, ConnectionResetError):
                error = BrokenPipeError()  # it died with something unread
            broken = self.is_stale(error) or isinstance(error, ConnectionResetError)
            if not sent and not broken:
                self.seq, self.owns = seq, owned_before
                if not owned_before:
                    until_exit.discard(self)
            elif owned_before and not broken:
                self.spoilt = True
                if not flags & REPLACE:  # that cannot be undone, the old entry has retired
                    self.cancel()
            else:
                until_exit.discard(self)
                self.give_up_after(error)
            raise
        if code:
            self.owns = owned_before
            if not owned_before:
                until_exit.discard(self)
            check_reply(PUT, code, reply)
        return reply
