"""Whoever leaves, the sender, the node or a Stop's own tab: what was begun is ended, and let go of."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest
import redis

from gateway.app import Node
from gateway.core.model import CloseCode
from gateway.store import load_script
from gateway.telemetry import registry
from tests.support.backend import Exchange, ScriptedBackend, answers, never_ends, until_released
from tests.support.client import WAIT_SECONDS, SessionClient, send_body
from tests.support.link import Link
from tests.support.wires import HttpChat, SdkClient, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from gateway.config import Config

    MakeConfig = Callable[..., Config]
    MakeNode = Callable[..., Awaitable[Node]]

MARKER = "a-question-like-no-other"


async def refuses(exchange: Exchange) -> None:
    await exchange.head("500 No", {"Content-Type": "text/plain"})
    await exchange.raw(b"no")
    await exchange.end()


@contextlib.asynccontextmanager
async def raw_post(address: str, path: str, body: bytes = b"") -> AsyncIterator[asyncio.StreamWriter]:
    """A client that posts, and reads nothing."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(WAIT_SECONDS):
        _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    try:
        yield writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def connections() -> int:
    """How many connections of clients this process's nodes serve."""
    coroutines = [task.get_coro() for task in asyncio.all_tasks()]
    return sum(getattr(each, "__qualname__", "") == "RequestHandler.start" for each in coroutines)


def states(valkey_url: str, node: Node) -> list[str]:
    """Of every turn that a node's test began, as the store has them."""
    with redis.Redis.from_url(valkey_url) as admin:
        found: list[Any] = [
            admin.hget(key, "state") for key in admin.keys(f"{node.config.key_prefix}:*turn:*")
        ]
    return [state.decode() for state in found]


def resumes() -> dict[str, float | None]:
    """The metric, for each carrier."""
    return {
        carrier: registry.get_sample_value("gateway_resumes_total", {"carrier": carrier})
        for carrier in ("http", "websocket", "sdk-websocket")
    }


@pytest.mark.usefixtures("_never_given_up")
async def test_a_sender_that_left_before_its_turn_began_keeps_no_refusal_waiting(
    make_config: MakeConfig, valkey_url: str, tmp_path: Path
) -> None:
    """Nobody will ever read the backend's answer, so the producer must not stay to hand it on."""
    async with (
        Link(valkey_url, tmp_path) as link,
        ScriptedBackend(refuses) as backend,
        Node(make_config(backend.url, redis_url=link.url)) as node,
    ):
        held = link.hold(MARKER.encode())
        body = json.dumps({"id": "s", **send_body(MARKER)}).encode()
        async with raw_post(node.address, "/api/chat", body) as writer:
            await held.reached()
            writer.transport.abort()
            await eventually(lambda: connections() == 0)
            held.release()
            await backend.exchange(0)
            await eventually(lambda: not node._turns._producers)


@pytest.mark.usefixtures("_never_given_up")
async def test_a_send_in_flight_when_the_node_stops_runs_to_its_end(
    make_config: MakeConfig, valkey_url: str, tmp_path: Path
) -> None:
    """Its turn is journalled already; a drain that looks at running turns only would strand it."""
    async with (
        Link(valkey_url, tmp_path) as link,
        ScriptedBackend(until_released) as backend,
        contextlib.AsyncExitStack() as stack,
    ):
        node = await stack.enter_async_context(
            Node(make_config(backend.url, redis_url=link.url, drain_seconds=60.0))
        )
        stack.callback(node.hurry)
        client = await stack.enter_async_context(SessionClient(node.address))
        held = link.hold(MARKER.encode())
        sending = asyncio.create_task(client.send("s", "t", MARKER))
        await held.reached()
        stopping = asyncio.create_task(node.stop())
        await eventually(lambda: node._sessions.draining)
        held.release()
        assert (await sending)["type"] == "accepted"
        exchange = await backend.exchange(0)
        assert (await client.ask(type="ping"))["type"] == "pong"  # and is served meanwhile
        exchange.release.set()
        async with asyncio.timeout(WAIT_SECONDS):
            await stopping
        assert states(valkey_url, node) == ["complete"]
        # What is due is written before the goodbye: who was about to be done need not come back for it.
        assert (await client.ended("t"))["reason"] == "complete"
        assert await client.closed() == CloseCode.GOING_AWAY


