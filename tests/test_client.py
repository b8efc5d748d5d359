"""gateway.client: what a service relies on, against a real gateway over a network that fails."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
from typing import TYPE_CHECKING, Any, Self

import pytest
import redis.asyncio as redis
from aiohttp import WSMsgType, web

from gateway.app import Node
from gateway.client import (
    ClosedError,
    DetachedError,
    GatewayClient,
    GatewayClientError,
    GaveUpError,
    ProtocolError,
    Record,
    Records,
    RefusedError,
    ResyncError,
    Timing,
    Turn,
    TurnEndedError,
)
from gateway.store import lane
from tests.support.backend import SSE_HEADERS, Exchange, ScriptedBackend, answers, never_ends, until_released
from tests.support.client import WAIT_SECONDS, SessionClient, send_body
from tests.support.link import Link
from tests.support.network import Network
from tests.support.wires import eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from pathlib import Path

    from gateway.config import Config
    from tests.support.network import Kind

    MakeNode = Callable[..., Awaitable[Node]]
    MakeConfig = Callable[..., Config]
    Script = Callable[["Peer"], Awaitable[None]]

QUICK = Timing(
    open_seconds=60.0,  # nothing here is waited for that long: silence is noticed by the heartbeat
    close_seconds=0.5,
    backoff_base_seconds=0.02,
    backoff_max_seconds=0.1,
    give_up_seconds=30.0,
)
IMPATIENT = Timing(
    backoff_base_seconds=0.02, backoff_max_seconds=0.05, close_seconds=0.5, give_up_seconds=0.3
)

MARKER = "a-question-like-no-other"
CHUNKS = 600
FILLER = "x" * 100

WHOLE = list(range(1, 11))
"""The offsets of a turn with two deltas."""


async def long_answer(exchange: Exchange) -> None:
    """Some hundred chunks, a few a write."""
    await exchange.head()
    await exchange.text(finish=False)
    for number in range(0, CHUNKS, 5):
        deltas = [f"{number + more} {FILLER}" for more in range(5)]
        await exchange.say(*({"type": "text-delta", "id": "t1", "delta": delta} for delta in deltas))
        await asyncio.sleep(0.001)
    await exchange.text(start=False)


def client_of(address: str, **options: Any) -> GatewayClient:
    return GatewayClient(f"http://{address}", **{"timing": QUICK, **options})


def text_of(records: list[Record]) -> str:
    deltas = [record.data for record in records if record.kind == "chunk"]
    return "".join(data["delta"] for data in deltas if data["type"] == "text-delta")


async def take(records: Records, count: int) -> list[Record]:
    async with asyncio.timeout(WAIT_SECONDS):
        return [await anext(records) for _ in range(count)]


async def until_end(records: Records) -> list[Record]:
    """All records, with and up to the next turn's end."""
    taken = await take(records, 1)
    while taken[-1].kind != "turn-end":
        taken += await take(records, 1)
    return taken


async def chunks_of(gateway: GatewayClient, turn: Turn) -> list[Record]:
    async with asyncio.timeout(WAIT_SECONDS):
        return [chunk async for chunk in gateway.answer(turn)]


# -- a gateway that says what no gateway of ours would


class Peer:
    """One socket of a scripted gateway.

    Attributes:
        told: The commands that came, in order.
        number: Which of the gateway's sockets this is, from 0.
    """

    def __init__(self, socket: web.WebSocketResponse, number: int) -> None:
        self.socket = socket
        self.number = number
        self.told: list[dict[str, Any]] = []

    async def hello(self, **members: Any) -> None:
        await self.say(
            {"type": "hello", "protocol": 1, "node": "n", "client": "c", "heartbeat": 25, **members}
        )

    async def say(self, *lines: dict[str, Any]) -> None:
        await self.socket.send_str("\n".join(json.dumps(line) for line in lines))

    async def hear_any(self) -> dict[str, Any]:
        """The next command."""
        command: dict[str, Any] = await self.socket.receive_json(timeout=WAIT_SECONDS)
        self.told.append(command)
        return command

    async def hear(self, kind: str) -> dict[str, Any]:
        """The next command, which is to be of this type."""
        command = await self.hear_any()
        assert command["type"] == kind
        return command

    async def attached(self, offset: int = 0, last: int = 0) -> None:
        """Answer an attach."""
        command = await self.hear("attach")
        place = {"cursor": f"e.{offset}.", "offset": offset, "last": last, "turns": []}
        await self.say({"type": "attached", "id": command["id"], "session": command["session"], **place})

    async def closed(self) -> None:
        """Until the client closes; what it says until then is noted."""
        while (message := await self.socket.receive(timeout=WAIT_SECONDS)).type is WSMsgType.TEXT:
            self.told.append(message.json())


def a_record(offset: int, kind: str = "chunk", **members: Any) -> dict[str, Any]:
    place = {"session": "s", "offset": offset, "cursor": f"e.{offset}.", "turn": "t"}
    return {"type": kind, **place, **({"data": {"type": "start"}} if kind == "chunk" else {}), **members}


class ScriptedGateway:
    """Serves every socket by a script.

    Attributes:
        peers: Its sockets, in the order they came.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.peers: list[Peer] = []

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/gateway/v1/ws", self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.address = f"127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(protocols=("session-gateway.v1",))
        await socket.prepare(request)
        assert socket.ws_protocol == "session-gateway.v1"
        self.peers.append(Peer(socket, len(self.peers)))
        await self.script(self.peers[-1])
        return socket


# -- the verbs


async def test_a_turn_is_sent_and_its_answer_read(make_node: MakeNode) -> None:
    """What most services want is three lines."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with client_of(node.address, client="reporter") as gateway:
            turn = await gateway.send("s", send_body("hello"))
            chunks = await chunks_of(gateway, turn)
            assert text_of(chunks) == "onetwo"
            assert {(chunk.session, chunk.turn, chunk.kind) for chunk in chunks} == {("s", turn.id, "chunk")}
            assert chunks[-1].data == {"type": "finish"}
            assert (turn.session, turn.duplicate) == ("s", False)
        assert backend.exchanges[0].json == {"id": "s", **send_body("hello")}


