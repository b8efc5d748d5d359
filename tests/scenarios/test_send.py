"""One send, one generation; and what the backend gets to see of it."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from tests.support.backend import AI_HEADERS, Exchange, ScriptedBackend, until_released
from tests.support.client import SessionClient, send_body, user_message
from tests.support.wires import HttpChat, SdkClient

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.app import Node

    MakeNode = Callable[..., Awaitable[Node]]


async def answers(exchange: Exchange) -> None:
    await exchange.head()
    await exchange.text("one", "two")


async def endless(exchange: Exchange) -> None:
    await exchange.head()
    await exchange.text("one", finish=False)
    await exchange.closed()


def is_chunk_of(turn: str) -> Callable[[dict[str, Any]], bool]:
    return lambda line: line.get("turn") == turn and line["type"] == "chunk"


# -- one generation (G3)


async def test_a_turn_sent_twenty_times_at_once_is_generated_once(make_node: MakeNode) -> None:
    """A client that repeats a send after a lost reply must not pay twice."""
    async with ScriptedBackend(answers) as backend, AsyncExitStack() as stack:
        node = await make_node(backend.url)
        clients = [await stack.enter_async_context(SessionClient(node.address)) for _ in range(4)]
        sends = [client.send("s", "t1") for client in clients for _ in range(5)]
        replies = await asyncio.gather(*sends)
        assert {reply["type"] for reply in replies} == {"accepted"}
        assert sum("duplicate" in reply for reply in replies) == 19
        assert len({reply["cursor"] for reply in replies}) == 1
        for client in clients:
            await client.ended("t1")
            assert client.offsets == list(range(1, len(client.records) + 1))
            assert client.text == "onetwo"
        again = await clients[0].send("s", "t1")
        assert again["duplicate"]
        assert len(backend.exchanges) == 1


async def test_a_turn_id_with_another_body_is_a_conflict(make_node: MakeNode) -> None:
    """Two different questions are never one turn."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client, HttpChat(node.address) as http:
            await client.send("s", "t1", "hello")
            refused = await client.send("s", "t1", "goodbye")
            assert (refused["type"], refused["code"], refused["retryable"]) == ("error", "conflict", False)
            answer = await http.post("s", "goodbye", headers={"Idempotency-Key": "t1"})
            assert answer.status == 409
            assert json.loads(await answer.end())["code"] == "conflict"
            await client.ended("t1")
        assert len(backend.exchanges) == 1


async def test_a_repeated_post_joins_the_running_turn_and_replays_the_ended_one(make_node: MakeNode) -> None:
    """``Idempotency-Key`` names the turn: a retry gets the same bytes, live or after."""
    headers = {**AI_HEADERS, "Set-Cookie": "secret=1"}

    async def script(exchange: Exchange) -> None:
        await exchange.head(headers=headers)
        await exchange.text("one", finish=False)
        await exchange.release.wait()
        await exchange.text("two", start=False)

    async with ScriptedBackend(script) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http:
            key = {"Idempotency-Key": "k1"}
            first = await http.post("s", headers=key)
            await first.has(4)
            joined = await http.post("s", headers=key)
            await joined.has(4)
            (await backend.exchange()).release.set()
            live = await first.end()
            assert await joined.end() == live
            replayed = await http.post("s", headers=key)
            assert await replayed.end() == live
            assert [answer.turn for answer in (first, joined, replayed)] == ["k1"] * 3
            assert first.headers["Set-Cookie"] == "secret=1"
            assert "Set-Cookie" not in joined.headers
            assert "Set-Cookie" not in replayed.headers
            assert replayed.headers["x-vercel-ai-ui-message-stream"] == "v1"
        assert len(backend.exchanges) == 1


