from __future__ import annotations

import asyncio
import gzip
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import aiohttp
import pytest
from aiohttp import web

from gateway.config import load_config
from gateway.edge import connection, proxy
from gateway.edge.proxy import Proxy
from tests.edge.serving import app_server, connected, proxy_to, raw_backend, say

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from pytest_aiohttp import AiohttpClient

    Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def answering(answer: bytes, heard: list[bytes] | None = None) -> Talk:
    """Read the head of a request, remember it, and answer with bytes."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if heard is not None:
            heard.append(head)
        writer.write(answer)
        await writer.drain()

    return talk


async def proxied(answer: bytes, request: bytes) -> tuple[bytes, bytes]:
    """What the backend heard, and what the client got."""
    heard: list[bytes] = []
    async with raw_backend(answering(answer, heard)) as upstream, proxy_to(upstream) as url:
        got = await say(url, request)
    return b"".join(heard), got


def get(target: str, *headers: str, method: str = "GET") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: app.example:8443", "Connection: close", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/a?",
        "/a?b=c&b=d?e",
        "/a%2Fb%2f..%2F%2e%2e/c",
        "/a/../../etc/passwd",
        "//evil.example/a",
        "/http://evil.example/",
        "/a;b=c,d@e:80/!$&'()*+=~",
        "/%ff%C3%28?x=%zz%",
        "/a+b%20c?d+e%20f",
        '/"<>[]{}|^`',
        "/a?next=https://app.example/%23hash",
    ],
)
async def test_the_target_goes_out_as_it_came_in(target: str) -> None:
    """Routes, signatures and caches of a backend are made of these bytes."""
    heard, got = await proxied(OK, get(target))
    assert heard.startswith(f"GET {target} HTTP/1.1\r\n".encode())
    assert got.startswith(b"HTTP/1.1 200 OK\r\n")
    assert got.endswith(b"\r\n\r\nok")


async def test_a_host_in_the_target_does_not_choose_the_backend() -> None:
    """An absolute target is legal, and must not make the gateway fetch from inside the network."""
    for target, path in (("http://169.254.169.254/latest?a", "/latest?a"), ("http://evil.example?b", "/?b")):
        heard, _ = await proxied(OK, get(target))
        assert heard.startswith(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:".encode())


@pytest.mark.parametrize(("method", "target"), [("OPTIONS", "*"), ("CONNECT", "evil.example:443")])
async def test_what_names_no_path_is_refused(method: str, target: str) -> None:
    """CONNECT would make an open relay of it."""
    heard, got = await proxied(OK, get(target, method=method))
    assert heard == b""
    assert got.startswith(b"HTTP/1.1 400 ")


async def test_the_base_path_of_the_backend_comes_first() -> None:
    """GATEWAY_UPSTREAM may end in a path."""
    heard: list[bytes] = []
    async with raw_backend(answering(OK, heard)) as upstream, proxy_to(f"{upstream}/app%2F/") as url:
        await say(url, get("/a?b"))
    assert heard[0].startswith(b"GET /app%2F/a?b HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "REPORT", "PURGE", "TRACE"]
)
async def test_every_method_passes(method: str) -> None:
    """WebDAV, CORS preflights and caches of the app behind use more than five of them."""
    heard, got = await proxied(OK, get("/", method=method))
    assert heard.startswith(f"{method} / HTTP/1.1\r\n".encode())
    assert got.endswith(b"ok")


async def test_no_header_is_added_or_lost_but_those_of_a_proxy() -> None:
    """A backend sees the client, and three lines of us."""
    heard, _ = await proxied(
        OK, get("/", "Cookie: a=1", "X-One: ö", "X-Forwarded-For: 8.8.8.8", "Upgrade: h2c", "TE: trailers")
    )
    host, *lines = heard.decode("latin-1").split("\r\n")[1:-2]
    assert host.startswith("Host: 127.0.0.1:")
    assert sorted(line for line in lines if not line.startswith("Connection:")) == [
        "Cookie: a=1",
        "X-Forwarded-For: 127.0.0.1",
        "X-Forwarded-Host: app.example:8443",
        "X-Forwarded-Proto: http",
        "X-One: Ã¶",
    ]


@pytest.mark.parametrize(
    ("answer", "client_gets"),
    [
        (b"HTTP/1.1 200 Fine\r\nContent-Length: 2\r\nX-A: 1\r\nX-A: 2\r\n\r\nok",) * 2,
        (b"HTTP/1.1 201 Created\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nContent-Length: 0\r\n\r\n",) * 2,
        (b"HTTP/1.1 204 No Content\r\nEtag: a\r\n\r\n",) * 2,
        (b'HTTP/1.1 304 Not Modified\r\nEtag: "a"\r\n\r\n',) * 2,
        (b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 1-2/9\r\nContent-Length: 2\r\n\r\nab",) * 2,
        (b"HTTP/1.1 302 Found\r\nLocation: http://evil.example/\r\nContent-Length: 0\r\n\r\n",) * 2,
        (b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /b\r\nContent-Length: 0\r\n\r\n",) * 2,
        (b"HTTP/1.1 404 Not Found\r\nServer: Next\r\nContent-Length: 2\r\n\r\nno",) * 2,
        (b"HTTP/1.1 500 Oh\r\nContent-Type: text/html\r\nContent-Length: 3\r\n\r\n<b>",) * 2,
        (
            b"HTTP/1.1 200 OK\r\nConnection: X-Own\r\nX-Own: 1\r\nTE: a\r\nContent-Length: 2\r\n\r\nok",
            OK,
        ),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nok\r\n0\r\nX-Trailer: 1\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        ),
        (
            b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        ),
        (
            b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + OK,
            OK,
        ),
    ],
)
async def test_an_answer_comes_back_as_it_is(answer: bytes, client_gets: bytes) -> None:
    """Status, reason, cookies, lengths and redirects are the app's; we add a date where there is none."""
    _, got = await proxied(answer, get("/"))
    head, _, body = got.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.startswith((b"Date:", b"Connection:"))]
    expected_head, _, expected_body = client_gets.partition(b"\r\n\r\n")
    assert sorted(lines) == sorted(expected_head.split(b"\r\n"))
    assert body == expected_body