async def test_the_members_of_each_kind_of_record(make_node: MakeNode) -> None:
    """Backends that are none of the AI SDK's name their events and write what is no JSON."""

    async def named_event(exchange: Exchange) -> None:
        await exchange.head(headers=SSE_HEADERS)
        await exchange.raw(b"event: note\ndata: hello\n\n")
        await exchange.end()

    async with ScriptedBackend(named_event) as backend:
        node = await make_node(backend.url)
        async with client_of(node.address, client="reporter") as gateway:
            turn = await gateway.send("s", send_body("hello"))
            async with gateway.attach("s") as records:
                start, chunk, end = await until_end(records)
            assert (start.kind, start.offset, start.turn, start.session) == ("turn-start", 1, turn.id, "s")
            assert (start.messages, start.by) == (send_body("hello")["messages"], {"client": "reporter"})
            assert start.members["trigger"] == "submit-message"
            assert (chunk.kind, chunk.text, chunk.event, chunk.data) == ("chunk", "hello", "note", None)
            assert (end.kind, end.reason, end.error, end.by) == ("turn-end", "complete", None, None)
            assert records.cursor == end.cursor


async def test_a_send_repeated_with_its_turn_is_carried_out_once(make_node: MakeNode) -> None:
    """A service that died between sending and noting so repeats itself."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with client_of(node.address) as first:
            turn = await first.send("s", send_body("hello"), turn="t1")
        async with client_of(node.address) as second:
            again = await second.send("s", send_body("hello"), turn="t1")
            assert again == Turn("s", "t1", turn.cursor, duplicate=True)
            assert text_of(await chunks_of(second, again)) == "onetwo"
            with pytest.raises(RefusedError) as refused:
                await second.send("s", send_body("something else"), turn="t1")
        assert (refused.value.code, refused.value.retryable) == ("conflict", False)
        assert str(refused.value).startswith("unable to ")
        assert len(backend.exchanges) == 1


async def test_a_turn_that_is_known_by_its_id_alone_is_found(make_node: MakeNode) -> None:
    """Another process sent it."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with client_of(node.address) as gateway:
            for name in ("t1", "t2"):
                await gateway.send("s", send_body(name), turn=name)
            chunks = await chunks_of(gateway, Turn("s", "t2"))
            assert text_of(chunks) == "onetwo"
            assert {chunk.turn for chunk in chunks} == {"t2"}


async def test_what_a_send_may_say_beside_its_body(make_node: MakeNode) -> None:
    """Path, overlap and headers reach where they belong."""
    async with ScriptedBackend(never_ends) as backend:
        node = await make_node(
            backend.url, chat_paths="/api/chat,/api/other", forward_headers="x-tenant,x-handshake"
        )
        async with client_of(node.address, headers={"X-Handshake": "from-handshake"}) as gateway:
            first = await gateway.send("s", send_body("a"), path="/api/other", headers={"X-Tenant": "acme"})
            exchange = await backend.exchange()
            assert (exchange.target, exchange.headers["x-tenant"]) == ("/api/other", "acme")
            assert exchange.headers["x-handshake"] == "from-handshake"
            with pytest.raises(RefusedError) as refused:
                await gateway.send("s", send_body("b"), overlap="reject")
            assert (refused.value.code, refused.value.retryable) == ("busy", True)
            await gateway.send("s", send_body("c"), overlap="interrupt")
            with pytest.raises(TurnEndedError) as ended:
                await chunks_of(gateway, first)
            assert ended.value.reason == "cancelled"


async def test_a_cancel_tells_what_it_did_and_the_answer_that_it_was_cut_short(make_node: MakeNode) -> None:
    """A service must not take half an answer for one."""
    async with ScriptedBackend(never_ends) as backend:
        node = await make_node(backend.url)
        async with client_of(node.address, client="stopper") as gateway:
            turn = await gateway.send("s", send_body("hello"))
            other = await gateway.send("s", send_body("hello"))
            assert await gateway.cancel("s", turn.id) == {turn.id: "cancelled"}
            assert await gateway.cancel("s", turn.id) == {turn.id: "already-ended"}
            assert await gateway.cancel("s") == {other.id: "cancelled"}
            assert await gateway.cancel("s", "t9") == {"t9": "unknown"}
            with pytest.raises(TurnEndedError) as ended:
                await chunks_of(gateway, turn)
        assert (ended.value.turn, ended.value.reason) == (turn.id, "cancelled")
        assert (ended.value.by, ended.value.error) == ({"client": "stopper"}, None)


async def test_a_turn_that_failed_says_why(make_node: MakeNode) -> None:
    """The backend's refusal is what an operator wants to read."""

    async def refuses(exchange: Exchange) -> None:
        await exchange.head("429 Too Many Requests", {"Content-Type": "text/plain", "Retry-After": "7"})
        await exchange.raw(b"not so fast")
        await exchange.end()

    async with ScriptedBackend(refuses) as backend:
        node = await make_node(backend.url)
        async with client_of(node.address) as gateway:
            with pytest.raises(TurnEndedError, match=r"upstream-refused: not so fast") as ended:
                await chunks_of(gateway, await gateway.send("s", send_body("hello")))
        assert ended.value.reason == "error"
        assert ended.value.error is not None
        assert (ended.value.error["status"], ended.value.error["retryAfter"]) == (429, 7)