async def test_a_repeated_post_gets_the_same_refusal(make_node: MakeNode) -> None:
    """A retry of a refused send is the same send, while it is refused and afterwards."""

    async def refuse(exchange: Exchange) -> None:
        await exchange.release.wait()
        await exchange.head("429 Too Many", {"Content-Type": "application/json", "Retry-After": "7"})
        await exchange.raw(b'{"error":"slow down"}')
        await exchange.end()

    async with ScriptedBackend(refuse) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http:
            key = {"Idempotency-Key": "k1"}
            asked = [asyncio.create_task(http.post("s", headers=key)) for _ in range(5)]
            (await backend.exchange()).release.set()
            both = [*await asyncio.gather(*asked), await http.post("s", headers=key)]
            for answer in both:
                assert answer.status == 429
                assert answer.headers["Retry-After"] == "7"
                assert answer.headers["Content-Type"] == "application/json"
                assert json.loads(await answer.end()) == {"error": "slow down"}
        assert len(backend.exchanges) == 1


async def test_a_frame_of_the_sdk_that_comes_twice_is_one_turn(make_node: MakeNode) -> None:
    """Its turn is named by session and request; the answer is told to whoever asks."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with SdkClient(node.address) as first, SdkClient(node.address) as second:
            for sdk in (first, second):
                await sdk.send("r1", "s")
                await sdk.ended("r1")
                assert sdk.text("r1") == "onetwo"
        assert len(backend.exchanges) == 1


# -- overlap


async def test_sends_overlap_in_parallel_unless_told_otherwise(make_node: MakeNode) -> None:
    """It is what the backend would see without a gateway."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client:
            for number in range(3):
                await client.send("s", f"t{number}")
            for number in (2, 0, 1):
                exchange = await backend.exchange(number)
                exchange.release.set()
            for number in range(3):
                assert (await client.ended(f"t{number}"))["reason"] == "complete"
            assert client.offsets == list(range(1, len(client.records) + 1))


