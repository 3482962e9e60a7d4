"""Broker: a private broker process, for as long as a ``with`` block runs.

It is another process, the same program as ``fdbroker serve``, and it belongs to this one: it
watches the pidfd of its owner, so it ends however the owner ends, even while a forked worker of
the owner lives on.  What is still lent then stays valid at the borrowers, as the kernel has it.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

from fdbroker.errors import BrokerStartError
from fdbroker.ipc.client import Client

if TYPE_CHECKING:
    pass

START_SECONDS = 30.0
END_SECONDS = 5.0  # beside the drain, for the process to end


class Broker(Client):
    """A broker process and the client of it, in a private folder.

    ``with fdbroker.Broker() as broker:`` gives all that `Client` has, and `address`, which other
    processes need (`fdbroker.attach`).  The end of the block: no new borrow, a wait for the loans
    of at most `drain` seconds, then the end.  Raises `BrokerStartError`, OSError.
    """

    def __init__(self, *, drain: float = 10.0) -> None:
        self._owner_pid = os.getpid()
        self._drain = drain
        self._folder = tempfile.mkdtemp(prefix="fdbroker-")  # 0700
        super().__init__(os.path.join(self._folder, "broker.sock"))
        try:
            self._process = self._start()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    @property
    def pid(self) -> int:
        """The process id of the broker."""
        return self._process.pid

    def _start(self) -> subprocess.Popen[bytes]:
        package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        path = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        ready, told = os.pipe()
        owner = os.pidfd_open(self._owner_pid)
        try:
            process = subprocess.Popen(
                # -P: the folder we happen to be in is no place to import from
                [
                    *(sys.executable, "-P", "-m", "fdbroker", "serve"),
                    *("--socket", self.address, "--drain", str(self._drain)),
                    *("--ready-fd", str(told), "--owner-fd", str(owner)),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(told, owner),
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
                start_new_session=True,  # Ctrl-C is for its owner, who then ends it
            )
        finally:
            os.close(told)
            os.close(owner)
        try:
            poll = select.poll()
            poll.register(ready, select.POLLIN)
            if not poll.poll(START_SECONDS * 1000) or os.read(ready, 1) != b"\n":
                process.kill()
                raise BrokerStartError(process.wait())
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            os.close(ready)
        return process

    def close(self) -> None:
        """End the broker, as the end of the block does.  In a forked child: only its sessions."""
        super().close()
        if os.getpid() != self._owner_pid:
            self._process.returncode = 0  # not this process's child, so not its to wait for
            return
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(self._drain + END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Broker:
        return self
