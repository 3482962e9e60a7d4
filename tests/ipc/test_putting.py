"""Sessions that put own what is ephemeral: nothing that goes wrong in one put ends the others."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import signal
import struct
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from support import (
    BORROW,
    PUT,
    RETIRE,
    STATS,
    Raw,
    fake_broker,
    greet,
    open_files,
    stopped,
    wait_until,
)

import fdbroker
from fdbroker.errors import BrokerGone, ProtocolError
from fdbroker.ipc.client.connection import kept_until_exit

SIOCOUTQ = 0x5411


def interrupted(broker: fdbroker.Broker, put: Callable[[], object]) -> None:
    """KeyboardInterrupt while the answer to a put is waited for."""
    (session,) = broker._pool.put_sessions
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        wait_until(lambda: struct.unpack("i", fcntl.ioctl(session.link, SIOCOUTQ, bytes(4)))[0])
        signal.pthread_kill(main, signal.SIGINT)

    with stopped(broker.pid):
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            put()
        thread.join()


def test_an_interrupt_in_a_put_ends_no_other_entry(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    with broker.share(data_file) as ref, tempfile.TemporaryFile() as other:
        broker.put("mine", data_file, ephemeral=True)
        interrupted(broker, lambda: broker.share(other))
        assert list(broker._pool.put_sessions) == []  # its answer may still come
        broker.put("next", other, ephemeral=True)
        for borrow in (ref.borrow, lambda: broker.borrow("mine"), lambda: broker.borrow("next")):
            borrow().close()
        with broker.share(other) as another:
            another.borrow().close()


def test_an_interrupt_in_a_put_of_a_session_that_owns_nothing_ends_it(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("first", data_file)
    interrupted(broker, lambda: broker.share(data_file))
    assert list(broker._pool.put_sessions) == []
    assert kept_until_exit == set()
    wait_until(lambda: broker.stats()["entries"] == 1)


def test_a_putter_that_is_lost_on_its_way_lives_on(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    with broker.share(data_file) as ref:
        broker._pool.acquire_put_session()  # and an interrupt comes
        ref.borrow().close()
        assert len(kept_until_exit) == 1


def test_a_dropped_client_does_not_end_what_the_process_owns(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    fdbroker.Client(broker.address).put("mine", data_file, ephemeral=True)
    broker.borrow("mine").close()


def test_a_descriptor_that_cannot_be_sent_leaves_the_session_as_it_was(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    broker.put("mine", data_file, ephemeral=True)
    (session,) = broker._pool.put_sessions
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        session.put("gone", 0, max(open_files()) + 100)
    assert caught.value.errno == errno.EBADF
    broker.put("other", data_file)  # with the next seq
    assert list(broker._pool.put_sessions) == [session]
    broker.borrow("mine").close()


def expect_put(session: Raw) -> int:
    message, fds = session.receive()
    assert message is not None
    assert message[0] == PUT
    for number in fds:
        os.close(number)
    return int(message[1])


@pytest.mark.parametrize("owns", [True, False])
def test_a_put_that_went_wrong_is_undone(tmp_path: Path, data_file: IO[bytes], owns: bool) -> None:
    """By CANCEL where the session must live on; by its end where it need not."""
    address = str(tmp_path / "fake.sock")

    def serve(session: Raw) -> None:
        greet(session, puts=True)
        if owns:
            session.send(0, expect_put(session), 1, b"")
        seq = expect_put(session)
        session.send(0, seq, "too", "many", "fields", b"")
        if owns:
            assert session.receive() == ([4, seq + 1], [])
        assert session.receive() == (None, [])

    with fake_broker(address, serve), fdbroker.Client(address) as client:
        if owns:
            client.put("mine", data_file, ephemeral=True)
        with pytest.raises(ProtocolError):
            client.put("other", data_file)
        while kept_until_exit:
            kept_until_exit.pop().end()


def test_a_session_that_puts_is_another_than_one_that_lends(
    tmp_path: Path, data_file: IO[bytes]
) -> None:
    address = str(tmp_path / "fake.sock")

    def serve_putter(session: Raw) -> None:
        greet(session, puts=True)
        session.send(0, expect_put(session), 1, b"")
        assert session.receive() == (None, [])

    def serve_lender(session: Raw) -> None:
        greet(session)
        for verb, reply in ((STATS, [[["loans", 0]]]), (RETIRE, []), (BORROW, None)):
            message, _ = session.receive()
            assert message is not None
            assert message[0] == verb
            if reply is not None:
                session.send(0, message[1], *reply)

    with fake_broker(address, serve_putter, serve_lender), fdbroker.Client(address) as client:
        with fdbroker.Client(address) as other:
            other.put("data", data_file)
        client.stats()
        client.retire("data")
        with pytest.raises(BrokerGone):
            client.borrow("data")


def test_a_shared_fd_is_retired_though_its_client_was_closed(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    with fdbroker.Client(broker.address) as client:
        ref = client.share(data_file)
    ref.borrow().close()
    ref.close()
    ref.close()
    wait_until(lambda: broker.stats()["entries"] == 0)


def test_a_shared_fd_of_a_broker_that_has_ended_is_closed_in_silence(data_file: IO[bytes]) -> None:
    with fdbroker.Broker() as private:
        ref = private.share(data_file)
    ref.close()
    ref.close()


@pytest.mark.filterwarnings("error")
def test_an_ephemeral_entry_outlives_the_client_that_put_it(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    """It ends with the process, not when the collector comes to a client that nobody closed."""
    client = fdbroker.Client(broker.address)
    client.put("kept", data_file, ephemeral=True)
    client.borrow("kept").close()
    del client
    gc.collect()
    with broker.borrow("kept") as loan:
        os.fstat(loan.fileno())


def test_many_clients_that_own_something_share_one_session(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    """What a process owns needs a session until its end, but not one for each client."""
    before = broker.stats()["sessions"]
    for _ in range(20):
        with fdbroker.Client(broker.address) as client:
            client.share(data_file).close()
    assert len(kept_until_exit) == 1
    wait_until(lambda: broker.stats()["sessions"] == before + 1)


def test_what_was_put_is_close_on_exec_in_the_broker(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    """As all that it has is, but for the standard streams."""
    broker.put("data", data_file)
    numbers = [number for number in open_files(broker.pid) if number > 2]
    assert any(
        os.path.samestat(os.stat(f"/proc/{broker.pid}/fd/{number}"), os.fstat(data_file.fileno()))
        for number in numbers
    )
    for number in numbers:
        text = Path(f"/proc/{broker.pid}/fdinfo/{number}").read_text()
        flags = int(text.partition("flags:")[2].split()[0], 8)
        assert flags & os.O_CLOEXEC, f"{number}: {text}"
