"""A web server is stopped and started anew under load, and no connection is refused.

Four clients ask without pause and never retry.  Meanwhile the server is stopped, waited for, and
started anew, five times: behind one socket that a broker lends to each, then with a socket of its
own each, then lent again, but with the old one stopped once the new one answers.  Status 1 if a
lent socket refused anybody, or if so few were refused without that the load was too thin.
"""

import argparse
import importlib.util
import os
import socket
import subprocess
import sys

from load import OUTCOMES, Load

import fdbroker

RESTARTS, LEAST_REFUSED = 5, 100
HERE = os.path.dirname(os.path.abspath(__file__))
SERVERS = {"uvicorn": ["--fd={web}"], "hypercorn": ["--bind=fd://{web}"], "gunicorn": []}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", choices=SERVERS, default="uvicorn")
    server = parser.parse_args().server
    if importlib.util.find_spec(server) is None:
        sys.exit(f"{server} is not installed: pip install {server}")
    app = "web_app:" + ("wsgi" if server == "gunicorn" else "asgi")
    run = [sys.executable, "-m", server, app, "--log-level=error"]
    with fdbroker.Broker() as broker, socket.create_server(("127.0.0.1", 0)) as listener:
        broker.put("web", listener)
        lent = listener.getsockname()[1]
        borrow = f"-m fdbroker exec --socket {broker.address} --fd web --listen-fds --".split()
        run_lent = [sys.executable, *borrow, *run, *SERVERS[server]]
        with socket.create_server(("127.0.0.1", 0)) as free:
            own = free.getsockname()[1]
        run_own = [*run, f"--port={own}" if server == "uvicorn" else f"--bind=127.0.0.1:{own}"]
        print(f"{server:24}" + "".join(f"{word:>10}" for word in OUTCOMES), "    stall  pids")
        refused = restarts("lent", lent, run_lent)
        control = restarts("its own, for comparison", own, run_own)
        refused += restarts("lent, overlapping", lent, run_lent, overlap=True)
    sys.exit(refused > 0 or control < LEAST_REFUSED)


def restarts(title, port, command, overlap=False):
    """Start the server and restart it under load; how many connections were refused."""
    load, servers = Load(port), []
    try:
        servers.append(subprocess.Popen(command, cwd=HERE))
        load.wait_for_a_new_answer()
        with load:
            for _ in range(RESTARTS):
                if not overlap:
                    stop(servers[-1])
                servers.append(subprocess.Popen(command, cwd=HERE))
                load.wait_for_a_new_answer()
                if overlap:
                    stop(servers[-2])
    finally:
        for server in servers:
            stop(server)
    pids = len({server.pid for server in servers})
    counts = "".join(f"{load.outcomes[outcome]:10}" for outcome in OUTCOMES)
    print(f"{title:24}{counts}{load.longest_stall:8.2f} s{pids:6}", flush=True)
    return load.outcomes["refused"]


def stop(server):
    server.terminate()
    server.wait()


if __name__ == "__main__":
    main()
