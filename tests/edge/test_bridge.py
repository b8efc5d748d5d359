from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from yarl import URL

from gateway.edge import bridge, connection
from tests.edge.serving import app_server, connected, proxy_to, raw_backend, say

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Handle = Callable[[web.WebSocketResponse], Awaitable[None]]

HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: app.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


@asynccontextmanager
async def bridged(
    handle: Handle, requests: list[web.Request] | None = None, **settings: object
) -> AsyncIterator[aiohttp.ClientSession]:
    """A client session whose base is a gateway before a backend that serves WebSockets by ``handle``."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if requests is not None:
            requests.append(request)
        socket = web.WebSocketResponse(protocols=["hmr", "other"], autoping=False, autoclose=False)
        socket.headers["Set-Cookie"] = "a=1"
        await socket.prepare(request)
        await handle(socket)
        return socket

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    async with (
        app_server(app) as upstream,
        proxy_to(upstream, **settings) as url,
        aiohttp.ClientSession(url) as session,
        asyncio.timeout(10),
    ):
        yield session


def address(session: aiohttp.ClientSession) -> str:
    """The base URL of the gateway, for raw sockets."""
    return str(session._base_url).rstrip("/")


async def echo(socket: web.WebSocketResponse) -> None:
    while True:
        message = await socket.receive()
        match message.type:
            case WSMsgType.TEXT | WSMsgType.BINARY:
                await socket.send_frame(
                    message.data.encode() if isinstance(message.data, str) else message.data, message.type
                )
            case WSMsgType.PING:
                await socket.pong(b"pong of the backend for " + message.data)
            case _:
                await socket.close(code=socket.close_code or 1000)
                return


async def test_frames_pass_both_ways_as_they_are() -> None:
    """Hot reload of Next.js talks text; others talk binary, empty frames and emoji."""
    async with bridged(echo) as session, session.ws_connect("/ws", autoping=False) as socket:
        for text in ("", "a", "ö😀\u2028", "x" * 300_000):
            await socket.send_str(text)
            assert await socket.receive_str() == text
        for data in (b"", b"\x00\xff", bytes(300_000)):
            await socket.send_bytes(data)
            assert await socket.receive_bytes() == data
        await socket.ping(b"me")
        message = await socket.receive()
        assert (message.type, message.data) == (WSMsgType.PONG, b"pong of the backend for me")


async def test_fragments_arrive_as_one_message() -> None:
    """A sender may cut a message as it likes."""
    async with bridged(echo) as session, connected(address(session)) as (reader, writer):
        writer.write(HANDSHAKE)
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        mask = bytes(4)
        writer.write(b"\x01\x82" + mask + b"he" + b"\x00\x82" + mask + b"ll" + b"\x80\x81" + mask + b"o")
        assert await reader.readexactly(7) == b"\x81\x05hello"


async def test_a_ping_of_the_backend_reaches_the_client() -> None:
    """It is how a backend finds out who has left."""

    async def ping(socket: web.WebSocketResponse) -> None:
        await socket.ping(b"you")
        message = await socket.receive()
        await socket.close(code=4000, message=message.data)

    async with bridged(ping) as session, session.ws_connect("/ws", autoping=False, autoclose=False) as socket:
        message = await socket.receive()
        assert (message.type, message.data) == (WSMsgType.PING, b"you")
        await socket.pong(b"I am here")
        assert await socket.receive() == (WSMsgType.CLOSE, 4000, "I am here")


async def test_the_handshake_passes(caplog: pytest.LogCaptureFixture) -> None:
    """Sign-in by cookie, the page's origin and the subprotocol are between the app and its backend."""
    requests: list[web.Request] = []
    async with bridged(echo, requests) as session:
        async with session.ws_connect(
            URL(f"{address(session)}/_next/webpack-hmr?id=%2F&", encoded=True),
            protocols=["unknown", "hmr"],
            origin="http://app.example",
            headers={"Cookie": "s=1", "X-Forwarded-For": "8.8.8.8"},
        ) as socket:
            assert socket.protocol == "hmr"
            assert socket._response.headers.getall("Set-Cookie") == ["a=1"]
        async with session.ws_connect("/ws", compress=15) as socket:
            assert (socket.protocol, socket.compress) == (None, 0)
    assert not caplog.records
    first, second = requests
    assert first.raw_path == "/_next/webpack-hmr?id=%2F&"
    assert first.headers["Cookie"] == "s=1"
    assert first.headers["Origin"] == "http://app.example"
    assert first.headers["X-Forwarded-For"] == "127.0.0.1"
    assert first.headers["X-Forwarded-Host"].startswith("127.0.0.1:")
    assert first.headers["Sec-WebSocket-Protocol"].replace(" ", "") == "unknown,hmr"
    assert "Sec-WebSocket-Extensions" not in second.headers
    assert first.headers["Sec-WebSocket-Key"] != second.headers["Sec-WebSocket-Key"]


