"""A process that does what a test tells it, one piece of code after the other.

A test in this folder is about what processes see of each other: so it needs processes that hold a
loan, wait, die, fork, at the instant that the test says.  A `Puppet` is one: `do` runs code in it
and gives back the value, or raises what it raised; `begin` and `result` are the two halves of
that.  `fork` gives the puppet's own forked child, which lives on when its parent is killed.

Run as a program this file is the other end.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import textwrap
from typing import Any

PATIENCE = 60.0  # seconds until a test gives up on what never comes
HERE = os.path.dirname(os.path.abspath(__file__))


def is_served(address: str) -> bool:
    """Whether somebody listens there: a socket file is there before that."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        return sock.connect_ex(address) == 0


class Process:
    """Another process, held by its pidfd: its pid cannot become somebody else's meanwhile."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    def signal(self, number: int) -> None:
        signal.pidfd_send_signal(self._pidfd, number)

    def gone(self, seconds: float = 0.0) -> bool:
        """Whether it has ended; waits for that at most so long."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def descriptors(self) -> list[str]:
        """What its descriptors are, sorted."""
        from support import open_files

        return sorted(open_files(self.pid).values())

    def cpu_seconds(self) -> float:
        from support import cpu_seconds

        return cpu_seconds(self.pid)

    def close(self) -> None:
        os.close(self._pidfd)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Puppet(Process):
    """The end of the strings that a test pulls."""

    def __init__(self, *, arguments: tuple[str, ...] = ("-W", "error"), **how: Any) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [sys.executable, *arguments, os.path.join(HERE, "puppet.py"), str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                **how,
            )
        super().__init__(self._process.pid)

    @classmethod
    def _forked(cls, pid: int, control: socket.socket) -> Puppet:
        self = cls.__new__(cls)
        self._control, self._process = control, None
        Process.__init__(self, pid)
        return self

    def begin(self, code: str) -> None:
        self._control.send(textwrap.dedent(code).strip().encode())

    def answered(self, seconds: float = 0.0) -> bool:
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def result(self, seconds: float = PATIENCE) -> Any:
        assert self.answered(seconds), f"no answer from the puppet within {seconds} s"
        answer = self._control.recv(1 << 20)
        assert answer, "the puppet is gone"
        good, value = pickle.loads(answer)
        if not good:
            raise value
        return value

    def do(self, code: str) -> Any:
        """Run the code (an expression: its value, which must pickle)."""
        self.begin(code)
        return self.result()

    def fork(self) -> Puppet:
        """A child of it, forked there and then, with all that it knows."""
        pid = self.do("fork()")
        _, fds, _, _ = socket.recv_fds(self._control, 1, 1)
        return Puppet._forked(pid, socket.socket(fileno=fds[0]))

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self.gone(PATIENCE)
        if self._process is not None:
            self._process.wait()

    def end(self) -> int:
        """Let it come to the end of its program: the exit status (a forked one's is unknown)."""
        self._control.shutdown(socket.SHUT_RDWR)
        if self._process is None:
            assert self.gone(PATIENCE)
            return 0
        return self._process.wait(PATIENCE)

    def close(self) -> None:
        if not self.gone():
            self.kill()
        elif self._process is not None:
            self._process.wait()
        self._control.close()
        super().close()


def _play(control: socket.socket) -> None:
    """The other end: run what comes, until nothing more can come."""

    def fork() -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if pid := os.fork():
            theirs.close()
            children.append(ours)
            return pid
        control.close()
        ours.close()
        _play(theirs)
        os._exit(0)

    children: list[socket.socket] = []
    scope: dict[str, Any] = {"fork": fork, "os": os}
    exec("import gc, signal, socket, sys, threading, time, warnings, fdbroker", scope)
    if _scopes:
        scope = _scopes[-1] | {"fork": fork}
    _scopes.append(scope)
    while code := control.recv(1 << 20).decode():
        try:
            try:
                program = compile(code, "<puppet>", "eval")
            except SyntaxError:
                program = compile(code, "<puppet>", "exec")
            answer = pickle.dumps((True, eval(program, scope)))
        except BaseException as error:
            answer = pickle.dumps((False, error))
        control.send(answer)
        for child in children:
            socket.send_fds(control, [b"c"], [child.fileno()])
            child.close()
        children.clear()


_scopes: list[dict[str, Any]] = []

if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.dirname(HERE)))
    with socket.socket(fileno=int(sys.argv[1])) as the_control:
        os.set_inheritable(the_control.fileno(), False)
        _play(the_control)
