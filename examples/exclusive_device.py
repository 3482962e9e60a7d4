"""One serial port, two programs: they take turns, and who has to wait is told for whom.

The port is a pty; a modem at its other end answers each line.  It is open nowhere but at a broker,
which lends it exclusively.  First both ask a hundred things each, and get their own answers.  Then
one keeps it and is killed: so the other, told whom it waits for, has its turn.  If not: status 1.
"""

import os
import signal
import threading
import tty
from contextlib import suppress
from multiprocessing import get_context

import fdbroker


def modem(end):
    with suppress(OSError), open(end, "r+b", buffering=0) as line:  # EIO: the port is closed
        for words in line:
            line.write(b"OK " + words)


def ask(words):
    with fdbroker.borrow("port", exclusive=True) as loan, loan.open("r+b", buffering=0) as port:
        port.write(f"{words}\n".encode())
        return port.readline() == f"OK {words}\n".encode()


def take_turns(pipe, me):
    pipe.send(sum(ask(f"question {number} of {me}") for number in range(100)))


def keep(pipe):
    with fdbroker.borrow("port", exclusive=True, purpose="firmware update"):
        pipe.send(os.getpid())
        signal.pause()  # in the middle of it


def dial(pipe):
    try:
        fdbroker.borrow("port", exclusive=True, timeout=0.5)
    except fdbroker.errors.BorrowTimeout as busy:
        pipe.send(busy)
    pipe.send(ask("dial"))


def start(program, *arguments):
    ours, theirs = get_context("spawn").Pipe()
    get_context("spawn").Process(target=program, args=(theirs, *arguments), daemon=True).start()
    return ours


def show(claim, holds):
    print(f"  {'ok' if holds else 'FAILED'}: {claim}", flush=True)
    if not holds:
        raise SystemExit(1)


if __name__ == "__main__":
    end, port = os.openpty()
    tty.setraw(port)
    threading.Thread(target=modem, args=(end,), daemon=True).start()
    with fdbroker.Broker() as broker:
        broker.put("port", port)
        os.close(port)
        os.environ["FDBROKER_SOCKET"] = broker.address  # where the programs look for it
        right = [pipe.recv() for pipe in [start(take_turns, me) for me in ("one", "other")]]
        show(f"both had their turns, and their own answers: {right}", right == [100, 100])
        pid, (loan,) = start(keep).recv(), broker.loans("port")
        show(f"pid {pid} keeps the port: {loan.purpose}", loan.pid == pid)
        other = start(dial)
        busy = other.recv()
        show(f"the other is told: {busy}", [holder[0] for holder in busy.holders] == [pid])
        while not (broker.stats()["waiting"] or other.poll(0.01)):
            pass
        show("it waits", not other.poll())
        os.kill(pid, signal.SIGKILL)
        show(f"pid {pid} is killed, and it has its turn", other.poll(30) and other.recv())