@pytest.mark.parametrize(("code", "reason"), [(1000, ""), (1001, "bye"), (4401, "ö"), (4999, "x" * 100)])
async def test_a_close_passes_both_ways(code: int, reason: str) -> None:
    """Apps put their own meaning into these codes."""
    heard: asyncio.Future[aiohttp.WSMessage] = asyncio.get_running_loop().create_future()

    async def listen(socket: web.WebSocketResponse) -> None:
        heard.set_result(await socket.receive())
        await socket.close(code=code)

    async with bridged(listen) as session, session.ws_connect("/ws") as socket:
        await socket.close(code=code, message=reason.encode())
        assert await heard == (WSMsgType.CLOSE, code, reason)
        assert socket.close_code == code

    echoed: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

    async def leave(socket: web.WebSocketResponse) -> None:
        await socket.close(code=code, message=reason.encode())
        echoed.set_result(socket.close_code)

    async with bridged(leave) as session, session.ws_connect("/ws", autoclose=False) as socket:
        assert await socket.receive() == (WSMsgType.CLOSE, code, reason)
        assert await echoed == code


async def test_a_close_without_a_code_is_a_plain_one() -> None:
    """Browsers send it for close() without arguments; the library can only write a code."""
    heard: asyncio.Future[aiohttp.WSMessage] = asyncio.get_running_loop().create_future()

    async def listen(socket: web.WebSocketResponse) -> None:
        heard.set_result(await socket.receive())
        await socket.close()

    async with (
        bridged(listen) as session,
        connected(address(session)) as (reader, writer),
    ):
        writer.write(HANDSHAKE)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"\x88\x80" + bytes(4))
        assert await heard == (WSMsgType.CLOSE, 1000, "")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 403 Forbidden\r\nX-Why: origin\r\nContent-Length: 2\r\n\r\nno",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 3\r\n\r\n<p>",
        b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\n\r\n",
    ],
)
async def test_a_refused_upgrade_is_passed_on(answer: bytes) -> None:
    """Whether it is a login page, a redirect or a refusal, the app knows what to make of it."""
    heads: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)

    async with raw_backend(talk) as upstream, proxy_to(upstream) as url:
        got = await say(url, HANDSHAKE.replace(b"Connection: Upgrade", b"Connection: Upgrade, close"))
    head, _, body = got.partition(b"\r\n\r\n")
    expected_head, _, expected_body = answer.partition(b"\r\n\r\n")
    assert set(expected_head.split(b"\r\n")) <= set(head.split(b"\r\n"))
    assert body == expected_body
    assert len(heads) == 1