async def test_an_attach_begins_where_it_is_told_to(make_node: MakeNode) -> None:
    """After a cursor, with the first record, or with what runs."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with client_of(node.address) as gateway:
            old = await gateway.send("s", send_body("hello"))
            (await backend.exchange(0)).release.set()
            async with gateway.attach("s") as records:
                history = await until_end(records)
            assert [record.offset for record in history] == WHOLE
            running = await gateway.send("s", send_body("again"))
            async with gateway.attach("s", start="running") as records:
                assert records.turns == [
                    {"turn": running.id, "state": "running", "offset": 11},
                    {"turn": old.id, "state": "complete", "offset": 1},
                ]
                assert (await anext(records)).offset == 11
            async with gateway.attach("s", after=history[6].cursor) as records:
                assert records.last >= 11
                assert await take(records, 3) == history[7:]
            (await backend.exchange(1)).release.set()


# -- a network that fails


async def test_a_reader_that_is_cut_again_and_again_gets_each_record_once(make_node: MakeNode) -> None:
    """The promise of the whole thing."""
    async with ScriptedBackend(long_answer) as backend:
        node = await make_node(backend.url)
        async with (
            Network(node.address) as network,
            client_of(network.address, max_waiting_bytes=2000) as gateway,
        ):
            turn = await gateway.send("s", send_body("hello"))
            records: list[Record] = []
            async with gateway.attach("s", after=turn.cursor) as reader:
                async for record in reader:
                    records.append(record)
                    if record.kind == "turn-end":
                        break
                    if len(records) % 29 == 0:
                        network.cut()
            assert network.cuts > 10
            assert [record.offset for record in records] == list(range(1, CHUNKS + 9))
            assert text_of(records) == "".join(f"{number} {FILLER}" for number in range(CHUNKS))


async def test_the_weather_loses_and_doubles_nothing(make_node: MakeNode) -> None:
    """Resets, torn frames, frost and delay, under several sessions at once."""
    async with ScriptedBackend(long_answer) as backend:
        node = await make_node(backend.url, heartbeat_seconds=0.2)
        async with Network(node.address) as network, client_of(network.address) as gateway:
            kinds: tuple[Kind, ...] = ("reset", "close", "tear", "freeze", "sleep", "delay", "refuse")
            network.weather(7, kinds=kinds, pauses=(0.02, 0.1), lengths=(0.02, 0.3))

            async def ask(session: str) -> list[str]:
                answers = []
                while len(network.faults) < 15:
                    turn = await gateway.send(session, send_body("hello"))
                    answers.append(text_of(await chunks_of(gateway, turn)))
                return answers

            answers = await asyncio.gather(*(ask(f"s{number}") for number in range(4)))
            await network.calm()
        texts = [text for each in answers for text in each]
        assert set(texts) == {"".join(f"{number} {FILLER}" for number in range(CHUNKS))}
        assert len(backend.exchanges) == len(texts)


async def test_a_send_whose_reply_was_lost_is_sent_again_and_carried_out_once(
    make_config: MakeConfig, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows whether it was accepted: the turn's id makes that not matter."""
    monkeypatch.setattr(lane, "OPERATION_TIMEOUT_SECONDS", 60.0)
    async with (
        Link(valkey_url, tmp_path) as link,
        ScriptedBackend(answers) as backend,
        Node(make_config(backend.url, redis_url=link.url)) as node,
        Network(node.address) as network,
        client_of(network.address) as gateway,
    ):
        held = link.hold(MARKER.encode())
        sending = asyncio.create_task(gateway.send("s", send_body(MARKER)))
        await held.reached()
        network.cut()
        held.release()
        turn = await sending
        assert turn.duplicate
        assert text_of(await chunks_of(gateway, turn)) == "onetwo"
        assert len(backend.exchanges) == 1


async def test_a_cancel_that_was_not_answered_is_asked_again(make_node: MakeNode) -> None:
    """A person who clicked Stop does not know about connections."""
    async with ScriptedBackend(never_ends) as backend:
        node = await make_node(backend.url)
        async with Network(node.address) as network, client_of(network.address) as gateway:
            turn = await gateway.send("s", send_body("hello"))
            network.freeze()
            cancelling = asyncio.create_task(gateway.cancel("s", turn.id))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(cancelling), 0.05)
            network.cut()
            network.thaw()
            assert await cancelling == {turn.id: "cancelled"}
            assert network.accepted == 2


async def test_a_silent_connection_is_given_up_for_a_new_one(
    make_node: MakeNode, caplog: pytest.LogCaptureFixture
) -> None:
    """A frozen socket looks alive for hours: two heartbeats without a word are the only sign."""
    caplog.set_level("INFO")
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url, heartbeat_seconds=0.1)
        async with Network(node.address) as network, client_of(network.address) as gateway:
            turn = await gateway.send("s", send_body("hello"))
            async with gateway.attach("s", after=turn.cursor) as records:
                had = await take(records, 5)
                before = network.accepted
                network.freeze(newcomers=False)
                (await backend.exchange()).release.set()
                had += await until_end(records)
                assert [record.offset for record in had] == WHOLE
                assert network.accepted > before
                assert "nothing was heard for 0.2 s" in caplog.text


