"""Fixtures of the network's own tests."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.support.network import Network
from tests.support.site import WAIT_SECONDS, Site

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with Site() as site:
        yield site
        site.go_on.set()


@pytest.fixture
async def network(site: Site) -> AsyncIterator[Network]:
    async with Network(site.address) as network:
        yield network
    assert network.open == 0
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("network")]


@pytest.fixture
async def http(network: Network) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        f"http://{network.address}", timeout=aiohttp.ClientTimeout(WAIT_SECONDS)
    ) as http:
        yield http