async def test_a_head_has_the_length_of_what_a_get_would_bring() -> None:
    """Download managers ask so before they fetch."""
    heard, got = await proxied(b"HTTP/1.1 200 OK\r\nContent-Length: 123456\r\n\r\n", get("/", method="HEAD"))
    assert heard.startswith(b"HEAD /")
    assert b"\r\nContent-Length: 123456\r\n" in got
    assert got.endswith(b"\r\n\r\n")


async def test_a_large_header_passes() -> None:
    """Link and Content-Security-Policy of a real page are larger than the library's default bound."""
    policy = b"Content-Security-Policy: " + b"a" * 20_000
    _, got = await proxied(b"HTTP/1.1 200 OK\r\n" + policy + b"\r\nContent-Length: 0\r\n\r\n", get("/"))
    assert policy in got


async def test_a_compressed_answer_stays_compressed() -> None:
    """Its length and ETag belong to these bytes."""
    packed = gzip.compress(b"hello" * 100)
    answer = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    heard, got = await proxied(answer + packed, get("/", "Accept-Encoding: gzip, br"))
    assert b"\r\nAccept-Encoding: gzip, br\r\n" in heard
    assert b"\r\nContent-Encoding: gzip\r\n" in got
    assert got.endswith(b"\r\n\r\n" + packed)


@pytest.mark.parametrize(
    ("framing", "pieces"),
    [
        ("Content-Length: 6", [b"abc", b"def"]),
        ("Transfer-Encoding: chunked", [b"3\r\nabc\r\n", b"3\r\ndef\r\n0\r\n\r\n"]),
    ],
)
async def test_a_request_is_streamed_and_keeps_its_framing(framing: str, pieces: list[bytes]) -> None:
    """An upload must not be held until it is whole, and a length that was known stays known."""
    heads: list[bytes] = []
    first_came = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        assert await reader.readexactly(len(pieces[0])) == pieces[0]
        first_came.set()
        assert await reader.readexactly(len(pieces[1])) == pieces[1]
        writer.write(OK)

    async with (
        raw_backend(talk) as upstream,
        proxy_to(upstream) as url,
        connected(url) as (reader, writer),
        asyncio.timeout(5),
    ):
        # What is packed stays packed, though this is not what it says it is.
        writer.write(get("/", framing, "Content-Encoding: gzip", method="POST") + pieces[0])
        await first_came.wait()
        writer.write(pieces[1])
        assert (await reader.read()).endswith(b"ok")
    assert framing.encode() in heads[0]
    assert b"Content-Encoding: gzip" in heads[0]


async def test_an_answer_is_streamed() -> None:
    """The second event of a stream may be minutes after the first."""
    go_on = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        await go_on.wait()
        writer.write(b"data: 2\n\n")

    async with (
        raw_backend(talk) as upstream,
        proxy_to(upstream) as url,
        connected(url) as (reader, writer),
        asyncio.timeout(5),
    ):
        writer.write(get("/"))
        await reader.readuntil(b"data: 1\n\n")
        go_on.set()
        await reader.readuntil(b"data: 2\n\n\r\n0\r\n\r\n")