@pytest.mark.parametrize(
    "lost", [b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n", b"Sec-WebSocket-Version: 13\r\n"]
)
async def test_half_a_handshake_is_the_backends_to_judge(lost: bytes) -> None:
    """It is no WebSocket, so it is a request like others; and nothing was opened that hangs."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"Upgrade" not in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\nno")

    async with raw_backend(talk) as upstream, proxy_to(upstream) as url:
        got = await say(url, HANDSHAKE.replace(lost, b"").replace(b"Upgrade\r\n", b"Upgrade, close\r\n", 1))
    assert got.startswith(b"HTTP/1.1 400 Bad Request\r\n")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 101 A\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: wrong\r\n\r\n",
        b"HTTP/1.1 101 Sure\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    ],
)
async def test_a_backend_that_fails_the_handshake_is_a_502(answer: bytes) -> None:
    """The client must not get half a WebSocket."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)

    async with (
        raw_backend(talk) as upstream,
        proxy_to(upstream) as url,
        aiohttp.ClientSession(url) as session,
    ):
        with pytest.raises(aiohttp.WSServerHandshakeError, match="502"):
            await session.ws_connect("/ws")


async def test_a_message_above_the_bound_closes_both_sides() -> None:
    """A message is held whole, so its size must have a bound; 1009 says what it was."""
    heard: asyncio.Future[aiohttp.WSMessage] = asyncio.get_running_loop().create_future()

    async def listen(socket: web.WebSocketResponse) -> None:
        heard.set_result(await socket.receive())
        await socket.close()

    async with bridged(listen, max_body_bytes=1024) as session, session.ws_connect("/ws") as socket:
        await socket.send_bytes(bytes(2000))
        assert (await socket.receive()).type is WSMsgType.CLOSE
        assert socket.close_code == 1009
        assert (await heard)[:2] == (WSMsgType.CLOSE, 1009)

    async def shout(socket: web.WebSocketResponse) -> None:
        await socket.send_bytes(bytes(2000))
        await socket.receive()
        await socket.close()

    async with bridged(shout, max_body_bytes=1024) as session, session.ws_connect("/ws") as socket:
        assert (await socket.receive()).type is WSMsgType.CLOSE
        assert socket.close_code == 1009


async def test_a_side_that_vanishes_is_told_to_the_other() -> None:
    """A closed laptop must not leave a socket open at the backend, nor a dead backend one at the client."""
    heard: asyncio.Future[aiohttp.WSMessage] = asyncio.get_running_loop().create_future()

    async def listen(socket: web.WebSocketResponse) -> None:
        heard.set_result(await socket.receive())
        await socket.close()

    async with bridged(listen) as session:
        async with connected(address(session)) as (reader, writer):
            writer.write(HANDSHAKE)
            await reader.readuntil(b"\r\n\r\n")
        assert (await heard)[:2] == (WSMsgType.CLOSE, 1001)

    async def vanish(socket: web.WebSocketResponse) -> None:
        assert socket._req is not None
        assert socket._req.transport is not None
        socket._req.transport.abort()

    async with bridged(vanish) as session, session.ws_connect("/ws") as socket:
        assert (await socket.receive()).type is WSMsgType.CLOSE
        assert socket.close_code == 1001


async def test_a_side_that_does_not_answer_is_found() -> None:
    """A half-open connection says nothing; only a ping without a pong shows it."""
    heard: asyncio.Future[aiohttp.WSMessage] = asyncio.get_running_loop().create_future()

    async def listen(socket: web.WebSocketResponse) -> None:
        while True:
            message = await socket.receive()
            if message.type is WSMsgType.PING:
                await socket.pong(message.data)
            else:
                heard.set_result(message)
                await socket.close()
                return

    async with (
        bridged(listen, heartbeat_seconds=0.1) as session,
        connected(address(session)) as (reader, writer),
    ):
        writer.write(HANDSHAKE)
        await reader.readuntil(b"\r\n\r\n")
        assert (await heard)[:2] == (WSMsgType.CLOSE, 1001)


async def shout_until_stuck(socket: web.WebSocketResponse | aiohttp.ClientWebSocketResponse) -> int:
    """Send until the other side takes no more; return how much went out."""
    written = 0
    with suppress(TimeoutError):
        while written < 64 << 20:
            async with asyncio.timeout(0.5):
                await socket.send_bytes(bytes(65_536))
            written += 65_536
    return written


@pytest.mark.parametrize("slow", ["client", "backend"])
async def test_a_slow_side_slows_the_other(slow: str) -> None:
    """Between two sockets of different speed nothing may pile up."""
    stuck: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def serve(socket: web.WebSocketResponse) -> None:
        if slow == "client":
            stuck.set_result(await shout_until_stuck(socket))
        else:
            await stuck
        assert socket._req is not None
        assert socket._req.transport is not None
        socket._req.transport.abort()

    async with bridged(serve) as session:
        if slow == "client":
            async with connected(address(session)) as (_, writer):
                writer.write(HANDSHAKE)
                assert await stuck < 32 << 20
        else:
            async with session.ws_connect("/ws") as socket:
                stuck.set_result(await shout_until_stuck(socket))
                assert stuck.result() < 32 << 20
                socket._response.close()


@pytest.mark.parametrize("slow", ["client", "backend"])
async def test_a_side_that_takes_nothing_is_cut(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, slow: str
) -> None:
    """One that never reads would hold the other's connection and what is buffered for ever."""
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(bridge, "_CLOSE_SECONDS", 0.3)
    cut = asyncio.Event()

    async def shout_until_cut(socket: web.WebSocketResponse | aiohttp.ClientWebSocketResponse) -> None:
        with suppress(ConnectionError):
            while True:
                await socket.send_bytes(bytes(65_536))
        cut.set()

    async def serve(socket: web.WebSocketResponse) -> None:
        if slow == "client":
            await shout_until_cut(socket)
        else:
            await cut.wait()

    async with bridged(serve) as session:
        if slow == "client":
            async with connected(address(session)) as (_, writer):
                writer.write(HANDSHAKE)
                await cut.wait()
        else:
            async with session.ws_connect("/ws") as socket:
                await shout_until_cut(socket)
    assert not caplog.records


async def test_a_gateway_that_stops_says_so_on_each_socket() -> None:
    """The server would wait for sockets that nobody closes."""
    heard: asyncio.Future[aiohttp.WSMessage] = asyncio.get_running_loop().create_future()

    async def listen(socket: web.WebSocketResponse) -> None:
        heard.set_result(await socket.receive())
        await socket.close()

    app = web.Application()

    async def answer(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(autoclose=False)
        await socket.prepare(request)
        await listen(socket)
        return socket

    app.router.add_get("/ws", answer)
    async with app_server(app) as upstream, asyncio.timeout(5), aiohttp.ClientSession() as session:
        async with proxy_to(upstream) as url:
            socket = await session.ws_connect(url + "/ws")
            receiving = asyncio.create_task(socket.receive(), name="receive")
        assert (await receiving).type is WSMsgType.CLOSE
        assert socket.close_code == 1001
        assert (await heard)[:2] == (WSMsgType.CLOSE, 1001)
