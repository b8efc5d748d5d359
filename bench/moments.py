"""What happens once: a client that comes new, a cancel, a socket that does nothing.

What is measured is measured by the raw clients. By ``gateway.client``, which decodes every record, a catch-up
of 10,000 chunks takes more than twice as long, and a cancel's answer some 40 to 60 % longer: its own work.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from bench.answers import Answer, BenchError, Meter
from bench.clients import (
    CHAT_PATH,
    SECONDS,
    HttpClient,
    SocketClient,
    Wire,
    ask,
    attach,
    connect,
    post,
    resume,
)
from bench.processes import memory_bytes
from bench.streaming import ENDLESS, TOGETHER, all_ended, gather, percentile, started, until
from gateway.client import GatewayClient


async def catch_up(*, port: int, chunks: int, times: int, settle: float, wires: list[Wire]) -> dict[str, Any]:
    """How long a client that comes new takes to have all of a running turn, for each wire.

    Raises:
        BenchError: The turn did not run any more.
    """
    order = {"chunks": chunks, "rate": 0, "gated": False, "endless": True}
    answers, (client,), (session,) = await started(Wire.SESSION, port, 1, order, Meter())
    await all_ended(answers)
    client.close()  # nobody is attached: what comes now reads the journal
    await asyncio.sleep(settle)
    found: dict[str, list[int]] = {wire: [] for wire in wires}
    for _ in range(times):
        for wire in wires:
            answer = Answer(chunks, Meter(), endless=True)
            asked_at = time.monotonic_ns()
            reader = await connect(port, wire, answer)
            resume(reader, wire, session)
            await all_ended([answer])
            found[wire].append(answer.ended.result() - asked_at)
            reader.close()
            await asyncio.sleep(0.05)
    async with GatewayClient(f"http://127.0.0.1:{port}") as gateway:
        results = await gateway.cancel(session)  # what is measured next shall not share a node with it
    if list(results.values()) != ["cancelled"]:
        raise BenchError(f"unable to measure; ending the turn was answered {results}")
    return {wire: percentile(values, 0.5) for wire, values in found.items()}


async def cancel(
    *,
    wire: Wire,
    port: int,
    backend_port: int,
    turns: int,
    rate: int,
    settle: float,
    cancel_port: int | None = None,
) -> dict[str, Any]:
    """Typed cancels, one after the other, while the rest of the turns stream.

    Args:
        wire: How to speak.
        port: Of the node where the turns are asked for and read.
        backend_port: Tells when it saw a close.
        turns: How many there are to cancel.
        rate: Chunks a second of each.
        settle: Seconds before the first cancel.
        cancel_port: Of another node, which is asked to cancel instead, on one socket for all.

    Raises:
        BenchError: A cancel was answered before the backend had seen the close.
    """
    order = {"chunks": ENDLESS, "rate": rate, "gated": False, "endless": True}
    before = (await ask(backend_port, "/state"))["talking"]
    answers, clients, sessions = await started(wire, port, turns, order, Meter())
    await until(backend_port, answers, lambda state: bool(state["talking"] == before + turns))
    elsewhere = None if cancel_port is None else await connect(cancel_port, wire, Answer(None, Meter()))
    await asyncio.sleep(settle)
    told: dict[str, tuple[int, int]] = {}
    for client, session in zip(clients, sessions, strict=True):
        if client.answer.ended.done():
            client.answer.ended.result()
        client.answer.ended.cancel()  # what ends from here on ends because it was asked to
        told[session] = await _cancel(elsewhere or client, port, session)
        client.close()
    if elsewhere is not None:
        elsewhere.answer.ended.cancel()
        elsewhere.close()
    return _figures(told, (await ask(backend_port, "/state"))["closes"])


def _figures(told: dict[str, tuple[int, int]], closes: dict[str, int]) -> dict[str, Any]:
    late = [
        name for name, (_, answered_at) in told.items() if closes.get(name, answered_at + 1) > answered_at
    ]
    if late:
        raise BenchError(f"unable to measure; {len(late)} cancels were answered before the backend knew")
    closing = [closes[session] - asked_at for session, (asked_at, _) in told.items()]
    answering = [answered_at - asked_at for asked_at, answered_at in told.values()]
    return {
        "close_p50_ns": percentile(closing, 0.5),
        "close_p99_ns": percentile(closing, 0.99),
        "answer_p50_ns": percentile(answering, 0.5),
        "answer_p99_ns": percentile(answering, 0.99),
    }


async def _cancel(client: HttpClient | SocketClient, port: int, session: str) -> tuple[int, int]:
    """Cancel a turn; returns when that was asked, and when answered."""
    asked_at = time.monotonic_ns()
    async with asyncio.timeout(SECONDS):
        if isinstance(client, SocketClient):
            client.reply = asyncio.get_running_loop().create_future()
            client.say({"type": "cancel", "id": 2, "session": session})
            answered_at, reply = await client.reply
        else:
            reply = await post(port, f"{CHAT_PATH}/{session}/stop")
            answered_at = time.monotonic_ns()
    if b'"result":"cancelled"' not in reply:
        raise BenchError(f"unable to measure; a cancel was answered {reply[:200]!r}")
    return asked_at, answered_at


async def idle(*, wire: Wire, port: int, sockets: int, pid: int, settle: float) -> dict[str, Any]:
    """How much a process grows by sockets that do nothing, each attached to a session of its own."""
    kept = await _idle_sockets(wire, port, TOGETHER)  # what the first ones load is not theirs
    await asyncio.sleep(settle)
    before = memory_bytes(pid)
    kept += await _idle_sockets(wire, port, sockets)
    await asyncio.sleep(settle)
    grown = memory_bytes(pid) - before
    for client in kept:
        client.answer.ended.cancel()
        client.close()
    return {"bytes_per_socket": grown / sockets}


async def _idle_sockets(wire: Wire, port: int, count: int) -> list[SocketClient]:
    async def open_one() -> SocketClient:
        client = await connect(port, wire, Answer(1, Meter()))
        assert isinstance(client, SocketClient)
        if wire is Wire.SESSION:
            await attach(client, f"s-{uuid.uuid4()}")
        return client

    return await gather([open_one] * count)
