"""What goes wrong is one line on stderr, nothing on stdout, and the exit status of the table."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import pytest
from support import Peer, hold, in_fork, let_go

import fdbroker
from fdbroker.cli import COMMANDS, main, status
from fdbroker.cli.status import MEANINGS

from .kit import command, complaint, put_memory, words

LONG = "x" * 256

# what is typed; what then stands in the line.  {port}, {path}: in use; {folder}: an empty one
MISUSE = [
    ("", "required: COMMAND"),
    ("lss", "invalid choice: 'lss'"),
    ("--lss", "required: COMMAND"),
    ("-v", "required: COMMAND"),
    ("ls --jsn", "unrecognized arguments: --jsn"),
    ("ls --js", "unrecognized arguments: --js"),
    ("ls --json=1", "ignored explicit argument"),
    ("ls --socket", "expected one argument"),
    ("ls \x1b[31m --\x1b[31m", "unrecognized arguments: --\\x1b[31m"),
    ("loans one two", "unrecognized arguments: two"),
    ("loans n\xe4me", "is no name"),
    ("loans a\x1b[31m", "'a\\x1b[31m' is no name"),
    ("loans ''", "'' is no name"),
    ("stats web", "unrecognized arguments: web"),
    ("stats --jso", "unrecognized arguments: --jso"),
    (f"loans {LONG}", "is no name"),
    ("put", "required: NAME"),
    ("put x", "one of the arguments --listen --open --memfd --fd is required"),
    ("put x --memfd", "expected one argument"),
    ("put x --mem 1", "required"),
    ("put x --memfd 1 --fd 0", "not allowed with"),
    ("put x --memfd 1 --memfd 2", "one descriptor"),
    ("put x --memfd 1 --if-absent --replace", "not allowed with"),
    ("put x y --memfd 1", "unrecognized arguments: y"),
    ("put n\xe4me --memfd 1", "is no name"),
    (f"put {LONG} --memfd 1", "is no name"),
    ("put '' --memfd 1", "is no name"),
    ("put x --memfd much", "memfd 'much': a size is"),
    ("put x --memfd ''", "a size is"),
    ("put x --listen web", "listen 'web': it ends with a port"),
    ("put x --listen 127.0.0.1:\x1b[31m", "\\x1b[31m"),
    ("put x --listen 65536", "a port from 0 to 65535"),
    ("put x --listen ::1:80", "[IPV6]:PORT"),
    ("put x --listen unix:", "after unix: comes a path"),
    (f"put x --listen unix:/{LONG}", "too long"),
    ("put x --open ''", "it is PATH"),
    ("put x --open :rw", "it is PATH"),
    ("put x --fd stdin", "fd 'stdin': it is the number"),
    ("put x --fd -1", "number"),
    ("retire", "required: NAME"),
    ("retire web other", "unrecognized arguments: other"),
    ("retire n\xe4me", "is no name"),
    ("retire ''", "is no name"),
    ("retire web --wait soon", "'soon' is no number of seconds"),
    ("retire web --wait -1", "'-1' is no number of seconds"),
    ("retire web --wait nan", "'nan' is no number of seconds"),
    ("retire --wait web", "NAME comes before --wait"),
    ("check", "required: --config, --uid, VERB"),
    ("check --config f --uid 1 steal x", "invalid choice: 'steal'"),
    ("check --config f --uid no-such-user borrow x", "'no-such-user' is not a user"),
    ("check --config f --uid 1 --gid \x1b[31m borrow x", "is not a group"),
    ("check --config f --uid 1 borrow", "takes the NAME of an entry"),
    ("check --config f --uid 1 borrow n\xe4me", "is no name"),
    ("serve x", "unrecognized arguments: x"),
    ("serve --drain soon", "'soon' is no number of seconds"),
    ("serve --ready-fd one", "invalid int value: 'one'"),
]
ERRORS = [
    (status.FAILED, "put x --open /", "kind directory"),
    (status.FAILED, "put x --open {folder}/none", "only a file that is to be written is made"),
    (status.FAILED, "put x --open {folder}/no/ne:rw", "No such file or directory"),
    (status.FAILED, "put x --open {folder}/\x1b[31m", "\\x1b[31m: No such file"),
    (status.FAILED, "put x --fd 999999", "open it in the shell"),
    (status.FAILED, "put x --fd 3", "Bad file descriptor"),
    (status.FAILED, "put x --fd 3 --if-absent", "Bad file descriptor"),
    (status.FAILED, "put x --listen 203.0.113.1:0", "no interface here"),
    (status.FAILED, "put x --listen unix:{folder}/no/ne", "make its folder first"),
    (status.FAILED, "put x --listen {port}", 'the entry "web" (127.0.0.1:{port}): fdbroker retire'),
    (status.FAILED, "put web --listen {port} --replace", "fdbroker retire web --wait, then put"),
    (status.FAILED, "put x --listen unix:{path}", 'by the entry "path" (unix:{path})'),
    (status.FAILED, "put x --listen udp:{udp}", 'by the entry "udp" (127.0.0.1:{udp})'),
    (status.FAILED, "put x --listen {foreign}", "by another program, which ss -lpt names"),
    (status.NO_ENTRY, "loans wbe", '"wbe" (did you mean "web"?)'),
    (status.NO_ENTRY, "loans none.of.these", "fdbroker ls lists"),
    (status.NO_ENTRY, "retire wbe", '"wbe" (did you mean "web"?)'),
    (status.NO_ENTRY, "retire wbe --wait", '"wbe" (did you mean "web"?)'),
    (status.NO_ENTRY, "retire none.of.these", "fdbroker ls lists"),
    (status.NAME_TAKEN, "put web --memfd 1", "--replace or --if-absent"),
    (status.NAME_TAKEN, "put web --fd 0", "--replace or --if-absent"),
    (status.NAME_TAKEN, "put web --listen {port}", "--replace or --if-absent"),
    (status.NOT_PERMITTED, "put x --open /proc/sys/kernel/osrelease:rw", "Permission denied"),
    (status.TIMED_OUT, "retire data --wait 0", "fdbroker loans data names the borrowers"),
]


def split(line: str) -> list[str]:
    return [word.replace("''", "") for word in line.split(" ")] if line else []


def test_misuse_of_each_command_is_in_the_table() -> None:
    assert {split(line)[0] for line, _ in MISUSE if line} >= set(COMMANDS) - {"exec"}


@pytest.mark.parametrize(("line", "says"), MISUSE, ids=[line[:40] for line, _ in MISUSE])
def test_misuse(broker: fdbroker.Broker, line: str, says: str) -> None:
    put_memory(broker, "web")
    said = complaint(command(broker, *split(line)), status.MISUSE)
    assert says in said
    assert [entry.name for entry in broker.entries()] == ["web"]


@pytest.mark.parametrize(
    ("code", "line", "says"), ERRORS, ids=[line.replace("\x1b", "ESC") for _, line, _ in ERRORS]
)
def test_errors(
    broker: fdbroker.Broker, peer: Peer, tmp_path: Path, code: int, line: str, says: str
) -> None:
    folder = tempfile.mkdtemp(dir=tmp_path)
    with (
        socket.create_server(("127.0.0.1", 0)) as port,
        socket.create_server(("127.0.0.1", 0)) as foreign,
        socket.create_server(str(tmp_path / "s"), family=socket.AF_UNIX) as path,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        udp.bind(("127.0.0.1", 0))
        broker.put("web", port)
        broker.put("path", path)
        broker.put("udp", udp)
        put_memory(broker)
        before = [entry[:4] for entry in broker.entries()]
        peer.call(hold, broker.address, "data")
        facts = {
            "port": port.getsockname()[1],
            "foreign": foreign.getsockname()[1],
            "path": path.getsockname(),
            "udp": udp.getsockname()[1],
            "folder": folder,
        }
        given = [word.format(**facts) for word in split(line)]
        assert says.format(**facts) in complaint(command(broker, *given), code)
        assert [entry[:4] for entry in broker.entries()] == before
        assert os.listdir(folder) == []
        peer.call(let_go)


@pytest.mark.parametrize("line", ["ls", "loans", "loans x", "put x --memfd 1", "retire x --wait"])
def test_no_broker(tmp_path: Path, line: str) -> None:
    said = complaint(command(f"{tmp_path}/\x1bs", *split(line)), status.NO_BROKER)
    assert said.startswith(f"no broker at {tmp_path}/\\x1bs: start one there (fdbroker serve)")


@pytest.mark.parametrize("line", ["ls", "loans", "put x --memfd 1", "retire x"])
def test_what_can_be_no_address(line: str) -> None:
    for address in ("", f"/{LONG}"):
        assert "no address" in complaint(command(address, *split(line)), status.FAILED)


def test_the_broker_dies_meanwhile(peer: Peer) -> None:
    with fdbroker.Broker() as broker:
        put_memory(broker)
        peer.call(hold, broker.address, "data")
        process = subprocess.Popen(
            words(broker.address, "retire", "data", "--wait"), stderr=subprocess.PIPE, text=True
        )
        with process:
            assert process.stderr is not None
            assert "waiting for" in process.stderr.readline()
            os.kill(broker.pid, 9)
            said = process.stderr.read().splitlines()
        assert process.returncode == status.NO_BROKER
        assert len(said) == 1
        assert "ended this session" in said[0]
        peer.call(let_go)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another uid")
@pytest.mark.parametrize("line", ["ls", "loans", "put x --memfd 1", "retire x"])
def test_not_permitted(broker: fdbroker.Broker, line: str) -> None:
    """In a fork: our interpreter may be where another uid cannot start it."""
    _, _, _, _, _, *arguments = words(broker.address, *split(line))
    # The other uid may not be able to read the package.
    import_module("fdbroker.cli.options")
    import_module(f"fdbroker.cli.{arguments[0]}")
    with tempfile.TemporaryFile("w+") as said:

        def run_as_somebody_else() -> int:
            sys.stderr = said
            os.setuid(65534)
            return main(arguments)

        code = in_fork(run_as_somebody_else)
        said.seek(0)
        done = subprocess.CompletedProcess(arguments, code, "", said.read())
    assert "uid 65534 may not connect" in complaint(done, status.NOT_PERMITTED)


def test_every_status_but_those_of_exec_is_met_here() -> None:
    met = {status.DONE, status.MISUSE, status.NO_BROKER, *(code for code, _, _ in ERRORS)}
    elsewhere = {status.INTERRUPTED, status.NO_READER}  # test_retire.py, test_output.py
    of_exec = {code for code, meaning in MEANINGS.items() if meaning.startswith("exec: ")}
    assert met | elsewhere | of_exec == set(MEANINGS)


def test_help_has_the_table(broker: fdbroker.Broker) -> None:
    done = command(broker, "--help")
    assert done.stdout.endswith(status.table() + "\n")
    assert len(re.findall(r"^ {2,4}\d+  ", done.stdout, re.M)) == len(MEANINGS)
