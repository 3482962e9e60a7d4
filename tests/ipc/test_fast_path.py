"""The fast path of a borrow and a return does what its slow twin does.

`borrow` and `Loan.close` are held against `ClientConnection.wait`, `Session.take_loan` and
`Session.close_loan`: with the same replies, of brokers that keep the rules and of others, they have
the same result, send the same requests, and leave the same things open.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import open_files

from fdbroker.errors import BrokerClosing, ProtocolError, TooManyFiles, UnknownEntry
from fdbroker.ipc.client import fork
from fdbroker.ipc.client.borrow import PreparedBorrow, borrow
from fdbroker.ipc.client.pool import Pool
from fdbroker.ipc.client.session import Session
from fdbroker.ipc.protocol.codec import encode_error, encode_grant
from fdbroker.ipc.transport import SEND

SEQ = 0  # of the borrow: the session has said no hello


class Reply(NamedTuple):
    """What the broker sends when it is asked for `names` entries."""

    names: int
    seq: int
    total: int  # descriptors that it promises for the loan
    count: int  # and for this message
    fds: int  # descriptors that come with it
    since: int
    compact: bool  # not in the form in which our broker encodes a grant
    refused: bool

    def encode(self) -> bytes:
        if self.refused:
            return encode_error(self.seq, UnknownEntry("x"))
        if self.compact:
            return msgpack.packb([0, self.seq, self.total, self.count, self.since])
        return encode_grant(self.seq, self.total, self.count, self.since)


RIGHT = Reply(names=1, seq=SEQ, total=1, count=1, fds=1, since=5, compact=False, refused=False)
counts = st.integers(0, 3)
replies = st.builds(
    Reply,
    names=st.integers(1, 3),
    seq=st.sampled_from([SEQ, SEQ, SEQ, SEQ + 1]),
    total=counts,
    count=counts,
    fds=counts,
    since=st.sampled_from([0, 5, 2**40, 2**64 - 1]),
    compact=st.booleans(),
    refused=st.booleans(),
) | st.builds(  # a broker that keeps the rules
    lambda n, since, compact: Reply(n, SEQ, n, n, n, since, compact, False),
    n=st.integers(1, 3),
    since=st.integers(0, 2**64 - 1),
    compact=st.booleans(),
)


class Seen(NamedTuple):
    """What came of one borrow and its return."""

    result: Any
    asked: list[bytes]
    idle: int
    ended: bool
    opened: int


@contextlib.contextmanager
def session_with_replies(reply: Reply) -> Iterator[tuple[Pool, Session, socket.socket]]:
    """A session whose broker has answered already, and refuses whatever is asked next."""
    reader, writer = os.pipe()
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
    ):
        listener.bind(f"{folder}/socket")
        listener.listen()
        pool = Pool(f"{folder}/socket")
        session = Session(pool.address, pool.release)
        broker, _ = listener.accept()
        with broker:
            socket.send_fds(broker, [reply.encode()], [writer] * reply.fds)
            for seq in (SEQ, SEQ + 1):
                broker.send(encode_error(seq, BrokerClosing()))
            broker.setblocking(False)
            yield pool, session, broker
            session.end()
    os.close(reader)
    os.close(writer)


def prepared(names: int) -> PreparedBorrow:
    wanted = ("x",) * names
    return PreparedBorrow(
        wanted, wanted, exclusive=False, readonly=False, timeout=None, purpose="why"
    )


def take_fast(pool: Pool, session: Session, request: PreparedBorrow) -> Any:
    pool.idle.append(session)
    loan = borrow(pool, request, tries=1)
    lent = session.fds, loan._since, [os.fstat(fd).st_ino for fd in session.fds]
    loan.close()
    return lent


def take_slowly(pool: Pool, session: Session, request: PreparedBorrow) -> Any:
    session.seq += 1
    session.send(request.pack(request.head, session.seq, request.tail), SEND)
    try:
        session.wait(SEQ, None)
        session.fds, since = session.take_loan(SEQ, len(request.names), None)
    except Exception as error:
        session.end_unless_refused(error)
        pool.release(session)
        raise
    session.names = request.names
    lent = session.fds, since, [os.fstat(fd).st_ino for fd in session.fds]
    session.close_loan()
    return lent


def requests(broker: socket.socket) -> list[bytes]:
    """All that the client has sent."""
    found = []
    while True:
        try:
            data = broker.recv(1000)
        except ConnectionResetError:  # the client ended with a reply unread: said once
            continue
        except BlockingIOError:
            return found
        if not data:
            return found
        found.append(data)


def seen(take: Any, reply: Reply) -> Seen:
    with session_with_replies(reply) as (pool, session, broker):
        before = len(open_files())
        try:
            fds, since, inodes = take(pool, session, prepared(reply.names))
            result: Any = len(fds), since, len(set(inodes))
        except Exception as error:
            result = type(error), str(error).split("(")[0]  # without counts of open files
            if reply.fds > reply.names:
                # The fast path has room for what was asked for, so it may miss the surplus: then
                # it takes the loss of it (MSG_CTRUNC) for a lack of numbers.
                result = {TooManyFiles: ProtocolError}.get(type(error), type(error))
        asked = requests(broker)
        opened = len(open_files()) - before
        return Seen(result, asked, len(pool.idle), session.closed, opened)


@pytest.mark.parametrize("threads", [0, 1])
def test_fast_path_and_slow_twin_agree(threads: int) -> None:
    @given(replies)
    @example(RIGHT)
    @settings(deadline=None)
    def agree(reply: Reply) -> None:
        fast, slow = seen(take_fast, reply), seen(take_slowly, reply)
        assert fast == slow
        assert fast.opened in (0, -1)  # the socket of a session that was ended

    with mock.patch.object(fork, "other_threads", return_value=threads):
        agree()


def test_right_reply_is_lent_and_returned() -> None:
    """So that the agreement above is about something."""
    found = seen(take_fast, RIGHT)
    assert found.result == (1, 5, 1)
    assert len(found.asked) == 2  # BORROW, RETURN
    assert (found.idle, found.ended, found.opened) == (1, False, 0)
