"""The real client on each carrier: at a steady load, behind proxies that block, and after a cut."""

from __future__ import annotations

import asyncio
import random
import statistics
from typing import Any

from bench.answers import BenchError, Meter
from bench.blocking import Block, Proxy
from bench.clients import ask
from bench.node import NodeProgram
from bench.streaming import ENDLESS, Reading, figures, until

CARRIERS = ("websocket", "sse", "long-poll")
"""By the client's own names, best first."""

EXPECTED = {
    Block.NOTHING: "websocket",
    Block.SWALLOWED: "sse",
    Block.REFUSED: "sse",
    Block.HELD: "long-poll",
}
"""The carrier that is left."""

SHORT = {"chunks": 3, "rate": 0, "gated": False, "endless": False}
"""A turn of which the first chunk is all that matters."""

SETTLED_CHUNKS = 10
"""Chunks between the end of one cut and the next."""

TRIES = 4
"""Of each cut that is counted, at most: one between two long-polls meets no connection."""


async def through_client(
    *,
    carrier: str | None,
    port: int,
    backend_port: int,
    turns: int,
    rate: int,
    seconds: float,
    settle: float,
    watched: dict[str, list[int]],
) -> dict[str, Any]:
    """Many turns at once, as ``stream`` has them, but read by the real client: one for each turn.

    Args:
        carrier: The only one allowed; ``None``: no client of ours, but a plain ``fetch`` in the same process.
        port: Of what is measured.
        backend_port: For the gate.
        turns: One session each.
        rate: Chunks a second of each turn.
        seconds: Of the window in which chunks count.
        settle: Seconds before the first chunks, and between them and the first that counts.
        watched: Pids by name, whose processor time is told per chunk.

    Raises:
        BenchError: Not every chunk came once and in order.
    """
    order = {"chunks": ENDLESS, "rate": rate, "gated": True, "endless": False}
    async with NodeProgram() as program:
        watched = watched | {"client": [program.pid], "beside": [*watched["beside"], program.pid]}
        await program.ask("start", carrier=carrier, port=port, turns=turns, order=order)
        await until(backend_port, [], lambda state: bool(state["gated"] == turns))
        await asyncio.sleep(settle)  # what the starts left behind
        await ask(backend_port, "/go")
        await program.ask("begun")
        await asyncio.sleep(settle)
        begin = Reading.of(watched)
        await program.ask("open")
        await asyncio.sleep(seconds)
        told = await program.ask("close")
        end = Reading.of(watched)
        before = (await ask(backend_port, "/state"))["written"]
        await ask(backend_port, "/stop")
        received = (await program.ask("ended"))["received"]
        written = (await ask(backend_port, "/state"))["written"] - before
    if written != received:
        raise BenchError(f"unable to measure; {received} of {written} chunks came")
    meter = Meter(latencies=told["latencies"], count=len(told["latencies"]))
    requests = told["requests"] / turns / ((end.at - begin.at) / 1e9)
    return {**figures(meter, begin, end), "requests_per_second": requests}


async def first_chunk(*, port: int, times: int, timing: dict[str, int]) -> dict[str, Any]:
    """Medians of the time from a send to its first chunk, by what is blocked: first in a tab, and again."""
    found: dict[Block, list[list[int]]] = {block: [] for block in Block}
    async with NodeProgram() as program:
        for carrier in CARRIERS:  # what a program loads when it is used first is not the network's
            await program.ask("first", port=port, carrier=carrier, order=SHORT)
        for _ in range(times):
            for block in Block:
                found[block].append(await _in_a_tab(program, port, block, timing))
    medians = {
        block: [statistics.median(one) for one in zip(*taken, strict=True)] for block, taken in found.items()
    }
    return {block: {"first_ns": first, "next_ns": again} for block, (first, again) in medians.items()}


async def _in_a_tab(program: NodeProgram, port: int, block: Block, timing: dict[str, int]) -> list[int]:
    await program.ask("tab")
    async with Proxy(port, block) as proxy:
        taken = []
        for _ in range(2):
            reached = port if block is Block.NOTHING else proxy.port
            told = await program.ask("first", port=reached, timing=timing, order=SHORT)
            if told["carrier"] != EXPECTED[block]:
                raise BenchError(f"unable to measure; with {block} the carrier was {told['carrier']}")
            taken.append(told["nanoseconds"])
    return taken


async def reconnect(
    *, port: int, carrier: str, cuts: int, rate: int, timing: dict[str, int]
) -> dict[str, Any]:
    """Median time from a reset of all connections until the client has the first chunk written after it.

    Raises:
        BenchError: A chunk was lost or came twice, or hardly any cut met a connection.
    """
    order = {"chunks": ENDLESS, "rate": rate, "gated": False, "endless": True}
    taken: list[int] = []
    async with Proxy(port) as proxy, NodeProgram() as program:
        await program.ask("start", carrier=carrier, port=proxy.port, turns=1, order=order, timing=timing)
        for _ in range(TRIES * cuts):
            await program.ask("settled", chunks=SETTLED_CHUNKS)
            await asyncio.sleep(random.random() / rate)  # a cut may come at any moment between two chunks
            told = await program.ask("recovered", cut=str(proxy.cut()))
            if told["was_lost"]:
                taken.append(told["nanoseconds"])
            if len(taken) == cuts:
                break
        await program.ask("cancel")
    if len(taken) < cuts:
        raise BenchError(f"unable to measure; {len(taken)} of {TRIES * cuts} cuts met a connection")
    return {"p50_ns": statistics.median(taken)}
