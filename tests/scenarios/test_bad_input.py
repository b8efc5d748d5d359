"""Bad input: a clear error, the connection kept where it can be, and nobody else the wiser."""

from __future__ import annotations

import asyncio
import json
import struct
import tracemalloc
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import aiohttp
import pytest

from gateway.edge import requests
from tests.support.backend import Exchange, ScriptedBackend, until_released
from tests.support.client import WAIT_SECONDS, SessionClient, send_body
from tests.support.wires import HttpChat, SdkClient, eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.app import Node

    MakeNode = Callable[..., Awaitable[Node]]

GOOD_NAMES = ["{a}", "a/b", "a..b", "a%2Fb", "ü 漢字 🎉", "a?b#c", "a b+c&d=e", "x" * 512, "'\"<>\\"]
BAD_NAMES = ["", ".", "..", "a\0b", "a\nb", "\x7f", "x" * 4096, "ü" * 300]


async def answers(exchange: Exchange) -> None:
    await exchange.head()
    await exchange.text("one", "two")


NO_COMMANDS = {
    "no-json": "hello",
    "empty": "",
    "half": '{"type":"ping","id":1',
    "two": '{"type":"ping","id":1}{"type":"ping","id":2}',
    "array": "[]",
    "number": "1",
    "null": "null",
    "no-type": '{"id":1}',
    "no-id": '{"type":"ping"}',
    "unknown": '{"type":"drop-tables","id":1}',
    "type-of-type": '{"type":7,"id":1}',
    "type-of-id": '{"type":"ping","id":{}}',
    "type-of-session": '{"type":"attach","id":1,"session":7}',
    "no-session": '{"type":"attach","id":1}',
    "type-of-turn": '{"type":"send","id":1,"session":"s","turn":7,"body":{}}',
    "type-of-body": '{"type":"send","id":1,"session":"s","turn":"t","body":"x"}',
    "no-body": '{"type":"send","id":1,"session":"s","turn":"t"}',
    "bad-overlap": '{"type":"send","id":1,"session":"s","turn":"t","body":{},"overlap":"queue"}',
    "empty-turn": '{"type":"send","id":1,"session":"s","turn":"","body":{}}',
    "space-in-turn": '{"type":"cancel","id":1,"session":"s","turn":"a b"}',
    "long-turn": json.dumps({"type": "cancel", "id": 1, "session": "s", "turn": "t" * 4096}),
    "later": '{"type":"signal","id":1,"session":"s","name":"n","data":{}}',
    "nan": '{"type":"attach","id":NaN,"session":"s"}',
    "infinity": '{"type":"send","id":1,"session":"s","turn":"t","body":{"x":Infinity}}',
    "long-id": json.dumps({"type": "ping", "id": "x" * 129}),
    "depth-bomb": '{"type":"send","id":1,"session":"s","turn":"t","body":'
    + '{"a":' * 100_000
    + "1"
    + "}" * 100_001,
    "array-bomb": "[" * 1_000_000,
}


@pytest.mark.parametrize("name", NO_COMMANDS)
async def test_what_is_no_command_gets_a_clear_error(make_node: MakeNode, name: str) -> None:
    """And the socket, with all that is attached on it, lives."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client:
            await client.send("fine", "t1")
            await client.socket.send_str(NO_COMMANDS[name])
            told = await client.wait(lambda line: line["type"] == "error")
            assert told["code"] == "bad-request"
            assert told["message"].startswith("unable to ")
            assert len(told["message"]) < 500
            assert told["retryable"] is False
            assert told.get("id", 1) == 1
            assert (await client.ask(type="ping"))["type"] == "pong"
            (await backend.exchange()).release.set()
            await client.ended("t1")
            assert client.text == "onetwo"
        assert len(backend.exchanges) == 1


async def test_numbers_and_odd_text_pass_to_the_backend_as_they_came(make_node: MakeNode) -> None:
    """What is JSON is the backend's to judge; other devices are told what every reader can read."""
    raw = '{"big":123456789012345678901234567890,"x":1.0e0,"messages":[{"t":"\\ud800 \\u0000"}]}'
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client:
            await client.socket.send_str(f'{{"type":"send","id":"x","session":"s","turn":"t","body":{raw}}}')
            await client.ended("t")
            assert client.records[0]["messages"] == [{"t": "\ufffd \0"}]
        body = (await backend.exchange()).body.decode()
        # Half a surrogate pair is no character: it is replaced, since no UTF-8 can say it.
        assert body == raw.replace("\\ud800", "\\ufffd")[:-1] + ',"id":"s"}'


