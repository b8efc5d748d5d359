"""What is going to happen, from the seed alone: faults, clients' visits, the backend's answers.

Nothing here depends on what happens meanwhile, so a seed replays: the same faults at the same seconds, the
same visits in the same order. Which turns a cancel finds running is left to the world.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.faults.torture_world.history import Carrier

NODE_FAULTS = ("kill", "stop-short", "stop-long", "drain")
STORE_FAULTS = ("freeze", "restart", "failover", "cut-normal", "cut-pubsub", "script-flush")
NETWORK_FAULTS = ("weather",)
FAULTS = (*NODE_FAULTS, *STORE_FAULTS, *NETWORK_FAULTS)

CARRIERS: tuple[Carrier, ...] = ("websocket", "websocket", "sse", "long-poll")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        pause_seconds: Calm before it, on its own timeline.
        seconds: How long it lasts: down, frozen; for a failover, how much is lost.
        dice: In [0, 1): which node.
    """

    kind: str
    pause_seconds: float
    seconds: float
    dice: float


@dataclass(frozen=True, slots=True)
class Scale:
    """How big the world is and how fast.

    Attributes:
        pace: Times the pauses of clients: 2 is half the load.
        patience_seconds: How long a node waits for a backend that hangs; no answer takes longer.
        fault_pace: Times the pauses between faults.
    """

    nodes: int = 3
    sessions: int = 20
    clients: int = 30
    lease_seconds: float = 3.0
    pace: float = 1.0
    fault_pace: float = 1.0
    patience_seconds: float = 12.0

    @property
    def drain_seconds(self) -> float:
        """Longer than any answer, so that no drain ends one."""
        return self.patience_seconds + 2.0


def node_faults(seed: int, kinds: Sequence[str], scale: Scale) -> Iterator[Fault]:
    """Faults of nodes, one after the other."""
    dice = random.Random(f"{seed}/nodes")
    lease = scale.lease_seconds
    spans = {
        "kill": (0.0, 2 * lease),
        "stop-short": (0.1, 0.25 * lease),
        "stop-long": (1.5 * lease, 3 * lease),
        "drain": (0.0, 0.0),
    }
    while chosen := [kind for kind in kinds if kind in NODE_FAULTS]:
        kind = dice.choice(chosen)
        pause = dice.uniform(1.5, 5.0) * scale.fault_pace
        yield Fault(kind, pause, dice.uniform(*spans[kind]), dice.random())


def store_faults(seed: int, kinds: Sequence[str], scale: Scale) -> Iterator[Fault]:
    """Faults of the store, one after the other."""
    dice = random.Random(f"{seed}/store")
    while chosen := [kind for kind in kinds if kind in STORE_FAULTS]:
        kind = dice.choice(chosen)
        span = {"restart": (0.0, 2.0), "failover": (0.02, 0.8)}.get(kind, (0.0, 0.0))
        if kind == "freeze":
            # Mostly a stutter; now and then as long as a node may have to hold what it reads.
            span = (2.0, 10.0) if dice.random() < 0.3 else (0.1, 2.0)
        yield Fault(kind, dice.uniform(2.0, 7.0) * scale.fault_pace, dice.uniform(*span), dice.random())


Deed = Literal[
    "send", "send-twice", "send-and-again", "again", "interrupt", "cancel", "cancel-all", "cancel-early",
    "attach", "detach", "ping",
]  # fmt: skip

_DEEDS: tuple[tuple[Deed, int], ...] = (
    ("send", 30),
    ("send-twice", 6),
    ("send-and-again", 6),
    ("again", 8),
    ("interrupt", 4),
    ("cancel", 16),
    ("cancel-all", 3),
    ("cancel-early", 2),
    ("attach", 6),
    ("detach", 3),
    ("ping", 2),
)


@dataclass(frozen=True, slots=True)
class Act:
    """One thing that a client does.

    Attributes:
        pause_seconds: Idle before it.
        deed: What.
        dice: In [0, 1): which turn it concerns.
        node: The slot that a posted command goes to.
        posts: Whether it is posted even though there is a socket.
    """

    pause_seconds: float
    deed: Deed
    dice: float
    node: int
    posts: bool


@dataclass(frozen=True, slots=True)
class Visit:
    """One connection of a client.

    Attributes:
        where: What it attaches after; ``cursor`` falls back to ``start`` where it has none.
        leave: How it goes when it has done its acts.
        heeds_goaway: Whether it leaves when it is told to.
        node: The slot it connects to.
    """

    session: int
    node: int
    carrier: Carrier
    where: Literal["cursor", "start", "running"]
    acts: tuple[Act, ...]
    leave: Literal["drop", "close", "detach"]
    heeds_goaway: bool


def visits(seed: int, client: int, scale: Scale) -> Iterator[Visit]:
    """What a client does, for ever; it has two sessions of its own choice, and now and then another."""
    dice = random.Random(f"{seed}/client/{client}")
    home = [client % scale.sessions, dice.randrange(scale.sessions)]
    while True:
        session = dice.choice(home) if dice.random() < 0.9 else dice.randrange(scale.sessions)
        yield Visit(
            session=session,
            node=dice.randrange(scale.nodes),
            carrier=dice.choice(CARRIERS),
            where=dice.choice(("cursor", "cursor", "cursor", "start", "running")),
            acts=tuple(_act(dice, scale) for _ in range(dice.randint(1, 6))),
            leave=dice.choice(("drop", "drop", "close", "detach")),
            heeds_goaway=dice.random() < 0.8,
        )


def _act(dice: random.Random, scale: Scale) -> Act:
    deeds, weights = zip(*_DEEDS, strict=True)
    return Act(
        pause_seconds=dice.uniform(0.1, 3.0) * scale.pace,
        deed=dice.choices(deeds, weights)[0],
        dice=dice.random(),
        node=dice.randrange(scale.nodes),
        posts=dice.random() < 0.3,
    )


_ENDINGS = (("complete", 70), ("error", 6), ("cut", 6), ("refuse", 6), ("hang", 7), ("abort", 5))


def answer(seed: int, turn: str, scale: Scale) -> dict[str, Any]:
    """How the backend answers a turn; it travels in the body.

    Its members: ``end``, ``sizes`` of the chunks in characters, ``pace`` in seconds between writes,
    ``together``: how many go in one write.
    """
    dice = random.Random(f"{seed}/answer/{turn}")
    endings, weights = zip(*_ENDINGS, strict=True)
    count = dice.randint(20, 60) if dice.random() < 0.2 else dice.randint(0, 20)
    sizes = [
        dice.randint(2_000, 30_000) if dice.random() < 0.02 else dice.randint(4, 120) for _ in range(count)
    ]
    return {
        "end": dice.choices(endings, weights)[0],
        "sizes": sizes,
        "pace": min(dice.choice((0.0, 0.02, 0.05, 0.1, 0.15)), 0.8 * scale.patience_seconds / (count + 2)),
        "together": dice.choice((1, 1, 1, 2, 5)),
    }