async def test_a_new_question_within_the_grace_does_not_take_a_stop_back(make_node: MakeNode) -> None:
    """Who stops an answer and asks again wants the first to stop; only a resume says that they do not."""
    async with ScriptedBackend(never_ends) as backend:
        node = await make_node(backend.url, abort_grace_seconds=0.5)
        async with SdkClient(node.address) as page:
            await page.send("r1", "s")
            await page.has("r1", 4)
            await page.abort("r1")
            await page.send("r2", "s", "another question")
            await page.has("r2", 4)
            await backend.exchanges[0].closed()
            assert not backend.exchanges[1].was_closed.is_set()


@pytest.mark.usefixtures("_never_given_up")
async def test_a_stop_whose_client_left_while_it_was_looked_up_is_carried_out(
    make_config: MakeConfig, valkey_url: str, tmp_path: Path
) -> None:
    """The tab closes behind the click; the model must stop all the same."""
    async with (
        Link(valkey_url, tmp_path) as link,
        ScriptedBackend(never_ends) as backend,
        Node(make_config(backend.url, redis_url=link.url)) as node,
        SessionClient(node.address) as client,
    ):
        await client.send("s", "t")
        await client.wait(lambda line: line["type"] == "chunk")
        held = link.hold(load_script("look").sha.encode())
        async with raw_post(node.address, "/api/chat/s/stop") as writer:
            await held.reached()
            writer.transport.abort()
            await eventually(lambda: connections() == 1)
            held.release()
            await backend.exchanges[0].closed()
        assert (await client.ended("t"))["reason"] == "cancelled"


async def test_a_stop_that_arrives_with_the_end_of_its_connection_is_carried_out(make_node: MakeNode) -> None:
    """As ``navigator.sendBeacon`` and a ``keepalive`` fetch of a page that closes do it."""
    async with ScriptedBackend(never_ends) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client:
            for number in range(20):
                await client.send(f"s{number}", f"t{number}")
                exchange = await backend.exchange(number)
                async with raw_post(node.address, f"/api/chat/s{number}/stop"):
                    pass
                await exchange.closed()


async def test_what_a_node_claimed_for_a_send_it_gives_back(make_node: MakeNode, valkey_url: str) -> None:
    """A claim for each refused or repeated send would grow for as long as the node lives."""
    async with ScriptedBackend(never_ends) as backend:
        node = await make_node(backend.url)
        with redis.Redis.from_url(valkey_url) as admin:

            def claims() -> set[str]:
                found: Any = admin.smembers(f"{node.config.key_prefix}:{{nodes}}:{node.id}")
                return {member.decode() for member in found}

            async with SessionClient(node.address) as client:
                await client.send("s", "t")
                for number in range(5):
                    refused = await client.send("s", f"u{number}", overlap="reject")
                    assert refused["code"] == "busy"
                assert (await client.send("s", "t"))["duplicate"]
                assert (await client.send("s", "t", "another"))["code"] == "conflict"
                await eventually(lambda: claims() == {"t s"})
                await client.cancel("s", "t")
                assert (await client.send("s", "t"))["duplicate"]
                await client.cancel("s", "early")
                await client.send("s", "early")
                assert (await client.ended("early"))["reason"] == "cancelled"
                await eventually(lambda: not claims())


async def test_a_send_is_no_resume_in_the_metrics(make_node: MakeNode) -> None:
    """An operator who sees resumes looks for a network that breaks."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        before = resumes()
        async with (
            HttpChat(node.address) as http,
            SessionClient(node.address) as client,
            SdkClient(node.address) as sdk,
        ):
            for number in range(2):
                answer = await http.post("h")
                await answer.end()
                await sdk.send(f"r{number}", "d")
                await sdk.ended(f"r{number}")
                await client.send("w", f"t{number}")
                await client.ended(f"t{number}")
                await client.ask(type="detach", session="w")
            assert resumes() == before
            await client.attach("w", client.records[-1]["cursor"])
            after = before["websocket"]
            assert after is not None
            assert resumes() == {**before, "websocket": after + 1}


async def test_the_bodies_of_running_turns_count_as_held(make_node: MakeNode) -> None:
    """A node that holds ten questions with images holds their bytes, whatever was answered so far."""
    async with ScriptedBackend(never_ends) as backend:
        node = await make_node(backend.url, max_buffer_bytes=100_000)
        async with SessionClient(node.address) as client:
            await client.send("s", "t", "x" * 200_000)
            await backend.exchange(0)
            held = [producer.assignment.call.body for producer in node._turns._producers.values()]
            assert sum(map(len, held)) > 200_000
            assert node._turns.budget.used >= sum(map(len, held))
            refused = await client.send("s", "u")
            assert (refused["code"], refused["retryable"]) == ("rate-limited", True)
            await client.cancel("s", "t")
            await eventually(lambda: node._turns.budget.used == 0)
            assert (await client.send("s", "u"))["type"] == "accepted"