async def test_a_quiet_session_keeps_its_connection(make_node: MakeNode) -> None:
    """Heartbeats are a sign of life, though no reader sees them."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url, heartbeat_seconds=0.3)
        async with Network(node.address) as network, client_of(network.address) as gateway:
            turn = await gateway.send("s", send_body("hello"))
            async with gateway.attach("s", after=turn.cursor) as records:
                await take(records, 5)
                had = network.bytes_down
                await network.until(lambda: network.bytes_down > had + 4 * len('{"type":"heartbeat"}'))
                (await backend.exchange()).release.set()
                assert (await until_end(records))[-1].reason == "complete"
            assert network.accepted == 1


async def test_a_reader_that_has_had_nothing_yet_keeps_its_place_as_well() -> None:
    """What ran, and ended, while it was away is not what runs when it is back."""

    async def script(peer: Peer) -> None:
        await peer.hello()
        await peer.attached(offset=4)
        if peer.number == 0:
            await peer.socket.close(code=4000)
        await peer.say(a_record(5))
        await peer.closed()

    async with (
        ScriptedGateway(script) as peer_gateway,
        client_of(peer_gateway.address) as gateway,
        gateway.attach("s", start="running") as records,
    ):
        assert (await take(records, 1))[0].offset == 5
        first, second = (peer.told[0] for peer in peer_gateway.peers)
        assert first == {"type": "attach", "session": "s", "from": "running", "id": 1}
        assert second == {"type": "attach", "session": "s", "after": "e.4.", "id": 2}


async def test_a_restart_of_the_node_is_survived(make_config: MakeConfig, make_node: MakeNode) -> None:
    """The reader is told how the turn ended, and reads on at the next node."""
    async with (
        ScriptedBackend(until_released) as backend,
        Node(make_config(backend.url)) as first,
        Network(first.address) as network,
        client_of(network.address) as gateway,
    ):
        turn = await gateway.send("s", send_body("hello"))
        async with gateway.attach("s", after=turn.cursor) as records:
            had = await take(records, 5)
            await first.stop()
            network.target = (await make_node(backend.url)).address
            had += await until_end(records)
            assert (had[-1].reason, (had[-1].error or {})["code"]) == ("interrupted", "node-lost")
            await gateway.send("s", send_body("again"), turn="t2")
            (await backend.exchange(1)).release.set()
            had += await until_end(records)
            assert [record.offset for record in had] == list(range(1, len(had) + 1))
            assert (had[-1].turn, had[-1].reason) == ("t2", "complete")


async def test_what_is_not_answered_for_too_long_is_given_up() -> None:
    """The caller hears why, and how to repeat it; trying again later is up to it, and works."""

    async def answers_nothing(peer: Peer) -> None:
        await peer.hello()
        await peer.closed()

    async with Network("127.0.0.1:1") as network, client_of(network.address, timing=IMPATIENT) as gateway:
        network.refuse()
        with pytest.raises(GaveUpError, match=r"unable to send within 0\.3 s") as gave_up:
            await gateway.send("s", send_body("hello"), turn="t1")
        assert isinstance(gave_up.value.__cause__, OSError)
        assert gave_up.value.__notes__ == ["repeat it with turn='t1'"]
        with pytest.raises(GaveUpError, match="unable to cancel"):
            await gateway.cancel("s")
        async with ScriptedGateway(answers_nothing) as silent:
            network.target = silent.address
            network.accept()
            with pytest.raises(GaveUpError, match="unable to attach"):
                async with gateway.attach("s"):
                    pass
            assert len(silent.peers) > 0


async def test_only_what_follows_a_hello_is_a_new_beginning() -> None:
    """A node may say hello and die, again and again: the delays must grow all the same."""
    attempts: list[int] = []

    class Noted(Timing):
        def backoff(self, attempt: int) -> float:
            attempts.append(attempt)
            return 0.0

    async def script(peer: Peer) -> None:
        await peer.hello()
        if peer.number in {2, 3}:
            await peer.attached(offset=2)
        if peer.number < 3:
            await peer.socket.close(code=4000)
        await peer.say(a_record(3))
        await peer.closed()

    async with (
        ScriptedGateway(script) as peer_gateway,
        client_of(peer_gateway.address, timing=Noted()) as gateway,
        gateway.attach("s") as records,
    ):
        assert (await take(records, 1))[0].offset == 3
        assert attempts == [0, 1, 0]


async def test_nobody_waits_and_nobody_connects(make_node: MakeNode) -> None:
    """A service that is idle while the gateway is away does not knock at its door all day."""
    node = await make_node("http://127.0.0.1:1")
    async with Network(node.address) as network, client_of(network.address) as gateway:
        assert network.accepted == 0
        assert await gateway.cancel("s") == {}
        network.cut()
        running = gateway._dialogue.connection._running
        assert running is not None
        await asyncio.wait({running}, timeout=WAIT_SECONDS)
        assert network.accepted == 1
        assert await gateway.cancel("s") == {}
        assert network.accepted == 2


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
async def test_a_handshake_refused_for_now_is_tried_again(status: int) -> None:
    """A load balancer says 503 while the gateway is deployed."""
    asked = []

    async def serve(request: web.Request) -> web.StreamResponse:
        asked.append(request.query["client"])
        if len(asked) == 1:
            return web.Response(status=status)
        socket = web.WebSocketResponse(protocols=("session-gateway.v1",))
        await socket.prepare(request)
        peer = Peer(socket, 1)
        await peer.hello()
        await peer.say({"type": "cancelled", "id": (await peer.hear("cancel"))["id"], "turns": []})
        await peer.closed()
        return socket

    runner = web.AppRunner(app := web.Application(), shutdown_timeout=0.1)
    app.router.add_get("/prefix/gateway/v1/ws", serve)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with client_of(f"127.0.0.1:{runner.addresses[0][1]}/prefix", client="me") as gateway:
            assert await gateway.cancel("s") == {}
        assert asked == ["me", "me"]
    finally:
        await runner.cleanup()


# -- several sessions, and readers that are slow


async def test_many_sessions_share_one_connection(make_node: MakeNode) -> None:
    """A thousand chats are not a thousand sockets."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with Network(node.address) as network, client_of(network.address) as gateway:

            async def ask(session: str) -> tuple[str, str]:
                turn = await gateway.send(session, send_body(session))
                return session, text_of(await chunks_of(gateway, turn))

            sessions = [f"s{number}" for number in range(100)]
            assert await asyncio.gather(*map(ask, sessions)) == [(name, "onetwo") for name in sessions]
            assert network.accepted == 1


