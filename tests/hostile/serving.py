"""A broker, started as a test wants it: ``python serving.py '{"uid": ..., "limit": ...}' ARG...``

It is what ``fdbroker ARG...`` starts, as another uid, with fewer descriptors, in a PID namespace of
its own, or with something planted in it.
"""

from __future__ import annotations

import argparse  # noqa: F401 - these another uid may not read
import encodings.idna  # noqa: F401
import grp  # noqa: F401
import json
import os
import resource
import sys
import tomllib  # noqa: F401
from typing import Any

from fdbroker import cli
from fdbroker.cli import options, serve  # noqa: F401
from fdbroker.daemon import log  # noqa: F401
from fdbroker.daemon.serve import serve as daemon_serve
from fdbroker.ipc.server.event_loop import SECOND
from fdbroker.ipc.server.tuning import Tuning
from fdbroker.ipc.transport import unix_channel

from .target import become, unshare

CLONE_NEWPID = 0x20000000  # linux/sched.h


def main(how: dict[str, Any], arguments: list[str]) -> int:
    """What the command returns."""
    if how["passes_rights"]:  # a kernel before 6.16
        unix_channel.refuse_descriptors = lambda sock: False
    if how["patience"]:
        tuning = Tuning(handshake=int(how["patience"] * SECOND))
        assert daemon_serve.__kwdefaults__ is not None
        daemon_serve.__kwdefaults__["tuning"] = tuning
    if how["pid_namespace"]:
        unshare(CLONE_NEWPID)
        if pid := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if how["limit"]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (how["limit"], how["limit"]))
    if how["uid"]:
        become(how["uid"])
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), sys.argv[2:]))
