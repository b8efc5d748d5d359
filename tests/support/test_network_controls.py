"""A network refuses, delays, splits and closes what is idle, as it is told."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.support.site import NEVER, WAIT_SECONDS, Raw, Site, line, long

if TYPE_CHECKING:
    from tests.support.network import Network


async def test_a_refused_connection_is_reset_at_once(site: Site, network: Network) -> None:
    """And the gateway never hears of it."""
    network.refuse()
    with await Raw.to(network.address) as client:
        assert await client.rest() == (b"", True)
    assert (network.refused, network.accepted, site.asked) == (1, 0, [])
    network.accept()
    async with aiohttp.ClientSession(f"http://{network.address}") as http:
        assert await long(http)


@pytest.mark.parametrize("upwards", [True, False])
async def test_what_is_delayed_comes_when_the_delay_ends(site: Site, *, upwards: bool) -> None:
    """A fault that ends must not last on in what it befell."""
    async with line() as (network, client, served):
        writer, reader = (client, served) if upwards else (served, client)
        network.delay_seconds = NEVER
        await writer.say(b"late")
        await site.settle()
        assert reader.hears_nothing()
        network.delay_seconds = 0.001
        await writer.say(b"r")
        assert await reader.hear(5) == b"later"


async def test_a_split_message_comes_in_pieces() -> None:
    """Frames that come torn are the rule in a browser."""
    pieces: list[int] = []
    async with line() as (network, client, served):
        network.split = 100
        await served.say(b"x" * 1000)
        while sum(pieces) < 1000:
            pieces.append(len(await asyncio.get_running_loop().sock_recv(client.end, 65_536)))
    assert len(pieces) > 5


async def test_a_silent_connection_is_closed_and_a_talking_one_is_not(
    network: Network, http: aiohttp.ClientSession
) -> None:
    """What a load balancer does to a stream without heartbeats."""
    async with http.ws_connect("/ws") as silent, http.ws_connect("/ws") as talking:
        network.idle_seconds = 0.5
        while not network.idle_cuts:
            await talking.send_str("hello")
            assert await talking.receive_str() == "hello"
        message = await silent.receive(WAIT_SECONDS)
        assert message.type is aiohttp.WSMsgType.CLOSED
        assert (network.idle_cuts, network.open, network.cuts) == (1, 1, 0)
        network.idle_seconds = None


async def test_a_frozen_connection_is_not_idle(site: Site) -> None:
    """The frost is the fault then; the clock begins again with the thaw."""
    async with line() as (network, client, served):
        network.freeze()
        network.idle_seconds = 0.05
        until = asyncio.get_running_loop().time() + 0.06
        while asyncio.get_running_loop().time() < until:
            await site.settle()
        network.thaw()
        assert network.open == 1
        assert await client.rest() == (b"", False)
        assert await served.rest() == (b"", False)
        assert network.idle_cuts == 1