async def test_a_slow_reader_holds_up_nobody_and_fills_nothing(make_node: MakeNode) -> None:
    """It is detached at its bound, and gets the rest when it has taken what there was."""
    bound = 20_000
    async with ScriptedBackend(long_answer) as backend:
        node = await make_node(backend.url)
        async with client_of(node.address, max_waiting_bytes=bound) as gateway:
            slow = await gateway.send("slow", send_body("hello"))
            async with gateway.attach("slow", after=slow.cursor) as records:
                await eventually(lambda: records._bytes > bound)
                quick = await gateway.send("quick", send_body("hello"))
                assert len(await chunks_of(gateway, quick)) == CHUNKS + 6
                assert records._bytes < bound + 500
                had = await until_end(records)
                assert [record.offset for record in had] == list(range(1, CHUNKS + 9))
                assert records._bytes == 0


async def test_a_slow_reader_is_detached_at_the_gateway() -> None:
    """What it will not take need not be written to it."""

    async def script(peer: Peer) -> None:
        await peer.hello()
        await peer.attached()
        await peer.say(*(a_record(offset) for offset in range(1, 9)))
        detach = await peer.hear("detach")
        await peer.say(a_record(9), {"type": "ok", "id": detach["id"]})
        again = await peer.hear("attach")
        late = {"type": "attached", "id": again["id"], "session": "s", "cursor": again["after"]}
        # Written before the new place was taken: not of it.
        await peer.say(a_record(9), {**late, "offset": 6, "last": 9, "turns": []}, a_record(7), a_record(8))
        await peer.closed()

    bound = 5 * len(json.dumps(a_record(1)))
    async with (
        ScriptedGateway(script) as peer_gateway,
        client_of(peer_gateway.address, max_waiting_bytes=bound) as gateway,
        gateway.attach("s") as records,
    ):
        assert [record.offset for record in await take(records, 8)] == list(range(1, 9))
        assert peer_gateway.peers[0].told[2]["after"] == "e.6."
        assert records.last == 9


async def test_who_reads_nothing_of_a_session_is_not_attached_by_a_send() -> None:
    """A service that only sends would get every answer for nothing; not so one that reads."""

    async def script(peer: Peer) -> None:
        await peer.hello()
        for reads in (False, True):
            if reads:
                await peer.attached()
            send = await peer.hear("send")
            if not reads:
                await peer.hear("detach")
            accepted = {"type": "accepted", "id": send["id"], "session": "s", "turn": send["turn"]}
            await peer.say({**accepted, "cursor": "e.0."})
        await peer.hear("cancel")
        await peer.closed()

    async with ScriptedGateway(script) as peer_gateway, client_of(peer_gateway.address) as gateway:
        await gateway.send("s", {})
        async with gateway.attach("s"):
            await gateway.send("s", {})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(gateway.cancel("s"), 0.05)  # was heard next: nothing else came
            await eventually(lambda: len(peer_gateway.peers[0].told) == 5)


async def test_an_answer_attaches_for_as_long_as_its_turn() -> None:
    """Neither the history before it nor what others do afterwards is read."""

    async def script(peer: Peer) -> None:
        await peer.hello()
        await peer.attached(offset=7)
        await peer.say(a_record(8), a_record(9, "turn-end", reason="complete"))
        await peer.closed()

    async with ScriptedGateway(script) as peer_gateway, client_of(peer_gateway.address) as gateway:
        assert len(await chunks_of(gateway, Turn("s", "t", "e.7."))) == 1
        told = peer_gateway.peers[0].told
        await eventually(lambda: len(told) == 2)
        assert told == [
            {"type": "attach", "session": "s", "after": "e.7.", "id": 1},
            {"type": "detach", "session": "s", "id": 2},
        ]


async def test_a_session_has_one_reader_of_a_client(make_node: MakeNode) -> None:
    """The place on a socket is one: the older reader is told, and the newer is not disturbed by its end."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with client_of(node.address) as gateway, contextlib.AsyncExitStack() as newest:
            turn = await gateway.send("s", send_body("hello"))
            async with gateway.attach("s", after=turn.cursor) as older:
                newer = await newest.enter_async_context(gateway.attach("s", after=turn.cursor))
                assert len(await take(newer, 5)) == 5
                with pytest.raises(DetachedError, match="attached to it once more"):
                    await until_end(older)
            (await backend.exchange()).release.set()
            assert (await until_end(newer))[-1].reason == "complete"


async def test_a_reader_that_was_followed_by_another_does_not_attach_again() -> None:
    """It would move the place of the one that followed."""
    refused = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.hello()
        command = await peer.hear("attach")
        refusal = {"code": "store-unavailable", "message": "unable to attach", "retryable": True}
        await peer.say({"type": "error", "id": command["id"], **refusal, "retryAfter": 0.05})
        refused.set()
        await peer.attached()
        await peer.hear("cancel")
        await peer.say(a_record(1))
        await peer.closed()

    async def attach(gateway: GatewayClient) -> None:
        async with gateway.attach("s"):
            pass

    async with ScriptedGateway(script) as peer_gateway, client_of(peer_gateway.address) as gateway:
        older = asyncio.create_task(attach(gateway))
        await refused.wait()
        async with gateway.attach("s") as records:
            with pytest.raises(DetachedError):
                await older
            cancelling = asyncio.create_task(gateway.cancel("s"))
            assert (await take(records, 1))[0].offset == 1
            cancelling.cancel()


async def test_an_answer_that_is_left_early_does_not_stand_in_the_way_of_the_next(
    make_node: MakeNode,
) -> None:
    """Nobody closes a generator by hand."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with client_of(node.address) as gateway:
            turn = await gateway.send("s", send_body("hello"))
            async for chunk in gateway.answer(turn):
                if chunk.data["type"] == "text-delta":
                    break
            (await backend.exchange()).release.set()
            assert text_of(await chunks_of(gateway, turn)) == "onetwo"


# -- what cannot go on


