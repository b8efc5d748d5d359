"""What the gateway keeps to itself: secrets from its log, the backend's whereabouts from clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING

import pytest
from yarl import URL

from gateway.app import ListenError, Node
from gateway.config import Config, ConfigError, load_config
from tests.support.backend import Exchange, ScriptedBackend
from tests.support.client import WAIT_SECONDS, SessionClient, send_body
from tests.support.process import GatewayProcess
from tests.support.valkey import free_port
from tests.support.wires import HttpChat

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    MakeConfig = Callable[..., Config]
    MakeNode = Callable[..., Awaitable[Node]]


async def answers(exchange: Exchange) -> None:
    await exchange.head()
    await exchange.text("one", "two")


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection on which what no library would send can be sent."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(WAIT_SECONDS):
        reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_a_malformed_request_leaves_nothing_of_itself_in_the_log(valkey_url: str) -> None:
    """Its cookie is a user's session, and whoever sends nonsense must not fill a disk with it."""
    settings = {"upstream": "http://127.0.0.1:9", "redis_url": valkey_url, "log_level": "debug"}
    async with GatewayProcess(**settings) as gateway:
        await gateway.started()
        async with connected(gateway.address) as (reader, writer), asyncio.timeout(WAIT_SECONDS):
            writer.write(b"GET /other HTTP/1.1\r\nHost: x\r\nCookie: session=TOPSECRET\x00\r\n\r\n")
            assert b" 400 " in (await reader.read()).partition(b"\r\n")[0]
        gateway.terminate()
        assert await gateway.exited() == 0
    told = json.dumps(gateway.log) + gateway.stdout
    assert "TOPSECRET" not in told
    assert "Traceback" not in told
    assert gateway.text == ""


async def test_clients_are_not_told_where_the_backend_is(make_node: MakeNode) -> None:
    """The inside of somebody's network is nobody's business; the log has it, for the operator."""
    port = str(free_port())
    node = await make_node(f"http://localhost:{port}")
    async with HttpChat(node.address) as http, SessionClient(node.address) as client:
        bodies = []
        for path in ("/api/chat", "/other"):
            answer = await http.request("POST", f"{http.base}{path}", json={"id": "s", **send_body("x")})
            assert answer.status == 502
            bodies.append((await answer.end()).decode())
        await client.attach("s")
        end = await client.wait(lambda line: line["type"] == "turn-end")
        assert end["error"]["code"] == "upstream-unreachable"
        for told in (*bodies, end["error"]["message"]):
            assert told.strip()
            for whereabouts in ("localhost", "127.0.0.1", "::1", port):
                assert whereabouts not in told


@pytest.mark.parametrize("target", ["/a%0Ab", "/a%0D%0Ab?c%0Ad", "/api/chat/x%0A"])
async def test_an_encoded_line_break_reaches_the_backend_byte_for_byte(
    make_node: MakeNode, target: str
) -> None:
    """A path that no pattern of ours thought of is still the app's."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http:
            answer = await http.request("GET", f"{http.base}{target}")
            await answer.end()
        assert [exchange.target for exchange in backend.exchanges] == [target]


async def test_bodies_that_arrive_at_the_same_time_have_a_bound(make_node: MakeNode) -> None:
    """Each is allowed by itself; together they are what ends a process."""
    body = json.dumps({"id": "s", **send_body("x" * 150_000)}).encode()
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url, max_buffer_bytes=200_000)
        head = (
            f"POST /api/chat HTTP/1.1\r\nHost: {node.address}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()
        async with connected(node.address) as one, connected(node.address) as two:
            waiting = {}
            for reader, writer in (one, two):
                writer.write(head + body[:-10])
                waiting[asyncio.create_task(reader.readuntil(b"\r\n\r\n"))] = reader, writer
            done, pending = await asyncio.wait(
                waiting, timeout=WAIT_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            assert len(done) == 1
            refused = done.pop().result()
            assert refused.startswith(b"HTTP/1.1 429 ")
            assert b"\r\nRetry-After: 1\r\n" in refused
            other = pending.pop()
            waiting[other][1].write(body[-10:])
            async with asyncio.timeout(WAIT_SECONDS):
                assert (await other).startswith(b"HTTP/1.1 200 ")
        assert [exchange.body for exchange in backend.exchanges] == [body]


async def test_no_answer_of_ours_names_the_library(make_node: MakeNode) -> None:
    """Who looks for its advisories need not be told; what the backend says of itself is passed on."""

    async def named(exchange: Exchange) -> None:
        await exchange.head("200 OK", {"Server": "theirs", "Content-Type": "text/plain"})
        await exchange.end()

    async with ScriptedBackend(named) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http, SessionClient(node.address) as client:
            answers_of_ours = [
                await http.request("GET", f"{http.base}/gateway/none"),
                await http.request("GET", f"{http.base}/gateway/v1/ws"),
                await http.stream("s"),
                await http.request("POST", f"{http.base}/api/chat/s/stop"),
            ]
            assert [answer.status for answer in answers_of_ours] == [404, 400, 204, 200]
            for answer in answers_of_ours:
                assert "Server" not in answer.headers
            assert "Server" not in client.socket._response.headers
            passed = await http.request("GET", f"{http.base}/other")
            assert passed.headers["Server"] == "theirs"


@pytest.mark.parametrize(
    ("upstream", "listen"),
    [
        ("http://127.0.0.1:8080", "127.0.0.1:8080"),
        ("http://localhost:8080", "127.0.0.1:8080"),
        ("http://[::1]:8080/base", "localhost:8080"),
        ("http://gateway.example", "gateway.example:80"),
    ],
)
def test_a_gateway_is_not_pointed_at_itself(
    monkeypatch: pytest.MonkeyPatch, upstream: str, listen: str
) -> None:
    """A typo in a port would make one request go round until nothing is left."""
    monkeypatch.setenv("GATEWAY_UPSTREAM", upstream)
    monkeypatch.setenv("GATEWAY_LISTEN", listen)
    monkeypatch.setenv("GATEWAY_AUTH", "none")
    with pytest.raises(ConfigError) as caught:
        load_config()
    assert [problem.partition(":")[0].partition(" ")[0] for problem in caught.value.problems] == [
        "GATEWAY_LISTEN"
    ]
    assert "GATEWAY_UPSTREAM" in caught.value.problems[0]
    monkeypatch.setenv("GATEWAY_LISTEN", f"127.0.0.1:{(URL(upstream).port or 0) + 1}")
    assert load_config().upstream == upstream


@pytest.mark.parametrize("setting", ["listen", "admin_listen"])
async def test_a_port_that_is_taken_is_told_with_its_setting(make_config: MakeConfig, setting: str) -> None:
    """There are two ports, and the error is read by somebody who set neither."""
    async with ScriptedBackend(answers) as backend:
        taken = backend.url.removeprefix("http://")
        config = make_config("http://127.0.0.1:9", **{setting: taken})
        with pytest.raises(ListenError) as caught:
            async with Node(config):
                pass
        assert str(caught.value) == (
            f"unable to listen on {taken}; address already in use; "
            f"set GATEWAY_{setting.upper()} to another address"
        )
