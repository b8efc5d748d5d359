"""What is measured, how often, and how repetitions become one figure.

The host takes processor time away without saying so, and books it on whoever runs. So the systems take turns
within each repetition, each repetition starts everything afresh, and a figure is the median. Only processor
time is that of the calmest repetition, the one with the lowest latency, and not the least: a system that is
held up finds its chunks in heaps, and a chunk in a heap costs little.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.rig import Rig, System, load, running

if TYPE_CHECKING:
    from collections.abc import Callable

GATEWAY = (System.GATEWAY_HTTP, System.GATEWAY_SDK, System.GATEWAY_SESSION)
FULL_SHARE = 0.9
"""Of the load's core in use, from which on a rate says what the load can do, not the system."""


@dataclass(frozen=True, slots=True)
class Pace:
    """One load: so many turns at once, each with so many chunks a second (0: as fast as they are taken)."""

    turns: int
    rate: int
    seconds: float = 0.0
    chunks: int = 0

    @property
    def offered(self) -> int:
        """Chunks a second, of all turns together; 0: without a limit."""
        return self.turns * self.rate


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    repetitions: int
    steady: Pace
    many: Pace
    burst: Pace
    resume_chunks: int
    resume_times: int
    cancels: int
    cancel_rounds: int
    idle_sockets: int
    settle_seconds: float = 0.3


FULL = Plan(
    repetitions=4,
    steady=Pace(50, 100, seconds=3.0),
    many=Pace(400, 100, seconds=2.0),
    burst=Pace(8, 0, chunks=20_000),
    resume_chunks=10_000,
    resume_times=5,
    cancels=50,
    cancel_rounds=3,
    idle_sockets=2000,
)
QUICK = Plan(
    repetitions=1,
    steady=Pace(50, 100, seconds=1.0),
    many=Pace(200, 100, seconds=1.0),
    burst=Pace(8, 0, chunks=5000),
    resume_chunks=10_000,
    resume_times=2,
    cancels=20,
    cancel_rounds=1,
    idle_sockets=500,
)
SMOKE = Plan(
    repetitions=1,
    steady=Pace(4, 50, seconds=0.3),
    many=Pace(8, 50, seconds=0.3),
    burst=Pace(2, 0, chunks=500),
    resume_chunks=500,
    resume_times=1,
    cancels=3,
    cancel_rounds=1,
    idle_sockets=20,
    settle_seconds=0.05,
)


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
        store: Processor time of the gateway's Valkey, per chunk.
        load_was_full: The load's core had nothing left: the rate may be its, not the system's.
    """

    rate: float
    p50: float
    p99: float
    added_p50: float
    added_p99: float
    system: float | None
    store: float | None
    load_was_full: bool


@dataclass(slots=True)
class Cancelled:
    """Nanoseconds from a typed cancel until the backend saw the close, and the client its answer."""

    close_p50: float
    close_p99: float
    answer_p50: float
    answer_p99: float


@dataclass(slots=True)
class Results:
    """All figures of a run."""

    plan: Plan
    steady: dict[System, Streamed] = field(default_factory=dict)
    many: dict[System, Streamed] = field(default_factory=dict)
    burst: dict[System, Streamed] = field(default_factory=dict)
    resume: dict[System, float] = field(default_factory=dict)
    cancel: dict[System, Cancelled] = field(default_factory=dict)
    idle: dict[System, float] = field(default_factory=dict)


Samples = dict[System, list[dict[str, Any]]]


def measure(plan: Plan, tell: Callable[[str], None]) -> Results:
    """Measure it all.

    Args:
        plan: How much.
        tell: Is told what is being measured.

    Raises:
        BenchError: Something was lost, doubled, out of order, refused or late.
    """
    results = Results(plan)
    paces = {"steady": plan.steady, "many": plan.many, "burst": plan.burst}
    samples: dict[str, Samples] = {name: {} for name in paces}
    for repetition in range(1, plan.repetitions + 1):
        for name, pace in paces.items():
            with running() as rig:
                for system in rig.ports:
                    tell(f"repetition {repetition} of {plan.repetitions}: {name}, {system}")
                    samples[name].setdefault(system, []).append(
                        _stream(rig, system, pace, plan.settle_seconds)
                    )
    for name in paces:
        setattr(results, name, _streamed(samples[name]))
    with running() as rig:
        tell("resume")
        results.resume = _resume(rig, plan)
        for system in (System.GATEWAY_HTTP, System.GATEWAY_SESSION):
            tell(f"cancel, {system}")
            results.cancel[system] = _cancel(rig, system, plan)
    for system in (System.GATEWAY_SDK, System.GATEWAY_SESSION):
        tell(f"idle sockets, {system}")
        with running() as rig:
            results.idle[system] = load(
                "idle",
                wire=system.wire,
                port=rig.ports[system],
                sockets=plan.idle_sockets,
                settle=plan.settle_seconds,
                pid=rig.gateway,
            )["bytes_per_socket"]
    return results


def _stream(rig: Rig, system: System, pace: Pace, settle: float) -> dict[str, Any]:
    return load(
        "stream",
        wire=system.wire,
        port=rig.ports[system],
        backend_port=rig.backend_port,
        turns=pace.turns,
        rate=pace.rate,
        seconds=pace.seconds,
        chunks=pace.chunks,
        settle=settle,
        watched=rig.watched(system),
    )


def _resume(rig: Rig, plan: Plan) -> dict[System, float]:
    found = load(
        "catch_up",
        port=rig.ports[System.GATEWAY_SESSION],
        chunks=plan.resume_chunks,
        times=plan.resume_times,
        settle=plan.settle_seconds,
        wires=[system.wire for system in GATEWAY],
    )
    return {system: found[system.wire] for system in GATEWAY}


def _cancel(rig: Rig, system: System, plan: Plan) -> Cancelled:
    rounds = [
        load(
            "cancel",
            wire=system.wire,
            port=rig.ports[system],
            backend_port=rig.backend_port,
            turns=plan.cancels,
            rate=20,
            settle=plan.settle_seconds,
        )
        for _ in range(plan.cancel_rounds)
    ]
    return Cancelled(
        **{
            name: statistics.median(one[f"{name}_ns"] for one in rounds)
            for name in ("close_p50", "close_p99", "answer_p50", "answer_p99")
        }
    )


def _streamed(samples: Samples) -> dict[System, Streamed]:
    direct = samples[System.DIRECT]
    found = {}
    for system, repetitions in samples.items():
        pairs = list(zip(repetitions, direct, strict=True))
        cost = min(repetitions, key=lambda one: one["p50_ns"])["cpu_ns_per_chunk"]
        found[system] = Streamed(
            rate=statistics.median(one["chunks_per_second"] for one in repetitions),
            p50=statistics.median(one["p50_ns"] for one in repetitions),
            p99=statistics.median(one["p99_ns"] for one in repetitions),
            added_p50=statistics.median(one["p50_ns"] - base["p50_ns"] for one, base in pairs),
            added_p99=statistics.median(one["p99_ns"] - base["p99_ns"] for one, base in pairs),
            system=cost.get("system"),
            store=cost.get("store"),
            load_was_full=statistics.median(one["load_core_share"] for one in repetitions) > FULL_SHARE,
        )
    return found