async def test_a_journal_that_is_gone_is_told(make_node: MakeNode, valkey_url: str) -> None:
    """A reader that holds a copy must drop it: half of one history and half of another is neither."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with Network(node.address) as network, client_of(network.address) as gateway:
            turn = await gateway.send("s", send_body("hello"))
            async with gateway.attach("s", after=turn.cursor) as records:
                had = await take(records, 5)
                async with redis.Redis.from_url(valkey_url) as admin:
                    async for key in admin.scan_iter(f"{node.config.key_prefix}:*"):
                        await admin.delete(key)
                network.cut()
                with pytest.raises(ResyncError) as gone:
                    await until_end(records)
            assert (gone.value.session, gone.value.reason) == ("s", "epoch-changed")
            with pytest.raises(ResyncError):
                async with gateway.attach("s", after=had[2].cursor):
                    pass
            async with gateway.attach("s") as records:
                await gateway.send("s", send_body("again"), turn="t2")
                (await backend.exchange(1)).release.set()
                again = await until_end(records)
                assert (again[0].offset, again[-1].turn) == (1, "t2")


async def test_a_resync_that_nobody_asked_for_is_told() -> None:
    """A reader that fell too far behind hears of it in the midst of the records."""

    async def script(peer: Peer) -> None:
        await peer.hello()
        await peer.attached()
        await peer.say(a_record(1), {"type": "resync", "session": "s", "reason": "too-far-behind"})
        await peer.say({"type": "resync", "session": "nobody's", "reason": "trimmed"})
        await peer.closed()

    async with ScriptedGateway(script) as peer_gateway, client_of(peer_gateway.address) as gateway:
        async with gateway.attach("s") as records:
            assert (await anext(records)).offset == 1
            with pytest.raises(ResyncError) as told:
                await anext(records)
        assert told.value.reason == "too-far-behind"


@pytest.mark.parametrize("code", [1002, 1007, 4500, 4509, 4999])
async def test_a_final_close_is_told_to_everybody_who_waits(code: int) -> None:
    """Coming back with the same would be refused in the same way, for ever."""

    async def script(peer: Peer) -> None:
        await peer.hello()
        await peer.attached()
        await peer.hear("cancel")
        await peer.socket.close(code=code, message=b"go away")

    async with ScriptedGateway(script) as peer_gateway, client_of(peer_gateway.address) as gateway:
        async with gateway.attach("s") as records:
            reading = asyncio.create_task(take(records, 1))
            with pytest.raises(ClosedError, match="go away") as closed:
                await gateway.cancel("s")
            with pytest.raises(ClosedError):
                await reading
        assert closed.value.code == code
        assert len(peer_gateway.peers) == 1


@pytest.mark.parametrize("code", [1000, 1001, 1011, 4000, 4001, 4499])
async def test_any_other_close_is_not(code: int) -> None:
    """A deploy, a proxy's idle limit, a crash: the next connection goes on."""

    async def script(peer: Peer) -> None:
        await peer.hello()
        await peer.attached(offset=peer.number)
        await peer.say(a_record(peer.number + 1))
        if peer.number == 0:
            await peer.socket.close(code=code)
        await peer.closed()

    async with (
        ScriptedGateway(script) as peer_gateway,
        client_of(peer_gateway.address) as gateway,
        gateway.attach("s") as records,
    ):
        assert [record.offset for record in await take(records, 2)] == [1, 2]
        assert peer_gateway.peers[1].told == [{"type": "attach", "session": "s", "after": "e.1.", "id": 2}]


async def test_a_frame_that_is_too_large_is_final(make_node: MakeNode) -> None:
    """Sent again and again it would be refused as often."""
    node = await make_node("http://127.0.0.1:1", max_body_bytes=65_536)
    async with client_of(node.address) as gateway:
        with pytest.raises(ClosedError) as closed:
            await gateway.send("s", {"messages": [], "padding": "x" * 70_000})
        assert closed.value.code == 4509


async def test_a_refused_handshake_is_final(make_node: MakeNode) -> None:
    """An origin that the gateway does not know does not get better by waiting."""
    node = await make_node("http://127.0.0.1:1")
    async with client_of(node.address, headers={"Origin": "https://evil.example"}) as gateway:
        with pytest.raises(ClosedError) as closed:
            await gateway.cancel("s")
        assert closed.value.code == 403
        assert isinstance(closed.value, GatewayClientError)


@pytest.mark.parametrize(
    "say",
    [
        lambda peer: peer.hello(protocol=2),
        lambda peer: peer.say({"type": "heartbeat"}),
        lambda peer: peer.socket.send_str("<html>"),
        lambda peer: peer.socket.send_str("[]"),
        lambda peer: peer.socket.send_str('{"type":"hello","protocol":1}'),
        lambda peer: peer.socket.send_bytes(b"{}"),
    ],
    ids=["version 2", "no hello", "no JSON", "no object", "no heartbeat", "binary"],
)
async def test_what_is_no_gateway_of_this_protocol_is_told(
    say: Callable[[Peer], Coroutine[Any, Any, None]],
) -> None:
    """A wrong port answers something; waiting five minutes for it to change helps nobody."""

    async def script(peer: Peer) -> None:
        await say(peer)
        await peer.closed()

    async with ScriptedGateway(script) as peer_gateway, client_of(peer_gateway.address) as gateway:
        with pytest.raises(ProtocolError):
            await gateway.cancel("s")


@pytest.mark.parametrize("offset", [1, 2, 4])
async def test_an_offset_that_is_not_the_next_is_told(offset: int) -> None:
    """A hole or a double in a history is worse than an error."""

    async def script(peer: Peer) -> None:
        await peer.hello()
        await peer.attached(offset=0)
        await peer.say(a_record(1), a_record(2), a_record(offset))
        await peer.hear("detach")
        await peer.closed()

    async with (
        ScriptedGateway(script) as peer_gateway,
        client_of(peer_gateway.address) as gateway,
        gateway.attach("s") as records,
    ):
        assert len(await take(records, 2)) == 2
        with pytest.raises(ProtocolError, match=f"offset {offset} came where 3 was due"):
            await anext(records)
        await eventually(lambda: len(peer_gateway.peers[0].told) == 2)


