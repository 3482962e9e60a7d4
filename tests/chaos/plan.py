"""The plan: what every actor does, step after step, from a seed and nothing else.

A step is a list: its kind, and what it needs.  An actor that has come to the end of its list begins
anew.  Times are in milliseconds, `seed` is for what a step makes up itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

COMMON = (  # entries that everybody but the hostile ones may borrow, shared
    *("common/file", "common/readonly", "common/memory", "common/null"),
    *("common/tcp", "common/udp", "common/unix"),
)
READABLE = COMMON[:3]
TURNS = ("turn/0", "turn/1", "turn/2", "turn/3")  # ... and in turns
SECRET = "secret"  # an entry that no rule is about

Step = list[Any]


class Actor(NamedTuple):
    """One process, or what stands for several that come and go."""

    name: str
    role: str
    number: int  # among those of its role
    steps: list[Step]


def turn(random: Random) -> str:
    return random.choice(TURNS)


def several(random: Random) -> list[str]:
    return random.sample(TURNS, random.randint(2, len(TURNS)))


def short(random: Random) -> float:
    """Mostly no time at all."""
    return random.choice([0, 0, 0, round(random.uniform(0, 4), 2)])


# what each kind of step needs, and how often it comes
Needs = dict[str, tuple[int, Callable[[Random], Step]]]
GOOD: Needs = {
    "shared": (20, lambda r: [r.choice(COMMON), short(r)]),
    "turn": (20, lambda r: [turn(r), short(r)]),
    "turn-shared": (8, lambda r: [turn(r), short(r)]),
    "turn-now": (6, lambda r: [turn(r), r.random() < 0.5]),
    "several": (8, lambda r: [several(r), r.random() < 0.5, short(r)]),
    "read": (8, lambda r: [r.choice(COMMON), r.randint(0, 4000)]),
    "publish": (6, lambda r: [r.random() < 0.5]),
    "visit": (12, lambda r: [r.randrange(1000)]),
    "put": (4, lambda r: [r.randrange(2**32)]),
    "closing": (4, lambda r: [r.random() < 0.5]),
    "share": (3, lambda r: [r.randrange(2**32)]),
    "many": (1, lambda r: [r.randint(254, 300)]),
    "list": (3, lambda r: []),
    "deadlock": (2, lambda r: []),
    "busy": (1, lambda r: [round(r.uniform(5, 40), 1)]),
    "ephemeral": (1, lambda r: []),
    "forbidden": (3, lambda r: []),
    "unknown": (3, lambda r: [f"common/none{r.randrange(100)}"]),
}
LOANS = ("shared", "turn", "several", "read")
DYING: Needs = {
    "holding": (6, lambda r: [r.choice(LOANS), several(r), r.choice(COMMON), short(r)]),
    "borrowing": (6, lambda r: [r.randrange(2**32), round(r.uniform(0, 30), 2)]),
    "waiting": (3, lambda r: [turn(r), round(r.uniform(0, 10), 2)]),
    "putting": (4, lambda r: [r.randrange(2**32), round(r.uniform(0, 30), 2)]),
    "retiring": (2, lambda r: [round(r.uniform(0, 10), 2)]),
    "sharing": (2, lambda r: []),
    "forking": (2, lambda r: [r.choice(COMMON), short(r)]),
    "passing": (2, lambda r: [r.choice(COMMON), short(r)]),
    "executing": (2, lambda r: [several(r), r.random() < 0.5]),
    "greeting": (2, lambda r: [r.choice(["nothing", "half", "hello", "borrow"])]),
}


def burst(random: Random) -> Step:
    return [random.randrange(2**32), round(random.uniform(5, 120), 1)]


HOSTILE: Needs = {
    kind: (often, burst)
    for kind, often in {
        "silent": 2,
        "half-hello": 2,
        "stopped": 2,
        "garbage": 3,
        "malformed": 4,
        "never-reading": 3,
        "borrowing-blindly": 3,
        "unasked": 3,
        "puts-of-many": 2,
        "itself": 2,
        "flood": 3,
        "comings-and-goings": 3,
        "seq-games": 4,
        "hoarding": 2,
        "foreign": 2,
        "crowd-in-line": 2,
    }.items()
}
HOSTILE["silent"] = 2, lambda r: [r.randrange(2**32), round(r.choice([50.0, 200.0, 11_000.0]), 1)]

ROLES = {"good": GOOD, "dying": DYING, "hostile": HOSTILE}
KINDS = [kind for needs in ROLES.values() for kind in needs]
CREW = {"good": 6, "dying": 4, "hostile": 6}
STEPS = {"good": 1500, "dying": 300, "hostile": 200}


def plan(seed: int) -> list[Actor]:
    """What everybody does."""
    actors = []
    for role, needs in ROLES.items():
        kinds, weights = list(needs), [often for often, _ in needs.values()]
        for number in range(CREW[role]):
            name = f"{role}-{number}"
            random = Random(f"{seed}:{name}")
            chosen = random.choices(kinds, weights, k=STEPS[role])
            steps = [[kind, *needs[kind][1](random)] for kind in chosen]
            actors.append(Actor(name, role, number, steps))
    return actors


def text(seed: int) -> str:
    """The plan as JSON."""
    actors = [actor._asdict() for actor in plan(seed)]
    return json.dumps({"seed": seed, "actors": actors}, indent=1) + "\n"


def fingerprint(seed: int) -> str:
    """The same for the same plan."""
    return hashlib.sha256(text(seed).encode()).hexdigest()[:16]
