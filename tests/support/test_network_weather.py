"""The weather is the same for the same seed, and each fault of it ends."""

from __future__ import annotations

import asyncio
import contextlib
import random
from itertools import islice
from typing import TYPE_CHECKING, get_args

import aiohttp
import pytest

from tests.support import weather
from tests.support.site import NEVER, UPGRADE, WAIT_SECONDS, Raw, Site, line, long
from tests.support.weather import Fault, Kind

if TYPE_CHECKING:
    from tests.support.network import Network


def forecast(seed: int, count: int = 50) -> list[Fault]:
    kinds: tuple[Kind, ...] = get_args(Kind)
    return list(islice(weather.forecast(random.Random(seed), (0.001, 0.01), (0.001, 0.02), kinds), count))


def controls(network: Network) -> dict[str, object]:
    return {
        name: getattr(network, name)
        for name in ("delay_seconds", "split", "block_upgrades", "buffer_streams", "_refuses", "_frost")
    }


async def stormy(network: Network, seed: int, faults: int, kinds: tuple[Kind, ...] = get_args(Kind)) -> None:
    network.weather(
        seed, pauses=(0.001, 0.01), lengths=(0.001, 0.02), longest_delay_seconds=0.005, kinds=kinds
    )
    await network.until(lambda: len(network.faults) >= faults)


async def test_the_same_seed_is_the_same_weather(network: Network) -> None:
    """A schedule that failed is run again, by its number."""
    await stormy(network, 5, 20)
    await network.calm()
    assert network.faults[:20] == forecast(5, 20)
    assert forecast(5) != forecast(6)
    assert {fault.kind for fault in forecast(5, 200)} == set(get_args(Kind))


async def test_every_visitor_gets_through_the_weather(network: Network) -> None:
    """It is bad, and never for ever; what does get through is right."""
    was = controls(network)
    right: list[bool] = []

    async def visit(number: int) -> None:
        async with aiohttp.ClientSession(
            f"http://{network.address}", timeout=aiohttp.ClientTimeout(0.5)
        ) as http:
            while True:
                with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                    async with http.ws_connect("/ws") as echo:
                        await echo.send_str(f"visitor {number}")
                        if (message := await echo.receive()).type is aiohttp.WSMsgType.TEXT:
                            right.append(message.data == f"visitor {number}")
                            return

    await stormy(network, 11, 10)
    async with asyncio.timeout(WAIT_SECONDS):
        await asyncio.gather(*(visit(number) for number in range(20)))
    await network.until(lambda: len(network.faults) >= 60)
    await network.calm()
    assert right == [True] * 20
    assert controls(network) == was
    async with aiohttp.ClientSession(f"http://{network.address}") as http:
        assert await long(http)


@pytest.mark.parametrize("kind", get_args(Kind))
async def test_each_fault_ends(kind: Kind, network: Network) -> None:
    """In its midst as well: what a test had set is so again, and the network carries."""
    network.delay_seconds, network.split, network.block_upgrades = 0.0001, 500, "refuse"
    was = controls(network)
    await stormy(network, 3, 3, (kind,))
    await network.calm()
    await network.calm()
    assert controls(network) == was
    assert {fault.kind for fault in network.faults} == {kind}
    network.block_upgrades = network.split = None
    async with aiohttp.ClientSession(f"http://{network.address}") as http:
        assert await long(http)


async def test_a_torn_connection_breaks_in_what_comes_next(site: Site) -> None:
    """After some of it, or at the end of the fault."""
    async with line() as (network, client, served):
        network.weather(1, pauses=(0.0, 0.0), lengths=(NEVER, NEVER), kinds=("tear",))
        await network.until(lambda: len(network.faults) == 1)
        with contextlib.suppress(ConnectionError):
            await served.say(b"x" * 1000)
        heard, reset = await client.rest()
        assert (0 < len(heard) < 500, reset) == (True, True)
        await site.settle()
    assert network.cuts == 1


@pytest.mark.parametrize("kind", ["swallow-upgrades", "tear"])
async def test_what_the_weather_spoilt_does_not_last(kind: Kind, network: Network) -> None:
    """A page without a deadline of its own would wait for ever."""
    with await Raw.to(network.address) as client:
        if kind == "tear":
            await client.say(b"GET /events HTTP/1.1\r\nHost: a\r\n\r\n")
            assert await client.hear(12) == b"HTTP/1.1 200"
        network.weather(1, pauses=(0.0, 0.0), lengths=(NEVER, NEVER), kinds=(kind,))
        await network.until(lambda: len(network.faults) == 1)
        if kind == "swallow-upgrades":
            with await Raw.to(network.address) as swallowed:
                await swallowed.say(UPGRADE)
                await network.until(lambda: network.upgrades_blocked == 1)
                await network.calm()
                assert await swallowed.rest() == (b"", True)
        await network.calm()
        assert (await client.rest())[1]