async def test_a_body_that_was_read_already_is_handed_on(aiohttp_client: AiohttpClient) -> None:
    """A chat request that names no session is read before that is known."""
    heard: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        heard.append(await reader.readexactly(6))
        writer.write(OK)

    async def read_first(request: web.Request) -> web.StreamResponse:
        return await passing.handle(request, body=await request.read())

    async def pieces() -> AsyncIterator[bytes]:
        yield b"abc"
        yield b"def"

    async with (
        raw_backend(talk) as upstream,
        aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session,
    ):
        passing = Proxy(load_config(upstream=upstream), session)
        app = web.Application()
        app.router.add_post("/", read_first)
        client = await aiohttp_client(app)
        for body in (b"abcdef", pieces()):
            assert await (await client.post("/", data=body)).text() == "ok"
    assert b"Content-Length: 6\r\n" in heard[0]
    assert b"Content-Length: 6\r\n" in heard[2]
    assert heard[1::2] == [b"abcdef", b"abcdef"]


async def test_a_client_that_waits_for_100_continue_gets_it_once() -> None:
    """We have asked for the body on the backend's behalf; it must not be asked again."""
    heard: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        heard.append(await reader.readexactly(3))
        writer.write(OK)

    async with (
        raw_backend(talk) as upstream,
        proxy_to(upstream) as url,
        connected(url) as (reader, writer),
        asyncio.timeout(5),
    ):
        writer.write(get("/", "Expect: 100-continue", "Content-Length: 3", method="POST"))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"abc")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Expect" not in heard[0]
    assert heard[1] == b"abc"


async def test_a_cookie_of_one_client_does_not_reach_another() -> None:
    """The client library would keep what the backend set, and send it for everyone."""
    cookies: list[str | None] = []

    async def answer(request: web.Request) -> web.Response:
        cookies.append(request.headers.get("Cookie"))
        return web.Response(headers={"Set-Cookie": "user=alice"})

    app = web.Application()
    app.router.add_get("/", answer)
    async with app_server(app) as upstream, proxy_to(upstream.replace("127.0.0.1", "localhost")) as url:
        assert b"Set-Cookie: user=alice\r\n" in await say(url, get("/"))
        await say(url, get("/"))
    assert cookies == [None, None]
    async with aiohttp.ClientSession() as session:
        with pytest.raises(TypeError, match="unable to proxy with a session that keeps cookies"):
            Proxy(load_config(upstream="http://127.0.0.1:1"), session)


def body_of(got: bytes) -> str:
    return got.partition(b"\r\n\r\n")[2].decode()


async def test_a_backend_that_is_down_is_a_502_that_says_so() -> None:
    """The first thing that goes wrong when one tries the gateway."""
    async with raw_backend(answering(OK)) as upstream:
        pass
    async with proxy_to(upstream) as url:
        got = await say(url, get("/"))
    assert got.startswith(b"HTTP/1.1 502 ")
    assert body_of(got).startswith("unable to reach the backend; it does not accept connections.")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"", "unable to reach the backend; it closed the connection without an answer"),
        (b"HTTP/1.1 200 O", "unable to reach the backend; it closed the connection without an answer"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "unable to understand the backend; its answer is no valid HTTP"),
        (
            b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
            "unable to understand the backend; its answer is no valid HTTP",
        ),
    ],
)
async def test_a_backend_that_gives_no_answer_is_a_502(answer: bytes, text: str) -> None:
    """Whose fault it is, is the first question."""
    _, got = await proxied(answer, get("/"))
    assert got.startswith(b"HTTP/1.1 502 ")
    assert body_of(got).startswith(text)


async def test_a_backend_that_cannot_be_found_is_a_502() -> None:
    """A typing error in GATEWAY_UPSTREAM."""
    async with proxy_to("http://nowhere.invalid:3000") as url:
        got = await say(url, get("/"))
    assert got.startswith(b"HTTP/1.1 502 ")
    assert "its name cannot be resolved" in body_of(got)


