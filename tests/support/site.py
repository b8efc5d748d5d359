"""What the network's own tests put at its two ends: a small site, raw servers and raw clients."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import socket
from typing import TYPE_CHECKING, Self

import aiohttp
import pytest
from aiohttp import web

from tests.support.network import Network

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WAIT_SECONDS = 15.0
LONG = "x" * 3_000_000
NEVER = 1000.0
EVENTS = b"data: one\n\ndata: two\n\n"
UPGRADE = b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"

both_ends = pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])


class Site:
    """A small site behind the network.

    Attributes:
        heard: What came on WebSockets.
        asked: The paths of the requests.
        go_on: Lets ``/events`` say the second event, and end.
    """

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.asked: list[str] = []
        self.go_on = asyncio.Event()

    async def __aenter__(self) -> Self:
        site = web.Application(client_max_size=0)
        site.router.add_get("/ws", self._echo)
        site.router.add_get("/events", self._events)
        site.router.add_post("/long", self._long)
        site.router.add_get("/chunked", self._chunked)
        self._runner = web.AppRunner(site, shutdown_timeout=0.1)
        await self._runner.setup()
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*listener.getsockname())
        await web.SockSite(self._runner, listener).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def settle(self) -> None:
        """Give whatever could come by the network ample time to do so."""
        async with aiohttp.ClientSession() as http:
            for _ in range(20):
                async with http.get(f"http://{self.address}/chunked") as answer:
                    await answer.read()

    async def _echo(self, request: web.Request) -> web.WebSocketResponse:
        self.asked.append(request.path)
        echo = web.WebSocketResponse(max_msg_size=0)
        await echo.prepare(request)
        async for message in echo:
            self.heard.append(message.data)
            with contextlib.suppress(ConnectionError):
                await echo.send_str(message.data)
        return echo

    async def _events(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await answer.prepare(request)
        first, second = EVENTS[:11], EVENTS[11:]
        with contextlib.suppress(ConnectionError):
            await answer.write(first)
            await self.go_on.wait()
            await answer.write(second)
        return answer

    async def _long(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        return web.json_response({"got": hashlib.sha256(await request.read()).hexdigest(), "long": LONG})

    async def _chunked(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        answer.enable_chunked_encoding()
        await answer.prepare(request)
        with contextlib.suppress(ConnectionError):
            for word in (b"a", b"b", b"c"):
                await answer.write(word * 1000)
        return answer


class Server:
    """A raw server that gives its connections out, one by one."""

    async def __aenter__(self) -> Self:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)  # noqa: FBT003 - positional only
        self.address = "{}:{}".format(*self.listener.getsockname())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.listener.close()

    async def taken(self) -> Raw:
        """The next connection."""
        async with asyncio.timeout(WAIT_SECONDS):
            end, _ = await asyncio.get_running_loop().sock_accept(self.listener)
        return Raw(end)


class Raw:
    """One end of a connection, without buffers of its own."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        end.setblocking(False)  # noqa: FBT003 - positional only
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end.close()

    @classmethod
    async def to(cls, address: str) -> Raw:
        host, _, port = address.partition(":")
        made = cls(socket.socket())
        await made._loop.sock_connect(made.end, (host, int(port)))
        return made

    async def say(self, data: bytes) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            await self._loop.sock_sendall(self.end, data)

    async def hear(self, count: int) -> bytes:
        """So many bytes, fewer at the end."""
        heard = b""
        async with asyncio.timeout(WAIT_SECONDS):
            while len(heard) < count and (data := await self._loop.sock_recv(self.end, count - len(heard))):
                heard += data
        return heard

    async def rest(self) -> tuple[bytes, bool]:
        """All that still comes, and whether a reset ended it."""
        heard = b""
        async with asyncio.timeout(WAIT_SECONDS):
            try:
                while data := await self._loop.sock_recv(self.end, 65_536):
                    heard += data
            except ConnectionResetError:
                return heard, True
        return heard, False

    def hears_nothing(self) -> bool:
        try:
            self.end.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False


@contextlib.asynccontextmanager
async def line() -> AsyncIterator[tuple[Network, Raw, Raw]]:
    """A network with one connection through it: its client's end and its server's."""
    async with Server() as server, Network(server.address) as network:
        with await Raw.to(network.address) as client, await server.taken() as served:
            yield network, client, served


async def long(http: aiohttp.ClientSession, body: bytes = b"") -> bool:
    """Ask for the long JSON; returns whether it is right."""
    async with http.post("/long", data=io.BytesIO(body)) as answer:
        told = await answer.json()
    return bool(told == {"got": hashlib.sha256(body).hexdigest(), "long": LONG})
