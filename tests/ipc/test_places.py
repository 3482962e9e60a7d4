"""KeyboardInterrupt at each place, one after the other, of what a client does for its loans."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from places import Tracer, every_place
from support import open_files, wait_until

import fdbroker
from fdbroker.ipc.client import fork

CLIENT = str(Path(fork.__file__).parents[1])  # the code that is interrupted, with its transport


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt within a finalizer goes nowhere: that is meant here."""
    hook = sys.unraisablehook

    def pass_over(found: sys.UnraisableHookArgs) -> None:
        if not isinstance(found.exc_value, KeyboardInterrupt):
            hook(found)

    monkeypatch.setattr(sys, "unraisablehook", pass_over)


@contextlib.contextmanager
def another_thread() -> Iterator[None]:
    """The process has several threads meanwhile, so it cares for forks."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def copies(file: IO[bytes]) -> int:
    """How many descriptors of this process lead to the file."""
    return list(open_files().values()).count(os.readlink(f"/proc/self/fd/{file.fileno()}"))


def test_an_interrupted_put_leaves_no_gap_and_ends_no_other_entry(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    with broker.share(data_file) as ref:

        def act(tracer: Tracer) -> None:
            with tracer.running():
                broker.put("new", data_file)
            broker.put("next", data_file, replace=True)
            ref.borrow().close()
            with contextlib.suppress(fdbroker.errors.UnknownEntry):
                broker.retire("new")

        assert every_place(CLIENT, act) >= 20
    assert copies(data_file) == 1


@pytest.mark.usefixtures("unraisable")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("threads", [0, 1])
def test_a_loan_whose_finalizer_is_interrupted_leaves_no_descriptor(
    broker: fdbroker.Broker, data_file: IO[bytes], threads: int
) -> None:
    broker.put("data", data_file)

    def act(tracer: Tracer) -> None:
        loan = broker.borrow("data")
        file = loan.open("rb")
        with tracer.running():
            del loan
        del file
        gc.collect()
        fork.run_deferred()
        assert copies(data_file) == 1

    with another_thread() if threads else contextlib.nullcontext():
        assert every_place(CLIENT, act) >= 10
    wait_until(lambda: broker.stats()["loans"] == 0)


@pytest.mark.usefixtures("unraisable")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_interrupted_return_spoils_no_session_of_another(
    broker: fdbroker.Broker, data_file: IO[bytes], threads: int, wrapped: bool
) -> None:
    """What is in the pool again is another's, and is not ended because of the interrupt."""
    broker.put("data", data_file)

    def act(tracer: Tracer) -> None:
        loan = broker.borrow("data")
        file = loan.open("r+b") if wrapped else None
        if file is not None:
            file.write(b"\0")
        with tracer.running():
            loan.close()
        if threads:  # else there is nobody to whom it would matter, and it is replaced
            assert all(not session.closed for session in broker._pool.idle)
        del loan, file
        gc.collect()
        assert copies(data_file) == 1

    with another_thread() if threads else contextlib.nullcontext():
        assert every_place(CLIENT, act) >= 5
    wait_until(lambda: broker.stats()["loans"] == 0)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of write(2)")
def test_ctrl_c_while_a_close_flushes_returns_the_loan(broker: fdbroker.Broker) -> None:
    """The pipe is full, so the flush waits; the user does not."""
    reader, writer = os.pipe()
    broker.put("pipe", writer)
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    os.close(writer)
    loan = broker.borrow("pipe")
    file = loan.open("wb")
    file.write(b"late")
    main = threading.main_thread()
    assert main.ident is not None

    def interrupt() -> None:
        wait_until(
            lambda: Path(f"/proc/self/task/{os.getpid()}/syscall").read_text().startswith("1 ")
        )  # write(2)
        signal.pthread_kill(main.ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        loan.close()
    thread.join()
    wait_until(lambda: broker.stats()["loans"] == 0)
    del file
    broker.retire("pipe", wait=True)
    os.set_blocking(reader, False)
    while os.read(reader, 65536):  # to its end: nobody has the other end any more
        pass
    os.close(reader)
