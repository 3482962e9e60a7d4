"""What an FD promises, asked of the kernel; with its lock-free slot and with the guarded one."""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import support

import fdbroker.rc
from fdbroker.errors import (
    ClosedFDError,
    CloseTimeout,
    MultipleInitError,
    ReferencedFDError,
    StolenFDError,
    UnbalancedDecrefError,
    UninitializedFDError,
)

from . import kit


@pytest.fixture(scope="module", params=["lock-free", "guarded"])
def rc(request: pytest.FixtureRequest) -> Any:
    return fdbroker.rc if request.param == "lock-free" else kit.guarded()


@pytest.fixture
def pipe() -> Iterator[kit.Pipe]:
    with kit.Pipe() as pipe:
        yield pipe


def refused_soon(fd: Any) -> None:
    """Until another thread has retired it."""
    while True:
        try:
            fd.incref()
        except ClosedFDError:
            return
        fd.decref()


# --- init


def test_the_identity_of_a_descriptor_tells_device_inode_and_type() -> None:
    """Many file systems number their inodes alike: the roots of /proc and /sys are both 1."""
    roots = [os.open(path, os.O_PATH) for path in ("/proc", "/sys")]
    reader, writer = os.pipe()
    try:
        assert os.fstat(roots[0]).st_ino == os.fstat(roots[1]).st_ino
        assert fdbroker.rc.identity(roots[0]) != fdbroker.rc.identity(roots[1])
        assert fdbroker.rc.identity(reader) == fdbroker.rc.identity(writer)
        assert fdbroker.rc.identity(reader) & 15 == stat.S_IFIFO >> 12
        assert fdbroker.rc.identity(roots[0]) & 15 == stat.S_IFDIR >> 12
    finally:
        for number in (*roots, reader, writer):
            os.close(number)


def test_init_then_use(rc: Any, pipe: kit.Pipe) -> None:
    fd = rc.FD()
    fd.init(pipe.write)
    with fd.use() as sysfd:
        assert sysfd == pipe.write
    assert not pipe.ended()
    fd.close()
    assert pipe.ended()
    assert not kit.is_open(pipe.write)


def test_the_constructor_adopts(rc: Any, pipe: kit.Pipe) -> None:
    fd = rc.FD(pipe.write)
    assert fd.incref() == pipe.write
    fd.decref()
    fd.close()
    assert pipe.ended()


def test_a_second_init_leaves_the_number_to_the_caller(rc: Any, pipe: kit.Pipe) -> None:
    fd = rc.FD(pipe.write)
    other = os.dup(pipe.read)
    with pytest.raises(MultipleInitError) as raised:
        fd.init(other)
    assert raised.value.sysfd == other
    fd.close()
    assert kit.is_open(other)
    os.close(other)


def test_a_second_init_is_told_so_also_with_a_number_that_is_no_descriptor(
    rc: Any, pipe: kit.Pipe
) -> None:
    fd = rc.FD(pipe.write)
    with pytest.raises(MultipleInitError):
        fd.init(1 << 20)
    fd.close()


def test_init_after_close(rc: Any, pipe: kit.Pipe) -> None:
    fd = rc.FD(pipe.write)
    fd.close()
    with pytest.raises(ClosedFDError):
        fd.init(pipe.read)
    assert kit.is_open(pipe.read)


def test_init_after_retire(rc: Any, pipe: kit.Pipe) -> None:
    fd = rc.FD(pipe.write)
    with fd.use():
        fd.retire()
        with pytest.raises(ClosedFDError):
            fd.init(pipe.read)


@pytest.mark.parametrize("number", [-1, 1 << 20])
def test_a_number_that_is_no_descriptor_is_not_adopted(rc: Any, number: int) -> None:
    fd = rc.FD()
    with pytest.raises(OSError, match="Bad file descriptor") as raised:
        fd.init(number)
    assert raised.value.errno == errno.EBADF
    assert repr(fd) == "<FD uninitialized, 0 references>"


def test_a_negative_number_is_not_adopted_with_a_close_of_its_own_either(rc: Any) -> None:
    """It would be taken for a retired FD's."""
    fd = rc.FD()
    with pytest.raises(OSError, match="Bad file descriptor") as raised:
        fd.init(-1, pytest.fail)
    assert raised.value.errno == errno.EBADF
    assert repr(fd) == "<FD uninitialized, 0 references>"


