"""The parts of what is measured of nodes: each is one scenario of the load, on a fleet just started."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

from bench.clients import Wire
from bench.starting import load

if TYPE_CHECKING:
    from bench.fleet import Fleet
    from bench.plan import NodesPlan, Pace

SOAK_TOGETHER = 30
SOAK_CHUNKS = 60
SOAK_RATE = 200
CANCEL_RATE = 20

Figures = dict[str, Any]
"""What a scenario told."""


class Place(StrEnum):
    """Where the clients of a load are attached."""

    DIRECT = "direct"
    SAME = "the producer's node"
    OTHER = "the other node"


def idle(fleet: Fleet, plan: NodesPlan, settle: float) -> Figures:
    """Turns beside idle sockets."""
    return load(
        "idle_crowd",
        pid=fleet.nodes[0].pid,
        sockets=plan.sockets,
        idle_seconds=plan.idle_seconds,
        settle=settle,
        port=fleet.nodes[0].port,
        **_load(fleet, plan.beside),
    )


def storm(fleet: Fleet, plan: NodesPlan, settle: float, *, jitter: bool) -> Figures:
    """A crowd comes from the first node to the second."""
    return load(
        "storm",
        ports=[node.port for node in fleet.nodes],
        pids=[node.pid for node in fleet.nodes],
        backend_port=fleet.backend_port,
        clients=plan.storm_clients,
        sessions=plan.storm_sessions,
        records=plan.storm_records,
        back=plan.storm_back,
        turns=plan.beside.turns,
        rate=plan.beside.rate,
        seconds=plan.beside.seconds,
        jitter=jitter,
        settle=settle,
        watched=fleet.watched(),
    )


def rush(fleet: Fleet, plan: NodesPlan, settle: float) -> Figures:
    """A crowd catches up."""
    return load(
        "catch_up_crowd",
        port=fleet.nodes[0].port,
        pid=fleet.nodes[0].pid,
        clients=plan.rush_clients,
        sessions=plan.rush_sessions,
        records=plan.rush_records,
        settle=settle,
        watched=fleet.watched(),
    )


def stream(fleet: Fleet, pace: Pace, place: Place, settle: float) -> Figures:
    """Turns of the first node, read at a place."""
    shared = {**_load(fleet, pace), "settle": settle}
    if place is Place.DIRECT:
        beside = {"beside": fleet.watched()["beside"]}
        return load("stream", wire=Wire.HTTP, port=fleet.backend_port, **shared | {"watched": beside})
    producer, other = fleet.nodes
    reader = producer if place is Place.SAME else other
    return load("stream", wire=Wire.SESSION, port=producer.port, read_port=reader.port, **shared)


def kill(fleet: Fleet, plan: NodesPlan) -> Figures:
    """The first node dies with turns."""
    return load(
        "kill_node",
        ports=[node.port for node in fleet.nodes],
        admin_port=fleet.nodes[1].admin_port,
        pid=fleet.nodes[0].pid,
        turns=plan.broken.turns,
        rate=plan.broken.rate,
        # A node that has just come may seal nothing before it has been there for a lease.
        settle=plan.lease_seconds,
    )


def freeze(fleet: Fleet, plan: NodesPlan, settle: float) -> Figures:
    """The store stands still in the middle of turns."""
    return load(
        "freeze_store",
        ports=[node.port for node in fleet.nodes],
        backend_port=fleet.backend_port,
        pid=fleet.store,
        turns=plan.broken.turns,
        rate=plan.broken.rate,
        frozen_seconds=plan.frozen_seconds,
        after_seconds=plan.after_seconds,
        settle=settle,
    )


def cancel(fleet: Fleet, plan: NodesPlan, place: Place, settle: float) -> Figures:
    """Turns of the first node are cancelled by a command to one of the two."""
    return load(
        "cancel",
        wire=Wire.SESSION,
        port=fleet.nodes[0].port,
        cancel_port=fleet.nodes[place is Place.OTHER].port,
        backend_port=fleet.backend_port,
        turns=plan.cancels,
        rate=CANCEL_RATE,
        settle=settle,
    )


def soak(fleet: Fleet, plan: NodesPlan) -> list[dict[str, int]]:
    """Many turns of all kinds through one node."""
    samples: list[dict[str, int]] = load(
        "soak",
        port=fleet.nodes[0].port,
        backend_port=fleet.backend_port,
        pid=fleet.nodes[0].pid,
        turns=plan.soak_turns,
        steps=plan.soak_steps,
        together=SOAK_TOGETHER,
        chunks=SOAK_CHUNKS,
        rate=SOAK_RATE,
        hold_seconds=plan.soak_hold_seconds,
    )["samples"]
    return samples


def _load(fleet: Fleet, pace: Pace) -> Figures:
    return {
        "backend_port": fleet.backend_port,
        "turns": pace.turns,
        "rate": pace.rate,
        "seconds": pace.seconds,
        "chunks": 0,
        "watched": fleet.watched(),
    }
