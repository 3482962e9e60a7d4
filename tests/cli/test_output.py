"""What ls and loans print: for people, for programs, and for nobody."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import BORROW, Peer, Raw, hold, let_go

import fdbroker
from fdbroker.cli import status
from fdbroker.cli.output import printable
from fdbroker.errors import duration
from fdbroker.ipc.client import EntryInfo, LoanInfo

from .kit import command, complaint, put_memory, start, succeeds, words

# what a terminal would act upon: a colour, its title, the line before, the direction of writing
WEIRD = "\x1b[31mred\x1b]0;title\x07\r\n\x9b2J\u202egnp.exe\u2066\u200b\x7f"


def table(text: str) -> list[dict[str, str]]:
    """The rows of a table by its header, cut where the columns begin."""
    header, *lines = text.splitlines()
    names = header.split()
    starts = [header.index(name) for name in names]
    ends = [*starts[1:], None]
    rows = []
    for line in lines:
        for begin in starts[1:]:
            assert line[begin - 2 : begin] == "  ", "it is not aligned"
        cells = [line[a:b].strip() for a, b in zip(starts, ends, strict=True)]
        rows.append(dict(zip(names, cells, strict=True)))
    return rows


@contextmanager
def borrowed(broker: fdbroker.Broker, name: str, purpose: str) -> Iterator[None]:
    """A loan with a purpose that our own client would not send."""
    with Raw(broker.address) as raw:
        raw.send(BORROW, 1, name, 0, None, purpose)
        _, (number,) = raw.receive()
        os.close(number)
        yield


def name_yourself(name: str) -> None:
    """proc(5), /proc/pid/comm."""
    with open("/proc/self/comm", "w") as file:
        file.write(name)


# --- ls --------------------------------------------------------------------------------------


def test_ls_for_people(broker: fdbroker.Broker, tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as file:
        generation = broker.put("a/log.1@host-x", file)
        put_memory(broker, "memory")
        with broker.borrow("a/log.1@host-x"), broker.borrow("a/log.1@host-x"):
            broker.put("a/log.1@host-x", file, replace=True)
            rows = table(succeeds(broker, "ls"))
    assert len({row["NAME"] for row in rows}) == 2
    by_generation = {int(row.pop("GENERATION")): row for row in rows}
    expected = {"NAME": "a/log.1@host-x", "KIND": "file", "WAITING": "0"}
    expected["WHERE"] = f"{tmp_path}/log"
    assert by_generation[generation] == expected | {"LOANS": "2", "STATE": "retired"}
    assert by_generation[generation + 2] == expected | {"LOANS": "0", "STATE": "live"}


def test_ls_for_programs(broker: fdbroker.Broker, data_file) -> None:
    before = time.time()
    broker.put("data", data_file)
    with broker.borrow("data"):
        (entry,) = json.loads(succeeds(broker, "ls", "--json"))
    assert tuple(entry) == EntryInfo._fields
    assert before - 1 <= entry.pop("since") <= time.time() + 1
    assert entry.pop("generation") > 0
    assert entry == {
        "name": "data",
        "kind": "file",
        "where": data_file.name,
        "loans": 1,
        "waiting": 0,
        "uid": os.geteuid(),
        "retired": False,
    }


def test_ls_counts_who_waits(broker: fdbroker.Broker, peer: Peer) -> None:
    put_memory(broker)
    with broker.borrow("data", exclusive=True):
        peer.start(hold, broker.address, "data", True)
        while broker.stats()["waiting"] == 0:
            pass
        (row,) = table(succeeds(broker, "ls"))
    assert (row["LOANS"], row["WAITING"]) == ("1", "1")
    peer.result()
    peer.call(let_go)


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        ((), "tty/0 tty/1 web"),
        (("web",), "web"),
        (("tty/*",), "tty/0 tty/1"),
        (("*1", "w?b"), "tty/1 web"),
        (("[wx]*",), "web"),
        (("[!w]*",), "tty/0 tty/1"),
        (("WEB", "we", "["), ""),
    ],
)
def test_ls_by_pattern(broker: fdbroker.Broker, patterns: tuple[str, ...], found: str) -> None:
    for name in ("tty/0", "tty/1", "web"):
        put_memory(broker, name)
    listed = json.loads(succeeds(broker, "ls", "--json", *patterns))
    assert [entry["name"] for entry in listed] == found.split()


def test_ls_of_many(broker: fdbroker.Broker) -> None:
    names = [f"entry/{number}" for number in range(200)]  # four pages
    for name in names:
        put_memory(broker, name)
    assert [row["NAME"] for row in table(succeeds(broker, "ls"))] == sorted(names)


def test_nothing_to_list_is_said_aside(broker: fdbroker.Broker) -> None:
    assert complaint(command(broker, "ls"), 0) == f"no entries at {broker.address}"
    assert complaint(command(broker, "loans"), 0) == f"no loans at {broker.address}"
    put_memory(broker)
    assert "no entry is named x* or y" in complaint(command(broker, "ls", "x*", "y"), 0)
    assert complaint(command(broker, "loans", "data"), 0) == 'nobody has "data" on loan'
    for given in (["ls", "x"], ["loans"], ["loans", "data"]):
        assert json.loads(succeeds(broker, *given, "--json")) == []


def test_the_socket_may_come_from_the_environment(broker: fdbroker.Broker) -> None:
    put_memory(broker)
    done = subprocess.run(
        [sys.executable, "-m", "fdbroker", "ls"],
        env=os.environ | {"FDBROKER_SOCKET": broker.address},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr, len(table(done.stdout))) == (0, "", 1)


# --- loans -----------------------------------------------------------------------------------


def test_loans_for_people(broker: fdbroker.Broker, peer: Peer) -> None:
    put_memory(broker)
    put_memory(broker, "other")
    peer.call(name_yourself, "minicom")
    peer.call(hold, broker.address, "data", True)
    with broker.borrow_all(["other", "other"], purpose="to see"):
        rows = table(succeeds(broker, "loans"))
        (row,) = table(succeeds(broker, "loans", "data"))
        assert row["ID"] in {one["ID"] for one in rows}
        mine = [one for one in rows if one["ENTRY"] == "other"]
    assert row.pop("SINCE").endswith(" s")
    assert row.pop("ID")
    assert row.pop("GENERATION").isdigit()
    assert row == {
        "ENTRY": "data",
        "PID": str(peer.pid),
        "USER": pwd.getpwuid(os.geteuid()).pw_name,
        "EXCLUSIVE": "yes",
        "PROCESS": "minicom",
        "PURPOSE": "-",
    }
    assert len(mine) == 2
    assert len({one["ID"] for one in mine}) == 1
    assert mine[0]["EXCLUSIVE"] == "no"
    assert mine[0]["PURPOSE"] == "to see"
    peer.call(let_go)


def test_loans_for_programs(broker: fdbroker.Broker, peer: Peer) -> None:
    put_memory(broker)
    before = time.time()
    peer.call(name_yourself, "minicom")
    peer.call(hold, broker.address, "data", True)
    (loan,) = json.loads(succeeds(broker, "loans", "data", "--json"))
    assert tuple(loan) == (*LoanInfo._fields, "process")
    assert before - 1 <= loan.pop("since") <= time.time() + 1
    assert loan.pop("id")
    assert loan == {
        "entry": "data",
        "pid": peer.pid,
        "uid": os.geteuid(),
        "exclusive": True,
        "purpose": "",
        "generation": broker.entries()[0].generation,
        "process": "minicom",
    }
    peer.call(let_go)


def test_loans_of_what_is_retired(broker: fdbroker.Broker) -> None:
    generation = put_memory(broker)
    with broker.borrow("data"):
        broker.retire("data")
        (row,) = table(succeeds(broker, "loans", "data"))
        assert row["GENERATION"] == str(generation)


def test_how_long_as_people_say_it() -> None:
    from fdbroker.cli.loans import _row

    loan = LoanInfo("tty", "1.1", 0, 4_000_000, 0.0, True, "", 1)
    assert _row(loan, 240.4)[3:6] == ("unknown", "4000000", "4 min")
    assert _row(loan, -1.0)[5] == duration(0)


# --- what comes from others ------------------------------------------------------------------


def test_a_weird_purpose_and_a_weird_process(broker: fdbroker.Broker, peer: Peer) -> None:
    put_memory(broker)
    peer.call(name_yourself, "\x1b[31m\u202ex\n")
    peer.call(hold, broker.address, "data")
    with borrowed(broker, "data", WEIRD):
        text = succeeds(broker, "loans")
        loans = json.loads(json_text := succeeds(broker, "loans", "--json"))
    rows = table(text)
    assert all(line.isprintable() for line in text.splitlines())
    assert json_text.isascii()
    assert {row["PURPOSE"] for row in rows} == {"-", printable(WEIRD)}
    assert {row["PROCESS"] for row in rows} >= {"\\x1b[31m\\u202ex\\n"}
    assert {loan["purpose"] for loan in loans} == {"", WEIRD}
    assert "\x1b[31m\u202ex\n" in {loan["process"] for loan in loans}
    peer.call(let_go)


def test_a_weird_path(broker: fdbroker.Broker, tmp_path: Path) -> None:
    path = tmp_path / WEIRD.replace("/", "")
    with open(path, "w") as file:
        broker.put("data", file)
    text, json_text = succeeds(broker, "ls"), succeeds(broker, "ls", "--json")
    (row,) = table(text)
    assert all(line.isprintable() for line in text.splitlines())
    assert json_text.isascii()
    assert row["WHERE"] == printable(str(path))
    assert json.loads(json_text)[0]["where"] == str(path)


def test_a_path_that_is_no_text(broker: fdbroker.Broker, tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff", "w") as file:
        broker.put("data", file)
    (row,) = table(succeeds(broker, "ls"))
    assert row["WHERE"].startswith(f"{tmp_path}/\\")


def test_a_terminal_that_knows_no_utf_8(broker: fdbroker.Broker) -> None:
    put_memory(broker)
    with broker.borrow("data", purpose="f\xfcr \u65e5\u672c"):
        text = succeeds(broker, "loans", env=os.environ | {"PYTHONIOENCODING": "ascii"})
        assert table(text)[0]["PURPOSE"] == "f\\xfcr \\u65e5\\u672c"
        text = succeeds(broker, "loans", env=os.environ | {"PYTHONIOENCODING": "utf-8"})
        assert table(text)[0]["PURPOSE"] == "f\xfcr \u65e5\u672c"


def test_what_is_printable_stays_as_it_is() -> None:
    for text in ("", "a b", "f\xfcr", "\u65e5\u672c", "back\\slash"):
        assert printable(text) == text
    assert printable("a\tb\u2028\udcff\U000e0001") == "a\\tb\\u2028\\udcff\\U000e0001"


# --- for nobody ------------------------------------------------------------------------------


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"])
def how(request: pytest.FixtureRequest) -> dict[str, dict[str, str]]:
    """The environment of the command, with Python's two ways of writing."""
    return {"env": os.environ | {"PYTHONUNBUFFERED": request.param}}


