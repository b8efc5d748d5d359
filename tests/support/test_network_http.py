"""A network finds upgrades and streams in the HTTP of a connection, and passes all else."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.support.site import EVENTS, UPGRADE, Raw, Site, line, long

if TYPE_CHECKING:
    from tests.support.network import Network

# ── blocked upgrades ─────────────────────────────────────────────────────────────────────────────────


async def test_a_refused_upgrade_is_forbidden(
    site: Site, network: Network, http: aiohttp.ClientSession
) -> None:
    """As a corporate proxy does it; open sockets and other requests are left alone."""
    async with http.ws_connect("/ws") as before:
        network.block_upgrades = "refuse"
        with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
            await http.ws_connect("/ws")
        assert await long(http, b"a body")
        with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
            await http.ws_connect("/ws")  # on the connection that the last request kept alive
        await before.send_str("still open")
        assert await before.receive_str() == "still open"
        assert (network.upgrades_blocked, site.asked) == (2, ["/ws", "/long"])
    network.block_upgrades = None
    async with http.ws_connect("/ws") as after:
        await after.send_str("again")
        assert await after.receive_str() == "again"


async def test_a_refusal_is_whole_and_closes(network: Network) -> None:
    """A client that goes on talking must not lose the answer to a reset."""
    network.block_upgrades = "refuse"
    with await Raw.to(network.address) as client:
        await client.say(UPGRADE + b"x" * 1_000_000)
        heard, reset = await client.rest()
        assert heard.startswith(b"HTTP/1.1 403 ")
        assert heard.endswith(b"\r\n\r\nblocked\n")
        assert not reset


async def test_a_swallowed_upgrade_is_never_answered(site: Site, network: Network) -> None:
    """However its head was cut on the way; and nothing of it reaches the gateway."""
    network.block_upgrades = "swallow"
    with await Raw.to(network.address) as client:
        for number in range(len(UPGRADE)):
            await client.say(UPGRADE[number : number + 1])
        await network.until(lambda: network.upgrades_blocked == 1)
        await client.say(b"anybody?")
        await site.settle()
        assert (site.asked, client.hears_nothing(), network.open) == ([], True, 1)
        network.block_upgrades = None
        await site.settle()
        assert client.hears_nothing()
    await network.connections(0)


async def test_a_swallowed_upgrade_leaves_the_gateway_alone() -> None:
    """Nobody is there for it to answer."""
    async with line() as (network, client, served):
        network.block_upgrades = "swallow"
        await client.say(UPGRADE)
        assert await served.rest() == (b"", False)
        assert (client.hears_nothing(), network.open) == (True, 1)


async def test_a_head_is_held_back_until_it_is_known(site: Site) -> None:
    """Half a head could still become an upgrade; it passes when nothing is blocked any more."""
    async with line() as (network, client, served):
        network.block_upgrades = "refuse"
        await client.say(UPGRADE[:20])
        await network.until(lambda: network.bytes_up == 20)
        await site.settle()
        assert served.hears_nothing()
        network.block_upgrades = None
        assert await served.hear(20) == UPGRADE[:20]


# ── buffered streams ─────────────────────────────────────────────────────────────────────────────────


async def test_a_stream_is_held_back_until_it_ends(
    site: Site, network: Network, http: aiohttp.ClientSession
) -> None:
    """Head and all; other answers pass meanwhile, before and after, on the same connection too."""
    network.buffer_streams = True
    assert await long(http)
    getting = asyncio.create_task(http.get("/events"))
    await network.until(lambda: network.streams_held == 1)
    assert await long(http)
    await site.settle()
    assert not getting.done()
    site.go_on.set()
    async with await getting as answer:
        assert await answer.read() == EVENTS
    assert await long(http)
    async with http.get("/chunked") as answer:
        assert len(await answer.read()) == 3000
    assert (network.accepted, network.streams_held) == (2, 1)


async def test_a_stream_that_is_held_back_passes_when_nothing_is(
    site: Site, network: Network, http: aiohttp.ClientSession
) -> None:
    """A fault that ends must not last on in what it befell."""
    network.buffer_streams = True
    getting = asyncio.create_task(http.get("/events"))
    await network.until(lambda: network.streams_held == 1)
    network.buffer_streams = False
    async with await getting as answer:
        assert await answer.content.readexactly(11) == EVENTS[:11]
        site.go_on.set()
        assert await answer.read() == EVENTS[11:]


async def test_a_held_stream_without_a_length_ends_with_its_connection() -> None:
    """HTTP/1.0 and `Connection: close`."""
    said = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + EVENTS
    async with line() as (network, client, served):
        network.buffer_streams = True
        await client.say(b"GET / HTTP/1.1\r\n\r\n")
        assert len(await served.hear(18)) == 18
        await served.say(said)
        await network.until(lambda: network.bytes_down == len(said))
        assert client.hears_nothing()
        served.end.shutdown(socket.SHUT_WR)
        assert await client.hear(len(said) + 1) == said


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────


async def test_answers_without_a_body_do_not_hide_the_next() -> None:
    """`HEAD`, `204`, `304` and `100` have lengths that nothing follows."""
    stream = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9\r\n\r\n"
    answers = [
        (b"HEAD", stream),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n"),
        (b"POST", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"),
    ]
    async with line() as (network, client, served):
        network.buffer_streams = True
        for method, answer in answers:
            await client.say(method + b" / HTTP/1.1\r\n\r\n")
            await served.hear(len(method) + 15)
            await served.say(answer)
            assert await client.hear(len(answer)) == answer
        await client.say(b"GET / HTTP/1.1\r\n\r\n")
        await served.hear(18)
        await served.say(stream)
        await network.until(lambda: network.streams_held == 2)
        assert client.hears_nothing()
        await served.say(b"data: x\n\n")
        assert await client.hear(len(stream) + 9) == stream + b"data: x\n\n"
