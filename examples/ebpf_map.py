"""Four workers without privileges count in a BPF hash map that only root could have made.

Root makes the map with bpf(2), puts it into a broker, and closes it; a rule lends it to the uid of
the workers.  To make a map takes CAP_BPF where unprivileged_bpf_disabled is set, to use one only
its descriptor, since Linux 5.19.  Where bpf(2) is not permitted one line says so: status 77.
"""

import ctypes
import multiprocessing
import os
import struct
import subprocess
import sys
import tempfile

import fdbroker

UID, WORKERS, ROUNDS, NOT_PERMITTED = 65533, 4, 1000, 77
CREATE, LOOKUP, UPDATE, HASH = 0, 1, 2, 1  # enum bpf_cmd, bpf_map_type (linux/bpf.h)
BPF = {"x86_64": 321, "aarch64": 280}  # its number (asm/unistd.h)
libc = ctypes.CDLL(None, use_errno=True)
RULES = f'server.mode = "0666"\nrule = [{{uid = {UID}, names = ["counters"], verbs = ["borrow"]}}]'


def main():
    counters = bpf(CREATE, "5I", HASH, 4, 8, WORKERS, 0)  # so many bytes are a key, and a value
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)  # the workers must get to the socket
        with open(f"{folder}/fdbroker.toml", "w") as file:
            file.write(RULES)
        command = [sys.executable, "-m", "fdbroker", "serve", "--config", file.name]
        command += ["--socket", f"{folder}/socket", "--ready-fd", "1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sys.stdout) as broker:
            try:
                broker.stdout.readline()  # it is ready, or has ended
                fdbroker.attach(f"{folder}/socket")
                fdbroker.put("counters", counters)
                os.close(counters)  # or the workers would inherit it
                with multiprocessing.get_context("fork").Pool(WORKERS, maxtasksperchild=1) as pool:
                    print(*pool.imap(work, range(WORKERS)), sep="\n")
                with fdbroker.borrow("counters") as loan:
                    counts = [element(LOOKUP, loan.fileno(), key) for key in range(WORKERS)]
            finally:
                broker.terminate()
    print(f"what uid {UID} has counted, as uid {os.getuid()} reads it: {counts}")
    sys.exit(counts != [ROUNDS] * WORKERS)


def work(key):
    os.setgroups([]), os.setgid(UID), os.setuid(UID)
    with fdbroker.borrow("counters") as loan:
        for count in range(1, ROUNDS + 1):
            element(UPDATE, loan.fileno(), key, count)
    try:
        fdbroker.borrow("secrets")
    except fdbroker.errors.NotPermitted as error:
        return f"key {key} was counted to {ROUNDS}; {error}"


def element(command, counters, key, value=0):
    key, value = ctypes.c_uint32(key), ctypes.c_uint64(value)
    bpf(command, "I4x3Q", counters, *map(ctypes.addressof, (key, value)), 0)
    return value.value


def bpf(command, layout, *attributes):
    data = struct.pack(layout, *attributes)
    result = libc.syscall(BPF[os.uname().machine], command, data, len(data))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


if __name__ == "__main__":
    try:
        main()
    except PermissionError as error:
        print(f"bpf(2) is not permitted here: {error}")
        sys.exit(NOT_PERMITTED)
