"""retire --wait: for whom it waits, as they go; its timeout; Ctrl-C; on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
from contextlib import ExitStack, suppress
from typing import IO

import pytest
from support import Peer, hold, let_go, wait_until

import fdbroker
from fdbroker.cli import status
from fdbroker.cli.holders import ERASE_LINE
from fdbroker.errors import UnknownEntry

from .kit import command, complaint, ended, put_memory, start, succeeds, words


def is_retired(broker: fdbroker.Broker, generation: int) -> bool:
    """Whether nobody can borrow that entry any more."""
    return not any(e.generation == generation and not e.retired for e in broker.entries())


def is_gone(broker: fdbroker.Broker, generation: int) -> bool:
    return not any(entry.generation == generation for entry in broker.entries())


def stderr_of(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stderr is not None
    return process.stderr


def name_yourself(name: str) -> None:
    """proc(5), /proc/pid/comm."""
    with open("/proc/self/comm", "w") as file:
        file.write(name)


def test_without_wait_it_is_silent_and_waits_for_nobody(broker: fdbroker.Broker) -> None:
    generation = put_memory(broker)
    with broker.borrow("data"):
        assert succeeds(broker, "retire", "data") == ""
        assert is_retired(broker, generation)
        assert not is_gone(broker, generation)
        with pytest.raises(UnknownEntry):
            broker.borrow("data")
    wait_until(lambda: is_gone(broker, generation))


def test_with_wait_and_without_loans_it_is_silent(broker: fdbroker.Broker) -> None:
    for wait in (["--wait"], ["--wait", "5"], ["--wait", "inf"], ["--wait", "0"]):
        generation = put_memory(broker)
        if wait != ["--wait", "0"]:  # which may be over before the close
            assert succeeds(broker, "retire", "data", *wait) == ""
            assert is_gone(broker, generation)
        else:
            command(broker, "retire", "data", *wait)
            wait_until(lambda generation=generation: is_gone(broker, generation))


def test_three_holders_leave_one_after_another(broker: fdbroker.Broker) -> None:
    generation = put_memory(broker)
    with ExitStack() as stack:
        peers = [stack.enter_context(Peer()) for _ in range(3)]
        for number, peer in enumerate(peers):
            peer.call(name_yourself, f"server {number}")
            peer.call(hold, broker.address, "data")
        peers[0].call(hold, broker.address, "data")  # twice: it is one that is waited for
        process = stack.enter_context(ended(start(broker, "retire", "data", "--wait")))
        for left in range(3):
            who = ", ".join(
                f"pid {peer.pid} (server {number})"
                for number, peer in enumerate(peers)
                if number >= left
            )
            assert stderr_of(process).readline() == f"fdbroker: data: waiting for {who}\n"
            assert process.poll() is None
            peers[left].call(let_go)
        assert process.communicate() == ("", "")
        assert process.returncode == status.DONE
    assert is_gone(broker, generation)


def test_of_many_holders_some_are_named(broker: fdbroker.Broker) -> None:
    put_memory(broker)
    with ExitStack() as stack:
        peers = [stack.enter_context(Peer()) for _ in range(10)]
        for peer in peers:
            peer.call(hold, broker.address, "data")
        process = stack.enter_context(ended(start(broker, "retire", "data", "--wait")))
        line = stderr_of(process).readline()
        for peer in peers:
            peer.call(let_go)
        process.communicate()
    assert line.count("pid ") == 8
    assert line.endswith(", and 2 more\n")


def test_a_weird_holder(broker: fdbroker.Broker, peer: Peer) -> None:
    put_memory(broker)
    peer.call(name_yourself, "\x1b[31mred\n")
    peer.call(hold, broker.address, "data")
    with ended(start(broker, "retire", "data", "--wait")) as process:
        line = stderr_of(process).readline()
        assert line == f"fdbroker: data: waiting for pid {peer.pid} (\\x1b[31mred\\n)\n"
        peer.call(let_go)
        assert process.communicate() == ("", "")


def test_who_has_what_took_the_name_is_not_waited_for(broker: fdbroker.Broker, peer: Peer) -> None:
    old = put_memory(broker)
    peer.call(hold, broker.address, "data")
    with Peer() as other, ended(start(broker, "retire", "data", "--wait")) as process:
        assert f"waiting for pid {peer.pid}" in stderr_of(process).readline()
        new = put_memory(broker)
        other.call(hold, broker.address, "data")
        with Peer() as third:
            third.call(hold, broker.address, "data")
            third.call(let_go)
        peer.call(let_go)
        assert process.communicate() == ("", ""), "it speaks of others"
        assert (process.returncode, is_gone(broker, old)) == (status.DONE, True)
        assert not is_retired(broker, new)
        other.call(let_go)


def test_the_time_is_over(broker: fdbroker.Broker, peer: Peer) -> None:
    generation = put_memory(broker)
    peer.call(hold, broker.address, "data")
    done = command(broker, "retire", "data", "--wait", "0.6")
    assert done.returncode == status.TIMED_OUT
    waiting, over = done.stderr.splitlines()
    assert f"waiting for pid {peer.pid}" in waiting
    assert over.startswith('fdbroker: "data" is retired, but after 0.6')
    assert " 1 loan is out: the last return closes it, fdbroker loans data names" in over
    assert is_retired(broker, generation)
    peer.call(let_go)
    wait_until(lambda: is_gone(broker, generation))


def test_ctrl_c_ends_only_the_wait(broker: fdbroker.Broker, peer: Peer) -> None:
    generation = put_memory(broker)
    peer.call(hold, broker.address, "data")
    with ended(start(broker, "retire", "data", "--wait")) as process:
        assert "waiting for" in stderr_of(process).readline()
        process.send_signal(signal.SIGINT)
        output, said = process.communicate()
    assert process.returncode == status.INTERRUPTED
    assert (output, said) == (
        "",
        'fdbroker: interrupted: "data" is retired all the same, its last return closes it\n',
    )
    assert is_retired(broker, generation)
    assert not is_gone(broker, generation)
    peer.call(let_go)
    wait_until(lambda: is_gone(broker, generation))


def test_ctrl_c_while_the_broker_does_not_answer(broker: fdbroker.Broker, peer: Peer) -> None:
    """A second one is enough."""
    put_memory(broker)
    peer.call(hold, broker.address, "data")
    with ended(start(broker, "retire", "data", "--wait")) as process:
        assert "waiting for" in stderr_of(process).readline()
        os.kill(broker.pid, signal.SIGSTOP)
        try:
            process.send_signal(signal.SIGINT)
            wait_until(lambda: _interrupted_again(process))
        finally:
            os.kill(broker.pid, signal.SIGCONT)
        assert process.communicate() == ("", "")
        assert process.returncode in (status.INTERRUPTED, -signal.SIGINT), "at its very end"
    peer.call(let_go)


def _interrupted_again(process: subprocess.Popen[str]) -> bool:
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.5)
    return process.poll() is not None


def test_on_a_terminal_one_line_is_written_over(broker: fdbroker.Broker) -> None:
    put_memory(broker)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
    with Peer() as one, Peer() as other:
        one.call(hold, broker.address, "data")
        other.call(hold, broker.address, "data")
        process = subprocess.Popen(words(broker.address, "retire", "data", "--wait"), stderr=theirs)
        os.close(theirs)
        with process:
            seen = _read_until(ours, f"pid {one.pid}")
            one.call(let_go)
            seen += _read_until(ours, f"pid {other.pid}")
            other.call(let_go)
            seen += _read_until(ours, None)
    os.close(ours)
    assert process.returncode == status.DONE
    assert "\n" not in seen
    first, second, nothing = seen.removeprefix(ERASE_LINE).split(ERASE_LINE)
    assert first.startswith(f"data: waiting for pid {one.pid}")
    assert second.startswith(f"data: waiting for pid {other.pid}")
    assert max(len(first), len(second)) < 30, "it would go on in the next line"
    assert nothing == ""


def _read_until(terminal: int, text: str | None) -> str:
    """What appears until `text` does, or until the end."""
    seen = ""
    while text is None or text not in seen:
        try:
            read = os.read(terminal, 1000)
        except OSError:  # EIO: nobody has the other end
            read = b""
        if not read:
            assert text is None, seen
            break
        seen += read.decode()
    return seen


def test_nobody_reads_for_whom_it_waits(broker: fdbroker.Broker, peer: Peer) -> None:
    generation = put_memory(broker)
    peer.call(hold, broker.address, "data")
    reader, writer = os.pipe()
    os.close(reader)
    with ended(start(broker, "retire", "data", "--wait", stderr=writer)) as process:
        os.close(writer)
        wait_until(lambda: is_retired(broker, generation))
        wait_until(lambda: broker.stats()["sessions"] == 4)  # ours, the peer's, who waits, who asks
        peer.call(let_go)
        process.wait(20)
    assert process.returncode == status.DONE


def test_a_name_that_is_mistyped_retires_nothing(broker: fdbroker.Broker) -> None:
    put_memory(broker)
    assert "no entry" in complaint(command(broker, "retire", "date"), status.NO_ENTRY)
    succeeds(broker, "retire", "data", "--wait", "20")
