"""Where the broker's socket is when nobody says so."""

from __future__ import annotations

import os


def default_address() -> str:
    """The path of the socket: the first that applies of

    ``$FDBROKER_SOCKET``; ``$RUNTIME_DIRECTORY/broker.sock`` (a systemd service's own folder);
    ``$XDG_RUNTIME_DIR/fdbroker/broker.sock``; ``/run/fdbroker/broker.sock`` for root; a folder per
    uid below the folder for temporary files.
    """
    env = os.environ
    if env.get("FDBROKER_SOCKET"):
        return env["FDBROKER_SOCKET"]
    if env.get("RUNTIME_DIRECTORY"):  # a colon-separated list (systemd.exec(5))
        return os.path.join(env["RUNTIME_DIRECTORY"].split(":")[0], "broker.sock")
    if env.get("XDG_RUNTIME_DIR"):
        return os.path.join(env["XDG_RUNTIME_DIR"], "fdbroker", "broker.sock")
    if os.geteuid() == 0:
        return "/run/fdbroker/broker.sock"
    return os.path.join(env.get("TMPDIR") or "/tmp", f"fdbroker-{os.geteuid()}", "broker.sock")
