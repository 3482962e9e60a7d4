"""Worker pools of the standard library, in all start methods: they borrow, die, and fail."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import IO

import pool_kit as kit
import pytest
import support
from pool_kit import KINDS, METHODS, Kind, workers

import fdbroker
from fdbroker import errors

every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
# 3.12 warns of every fork in a process with threads; a pool that replaces a worker does just that
forks_in_a_thread = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


# --- borrowing in a worker ---


@every_kind
def test_a_worker_borrows_by_ticket(
    kind: Kind, broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    content, file = data_file.read(), os.fstat(data_file.fileno())
    with broker.share(data_file) as ref:
        data_file.close()
        with workers(kind, 2) as pool:
            answers = [pool.begin(kit.look_by_ref, ref, file) for _ in range(4)]
            for found in [answer() for answer in answers]:
                assert found == (found.pid, 0, 1, 0, content)
                assert found.pid != os.getpid()
    assert kit.descriptors_on(file) == 0


@every_kind
def test_a_worker_borrows_by_name(
    kind: Kind, broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    content, file = data_file.read(), os.fstat(data_file.fileno())
    broker.put("pool/data", data_file)
    data_file.close()
    with workers(kind, 2, fdbroker.attach, broker.address) as pool:
        found = pool.call(kit.look_by_name, "pool/data", file)
        assert found == (found.pid, 0, 1, 0, content)


@every_kind
def test_a_ticket_that_nobody_uses_costs_nothing(
    kind: Kind, broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    with broker.share(data_file) as ref, workers(kind, 1) as pool:
        pool.call(kit.count_files)
        sessions, files = broker.stats()["sessions"], pool.call(kit.count_files)
        assert pool.call(kit.count_files, [ref] * 100) == files
        assert broker.stats()["sessions"] == sessions


@every_kind
def test_a_worker_that_borrows_often_keeps_no_descriptor(
    kind: Kind, broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    with broker.share(data_file) as ref, workers(kind, 1) as pool:
        after_one, after_all = pool.call(kit.borrow_often, ref, 50)
        assert after_all == after_one


@every_kind
def test_only_the_owner_of_a_ticket_retires_it(
    kind: Kind, broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    file = os.fstat(data_file.fileno())
    with workers(kind, 1) as pool:
        with broker.share(data_file) as ref:
            pool.call(kit.close_ref, ref)
            assert pool.call(kit.look_by_ref, ref, file).during >= 1
        with pytest.raises(errors.UnknownTicket):
            pool.call(kit.look_by_ref, ref, file)


# --- the end of a worker is a return ---


@forks_in_a_thread
@every_kind
def test_a_killed_worker_has_returned_its_loan(
    kind: Kind, broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    with broker.share(data_file) as ref, workers(kind, 1, broken=True) as pool:
        answer = pool.begin(kit.hold, ref, {"exclusive": True, "purpose": "to die with it"})
        (loan,) = support.wait_until(broker.loans)
        assert (loan.exclusive, loan.purpose) == (True, "to die with it")
        with pytest.raises(errors.BorrowTimeout) as busy:
            ref.borrow(timeout=0)
        assert [holder[0] for holder in busy.value.holders] == [loan.pid]
        os.kill(loan.pid, signal.SIGKILL)
        with ref.borrow(exclusive=True, timeout=support.PATIENCE):  # it waits for just that
            assert [loan.pid for loan in broker.loans()] == [os.getpid()]
        if kind.executor:
            with pytest.raises(BrokenProcessPool):
                answer()
        else:  # a new worker takes the place of the dead one, and borrows like it
            assert pool.call(kit.take, ref, {}) != loan.pid


@every_kind
def test_a_worker_that_ends_has_returned_its_loan(
    kind: Kind, broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    with broker.share(data_file) as ref:
        with workers(kind, 1) as pool:
            pid = pool.call(kit.take, ref, {})
            assert [loan.pid for loan in broker.loans()] == [pid]
        support.wait_until(lambda: not broker.loans())


@forks_in_a_thread
@pytest.mark.parametrize("dies", [False, True], ids=["returns", "dies"])
@every_kind
def test_the_last_worker_closes_what_was_retired(
    kind: Kind, dies: bool, broker: fdbroker.Broker
) -> None:
    """The reader of a pipe sees end-of-file when the last write end is closed, and not before."""
    reader, writer = os.pipe()
    ended = select.poll()
    ended.register(reader, select.POLLHUP)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reader)
        with broker.share(writer) as ref:
            os.close(writer)
            first = stack.enter_context(workers(kind, 1))
            last = stack.enter_context(workers(kind, 1, broken=dies))
            first.call(kit.take, ref, {})
            pid = last.call(kit.take, ref, {})
            assert len(broker.loans()) == 2
        with pytest.raises(errors.UnknownTicket):
            ref.borrow()
        first.call(kit.drop)
        support.wait_until(lambda: [loan.pid for loan in broker.loans()] == [pid])
        last.begin(kit.write_and_wait if dies else kit.write, b"still open")
        assert os.read(reader, 100) == b"still open"
        assert not ended.poll(0)
        if dies:
            os.kill(pid, signal.SIGKILL)
        else:
            last.call(kit.drop)
        assert ended.poll(support.PATIENCE * 1000)
        assert os.read(reader, 100) == b""


@pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])
@pytest.mark.parametrize("executor", [False, True], ids=["pool", "executor"])
def test_a_loan_that_is_out_while_the_pool_forks(
    exclusive: bool, executor: bool, broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    """Shared: it ends when the last of parent and workers lets go.  Exclusive: the parent's."""
    with broker.share(data_file) as ref, ref.borrow(exclusive=exclusive) as loan:
        support.kept["parent"] = loan
        try:
            with workers(Kind("fork", executor), 2) as pool:
                if exclusive:
                    with pytest.raises(errors.ForkedLoanError):
                        pool.call(kit.use_parents_loan)
                else:
                    assert pool.call(kit.use_parents_loan) == loan.fileno()
                assert len(broker.loans()) == 1
                loan.close()
                if exclusive:
                    support.wait_until(lambda: broker.loans() == [])
                else:
                    assert len(broker.loans()) == 1
        finally:
            del support.kept["parent"]
        support.wait_until(lambda: not broker.loans())


