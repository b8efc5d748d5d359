"""Signs of life on every open stream, and what becomes of a client that gives none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.backend import ScriptedBackend, until_released
from tests.support.client import SessionClient
from tests.support.wires import HttpChat, SdkClient

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.app import Node

    MakeNode = Callable[..., Awaitable[Node]]


async def test_the_session_protocol_gets_heartbeats(make_node: MakeNode) -> None:
    """A client that hears nothing for twice as long as it was told reconnects."""
    node = await make_node("http://127.0.0.1:1", heartbeat_seconds=0.05)
    async with SessionClient(node.address) as client:
        await client.wait(lambda line: line == {"type": "heartbeat"}, count=10)
        assert client.told[0]["heartbeat"] == 0.05
        assert (await client.ask(type="ping"))["type"] == "pong"


async def test_a_client_that_answers_no_ping_is_closed(make_node: MakeNode) -> None:
    """Half-open connections look alive from here for hours; 4001 says: come back."""
    node = await make_node("http://127.0.0.1:1", heartbeat_seconds=0.05)
    async with SessionClient(node.address, heartbeat=False) as client:
        assert await client.closed() == 4001


async def test_a_quiet_http_stream_gets_comments(make_node: MakeNode) -> None:
    """Proxies close what is silent for a minute; a comment is nothing to the SDK."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url, heartbeat_seconds=0.05)
        async with HttpChat(node.address) as http:
            posted = await http.post("s")
            watched = await http.stream("s")
            for answer in (posted, watched):
                await answer.came(b"\n\n: heartbeat\n\n: heartbeat\n\n: heartbeat")
            (await backend.exchange()).release.set()
            for answer in (posted, watched):
                await answer.end()
                assert answer.text == "onetwo"


async def test_the_sdks_socket_is_pinged(make_node: MakeNode) -> None:
    """It knows no other sign of life; a frame of ours would be one that it does not know."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url, heartbeat_seconds=0.05)
        async with SdkClient(node.address) as sdk:
            await sdk.send("r1", "s")
            await sdk.wait(lambda: sdk.pings > 5)
            (await backend.exchange()).release.set()
            await sdk.ended("r1")
            assert sdk.text("r1") == "onetwo"
            assert {frame["type"] for frame in sdk.told} == {"chunk", "end"}
