"""What is measured of the TypeScript client: its carriers side by side, and what blocked networks cost it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from bench.blocking import Block
from bench.carriers import CARRIERS
from bench.medians import Streamed, streamed
from bench.rig import Rig, System, running
from bench.starting import load

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.plan import ClientPlan, Pace

RECONNECT_RATE = 50
"""Chunks a second of a turn whose connection is cut."""


class Reader(StrEnum):
    """Who reads the chunks, all of them in Node."""

    DIRECT = "`fetch`, direct"
    NGINX = "`fetch`, nginx proxy_pass"
    WEBSOCKET = "client, websocket"
    SSE = "client, sse"
    LONG_POLL = "client, long-poll"

    @property
    def carrier(self) -> str | None:
        """By the client's name; ``None``: it is no client of ours."""
        return self.rpartition(" ")[2] if self.startswith("client") else None

    @property
    def system(self) -> System:
        """What it reads from."""
        match self:
            case Reader.DIRECT:
                return System.DIRECT
            case Reader.NGINX:
                return System.NGINX
            case _:
                return System.GATEWAY_SESSION


@dataclass(frozen=True, slots=True)
class FirstChunk:
    """Nanoseconds from a send to its first chunk: first in a tab, and the next time."""

    first: float
    again: float


@dataclass(slots=True)
class ClientResults:
    """All figures of the client.

    Attributes:
        plan: How much was measured.
        steady: The load, through each reader.
        first: By what is blocked.
        reconnect: Nanoseconds from a cut to the first chunk written after it, by carrier.
    """

    plan: ClientPlan
    steady: dict[Reader, Streamed]
    first: dict[Block, FirstChunk]
    reconnect: dict[str, float]


def measure_client(plan: ClientPlan, settle: float, tell: Callable[[str], None]) -> ClientResults:
    """Measure it all.

    Args:
        plan: How much.
        settle: Seconds of rest before a load, and before its first chunk that counts.
        tell: Is told what is being measured.

    Raises:
        BenchError: Something was lost, doubled, out of order, refused or late.
    """
    samples: dict[Reader, list[dict[str, Any]]] = {}
    for repetition in range(1, plan.repetitions + 1):
        with running() as rig:
            for reader in (reader for reader in Reader if reader.system in rig.ports):
                tell(f"repetition {repetition} of {plan.repetitions}: {reader}")
                samples.setdefault(reader, []).append(_stream(rig, reader, plan.steady, settle))
    with running() as rig:
        port = rig.ports[System.GATEWAY_SESSION]
        tell("client: first chunk")
        first = load("first_chunk", port=port, times=plan.first_times, timing=plan.timing)
        reconnect = {}
        for carrier in CARRIERS:
            tell(f"client: reconnect, {carrier}")
            reconnect[carrier] = load(
                "reconnect",
                port=port,
                carrier=carrier,
                cuts=plan.cuts,
                rate=RECONNECT_RATE,
                timing=plan.timing,
            )["p50_ns"]
    return ClientResults(
        plan,
        streamed(samples, Reader.DIRECT),
        {block: FirstChunk(first[block]["first_ns"], first[block]["next_ns"]) for block in Block},
        reconnect,
    )


def _stream(rig: Rig, reader: Reader, pace: Pace, settle: float) -> dict[str, Any]:
    return load(
        "through_client",
        carrier=reader.carrier,
        port=rig.ports[reader.system],
        backend_port=rig.backend_port,
        turns=pace.turns,
        rate=pace.rate,
        seconds=pace.seconds,
        settle=settle,
        watched=rig.watched(reader.system),
    )