@pytest.mark.parametrize("line", ["ls", "ls --json", "loans", "--help", "ls --help", "--version"])
def test_nobody_reads_it(broker: fdbroker.Broker, line: str, how: dict[str, Any]) -> None:
    put_memory(broker)
    reader, writer = os.pipe()
    os.close(reader)
    with broker.borrow("data"):
        done = command(broker, *line.split(), stdout=writer, **how)
    os.close(writer)
    assert (done.returncode, done.stderr) == (status.NO_READER, "")


@pytest.mark.parametrize("line", ["ls", "ls --json"])
def test_the_reader_stops_in_the_middle(
    broker: fdbroker.Broker, line: str, how: dict[str, Any]
) -> None:
    name = "x" * 250
    for number in range(300):  # more than a pipe holds (pipe(7))
        put_memory(broker, f"{name}{number}")
    with start(broker, *line.split(), **how) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == status.NO_READER


def test_there_is_no_room_for_it(broker: fdbroker.Broker, how: dict[str, Any]) -> None:
    put_memory(broker)
    for line in ("ls", "ls --json", "--help"):
        with open("/dev/full", "w") as full:
            done = command(broker, *line.split(), stdout=full, **how)
        done.stdout = ""
        said = complaint(done, status.FAILED)
        assert said == "the output cannot be written: No space left on device"


