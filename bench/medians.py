"""How the repetitions of a load become one figure.

A figure is the median. Only processor time is that of the calmest repetition, the one with the lowest
latency, and not the least: a system that is held up finds its chunks in heaps, and a chunk in a heap costs
little.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, TypeVar

FULL_SHARE = 0.9
"""Of the load's core in use, from which on a rate says what the load can do, not the system."""

T = TypeVar("T")


@dataclass(slots=True)
class Streamed:
    """A load through one system: nanoseconds, but for the rate.

    Attributes:
        rate: Chunks a second that came.
        p50: Latency of a chunk.
        p99: The same.
        added_p50: Latency less that of the same repetition's direct load.
        added_p99: The same.
        system: Processor time of what is measured, per chunk; ``None`` for direct.
        other: The same of the other node, where there is one.
        store: Processor time of the gateway's Valkey, per chunk.
        client: Processor time of whoever reads the chunks, per chunk, where that is Node's.
        requests: A second, of each client.
        load_was_full: The load's core had nothing left: the rate may be its, not the system's.
    """

    rate: float
    p50: float
    p99: float
    added_p50: float
    added_p99: float
    system: float | None
    other: float | None
    store: float | None
    client: float | None
    requests: float
    load_was_full: bool


def streamed(samples: dict[T, list[dict[str, Any]]], base: T) -> dict[T, Streamed]:
    """The figures of each system, from what the load told of each repetition.

    Args:
        samples: As many of each.
        base: What "added" is more than.
    """
    found = {}
    for system, repetitions in samples.items():
        pairs = list(zip(repetitions, samples[base], strict=True))
        cost = min(repetitions, key=lambda one: one["p50_ns"])["cpu_ns_per_chunk"]
        found[system] = Streamed(
            rate=statistics.median(one["chunks_per_second"] for one in repetitions),
            p50=statistics.median(one["p50_ns"] for one in repetitions),
            p99=statistics.median(one["p99_ns"] for one in repetitions),
            added_p50=statistics.median(one["p50_ns"] - direct["p50_ns"] for one, direct in pairs),
            added_p99=statistics.median(one["p99_ns"] - direct["p99_ns"] for one, direct in pairs),
            system=cost.get("system"),
            other=cost.get("other"),
            store=cost.get("store"),
            client=cost.get("client"),
            requests=statistics.median(one.get("requests_per_second", 0.0) for one in repetitions),
            load_was_full=statistics.median(one["load_core_share"] for one in repetitions) > FULL_SHARE,
        )
    return found
