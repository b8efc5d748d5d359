"""A backend that says any bytes, and a gateway that is nothing but its proxy; both real, on loopback."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web

from gateway.config import Config, load_config
from gateway.edge.proxy import Proxy, remove_added_headers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from aiohttp.typedefs import Handler, Middleware


@asynccontextmanager
async def raw_backend(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """Serve each connection by ``talk``, and close it; gives the base URL."""
    talking: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talking.add(task)
        try:
            await talk(reader, writer)
        finally:
            talking.discard(task)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in talking:
            task.cancel()
        await asyncio.gather(*talking, return_exceptions=True)


@asynccontextmanager
async def app_server(app: web.Application) -> AsyncIterator[str]:
    """Serve ``app`` as the gateway is served; gives the base URL."""
    runner = web.AppRunner(app, auto_decompress=False, access_log=None, shutdown_timeout=2)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def proxy_to(upstream: str, **settings: object) -> AsyncIterator[str]:
    """A gateway that only proxies; gives its base URL."""
    config: Config = load_config(upstream=upstream, **settings)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True), cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        proxy = Proxy(config, session)
        app = web.Application()
        # Not a route of the router's: it knows no target without a path.
        app.middlewares.append(everything_to(proxy))
        app.on_response_prepare.append(remove_added_headers)

        async def close_proxy(_: web.Application) -> None:
            await proxy.close()

        app.on_shutdown.append(close_proxy)
        async with app_server(app) as url:
            yield url


def everything_to(proxy: Proxy) -> Middleware:
    """Pass every request to the proxy, also those that no route could match."""

    @web.middleware
    async def pass_on(request: web.Request, handler: Handler) -> web.StreamResponse:
        del handler
        return await proxy.handle(request)

    return pass_on


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A socket to a base URL."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def say(url: str, request: bytes) -> bytes:
    """Send bytes; return all that comes until the other side closes."""
    async with connected(url) as (reader, writer), asyncio.timeout(5):
        writer.write(request)
        return await reader.read()