async def test_the_first_offset_is_looked_at_as_well() -> None:
    """``attached`` says what was had there."""

    async def script(peer: Peer) -> None:
        await peer.hello()
        await peer.attached(offset=7)
        await peer.say(a_record(9))
        await peer.closed()

    async with (
        ScriptedGateway(script) as peer_gateway,
        client_of(peer_gateway.address) as gateway,
    ):
        with pytest.raises(ProtocolError, match="offset 9 came where 8 was due"):
            async with gateway.attach("s") as records:
                await anext(records)


async def test_a_refusal_for_now_is_asked_again_and_others_are_not() -> None:
    """A store that fails over is away for seconds; a bad request stays one."""

    async def script(peer: Peer) -> None:
        await peer.hello()
        for code in ("store-unavailable", "rate-limited", "bad-request"):
            command = await peer.hear("attach")
            refusal = {"code": code, "message": "unable to attach", "retryable": code != "bad-request"}
            await peer.say({"type": "error", "id": command["id"], **refusal, "retryAfter": 0.01})
        await peer.closed()

    async with ScriptedGateway(script) as peer_gateway, client_of(peer_gateway.address) as gateway:
        with pytest.raises(RefusedError) as refused:
            async with gateway.attach("s"):
                pass
        assert (refused.value.code, refused.value.retry_after_seconds) == ("bad-request", 0.01)
        assert len(peer_gateway.peers[0].told) == 3


async def test_what_is_refused_for_too_long_is_given_up() -> None:
    """The cause is the refusal."""

    async def script(peer: Peer) -> None:
        await peer.hello()
        command = await peer.hear("send")
        refusal = {"code": "store-unavailable", "message": "unable to send", "retryable": True}
        await peer.say({"type": "error", "id": command["id"], **refusal, "retryAfter": 60})
        await peer.closed()

    async with (
        ScriptedGateway(script) as peer_gateway,
        client_of(peer_gateway.address, timing=IMPATIENT) as gateway,
    ):
        with pytest.raises(GaveUpError) as gave_up:
            await gateway.send("s", {})
        assert isinstance(gave_up.value.__cause__, RefusedError)
        assert [command["type"] for command in peer_gateway.peers[0].told] == ["send", "detach"]


async def test_a_node_that_goes_away_is_left_when_it_says_and_nothing_is_lost() -> None:
    """A thousand clients are told different moments, so that they do not all come at once."""

    async def script(peer: Peer) -> None:
        await peer.hello()
        if peer.number == 0:
            await peer.attached()
            await peer.say(a_record(1), {"type": "goaway", "after": 50}, {"type": "of-a-later-version"})
            await peer.say(a_record(2))
        else:
            await peer.attached(offset=2)
            await peer.say(a_record(3))
        await peer.closed()

    async with (
        ScriptedGateway(script) as peer_gateway,
        client_of(peer_gateway.address) as gateway,
        gateway.attach("s") as records,
    ):
        assert [record.offset for record in await take(records, 3)] == [1, 2, 3]
        assert peer_gateway.peers[0].socket.close_code == 1000
        assert peer_gateway.peers[1].told[0]["after"] == "e.2."


async def test_what_a_stopping_node_refuses_is_given_to_another_at_once() -> None:
    """Its turns have minutes to end, and nobody waits that long for a question to be taken."""

    async def script(peer: Peer) -> None:
        await peer.hello()
        if peer.number == 0:
            await peer.attached()
            command = await peer.hear("send")
            told = {"id": command["id"], "code": "draining", "message": "unable to send", "retryable": True}
            await peer.say({"type": "goaway", "after": 600_000}, {"type": "error", **told, "retryAfter": 600})
        else:
            place = {"session": "s", "cursor": "e.0.", "offset": 0, "last": 0, "turns": []}
            for _ in range(2):  # in whichever order
                command = await peer.hear_any()
                reply = "accepted" if command["type"] == "send" else "attached"
                await peer.say({"type": reply, "id": command["id"], "turn": "t", **place})
        await peer.closed()

    async with (
        ScriptedGateway(script) as peer_gateway,
        client_of(peer_gateway.address, timing=Timing()) as gateway,
        gateway.attach("s") as records,
    ):
        reading = asyncio.create_task(take(records, 1))
        async with asyncio.timeout(WAIT_SECONDS):
            turn = await gateway.send("s", {"messages": []}, turn="t")
        assert (turn.id, turn.cursor) == ("t", "e.0.")
        first, second = peer_gateway.peers
        assert first.socket.close_code == 1000
        told = {command["type"]: command for command in second.told}
        assert told["attach"]["after"] == "e.0."
        assert told["send"]["turn"] == "t"
        reading.cancel()


async def test_where_there_is_no_other_node_the_connection_is_kept() -> None:
    """A node that is alone stops as well; it serves its readers meanwhile, and must not be hammered."""
    refusals = 6

    async def script(peer: Peer) -> None:
        await peer.hello()
        while True:
            command = await peer.hear("send")
            await peer.hear("detach")
            if sum(len(each.told) for each in peer_gateway.peers) > 2 * refusals:
                accepted = {"session": "s", "turn": command["turn"], "cursor": "e.0."}
                await peer.say({"type": "accepted", "id": command["id"], **accepted})
                break
            told = {"code": "draining", "message": "unable to send", "retryable": True, "retryAfter": 0.01}
            await peer.say({"type": "error", "id": command["id"], **told})
            if peer.number == 0:
                break
        await peer.closed()

    timing = Timing(backoff_base_seconds=0.01, backoff_max_seconds=60.0)
    async with (
        ScriptedGateway(script) as peer_gateway,
        client_of(peer_gateway.address, timing=timing) as gateway,
        asyncio.timeout(WAIT_SECONDS),
    ):
        assert (await gateway.send("s", {})).cursor == "e.0."
        sends = [[each["type"] for each in peer.told].count("send") for peer in peer_gateway.peers]
        assert sends == [1, refusals]