async def test_odd_ids_and_names_are_echoed_or_refused(make_node: MakeNode) -> None:
    """Whatever JSON can say in them, the socket lives."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client:
            odd = ("9" * 18, "-1", "9" * 400, "9" * 5000, "1.5", "1e3", "true")
            for count, identifier in enumerate(odd, start=1):
                await client.socket.send_str(f'{{"type":"ping","id":{identifier}}}')
                await client.wait(lambda line: line["type"] in {"pong", "error"}, count=count)
            await client.socket.send_str('{"type":"attach","id":"x","session":"\\ud800"}')
            told = await client.wait(lambda line: line.get("id") == "x")
            assert told["type"] == "error" or told["session"] == "\ufffd"
            assert (await client.ask(type="ping"))["type"] == "pong"


async def test_twenty_bad_frames_in_a_row_close_the_socket_for_good(make_node: MakeNode) -> None:
    """A client that talks nonsense does not get better by coming back."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client:
            for _ in range(19):
                await client.socket.send_str("nonsense")
            await client.ask(type="ping")  # not in a row
            for _ in range(19):
                await client.socket.send_str("nonsense")
            await client.ask(type="ping")
            for _ in range(20):
                await client.socket.send_str("nonsense")
            assert await client.closed() == 4500
            assert len([line for line in client.told if line["type"] == "error"]) == 58
        async with SdkClient(node.address) as sdk:
            for _ in range(20):
                await sdk.socket.send_str("nonsense")
            assert await sdk.closed() == 4500


async def test_a_binary_frame_closes_the_socket_for_good(make_node: MakeNode) -> None:
    """Both wires are text."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client, SdkClient(node.address) as sdk:
            await client.socket.send_bytes(b'{"type":"ping","id":1}')
            assert await client.closed() == 4500
            await sdk.socket.send_bytes(b"x")
            assert await sdk.closed() == 4500


async def test_a_hundred_megabyte_frame_is_refused_before_it_is_here(make_node: MakeNode) -> None:
    """4509, by its announced length; nobody else notices, and memory does not grow by it."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url, max_body_bytes=1024 * 1024)
        async with SessionClient(node.address) as other:
            await other.send("s", "t1")
            for path, protocol in (("/gateway/v1/ws", "session-gateway.v1"), ("/api/chat", None)):
                reader, writer = await open_websocket(node, path, protocol)
                tracemalloc.start()
                writer.write(b"\x81\xff" + struct.pack("!Q", 100 * 1024 * 1024) + b"mask")
                piece = b"x" * 65_536
                try:
                    for _ in range(1600):
                        writer.write(piece)
                        await asyncio.wait_for(writer.drain(), 0.2)
                except (ConnectionError, TimeoutError):
                    pass
                with_reader = await rest_of(reader)
                _, peak = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                assert peak < 16 * 1024 * 1024
                if with_reader:
                    assert struct.pack("!H", 4509) in with_reader
                writer.transport.abort()
            (await backend.exchange()).release.set()
            await other.ended("t1")
            assert other.text == "onetwo"


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(WAIT_SECONDS):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


async def open_websocket(
    node: Node, path: str, protocol: str | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(*node.address.split(":"))
    offered = f"Sec-WebSocket-Protocol: {protocol}\r\n" if protocol else ""
    head = (
        f"GET {path} HTTP/1.1\r\nHost: {node.address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{offered}\r\n"
    )
    writer.write(head.encode())
    assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
    return reader, writer


async def test_a_frame_that_is_a_little_too_large_says_why(make_node: MakeNode) -> None:
    """A page that attaches a large image learns which setting it met."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url, max_body_bytes=100_000)
        async with SessionClient(node.address) as client:
            await client.socket.send_str(json.dumps({"type": "ping", "id": "x" * 100_000}))
            assert await client.closed() == 4509


# -- names


@pytest.mark.parametrize("name", GOOD_NAMES)
async def test_a_session_may_be_called_nearly_anything(make_node: MakeNode, name: str) -> None:
    """Names are the app's own; they reach no key and no unescaped path."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with (
            SessionClient(node.address) as client,
            HttpChat(node.address) as http,
            SdkClient(node.address) as sdk,
        ):
            await client.attach(name)
            posted = await http.post(name)
            await posted.has(4)
            await sdk.resume("r1", name)
            await sdk.has("r1", 4)
            watched = await http.stream(quote(name, safe=""))
            await watched.has(4)
            (await backend.exchange()).release.set()
            for answer in (posted, watched):
                await answer.end()
                assert answer.text == "onetwo"
            assert (await client.ended(posted.turn))["session"] == name
            await client.send(name, "t2")
            await client.wait(lambda line: line["type"] == "chunk" and line["turn"] == "t2")
            assert (await http.stop(quote(name, safe="")))["turns"] == [{"turn": "t2", "result": "cancelled"}]


