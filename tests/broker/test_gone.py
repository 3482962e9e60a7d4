"""A client that is gone while a message waits for it: all that it sent, and its end, is seen."""

from __future__ import annotations

import os
from typing import IO

from support import BORROW, CANCEL, RETURN, SHARED, Raw, open_files, wait_until

import fdbroker


def test_a_client_that_goes_while_a_grant_waits_returns_its_loan(
    broker: fdbroker.Broker, data_file: IO[bytes]
) -> None:
    """Its second grant waits until it has read the first; but it is gone, whatever it had sent."""
    broker.put("data", data_file)
    broker.stats()
    before = open_files(broker.pid)
    for sent in range(300):
        with Raw(broker.address) as raw:
            raw.send(BORROW, 1, "data", *SHARED)
            raw.send(RETURN, 2)
            raw.send(BORROW, 3, "data", *SHARED)
            broker.stats()  # now it waits
            raw.send(CANCEL, 4)
            if sent % 3:
                _, fds = raw.receive()
                for number in fds:
                    os.close(number)
    wait_until(lambda: broker.stats()["loans"] == 0)
    wait_until(lambda: len(open_files(broker.pid)) == len(before))
