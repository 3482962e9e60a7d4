"""The bounded run: the corpus, then so many inputs of Hypothesis, the same ones each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, Phase, Verbosity, given, settings

from fuzz.steps import Input, decode
from fuzz.strategies import inputs
from fuzz.target import Target

CORPUS = Path(__file__).with_name("corpus")


class Player:
    """Plays inputs at one broker, or a new one after each failure, which leaves things behind."""

    def __init__(self) -> None:
        self.target: Target | None = None
        self.played = 0

    def __call__(self, it: Input) -> None:
        """One input."""
        self.target = self.target or Target()
        self.played += 1
        try:
            self.target.play(it)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Nothing is left open."""
        if self.target is not None:
            self.target.close()
            self.target = None


@contextmanager
def player() -> Iterator[Player]:
    """One for the block."""
    play = Player()
    try:
        yield play
    finally:
        play.close()


def corpus() -> dict[str, Input]:
    """The inputs that are kept, by the names of their files."""
    return {path.name: decode(path.read_bytes()) for path in sorted(CORPUS.iterdir())}


def search(play: Callable[[Input], None], examples: int, *, shrink: bool = True) -> None:
    """So many inputs of Hypothesis; raises what `play` raised for the smallest bad one."""

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        verbosity=Verbosity.normal if shrink else Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        report_multiple_bugs=False,
    )
    @given(inputs())
    def play_all(it: Input) -> None:
        play(it)

    play_all()
