"""fd_leak_check, as pytest in another process reports it: what leaks is named, the rest is not.

What a test is to leave open it adds to a global list, `kept`.
"""

from __future__ import annotations

import re

import pytest

LEAKS = {  # what a test may leave open, what is said of it, whether it is known where
    "file": ('open("data")', r"file /\S+/data", True),
    "unlinked file": ("unlinked()", r"file /\S+/gone \(deleted\)", True),
    "temporary file": ("tempfile.NamedTemporaryFile()", r"file /\S+", True),
    "nameless file": ("tempfile.TemporaryFile()", r"file /\S+ \(deleted\)", True),
    "file by its number": ('os.open("link", os.O_RDONLY)', r"file /\S+/data", True),
    "directory": ('os.open(".", os.O_RDONLY)', r"directory /\S+", True),
    "device": ('open("/dev/null", "wb", 0)', "character device /dev/null", True),
    "socket": ("socket.socket()", r"unconnected socket 0\.0\.0\.0:0", True),
    "listening socket": (
        'socket.create_server(("127.0.0.1", 0))',
        r"listening socket 127\.0\.0\.1:\d+",
        True,
    ),
    "unix socket": ("socket.socket(socket.AF_UNIX)", r"idle unix socket socket:\S+", True),
    "accepted socket": ("accepted()", r"stream socket 127\.0\.0\.1:\d+", True),
    "copied socket": ("os.dup(listener.fileno())", r"listening socket 127\.0\.0\.1:\d+", False),
    "pipe": ("os.pipe()", r"pipe pipe:\[\d+\]", False),
    "memfd": ('os.memfd_create("memory")', r"memfd /memfd:memory \(deleted\)", False),
    "dup": ("os.dup(file.fileno())", r"file /\S+/opened-before", False),
    "eventfd": ("os.eventfd(0)", r"eventfd anon_inode:\S+", False),
    "epoll": ("select.epoll()", "epoll anon_inode:.eventpoll.", False),
}
HEAD = """
import gc, os, select, socket, subprocess, sys, tempfile, threading
import pytest

kept = []
open("data", "w").close()
file = open("opened-before", "w")
eventfd = os.eventfd(0)
listener = socket.create_server(("127.0.0.1", 0))
if not os.path.lexists("link"):
    os.symlink("data", "link")

def unlinked():
    opened = open("gone", "w")
    os.unlink("gone")
    return opened

def accepted():
    with socket.create_connection(listener.getsockname()):
        return listener.accept()[0]
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A folder for a project; warnings are errors in it."""
    pytester.makeini("[pytest]\nfilterwarnings = error")
    return pytester


def run(project: pytest.Pytester, text: str, *options: str) -> pytest.RunResult:
    project.makepyfile(HEAD + text)
    plain = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")  # which takes long to import
    plain += ("-rN",)  # where CI is set, the summary has every message whole: all leaks twice
    return project.runpytest_subprocess(*plain, *options, timeout=60)


@pytest.mark.parametrize("name", LEAKS)
def test_what_leaks_is_named(project: pytest.Pytester, name: str) -> None:
    expression, said, known = LEAKS[name]
    result = run(project, f"def test_it(fd_leak_check):\n    kept.append({expression})\n")
    result.assert_outcomes(passed=1, errors=1)
    out = result.stdout.str()
    assert re.search(rf"^fd \d+: {said}$", out, re.M), out
    assert len(re.findall(r"^fd \d+: ", out, re.M)) == (2 if name == "pipe" else 1), out
    if known:
        assert re.search(r'File "\S+", line \d+, in test_it\n +kept\.append\(', out), out
        assert "not known" not in out
        assert "_pytest" not in out.partition("opened here")[2], "the stack is not the test's only"
    else:
        assert "where it was opened is not known" in out
        assert "opened here" not in out


def test_several_are_counted_and_the_one_that_was_closed_is_not(project: pytest.Pytester) -> None:
    text = """
def test_it(fd_leak_check):
    closed = open("data")
    kept.extend([open("/dev/null"), open("/dev/zero")])
    closed.close()
"""
    out = run(project, text).stdout.str()
    assert "this test has left 2 descriptors open" in out
    assert re.findall(r"^fd \d+: (.*)$", out, re.M) == [
        "character device /dev/null",
        "character device /dev/zero",
    ]


def test_a_path_that_was_opened_in_two_places_shows_both(project: pytest.Pytester) -> None:
    text = """
def one():
    kept.append(open("data"))

def other():
    open("data").close()

def test_it(fd_leak_check):
    one()
    other()
"""
    out = run(project, text).stdout.str()
    assert len(re.findall("opened here, maybe:", out)) == 2
    assert re.findall(r'"\S+", line \d+, in (one|other)', out) == ["other", "one"]


def test_a_number_that_is_used_again_is_seen(project: pytest.Pytester) -> None:
    text = """
def test_it(fd_leak_check):
    number = file.fileno()
    file.close()
    kept.append(os.open("/dev/null", os.O_RDONLY))
    assert kept == [number]
"""
    result = run(project, text)
    result.assert_outcomes(passed=1, errors=1)
    assert "character device /dev/null" in result.stdout.str()


