"""Crowds, two nodes on one store, and what breaks: each part afresh, a few times."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from bench import node_parts
from bench.fleet import running_fleet
from bench.medians import Streamed, streamed
from bench.node_parts import Figures, Place

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.fleet import Fleet
    from bench.plan import NodesPlan, Pace


@dataclass(slots=True)
class NodesResults:
    """All figures of the nodes: medians of the repetitions, number by number.

    Attributes:
        plan: How much was measured.
        crowd: Idle sockets beside turns that stream.
        storm: A crowd that comes to another node, by whether its clients wait as ours do.
        rush: A crowd that catches up.
        across: Each load, by where its clients are attached.
        cancel: By where it is asked for.
        kill: A node that dies.
        freeze: A store that stands still.
        soak: The node's size by the turns it has had.
    """

    plan: NodesPlan
    crowd: Figures
    storm: dict[bool, Figures]
    rush: Figures
    across: list[tuple[Pace, dict[Place, Streamed]]]
    cancel: dict[Place, Figures]
    kill: Figures
    freeze: Figures
    soak: list[dict[str, int]]


class _Measuring:
    def __init__(self, plan: NodesPlan, settle: float, tell: Callable[[str], None]) -> None:
        self._plan = plan
        self._settle = settle
        self._tell = tell

    def measure(self) -> NodesResults:
        plan, settle = self._plan, self._settle
        storm = partial(node_parts.storm, plan=plan, settle=settle)
        storms = {jitter: partial(storm, jitter=jitter) for jitter in (False, True)}
        return NodesResults(
            plan,
            crowd=self._medians("idle sockets", 1, partial(node_parts.idle, plan=plan, settle=settle)),
            storm={jitter: self._medians("storm", 2, part) for jitter, part in storms.items()},
            rush=self._medians("catch-up", 1, partial(node_parts.rush, plan=plan, settle=settle)),
            across=[(pace, self._across(pace)) for pace in plan.across],
            cancel=self._cancels(),
            kill=self._medians("kill -9", 2, partial(node_parts.kill, plan=plan)),
            freeze=self._medians("frozen store", 2, partial(node_parts.freeze, plan=plan, settle=settle)),
            soak=self._soak(),
        )

    def _medians(self, name: str, nodes: int, part: Callable[[Fleet], Figures]) -> Figures:
        told = []
        for repetition in range(1, self._plan.repetitions + 1):
            self._tell(f"nodes: {name}, repetition {repetition} of {self._plan.repetitions}")
            with running_fleet(nodes, lease_seconds=self._plan.lease_seconds) as fleet:
                told.append(part(fleet))
        return median_of(told)

    def _across(self, pace: Pace) -> dict[Place, Streamed]:
        samples: dict[Place, list[Figures]] = {place: [] for place in Place}
        for repetition in range(1, self._plan.repetitions + 1):
            self._tell(f"nodes: {pace.offered} chunks/s, repetition {repetition} of {self._plan.repetitions}")
            with running_fleet(2, lease_seconds=self._plan.lease_seconds) as fleet:
                for place in Place:
                    samples[place].append(node_parts.stream(fleet, pace, place, self._settle))
        return streamed(samples, Place.DIRECT)

    def _cancels(self) -> dict[Place, Figures]:
        found = {}
        with running_fleet(2, lease_seconds=self._plan.lease_seconds) as fleet:
            for place in (Place.SAME, Place.OTHER):
                self._tell(f"nodes: cancel, asked at {place}")
                found[place] = node_parts.cancel(fleet, self._plan, place, self._settle)
        return found

    def _soak(self) -> list[dict[str, int]]:
        self._tell("nodes: soak")
        with running_fleet(1, lease_seconds=self._plan.lease_seconds) as fleet:
            return node_parts.soak(fleet, self._plan)


def measure_nodes(plan: NodesPlan, settle: float, tell: Callable[[str], None]) -> NodesResults:
    """Measure it all.

    Args:
        plan: How much.
        settle: Seconds of rest before each window.
        tell: Is told what is being measured.

    Raises:
        BenchError: Something was lost, doubled, out of order, refused for good or late.
    """
    return _Measuring(plan, settle, tell).measure()


def median_of(told: list[Figures]) -> Figures:
    """Number by number, of dictionaries of one shape."""
    return {
        name: median_of([one[name] for one in told])
        if isinstance(value, dict)
        else statistics.median(one[name] for one in told)
        for name, value in told[0].items()
    }