@pytest.mark.parametrize("name", BAD_NAMES)
async def test_a_name_that_no_session_can_have_is_refused_on_each_wire(
    make_node: MakeNode, name: str
) -> None:
    """With 400 or `bad-request` or an `error` frame, and never by the backend."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url, passthrough=False)
        async with (
            SessionClient(node.address) as client,
            HttpChat(node.address) as http,
            SdkClient(node.address) as sdk,
        ):
            for command in ("attach", "detach", "cancel"):
                told = await client.ask(type=command, session=name)
                assert (told["type"], told["code"]) == ("error", "bad-request")
            assert (await client.send(name, "t1"))["code"] == "bad-request"
            answer = await http.post(name)
            assert answer.status == 400
            assert json.loads(await answer.end())["code"] == "bad-request"
            await sdk.send("r1", name)
            assert (await sdk.ended("r1"))["type"] == "error"
            await sdk.resume("r2", name)
            assert (await sdk.ended("r2"))["type"] == "error"
            if len(quote(name, safe="")) > 8000:
                return
            for answer in (
                await http.stream(quote(name, safe="")),
                await http.request("POST", f"{http.url}/{quote(name, safe='')}/stop"),
            ):
                assert answer.status in {400, 404}
        assert backend.exchanges == []


# -- bodies on the HTTP wire


@pytest.mark.parametrize(
    "body", [b'{"messages":[]}', b'{"id":null}', b'{"id":7}', b'{"id":{}}', b"[]", b"x=1", b"", b'{"id":"a'],
)  # fmt: skip
async def test_a_body_that_names_no_session_is_proxied(make_node: MakeNode, body: bytes) -> None:
    """It is not ours to judge: the backend answers as it would have."""

    async def judge(exchange: Exchange) -> None:
        await exchange.head("422 Unprocessable", {"Content-Type": "text/plain"})
        await exchange.raw(b"what?")
        await exchange.end()

    async with ScriptedBackend(judge) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http:
            answer = await http.request(
                "POST", http.url, data=body, headers={"Content-Type": "application/json"}
            )
            assert (answer.status, await answer.end()) == (422, b"what?")
            assert "Session-Gateway-Turn" not in answer.headers
        assert (await backend.exchange()).body == body


async def test_a_body_without_session_still_streams(make_node: MakeNode) -> None:
    """Proxied is not buffered."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http:
            answer = await http.request("POST", http.url, json=send_body("hello"))
            await answer.has(4)
            (await backend.exchange()).release.set()
            await answer.end()
            assert answer.text == "onetwo"


async def test_a_body_that_is_too_large_is_a_413(make_node: MakeNode) -> None:
    """Announced or not; and the gateway goes on."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url, max_body_bytes=100_000)
        async with HttpChat(node.address) as http:
            for data in (json.dumps({"id": "s", "x": "y" * 200_000}).encode(), in_pieces(200)):
                answer = await http.request("POST", http.url, data=data)
                assert answer.status == 413
                assert "GATEWAY_MAX_BODY" in json.loads(await answer.end())["message"]
            fits = await http.post("s", "x" * 50_000)
            await fits.end()
            assert fits.text == "onetwo"
        assert len(backend.exchanges) == 1


async def in_pieces(count: int) -> Any:
    yield b'{"id":"s","x":"'
    for _ in range(count):
        yield b"y" * 1000
    yield b'"}'


async def test_a_body_that_does_not_come_ends_the_request(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that gives nothing must not hold anything for ever; one that leaves is no fault."""
    monkeypatch.setattr(requests, "BODY_SECONDS", 0.1)
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        head = f"POST /api/chat HTTP/1.1\r\nHost: {node.address}\r\nContent-Length: 100\r\n\r\n{{".encode()
        reader, writer = await asyncio.open_connection(*node.address.split(":"))
        writer.write(head)
        assert b" 408 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_SECONDS)
        writer.transport.abort()
        monkeypatch.setattr(requests, "BODY_SECONDS", 60.0)
        for _ in range(5):
            reader, writer = await asyncio.open_connection(*node.address.split(":"))
            writer.write(head)
            await writer.drain()
            await asyncio.sleep(0)
            writer.transport.abort()
        async with HttpChat(node.address) as http:
            await (await http.post("s")).end()
        assert len(backend.exchanges) == 1


