"""Cancel means stopped; nothing but a cancel cancels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.backend import Exchange, ScriptedBackend
from tests.support.client import SessionClient

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.app import Node


async def endless(exchange: Exchange) -> None:
    await exchange.head()
    await exchange.text("one", "two", finish=False)
    await exchange.closed()


async def test_a_cancel_closes_the_upstream_and_then_ends_the_turn(
    make_node: Callable[..., Awaitable[Node]],
) -> None:
    """The backend has seen the close when the client has the answer."""
    async with ScriptedBackend(endless) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address, client="laptop") as client:
            await client.send("s", "t1")
            await client.wait(lambda line: line["type"] == "chunk", count=5)
            exchange = await backend.exchange()
            reply = await client.cancel("s", "t1")
            assert exchange.was_closed.is_set()
            assert reply["turns"] == [{"turn": "t1", "result": "cancelled"}]
            end = await client.ended("t1")
            assert end["reason"] == "cancelled"
            assert end["by"] == {"client": "laptop"}
            assert client.records[-2]["data"] == {"type": "text-end", "id": "t1"}
