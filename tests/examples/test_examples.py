"""The examples do what they say, as a user runs them: their own process, its output, its status."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support import in_fork

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES = 80  # an example is to be read at one glance


def run(
    name: str, *arguments: str, status: int = 0, before: Sequence[str] = (), quiet: bool = True
) -> str:
    """What the example printed; it ended with that status, and if `quiet` complained of nothing."""
    done = subprocess.run(
        [*before, sys.executable, "-W", "error", EXAMPLES / name, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert not (quiet and done.stderr), done.stderr
    return done.stdout


def test_pool_shared_file() -> None:
    out = run("pool_shared_file.py")
    assert "67108864 bytes, unlinked, not open here" in out
    pools = re.findall(r"^(\w+), (\S+)$", out, re.M)
    kinds = ("multiprocessing.Pool", "ProcessPoolExecutor")
    assert pools == [(m, kind) for m in ("fork", "spawn", "forkserver") for kind in kinds]
    assert out.count("before it borrowed: (0, 0, 0, 0, 0, 0, 0, 0)") == len(pools)
    lent = re.findall(r"loans of one moment, by pid: \[(.*)\]", out)
    assert [len(set(pids.split(", "))) for pids in lent] == [8] * len(pools)
    digests = re.findall(r"SHA-256 .*: ([0-9a-f]{64})$", out, re.M)
    assert len(digests) == len(pools)
    assert len(set(digests)) == 1
    assert out.count("  ok: ") == 1 + 3 * len(pools)


def test_shared_array() -> None:
    out = run("shared_array.py")
    assert "the producer's exit code is -9" in out
    assert "but not the sealed one: PermissionError(1," in out
    assert re.search(r"retired, but in use by \{\d+, \d+\}$", out, re.M)
    assert "unmapped: in use by nobody" in out
    assert out.count("  ok: ") == 6


def test_exclusive_device() -> None:
    out = run("exclusive_device.py")
    assert "both had their turns, and their own answers: [100, 100]" in out
    keeper = re.search(r"pid (\d+) keeps the port: firmware update$", out, re.M)
    assert keeper is not None
    told = rf'the other is told: "port" is busy after .* s: held by pid {keeper[1]} for .* s; try'
    assert re.search(told, out)
    assert f"pid {keeper[1]} is killed, and it has its turn" in out
    assert out.count("  ok: ") == 5


def may_use_bpf() -> bool:
    """Whether we may make a BPF map, and another uid may write to it: asked of the kernel."""
    number = {"x86_64": 321, "aarch64": 280}.get(os.uname().machine)
    if number is None:
        pytest.skip("the number of bpf(2) on this machine is not in the example")
    if os.geteuid() != 0:
        return False
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    create = struct.pack("5I", 1, 4, 8, 1, 0)  # BPF_MAP_TYPE_HASH, struct bpf_attr of bpf(2)
    descriptor = syscall(number, 0, create, len(create))
    if descriptor < 0:
        assert ctypes.get_errno() == errno.EPERM
        return False
    try:
        return in_fork(lambda: may_write(syscall, number, descriptor))
    finally:
        os.close(descriptor)


def may_write(syscall: Any, number: int, descriptor: int) -> bool:
    os.setgroups([])
    os.setgid(65533)
    os.setuid(65533)
    key, value = ctypes.c_uint32(0), ctypes.c_uint64(1)
    addresses = ctypes.addressof(key), ctypes.addressof(value)
    update = struct.pack("I4x3Q", descriptor, *addresses, 0)
    return syscall(number, 2, update, len(update)) == 0


def test_ebpf_map() -> None:
    """Where bpf(2) is permitted, to say that it is not would fail."""
    if not may_use_bpf():
        out = run("ebpf_map.py", status=77)
        assert re.fullmatch(r"bpf\(2\) is not permitted here: .*\n", out)
        pytest.skip(out)
    out = run("ebpf_map.py")
    assert "uid 65533 has counted, as uid 0 reads it: [1000, 1000, 1000, 1000]" in out
    for key in range(4):
        assert f'key {key} was counted to 1000; uid 65533 may not borrow "secrets": a rule' in out
    assert out.count("event=refused") == 4
    assert "not permitted" not in out


@pytest.mark.skipif(os.geteuid() != 0, reason="needs privileges to lose")
def test_ebpf_map_where_it_is_not_permitted() -> None:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("there is no setpriv")
    less = [setpriv, "--bounding-set=-bpf,-sys_admin", "--inh-caps=-bpf,-sys_admin"]
    out = run("ebpf_map.py", status=77, before=less)
    assert re.fullmatch(r"bpf\(2\) is not permitted here: .*\n", out)


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_is_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < LINES


@pytest.mark.parametrize(
    ("name", "right", "wrong", "said"),
    [
        ("pool_shared_file.py", "index * PART)", "index * PART + 1)", "SHA-256"),
        ("exclusive_device.py", "OK {words}", "KO {words}", "both had their turns"),
    ],
)
def test_an_example_that_fails_says_so(
    tmp_path: Path, name: str, right: str, wrong: str, said: str
) -> None:
    """One wrong byte, and the exit status is not 0."""
    source = (EXAMPLES / name).read_text()
    broken = source.replace(right, wrong)
    assert broken != source
    (tmp_path / "broken.py").write_text(broken)
    done = subprocess.run(
        [sys.executable, tmp_path / "broken.py"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 1
    assert f"FAILED: {said}" in done.stdout


def restart(server: str) -> None:
    """The example's own verdict, and its table: nobody refused, many refused, nobody refused."""
    pytest.importorskip(server)
    # a server that is stopped may say so in its own words, hypercorn with a traceback at times
    out = run("restart_web_server.py", "--server", server, quiet=False)
    head, *rows = out.splitlines()
    assert head.split() == [server, *["succeeded", "refused", "reset", "other", "stall", "pids"]]
    figures = [
        re.fullmatch(r"([a-z, ]+?)" + r" +(\d+)" * 4 + r" +\d\.\d+ s +(\d+)", r) for r in rows
    ]
    assert all(figures), rows
    lent, own, overlapping = (list(map(int, found.groups()[1:])) for found in figures if found)
    for succeeded, refused, reset, other, pids in (lent, own, overlapping):
        assert succeeded > 100
        assert reset <= 4 * 5 or refused  # at most what four clients had in hand at each stop
        assert other == 0
        assert pids == 6
    assert lent[1] == overlapping[1] == 0
    assert own[1] >= 100


def test_restart_web_server() -> None:
    restart("uvicorn")


@pytest.mark.long
@pytest.mark.parametrize("server", ["gunicorn", "hypercorn"])
def test_restart_other_web_servers(server: str) -> None:
    restart(server)