def test_number_0_is_one_like_any_other(rc: Any) -> None:
    """A daemon that has closed its standard input gets it for what it opens next."""
    closed: list[int] = []
    fd = rc.FD(0, closed.append)
    with pytest.raises(MultipleInitError):
        fd.init(1, pytest.fail)
    with fd.use() as sysfd:
        assert sysfd == 0
        fd.retire()
        assert repr(fd) == "<FD 0 retired, 1 reference>"
        assert not closed
    assert closed == [0]


def test_to_wait_for_a_live_one_does_not_close_it(rc: Any) -> None:
    closed: list[int] = []
    for number in (0, 1):
        fd = rc.FD(number, closed.append)
        with pytest.raises(CloseTimeout):
            fd.wait_closed(0)
        assert not closed
        assert fd.detach() == number


def test_number_0_is_detached_tracked_and_collected_like_any_other(rc: Any) -> None:
    closed: list[int] = []
    fd = rc.FD(0, closed.append)
    registry = rc.LifetimeRegistry()
    fd.track_lifetime(registry)
    assert registry.stats().initialized == 1
    assert fd.detach() == 0
    fd = rc.FD(0, closed.append)
    with pytest.warns(ResourceWarning, match="unclosed <FD 0, 0 references>"):
        del fd
    assert closed == [0]


