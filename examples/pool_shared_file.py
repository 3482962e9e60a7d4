"""Eight pool workers read one file that has no name any more and that none of them ever opened.

A file of 64 MiB is opened, shared, unlinked, closed; then a pool starts, in each start method.  No
worker has a descriptor on it until it borrows one, with a ticket that came as a plain argument.
All eight have their loan at one moment; the parts they read make up the file.  If not: status 1.
"""

import hashlib
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from glob import glob

import fdbroker

WORKERS = 8
PART = 8 << 20  # bytes


def main():
    with fdbroker.Broker() as broker, tempfile.TemporaryDirectory() as folder:
        content = os.urandom(WORKERS * PART)
        with open(f"{folder}/data", "w+b", buffering=0) as data:
            data.write(content)
            file, ref = os.fstat(data.fileno()), broker.share(data)
            os.unlink(data.name)
        show(f"{file.st_size} bytes, unlinked, not open here", descriptors_on(file) == 0)
        work = partial(read_part, ref, file)
        for method in ("fork", "spawn", "forkserver"):
            context = multiprocessing.get_context(method)
            barrier = context.Barrier(WORKERS + 1, timeout=60)
            with context.Pool(WORKERS, start, (barrier,)) as pool:
                print(f"{method}, multiprocessing.Pool")
                check(broker, barrier, pool.imap(work, range(WORKERS)), content)
            with ProcessPoolExecutor(WORKERS, context, start, (barrier,)) as pool:
                print(f"{method}, ProcessPoolExecutor")
                check(broker, barrier, pool.map(work, range(WORKERS)), content)


def check(broker, barrier, answers, content):
    barrier.wait()  # for all workers to have borrowed
    lent = {loan.pid for loan in broker.loans()}
    barrier.wait()
    pids, before, parts = zip(*answers, strict=True)
    show(f"descriptors on it in each worker before it borrowed: {before}", {*before} == {0})
    show(f"the loans of one moment, by pid: {sorted(lent)}", lent == {*pids} and len(lent) == 8)
    digest, file_digest = (hashlib.sha256(d).hexdigest() for d in (b"".join(parts), content))
    show(f"SHA-256 of the parts put together, and of the file: {digest}", digest == file_digest)


def show(claim, holds):
    print(f"  {'ok' if holds else 'FAILED'}: {claim}", flush=True)
    if not holds:
        sys.exit(1)


def start(barrier):
    global everybody
    everybody = barrier


def read_part(ref, file, index):
    before = descriptors_on(file)
    with ref.borrow(purpose=f"part {index}") as loan:
        everybody.wait()  # all have borrowed
        everybody.wait()  # the parent has seen it
        return os.getpid(), before, os.pread(loan.fileno(), PART, index * PART)


def descriptors_on(file):
    links = filter(os.path.exists, glob("/proc/self/fd/*"))
    return sum(os.path.samestat(os.stat(link), file) for link in links)


if __name__ == "__main__":
    main()
