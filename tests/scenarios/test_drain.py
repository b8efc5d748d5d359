"""A node that is told to stop: its clients go elsewhere, each at its own moment, and no turn ends by it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import aiohttp
import pytest
from structlog.testing import capture_logs

from gateway import app
from gateway.client import GatewayClient, Timing
from gateway.core.model import CloseCode
from gateway.edge import socket as session_socket
from gateway.edge import socketloop
from gateway.edge.commands import PIECE_BYTES
from gateway.edge.socketloop import SocketLoop
from gateway.telemetry import registry
from tests.support.backend import Exchange, ScriptedBackend, answers, never_ends, until_released
from tests.support.balancer import Balancer
from tests.support.client import WAIT_SECONDS, SessionClient, send_body
from tests.support.fallback import FallbackClient
from tests.support.node import Backend, ChatClient
from tests.support.process import GatewayProcess
from tests.support.usechat import OF_5
from tests.support.wires import HttpChat, SdkClient, eventually
from tests.support.world import CARRIERS, HOLD, World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from gateway.app import Node
    from gateway.edge.admission import Connection
    from tests.support.network import Network

    MakeNode = Callable[..., Awaitable[Node]]

QUICK_LEASE = 0.5
LONG = 600.0


async def pair(make_node: MakeNode, upstream: str, **settings: Any) -> tuple[Node, Node]:
    """Two nodes that know of each other; the first is the one to be stopped."""
    settings = {"lease_seconds": QUICK_LEASE, "drain_seconds": LONG, **settings}
    first, second = [await make_node(upstream, **settings) for _ in range(2)]
    await eventually(lambda: first._lease.others_live and second._lease.others_live)
    return first, second


@contextlib.asynccontextmanager
async def stopping(node: Node) -> AsyncIterator[asyncio.Task[None]]:
    """The node has been told to stop, and is hurried at the end of the test."""
    task = asyncio.create_task(node.stop())
    await eventually(lambda: node._sessions.draining)
    try:
        yield task
    finally:
        node.hurry()
        async with asyncio.timeout(WAIT_SECONDS):
            await task


async def refuses_connections(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return True
    writer.transport.abort()
    return False


def counted(name: str, **labels: str) -> float:
    return registry.get_sample_value(name, labels) or 0.0


def is_goaway(line: dict[str, Any]) -> bool:
    return bool(line["type"] == "goaway")


def is_to_go(connection: Connection) -> bool:
    """Whether its moment has come."""
    return bool(vars(connection).get("_has_left") or vars(connection).get("has_left"))


async def answered(address: str) -> bytes:
    """The head of an answer, on a connection of its own."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(f"GET /api/chat/s/stream HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
        return await reader.read(64)
    finally:
        writer.transport.abort()


def busy(node: Node) -> set[Any]:
    """The connections that a request of is being answered."""
    return node._departure._listener._busy


# -- who is told what


async def test_each_client_is_told_a_moment_of_its_own(make_node: MakeNode) -> None:
    """All at the same moment would be a stampede on the nodes that are left."""
    async with ScriptedBackend(answers) as backend, contextlib.AsyncExitStack() as stack:
        node, _ = await pair(make_node, backend.url, goaway_spread_seconds=60.0)
        clients = [await stack.enter_async_context(SessionClient(node.address)) for _ in range(20)]
        before = counted("gateway_goaways_total")
        async with stopping(node):
            moments = [(await client.wait(is_goaway))["after"] for client in clients]
            assert all(0 <= moment <= 60_000 for moment in moments)
            assert len(set(moments)) > 15
            assert max(moments) - min(moments) > 15_000
            # Until its moment each is served as before.
            assert (await clients[0].ask(type="ping"))["type"] == "pong"
            assert (await clients[0].attach("s"))["type"] == "attached"
            assert counted("gateway_goaways_total") - before == len(clients)
        assert {await client.closed() for client in clients} == {CloseCode.GOING_AWAY}