# --- what is raised in a worker ---


@every_kind
def test_errors_cross_the_pool(
    kind: Kind, broker: fdbroker.Broker, data_file: IO[bytes], tmp_path: Path
) -> None:
    broker.put("pool/data", data_file)
    nowhere = str(tmp_path / "nowhere.sock")
    with broker.share(data_file) as closed:
        pass
    with (
        broker.share(data_file) as ref,
        workers(kind, 1, fdbroker.attach, broker.address) as pool,
    ):
        with pytest.raises(errors.UnknownEntry, match=r"did you mean .pool/data") as unknown:
            pool.call(kit.raise_unknown_entry, "pool/dota")
        assert (unknown.value.name, unknown.value.nearest) == ("pool/dota", ["pool/data"])
        with pytest.raises(LookupError) as ended:
            pool.call(kit.look_by_ref, closed, os.fstat(data_file.fileno()))
        assert type(ended.value) is errors.UnknownTicket
        with ref.borrow(), pytest.raises(errors.BorrowTimeout) as busy:
            pool.call(kit.take, ref, {"exclusive": True, "timeout": 0})
        assert [holder[0] for holder in busy.value.holders] == [os.getpid()]
        with pytest.raises(errors.UnsupportedKind):
            pool.call(kit.take_pipe_read_only)
        with pytest.raises(ConnectionRefusedError, match="fdbroker serve") as none:
            pool.call(kit.connect, nowhere)
        assert type(none.value) is errors.NoBroker
        assert none.value.address == nowhere
        assert broker.loans() == []


@every_kind
def test_a_worker_that_waits_is_told_of_the_retirement(
    kind: Kind, broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    with workers(kind, 1) as pool, broker.share(data_file) as ref, ref.borrow():
        answer = pool.begin(kit.take, ref, {"exclusive": True})
        support.wait_until(lambda: broker.stats()["waiting"])
        ref.close()
        with pytest.raises(errors.EntryRetired):
            answer()


# --- many of them ---


@pytest.mark.long
@forks_in_a_thread
@pytest.mark.parametrize("method", METHODS)
def test_workers_come_and_go(method: str, broker: fdbroker.Broker, data_file: IO[bytes]) -> None:
    """Workers borrow as fast as they can and die at any moment: nothing is lost, nothing stays."""
    chance = random.Random(method)
    kind = Kind(method, executor=False)  # an executor ends with its first dead worker
    with broker.share(data_file) as ref, workers(kind, 4, broken=True) as pool:
        survivors = []
        for _ in range(300):
            seconds = chance.uniform(0, 0.2)
            dies_after = chance.choice((0, chance.uniform(0.0001, seconds)))
            answer = pool.begin(kit.churn, ref, seconds, dies_after)
            if not dies_after:
                survivors.append(answer)
        for answer in survivors:
            answer(80)
        with ref.borrow(exclusive=True, timeout=support.PATIENCE):
            assert [loan.pid for loan in broker.loans()] == [os.getpid()]
