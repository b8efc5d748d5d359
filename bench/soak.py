"""Turns on every carrier, with cancels and losses, for as long as it takes a leak to show."""

from __future__ import annotations

import asyncio
import json
import uuid
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from bench.answers import Answer, BenchError, Meter
from bench.clients import (
    CHAT_PATH,
    SECONDS,
    HttpClient,
    Wire,
    connect,
    get,
    post,
    post_send,
    resume,
    send,
)
from bench.processes import open_files, resident
from bench.streaming import until

if TYPE_CHECKING:
    from collections.abc import Iterator

_EVENTS = "/gateway/v1/sessions/{session}/events"


class Carrier(StrEnum):
    """How a client of the soak reads."""

    HTTP = "http"
    SDK = "sdk"
    SESSION = "session"
    SSE = "sse"
    LONG_POLL = "long-poll"


class Fate(StrEnum):
    """What becomes of a turn."""

    WHOLE = "read to its end"
    CANCELLED = "cancelled half-way"
    LEFT = "left half-way, and never asked for again"
    RESUMED = "left half-way, and read from its start again"


@dataclass(frozen=True, slots=True)
class Soak:
    """What each turn is made of."""

    port: int
    backend_port: int
    chunks: int
    rate: int

    async def turn(self, index: int) -> None:
        """One turn of a session of its own; who reads it, and to what end, goes by its number."""
        carriers, fates = list(Carrier), list(Fate)
        carrier = carriers[index % len(carriers)]
        fate = fates[index // len(carriers) % len(fates)]
        async with asyncio.timeout(SECONDS):
            if carrier is Carrier.LONG_POLL:
                await self._polled(fate)
            else:
                await self._streamed(carrier, fate)

    async def _streamed(self, carrier: Carrier, fate: Fate) -> None:
        session, answer = _new_session(), self._answer()
        wire = Wire.HTTP if carrier is Carrier.SSE else Wire(carrier)
        client = await connect(self.port, wire, answer)
        if isinstance(client, HttpClient) and carrier is Carrier.SSE:
            await post_send(self.port, session, self._order())
            client.request("GET", _EVENTS.format(session=session))
        else:
            send(client, wire, session, self._order())
        if fate is Fate.WHOLE:
            await answer.ended
        else:
            await self._half(answer)
            answer.ended.cancel()
        if fate is Fate.CANCELLED:
            await self._cancel(session)
        client.close()
        if fate is Fate.RESUMED:
            await self._resumed(session)

    async def _resumed(self, session: str) -> None:
        """By the session protocol: on the SDK's wires a turn that ended meanwhile may count as read."""
        answer = self._answer()
        client = await connect(self.port, Wire.SESSION, answer)
        resume(client, Wire.SESSION, session)
        await answer.ended
        client.close()

    async def _polled(self, fate: Fate) -> None:
        session, answer = _new_session(), self._answer()
        await post_send(self.port, session, self._order())
        path = f"{_EVENTS.format(session=session)}?wait=10"
        cursor = ""
        while not answer.ended.done():
            told = await get(self.port, path + cursor, "Accept: application/json\r\n")
            body = told.partition(b"\r\n\r\n")[2]
            answer.take(body, 0)
            cursor = f"&after={json.loads(body)['cursor']}"
            if fate in {Fate.CANCELLED, Fate.LEFT} and answer.received >= self.chunks // 2:
                break
        if fate is Fate.CANCELLED:
            await self._cancel(session)

    async def _cancel(self, session: str) -> None:
        told = await post(self.port, f"{CHAT_PATH}/{session}/stop")
        if b" 200 " not in told[:20]:
            raise BenchError(f"unable to measure; a cancel was answered {told[:200]!r}")

    async def _half(self, answer: Answer) -> None:
        """Wait until half of it came."""
        await answer.begun
        while answer.received < self.chunks // 2 and not answer.ended.done():  # noqa: ASYNC110 - its own clock
            await asyncio.sleep(0.01)

    def _answer(self) -> Answer:
        return Answer(self.chunks, Meter(), endless=True)

    def _order(self) -> dict[str, Any]:
        return {"chunks": self.chunks, "rate": self.rate, "gated": False, "endless": False}


def _new_session() -> str:
    return f"s-{uuid.uuid4()}"


async def soak(
    *,
    port: int,
    backend_port: int,
    pid: int,
    turns: int,
    steps: int,
    together: int,
    chunks: int,
    rate: int,
    hold_seconds: float,
) -> dict[str, Any]:
    """So many turns through one node, and its size after each step, when it holds nothing any more.

    Args:
        port: Of the node.
        backend_port: Tells when no turn runs any more.
        pid: Of the node.
        turns: How many in all.
        steps: How many times its size is taken; the first is the warm-up.
        together: Turns under way at once.
        chunks: Of each.
        rate: Chunks a second of each.
        hold_seconds: For which a node keeps what it had of an ended turn, and a little more.
    """
    load = Soak(port, backend_port, chunks, rate)
    samples = []
    done = 0
    for step in range(1, steps + 1):
        count = turns * step // steps
        indexes = iter(range(done, count))
        await asyncio.gather(*[_one_after_the_other(load, indexes) for _ in range(together)])
        done = count
        await until(backend_port, [], lambda state: not state["talking"])
        await asyncio.sleep(hold_seconds)
        samples.append({"turns": count, "bytes": resident(pid).now, "files": open_files(pid)})
    return {"samples": samples}


async def _one_after_the_other(load: Soak, indexes: Iterator[int]) -> None:
    for index in indexes:
        await load.turn(index)
