"""Real servers behind a lent socket, stopped and started anew, and no connection is refused."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import PATIENCE, process_state, stopped, wait_until

import fdbroker
from cli.load import Load

HERE = Path(__file__).parent
RESTARTS = 5
COMMANDS = {
    "uvicorn": ("--fd web", "uvicorn web_app:asgi --fd {web} --log-level warning"),
    "hypercorn": ("--fd web", "hypercorn web_app:asgi --bind fd://{web} --log-level warning"),
    "gunicorn": ("--fd web --listen-fds", "gunicorn web_app:wsgi --workers 2 --log-level warning"),
    "nginx": ("--fd web,nonblocking", "env NGINX={web}; nginx -p {folder} -c {folder}/nginx.conf"),
}
STOP = {"nginx": signal.SIGQUIT}  # gracefully (nginx(8)); the others: SIGTERM
NGINX = """
daemon off;
user root;
worker_processes 2;
pid nginx.pid;
error_log stderr error;
events {{ }}
http {{
    access_log off;
    client_body_temp_path temp1;
    proxy_temp_path temp2;
    fastcgi_temp_path temp3;
    uwsgi_temp_path temp4;
    scgi_temp_path temp5;
    server {{
        listen {where};
        location / {{ return 200 $pid; }}
    }}
}}
"""


class Site:
    """A listening socket that a broker keeps as "web", and the server that is to answer there."""

    def __init__(self, broker: fdbroker.Broker, server: str, kind: str, folder: Path) -> None:
        self.broker, self.server, self.folder = broker, server, folder
        self.family = socket.AF_INET if kind == "tcp" else socket.AF_UNIX
        with socket.socket(self.family) as listener:
            listener.bind(("127.0.0.1", 0) if kind == "tcp" else str(folder / "web.sock"))
            listener.listen(socket.SOMAXCONN)
            self.address: Any = listener.getsockname()
            broker.put("web", listener)
        where = f"127.0.0.1:{self.address[1]}" if kind == "tcp" else f"unix:{self.address}"
        (folder / "nginx.conf").write_text(NGINX.format(where=where))

    @contextlib.contextmanager
    def running(self, group: int | None = 0) -> Iterator[subprocess.Popen[bytes]]:
        """The server, behind exec; killed with its process group at the end of the block."""
        wanted, command = COMMANDS[self.server]
        words = [word.replace("{folder}", str(self.folder)) for word in command.split()]
        if self.server != "nginx":
            words[0] = str(Path(sys.executable).parent / words[0])
        start = [sys.executable, "-m", "fdbroker", "exec", "--socket", self.broker.address]
        process = subprocess.Popen(
            [*start, *wanted.split(), "--", *words],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])},
            process_group=group,
        )
        try:
            yield process
        finally:
            process.kill()
            if group is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE)

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """Gracefully, and wait for its end."""
        process.send_signal(STOP.get(self.server, signal.SIGTERM))
        process.wait(PATIENCE)

    def pids(self) -> set[int]:
        return {loan.pid for loan in self.broker.loans("web")}


@pytest.fixture
def site(request: pytest.FixtureRequest, broker: fdbroker.Broker, tmp_path: Path) -> Site:
    server, kind = request.param
    if server == "nginx" and shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    return Site(broker, server, kind, tmp_path)


def answers(load: Load, server: int) -> bool:
    """Whether it, or a child of it, has answered."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    return not load.pids.keys().isdisjoint({server, *map(int, children)})


@pytest.mark.parametrize(
    "site",
    [
        *((server, "tcp") for server in COMMANDS),
        *(pytest.param((server, "unix"), marks=pytest.mark.long) for server in COMMANDS),
    ],
    indirect=True,
    ids="-".join,
)
def test_restarts_refuse_no_connection(site: Site) -> None:
    """Stopped, waited for, started anew: whoever connects meanwhile waits for the new one."""
    (before,) = site.broker.entries()
    started: list[int] = []
    with contextlib.ExitStack() as servers, Load(site.family, site.address) as load:
        for restarts_left in reversed(range(1 + RESTARTS)):
            process = servers.enter_context(site.running())
            started.append(process.pid)
            wait_until(lambda pid=process.pid: answers(load, pid))
            assert site.pids() == {process.pid}
            if restarts_left:
                site.stop(process)
                wait_until(lambda: not site.pids())
                # nobody serves now, and all clients have connected all the same
                wait_until(lambda: all(load.connected))
    assert len(set(started)) == 1 + RESTARTS
    print(site.server, dict(load.outcomes), f"longest wait {load.longest:.3f} s")
    assert load.outcomes["refused"] == 0
    assert load.outcomes["succeeded"] > 4 * RESTARTS
    # what a server has accepted when it is told to stop is its own to answer; most drop some of it
    assert load.outcomes.keys() <= {"succeeded", "refused", "reset"}
    assert load.outcomes["reset"] <= len(load.connected) * RESTARTS
    (after,) = site.broker.entries()
    assert after.generation == before.generation


@pytest.mark.parametrize("site", [("gunicorn", "tcp")], indirect=True, ids="-".join)
def test_a_killed_master_keeps_its_loan_until_the_last_worker_has_gone(site: Site) -> None:
    # not in a group of its own: the kernel continues the stopped ones of a group whose last tie to
    # another one is cut (setpgid(2), orphaned process groups), and here they are to stay stopped
    with site.running(group=None) as master:

        def workers() -> list[int]:
            children = Path(f"/proc/{master.pid}/task/{master.pid}/children").read_text()
            return [int(pid) for pid in children.split() if process_state(int(pid)) in "RSD"]

        wait_until(lambda: len(workers()) == 2)
        with Load(site.family, site.address, clients=1) as load:
            wait_until(lambda: load.pids)
        first, second = workers()
        with contextlib.ExitStack() as still:  # a worker that is without its master ends by itself
            for worker in (first, second):
                still.enter_context(stopped(worker))
            master.kill()
            master.wait(PATIENCE)
            for worker in (first, second):
                site.broker.put("witness", 0)  # the broker has seen what was before that
                site.broker.retire("witness", wait=True, timeout=PATIENCE)
                assert site.pids() == {master.pid}, f"the loan went before worker {worker}"
                os.kill(worker, signal.SIGKILL)
            still.pop_all()
        wait_until(lambda: not site.pids())