async def test_bad_names_of_turns_and_clients_are_refused(make_node: MakeNode) -> None:
    """What a client mints ends up in logs, journals and headers."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http:
            for key in ("a b", "x" * 200, "ü"):
                answer = await http.post("s", headers={"Idempotency-Key": key})
                assert answer.status == 400
            for name in ("a%20b", "", "%00"):
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    await http.http.ws_connect(f"{http.base}/gateway/v1/ws?client={name}")
                assert refused.value.status == 400
        assert backend.exchanges == []


@pytest.mark.parametrize("query", ["client=my%20app", "client=", "client=%00&x=1"])
async def test_a_query_of_the_apps_own_is_left_alone(make_node: MakeNode, query: str) -> None:
    """On the chat path the query is the app's; a `client` in it that is no client id is its business."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http:
            answer = await http.request("POST", f"{http.url}?{query}", json={"id": "s"})
            assert answer.status == 200
            await answer.end()
            socket = await http.http.ws_connect(f"{http.url}?{query}")
            await socket.close()
        assert [exchange.target for exchange in backend.exchanges] == [f"/api/chat?{query}"]


async def test_a_handshake_that_is_none_is_refused(make_node: MakeNode) -> None:
    """A plain GET, or a socket that speaks another protocol, is told what is spoken here."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http:
            answer = await http.request("GET", f"{http.base}/gateway/v1/ws")
            assert answer.status == 400
            assert "WebSocket" in json.loads(await answer.end())["message"]
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await http.http.ws_connect(f"{http.base}/gateway/v1/ws", protocols=["graphql-ws"])
            assert refused.value.status == 400
            assert (await http.request("GET", f"{http.base}/gateway/v1/nothing")).status == 404
            socket = await http.http.ws_connect(
                f"{http.base}/gateway/v1/ws", protocols=["session-gateway.v1", "bearer.x"]
            )
            assert socket.protocol == "session-gateway.v1"
            assert (await socket.receive_json())["type"] == "hello"
            await socket.close()


# -- frames of the SDK's wire


@pytest.mark.parametrize(
    "frame",
    [
        '{"type":"send","requestId":"r1","id":7}',
        '{"type":"send","requestId":"r1"}',
        '{"type":"send","requestId":"r1","id":"s","headers":{"a":1}}',
        '{"type":"send","requestId":"r1","id":"s","body":[]}',
        '{"type":"send","requestId":"r1","id":"s","headers":{"cookie":"a\\r\\nX: 1"}}',
        '{"type":"resume","requestId":"r1","id":"s","lastSequence":"x"}',
        '{"type":"dance","requestId":"r1"}',
    ],
)
async def test_a_bad_frame_of_the_sdks_wire_ends_its_request(make_node: MakeNode, frame: str) -> None:
    """The page shows an error, and the socket carries on."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with SdkClient(node.address) as sdk:
            await sdk.socket.send_str(frame)
            told = await sdk.ended("r1")
            assert told["type"] == "error"
            assert told["errorText"].startswith("unable to ")
            await sdk.send("r2", "fine")
            assert (await sdk.ended("r2"))["type"] == "end"
        assert len(backend.exchanges) == 1


async def test_frames_about_nothing_are_passed_over(make_node: MakeNode) -> None:
    """An abort of an ended request is what a page sends when it is quick."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url, abort="cancel")
        async with SdkClient(node.address) as sdk:
            await sdk.abort("never")
            await sdk.socket.send_str('{"type":"abort","requestId":""}')
            await sdk.send("r1", "s")
            await sdk.ended("r1")
            await sdk.abort("r1")
            await sdk.resume("r2", "unknown")
            assert (await sdk.ended("r2"))["type"] == "no-active"
        await eventually(lambda: not node._turns._producers)