def test_of_many_threads_one_adopts(rc: Any) -> None:
    fd = rc.FD()
    numbers = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]
    start, refused = threading.Barrier(len(numbers)), []

    def adopt(number: int) -> None:
        start.wait()
        try:
            fd.init(number)
        except MultipleInitError as error:
            refused.append(error.sysfd)

    threads = [threading.Thread(target=adopt, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == len(numbers) - 1
    with fd.use() as sysfd:
        assert {sysfd, *refused} == set(numbers)
    fd.close()
    for number in refused:
        os.close(number)


# --- references


def test_use_before_init(rc: Any) -> None:
    fd = rc.FD()
    with pytest.raises(UninitializedFDError), fd.use():
        pass
    with pytest.raises(UninitializedFDError):
        fd.incref()
    assert fd.refs == 0


def test_use_after_close(rc: Any, pipe: kit.Pipe) -> None:
    fd = rc.FD(pipe.write)
    fd.close()
    with pytest.raises(ClosedFDError), fd.use():
        pass
    with pytest.raises(ClosedFDError):
        fd.incref()
    assert fd.refs == 0


def test_the_callers_error_comes_through_use(rc: Any, pipe: kit.Pipe) -> None:
    fd = rc.FD(pipe.write)
    mine = RuntimeError("mine")
    with pytest.raises(RuntimeError) as raised, fd.use():
        raise mine
    assert raised.value is mine
    assert fd.refs == 0
    fd.close()


def test_uses_nest_and_are_counted(rc: Any, pipe: kit.Pipe) -> None:
    fd = rc.FD(pipe.write)
    with fd.use(), fd.use():
        assert fd.refs == 2
        fd.incref()
        assert fd.refs == 3
        fd.decref()
    assert fd.refs == 0
    fd.close()


def test_one_decref_too_many(rc: Any, pipe: kit.Pipe) -> None:
    fd = rc.FD()
    with pytest.raises(UnbalancedDecrefError):
        fd.decref()
    fd.init(pipe.write)
    for _ in range(3):
        with pytest.raises(UnbalancedDecrefError):
            fd.decref()
    with fd.use():
        assert fd.refs == 1
    assert kit.is_open(pipe.write)
    fd.close()
    assert pipe.ended()
    for _ in range(3):
        with pytest.raises(UnbalancedDecrefError):
            fd.decref()
    assert fd.refs == 0


# --- the end


def test_close_before_init(rc: Any) -> None:
    fd = rc.FD()
    for end in (fd.close, fd.retire, fd.wait_closed, fd.detach):
        with pytest.raises(UninitializedFDError):
            end()


def test_a_second_close(rc: Any, pipe: kit.Pipe) -> None:
    closes: list[int] = []
    fd = rc.FD(pipe.write, lambda sysfd: (closes.append(sysfd), os.close(sysfd)))
    fd.close()
    for end in (fd.close, fd.retire, fd.detach):
        with pytest.raises(ClosedFDError):
            end()
    assert closes == [pipe.write]


def test_retire_never_waits_and_the_last_decref_closes(rc: Any, pipe: kit.Pipe) -> None:
    fd = rc.FD(pipe.write)
    told: list[OSError | None] = []
    fd.incref()
    fd.incref()
    fd.retire(told.append)
    with pytest.raises(ClosedFDError):
        fd.incref()
    with pytest.raises(ClosedFDError):
        fd.retire(told.append)
    with pytest.raises(ClosedFDError):
        fd.close()
    fd.decref()
    assert not pipe.ended()
    assert not told
    assert not fd.closed
    fd.decref()
    assert pipe.ended()
    assert told == [None]
    assert fd.closed
    assert fd.refs == 0


def test_on_closed_comes_after_the_close(rc: Any, pipe: kit.Pipe) -> None:
    fd = rc.FD(pipe.write)
    seen: list[bool] = []
    fd.retire(lambda _: seen.append(pipe.ended()))
    assert seen == [True]


def test_an_exception_of_on_closed_comes_out_of_who_closes(rc: Any, pipe: kit.Pipe) -> None:
    fd = rc.FD(pipe.write)
    fd.incref()

    def on_closed(error: OSError | None) -> None:
        raise LookupError("mine")

    fd.retire(on_closed)
    waiter = threading.Thread(target=fd.wait_closed)
    waiter.start()
    with pytest.raises(LookupError, match="mine"):
        fd.decref()
    waiter.join()
    assert pipe.ended()


def test_close_gives_up_and_the_last_decref_still_closes(rc: Any, pipe: kit.Pipe) -> None:
    fd = rc.FD(pipe.write)
    fd.incref()
    for timeout in (0, -1, 0.01):
        with pytest.raises(CloseTimeout) as raised:
            fd.close(timeout) if timeout == 0 else fd.wait_closed(timeout)
        assert isinstance(raised.value, TimeoutError)
        assert raised.value.data == (timeout, 1)
    assert not fd._waiters  # who gave up left nothing behind
    with pytest.raises(ClosedFDError):
        fd.incref()
    assert not pipe.ended()
    fd.decref()
    assert pipe.ended()
    fd.wait_closed(0)


@pytest.mark.parametrize("waits", ["close", "wait_closed"])
def test_the_last_decref_wakes_who_waits(rc: Any, pipe: kit.Pipe, waits: str) -> None:
    fd = rc.FD(pipe.write)
    fd.incref()
    ended: list[bool] = []

    def wait() -> None:
        getattr(fd, waits)()
        ended.append(pipe.ended())

    count = 1 if waits == "close" else 5
    threads = [threading.Thread(target=wait) for _ in range(count)]
    for thread in threads:
        thread.start()
    if waits == "wait_closed":
        fd.retire()
    refused_soon(fd)
    fd.decref()
    for thread in threads:
        thread.join()
    assert ended == [True] * len(threads)


def test_a_keyboard_interrupt_ends_the_wait_and_not_the_close(rc: Any, pipe: kit.Pipe) -> None:
    """One that comes just before the wait begins is seen with the next signal: any one will do."""
    fd = rc.FD(pipe.write)
    fd.incref()
    main, ended = threading.main_thread().ident or 0, threading.Event()

    def interrupt() -> None:
        refused_soon(fd)
        signal.pthread_kill(main, signal.SIGINT)
        while not ended.wait(0.01):
            signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        fd.close()
    ended.set()
    thread.join()
    signal.signal(signal.SIGUSR1, before)
    assert not pipe.ended()
    fd.decref()
    assert pipe.ended()


def test_a_failing_close(rc: Any) -> None:
    def close(sysfd: int) -> None:
        raise OSError(errno.EIO, "the disk said no")

    fd = rc.FD(7, close)
    with pytest.raises(OSError, match="the disk said no"):
        fd.close()
    with pytest.raises(OSError, match="the disk said no"):
        fd.wait_closed()
    assert fd.closed
    with pytest.raises(ClosedFDError):
        fd.close()
    told: list[OSError | None] = []
    fd = rc.FD(7, close)
    with fd.use():
        fd.retire(told.append)
    (error,) = told
    assert error is not None
    assert error.errno == errno.EIO


def test_a_close_that_raises_what_it_must_not(rc: Any) -> None:
    told: list[OSError | None] = []
    fd = rc.FD(7, {}.__getitem__)
    fd.retire(told.append)
    assert fd.closed
    assert isinstance(told[0], OSError)
    assert "KeyError(7)" in str(told[0])


def test_the_number_was_closed_by_somebody_else(rc: Any, pipe: kit.Pipe) -> None:
    fd = rc.FD(pipe.write)
    os.close(pipe.write)
    with pytest.raises(OSError, match="Bad file descriptor") as raised:
        fd.close()
    assert raised.value.errno == errno.EBADF
    assert fd.closed


def test_a_number_that_is_free_is_not_closed(rc: Any, pipe: kit.Pipe, monkeypatch: Any) -> None:
    """Another thread may open something under it in the next instant."""
    closed: list[int] = []
    fd = rc.FD(pipe.write)
    os.close(pipe.write)
    monkeypatch.setattr(rc, "close_func", closed.append)
    with pytest.raises(OSError, match="Bad file descriptor"):
        fd.close()
    assert not closed
    assert fd.closed


class Big:
    """Something that one would not want to be kept alive by an error."""


@pytest.mark.parametrize("fails", ["close", "on_closed"])
def test_an_error_keeps_nothing_alive(rc: Any, fails: str) -> None:
    def fail(_: object) -> None:
        raise OSError(errno.EIO, "the disk said no")

    def in_a_block() -> weakref.ref[Big]:
        big = Big()
        fd = rc.FD(7, fail if fails == "close" else id)
        kept.append(fd)
        with contextlib.suppress(OSError):
            fd.retire(fail if fails == "on_closed" else None)
        return weakref.ref(big)

    kept: list[Any] = []
    gc.disable()  # the frames of who closed are let go of at once, not at the next collection
    try:
        assert in_a_block()() is None
    finally:
        gc.enable()
    assert kept[0].closed


def test_a_stolen_number_is_left_alone(rc: Any, pipe: kit.Pipe) -> None:
    fd = rc.FD(pipe.write)
    with kit.Pipe() as other:
        os.dup2(other.write, pipe.write)  # closes it, and makes the number another descriptor
        os.close(other.write)
        with pytest.raises(StolenFDError) as raised:
            fd.close()
        assert raised.value.sysfd == pipe.write
        assert fd.closed
        assert not other.ended()
        os.close(pipe.write)
        assert other.ended()


def test_a_stolen_number_is_told_to_on_closed(rc: Any, tmp_path: Any) -> None:
    first = os.open(tmp_path / "a", os.O_CREAT)
    second = os.open(tmp_path / "b", os.O_CREAT)
    told: list[OSError | None] = []
    fd = rc.FD(first)
    os.dup2(second, first)
    fd.retire(told.append)
    assert [type(error) for error in told] == [StolenFDError]
    os.close(first)
    os.close(second)


def test_anonymous_inodes_are_unknown_and_close(rc: Any) -> None:
    first, second = os.eventfd(0), os.eventfd(0)
    fd = rc.FD(first)
    os.dup2(second, first)
    fd.close()
    assert not kit.is_open(first)
    os.close(second)


def test_close_of_its_own(rc: Any) -> None:
    """A handle that fstat knows nothing of, above what an int of C holds."""
    handle, closed = 0xFFFF_FFFF_FFFF, []
    fd = rc.FD(handle, closed.append)
    with fd.use() as given:
        assert given == handle
        fd.retire()
        assert repr(fd) == f"<FD {handle} retired, 1 reference>"
        assert not closed
    assert closed == [handle]


def test_close_func_is_what_closes(rc: Any, pipe: kit.Pipe, monkeypatch: Any) -> None:
    closed: list[int] = []
    fd = rc.FD(pipe.write)
    monkeypatch.setattr(rc, "close_func", closed.append)
    fd.close()
    assert closed == [pipe.write]
    assert not pipe.ended()
    os.close(pipe.write)


# --- detach


def test_detach_gives_the_number_away(rc: Any, pipe: kit.Pipe) -> None:
    fd = rc.FD(pipe.write)
    waiter = threading.Thread(target=fd.wait_closed)
    waiter.start()
    assert fd.detach() == pipe.write
    waiter.join()
    assert fd.closed
    assert repr(fd) == "<FD detached, 0 references>"
    for refused in (fd.incref, fd.close, fd.retire, fd.detach):
        with pytest.raises(ClosedFDError):
            refused()
    fd.wait_closed()
    del fd
    assert not pipe.ended()
    os.close(pipe.write)
    assert pipe.ended()


def test_detach_wants_no_references(rc: Any, pipe: kit.Pipe) -> None:
    fd = rc.FD(pipe.write)
    with fd.use(), fd.use():
        with pytest.raises(ReferencedFDError) as raised:
            fd.detach()
        assert raised.value.refs == 2
    with fd.use() as sysfd:
        assert sysfd == pipe.write
        fd.retire()
        with pytest.raises(ClosedFDError):
            fd.detach()
    assert pipe.ended()


def interposed(rc: Any, number: int, *meanwhile: Callable[[Any], object]) -> Any:
    """An FD for whose references another thread does one thing after the other, each right after
    they were counted."""
    todo = list(meanwhile)

    class Interposed(rc.FD):
        __slots__ = ()

        @property
        def refs(self) -> int:
            found: int = rc.FD.refs.fget(self)
            if todo:
                todo.pop(0)(self)
            return found

    return Interposed(number)


def test_a_reference_that_comes_just_before_a_detach_stops_it(rc: Any, pipe: kit.Pipe) -> None:
    fd = interposed(rc, pipe.write, lambda fd: fd.incref())
    with pytest.raises(ReferencedFDError) as raised:
        fd.detach()
    assert raised.value.refs == 1
    assert repr(fd) == f"<FD {pipe.write}, 1 reference>"
    fd.decref()
    fd.close()
    assert pipe.ended()


def test_one_that_comes_in_the_middle_of_it_is_refused(rc: Any, pipe: kit.Pipe) -> None:
    seen: list[str] = []

    def come(fd: Any) -> None:
        with pytest.raises(ClosedFDError):
            fd.incref()
        seen.append(repr(fd))

    fd = interposed(rc, pipe.write, lambda fd: None, come)
    assert fd.detach() == pipe.write
    assert seen == ["<FD about to be detached, 0 references>"]
    os.close(pipe.write)
    assert pipe.ended()


# --- left alone


@pytest.mark.parametrize("state", ["live", "referenced", "retired"])
def test_collected_unclosed_it_closes_and_warns(rc: Any, pipe: kit.Pipe, state: str) -> None:
    fd = rc.FD(pipe.write)
    told: list[OSError | None] = []
    if state != "live":
        fd.incref()
    if state == "retired":
        fd.retire(told.append)
    with pytest.warns(ResourceWarning, match=f"unclosed <FD {pipe.write}"):
        del fd
    assert pipe.ended()
    assert told == ([None] if state == "retired" else [])


def test_collected_in_a_cycle_with_who_refers_to_it(rc: Any, pipe: kit.Pipe) -> None:
    class Holder:
        def __init__(self) -> None:
            self.fd = rc.FD(pipe.write)
            self.fd.incref()
            self.me = self

        def __del__(self) -> None:
            self.fd.decref()

    holder = Holder()
    del holder
    with pytest.warns(ResourceWarning):
        gc.collect()
    assert pipe.ended()


def test_what_was_closed_or_never_used_is_collected_quietly(rc: Any, pipe: kit.Pipe) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rc.FD()
        fd = rc.FD(pipe.write)
        fd.close()
        del fd
    assert not caught


def test_the_warning_names_the_line_that_lost_it(rc: Any, pipe: kit.Pipe) -> None:
    fd, line = rc.FD(pipe.write), sys._getframe().f_lineno
    with pytest.warns(ResourceWarning) as caught:
        del fd
    assert [(one.filename, one.lineno) for one in caught] == [(__file__, line + 2)]
    assert isinstance(caught[0].source, rc.FD)  # so tracemalloc can tell where it was made


def test_a_failing_close_of_a_collected_one_is_told(rc: Any, monkeypatch: Any) -> None:
    """By sys.unraisablehook: nobody else would hear of data that could not be written."""

    def close(sysfd: int) -> None:
        raise OSError(errno.EIO, "the disk said no")

    told: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda said: told.append(str(said.exc_value)))
    fd = rc.FD(7, close)
    with pytest.warns(ResourceWarning, match="unclosed"):
        del fd
    assert told == ["[Errno 5] the disk said no"]


def test_what_was_never_constructed_is_collected_quietly(rc: Any, monkeypatch: Any) -> None:
    """An interrupt may come before the first line of the constructor."""
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    fd = rc.FD.__new__(rc.FD)
    del fd
    assert not told


def test_it_closes_where_a_warning_is_an_error(pipe: kit.Pipe) -> None:
    """And at the end of the interpreter: the pipe ends, with the child or before it."""
    code = f"import fdbroker.rc; fd = fdbroker.rc.FD({pipe.write})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        pass_fds=[pipe.write],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "ResourceWarning: unclosed <FD" in done.stderr
    os.close(pipe.write)
    assert pipe.ended()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda rc, n: rc.FD(), "<FD uninitialized, 0 references>"),
        (lambda rc, n: rc.FD(n), "<FD {n}, 0 references>"),
    ],
)
def test_repr(rc: Any, pipe: kit.Pipe, make: Any, says: str) -> None:
    fd = make(rc, pipe.write)
    assert repr(fd) == says.format(n=pipe.write)
    if fd._sysfd >= 0:
        with fd.use():
            assert repr(fd) == f"<FD {pipe.write}, 1 reference>"
            fd.retire()
            assert repr(fd) == f"<FD {pipe.write} retired, 1 reference>"
        assert repr(fd) == "<FD closed, 0 references>"
    else:
        os.close(pipe.write)


