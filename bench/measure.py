"""All that is measured, in its order.

The host takes processor time away without saying so, and books it on whoever runs. So the systems take turns
within each repetition, each repetition starts everything afresh, and a figure is the median, or what
``medians.py`` says of processor time.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.measure_client import ClientResults, measure_client
from bench.medians import Streamed, streamed
from bench.node import has_client
from bench.rig import Rig, System, running
from bench.starting import load

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.measure_nodes import NodesResults
    from bench.plan import Pace, Plan

GATEWAY = (System.GATEWAY_HTTP, System.GATEWAY_SDK, System.GATEWAY_SESSION)


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
    client: ClientResults | None = None
    """``None``: there is no Node, or no client built."""
    nodes: NodesResults | None = None
    """A run of its own, which takes about as long: :func:`bench.measure_nodes.measure_nodes`."""


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
    samples: dict[str, dict[System, list[dict[str, Any]]]] = {name: {} for name in paces}
    for repetition in range(1, plan.repetitions + 1):
        for name, pace in paces.items():
            with running() as rig:
                for system in rig.ports:
                    tell(f"repetition {repetition} of {plan.repetitions}: {name}, {system}")
                    samples[name].setdefault(system, []).append(
                        _stream(rig, system, pace, plan.settle_seconds)
                    )
    for name in paces:
        setattr(results, name, streamed(samples[name], System.DIRECT))
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
    if has_client():
        results.client = measure_client(plan.client, plan.settle_seconds, tell)
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
