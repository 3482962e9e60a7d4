"""The acceptor: takes connections from the listener while there are descriptors for them.

It pauses where it cannot accept.  EMFILE, ENFILE, ENOBUFS and ENOMEM leave the connection queued
(accept(2)), and a level-triggered port would report it for ever.  So the listener is not watched
until fewer descriptors are in use; after an error also after a while, since the shortage may be
another process's, and end unseen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdbroker.ipc.server.event_loop import EventLoop, Timer
    from fdbroker.ipc.server.tuning import Tuning
    from fdbroker.ipc.transport import Channel, Listener
    from fdbroker.lender.accounting import Accounting

log = logging.getLogger("fdbroker")


class Acceptor:
    """Accepts at `listener`, and gives each channel to `on_connect`, which owns it then.

    `on_connect` raises OSError if it cannot watch the channel, which it has closed.  `schedule` is
    called when a connection can be accepted, and has `accept` called in its turn.
    """

    def __init__(
        self,
        loop: EventLoop,
        listener: Listener,
        accounting: Accounting,
        tuning: Tuning,
        *,
        on_connect: Callable[[Channel], None],
        schedule: Callable[[Callable[[], None]], None],
    ) -> None:
        self.listener = listener
        self._loop = loop
        self._accounting = accounting
        self._tuning = tuning
        self._on_connect = on_connect
        self._schedule = schedule
        self._watching = False
        self._stopped = False
        # Whether the log has it that nothing can be accepted, and nothing was accepted since.
        self._told = False
        self._retry: Timer | None = None
        self._used_at_pause = 0
        self._watch()

    def _watch(self) -> None:
        try:
            self._loop.watch(self.listener, self._on_event)
            self._watching = True
        except OSError as error:
            self._pause(error.strerror, retry=True)

    def _on_event(self, subject: None, events: int) -> None:
        self._schedule(self.accept)

    def accept(self) -> None:
        """Accept one connection, if one is still there."""
        if not self._watching:
            return
        if self._accounting.free_descriptors <= 0:
            self._pause("every descriptor is in use")
            return
        try:
            channel = self.listener.accept()
            if channel is None:
                return
            self._on_connect(channel)
        except OSError as error:
            self._pause(error.strerror, retry=True)
        else:
            self._told = False

    def _pause(self, reason: str | None, *, retry: bool = False) -> None:
        """Accept nothing until fewer descriptors are in use, or, with `retry`, after a while."""
        if not self._told:
            log.warning("event=accept-paused error=%r", reason)
        self._told = True
        self._unwatch()
        self._used_at_pause = self._accounting.total.descriptors
        self._accounting.on_release = self._resume_if_room
        if retry:
            self._retry = self._loop.call_at(
                self._loop.now + self._tuning.accept_retry, self._resume
            )

    def _unwatch(self) -> None:
        if self._watching:
            self._loop.unwatch(self.listener)
            self._watching = False
        self._accounting.on_release = None
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _resume_if_room(self) -> None:
        """Something was released: accept again if fewer descriptors are in use than before."""
        if self._accounting.total.descriptors < self._used_at_pause:
            self._resume()

    def _resume(self) -> None:
        if not self._stopped and not self._watching:
            self._unwatch()
            self._watch()

    def stop(self) -> None:
        """Accept nothing any more.  A connection then waits in the listener's queue, for the next
        broker if the listener lasts."""
        self._stopped = True
        self._unwatch()
