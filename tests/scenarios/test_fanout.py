"""Everybody attached sees it live, and nobody's trouble reaches another."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from gateway.core.tail import TAIL_BYTES
from tests.support.backend import Exchange, ScriptedBackend, until_released
from tests.support.client import SessionClient
from tests.support.wires import HttpChat, SdkClient, eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import aiohttp

    from gateway.app import Node
    from gateway.core.tail import Tail

    MakeNode = Callable[..., Awaitable[Node]]

BIG = "x" * 4000


def pushed(client: SessionClient) -> list[str]:
    """The records as they came, byte for byte."""
    return [line for frame in client.frames for line in frame.split("\n") if '"offset":' in line[:400]
            and json.loads(line)["type"] != "attached"]  # fmt: skip


def tail_of(node: Node, session: str) -> Tail:
    found: Tail = node._sessions._hub._tails[session]  # type: ignore[index]  # a test names it
    return found


async def test_two_hundred_clients_see_the_same_bytes(make_node: MakeNode) -> None:
    """A class room, a shared incident: one answer, encoded once, told to all."""

    async def script(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.text(finish=False)
        await exchange.release.wait()
        for number in range(100):
            await exchange.say({"type": "text-delta", "id": "t1", "delta": f"{number} "})
            await asyncio.sleep(0)
        await exchange.text(start=False)

    async with ScriptedBackend(script) as backend, AsyncExitStack() as stack:
        node = await make_node(backend.url)
        clients = [SessionClient(node.address) for _ in range(200)]
        for some in range(0, 200, 50):
            await asyncio.gather(*(stack.enter_async_context(c) for c in clients[some : some + 50]))
        await asyncio.gather(*(client.attach("s") for client in clients[:100]))
        await clients[0].send("s", "t1")
        exchange = await backend.exchange()
        exchange.release.set()
        await asyncio.gather(*(client.attach("s") for client in clients[100:]))  # in the middle of it
        await asyncio.gather(*(client.ended("t1") for client in clients))
        expected = pushed(clients[0])
        assert len(expected) == 108
        assert all(pushed(client) == expected for client in clients)


async def test_one_answer_reaches_every_wire(make_node: MakeNode) -> None:
    """Three views of one journal: whoever asks, however."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with (
            SessionClient(node.address) as client,
            HttpChat(node.address) as http,
            SdkClient(node.address) as sdk,
        ):
            await client.attach("s")
            posted = await http.post("s")
            await posted.has(4)
            await sdk.resume("r1", "s")
            watched = await http.stream("s")
            await sdk.has("r1", 4)
            (await backend.exchange()).release.set()
            await posted.end()
            await watched.end()
            await sdk.ended("r1")
            await client.ended(posted.turn)
            chunks = [record["data"] for record in client.records if record["type"] == "chunk"]
            assert posted.raw == watched.raw
            assert posted.chunks == chunks == sdk.chunks("r1")


async def test_one_socket_carries_many_sessions(make_node: MakeNode) -> None:
    """A page with a list of chats has one socket; nothing of one shows in another."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client:
            sessions = [f"s{number}" for number in range(50)]
            await asyncio.gather(*(client.attach(session) for session in sessions))
            await asyncio.gather(*(client.send(session, f"turn-of-{session}") for session in sessions))
            for number in range(50):
                (await backend.exchange(number)).release.set()
            for session in sessions:
                await client.ended(f"turn-of-{session}")
            for session in sessions:
                ours = [record for record in client.records if record["session"] == session]
                assert [record["offset"] for record in ours] == list(range(1, 11))
                assert {record["turn"] for record in ours} == {f"turn-of-{session}"}


async def big_answer(exchange: Exchange) -> None:
    """Some 12 MB, as fast as it is taken."""
    await exchange.head()
    await exchange.text(finish=False)
    for _ in range(300):
        await exchange.say(*[{"type": "text-delta", "id": "t1", "delta": BIG}] * 10)
    await exchange.text(start=False)


def stop_reading(connection: aiohttp.connector.Connection | None) -> Any:
    """Take no more from the socket; returns its transport."""
    assert connection is not None
    transport: Any = connection.transport
    transport.pause_reading()
    return transport


async def test_a_client_that_does_not_read_delays_nobody_and_catches_up(make_node: MakeNode) -> None:
    """Neither the backend nor another client waits for it, and what waits for it has a bound (G8, G10)."""
    async with ScriptedBackend(big_answer) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as stuck, SessionClient(node.address) as other:
            await stuck.attach("s")
            await other.attach("s")
            transport = stop_reading(stuck.socket._response.connection)
            await other.send("s", "t1")
            await other.ended("t1")
            assert len(other.records) == 3008
            assert len(stuck.records) < 300
            assert tail_of(node, "s").size <= TAIL_BYTES
            transport.resume_reading()
            await stuck.ended("t1")
            assert stuck.offsets == list(range(1, 3009))
            assert stuck.text == other.text


async def test_a_client_that_takes_nothing_is_dropped(make_node: MakeNode) -> None:
    """A half-open connection would hold its buffers for ever; its client resumes by cursor."""
    async with ScriptedBackend(big_answer) as backend:
        node = await make_node(backend.url, heartbeat_seconds=0.6)
        async with (
            SessionClient(node.address) as stuck,
            SessionClient(node.address) as other,
            HttpChat(node.address) as http,
        ):
            await stuck.attach("s")
            await other.attach("s")
            transport = stop_reading(stuck.socket._response.connection)
            answer = await http.post("s")
            stop_reading(answer.response.connection)
            await other.ended(answer.turn)
            await eventually(lambda: {s.carrier for s in tail_of(node, "s").subscribers} == {"websocket"})
            await eventually(lambda: len(tail_of(node, "s").subscribers) == 1)
            transport.resume_reading()
            await stuck.closed()
            async with SessionClient(node.address) as again:
                await again.attach("s", stuck.records[-1]["cursor"])
                await again.ended(answer.turn)
                assert stuck.offsets + again.offsets == list(range(1, 3009))


async def test_a_client_that_is_too_far_behind_is_told(make_node: MakeNode) -> None:
    """Past GATEWAY_MAX_LAG it gets `resync`, is detached, and starts from a complete state."""
    async with ScriptedBackend(big_answer) as backend:
        node = await make_node(backend.url, max_lag_bytes=1024 * 1024)
        async with SessionClient(node.address) as stuck, HttpChat(node.address) as http:
            await stuck.attach("s")
            transport = stop_reading(stuck.socket._response.connection)
            answer = await http.post("s")
            await answer.cut()
            await eventually(lambda: not node._turns._producers)
            transport.resume_reading()
            told = await stuck.wait(lambda line: line["type"] == "resync")
            assert told == {"type": "resync", "session": "s", "reason": "too-far-behind"}
            assert stuck.told[-1] is told
            count = len(stuck.records)
            await stuck.attach("s")
            await stuck.ended(answer.turn)
            assert stuck.offsets[count:] == list(range(1, 3009))