CLEAN = """
def test_files_and_sockets(fd_leak_check, tmp_path):
    with open(tmp_path / "new", "w") as new:
        new.write("x")
    assert accepted().close() is None
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)

def test_a_file_that_was_open_already_is_renamed(fd_leak_check):
    os.rename("opened-before", "renamed")

def test_a_cycle_that_is_not_collected_yet(fd_leak_check, request):
    class Owner:
        def __init__(self):
            self.number, self.me = os.dup(0), self
        def __del__(self):
            os.close(self.number)
    request.addfinalizer(gc.enable)
    gc.disable()
    Owner()

def test_captured_output(capfd, fd_leak_check):
    os.write(1, b"written")
    assert capfd.readouterr().out == "written"

def test_captured_output_for_the_test_only(fd_leak_check, capfd):
    with capfd.disabled():
        os.write(1, b"written")

def test_a_process(fd_leak_check):
    assert subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True).stdout == b"1\\n"

def test_a_thread_that_closes_while_it_is_looked_at(monkeypatch):
    from fdbroker import leaks
    opened, go = threading.Event(), threading.Event()
    def have_open():
        with open("data"):
            opened.set()
            go.wait()
    with leaks.LeakCheck() as check:
        thread = threading.Thread(target=have_open)
        thread.start()
        opened.wait()
        monkeypatch.setattr(leaks, "sleep", lambda seconds: go.set() or thread.join())
        assert check.leaks() == []
        assert not thread.is_alive()

def test_what_a_broker_is_asked_with_stays(fd_leak_check, lent_socket):
    with lent_socket.borrow():
        assert len(lent_socket.broker.loans()) == 1

def test_shared_memory_and_its_tracker(fd_leak_check):
    from multiprocessing import shared_memory
    memory = shared_memory.SharedMemory(create=True, size=100)
    memory.close()
    memory.unlink()

def test_a_fork_server(fd_leak_check):
    import multiprocessing
    process = multiprocessing.get_context("forkserver").Process(target=int)
    process.start()
    process.join()
    process.close()

def test_asyncio(fd_leak_check):
    import asyncio
    asyncio.run(asyncio.sleep(0))

@pytest.fixture
def opened():
    with open("data") as opened:
        yield opened

def test_a_fixture_before(opened, fd_leak_check):
    pass

def test_a_fixture_after(fd_leak_check, opened):
    pass

@pytest.fixture(scope="session")
def for_the_session():
    with open("data") as opened:
        yield opened

def test_a_fixture_of_the_session(fd_leak_check, for_the_session):
    pass

def test_what_is_meant_to_stay(fd_leak_check):
    reader, writer = os.pipe()
    kept.append(open("data"))
    fd_leak_check.keep(kept[0])
    fd_leak_check.keep(reader)
    fd_leak_check.keep(writer)

def test_what_the_hook_cannot_note_goes_on(fd_leak_check, tmp_path, monkeypatch):
    import _socket
    _socket.socket().close()  # which can have no weak reference
    sys.audit("open", "of another form")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError) as failure:
        open("data")
    assert failure.value.filename == "data"  # and not the working directory
"""


def test_nothing_is_said_of_a_clean_test(project: pytest.Pytester) -> None:
    result = run(project, CLEAN)
    result.assert_outcomes(passed=CLEAN.count("\ndef test_"))


def test_a_loan_that_was_not_closed_is_a_leak(project: pytest.Pytester) -> None:
    text = """
def test_it(fd_leak_check, lent_socket_factory):
    kept.append(lent_socket_factory().borrow())
"""
    out = run(project, text).stdout.str()
    kinds = re.findall(r"^fd \d+: (.*) 127\.0\.0\.1:\d+$", out, re.M)
    assert kinds == ["listening socket"] * 2, out  # the socket itself, and what was borrowed


def test_what_has_the_number_of_one_that_was_to_stay_is_a_leak(project: pytest.Pytester) -> None:
    text = """
import os

def test_it(fd_leak_check):
    opened = open("data")
    fd_leak_check.keep(opened)
    number = opened.fileno()
    opened.close()
    reader, writer = os.pipe()
    os.close(writer)
    assert reader == number
"""
    result = run(project, text)
    result.assert_outcomes(passed=1, errors=1)


def test_a_test_that_raised_is_not_blamed_for_what_its_traceback_keeps(
    project: pytest.Pytester,
) -> None:
    text = """
def test_it(fd_leak_check):
    opened = open("data")
    raise ValueError

def test_skipped(fd_leak_check):
    opened = open("data")
    pytest.skip()
"""
    run(project, text, "-W", "ignore").assert_outcomes(failed=1, skipped=1)


def test_it_can_be_asked_for_all_tests(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nusefixtures = fd_leak_check")
    text = """
def test_leak():
    kept.append(open("data"))

def test_clean():
    pass

def test_other_leak():
    kept.append(open("data"))
"""
    result = run(pytester, text)
    result.assert_outcomes(passed=3, errors=2)


def test_nothing_is_heard_between_checks(project: pytest.Pytester) -> None:
    text = """
from fdbroker import leaks

def test_with(fd_leak_check):
    assert leaks._listening is fd_leak_check._openings

def test_without():
    assert leaks._hooked
    assert leaks._listening is None
"""
    run(project, text).assert_outcomes(passed=2)
