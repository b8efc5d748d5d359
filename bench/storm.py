"""Crowds: idle beside turns that stream, all at once to the node that is left, all at once far behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import Any

from bench.answers import Meter
from bench.clients import Wire, ask
from bench.processes import forget_peak, resident
from bench.program import Program
from bench.streaming import ENDLESS, TOGETHER, Reading, percentile, started, stop, stream, until


def crowd_program() -> Program:
    """Many clients, in a process of their own."""
    return Program("the crowd", sys.executable, "-m", "bench.crowd")


async def idle_crowd(
    *, pid: int, sockets: int, idle_seconds: float, settle: float, port: int, **load: Any
) -> dict[str, Any]:
    """Turns that stream beside nobody, then beside so many idle sockets; and what those cost a node.

    Args:
        pid: Of the node.
        sockets: How many, each attached to a session of its own, of which nothing is journalled.
        idle_seconds: For how long the idle node is watched with them; alone a third of it.
        settle: Seconds before each window.
        port: Of the node.
        **load: As ``stream`` takes it.
    """
    watched = load["watched"]
    async with crowd_program() as crowd:
        await crowd.ask("come", port=port, count=TOGETHER, together=TOGETHER)  # what the first ones load
        alone = await stream(wire=Wire.SESSION, port=port, settle=settle, **load)
        alone_idle = await _idle_shares(watched, idle_seconds / 3, settle)
        before = resident(pid).now
        told = await crowd.ask("come", port=port, count=sockets, together=TOGETHER)
        among_idle = await _idle_shares(watched, idle_seconds, settle)
        grown = resident(pid).now - before
        among = await stream(wire=Wire.SESSION, port=port, settle=settle, **load)
        await crowd.ask("leave")
    return {
        "bytes_per_socket": grown / sockets,
        "attach_seconds": (max(told["attached_at"]) - min(told["attached_at"])) / 1e9,
        "alone": alone | {"idle": alone_idle},
        "among": among | {"idle": among_idle},
    }


async def _idle_shares(watched: dict[str, list[int]], seconds: float, settle: float) -> dict[str, float]:
    """Of a core, by name."""
    await asyncio.sleep(settle)
    begin = Reading.of(watched)
    await asyncio.sleep(seconds)
    end = Reading.of(watched)
    lasted = end.at - begin.at
    return {name: (end.processor[name] - begin.processor[name]) / lasted for name in watched}


async def storm(
    *,
    ports: list[int],
    pids: list[int],
    backend_port: int,
    clients: int,
    sessions: int,
    records: int,
    back: int,
    turns: int,
    rate: int,
    seconds: float,
    jitter: bool,
    settle: float,
    watched: dict[str, list[int]],
) -> dict[str, Any]:
    """The first of two nodes dies, and all of its clients come to the second, on which turns run.

    Args:
        ports: Of both nodes.
        pids: The same.
        backend_port: For the gate.
        clients: How many there are to come.
        sessions: Among which they share.
        records: About so many in each.
        back: Records that each has still to get.
        turns: On the second node, each read by a client of its own.
        rate: Chunks a second of each.
        seconds: For which their latency is measured before.
        jitter: Whether the clients wait as those do that we ship.
        settle: Seconds before each window.
        watched: Pids by name, whose processor time is told per client.
    """
    meter = Meter()
    order = {"chunks": ENDLESS, "rate": rate, "gated": True, "endless": False}
    async with crowd_program() as crowd:
        await crowd.ask("fill", port=ports[0], sessions=sessions, chunks=records, back=back)
        await crowd.ask("come", port=ports[0], count=clients, together=TOGETHER)
        answers, readers, _ = await started(Wire.SESSION, ports[1], turns, order, meter)
        await until(backend_port, answers, lambda state: bool(state["gated"] == turns))
        await ask(backend_port, "/go")
        await asyncio.gather(*[answer.begun for answer in answers])
        await asyncio.sleep(settle)
        calm = await _latencies(meter, asyncio.create_task(asyncio.sleep(seconds)))
        before = resident(pids[1]).now
        forget_peak(pids[1])
        begin = Reading.of(watched)
        moving = asyncio.create_task(crowd.ask("move", port=ports[1], jitter=jitter))
        await asyncio.sleep(settle)
        killed_at = time.monotonic_ns()
        os.kill(pids[0], signal.SIGKILL)
        stormy = await _latencies(meter, moving)
        end = Reading.of(watched)
        after = resident(pids[1])
        told = moving.result()
        await stop(backend_port, answers)
        for reader in readers:
            reader.close()
    return {
        **_moments(told, killed_at),
        "cpu_ns_per_client": _costs(begin, end, clients),
        "peak_bytes": after.peak - before,
        "kept_bytes": after.now - before,
        "calm": calm,
        "stormy": stormy,
    }


async def catch_up_crowd(
    *,
    port: int,
    pid: int,
    clients: int,
    sessions: int,
    records: int,
    settle: float,
    watched: dict[str, list[int]],
) -> dict[str, Any]:
    """So many clients come at once, each with the cursor of the first of so many records."""
    async with crowd_program() as crowd:
        await crowd.ask("fill", port=port, sessions=sessions, chunks=records, back=records)
        await asyncio.sleep(settle)
        before = resident(pid).now
        forget_peak(pid)
        begin = Reading.of(watched)
        told = await crowd.ask("come", port=port, count=clients, together=clients)
        end = Reading.of(watched)
        after = resident(pid)
    return {
        **_moments(told, begin.at),
        "cpu_ns_per_client": _costs(begin, end, clients),
        "peak_bytes": after.peak - before,
        "kept_bytes": after.now - before,
    }


def _costs(begin: Reading, end: Reading, clients: int) -> dict[str, float]:
    return {name: (end.processor[name] - begin.processor[name]) / clients for name in begin.processor}


def _moments(told: dict[str, Any], since: int) -> dict[str, Any]:
    return {
        "attached_p50_ns": percentile(told["attached_at"], 0.5) - since,
        "attached_max_ns": max(told["attached_at"]) - since,
        "caught_up_p50_ns": percentile(told["caught_up_at"], 0.5) - since,
        "caught_up_max_ns": max(told["caught_up_at"]) - since,
        "refused": told["refused"],
        "lost": told["lost"],
        "records": told["records"],
    }


async def _latencies(meter: Meter, while_running: asyncio.Task[Any]) -> dict[str, float]:
    meter.latencies, meter.is_open = [], True
    try:
        await while_running
    finally:
        meter.is_open = False
    values = meter.latencies
    return {
        "p50_ns": percentile(values, 0.5),
        "p99_ns": percentile(values, 0.99),
        "max_ns": float(max(values)),
    }
