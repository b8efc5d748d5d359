"""A frozen network lets nothing pass, and a thaw passes what it kept."""

from __future__ import annotations

import socket

import aiohttp
import pytest

from tests.support.network import Network
from tests.support.site import NEVER, Raw, Server, Site, both_ends, line


async def test_a_frozen_connection_passes_what_piled_up(
    site: Site, network: Network, http: aiohttp.ClientSession
) -> None:
    """A laptop that was asleep for a moment."""
    async with http.ws_connect("/ws", max_msg_size=0) as echo:
        await echo.send_str("before")
        assert await echo.receive_str() == "before"
        network.freeze()
        await echo.send_str("one")
        await echo.send_str("two")
        await site.settle()
        assert (site.heard, network.open) == (["before"], 1)
        network.thaw()
        assert [await echo.receive_str(), await echo.receive_str()] == ["one", "two"]


async def test_what_is_under_way_when_the_frost_comes_stops(site: Site) -> None:
    """Also a chunk in the network's hand, and one written half."""
    async with line() as (network, client, served):
        network.delay_seconds = NEVER
        await served.say(b"delayed")
        await network.until(lambda: network.bytes_down == 7)
        network.freeze()
        network.delay_seconds = 0.0
        await site.settle()
        assert client.hears_nothing()
        network.thaw()
        assert await client.hear(7) == b"delayed"


@both_ends
@pytest.mark.parametrize("discard", [True, False])
@pytest.mark.parametrize("connecting", [True, False])
async def test_an_end_is_not_seen_before_the_thaw(
    site: Site, *, connecting: bool, discard: bool, reset: bool
) -> None:
    """Who sleeps does not hear that the other one left."""
    async with line() as (network, client, served):
        if not connecting:
            await served.say(b"!")
            assert await client.hear(1) == b"!"
        network.freeze(discard=discard)
        if reset:
            served.end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        served.end.close()
        network.split = 9  # whoever looks again still finds the frost
        await site.settle()
        assert client.hears_nothing()
        network.thaw()
        assert await client.rest() == (b"", reset)


async def test_nothing_is_read_in_the_frost(site: Site) -> None:
    """Its peers get held up, when the buffers of the kernel are full."""
    async with line() as (network, client, served):
        await served.say(b"!")
        assert await client.hear(1) == b"!"
        network.freeze()
        await served.say(b"piled up")
        await site.settle()
        network.split = 3  # whoever looks again still finds the frost
        await site.settle()
        assert network.bytes_down == 1
        network.thaw()
        assert await client.hear(8) == b"piled up"


async def test_a_frozen_reader_that_discards_holds_nobody_up() -> None:
    """Its connection has a hole then, and dies of it as it wakes; one that lost nothing lives."""
    async with Server() as server, Network(server.address) as network:
        with (
            await Raw.to(network.address) as loser,
            await server.taken() as loser_served,
            await Raw.to(network.address) as quiet,
            await server.taken() as quiet_served,
        ):
            network.freeze(discard=True)
            for _ in range(100):
                await loser_served.say(b"x" * 1_000_000)
            assert loser.hears_nothing()
            assert network.bytes_down == 0
            await network.until(lambda: sum(each.lost for each in network._connections) == 1)
            network.thaw()
            assert await loser.rest() == (b"", True)
            await quiet_served.say(b"alive")
            assert await quiet.hear(5) == b"alive"
            assert (network.cuts, network.open) == (1, 1)


async def test_a_newcomer_in_the_frost_is_accepted_and_hears_nothing(site: Site, network: Network) -> None:
    """As on a network that drops every packet, but for the handshake."""
    network.freeze()
    with await Raw.to(network.address) as client:
        await client.say(b"GET /events HTTP/1.1\r\nHost: a\r\n\r\n")
        await network.connections(1)
        await site.settle()
        assert (site.asked, client.hears_nothing()) == ([], True)
        network.thaw()
        assert await client.hear(12) == b"HTTP/1.1 200"


async def test_a_newcomer_in_the_frost_is_unknown_to_the_gateway(site: Site) -> None:
    """It comes with the thaw."""
    async with Server() as server, Network(server.address) as network:
        network.freeze()
        with await Raw.to(network.address):
            await network.connections(1)
            await site.settle()
            with pytest.raises(BlockingIOError):
                server.listener.accept()
            network.thaw()
            with await server.taken():
                assert network.open == 1


async def test_the_open_ones_can_be_dead_while_newcomers_live(site: Site, network: Network) -> None:
    """The half-open connection of a client that changed networks."""
    async with aiohttp.ClientSession(f"http://{network.address}") as http, http.ws_connect("/ws") as old:
        network.freeze(newcomers=False)
        await old.send_str("into the void")
        async with http.ws_connect("/ws") as new:
            await new.send_str("hello")
            assert await new.receive_str() == "hello"
        assert site.heard == ["hello"]
        network.cut()
