"""Who may reach it, and what operators see of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiohttp
import pytest

from gateway import kept
from tests.support.backend import Exchange, ScriptedBackend, until_released
from tests.support.client import SessionClient
from tests.support.wires import HttpChat, SdkClient, eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.app import Node

    MakeNode = Callable[..., Awaitable[Node]]

FOREIGN = {"Origin": "https://evil.example"}


async def answers(exchange: Exchange) -> None:
    await exchange.head()
    await exchange.text("one", "two")


async def test_a_foreign_page_reaches_nothing_of_ours(make_node: MakeNode) -> None:
    """Any page on the web can open a socket to a laptop's loopback, with its cookies."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http:
            for path in ("/gateway/v1/ws", "/api/chat"):
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    await http.http.ws_connect(http.base + path, headers=FOREIGN)
                assert refused.value.status == 403
            assert (await http.post("s", headers=FOREIGN)).status == 403
            for method, path in (("GET", "stream"), ("POST", "stop")):
                answer = await http.request(method, f"{http.url}/s/{path}", headers=FOREIGN)
                assert answer.status == 403
                assert "Access-Control-Allow-Origin" not in answer.headers
            same = await http.post("s", headers={"Origin": http.base})
            await same.end()
            assert same.text == "onetwo"
            for host in ("evil.example", "evil.example:80"):
                assert (await http.post("s", headers={"Host": host})).status == 421
                assert (await http.request("GET", http.base + "/page", headers={"Host": host})).status == 421
        assert len(backend.exchanges) == 1


async def test_a_named_origin_may_use_all_of_it(make_node: MakeNode) -> None:
    """An app on another origin than its gateway: preflights, answers, streams and sockets."""
    app = {"Origin": "https://app.example"}
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url, origins=("https://app.example",))
        async with HttpChat(node.address) as http:
            preflight = await http.request(
                "OPTIONS",
                http.url,
                headers={
                    **app,
                    "Access-Control-Request-Method": "POST",
                    "Access-Control-Request-Headers": "content-type, idempotency-key",
                },
            )
            assert preflight.status == 204
            assert preflight.headers["Access-Control-Allow-Origin"] == "https://app.example"
            assert preflight.headers["Access-Control-Allow-Credentials"] == "true"
            assert "idempotency-key" in preflight.headers["Access-Control-Allow-Headers"]
            answer = await http.post("s", headers=app)
            await answer.end()
            nothing = await http.request("GET", f"{http.url}/s/stream", headers=app)
            assert nothing.status == 204
            for told in (answer, nothing):
                assert told.headers["Access-Control-Allow-Origin"] == "https://app.example"
                assert "Origin" in told.headers["Vary"]
            assert "Session-Gateway-Turn" in answer.headers["Access-Control-Expose-Headers"]
            for path in ("/gateway/v1/ws", "/api/chat"):
                socket = await http.http.ws_connect(http.base + path, headers=app)
                await socket.close()
            assert (await http.post("s", headers=FOREIGN)).status == 403
        assert len(backend.exchanges) == 1


async def test_health_and_readiness_are_told_apart(make_node: MakeNode) -> None:
    """Alive is not the same as able: an orchestrator restarts on one and routes by the other."""
    node = await make_node("http://127.0.0.1:1")
    async with HttpChat(node.admin_address) as admin:
        assert (await admin.request("GET", admin.base + "/healthz")).status == 200
        ready = await admin.request("GET", admin.base + "/readyz")
        assert (ready.status, await ready.end()) == (200, b"ready\n")
        node._sessions.drain()
        assert (await admin.request("GET", admin.base + "/readyz")).status == 503
        assert (await admin.request("GET", admin.base + "/healthz")).status == 200
        assert (await admin.request("GET", admin.base + "/api/chat")).status == 404
    async with HttpChat(node.address) as http:
        answer = await http.request("GET", http.base + "/metrics")
        assert answer.status == 502  # the backend's path, not ours


async def metrics_of(node: Node) -> dict[str, float]:
    async with HttpChat(node.admin_address) as admin:
        answer = await admin.request("GET", admin.base + "/metrics")
        lines = (await answer.end()).decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


async def test_each_metric_moves(make_node: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dashboard that shows nothing when something happens is worse than none."""
    async with ScriptedBackend(until_released) as backend:
        monkeypatch.setattr(kept, "HOLD_SECONDS", 0.0)
        node = await make_node(backend.url)
        before = await metrics_of(node)
        async with (
            SessionClient(node.address) as client,
            HttpChat(node.address) as http,
            SdkClient(node.address) as sdk,
        ):
            await client.send("a", "t1")
            await client.wait(lambda line: line["type"] == "chunk", count=4)
            await client.attach("a", client.records[1]["cursor"])
            posted = await http.post("b")
            await posted.has(4)
            await sdk.send("r1", "c")
            await sdk.has("r1", 4)
            during = await metrics_of(node)
            await client.attach("a", "0" * 32 + ".7.")
            await client.send("a", "t1")
            await client.send("a", "t1", "another")
            await client.cancel("a", "t1")
            await http.request("POST", f"{http.url}/b/stop", headers=FOREIGN)
            for number in (1, 2):
                (await backend.exchange(number)).release.set()
            await posted.end()
            await sdk.ended("r1")
        await eventually(lambda: not list(node._turns._kept))
        after = await metrics_of(node)

    def rose(name: str, by: float, *, to: dict[str, float] = after) -> None:
        assert to[name] - before.get(name, 0) == by, name

    rose("gateway_running_turns", 3, to=during)
    for carrier in ("websocket", "http", "sdk-websocket"):
        rose(f'gateway_attached_subscribers{{carrier="{carrier}"}}', 1, to=during)
    assert during["gateway_buffered_bytes"] > before["gateway_buffered_bytes"]
    rose("gateway_running_turns", 0)
    rose("gateway_buffered_bytes", 0)
    rose('gateway_turns_ended_total{reason="cancelled"}', 1)
    rose('gateway_turns_ended_total{reason="complete"}', 2)
    rose("gateway_first_chunk_seconds_count", 3)
    assert after["gateway_append_seconds_count"] > before["gateway_append_seconds_count"]
    rose("gateway_cancel_close_seconds_count", 1)
    rose('gateway_cancels_total{result="cancelled"}', 1)
    rose('gateway_sends_total{result="accepted"}', 3)
    rose('gateway_sends_total{result="duplicate"}', 1)
    rose('gateway_sends_total{result="conflict"}', 1)
    assert (
        after['gateway_resumes_total{carrier="websocket"}']
        > before['gateway_resumes_total{carrier="websocket"}']
    )
    rose('gateway_resyncs_total{reason="epoch-changed"}', 1)
    rose("gateway_refused_origins_total", 1)
