"""Broker: a private broker process, for as long as a ``with`` block runs.

The broker is a process of its own, the same program as ``fdbroker serve``, and it belongs to the
process that made it: it watches the pidfd of this owner, so it ends however the owner ends, even
while a forked worker of the owner lives on.  Descriptors that are still lent then stay valid at the
borrowers, since the kernel counts them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from typing import NoReturn

from fdbroker.descriptors import wait_readable
from fdbroker.errors import BrokerStartError
from fdbroker.ipc.client.client import Client, forget_client_at
from fdbroker.ipc.client.pool import disconnect_all

START_SECONDS = 30.0
END_SECONDS = 5.0  # for the process to end, after the drain


class Broker(Client):
    """A broker process and the client of it, in a private folder.

    ``with fdbroker.Broker() as broker:`` gives all that `Client` has, and `address`, which other
    processes need (`fdbroker.attach`).  At the end of the block the broker lends nothing new, waits
    at most `drain` seconds for the loans, and ends.  It does not wait for loans of the owner, since
    the owner is busy waiting; they keep their descriptors until they are closed.  Raises
    `BrokerStartError`, OSError.
    """

    def __init__(self, *, drain: float = 10.0) -> None:
        self._owner_pid = os.getpid()
        self._drain = drain
        # Both have their names before either exists, so an interrupt at any point finds them.
        self._folder = os.path.join(tempfile.gettempdir(), f"fdbroker-{os.urandom(8).hex()}")
        self._process = subprocess.Popen.__new__(subprocess.Popen)
        super().__init__(os.path.join(self._folder, "broker.sock"))
        try:
            os.mkdir(self._folder, mode=0o700)
            self._start()
        except BaseException:
            self._kill()
            raise

    @property
    def pid(self) -> int:
        """The process id of the broker."""
        return self._process.pid

    def _start(self) -> None:
        """Start the broker and wait until it serves.

        Signals are blocked while descriptors and the process are made: the exception of a signal
        handler could come before their numbers are noted.  (If there are other threads, one of them
        may take the signal, and Python raises the exception here all the same: then such a number
        is lost.)
        """
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        ready = told = owner = -1
        try:
            try:
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
                ready, told = os.pipe()
                owner = os.pidfd_open(self._owner_pid)
                self._spawn(told, owner)
            finally:
                _close(told)
                _close(owner)
                signal.pthread_sigmask(signal.SIG_SETMASK, signals)
            self._wait_until_ready(ready)
        finally:
            _close(ready)

    def _spawn(self, told: int, owner: int) -> None:
        package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        environment = dict(os.environ)
        # A package that is installed is found without this.
        if os.path.basename(package) not in ("site-packages", "dist-packages"):
            path = [package, *filter(None, [environment.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(path)
        self._process.__init__(  # type: ignore[misc]
            # With -P the current folder is no place to import from.
            [
                *(sys.executable, "-P", "-m", "fdbroker", "serve"),
                *("--socket", self.address, "--drain", str(self._drain)),
                *("--ready-fd", str(told), "--owner-fd", str(owner)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a reader of the owner's output must see its end
            pass_fds=(told, owner),
            env=environment,
            process_group=0,  # Ctrl-C is for the owner, which then ends the broker
        )

    def _wait_until_ready(self, ready: int) -> None:
        """Wait for the newline in the pipe `ready`; `BrokerStartError` if none comes in time."""
        if wait_readable(ready, START_SECONDS):
            if os.read(ready, 1):
                return
            # The pipe has ended.  Wait for the status of the process, which a kill might replace.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
        self._process.kill()
        raise BrokerStartError(self._process.wait())

    def close(self) -> None:
        """End the broker, as the end of the block does; a forked child ends only its sessions."""
        super().close()
        if os.getpid() != self._owner_pid:
            self._process.returncode = 0  # a child of another process, so there is no wait for it
            return
        forget_client_at(self.address)
        disconnect_all(self.address)
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(self._drain + END_SECONDS)
            except subprocess.TimeoutExpired:
                self._kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _kill(self) -> None:
        """End the broker at once, and remove its folder."""
        if getattr(self._process, "pid", None) is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Broker:
        return self

    def __del__(self) -> None:
        process: subprocess.Popen[bytes] | None = self.__dict__.get("_process")
        if process is None or getattr(process, "pid", None) is None:  # its start was interrupted
            return
        if process.returncode is not None:
            return
        if os.getpid() != self._owner_pid:
            process.returncode = 0  # this is a forked child's copy
            return
        try:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
        finally:
            # When its owner exits, the broker waits for the loans and ends by itself.
            if not sys.is_finalizing():
                self._kill()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a broker cannot be copied or pickled: attach() to its address")


def _close(number: int) -> None:
    if number >= 0:
        os.close(number)
