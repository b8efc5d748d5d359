"""Fixtures: one real Valkey for a test run, and nodes on it that share nothing but the server."""

from __future__ import annotations

import os
import secrets
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
import uvloop
from hypothesis import settings

from gateway.app import Node
from gateway.config import Config
from tests.support.node_program import NodeError, chromium_binary
from tests.support.valkey import running_valkey

# Without a deadline: a busy machine must not fail a property. In CI the same examples every time: what a
# random search finds there, nobody can tell from what the change broke.
settings.register_profile(
    "gateway", deadline=None, database=None, max_examples=80, derandomize="CI" in os.environ
)
settings.load_profile("gateway")

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without Chromium its tests are left out, and say so; never in CI, which installs it."""
    if item.get_closest_marker("browser") is not None and "CI" not in os.environ:
        try:
            chromium_binary()
        except NodeError as error:
            pytest.skip(str(error))


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that the product runs on."""
    del config, item
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """A real server, for the whole run."""
    with running_valkey() as url:
        yield url


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of whoever runs the tests reaches them."""
    for name in list(os.environ):
        if name.startswith("GATEWAY_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make_config(valkey_url: str) -> Callable[..., Config]:
    """Make settings for a node of this test; nodes of one test share keys, tests do not."""
    prefix = f"t{secrets.token_hex(4)}"

    def make(upstream: str, **settings: Any) -> Config:
        defaults: dict[str, Any] = {
            "redis_url": valkey_url,
            "key_prefix": prefix,
            "listen": "127.0.0.1:0",
            "admin_listen": "127.0.0.1:0",
            "drain_seconds": 0.1,
        }
        return Config(upstream=upstream, **{**defaults, **settings})

    return make


@pytest.fixture
async def make_node(make_config: Callable[..., Config]) -> AsyncIterator[Callable[..., Awaitable[Node]]]:
    """Start nodes in this process; they stop with the test."""
    async with AsyncExitStack() as stack:

        async def make(upstream: str, **settings: Any) -> Node:
            node = await stack.enter_async_context(Node(make_config(upstream, **settings)))
            stack.callback(node.hurry)
            return node

        yield make