async def test_a_backend_that_takes_no_connection_is_a_504(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host behind a firewall that drops packets would hold each request for minutes."""
    monkeypatch.setattr(proxy, "CONNECT_SECONDS", 0.2)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)  # noqa: FBT003 - the name says what it is
            filler.connect_ex(address)
        async with proxy_to(f"http://127.0.0.1:{address[1]}") as url:
            got = await say(url, get("/"))
        for filler in fillers:
            filler.close()
    assert got.startswith(b"HTTP/1.1 504 ")
    assert "no connection in 0.2 s" in body_of(got)


async def test_a_backend_that_stays_silent_is_a_504() -> None:
    """A hung backend must not hold connections for ever."""

    async def talk(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    timeouts = {"upstream_header_timeout_seconds": 0.1, "upstream_idle_timeout_seconds": 0.1}
    async with raw_backend(talk) as upstream, proxy_to(upstream, **timeouts) as url:
        got = await say(url, get("/"))
    assert got.startswith(b"HTTP/1.1 504 ")
    assert "silent" in body_of(got)


@pytest.mark.parametrize(
    "framing", [b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", b"Content-Length: 9\r\n\r\nhello"]
)
@pytest.mark.parametrize("rudely", [False, True])
async def test_an_answer_that_breaks_off_is_not_ended_as_if_it_were_whole(
    framing: bytes, *, rudely: bool
) -> None:
    """Half a page that looks whole is cached as whole."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n" + framing)
        await writer.drain()
        await passed.wait()
        if rudely:
            writer.transport.abort()

    passed = asyncio.Event()
    async with (
        raw_backend(talk) as upstream,
        proxy_to(upstream) as url,
        connected(url) as (reader, writer),
        asyncio.timeout(5),
    ):
        writer.write(get("/"))
        await reader.readuntil(b"hello")
        passed.set()
        assert b"0\r\n" not in await reader.read()


@pytest.mark.parametrize("answered", [False, True])
async def test_a_client_that_goes_away_ends_the_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, answered: bool
) -> None:
    """The backend must not work, or hold a stream open, for someone who has left."""
    monkeypatch.setattr(connection, "_LOOK_SECONDS", 0.01)
    asked, ended = asyncio.Event(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if answered:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\ndata: 1\n\n")
        asked.set()
        with suppress(ConnectionError):
            assert await reader.read() == b""
        ended.set()

    async with (
        raw_backend(talk) as upstream,
        proxy_to(upstream) as url,
        connected(url) as (reader, writer),
        asyncio.timeout(5),
    ):
        writer.write(get("/"))
        await asked.wait()
        if answered:
            await reader.readuntil(b"data: 1\n\n")
        writer.close()
        await ended.wait()
    assert not caplog.records


async def test_an_upload_that_breaks_off_is_not_ended_as_if_it_were_whole() -> None:
    """Half a document that looks whole is stored as whole."""
    got_piece = asyncio.Event()
    received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def talk(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"3\r\nabc\r\n")
        got_piece.set()
        try:
            received.set_result(await reader.read())
        except ConnectionError:
            received.set_result(b"reset")

    async with (
        raw_backend(talk) as upstream,
        proxy_to(upstream) as url,
        connected(url) as (_, writer),
        asyncio.timeout(5),
    ):
        writer.write(get("/", "Transfer-Encoding: chunked", method="POST") + b"3\r\nabc\r\n")
        await got_piece.wait()
        writer.close()
        assert await received in (b"", b"reset")


async def test_an_upload_that_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow body is the cheapest way to hold connections of a backend."""
    monkeypatch.setattr(proxy, "STALL_SECONDS", 0.1)

    async def talk(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.read()

    async with raw_backend(talk) as upstream, proxy_to(upstream) as url, connected(url) as (reader, writer):
        writer.write(get("/", "Content-Length: 9", method="POST") + b"abc")
        async with asyncio.timeout(5):
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 408 ")


async def test_an_answer_before_the_end_of_an_upload_is_passed_on() -> None:
    """A 413 must reach the client while it still sends."""
    refusal = b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig"

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(refusal)
        await writer.drain()
        with suppress(ConnectionError):
            await reader.read()

    async with (
        raw_backend(talk) as upstream,
        proxy_to(upstream) as url,
        connected(url) as (reader, writer),
        asyncio.timeout(5),
    ):
        writer.write(get("/", "Content-Length: 999", method="POST") + b"abc")
        assert (await reader.readuntil(b"big")).startswith(b"HTTP/1.1 413 Too Large\r\n")


async def test_a_client_that_does_not_read_slows_the_backend_and_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A download that nobody takes must fill neither our memory nor our connections."""
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.5)
    written = 0
    cut = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        with suppress(ConnectionError):
            while True:
                writer.write(bytes(65_536))
                await writer.drain()
                written += 65_536
        cut.set()

    async with raw_backend(talk) as upstream, proxy_to(upstream) as url, connected(url) as (_, writer):
        writer.write(get("/"))
        async with asyncio.timeout(10):
            await cut.wait()
    assert written < 32 << 20


async def test_an_upload_that_the_backend_does_not_read_slows_the_client() -> None:
    """A large upload to a slow backend must not pile up here."""
    done = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await done.wait()

    async with raw_backend(talk) as upstream, proxy_to(upstream) as url, connected(url) as (_, writer):
        writer.write(get("/", "Content-Length: 1000000000", method="POST"))
        written = 0
        with suppress(TimeoutError):
            while written < 64 << 20:
                writer.write(bytes(65_536))
                async with asyncio.timeout(0.5):
                    await writer.drain()
                written += 65_536
        assert written < 32 << 20
        done.set()