@pytest.mark.parametrize("given", ["lss", "loans wbe", "ls"])
def test_nobody_reads_what_is_wrong(
    broker: fdbroker.Broker, given: str, how: dict[str, Any]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = command(broker, *given.split(), stderr=writer, **how)
    os.close(writer)
    expected = {"lss": status.MISUSE, "loans wbe": status.NO_ENTRY, "ls": status.DONE}[given]
    assert (done.returncode, done.stdout) == (expected, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("given", ["ls", "ls nothing", "loans wbe", "retire web --wait", "lss"])
def test_standard_files_that_are_closed(broker: fdbroker.Broker, closed: str, given: str) -> None:
    put_memory(broker, "web")
    shell = f'exec "$@" {closed}'
    done = subprocess.run(
        ["sh", "-c", shell, "sh", *words(broker.address, *given.split())],
        capture_output=True,
        text=True,
    )
    expected = {"loans": status.NO_ENTRY, "lss": status.MISUSE}.get(given.split()[0], 0)
    assert done.returncode == expected
    assert "Traceback" not in done.stderr
    if "2>&-" in closed and given != "ls":
        assert done.stdout == ""


# --- what it costs to start ------------------------------------------------------------------

# not difflib, which a client imports for the error that it may raise (ipc/client/client.py)
HEAVY = {"asyncio", "multiprocessing", "rich", "click", "shutil", "bz2", "lzma", "numpy"}


@pytest.mark.parametrize(
    ("given", "needs"),
    [
        ("ls", set()),
        ("ls --json", set()),
        ("put x --memfd 1", set()),
        ("retire data", set()),
        ("loans", {"psutil"}),
    ],
)
def test_a_command_imports_only_what_it_uses(
    broker: fdbroker.Broker, given: str, needs: set[str]
) -> None:
    put_memory(broker)
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
before = set(sys.modules)
from fdbroker.cli import main
status = main(sys.argv[1:])
print(status, *({HEAVY | {"psutil"}} & set(sys.modules) - before), file=sys.stderr)
"""
    _, _, _, _, _, *arguments = words(broker.address, *given.split())
    with broker.borrow("data"):
        done = subprocess.run(
            [sys.executable, "-S", "-c", script, *arguments], capture_output=True, text=True
        )
    code, *imported = done.stderr.split()
    by_psutil = {"shutil", "bz2", "lzma"} if needs else set()
    assert (code, set(imported) - by_psutil) == ("0", needs), done.stderr
