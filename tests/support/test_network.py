"""The network does what it is told, and without being told nothing at all."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import socket
from pathlib import Path

import aiohttp
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.network import Network
from tests.support.site import EVENTS, LONG, UPGRADE, WAIT_SECONDS, Raw, Server, Site, both_ends, line, long
from tests.support.wires import eventually


def files() -> int:
    """How many this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


# ── passing through ──────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    up=st.lists(st.binary(min_size=1, max_size=3000), max_size=5),
    down=st.lists(st.binary(min_size=1, max_size=3000), max_size=5),
    split=st.sampled_from([None, 1, 7, 1000]),
    delay=st.sampled_from([0.0, 0.001]),
    buffers=st.booleans(),
)
@example(up=[UPGRADE], down=[b"HTTP/1.1 101 x\r\n\r\n", b"\r\n\x00"], split=1, delay=0.0, buffers=True)
@example(
    up=[b"GET / HTTP/1.1\r\n\r\n"],
    down=[b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", EVENTS],
    split=7,
    delay=0.0,
    buffers=True,
)
async def test_bytes_pass_unchanged(
    up: list[bytes], down: list[bytes], split: int | None, delay: float, *, buffers: bool
) -> None:
    """However they are cut and delayed, and whatever they look like."""
    async with line() as (network, client, served):
        network.split, network.delay_seconds, network.buffer_streams = split, delay, buffers

        async def speak(end: Raw, said: list[bytes]) -> None:
            for data in said:
                await end.say(data)
            end.end.shutdown(socket.SHUT_WR)

        ends = await asyncio.gather(speak(client, up), speak(served, down), served.rest(), client.rest())
        assert tuple(ends[2:]) == ((b"".join(up), False), (b"".join(down), False))
        await network.connections(0)


async def test_a_site_works_through_it(site: Site, network: Network, http: aiohttp.ClientSession) -> None:
    """WebSocket, long answer, long request and stream, torn into small pieces."""
    network.split = 4099
    async with http.ws_connect("/ws", max_msg_size=0) as echo:
        await echo.send_str(LONG)
        assert await echo.receive_str() == LONG
    assert await long(http, LONG.encode())
    site.go_on.set()
    async with http.get("/events") as answer:
        assert await answer.read() == EVENTS
    assert network.accepted == 2
    assert min(network.bytes_up, network.bytes_down) > 2 * len(LONG)


@pytest.mark.parametrize("upwards", [True, False])
async def test_a_reader_that_is_slow_holds_its_writer_up(*, upwards: bool) -> None:
    """A proxy that read ahead would hide a slow client from the gateway."""
    async with line() as (_, client, served):
        writer, reader = (client, served) if upwards else (served, client)
        block = random.Random(1).randbytes(1_000_003)
        total, sent, stalled = 400 * len(block), 0, 0
        while stalled < 2000 and sent < total:
            try:
                sent += writer.end.send(block[sent % len(block) :])
                stalled = 0
            except BlockingIOError:
                stalled += 1
                await asyncio.sleep(0)
        assert sent < total
        writer.end.shutdown(socket.SHUT_WR)
        heard, told = hashlib.sha256(), hashlib.sha256()
        count = 0
        while data := await reader.hear(1_000_003):
            heard.update(data)
            told.update(block[: len(data)])
            count += len(data)
        assert (count, heard.digest()) == (sent, told.digest())


async def test_a_half_closed_connection_goes_on() -> None:
    """A client that has nothing more to say may still listen."""
    async with line() as (network, client, served):
        client.end.shutdown(socket.SHUT_WR)
        assert await served.hear(1) == b""
        await served.say(b"still here")
        assert await client.hear(10) == b"still here"
        assert network.open == 1


@pytest.mark.parametrize("of_client", [True, False])
async def test_a_reset_of_one_side_reaches_the_other(*, of_client: bool) -> None:
    """A gateway must learn of a lost client as if there were no proxy."""
    async with line() as (network, client, served):
        gone, other = (client, served) if of_client else (served, client)
        gone.end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        gone.end.close()
        assert await other.rest() == (b"", True)
        assert network.cuts == 0


async def test_a_gateway_that_is_down_resets_its_clients() -> None:
    """And one that comes up elsewhere is reached by its new address."""
    async with Server() as server:
        gone = server.address
    async with Server() as server, Network(gone) as network:
        with await Raw.to(network.address) as client:
            assert await client.rest() == (b"", True)
        network.target = server.address
        with await Raw.to(network.address) as client, await server.taken() as served:
            await client.say(b"there")
            assert await served.hear(5) == b"there"


async def test_thousands_of_connections_leave_nothing(network: Network) -> None:
    """One network serves a long test."""
    before = files()

    async def visit(number: int) -> None:
        with await Raw.to(network.address) as client:
            if number % 3:
                await client.say(b"GET /chunked HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                heard, _ = await client.rest()
                assert heard.endswith(b"c" * 1000 + b"\r\n0\r\n\r\n")

    for start in range(0, 3000, 100):
        await asyncio.gather(*(visit(start + number) for number in range(100)))
    await network.until(lambda: network.accepted == 3000)
    await network.connections(0)
    await eventually(lambda: not network._tasks)
    await eventually(lambda: files() <= before)


async def test_a_failure_of_its_own_is_told() -> None:
    """A test must not pass on a network that is none."""
    network = await Network("127.0.0.1:nowhere").__aenter__()
    with await Raw.to(network.address) as client:
        await client.rest()
    with pytest.raises(ExceptionGroup, match="unable to be the network"):
        await network.__aexit__()


# ── cuts ─────────────────────────────────────────────────────────────────────────────────────────────


@both_ends
async def test_a_cut_ends_both_sides_of_every_connection(*, reset: bool) -> None:
    """As a network does it (reset), or a proxy that restarts (closed)."""
    async with Server() as server, Network(server.address) as network:
        with (
            await Raw.to(network.address) as one,
            await server.taken() as one_served,
            await Raw.to(network.address) as two,
            await server.taken() as two_served,
        ):
            assert network.cut(reset=reset) == 2
            assert (network.open, network.cuts) == (0, 2)
            for end in (one, one_served, two, two_served):
                assert await end.rest() == (b"", reset)
        with await Raw.to(network.address) as client, await server.taken() as served:
            await client.say(b"again")
            assert await served.hear(5) == b"again"


@pytest.mark.parametrize("unread", [0, 3_000_000])
async def test_a_connection_closed_in_good_order_is_never_reset(unread: int) -> None:
    """Bytes that nobody reads any more would turn a close into a reset."""
    async with line() as (network, client, served):
        served.end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        saying = asyncio.create_task(served.say(b"x" * unread))
        network.freeze()
        await client.say(b"unread")
        network.cut(reset=False)
        assert await client.rest() == (b"", False)
        assert client.end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        await asyncio.gather(saying, return_exceptions=True)


@both_ends
@pytest.mark.parametrize("count", [0, 1, 100_001])
async def test_a_connection_is_cut_after_so_many_bytes(count: int, *, reset: bool) -> None:
    """To the byte: the middle of a frame is where resuming goes wrong."""
    said = random.Random(2).randbytes(200_000)
    async with Server() as server, Network(server.address) as network:
        network.cut_after(bytes_down=count, reset=reset)
        with await Raw.to(network.address) as client, await server.taken() as served:
            with contextlib.suppress(ConnectionError):
                await served.say(said)
            assert await client.rest() == (said[:count], reset)
            assert network.cuts == 1
        with await Raw.to(network.address) as client, await server.taken() as served:
            await served.say(said[:120_000])
            assert await client.hear(120_000) == said[:120_000]


async def test_a_websocket_breaks_in_the_midst_of_a_frame(network: Network) -> None:
    """And its client says so."""
    network.cut_after(bytes_down=5000)
    async with aiohttp.ClientSession() as http, http.ws_connect(f"http://{network.address}/ws") as echo:
        await echo.send_str("x" * 10_000)
        message = await echo.receive(WAIT_SECONDS)
        assert message.type in {aiohttp.WSMsgType.ERROR, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSE}


async def test_who_is_left_at_its_end_is_reset() -> None:
    """No client of a test waits for a network that is gone."""
    async with Server() as server:
        async with Network(server.address) as network:
            client = await Raw.to(network.address)
            served = await server.taken()
        with client, served:
            assert await client.rest() == await served.rest() == (b"", True)
        assert network.open == 0
