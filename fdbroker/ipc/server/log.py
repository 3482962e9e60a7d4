"""What the server says of refusals in the log: one line for each."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fdbroker.errors import FDBrokerError, NotPermitted

if TYPE_CHECKING:
    from fdbroker.ipc.server.connection import ServerConnection

log = logging.getLogger("fdbroker")


def log_refusal(connection: ServerConnection, error: FDBrokerError) -> None:
    """Log which peer was refused what."""
    # The name in a NotPermitted was checked, so it can be shown as it is.
    if isinstance(error, NotPermitted):
        log.warning("event=refused %s verb=%s name=%s", connection, error.verb, error.name)
    else:
        log.warning('event=refused %s reason="%s"', connection, error)
