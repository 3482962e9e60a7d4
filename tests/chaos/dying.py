"""The dying: processes that are killed wherever it hurts, fork and leave, or become something else.

Each is a life: a forked child of its nurse, which lives until the point that the plan says, and
then kills itself, or is killed.  The nurse looks whether the broker has all of it back, as long as
nobody else has a copy.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from random import Random

import msgpack

import fdbroker
from fdbroker.errors import EntryRetired, UnknownEntry, UnknownTicket

from . import stage
from .actor import TOLD, Cast, die, fork, kill, pipe
from .board import WrongAnswer
from .plan import COMMON, READABLE

CAT = "/bin/cat"
FOR_EVER = 3600.0


class Dying(Cast):
    """A nurse, and the lives that are in her hands, one at a time."""

    def name(self, of: str) -> str:
        return f"dying/{self.number}/{of}"

    def life(self, run: Callable[[fdbroker.Client], None]) -> int:
        """A child that does that with a client of its own, and waits to be killed: its pid."""

        def live() -> None:
            try:
                run(fdbroker.Client(self.address))
                signal.pause()
            except BaseException as error:
                self.tell(["a life at", self.at], error)
                os._exit(TOLD)

        return fork(live)

    # --- what a nurse looks at ---

    def loans_of(self, pid: int) -> list[fdbroker.ipc.client.LoanInfo]:
        return [loan for loan in self.client.loans() if loan.pid == pid]

    def is_back(self, pid: int) -> None:
        """Whatever a process had on loan."""
        self.wait_until(lambda: not self.loans_of(pid), f"what pid {pid} had is back")

    def ends_by_itself(self, pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        self.check(
            os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            f"a life ended with status {status}",
        )
        self.is_back(pid)

    def is_killed(self, pid: int) -> None:
        kill(pid)
        self.is_back(pid)

    def clear_away(self) -> None:
        """What a life has put and left behind."""
        mine = f"dying/{self.number}/"

        def is_clear() -> bool:
            found = [entry for entry in self.client.entries() if entry.name.startswith(mine)]
            for entry in found:
                if not entry.retired:
                    with contextlib.suppress(UnknownEntry):  # it has just ended by itself
                        self.client.retire(entry.name)
            return not found

        self.wait_until(is_clear, f"what a life put is closed: {mine}")

    # --- steps ---

    def holding(self, what: str, names: list[str], common: str, ms: float) -> None:
        """Dies while it has something."""

        def live(client: fdbroker.Client) -> None:
            if what in ("shared", "read"):
                name, mode = (READABLE[0], "r") if what == "read" else (common, None)
                with client.borrow(name, mode=mode) as loan:
                    stage.check_looks(self.expected, name, loan.fileno())
                    self.pause(ms)
                    die()
            names_now = names[:1] if what == "turn" else names
            with (
                client.borrow_all(names_now, exclusive=True, timeout=self.patience) as loan,
                self.board.witness(names_now, exclusive=True),
            ):
                for name in names_now:
                    stage.check_looks(self.expected, name, loan.fileno(name))
                self.pause(ms)
                die()

        self.ends_by_itself(self.life(live))

    def borrowing(self, seed: int, ms: float) -> None:
        """Is killed anywhere in a loop of borrowing and returning."""

        def live(client: fdbroker.Client) -> None:
            random = Random(seed)
            while True:
                name = random.choice(COMMON)
                mode = "r" if name in READABLE and random.random() < 0.3 else None
                with client.borrow(name, mode=mode) as loan:
                    stage.check_looks(self.expected, name, loan.fileno())

        pid = self.life(live)
        self.pause(ms)
        self.is_killed(pid)

    def waiting(self, name: str, ms: float) -> None:
        """Is killed while it waits: its nurse has the turn."""

        def live(client: fdbroker.Client) -> None:
            client.borrow(name, exclusive=True, timeout=FOR_EVER)
            raise WrongAnswer(f"{name} was lent to two who exclude each other")

        with (
            self.client.borrow(name, exclusive=True, timeout=self.patience) as loan,
            self.board.witness([name], exclusive=True),
        ):
            stage.check_looks(self.expected, name, loan.fileno())
            pid = self.life(live)
            self.pause(ms)
            self.is_killed(pid)

    def putting(self, seed: int, ms: float) -> None:
        """Is killed anywhere in a loop of putting, borrowing, retiring."""

        def live(client: fdbroker.Client) -> None:
            random = Random(seed)
            while True:
                name = self.name(f"put{random.randrange(4)}")
                ephemeral = random.random() < 0.5
                fd = os.memfd_create("dying")
                client.put(name, fd, replace=True, ephemeral=ephemeral)
                os.close(fd)
                if random.random() < 0.5:
                    client.borrow(name).close()
                if random.random() < 0.5:
                    client.retire(name)

        pid = self.life(live)
        self.pause(ms)
        self.is_killed(pid)
        self.clear_away()

    def retiring(self, ms: float) -> None:
        """Is killed while it waits for a close, which its nurse holds up."""
        name = self.name("retired")
        with pipe() as (_, writer):
            self.client.put(name, writer)

        def live(client: fdbroker.Client) -> None:
            client.retire(name, wait=True)
            raise WrongAnswer(f"{name} was said to be closed, and was lent")

        with self.client.borrow(name):
            pid = self.life(live)
            self.wait_until(lambda: not self.is_live(name), f"{name} has retired")
            self.pause(ms)
            self.is_killed(pid)
        self.clear_away()

    def is_live(self, name: str) -> bool:
        return any(entry.name == name and not entry.retired for entry in self.client.entries())

    def sharing(self) -> None:
        """The ticket of who is dead is good for nothing."""
        with pipe() as (told, tell):

            def live(client: fdbroker.Client) -> None:
                fd = os.memfd_create("shared")
                ref = client.share(fd)
                ref.borrow().close()
                tell.write(ref._ticket)
                signal.pause()

            pid = self.life(live)
            tell.close()
            ticket = told.read(16)
            self.check(len(ticket) == 16, "a life could not share")
            self.client.borrow_ticket(ticket).close()
            self.is_killed(pid)

        def is_gone() -> bool:
            try:
                self.client.borrow_ticket(ticket).close()
            except (UnknownTicket, EntryRetired):
                return True
            return False

        self.wait_until(is_gone, "a ticket of the dead is unknown")

    def forking(self, name: str, ms: float) -> None:
        """Forks and dies: its child goes on with the loan."""
        with pipe() as (told, tell), pipe() as (go, let_go):

            def live(client: fdbroker.Client) -> None:
                let_go.close()
                loan, parent = client.borrow(name), os.getpid()
                if os.fork():
                    die()
                while os.getppid() == parent:
                    time.sleep(0.001)
                stage.check_looks(self.expected, name, loan.fileno())
                tell.write(b"x")
                go.read(1)
                stage.check_looks(self.expected, name, loan.fileno())
                die()

            pid = self.life(live)
            tell.close()
            os.waitpid(pid, 0)
            self.check(told.read(1) == b"x", "a forked child lost the loan of its parent")
            self.pause(ms)
            self.check(self.loans_of(pid), "a loan was taken back while a child had it")
            let_go.close()
            self.check(told.read(1) == b"", "a child did not end")
        self.is_back(pid)

    def passing(self, name: str, ms: float) -> None:
        """Gives its loan to a program, and dies."""
        with pipe() as (stdin, let_go):

            def live(client: fdbroker.Client) -> None:
                let_go.close()
                loan = client.borrow(name)
                with subprocess.Popen([CAT], stdin=stdin, pass_fds=loan.pass_fds()):
                    die()

            pid = self.life(live)
            os.waitpid(pid, 0)
            stdin.close()
            self.pause(ms)
            self.check(self.loans_of(pid), "a loan was taken back while a program had it")
            let_go.close()
        self.is_back(pid)

    def executing(self, names: list[str], exclusive: bool) -> None:
        """Becomes another program, which gets nothing: so all is back, though the pid lives on."""
        with pipe() as (stdin, let_go), pipe() as (told, tell):

            def live(client: fdbroker.Client) -> None:
                let_go.close()
                loan = client.borrow_all(names, exclusive=exclusive, timeout=self.patience)
                os.dup2(stdin.fileno(), 0)
                tell.write(b"x")
                with loan:
                    os.execv(CAT, [CAT])

            pid = self.life(live)
            tell.close()
            self.check(told.read(2) == b"x", "a life got no loan")
            self.is_back(pid)
            let_go.close()
            stdin.close()
            _, status = os.waitpid(pid, 0)
            self.check(status == 0, f"a program ended with status {status}")

    def greeting(self, after: str) -> None:
        """Dies in the first words that it says."""

        def live(client: fdbroker.Client) -> None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.connect(self.address)
            hello = msgpack.packb([0, 0, 1, False])
            if after == "half":
                sock.send(hello[:2])
            elif after != "nothing":
                sock.send(hello)
            if after == "borrow":
                sock.send(msgpack.packb([1, 1, COMMON[0], 0, None, ""]))
            die()

        self.ends_by_itself(self.life(live))