async def test_a_send_may_be_refused_while_another_turn_runs(make_node: MakeNode) -> None:
    """``busy`` is retryable, and nothing of it reaches the backend."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url, overlap="reject")
        async with (
            SessionClient(node.address) as client,
            HttpChat(node.address) as http,
            SdkClient(node.address) as sdk,
        ):
            await client.send("s", "t1")
            refused = await client.send("s", "t2")
            assert (refused["code"], refused["retryable"]) == ("busy", True)
            assert (await client.send("s", "t1"))["duplicate"]
            assert (await client.send("other", "t3"))["type"] == "accepted"
            assert (await client.send("s", "t4", overlap="parallel"))["type"] == "accepted"
            answer = await http.post("s")
            assert (answer.status, answer.headers["Retry-After"]) == (409, "1")
            await sdk.send("r1", "s")
            assert "is running" in (await sdk.ended("r1"))["errorText"]
            for number in range(3):
                (await backend.exchange(number)).release.set()
            for turn in ("t1", "t3", "t4"):
                await client.ended(turn)
            assert (await client.send("s", "t2"))["type"] == "accepted"


async def test_an_interrupting_send_waits_until_the_other_is_closed(make_node: MakeNode) -> None:
    """This is *steer*: the backend has seen the close before the new question comes."""
    open_before: list[int] = []

    async def script(exchange: Exchange) -> None:
        open_before.append(sum(not other.was_closed.is_set() for other in backend.exchanges[:-1]))
        await endless(exchange)

    async with ScriptedBackend(script) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address, client="me") as client:
            await client.send("s", "t0")
            await client.wait(lambda line: line["type"] == "chunk", count=4)
            for number in range(1, 4):
                turn = f"t{number}"
                await client.send("s", turn, overlap="interrupt")
                await client.wait(is_chunk_of(turn))
                ended = await client.ended(f"t{number - 1}")
                assert (ended["reason"], ended["by"]) == ("cancelled", {"client": "me"})
            assert open_before == [0, 0, 0, 0]


async def test_two_interrupts_at_once_leave_one_turn(make_node: MakeNode) -> None:
    """No send comes between a cancel and its send; the later of two wins."""
    async with ScriptedBackend(endless) as backend, AsyncExitStack() as stack:
        node = await make_node(backend.url)
        clients = [await stack.enter_async_context(SessionClient(node.address)) for _ in range(4)]
        await clients[0].send("s", "first")
        await clients[0].wait(lambda line: line["type"] == "chunk", count=4)
        sends = [client.send("s", f"t{number}", overlap="interrupt") for number, client in enumerate(clients)]
        replies = await asyncio.gather(*sends)
        assert {reply["type"] for reply in replies} == {"accepted"}
        watcher = await stack.enter_async_context(SessionClient(node.address))
        await watcher.attach("s")
        await watcher.wait(lambda line: line["type"] == "turn-end", count=4)
        winner = [r["turn"] for r in watcher.records if r["type"] == "turn-start"][-1]
        await watcher.wait(lambda line: line["type"] == "chunk" and line["turn"] == winner)
        reply = await watcher.attach("s")
        running = [turn["turn"] for turn in reply["turns"] if turn["state"] == "running"]
        assert running == [winner]
        assert sum(not exchange.was_closed.is_set() for exchange in backend.exchanges) == 1


async def test_a_queued_send_can_be_cancelled(make_node: MakeNode) -> None:
    """Stop means stop also before it was its turn."""

    async def stubborn(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.text("one", finish=False)
        while True:
            await exchange.say({"type": "text-delta", "id": "t1", "delta": "more"})
            await asyncio.sleep(0)

    async with ScriptedBackend(stubborn) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client, SessionClient(node.address) as other:
            await client.send("s", "t1")
            await client.wait(lambda line: line["type"] == "chunk", count=4)
            await client.send("s", "t2", overlap="interrupt")
            reply = await other.cancel("s", "t2")
            assert reply["turns"] == [{"turn": "t2", "result": "cancelled"}]
            assert (await client.ended("t2"))["reason"] == "cancelled"
            assert (await client.ended("t1"))["reason"] == "cancelled"
            assert len(backend.exchanges) == 1


# -- where it goes


async def test_a_send_names_one_of_several_chat_paths(make_node: MakeNode) -> None:
    """One gateway in front of a backend with an agent per path."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url, chat_paths=("/api/chat", "/agents/*/chat"))
        async with (
            SessionClient(node.address) as client,
            HttpChat(node.address, "/agents/b%20c/chat?x=1&y=%2F") as http,
            SdkClient(node.address, "/agents/d/chat?token=1") as sdk,
        ):
            await client.send("s", "t1")
            await client.send("s", "t2", path="/agents/a/chat")
            for turn, path in (("t1", "/api/chat"), ("t2", "/agents/a/chat")):
                await client.ended(turn)
                start = next(r for r in client.records if r["turn"] == turn)
                assert start["path"] == path
            for wrong in (
                "/agents/a/b/chat",
                "/agents/../chat",
                "/admin",
                "/api/chat/x/stream",
                "http://evil/",
            ):
                refused = await client.send("s", "t3", path=wrong)
                assert refused["code"] == "bad-request"
            await (await http.post("s")).end()
            await sdk.send("r1", "s")
            await sdk.ended("r1")
        assert sorted(exchange.target for exchange in backend.exchanges) == [
            "/agents/a/chat",
            "/agents/b%20c/chat?x=1&y=%2F",
            "/agents/d/chat?token=1",
            "/api/chat",
        ]


async def test_the_bodys_session_is_put_in_kept_or_refused(make_node: MakeNode) -> None:
    """What is sent under one name must not be answered under another."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url, session_field="chat.id")
        async with SessionClient(node.address) as client:
            await client.send("s", "t1")
            await client.ask(type="send", session="s", turn="t2", body={"chat": {"id": "s", "x": 1.0}})
            refused = await client.ask(type="send", session="s", turn="t3", body={"chat": {"id": "z"}})
            assert refused["code"] == "bad-request"
            await client.ended("t1")
            await client.ended("t2")
        assert (await backend.exchange(0)).json == {**send_body("hello"), "chat": {"id": "s"}}
        assert (await backend.exchange(1)).json == {"chat": {"id": "s", "x": 1.0}}
        assert len(backend.exchanges) == 2


async def test_the_turns_start_says_what_was_asked(make_node: MakeNode) -> None:
    """Other devices show the question, and know what was edited, before the answer begins."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address, client="me") as client, HttpChat(node.address) as http:
            await client.attach("s")
            body = {"messages": [user_message("one", "u1"), user_message("two", "u2")], "messageId": "u2"}
            answer = await http.request("POST", http.url + "?client=phone", json={"id": "s", **body})
            await answer.end()
            await client.ended(answer.turn)
            start = client.records[0]
            assert start["messages"] == [user_message("two", "u2")]
            assert (start["messageId"], start["path"]) == ("u2", "/api/chat")
            assert start["by"] == {"client": "phone"}


async def test_a_turn_is_journalled_before_the_backend_hears_of_it(make_node: MakeNode) -> None:
    """A crash in between costs a turn that is seen to have failed, never an answer nobody knows of."""
    seen: list[Any] = []

    async def script(exchange: Exchange) -> None:
        async with SessionClient(node.address) as reader:
            reply = await reader.attach("s")
            await reader.wait(lambda line: line["type"] == "turn-start")
            seen.append((reply["turns"], reader.records[0]["turn"]))
        await answers(exchange)

    async with ScriptedBackend(script) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client:
            await client.send("s", "t1")
            await client.ended("t1")
        assert seen == [([{"turn": "t1", "state": "running", "offset": 1}], "t1")]


async def test_the_reply_comes_before_any_push_of_the_turn(make_node: MakeNode) -> None:
    """A client knows its turn before it is told of it, also where it was attached already."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client, SessionClient(node.address) as other:
            await client.attach("s")
            await other.attach("s")
            turns = [f"t{number}" for number in range(60)]
            sends = [(client if number % 3 else other).send("s", turn) for number, turn in enumerate(turns)]
            replies = await asyncio.gather(*sends)
            for turn in turns:
                await client.ended(turn)
                await other.ended(turn)
            for number, (turn, reply) in enumerate(zip(turns, replies, strict=True)):
                told = (client if number % 3 else other).told
                assert reply["type"] == "accepted"
                about = [line["type"] for line in told if line.get("turn") == turn]
                assert about[:2] == ["accepted", "turn-start"]
            starts = {r["turn"]: r["offset"] for r in client.records if r["type"] == "turn-start"}
            for turn, reply in zip(turns, replies, strict=True):
                assert int(reply["cursor"].split(".")[1]) == starts[turn] - 1
            assert client.offsets == other.offsets == list(range(1, len(client.records) + 1))


# -- headers and bodies


async def test_http_passes_the_body_byte_for_byte_and_end_to_end_headers(make_node: MakeNode) -> None:
    """The backend cannot tell the gateway from any reverse proxy."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http:
            body = b'{ "id" : "s",\n'
            body += b' "messages":[{"n":1.0e0,"x":"\\u00fc\\/\xc3\xbc"}], "big":12345678901234567890123 }'
            headers = {
                "Content-Type": "application/json; charset=utf-8",
                "Cookie": "a=1; b=2",
                "Authorization": "Bearer x",
                "X-Custom": "kept",
                "Accept-Encoding": "gzip, br",
                "X-Forwarded-For": "6.6.6.6",
                "X_Forwarded_Proto": "https",
                "Forwarded": "for=6.6.6.6",
                "Connection": "keep-alive, X-Secret",
                "X-Secret": "hop",
                "Keep-Alive": "timeout=5",
                "Proxy-Authorization": "Basic x",
                "TE": "trailers",
            }
            answer = await http.request("POST", http.url, data=body, headers=headers)
            await answer.end()
        exchange = await backend.exchange()
        assert exchange.body == body
        got = exchange.headers
        assert got["content-type"] == "application/json; charset=utf-8"
        assert (got["cookie"], got["authorization"], got["x-custom"]) == ("a=1; b=2", "Bearer x", "kept")
        assert got["accept-encoding"] == "identity"
        assert got["host"] == backend.url.removeprefix("http://")
        assert got["x-forwarded-for"] == "127.0.0.1"
        assert (got["x-forwarded-host"], got["x-forwarded-proto"]) == (node.address, "http")
        gone = {"x-secret", "keep-alive", "proxy-authorization", "te", "forwarded", "x_forwarded_proto"}
        assert not gone & got.keys()


@pytest.mark.parametrize("wire", ["session", "sdk"])
async def test_sockets_hand_on_what_is_on_the_list(make_node: MakeNode, wire: str) -> None:
    """A socket's handshake is full of what means nothing to a POST."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url, forward_headers=("x-tenant",))
        handshake = {"Cookie": "a=1", "X-Tenant": "t", "X-Other": "no", "User-Agent": "browser/1"}
        if wire == "sdk":
            async with SdkClient(node.address, headers=handshake) as sdk:
                framed = {"authorization": "Bearer frame", "x-other": "no", "host": "evil", "cookie": "b=2"}
                await sdk.send("r1", "s", headers=framed, body={"id": "not this", "extra": {"x": 1}})
                await sdk.ended("r1")
        else:
            async with HttpChat(node.address) as http:
                socket = await http.http.ws_connect(
                    f"{http.base}/gateway/v1/ws", protocols=["session-gateway.v1"],
                    headers={**handshake, "Authorization": "Bearer frame"},
                )  # fmt: skip
                command = {"type": "send", "id": 1, "session": "s", "turn": "t", "body": send_body("hello")}
                await socket.send_json(command)
                await backend.exchange()
                await socket.close()
        exchange = await backend.exchange()
        got = exchange.headers
        assert (got["authorization"], got["x-tenant"]) == ("Bearer frame", "t")
        assert got["cookie"] == ("b=2" if wire == "sdk" else "a=1")
        assert got["user-agent"] == "browser/1"
        assert (got["content-type"], got["accept-encoding"]) == ("application/json", "identity")
        assert got["host"] == backend.url.removeprefix("http://")
        gone = {"x-other", "upgrade", "connection", "sec-websocket-key", "sec-websocket-protocol", "origin"}
        assert not {name for name in gone & got.keys() if name != "connection"}
        expected = {**send_body("hello"), "id": "s"}
        assert exchange.json == (expected | {"extra": {"x": 1}} if wire == "sdk" else expected)


async def test_one_users_cookies_never_reach_another(make_node: MakeNode) -> None:
    """A client session that kept the backend's cookies would log everybody in as the first user."""

    async def script(exchange: Exchange) -> None:
        await exchange.head(headers={**AI_HEADERS, "Set-Cookie": f"user={exchange.json['id']}; Path=/"})
        await exchange.text("one")

    async with ScriptedBackend(script) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http, SessionClient(node.address) as client:
            first = await http.post("alice")
            assert first.headers.getall("Set-Cookie") == ["user=alice; Path=/"]
            await first.end()
            second = await http.post("bob")
            assert second.headers.getall("Set-Cookie") == ["user=bob; Path=/"]
            await second.end()
            await client.send("carol", "t1")
            await client.ended("t1")
            watching = await http.stream("carol")
            assert "Set-Cookie" not in watching.headers
        assert all("cookie" not in exchange.headers for exchange in backend.exchanges)


async def test_a_repeated_send_whose_journal_is_gone_is_told_so(make_node: MakeNode, valkey_url: str) -> None:
    """Its end stands nowhere any more; a client that waited for it would wait for ever."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with (
            SessionClient(node.address) as client,
            HttpChat(node.address) as http,
            SdkClient(node.address) as sdk,
        ):
            await client.send("a", "t-a")
            await client.ended("t-a")
            await client.ask(type="detach", session="a")
            await (await http.post("b", headers={"Idempotency-Key": "t-b"})).end()
            await sdk.send("r", "c")
            await sdk.ended("r")
            async with Redis.from_url(valkey_url) as admin:
                async for key in admin.scan_iter(f"{node.config.key_prefix}:*:meta"):
                    await admin.delete(key)
            assert (await client.send("a", "t-a"))["duplicate"]
            told = await client.wait(lambda line: line["type"] == "resync")
            assert (told["session"], told["reason"]) == ("a", "epoch-changed")
            again = await http.post("b", headers={"Idempotency-Key": "t-b"})
            assert again.status == 409
            await sdk.send("r", "c")
            await sdk.wait(lambda: sdk.of("r")[-1]["type"] == "error")
        assert len(backend.exchanges) == 3
