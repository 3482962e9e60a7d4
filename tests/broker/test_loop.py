"""How many events the loop takes at a time: all that there are, before long."""

from __future__ import annotations

import os

from fdbroker.ipc.server.event_loop import Loop
from fdbroker.lender import Ledger, Lender

ROOM = 1, 1, 1


class Taking(Loop):
    """Acts on nothing, so that all that is readable stays so; ends after so many turns."""

    def __init__(self, turns: int) -> None:
        super().__init__(Lender(Ledger(bytearray(Ledger.size(*ROOM)), *ROOM)))
        self.taken: list[int] = []
        self._turns = turns

    def in_turn(self, happened: list[tuple[int, int]]) -> list[tuple[int, int]]:
        self.taken.append(len(happened))
        self.draining = len(self.taken) == self._turns
        return []

    def ring(self) -> None:
        raise AssertionError

    def settle(self) -> None:
        raise AssertionError

    def close(self) -> None:
        self._epoll.close()
        self.workers.close()


def taken(readable: int, turns: int) -> list[int]:
    loop = Taking(turns)
    numbers = [os.eventfd(1) for _ in range(readable)]
    for number in numbers:
        loop.watch(number, print)
    loop.run()
    for number in numbers:
        os.close(number)
    loop.close()
    return loop.taken


def test_of_few_all_are_taken() -> None:
    assert taken(20, 2) == [20, 20]


def test_of_many_more_are_taken_each_time() -> None:
    """Who asks seldom is not behind all others, a few at a time."""
    assert taken(300, 6) == [32, 64, 128, 256, 300, 300]
