"""SIGHUP: what the file no longer has is retired, what it says otherwise is replaced, what is new
is added, what is as before is not touched; and a mistake changes nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import PATIENCE, open_files, process_state, wait_until

import fdbroker

from .kit import Served, open_for_writing, served

DONE = "event=configured"
FAILED = "event=reload-failed"


class Configured:
    """A broker with a file."""

    def __init__(self, path: Path, broker: Served) -> None:
        self._path = path
        self.broker = broker

    def write(self, **entries: str) -> None:
        write(self._path, **entries)

    def reload(self, **entries: str) -> str:
        """With these entries from now on."""
        self.write(**entries)
        return self.broker.reload(DONE)

    def fail(self, text: str | None = None) -> str:
        """With a text that will not do, or with what was written: the line of the log."""
        if text is not None:
            self._path.write_text(text)
        return self.broker.reload(FAILED)

    def state(self) -> dict[str, tuple[int, tuple[int, int], list[int]]]:
        """Of each entry its generation, which file it is, and its number in the broker."""
        found = {}
        for name, entry in self.broker.entries().items():
            inode = self.broker.inode(name)
            found[name] = entry.generation, inode, self.broker.number_of(inode)
        return found


def write(path: Path, **entries: str) -> None:
    """``name='how = "what"'``"""
    path.write_text("".join(f"[entry.{name}]\n{words}\n" for name, words in entries.items()))


@contextlib.contextmanager
def configured(folder: Path, *arguments: str, **entries: str) -> Iterator[Configured]:
    path = folder / "f.toml"
    write(path, **entries)
    with served(folder, "--config", path, *arguments) as broker:
        broker.says(DONE)
        yield Configured(path, broker)


MEMORY, LARGER = "memfd = 4096", "memfd = 8192"


# --- what changes and what does not ---


def test_vanished_changed_unchanged_new(tmp_path):
    with configured(tmp_path, same=MEMORY, changed=MEMORY, vanished=MEMORY) as it:
        before = it.state()
        it.reload(new=MEMORY, changed=LARGER, same=MEMORY)
        after = it.state()
        assert after.keys() == {"same", "changed", "new"}
        assert after["same"] == before["same"]
        assert after["changed"][0] > before["changed"][0]
        assert after["changed"][1] != before["changed"][1]
        with it.broker.client.borrow("changed") as loan:
            assert os.fstat(loan.fileno()).st_size == 8192
        for gone in ("changed", "vanished"):
            wait_until(lambda gone=gone: not it.broker.number_of(before[gone][1]))


def test_a_listener_that_is_not_touched_loses_nobody(tmp_path):
    with configured(tmp_path, web='listen = "127.0.0.1:0"') as it:
        port = int(it.broker.entries()["web"].where.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as waiting:
            for count in range(5):
                it.reload(web='listen = "127.0.0.1:0"', **{f"m{count}": MEMORY})
            with it.broker.client.borrow("web") as loan, loan.as_socket() as listener:
                accepted, address = listener.accept()
                accepted.close()
                assert address == waiting.getsockname()


def test_what_is_on_loan_stays_until_it_is_returned(tmp_path):
    with configured(tmp_path, changed=MEMORY, vanished=MEMORY) as it:
        client = it.broker.client
        before = it.state()
        loans = [client.borrow(name) for name in ("changed", "vanished")]
        it.reload(changed=LARGER)
        assert it.state().keys() == {"changed"}
        for loan, name in zip(loans, ("changed", "vanished"), strict=True):
            assert it.broker.number_of(before[name][1])
            assert os.fstat(loan.fileno()).st_size == 4096
            loan.close()
            wait_until(lambda name=name: not it.broker.number_of(before[name][1]))


def test_it_goes_on_and_on(tmp_path):
    with configured(tmp_path, memory=MEMORY) as it:
        it.broker.client.stats()
        for _ in range(3):
            it.reload(memory=LARGER, other=MEMORY)
            it.reload(memory=MEMORY)
        wait_until(lambda: it.broker.client.stats()["entries"] == 1)
        before = len(open_files(it.broker.pid))
        for _ in range(10):
            it.reload(memory=LARGER, other=MEMORY)
            it.reload(memory=MEMORY)
        wait_until(lambda: it.broker.client.stats()["entries"] == 1)
        wait_until(lambda: len(open_files(it.broker.pid)) == before)


def test_a_storm_of_signals_ends_with_what_is_there_last(tmp_path):
    with configured(tmp_path, m0=MEMORY) as it:
        for count in range(1, 50):
            it.write(**{f"m{count}": MEMORY})
            it.broker.hang_up()
        wait_until(lambda: it.broker.entries().keys() == {"m49"})
        assert not [line for line in it.broker.said() if FAILED in line]


def test_entries_of_options_stay(tmp_path):
    with configured(tmp_path, "--memfd", "option=4096", file=MEMORY) as it:
        before = it.state()
        it.reload()
        assert it.state() == {"option": before["option"]}
        it.reload(option=LARGER)
        it.broker.says("event=left-alone", "entry=option")
        assert it.state() == {"option": before["option"]}


# --- what clients have put ---


@pytest.fixture
def memory():
    number = os.memfd_create("a client's")
    yield number
    os.close(number)


def test_what_a_client_has_replaced_is_left_alone(tmp_path, memory):
    with configured(tmp_path, a=MEMORY, b=MEMORY, c=MEMORY) as it:
        for name in "abc":
            it.broker.client.put(name, memory, replace=True)
        theirs = it.state()
        it.reload(a=MEMORY, b=LARGER)  # as before, changed, and vanished
        assert it.state() == theirs
        lines = it.broker.says("event=left-alone", times=2)
        assert [line.split("entry=")[1].split()[0] for line in lines] == ["a", "b"]
        for name in "abc":
            it.broker.client.retire(name)
        it.reload(a=MEMORY, b=LARGER)
        assert it.state().keys() == {"a", "b"}


def test_a_new_name_that_a_client_has_taken_is_left_alone(tmp_path, memory):
    with configured(tmp_path, a=MEMORY) as it:
        it.broker.client.put("b", memory)
        it.broker.client.put("c", memory)
        theirs = it.state()
        it.reload(a=MEMORY, b=MEMORY, d=MEMORY)
        assert it.state() | theirs == it.state()
        assert it.state().keys() == {*"abcd"}


def test_what_a_client_has_retired_comes_back(tmp_path):
    with configured(tmp_path, a=MEMORY) as it:
        before = it.state()
        it.broker.client.retire("a")
        it.reload(a=MEMORY)
        assert it.state()["a"][0] > before["a"][0]


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[entry.new]\nmemfd = 1\n[entry.a]\nmemfd = 'much'\n", "f.toml:4: memfd is a size"),
        ("[entry.new]\nmemfd = 1\n[entry.bad]\nopen = '/none/such'\n", 'entry "bad": open'),
        ("[entry.new]\nmemfd = 1\n[entry.bad]\nopen = '/'\n", 'entry "bad": open'),
        ("[entry.new]\nmemfd = 1\n[[rule]]\nuid = 1\n", "f.toml:3: a rule takes verbs"),
        ("[entry.a]\nmemfd = 8192\n[entry.bad]\nlisten = '192.0.2.1:80'\n", "Cannot assign"),
        ("not toml", "f.toml:1"),
    ],
)
def test_a_mistake_changes_nothing_and_is_one_line(tmp_path, text, said):
    with configured(tmp_path, a=MEMORY, b=MEMORY) as it:
        before, files = it.state(), len(open_files(it.broker.pid))
        lines = len(it.broker.said())
        assert said in it.fail(text)
        assert len(it.broker.said()) == lines + 1
        assert it.state() == before
        wait_until(lambda: len(open_files(it.broker.pid)) == files)
        it.reload(a=MEMORY)
        assert it.state() == {"a": before["a"]}


def test_a_file_that_is_gone_changes_nothing(tmp_path):
    with configured(tmp_path, a=MEMORY) as it:
        before = it.state()
        (tmp_path / "f.toml").unlink()
        assert "it cannot be read" in it.broker.reload(FAILED)
        assert it.state() == before


def test_an_address_that_is_taken_changes_nothing(tmp_path):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        configured(tmp_path, a=MEMORY) as it,
    ):
        before = it.state()
        at = f'listen = "127.0.0.1:{taken.getsockname()[1]}"'
        it.write(a=LARGER, web=at, app=f'listen = "unix:{tmp_path}/app"')
        assert 'entry "web"' in it.fail()
        assert it.state() == before
        assert not (tmp_path / "app").exists()
        taken.close()
        it.reload(a=LARGER, web=at)
        assert it.state().keys() == {"a", "web"}


def test_more_than_the_broker_has_room_for_changes_nothing(tmp_path):
    import resource

    limit = 64

    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    path = tmp_path / "f.toml"
    write(path, a=MEMORY)
    with served(tmp_path, "--config", path, preexec_fn=few_files) as broker:
        before, files = broker.inode("a"), len(open_files(broker.pid))
        write(path, a=MEMORY, **{f"m{count}": MEMORY for count in range(limit)})
        assert "Too many open files" in broker.reload(FAILED)
        assert broker.entries().keys() == {"a"}
        assert broker.inode("a") == before
        wait_until(lambda: len(open_files(broker.pid)) == files)


def test_the_server_table_wants_a_restart_and_says_so(tmp_path):
    with configured(tmp_path, a=MEMORY) as it:
        mode = os.stat(it.broker.address).st_mode
        (tmp_path / "f.toml").write_text("[server]\nmode = '0666'\n")
        it.broker.reload("event=restart-needed")
        assert os.stat(it.broker.address).st_mode == mode
        it.reload(a=MEMORY)
        assert it.broker.entries().keys() == {"a"}


# --- it never stops the loop, nor the broker ---


def test_opening_that_hangs_holds_up_nobody(tmp_path):
    """The file itself is a FIFO that nobody writes to: reading it waits, and so would any open."""
    with configured(tmp_path, a=MEMORY) as it:
        client = it.broker.client
        (tmp_path / "f.toml").unlink()
        os.mkfifo(tmp_path / "f.toml")
        it.broker.hang_up()
        wait_until(lambda: client.stats()["jobs"] == 1)
        for _ in range(10):
            client.borrow("a", timeout=0).close()
        it.broker.hang_up()  # it is told once more meanwhile
        with open(tmp_path / "f.toml", "w") as fifo:
            fifo.write("[entry.b]\nmemfd = 1\n")
            (tmp_path / "f.toml").unlink()
            write(tmp_path / "f.toml", c=MEMORY)
        wait_until(lambda: it.broker.entries().keys() == {"c"})


def test_one_that_drains_reloads_nothing(tmp_path):
    with configured(tmp_path, a=MEMORY) as it:
        loan = it.broker.client.borrow("a")
        it.broker.process.send_signal(signal.SIGTERM)
        it.broker.says("event=drain")
        it.write(b=MEMORY)
        it.broker.hang_up()
        it.broker.process.send_signal(signal.SIGCONT)
        with pytest.raises(fdbroker.errors.BrokerClosing):
            it.broker.client.borrow("b")
        loan.close()
        assert it.broker.process.wait(PATIENCE) == 0
        assert len([line for line in it.broker.said() if DONE in line]) == 1


def test_a_reload_that_hangs_does_not_hold_up_the_end(tmp_path):
    with configured(tmp_path, "--drain", "inf", a=MEMORY) as it:
        (tmp_path / "f.toml").unlink()
        os.mkfifo(tmp_path / "f.toml")
        it.broker.hang_up()
        wait_until(lambda: it.broker.client.stats()["jobs"] == 1)
        it.broker.process.send_signal(signal.SIGTERM)
        assert it.broker.process.wait(PATIENCE) == 0


def test_what_a_client_retires_during_a_reload_comes_back(tmp_path):
    with configured(tmp_path, a=MEMORY) as it:
        (tmp_path / "f.toml").unlink()
        os.mkfifo(tmp_path / "f.toml")
        it.broker.hang_up()
        for times in (2, 3):  # it finds that one is missing, and looks once more
            fifo = wait_until(lambda: open_for_writing(tmp_path / "f.toml"))
            if "a" in it.broker.entries():
                it.broker.client.retire("a", wait=True)
            os.write(fifo, b"[entry.a]\nmemfd = 4096\n")
            os.close(fifo)
            it.broker.says(DONE, times=times)
        assert it.broker.entries().keys() == {"a"}


def test_without_a_file_a_hang_up_changes_nothing(tmp_path):
    with served(tmp_path, "--memfd", "a=1") as broker:
        before = broker.inode("a")
        broker.reload("event=reload-ignored")
        assert broker.inode("a") == before


def test_a_terminal_s_hang_up_does_not_end_a_private_broker():
    with fdbroker.Broker() as broker:
        os.kill(broker.pid, signal.SIGHUP)
        broker.stats()
        assert process_state(broker.pid) != "Z"


# --- rules ---


def test_the_server_is_told_the_rules(tmp_path):
    """How many is in the log; what they mean is the server's."""
    with configured(tmp_path, a=MEMORY) as it:
        rule = "[[rule]]\neveryone = true\nverbs = ['list']\n"
        (tmp_path / "f.toml").write_text(rule * 2)
        assert "rules=2" in it.broker.reload(DONE)
        assert "f.toml:6: verbs is a list" in it.fail(rule + rule.replace("list", "steal"))
