"""Numpy arrays in shared memory that no process owns: they outlive whoever made them.

A producer has the broker keep two arrays and is killed (SIGKILL) before the first consumer starts.
Consumers change the one, in turns; the kernel lets nobody change the other, which is sealed.  What
is retired is gone when the last process lets go.  If any of this does not hold: status 1.
"""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from fcntl import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SHRINK, F_SEAL_WRITE, fcntl
from glob import glob
from signal import SIGKILL

import numpy

import fdbroker

COUNT = 4 << 20  # numbers of 8 bytes: 32 MiB
SUM = COUNT * (COUNT - 1) // 2


def produce(address):
    for name, seals in (("array", 0), ("sealed", F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK)):
        memory = os.memfd_create(f"{name} {address}", os.MFD_ALLOW_SEALING)
        os.write(memory, numpy.arange(COUNT))
        fcntl(memory, F_ADD_SEALS, seals)
        fdbroker.Client(address).put(name, memory)
    os.kill(os.getpid(), SIGKILL)


def double(name):
    with fdbroker.borrow(name, exclusive=True) as loan:
        numbers = numpy.frombuffer(loan.mmap(), int)
        numbers *= 2
        return int(numbers.sum())


def users(memfd):
    """The pids of the processes that have it open or mapped."""
    pids = set()
    for link in glob("/proc/[0-9]*/fd/*") + glob("/proc/[0-9]*/map_files/*"):
        with suppress(OSError):
            if memfd in os.readlink(link):
                pids.add(int(link.split("/")[2]))
    return pids


def show(claim, holds):
    print(f"  {'ok' if holds else 'FAILED'}: {claim}", flush=True)
    if not holds:
        raise SystemExit(1)


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with fdbroker.Broker() as broker:
        producer = context.Process(target=produce, args=(broker.address,))
        producer.start()
        producer.join()
        show(f"the producer's exit code is {producer.exitcode}", producer.exitcode == -SIGKILL)
        with ProcessPoolExecutor(4, context, fdbroker.attach, (broker.address,)) as consumers:
            sums = sorted(consumers.map(double, ["array"] * 4))
            show(f"each consumer doubled it: {sums}", sums == [SUM * n for n in (2, 4, 8, 16)])
            error = consumers.submit(double, "sealed").exception()
            show(f"but not the sealed one: {error!r}", isinstance(error, PermissionError))
        with broker.borrow("array") as loan, broker.borrow("sealed", mode="r") as sealed:
            memory = loan.mmap()  # keeps the loan until it is unmapped
            sums = [int(numpy.frombuffer(m, int).sum()) for m in (memory, sealed.mmap())]
            show(f"both as another process sees them: {sums}", sums == [SUM * 16, SUM])
        broker.retire("array")
        pids, deadline = users(f"array {broker.address}"), time.monotonic() + 10
        show(f"retired, but in use by {pids}", pids == {broker.pid, os.getpid()})
        memory.close()
        while pids and time.monotonic() < deadline:  # the broker closes after the last return
            pids = users(f"array {broker.address}")
        show(f"unmapped: in use by {pids or 'nobody'}", not pids)
