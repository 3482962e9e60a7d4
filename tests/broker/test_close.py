"""A close that takes long holds up nobody.

close(2) of a TCP socket with SO_LINGER waits until its peer has taken everything, here for up to
10 seconds.  Whoever makes the broker close the last copy of such a socket, by whatever way, must
not make the others wait.
"""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext

import pytest
from support import can_refuse_descriptors, open_files, stopped, wait_until

import fdbroker

from .puppet import Process, Puppet

QUICK = 1.0  # seconds; the close would take ten

SLOW_TO_CLOSE = """
    import struct
    from fdbroker.ipc.protocol.codec import *
    from fdbroker.ipc.protocol.messages import *
    server = socket.create_server(("127.0.0.1", 0))
    sock = socket.create_connection(server.getsockname())
    peer, _ = server.accept()
    server.close()
    sock.setblocking(False)
    try:
        while True:
            sock.send(b"x" * 65536)
    except BlockingIOError:
        pass
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 10))
    def linger():
        return struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
"""


@pytest.fixture
def maker(broker):
    """A process that has such a socket, `sock`; another one has its peer, which does not read."""
    with Puppet() as puppet:
        puppet.do(SLOW_TO_CLOSE)
        with puppet.fork() as reader:
            reader.do("sock.close()")
            puppet.do("peer.close()")
            puppet.do(f"client = fdbroker.Client({broker.address!r})")
            yield puppet


@pytest.fixture
def others(broker):
    """A process that borrows and asks all the time, and must never wait long."""
    with Puppet() as puppet, open(os.devnull) as null:
        broker.put("null", null)
        puppet.do(f"""
            client, stop, waits = fdbroker.Client({broker.address!r}), [], []
            def borrow_all_the_time():
                while not stop:
                    before = time.monotonic()
                    client.borrow("null").close()
                    client.stats()
                    waits.append(time.monotonic() - before)
            thread = threading.Thread(target=borrow_all_the_time)
            thread.start()
        """)
        wait_until(lambda: puppet.do("len(waits)"))
        yield puppet
        rounds = puppet.do("len(waits)")
        wait_until(lambda: puppet.do("len(waits)") > rounds + 1)
        puppet.do("stop.append(1); thread.join()")
        slowest = puppet.do("max(waits)")
        print(f"\nthe slowest borrow meanwhile took {slowest * 1000:.1f} ms")
        assert slowest < QUICK


def test_such_a_socket_is_really_slow_to_close(maker):
    """Without this the other tests would prove nothing."""
    assert maker.do("linger()") == (1, 10)
    maker.begin("sock.close()")
    assert not maker.answered(QUICK)


def test_the_final_close_switches_linger_off(broker, maker):
    maker.do("client.put('slow', sock)")
    broker.retire("slow", wait=True)
    assert maker.do("linger()")[0] == 0


def test_a_loan_that_is_out_lingers_as_its_owner_set_it(broker, maker):
    maker.do("client.put('slow', sock)")
    with broker.borrow("slow"):
        broker.retire("slow")
        assert maker.do("linger()") == (1, 10)
    wait_until(lambda: maker.do("linger()")[0] == 0)


WAYS = {
    "retire": "client.put('slow', sock); sock.close(); client.retire('slow', wait=True)",
    "the last return": """
        client.put('slow', sock)
        sock.close()
        loan = client.borrow('slow')
        client.retire('slow')
        loan.close()
    """,
    "the end of an ephemeral entry's owner": """
        client.put('slow', sock, ephemeral=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """,
    "replace": """
        client.put('slow', sock)
        sock.close()
        with open(os.devnull) as null:
            client.put('slow', null, replace=True)
    """,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_final_close_holds_up_nobody(broker, maker, others, way):
    maker.begin(WAYS[way])
    assert maker.answered(QUICK)
    wait_until(lambda: broker.stats()["jobs"] == 0, QUICK)


# What is on the way when its sender is gone has its last copy in the broker, so a process that
# breaks the rules can have the broker close it in places where nothing was to be closed.
UNASKED = {
    "with a put that is refused": "send([PUT, 1, 'null', 0], sock)",
    "with a put of a bad name": "send([PUT, 1, '!', 0], sock)",
    "twice with a put": "send([PUT, 1, 'x', 0], sock, sock)",
    "with a request that takes none": "send([STATS, 1], sock)",
    "with what is no message": "wire.sendmsg((b'no msgpack',), rights(sock))",
    "with an empty message": "wire.sendmsg((b'',), rights(sock))",
    "behind empty messages": "for _ in range(9): wire.send(b'')\nsend([PUT, 1, 'x', 0], sock)",
    "behind what is no message": "wire.send(b'no msgpack'); send([PUT, 1, 'x', 0], sock)",
    "behind a put in the same session": """
        send([PUT, 1, 'y', 0], sock)
        send([PUT, 2, 'x', 0], sock)
    """,
    "behind the end of the session": "send([STATS, 7]); send([PUT, 8, 'x', 0], sock)",
    "many, in many messages": """
        wire.send(b'no msgpack')
        for number in range(50):
            send([PUT, number, 'x', 0], *[sock] * 20)
    """,
}


@pytest.mark.parametrize("greeted", [True, False], ids=["greeted", "a stranger"])
@pytest.mark.parametrize("way", UNASKED)
def test_what_was_sent_unasked_holds_up_nobody(broker, maker, others, way, greeted):
    before = len(open_files(broker.pid))
    maker.do(f"""
        import array
        def rights(*what):
            return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", map(fd, what)))]
        def fd(what):
            return what.fileno()
        def send(message, *what):
            wire.sendmsg((encode(message),), rights(*what) if what else [])
        wire = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        wire.connect({broker.address!r})
    """)
    if greeted:
        maker.do("send([HELLO, 0, VERSION, True]); wire.recv(100)")
    # from a stranger the kernel takes no descriptors, where it can be told so
    refused = not greeted and can_refuse_descriptors()
    with stopped(broker.pid):
        with pytest.raises(PermissionError) if refused else nullcontext():
            maker.do(UNASKED[way])
        if refused:  # it was not sent, so the maker's own close would be the last one
            maker.do("sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))")
        maker.do("sock.close(); wire.close()")
    maker.kill()
    wait_until(lambda: len(open_files(broker.pid)) <= before + 1, QUICK)
    for name in ("x", "y"):
        if name in [entry.name for entry in broker.entries()]:
            broker.retire(name, wait=True)
    wait_until(lambda: broker.stats()["jobs"] == 0, QUICK)


def test_the_end_of_the_broker_does_not_linger():
    with fdbroker.Broker(drain=0.1) as broker, Puppet() as maker, Puppet() as borrower:
        maker.do(f"client = fdbroker.Client({broker.address!r})")
        maker.do(SLOW_TO_CLOSE)
        maker.do("client.put('slow', sock); client.put('again', sock); sock.close()")
        borrower.do(f"loan = fdbroker.Client({broker.address!r}).borrow('slow')")
        with Process(broker.pid) as process:
            process.signal(signal.SIGTERM)
            assert process.gone(QUICK)
        maker.do("peer.close()")  # or the borrower would linger
