"""The slow things that workers do for the broker: receive and inspect, open anew, close.

A job holds what it needs and what came of it, and no part of the server.  The part that submits a
job says what follows when it is back.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable, Sequence
from time import sleep, thread_time
from typing import TYPE_CHECKING

from fdbroker import descriptors
from fdbroker.errors import FDBrokerError, UnsupportedKind
from fdbroker.ipc.protocol.messages import MESSAGE_BYTES
from fdbroker.ipc.server.worker_pool import CLOSE, Job
from fdbroker.ipc.transport import parcel
from fdbroker.ipc.transport.received import ReceivedFDs, closer
from fdbroker.ipc.transport.rlimit import too_many_files
from fdbroker.lender.accounting import GRACE
from fdbroker.rc import FD

if TYPE_CHECKING:
    from fdbroker.ipc.transport import Channel
    from fdbroker.lender.accounting import Charge
    from fdbroker.lender.model import Entry


class Receive(Job):
    """Receive a message of a session that may put, and inspect the descriptor it brought.

    At most `most` descriptors are installed: one, as a put needs, or none while the broker has no
    room.  The kernel closes all others meanwhile.  The one is in `fd` if it can be kept, else in
    `received`, and `refusal` says why.
    """

    # A broker that drains refuses every put, and an inspection can hang for as long as it likes.
    drain_waits = False

    def __init__(self, channel: Channel, user: Hashable, most: int) -> None:
        self.user = user
        self.data = b""
        self.received: ReceivedFDs | None = None
        # How many descriptors came and have a number, and whether others came.
        self.count = 0
        self.truncated = False
        self.fd: FD | None = None
        self.kind = descriptors.Kind.OTHER
        self.target = ""
        self.parcel: object = None
        # Whether the thread may be receiving from the channel still.
        self.uses_channel = True
        # What the user is charged for the descriptor, until that is an entry.
        self.charge: Charge | None = None
        # What receiving raised, and what is wrong with the descriptor.
        self.error: OSError | None = None
        self.refusal: FDBrokerError | None = None
        self._channel = channel
        self._most = most

    def run(self) -> None:
        try:
            self.data, self.received = self._channel.receive_with_descriptors(
                MESSAGE_BYTES + 1, self._most
            )
        except OSError as error:
            self.error = error.with_traceback(None)
        finally:
            self.uses_channel = False
        if self.received is not None:
            self.count, self.truncated = len(self.received.fds), self.received.truncated
            if self.count == 1:
                self._inspect(self.received)

    def _inspect(self, received: ReceivedFDs) -> None:
        (sysfd,) = received.fds
        try:
            self.kind, self.target = descriptors.inspect(sysfd)
        except FDBrokerError as error:
            self.refusal = error
        except OSError as error:
            reason = f"it cannot be looked at ({error.strerror})"
            self.refusal = UnsupportedKind("unknown", reason)
        else:
            self.fd = FD(sysfd)
            self.parcel = parcel(sysfd)
            received.detach()

    def detach_fds(self) -> list[int]:
        """The descriptors that came and that nobody took; they are the caller's from now on."""
        sysfds = [] if self.received is None else list(self.received.detach())
        if self.fd is not None:
            sysfds.append(self.fd.detach())
            self.fd = None
        return sysfds


class Reopen(Job):
    """Open the files of a read-only loan anew, for one message of it.

    The loan may end meanwhile, with its client, so the submitter pins the entries.
    """

    def __init__(self, sysfds: Sequence[int], user: Hashable) -> None:
        self.user = user
        self.fresh: list[int] = []
        self.error: FDBrokerError | None = None
        # The seq of a CANCEL that came meanwhile.
        self.cancelled = 0
        self._sysfds = sysfds

    def run(self) -> None:
        try:
            for sysfd in self._sysfds:
                self.fresh.append(descriptors.reopen_read_only(sysfd))
        except FDBrokerError as error:
            self.error = error
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.error = too_many_files("broker")
            else:
                reason = f"it cannot be opened anew for reading ({error.strerror})"
                self.error = UnsupportedKind("file", reason)

    def detach_fds(self) -> list[int]:
        """What was opened; the descriptors are the caller's from now on."""
        fresh, self.fresh = self.fresh, []
        return fresh


class Discard(Job):
    """Close descriptors that nobody keeps."""

    queue = CLOSE
    drain_waits = False

    def __init__(self, fds: Sequence[int], user: Hashable) -> None:
        self.user = user
        self._fds = fds

    def run(self) -> None:
        close_each(self._fds)


class DrainChannel(Job):
    """Take out of a shut channel what was never received, and close it.

    A close of the socket would do the same on the loop, and might block.  Of each message `most`
    descriptors are kept from lingering.
    """

    queue = CLOSE
    drain_waits = False

    def __init__(self, channel: Channel, user: Hashable, most: int, rest: int) -> None:
        self.user = user
        self._channel = channel
        self._most = most
        self._rest = rest

    def run(self) -> None:
        begun = thread_time()
        for fds in self._channel.drain_descriptors(self._most):
            close_each(fds)
            sleep(self._rest * (thread_time() - begun))
            begun = thread_time()


def close_each(fds: Sequence[int]) -> None:
    """Close all of these, which nobody wants: so nobody is told of an error (close(2)).

    They may have come in a mass, so as to take our time: then only the first ones are kept from
    lingering, and numbers that follow each other are closed in one call.
    """
    for fd in fds[:GRACE]:
        if descriptors.is_socket(fd):
            descriptors.switch_linger_off(fd)
    any(closer(tuple(fds)))


class CloseEntry(Job):
    """Give back an entry's last reference: the final close."""

    queue = CLOSE

    def __init__(self, entry: Entry, user: Hashable) -> None:
        self.user = user
        self.error: OSError | None = None
        self._entry = entry

    def run(self) -> None:
        descriptors.switch_linger_off(self._entry.sysfd)
        self._entry.fd.decref()
        try:
            self._entry.fd.wait_closed()
        except OSError as error:
            self.error = error
