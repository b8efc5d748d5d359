from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from gateway.edge import connection
from gateway.edge.connection import cut_when_stalled, ended_with_client
from tests.edge.serving import app_server, connected

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Handle = Callable[[web.Request], Awaitable[web.StreamResponse]]

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def app_of(handle: Handle) -> web.Application:
    app = web.Application()
    app.router.add_get("/", handle)
    return app


async def test_a_silent_wait_ends_when_the_client_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server tells only those who write, and a backend may be silent for minutes."""
    monkeypatch.setattr(connection, "_LOOK_SECONDS", 0.01)
    waiting = asyncio.Event()
    ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def wait(request: web.Request) -> web.StreamResponse:
        scope = asyncio.timeout(None)
        try:
            async with scope:
                with ended_with_client(request, scope):
                    waiting.set()
                    await asyncio.Event().wait()
        except TimeoutError:
            ended.set_result(scope.expired())
        return web.Response()

    async with app_server(app_of(wait)) as url, asyncio.timeout(5):
        async with connected(url) as (_, writer):
            writer.write(GET)
            await waiting.wait()
            assert not ended.done()
        assert await ended


async def test_a_wait_that_was_left_is_not_ended_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next request on the same connection must not pay for the last one."""
    monkeypatch.setattr(connection, "_LOOK_SECONDS", 0.01)
    gone = asyncio.Event()
    result: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def leave(request: web.Request) -> web.StreamResponse:
        scope = asyncio.timeout(None)
        async with scope:
            with ended_with_client(request, scope):
                pass
            await gone.wait()
            # Long enough for the look that must not come.
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await asyncio.Event().wait()
        result.set_result(scope.expired())
        return web.Response()

    async with app_server(app_of(leave)) as url, asyncio.timeout(5):
        async with connected(url) as (_, writer):
            writer.write(GET)
        gone.set()
        assert await result is False


async def test_a_client_that_takes_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write to it would wait for ever, and hold what it writes."""
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.2)
    cut: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def pour(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        written = 0
        try:
            while True:
                with cut_when_stalled(request.transport):
                    await response.write(bytes(65_536))
                written += 65_536
        except ConnectionError:
            cut.set_result(written)
        return response

    async with (
        app_server(app_of(pour)) as url,
        connected(url) as (_, writer),
        asyncio.timeout(5),
    ):
        writer.write(GET)
        assert await cut < 32 << 20


async def test_a_client_that_takes_its_time_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is for one write, and not for an answer that lasts an hour."""
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.1)

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with cut_when_stalled(request.transport):
            await response.write(b"first")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await asyncio.Event().wait()
        with cut_when_stalled(None):
            await response.write(b"second")
        return response

    async with (
        app_server(app_of(answer)) as url,
        connected(url) as (reader, writer),
        asyncio.timeout(5),
    ):
        writer.write(GET)
        await reader.readuntil(b"first")
        await reader.readuntil(b"second")