async def test_a_gateway_that_says_nothing_but_goaway_is_not_hammered() -> None:
    """It asks for the next attempt itself, and would be asked for ever."""

    async def script(peer: Peer) -> None:
        await peer.hello()
        await peer.say({"type": "goaway", "after": 0})
        await peer.closed()

    timing = Timing(backoff_base_seconds=36e3, backoff_max_seconds=36e3, give_up_seconds=0.5)
    async with (
        ScriptedGateway(script) as peer_gateway,
        client_of(peer_gateway.address, timing=timing) as gateway,
    ):
        with pytest.raises(GaveUpError):
            await gateway.send("s", {})
        assert len(peer_gateway.peers) == 2


# -- its own life


async def test_closing_the_client_ends_whoever_waits() -> None:
    """No task is left waiting for what cannot come."""

    async def script(peer: Peer) -> None:
        await peer.hello()
        await peer.attached()
        await peer.hear("cancel")
        await peer.closed()

    async with ScriptedGateway(script) as peer_gateway:
        async with client_of(peer_gateway.address) as gateway, gateway.attach("s") as records:
            reading = asyncio.create_task(take(records, 1))
            cancelling = asyncio.create_task(gateway.cancel("s"))
            await eventually(lambda: len(peer_gateway.peers[0].told) == 2)
            await gateway.__aexit__()
            for waiting in (reading, cancelling):
                with pytest.raises(DetachedError, match="closed"):
                    await waiting
        await eventually(lambda: peer_gateway.peers[0].socket.closed)
        assert peer_gateway.peers[0].socket.close_code == 1000
        with pytest.raises(RuntimeError, match="async with"):
            await gateway.cancel("s")


async def test_a_frozen_connection_does_not_keep_the_client_from_closing(make_node: MakeNode) -> None:
    """The goodbye is a courtesy."""
    node = await make_node("http://127.0.0.1:1")
    async with Network(node.address) as network:
        async with client_of(network.address) as gateway, gateway.attach("s"):
            network.freeze()
        network.thaw()


async def test_the_reading_of_one_record_can_be_timed(make_node: MakeNode) -> None:
    """A cancelled wait loses nothing: whoever waits again gets the next record."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with client_of(node.address) as gateway:
            turn = await gateway.send("s", send_body("hello"))
            async with gateway.attach("s", after=turn.cursor) as records:
                had = await take(records, 5)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(records), 0.05)
                (await backend.exchange()).release.set()
                had += await until_end(records)
                assert [record.offset for record in had] == WHOLE


async def test_clients_are_told_apart(make_node: MakeNode) -> None:
    """Without an id of its own each gets one, and keeps it."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with client_of(node.address) as one, client_of(node.address) as other:
            assert one.client != other.client
            await one.send("s", send_body("hello"))
            async with other.attach("s") as records:
                assert (await anext(records)).by == {"client": one.client}


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "localhost:8080", "gateway.example", "", "ftp://gateway"])
def test_an_url_that_no_socket_can_be_opened_to_says_how_to_write_it(url: str) -> None:
    """The address as the gateway prints it is the first thing that somebody tries."""
    with pytest.raises(ValueError, match=r"unable to use '.*'; name the gateway as http://host:port"):
        GatewayClient(url)


@pytest.mark.parametrize("client", ["", "a b", "ä", "a\n", "\x7f", "x" * 129])
def test_a_client_id_that_the_gateway_would_refuse_says_what_it_may_be(client: str) -> None:
    """Told where it is given; a handshake that is refused would only be tried again."""
    with pytest.raises(ValueError, match=r"unable to use the client id .*1 to 128 printable ASCII"):
        GatewayClient("http://127.0.0.1:1", client=client)


async def test_the_longest_and_the_oddest_client_id_is_told_as_it_is(make_node: MakeNode) -> None:
    """Nothing that the gateway takes is refused here."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        for name in ("x" * 128, "!~&=+#%/?"):
            async with client_of(node.address, client=name) as one, one.attach(name) as records:
                await one.send(name, send_body("hello"))
                (start,) = await take(records, 1)
                assert start.by == {"client": name}


def test_delays_grow_to_their_bound_and_are_spread() -> None:
    """Full jitter: from nothing to the longest, whatever the attempt."""
    random.seed(7)
    timing = Timing(backoff_base_seconds=0.5, backoff_max_seconds=10.0)
    for attempt, longest in [(0, 0.5), (1, 1.0), (4, 8.0), (5, 10.0), (10_000, 10.0)]:
        delays = [timing.backoff(attempt) for _ in range(500)]
        assert 0 <= min(delays) < 0.1 * longest
        assert 0.9 * longest < max(delays) <= longest


@pytest.mark.filterwarnings("error")
def test_it_works_on_the_loop_of_the_standard_library(make_config: MakeConfig) -> None:
    """Services choose their loop; nothing of the client is left open on it."""

    async def scenario() -> None:
        async with (
            asyncio.timeout(WAIT_SECONDS),
            ScriptedBackend(until_released) as backend,
            Node(make_config(backend.url)) as node,
            Network(node.address) as network,
            client_of(network.address) as gateway,
        ):
            turn = await gateway.send("s", send_body("hello"))
            async with gateway.attach("s", after=turn.cursor) as records:
                had = await take(records, 5)
                network.cut()
                (await backend.exchange()).release.set()
                had += await until_end(records)
            assert [record.offset for record in had] == WHOLE
            async with SessionClient(node.address) as other:
                assert (await other.attach("s"))["last"] == WHOLE[-1]

    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(scenario())
    gc.collect()