@pytest.mark.parametrize("twice", [copy.copy, copy.deepcopy, pickle.dumps])
def test_there_are_never_two_of_one(rc: Any, pipe: kit.Pipe, twice: Any) -> None:
    fd = rc.FD(pipe.write)
    with pytest.raises(TypeError, match=r"cannot be copied or pickled: .* share\(\) it$"):
        twice(fd)
    fd.close()


def test_many_cost_little() -> None:
    """100,000 of them are to fit: an Event each, or a deque, would be a kilobyte."""
    numbers = [1000] * 1000
    import tracemalloc

    gc.collect()
    tracemalloc.start()
    try:
        fds = [fdbroker.rc.FD(number, int) for number in numbers]
        for fd in fds:
            with fd.use():
                pass
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    for fd in fds:
        fd.close()
    assert used / len(fds) < 320


def test_the_import_is_light() -> None:
    """`fdbroker exec` is to start in little more than bare Python takes."""
    code = "import sys, fdbroker.rc; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"dataclasses", "traceback", "inspect", "threading", "queue", "platform", "tempfile"}
    assert not heavy & set(done.stdout.split())


# --- where its lock-free order was not tested


@pytest.mark.parametrize(
    ("where", "fact", "value"),
    [
        (os, "name", "nt"),
        (os, "uname", lambda: SimpleNamespace(machine="aarch64")),
        (sys, "implementation", SimpleNamespace(**{**vars(sys.implementation), "name": "pypy"})),
        (sys, "_is_gil_enabled", lambda: False),
    ],
    ids=["windows", "aarch64", "pypy", "free-threaded"],
)
def test_elsewhere_the_slot_is_guarded(monkeypatch: Any, where: Any, fact: str, value: Any) -> None:
    assert not isinstance(kit.load(kit.SOURCE, "rc_here").FD._sysfd, property)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(where, fact, value, raising=False)
        loaded = kit.load(kit.SOURCE, "rc_elsewhere")
    assert isinstance(loaded.FD._sysfd, property)


def test_a_fork_while_another_thread_has_the_guard(pipe: kit.Pipe) -> None:
    """That thread is not in the child, to let it go."""
    guarded: Any = kit.guarded()
    fd = guarded.FD(pipe.write)
    load = guarded.FD._sysfd.fget
    lock = dict(zip(load.__code__.co_freevars, load.__closure__, strict=True))["lock"]
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with lock.cell_contents:
            held.set()
            forked.wait()

    def use_in_child() -> int:
        signal.alarm(10)
        with fd.use() as sysfd:
            return int(sysfd)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        outcome = support.start_fork(use_in_child)
    finally:
        forked.set()
        thread.join()
    assert outcome() == pipe.write
    fd.close()
