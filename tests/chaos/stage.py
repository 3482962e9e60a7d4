"""The stage: what the broker keeps, who may do what there, and what each entry must look like.

A run as root has every role under a uid of its own, and rules for each.  Else all are the broker's
own uid, which may do all; then nothing is asked that only a rule refuses.
"""

from __future__ import annotations

import os
import socket
import stat
from typing import NamedTuple

import fdbroker
from fdbroker.lender.rules import Rule

from .board import WrongAnswer
from .plan import COMMON, READABLE, SECRET, TURNS

UIDS = {"good": 64_551, "dying": 64_552, "hostile": 64_553}  # nobody has an account for them
SIZE = 8192
RULED = os.geteuid() == 0


def pattern(name: str) -> bytes:
    """What a file or a memfd of that name is full of."""
    return (name.encode() + b"." * (16 - len(name))) * (SIZE // 16)


def uid_of(role: str) -> int:
    return UIDS[role] if RULED else os.geteuid()


def configuration(folder: str) -> str:
    """The broker's file; what it opens is in `folder`."""
    lines = ["[server]", 'mode = "0666"', "drain = 2"]
    resources = {
        "common/file": f'open = "{folder}/file:rw"',
        "common/readonly": f'open = "{folder}/readonly:r"',
        "common/memory": f'memfd = "{SIZE}"',
        "common/null": 'open = "/dev/null:rw"',
        "common/tcp": 'listen = "127.0.0.1:0"',
        "common/udp": 'listen = "udp:127.0.0.1:0"',
        "common/unix": f'listen = "unix:{folder}/app.sock"',
        SECRET: 'memfd = "16"',
    } | {name: f'open = "{folder}/{name.replace("/", "-")}:rw"' for name in TURNS}
    for name, how in resources.items():
        lines += [f'[entry."{name}"]', how]
    borrow = '["borrow", "list"]'
    everything = '["borrow", "put", "retire", "list"]'
    listeners = "listeners = true" if "listeners" in Rule._fields else ""
    for role, names, verbs in [
        ("good", ["common/*", "turn/*"], borrow),
        ("good", ["good/*", "published/*"], everything),
        ("good", [""], '["put"]'),
        ("dying", ["common/*", "turn/*"], borrow),
        ("dying", ["dying/*"], everything),
        ("dying", [""], '["put"]'),
        ("hostile", ["hostile/*"], everything),
    ]:
        patterns = ", ".join(f'"{name}"' for name in names)
        lines += ["[[rule]]", f"uid = {UIDS[role]}", f"names = [{patterns}]", f"verbs = {verbs}"]
        if "common/*" in names:
            lines.append(listeners)
    return "\n".join(lines) + "\n"


def fill(folder: str) -> None:
    """The files that the broker opens."""
    for name in ("common/file", "common/readonly", *TURNS):
        path = name.removeprefix("common/").replace("/", "-")
        with open(f"{folder}/{path}", "wb") as file:
            file.write(bytes(SIZE) if name in TURNS else pattern(name))


class Looks(NamedTuple):
    """What tells one open file from all others."""

    device: int
    inode: int
    kind: int
    number: int  # of a device


def looks(fd: int) -> Looks:
    found = os.fstat(fd)
    return Looks(found.st_dev, found.st_ino, stat.S_IFMT(found.st_mode), found.st_rdev)


def look_at_all(client: fdbroker.Client) -> dict[str, Looks]:
    """What each entry of the file is; the memory gets its pattern."""
    found = {}
    for name in (*COMMON, *TURNS):
        with client.borrow(name) as loan:
            found[name] = looks(loan.fileno())
            if name == "common/memory":
                os.pwrite(loan.fileno(), pattern(name), 0)
    assert len(set(found.values())) == len(found)
    return found


def check_looks(expected: dict[str, Looks], name: str, fd: int) -> None:
    """`WrongAnswer` unless `fd` is what was put under `name`, with what is in it."""
    found = looks(fd)
    if found != expected[name]:
        other = next((other for other, of in expected.items() if of == found), "something else")
        raise WrongAnswer(f"asked for {name} and got {other}: {found}")
    if name in READABLE and os.pread(fd, SIZE, 0) != pattern(name):
        raise WrongAnswer(f"{name} has other contents")
    if name in ("common/tcp", "common/unix"):
        with socket.socket(fileno=os.dup(fd)) as sock:
            if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise WrongAnswer(f"{name} does not listen")