async def test_who_has_not_left_by_its_moment_is_closed(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not know the push must not keep the node; its turn goes on meanwhile."""
    monkeypatch.setattr(session_socket, "LEAVE_SECONDS", 0.05)
    async with ScriptedBackend(until_released) as backend:
        node, other = await pair(make_node, backend.url, goaway_spread_seconds=0.05)
        async with SessionClient(node.address) as client, SessionClient(other.address) as elsewhere:
            await client.send("s", "t")
            await client.wait(lambda line: line["type"] == "chunk")
            async with stopping(node) as task:
                assert await client.closed() == CloseCode.GOING_AWAY
                assert not task.done()
                await elsewhere.attach("s", client.records[-1]["cursor"])
                (await backend.exchange(0)).release.set()
                assert (await elsewhere.ended("t"))["reason"] == "complete"
                async with asyncio.timeout(WAIT_SECONDS):
                    await task  # nobody is left, and nothing runs: nobody had to hurry it


async def test_a_node_that_is_alone_keeps_its_clients_and_its_listener(make_node: MakeNode) -> None:
    """Nobody else could serve them while the turn comes to its end."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url, lease_seconds=QUICK_LEASE, drain_seconds=LONG)
        async with SessionClient(node.address) as client:
            await client.send("s", "t")
            async with stopping(node) as task:
                assert (await client.send("s", "u"))["code"] == "draining"
                async with SessionClient(node.address) as late:
                    await late.attach("s")
                    (await backend.exchange(0)).release.set()
                    assert (await late.ended("t"))["reason"] == "complete"
                    assert await late.closed() == CloseCode.GOING_AWAY
                await client.ended("t")
                assert await client.closed() == CloseCode.GOING_AWAY
                assert not any(map(is_goaway, client.told))
                async with asyncio.timeout(WAIT_SECONDS):
                    await task


async def test_a_node_on_its_own_store_is_alone_also_after_a_crash(tmp_path: Path) -> None:
    """Who seems to live there is the one that was killed; where it sent clients, nobody would listen."""
    settings = {"data_dir": tmp_path / "data", "drain": LONG}
    async with ScriptedBackend(until_released) as backend:
        settings["upstream"] = backend.url
        async with GatewayProcess(**settings) as killed:
            await killed.started()
            await killed.kill()
        async with GatewayProcess(**settings) as gateway, HttpChat("unused") as http:
            await gateway.started()
            async with SessionClient(gateway.address) as client:
                await client.send("s", "t", "hold")
                exchange = await backend.exchange(0)
                gateway.terminate()

                async def is_stopping() -> bool:
                    answer = await http.request("GET", f"http://{gateway.admin_address}/readyz")
                    return b"stopping" in await answer.end()

                await eventually(is_stopping)
                for _ in range(20):
                    async with SessionClient(gateway.address) as late:
                        await late.attach("s")
                assert not [line for line in client.told if is_goaway(line)]
                exchange.release.set()
                assert (await client.ended("t"))["reason"] == "complete"
                assert await gateway.exited() == 0


async def test_the_listener_is_closed_at_once_where_another_node_lives(make_node: MakeNode) -> None:
    """Who comes back must not come back here; what carries a request goes on to its end."""
    async with ScriptedBackend(until_released) as backend, HttpChat("unused") as http:
        node, other = await pair(make_node, backend.url)
        host, _, port = node.address.rpartition(":")
        idle, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET /api/chat/s/stream HTTP/1.1\r\nHost: {node.address}\r\n\r\n".encode())
        assert b"204" in await idle.readuntil(b"\r\n\r\n")
        answer = await http.request(
            "POST", f"http://{node.address}/api/chat", json={"id": "s", **send_body("")}
        )
        await answer.has(4)
        async with stopping(node) as task:
            await eventually(lambda: refuses_connections(node.address))
            assert not await refuses_connections(other.address)
            async with asyncio.timeout(WAIT_SECONDS):
                assert await idle.read() == b""  # it is closed, so that nobody asks on it
            writer.close()
            assert answer.raw.count(b"data:") < 6
            (await backend.exchange(0)).release.set()
            await answer.end()
            assert (answer.whole, answer.text) == (True, "onetwo")
            async with asyncio.timeout(WAIT_SECONDS):
                await task


async def test_an_answer_that_ends_during_a_drain_says_that_its_connection_does(make_node: MakeNode) -> None:
    """A load balancer keeps connections, and must not send the next request on one that is about to close."""
    async with ScriptedBackend(until_released) as backend:
        node, _ = await pair(make_node, backend.url, goaway_spread_seconds=LONG)
        host, _, port = node.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps({"id": "s", **send_body("x")}).encode()
        head = f"POST /api/other HTTP/1.1\r\nHost: {node.address}\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body[:10])
        await eventually(lambda: bool(busy(node)))
        async with SessionClient(node.address), stopping(node):  # who has long to go keeps the node
            await eventually(lambda: refuses_connections(node.address))
            writer.write(body[10:])  # what was being read is read on
            (await backend.exchange(0)).release.set()
            async with asyncio.timeout(WAIT_SECONDS):
                told = await reader.read()  # to the end of the connection
            assert told.startswith(b"HTTP/1.1 200")
            assert b"\r\nconnection: close\r\n" in told.lower()
            assert b"two" in told
        writer.close()


async def test_a_node_that_stops_is_no_place_to_send_clients_to(make_node: MakeNode) -> None:
    """Two that stop at once would send their clients to each other."""
    async with ScriptedBackend(answers) as backend:
        node, other = await pair(make_node, backend.url, goaway_spread_seconds=LONG)
        async with SessionClient(node.address), stopping(node):
            await eventually(lambda: not other._lease.others_live)


async def test_a_client_that_is_far_behind_goes_at_its_moment_too(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is always something due to it; what it has not had it gets from the next node."""
    monkeypatch.setattr(session_socket, "LEAVE_SECONDS", 0.05)
    monkeypatch.setattr(socketloop, "CLOSE_SECONDS", LONG)

    async def long_answer(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.text(*["x" * 50_000] * 500)

    async with ScriptedBackend(long_answer) as backend, aiohttp.ClientSession() as page:
        node, other = await pair(make_node, backend.url, goaway_spread_seconds=0.05, max_turn_bytes=2**26)
        async with SessionClient(other.address) as sender:
            await sender.send("s", "t")
            await sender.ended("t")
        url = f"http://{node.address}/gateway/v1"
        accept = {"Accept": "text/event-stream"}
        async with (
            page.ws_connect(f"{url}/ws") as socket,
            page.get(f"{url}/sessions/s/events", headers=accept) as stream,
        ):
            await socket.send_json({"type": "attach", "id": 1, "session": "s"})
            open_now = list(node._departure._connections._open)
            assert len(open_now) == 2
            async with stopping(node):
                await eventually(
                    lambda: all(
                        vars(each).get("_has_left") or vars(each).get("has_left") for each in open_now
                    )
                )
                async with asyncio.timeout(WAIT_SECONDS):
                    assert len(await stream.read()) < 20_000_000
                    had = sum([len(message.data) async for message in socket])
                assert had < 20_000_000
                assert socket.close_code == CloseCode.GOING_AWAY


async def test_a_connection_that_was_kept_ends_with_its_stream(make_node: MakeNode) -> None:
    """Its head was written before anybody knew; idle it would wait for a request that should go elsewhere."""
    async with ScriptedBackend(until_released) as backend:
        node, _ = await pair(make_node, backend.url, goaway_spread_seconds=LONG)
        async with SessionClient(node.address) as client:
            await client.send("s", "t")
            host, _, port = node.address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"GET /api/chat/s/stream HTTP/1.1\r\nHost: {node.address}\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert b"connection: close" not in head.lower()
            async with stopping(node) as task:
                await client.wait(is_goaway)
                (await backend.exchange(0)).release.set()
                async with asyncio.timeout(WAIT_SECONDS):
                    assert (await reader.read()).endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
                assert not task.done()  # so it was not the node's own end
            writer.close()


# -- where they go


async def test_every_carrier_goes_on_elsewhere_and_misses_nothing(make_node: MakeNode) -> None:
    """Streams end and polls are answered at such a moment; their clients ask again, after their cursor."""
    async with ScriptedBackend(until_released) as backend:
        node, other = await pair(make_node, backend.url, goaway_spread_seconds=0.05)
        async with FallbackClient(node.address) as leaving, FallbackClient(other.address) as arrived:
            await leaving.send("s", "t")
            stream = await leaving.events("s")
            had = (await stream.has(5))[-1].json
            polling = asyncio.create_task(leaving.poll("s", {"after": had["cursor"], "wait": "30"}))
            await eventually(lambda: counted("gateway_open_connections", carrier="long-poll") == 1)
            async with stopping(node):
                await stream.end()
                assert stream.whole
                async with asyncio.timeout(WAIT_SECONDS):
                    polled = await polling
                assert (polled["records"], polled["cursor"]) == ([], had["cursor"])
                stream = await arrived.events("s", {"after": had["cursor"]})
                polling = asyncio.create_task(arrived.poll("s", {"after": had["cursor"], "wait": "30"}))
                (await backend.exchange(0)).release.set()
                await stream.wait(lambda: b'"turn-end"' in stream.raw)
                first = (await polling)["records"][0]
                assert first["offset"] == had["offset"] + 1
                offsets = [event.json["offset"] for event in stream.events if not event.event]
                assert offsets == list(range(first["offset"], first["offset"] + len(offsets)))


async def test_an_sdk_socket_is_closed_when_nothing_of_it_is_in_flight(make_node: MakeNode) -> None:
    """It cannot go on elsewhere in the middle; idle, its next question must not meet a node that stops."""
    async with ScriptedBackend(until_released) as backend:
        node, _ = await pair(make_node, backend.url)
        async with SdkClient(node.address) as busy_page, SdkClient(node.address) as idle_page:
            await busy_page.send("r", "s")
            await busy_page.has("r", 4)
            async with stopping(node) as task:
                assert await idle_page.closed() == CloseCode.GOING_AWAY
                assert not busy_page.socket.closed
                (await backend.exchange(0)).release.set()
                assert (await busy_page.ended("r"))["type"] == "end"
                assert busy_page.text("r") == "onetwo"
                assert await busy_page.closed() == CloseCode.GOING_AWAY
                async with asyncio.timeout(WAIT_SECONDS):
                    await task


async def test_a_turn_of_another_node_that_is_told_over_http_is_told_to_its_end(make_node: MakeNode) -> None:
    """The stock transport does not resume in the middle: to end its stream would be to lose the answer."""
    async with ScriptedBackend(until_released) as backend:
        node, other = await pair(make_node, backend.url)
        async with SessionClient(other.address) as client, HttpChat(node.address) as http:
            await client.send("s", "t")
            answer = await http.stream("s")
            await answer.has(4)
            assert counted("gateway_open_connections", carrier="http") == 1  # it is waited for
            async with stopping(node) as task:
                await eventually(lambda: refuses_connections(node.address))
                (await backend.exchange(0)).release.set()
                await answer.end()
                assert (answer.whole, answer.text) == (True, "onetwo")
                async with asyncio.timeout(WAIT_SECONDS):
                    await task


async def test_what_a_stopping_node_refuses_another_takes_and_nobody_is_told(make_node: MakeNode) -> None:
    """A deploy in the middle of a question is no error (decision 7)."""
    async with ScriptedBackend(answers) as backend:
        node, other = await pair(make_node, backend.url, goaway_spread_seconds=LONG)
        async with (
            Balancer([node.address]) as balancer,
            GatewayClient(f"http://{balancer.address}", timing=Timing()) as gateway,
            gateway.attach("s") as records,
        ):
            balancer.nodes.append(other.address)
            async with stopping(node), asyncio.timeout(WAIT_SECONDS):
                await eventually(lambda: refuses_connections(node.address))
                turn = await gateway.send("s", send_body("hello"))
                kinds = [(await anext(records)).kind]
                while kinds[-1] != "turn-end":
                    kinds.append((await anext(records)).kind)
            assert not turn.duplicate
            assert kinds == ["turn-start", *["chunk"] * 8, "turn-end"]
        assert balancer.passed == {node.address: 1, other.address: 1}
        assert len(backend.exchanges) == 1


@pytest.mark.node
async def test_a_page_that_asks_while_its_node_stops_is_answered_by_another(make_node: MakeNode) -> None:
    """``useChat`` on each carrier: no error, no second question, the whole answer once."""
    async with Backend(7) as backend, ChatClient(7) as page:
        node, other = await pair(make_node, backend.url, goaway_spread_seconds=LONG)
        async with Balancer([node.address]) as balancer:
            world = World(backend, node, cast("Network", balancer), page)
            await world.attach_each()
            balancer.nodes.append(other.address)
            async with stopping(node):
                await eventually(lambda: refuses_connections(node.address))
                for carrier in CARRIERS:
                    await page.send(HOLD, chat=carrier)
                    await page.wait(chat=carrier, text=OF_5)
                    await backend.release(carrier)
                states = await world.settled()
            for carrier in CARRIERS:
                world.assert_shown_once(states[carrier], carrier)
                assert {status["state"] for status in states[carrier]["connections"]} <= {
                    "idle", "connecting", "catching-up", "live"
                }  # fmt: skip


async def test_a_second_signal_ends_the_departure(make_node: MakeNode) -> None:
    """Who asks twice has no time; every client is told to connect again all the same."""
    async with ScriptedBackend(never_ends) as backend:
        node, _ = await pair(make_node, backend.url, goaway_spread_seconds=LONG)
        async with SessionClient(node.address) as client, SdkClient(node.address) as page:
            await client.send("s", "t")
            await page.send("r", "d")
            await page.has("r", 4)
            async with stopping(node) as task:
                await client.wait(is_goaway)
                assert not task.done()
                node.hurry()
                assert (await client.ended("t"))["reason"] == "interrupted"
                await page.ended("r")
                assert {await client.closed(), await page.closed()} == {CloseCode.GOING_AWAY}
                async with asyncio.timeout(WAIT_SECONDS):
                    await task


# -- how many there may be


async def test_more_connections_than_allowed_are_refused_with_a_hint_until_there_is_room(
    make_node: MakeNode,
) -> None:
    """A node that takes everybody serves nobody; a load balancer goes elsewhere on a 503."""
    async with ScriptedBackend(never_ends) as backend, HttpChat("unused") as http:
        node = await make_node(backend.url, max_connections=2)
        refused = counted("gateway_refused_connections_total", reason="rate-limited")
        async with (
            SessionClient(node.address) as first,
            SdkClient(node.address),
            FallbackClient(node.address) as client,
        ):
            assert counted("gateway_open_connections", carrier="websocket") == 1
            handshake = {
                "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
                "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            }  # fmt: skip
            asked = [
                await http.request("GET", f"http://{node.address}/gateway/v1/ws", headers=handshake),
                await http.request("GET", f"http://{node.address}/api/chat", headers=handshake),
                await client.events("s"),
                await client.asked("s", {"wait": "30"}),
                await http.request(
                    "POST", f"http://{node.address}/api/chat", json={"id": "s", **send_body("")}
                ),
            ]
            for answer in asked:
                told = json.loads(await answer.end())
                assert (answer.status, told["code"], told["retryable"]) == (503, "rate-limited", True)
                assert 1 <= told["retryAfter"] <= 5
                assert 1 <= int(answer.headers["Retry-After"]) <= 5
                assert answer.headers["Connection"] == "close"
            assert counted("gateway_refused_connections_total", reason="rate-limited") == refused + len(asked)
            assert not backend.exchanges
            assert (await client.send("s", "t"))["type"] == "accepted"  # what does not stay is served
            first.cut()

            async def is_let_in() -> bool:
                return (await client.events("s")).status == 200

            await eventually(is_let_in)


def open_loops() -> int:
    """All that something still holds."""
    gc.collect()
    return sum(isinstance(found, SocketLoop) for found in gc.get_objects())


async def test_a_handshake_that_is_refused_leaves_nothing_behind(make_node: MakeNode) -> None:
    """Each would tick for ever; where there is no room, clients come again and again (G10)."""
    refused = 20
    handshake = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    key = {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    async with ScriptedBackend(answers) as backend, HttpChat("unused") as http:
        full = await make_node(backend.url, max_connections=1)
        node = await make_node(backend.url)
        async with SessionClient(full.address):
            before = open_loops()
            for _ in range(refused):
                for path in ("/gateway/v1/ws", "/api/chat"):
                    no_room = await http.request(
                        "GET", f"http://{full.address}{path}", headers={**handshake, **key}
                    )
                    without_key = await http.request("GET", f"http://{node.address}{path}", headers=handshake)
                    for answer, status in ((no_room, 503), (without_key, 400)):
                        await answer.end()
                        assert answer.status == status
            await eventually(lambda: open_loops() < before + refused)


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """A shell whose soft limit is as low as most; gives the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        yield hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_process_without_descriptors_serves_on_and_takes_connections_again(
    tmp_path: Path, few_descriptors: int
) -> None:
    """Its listener must survive: a node that accepts no more for ever looks healthy and is not."""
    async with (
        ScriptedBackend(answers) as backend,
        GatewayProcess(upstream=backend.url, data_dir=tmp_path / "data") as gateway,
    ):
        await gateway.started()
        pid = gateway.process.pid
        async with SessionClient(gateway.address) as client:
            await client.attach("s")
            soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            assert soft == hard == few_descriptors  # it has raised its own
            opened = len(list((Path("/proc") / str(pid) / "fd").iterdir()))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (opened + 5, hard))
            host, _, port = gateway.address.rpartition(":")
            crowd = [await asyncio.open_connection(host, int(port)) for _ in range(40)]
            turned_away = [asyncio.create_task(reader.read(1)) for reader, _ in crowd]
            async with asyncio.timeout(WAIT_SECONDS):
                await asyncio.wait(turned_away, return_when=asyncio.FIRST_COMPLETED)
            assert (await client.ask(type="ping"))["type"] == "pong"
            for _, writer in crowd:
                writer.transport.abort()
            await asyncio.gather(*turned_away, return_exceptions=True)

            async def is_taken() -> bool:
                with contextlib.suppress(OSError):
                    return b"204" in await answered(gateway.address)
                return False

            await eventually(is_taken)
        assert "Traceback" not in gateway.text


async def test_a_limit_of_descriptors_that_is_too_low_is_said_at_the_start(tmp_path: Path) -> None:
    """Connections are promised that cannot be had; better to read it now than at noon."""
    async with ScriptedBackend(answers) as backend:
        settings = {"upstream": backend.url, "max_connections": 1_000_000}
        async with GatewayProcess(**settings, data_dir=tmp_path / "data") as gateway:
            warned = await gateway.said("descriptors.too-few")
            assert warned["wanted"] == 2_000_000 + app.OWN_DESCRIPTORS
            assert warned["connections"] == (warned["limit"] - app.OWN_DESCRIPTORS) // 2
            await gateway.started()


async def test_no_more_connections_are_let_in_than_there_are_descriptors_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., Any], valkey_url: str
) -> None:
    """Clients that took them all would leave none to reach the backend and the store with."""
    program = tmp_path / "few"
    program.write_text(f'#!/bin/sh\nulimit -n {app.OWN_DESCRIPTORS + 20}\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    async with ScriptedBackend(answers) as backend, contextlib.AsyncExitStack() as stack:
        settings = {"redis_url": valkey_url, "key_prefix": make_config(backend.url).key_prefix}
        gateway = await stack.enter_async_context(GatewayProcess(upstream=backend.url, **settings))
        await gateway.started()
        assert (await gateway.said("descriptors.too-few"))["connections"] == 10
        clients = [await stack.enter_async_context(SessionClient(gateway.address)) for _ in range(10)]
        async with FallbackClient(gateway.address) as one_more:
            assert (await one_more.events("s")).status == 503
        for number, client in enumerate(clients):
            await client.send(f"s{number}", f"t{number}")
        for number, client in enumerate(clients):
            assert (await client.ended(f"t{number}"))["reason"] == "complete"


@pytest.mark.parametrize(("limit", "connections"), [(2_100, 1_000), (2_099, 999), (50, 1), (-1, 1_000)])
async def test_what_a_limit_of_descriptors_is_enough_for(
    monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., Any], limit: int, connections: int
) -> None:
    """Two for each connection, and some for the node; one connection whatever the limit."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    with capture_logs() as logs:
        given = app._with_room(make_config("http://127.0.0.1:1", max_connections=1_000))
    assert given.max_connections == connections
    assert bool(logs) == (connections < 1_000)


async def test_a_client_that_catches_up_is_given_one_piece_at_a_time(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand slow clients must not each hold an encoded page of the journal."""
    held: list[int] = []
    write = SocketLoop._write_frames

    async def noted(loop: SocketLoop, frames: list[bytes]) -> None:
        held.append(sum(map(len, frames)))
        await write(loop, frames)

    monkeypatch.setattr(SocketLoop, "_write_frames", noted)

    async def long_answer(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.text(*["x" * 1000] * 2000)

    async with ScriptedBackend(long_answer) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client:
            await client.send("s", "t")
            await client.ended("t")
        held.clear()
        async with SessionClient(node.address) as late, SdkClient(node.address) as page:
            await late.attach("s")
            await page.resume("r", "s", lastSequence=0)
            await late.ended("t")
            await page.ended("r")
            assert late.offsets == list(range(1, client.records[-1]["offset"] + 1))
            assert len(page.text("r")) == 2_000_000
    assert sum(held) > 4_000_000
    assert max(held) < PIECE_BYTES + 4096
