"""Many turns at once: latency, rate, and what a chunk costs.

Processor times are read here, at the moments between which chunks are counted, so that neither the start of
turns nor that of this process is in a figure.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from bench.answers import Answer, BenchError, Meter
from bench.clients import (
    SECONDS,
    HttpClient,
    SocketClient,
    Wire,
    ask,
    attach,
    connect,
    post_send,
    send,
)
from bench.processes import processor_nanoseconds

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

ENDLESS = 1 << 26
"""Chunks of a turn that is to be stopped or cancelled."""

TOGETHER = 50
"""Connections that are opened at once."""


def percentile(values: list[int], share: float) -> float:
    """The value below which that share of them lies."""
    return float(sorted(values)[min(len(values) - 1, int(len(values) * share))])


@dataclass(frozen=True, slots=True)
class Reading:
    """A moment, and the processor time that was used until then, by name."""

    at: int
    processor: dict[str, int]

    @classmethod
    def of(cls, watched: dict[str, list[int]]) -> Reading:
        """Now. ``load`` is this process and what shares its core."""
        used = {name: processor_nanoseconds(pids) for name, pids in watched.items()}
        used["load"] = processor_nanoseconds([os.getpid(), *watched["beside"]])
        return cls(time.monotonic_ns(), used)


async def stream(
    *,
    wire: Wire,
    port: int,
    backend_port: int,
    turns: int,
    rate: int,
    seconds: float,
    chunks: int,
    settle: float,
    watched: dict[str, list[int]],
    read_port: int | None = None,
) -> dict[str, Any]:
    """Many turns at once.

    Args:
        wire: How to speak.
        port: Of what is measured.
        backend_port: For the gate.
        turns: One connection, one session each.
        rate: Chunks a second of each turn; 0: as fast as they are taken, and then ``chunks`` of them.
        seconds: Of the window in which chunks count.
        chunks: Of each turn, where ``rate`` is 0.
        settle: Seconds after the starts, and between the first chunks and the first that counts.
        watched: Pids by name, whose processor time is told per chunk.
        read_port: See :func:`started`.
    """
    meter = Meter()
    if rate:
        chunks = ENDLESS  # until the window is over
    order = {"chunks": chunks, "rate": rate, "gated": True, "endless": False}
    answers, clients, _ = await started(wire, port, turns, order, meter, read_port=read_port)
    await until(backend_port, answers, lambda state: bool(state["gated"] == turns))
    await asyncio.sleep(settle)  # what the starts left behind
    if rate:
        await ask(backend_port, "/go")
        async with asyncio.timeout(SECONDS):
            await asyncio.gather(*[answer.begun for answer in answers])
        await asyncio.sleep(settle)
        begin = Reading.of(watched)
        meter.is_open = True
        await asyncio.sleep(seconds)
        meter.is_open = False
        end = Reading.of(watched)
        await stop(backend_port, answers)
    else:
        begin = Reading.of(watched)
        meter.is_open = True
        await ask(backend_port, "/go")
        await all_ended(answers)
        end = replace(Reading.of(watched), at=meter.last_at)
    for client in clients:
        client.close()
    return figures(meter, begin, end)


async def stop(backend_port: int, answers: list[Answer]) -> int:
    """Have the turns finish, and compare what was written with what came; returns how much that was."""
    before = (await ask(backend_port, "/state"))["written"]
    await ask(backend_port, "/stop")
    await all_ended(answers)
    written = (await ask(backend_port, "/state"))["written"] - before
    received = sum(answer.received for answer in answers)
    if written != received:
        raise BenchError(f"unable to measure; {received} of {written} chunks came")
    return received


def figures(meter: Meter, begin: Reading, end: Reading) -> dict[str, Any]:
    """What was measured between two moments."""
    if not meter.latencies:
        raise BenchError("unable to measure; no chunk came while they were counted")
    lasted = end.at - begin.at
    used = {name: end.processor[name] - begin.processor[name] for name in begin.processor}
    return {
        "chunks_per_second": meter.count / lasted * 1e9,
        "p50_ns": percentile(meter.latencies, 0.5),
        "p99_ns": percentile(meter.latencies, 0.99),
        "cpu_ns_per_chunk": {name: nanoseconds / meter.count for name, nanoseconds in used.items()},
        "load_core_share": used["load"] / lasted,
    }


async def started(
    wire: Wire,
    port: int,
    turns: int,
    order: dict[str, Any],
    meter: Meter,
    *,
    read_port: int | None = None,
    make: type[Answer] = Answer,
) -> tuple[list[Answer], list[HttpClient | SocketClient], list[str]]:
    """Connect so many clients, and ask for a turn of a session of its own with each.

    Args:
        wire: How to speak.
        port: Where the turns are asked for.
        turns: How many.
        order: For the backend.
        meter: Of all answers.
        read_port: Where the clients are attached, all by WebSocket; the turns are asked for by POST then, so
            that nobody else is attached. ``None``: each client asks for its own.
        make: Of each answer.
    """
    chunks = None if order["chunks"] == ENDLESS else order["chunks"]
    answers = [make(chunks, meter, endless=order["endless"]) for _ in range(turns)]
    reached = port if read_port is None else read_port
    clients = await gather([partial(connect, reached, wire, answer) for answer in answers])
    sessions = [f"s-{uuid.uuid4()}" for _ in range(turns)]
    if read_port is None:
        for client, session in zip(clients, sessions, strict=True):
            send(client, wire, session, order)
    else:
        pairs = [(client, session) for client, session in zip(clients, sessions, strict=True)]
        await gather(
            [partial(attach, client, name) for client, name in pairs if isinstance(client, SocketClient)]
        )
        await gather([partial(post_send, port, session, order) for session in sessions])
    return answers, clients, sessions


async def gather(work: list[Callable[[], Awaitable[T]]], together: int = TOGETHER) -> list[T]:
    """All of it, a few at a time."""
    done: list[T] = []
    for start in range(0, len(work), together):
        done += await asyncio.gather(*[make() for make in work[start : start + together]])
    return done


async def until(backend_port: int, answers: list[Answer], reached: Callable[[dict[str, Any]], bool]) -> None:
    """Wait for a state of the backend; a turn that failed meanwhile is told at once."""
    async with asyncio.timeout(SECONDS):
        while not reached(await ask(backend_port, "/state")):
            for answer in answers:
                if answer.ended.done():
                    answer.ended.result()
            await asyncio.sleep(0.02)


async def all_ended(answers: list[Answer]) -> None:
    """Wait for the end of each, the first failure at once."""
    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*[answer.ended for answer in answers])
