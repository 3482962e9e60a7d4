"""Where the broker's socket is when nobody says so, and what can be the path of one."""

from __future__ import annotations

import os

from fdbroker.errors import BadAddress

PATH_BYTES = 107  # sun_path, less its final NUL


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


def check_path(address: str) -> None:
    """`BadAddress` for what the kernel would not take as the path of a socket."""
    if not address or "\0" in address:
        raise BadAddress(address, "it must be a path")
    if len(os.fsencode(address)) > PATH_BYTES:
        raise BadAddress(address, f"a socket's path has at most {PATH_BYTES} bytes (unix(7))")
