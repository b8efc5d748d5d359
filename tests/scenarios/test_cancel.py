"""Cancel means stopped; nothing but a cancel cancels."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.support.backend import Exchange, ScriptedBackend, until_released
from tests.support.client import SessionClient, send_body
from tests.support.wires import HttpChat, SdkClient, eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.app import Node

    MakeNode = Callable[..., Awaitable[Node]]


async def endless(exchange: Exchange) -> None:
    await exchange.head()
    await exchange.text("one", "two", finish=False)
    await exchange.closed()


async def headless(exchange: Exchange) -> None:
    """It took the request and says nothing."""
    await exchange.closed()


def is_chunk_of(turn: str) -> Callable[[dict[str, Any]], bool]:
    return lambda line: line.get("turn") == turn and line["type"] == "chunk"


async def ends_of(node: Node, session: str) -> list[dict[str, Any]]:
    """Every turn-end that the journal holds for a session."""
    async with SessionClient(node.address) as reader:
        reply = await reader.attach(session)
        ended = [turn for turn in reply["turns"] if turn["state"] not in {"running", "cancelling", "queued"}]
        for turn in ended:
            await reader.ended(turn["turn"])
        await reader.ask(type="ping")
        return [record for record in reader.records if record["type"] == "turn-end"]


async def test_a_cancel_closes_the_upstream_and_then_ends_the_turn(make_node: MakeNode) -> None:
    """The backend has seen the close when the client has the answer."""
    async with ScriptedBackend(endless) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address, client="laptop") as client:
            await client.send("s", "t1")
            await client.wait(lambda line: line["type"] == "chunk", count=5)
            exchange = await backend.exchange()
            reply = await client.cancel("s", "t1")
            assert exchange.was_closed.is_set()
            assert reply["turns"] == [{"turn": "t1", "result": "cancelled"}]
            end = await client.ended("t1")
            assert end["reason"] == "cancelled"
            assert end["by"] == {"client": "laptop"}
            assert client.records[-2]["data"] == {"type": "text-end", "id": "t1"}


async def test_a_cancel_before_the_first_byte_stops_the_backend(make_node: MakeNode) -> None:
    """A model that thinks for a minute costs as much as one that talks."""
    async with ScriptedBackend(headless) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client:
            await client.send("s", "t1")
            exchange = await backend.exchange()
            reply = await client.cancel("s", "t1")
            assert exchange.was_closed.is_set()
            assert reply["turns"] == [{"turn": "t1", "result": "cancelled"}]
            await client.ended("t1")
            assert [record["type"] for record in client.records] == ["turn-start", "turn-end"]


async def test_a_cancel_while_connecting_ends_the_turn(make_node: MakeNode) -> None:
    """An address that nobody answers at must not hold a Stop up."""
    blackhole = "http://10.255.255.1:9"
    node = await make_node(blackhole)
    async with SessionClient(node.address) as client:
        await client.send("s", "t1")
        reply = await client.cancel("s", "t1")
        assert reply["turns"][0]["result"] in {"cancelled", "already-ended"}
        assert (await client.ended("t1"))["reason"] in {"cancelled", "error"}


async def test_many_cancels_at_once_end_the_turn_once(make_node: MakeNode) -> None:
    """People hit Stop again when nothing seems to happen."""
    async with ScriptedBackend(endless) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client, SessionClient(node.address) as other:
            await client.send("s", "t1")
            await client.wait(lambda line: line["type"] == "chunk", count=5)
            asked = [asker.cancel("s", "t1") for asker in (client, other) for _ in range(50)]
            replies = await asyncio.gather(*asked)
            results = {reply["turns"][0]["result"] for reply in replies}
            assert results <= {"cancelled", "already-ended"}
            assert "cancelled" in results
            again = await client.cancel("s", "t1")
            assert again["turns"] == [{"turn": "t1", "result": "already-ended"}]
            assert await client.cancel("s") | {"id": 0} == {"type": "cancelled", "id": 0, "turns": []}
        assert len(await ends_of(node, "s")) == 1
        assert len(backend.exchanges) == 1


async def test_a_cancel_that_overtook_its_send_keeps_the_backend_from_being_called(
    make_node: MakeNode,
) -> None:
    """A Stop pressed before a slow network delivered the send is meant all the same."""
    async with ScriptedBackend(endless) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client, HttpChat(node.address) as http:
            reply = await client.cancel("s", "t1")
            assert reply["turns"] == [{"turn": "t1", "result": "unknown"}]
            accepted = await client.send("s", "t1")
            assert accepted["type"] == "accepted"
            assert (await client.ended("t1"))["reason"] == "cancelled"
            types = [line["type"] for line in client.told]
            assert types[-3:] == ["accepted", "turn-start", "turn-end"]
            await client.cancel("h", "t2")
            answer = await http.post("h", headers={"Idempotency-Key": "t2"})
            await answer.end()
            assert (answer.status, answer.chunks) == (200, [{"type": "abort"}])
        assert backend.exchanges == []


async def test_any_device_may_stop_what_another_began(make_node: MakeNode) -> None:
    """And everybody is told who did."""
    async with ScriptedBackend(endless) as backend:
        node = await make_node(backend.url)
        async with (
            SessionClient(node.address, client="laptop") as laptop,
            SessionClient(node.address, client="phone") as phone,
            HttpChat(node.address) as http,
            SdkClient(node.address) as sdk,
        ):
            await phone.attach("s")
            await sdk.send("r1", "s")
            await sdk.has("r1", 5)
            turn = (await phone.wait(lambda line: line["type"] == "turn-start"))["turn"]
            await laptop.cancel("s")
            assert (await phone.ended(turn))["by"] == {"client": "laptop"}
            assert await sdk.ended("r1") == {"type": "end", "requestId": "r1"}
            assert sdk.chunks("r1")[-2:] == [{"type": "text-end", "id": "t1"}, {"type": "abort"}]
            answer = await http.post("s")
            await answer.has(5)
            assert (await laptop.cancel("s"))["turns"] == [{"turn": answer.turn, "result": "cancelled"}]
            await answer.end()
            assert answer.whole
            assert answer.events[-1].data == "[DONE]"
            assert answer.chunks[-2:] == [{"type": "text-end", "id": "t1"}, {"type": "abort"}]


async def test_the_stop_url_stops_all_that_runs(make_node: MakeNode) -> None:
    """What the AI SDK's documentation tells a page to call beside ``stop()``."""
    async with ScriptedBackend(endless) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http:
            assert await http.stop("s") == {"success": True, "turns": []}
            answers = [await http.post("s", f"number {number}") for number in range(2)]
            for answer in answers:
                await answer.has(5)
            told = await http.stop("s")
            assert all(exchange.was_closed.is_set() for exchange in backend.exchanges)
            expected = [{"turn": answer.turn, "result": "cancelled"} for answer in answers]
            assert told == {"success": True, "turns": expected}
            for answer in answers:
                await answer.end()
                assert answer.chunks[-1] == {"type": "abort"}
            assert (await http.stop("s"))["turns"] == []


async def test_cancelling_one_of_two_turns_leaves_the_other_alone(make_node: MakeNode) -> None:
    """A Stop is about one answer (G4)."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client:
            for turn in ("t1", "t2"):
                await client.send("s", turn, turn)
                await client.wait(is_chunk_of(turn), 4)
            first, second = await backend.exchange(0), await backend.exchange(1)
            await client.cancel("s", "t1")
            assert first.was_closed.is_set()
            assert not second.was_closed.is_set()
            second.release.set()
            assert (await client.ended("t2"))["reason"] == "complete"
            assert (await client.ended("t1"))["reason"] == "cancelled"


async def test_a_cancel_that_races_with_the_end_gives_one_end(make_node: MakeNode) -> None:
    """Whoever wins, every client is told the same one thing."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client:
            for number in range(40):
                turn = f"t{number}"
                await client.send("s", turn)
                exchange = await backend.exchange(number)
                await client.wait(is_chunk_of(turn), 4)
                exchange.release.set()
                for _ in range(number % 8):
                    await asyncio.sleep(0)
                reply = await client.cancel("s", turn)
                end = await client.ended(turn)
                result = reply["turns"][0]["result"]
                assert (result, end["reason"]) in {("cancelled", "cancelled"), ("already-ended", "complete")}
            await client.ask(type="ping")
            ends = [record["turn"] for record in client.records if record["type"] == "turn-end"]
            assert ends == [f"t{number}" for number in range(40)]
            last = {record["turn"]: record["type"] for record in client.records}
            assert set(last.values()) == {"turn-end"}


async def test_the_backends_own_stop_is_called_and_not_waited_for(make_node: MakeNode) -> None:
    """For backends whose route ignores that its request was closed."""

    async def script(exchange: Exchange) -> None:
        if exchange.target.endswith("/stop"):
            await exchange.closed()  # never answers
        await endless(exchange)

    async with ScriptedBackend(script) as backend:
        node = await make_node(backend.url, upstream_stop="PUT /api/chat/{id}/stop")
        async with SessionClient(node.address) as client:
            session = "a/b {ü}?#"
            await client.send(session, "t1")
            await client.wait(lambda line: line["type"] == "chunk", count=5)
            reply = await client.cancel(session, "t1")
            assert reply["turns"][0]["result"] == "cancelled"
            stop = await backend.exchange(1)
            assert (stop.method, stop.target) == ("PUT", "/api/chat/a%2Fb%20%7B%C3%BC%7D%3F%23/stop")
            stop.drop()


async def test_a_backend_that_goes_on_after_the_close_is_not_journalled(make_node: MakeNode) -> None:
    """No chunk follows a turn-end, and the person who pressed Stop is not kept waiting (G4)."""

    async def stubborn(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.text(finish=False)
        while True:
            await exchange.say({"type": "text-delta", "id": "t1", "delta": "more"})
            await asyncio.sleep(0)

    async with ScriptedBackend(stubborn) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client:
            await client.send("s", "t1")
            await client.wait(lambda line: line["type"] == "chunk", count=20)
            reply = await client.cancel("s", "t1")
            assert reply["turns"] == [{"turn": "t1", "result": "cancelled"}]
            exchange = await backend.exchange()
            assert exchange.was_closed.is_set()
            await client.ended("t1")
            await client.ask(type="ping")
            assert [r["type"] for r in client.records].index("turn-end") == len(client.records) - 1
            assert client.records[-2]["data"]["type"] == "text-end"
            assert client.offsets == list(range(1, len(client.records) + 1))


# -- nothing but a cancel cancels (G5)


async def produces_to_its_end(node: Node, backend: ScriptedBackend, number: int, session: str) -> None:
    """The backend is not closed, and what it says goes on into the journal."""
    exchange = await backend.exchange(number)
    assert not exchange.was_closed.is_set()
    exchange.release.set()
    async with SessionClient(node.address) as late:
        reply = await late.attach(session)
        end = await late.ended(reply["turns"][0]["turn"])
        assert end["reason"] == "complete"
        assert late.text == "onetwo"


async def test_a_lost_connection_ends_no_turn_on_any_wire(make_node: MakeNode) -> None:
    """The answer is there afterwards: what the whole thing is for (G5)."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client:
            await client.send("ws", "t1")
            await client.wait(lambda line: line["type"] == "chunk", count=4)
            client.cut()
        await produces_to_its_end(node, backend, 0, "ws")
        async with HttpChat(node.address) as http:
            answer = await http.post("http")
            await answer.has(4)
            await answer.cut()
        await produces_to_its_end(node, backend, 1, "http")
        async with SdkClient(node.address) as sdk:
            await sdk.send("r1", "sdk")
            await sdk.has("r1", 4)
            sdk.cut()
        await produces_to_its_end(node, backend, 2, "sdk")


async def test_a_client_that_is_gone_before_its_answer_begins_still_gets_it(make_node: MakeNode) -> None:
    """A handler that is cancelled while it sends must not take the send with it."""

    async def slow_head(exchange: Exchange) -> None:
        await exchange.release.wait()
        await exchange.head()
        await exchange.text("one", "two")

    async with ScriptedBackend(slow_head) as backend:
        node = await make_node(backend.url)
        body = json.dumps({"id": "http", **send_body("hello")}).encode()
        for number in range(3):
            _, writer = await asyncio.open_connection(*node.address.split(":"))
            head = f"POST /api/chat HTTP/1.1\r\nHost: {node.address}\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
            if number:
                await backend.exchange(number)
            writer.transport.abort()
            if not number:  # gone at once: taken or not, but never half
                await eventually(lambda: len(backend.exchanges) == 1)
        for exchange in backend.exchanges:
            assert not exchange.was_closed.is_set()
            exchange.release.set()
        async with SessionClient(node.address) as late:
            await late.attach("http")
            await late.wait(lambda line: line["type"] == "turn-end" and line["reason"] == "complete", count=3)


async def test_a_socket_that_is_gone_mid_send_has_sent(make_node: MakeNode) -> None:
    """Whether the reply arrived is unknown to the client; the turn is not half begun."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client:
            command = {"type": "send", "id": 1, "session": "s", "turn": "t1", "body": send_body("hello")}
            await client.socket.send_str(json.dumps(command))
            client.cut()
        await produces_to_its_end(node, backend, 0, "s")


# -- the SDK's own abort


async def test_an_abort_cancels_when_nobody_resumes_within_the_grace(make_node: MakeNode) -> None:
    """It is all that a Stop can say on the SDK's own socket."""
    async with ScriptedBackend(endless) as backend:
        node = await make_node(backend.url, abort_grace_seconds=0.05)
        async with SdkClient(node.address) as sdk, SessionClient(node.address) as watcher:
            await watcher.attach("s")
            await sdk.send("r1", "s")
            await sdk.has("r1", 5)
            await sdk.abort("r1")
            turn = watcher.records[0]["turn"]
            assert (await watcher.ended(turn))["reason"] == "cancelled"
            assert (await backend.exchange()).was_closed.is_set()


@pytest.mark.parametrize("by", ["sdk", "http", "session"])
async def test_a_resume_within_the_grace_takes_an_abort_back(make_node: MakeNode, by: str) -> None:
    """A component that was mounted again said the same frame as a Stop."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url, abort_grace_seconds=5.0)
        async with (
            SdkClient(node.address) as sdk,
            HttpChat(node.address) as http,
            SessionClient(node.address) as client,
        ):
            await sdk.send("r1", "s")
            await sdk.has("r1", 4)
            await sdk.abort("r1")
            await eventually(lambda: bool(node._turns._aborts.pending))
            if by == "sdk":
                await sdk.resume("r2", "s")
                await sdk.has("r2", 4)
            elif by == "http":
                await (await http.stream("s")).has(4)
            else:
                await client.attach("s")
            await eventually(lambda: not node._turns._aborts.pending)
            exchange = await backend.exchange()
            assert not exchange.was_closed.is_set()
            exchange.release.set()
            assert len(await completed(node, "s")) == 1


async def completed(node: Node, session: str) -> list[dict[str, Any]]:
    async with SessionClient(node.address) as client:
        await client.attach(session)
        await client.wait(lambda line: line["type"] == "turn-end" and line["reason"] == "complete")
        return [record for record in client.records if record["type"] == "turn-end"]


async def test_the_abort_policies_cancel_and_detach(make_node: MakeNode) -> None:
    """Those who know what their page means by it can say so."""
    async with ScriptedBackend(until_released) as backend:
        strict = await make_node(backend.url, abort="cancel")
        async with SdkClient(strict.address) as sdk:
            await sdk.send("r1", "a")
            await sdk.has("r1", 4)
            await sdk.abort("r1")
            await (await backend.exchange(0)).closed()
        assert [end["reason"] for end in await ends_of(strict, "a")] in ([], ["cancelled"])
        lenient = await make_node(backend.url, abort="detach", abort_grace_seconds=0.01)
        async with SdkClient(lenient.address) as sdk:
            await sdk.send("r2", "b")
            await sdk.has("r2", 4)
            await sdk.abort("r2")
            await sdk.resume("none", "other")
            await sdk.ended("none")
            await sdk.resume("r3", "b")
            await sdk.has("r3", 4)
            exchange = await backend.exchange(1)
            assert not exchange.was_closed.is_set()
            exchange.release.set()
            assert (await sdk.ended("r3"))["type"] == "end"
            assert sdk.text("r3") == "onetwo"


async def test_an_abort_right_behind_its_send_is_heard(make_node: MakeNode) -> None:
    """``stop()`` during ``submitted`` comes before the send was accepted."""
    async with ScriptedBackend(headless) as backend:
        node = await make_node(backend.url, abort="cancel")
        async with SdkClient(node.address) as sdk:
            for number in range(10):
                await sdk.send(f"r{number}", f"s{number}")
                await sdk.abort(f"r{number}")
            await sdk.resume("none", "other")
            await sdk.ended("none")
        for number in range(10):
            await eventually(partial(has_ended, node, f"s{number}"))
        assert all(exchange.was_closed.is_set() for exchange in backend.exchanges)


async def has_ended(node: Node, session: str) -> bool:
    async with SessionClient(node.address) as client:
        reply = await client.attach(session)
        return bool(reply["turns"]) and reply["turns"][0]["state"] == "cancelled"


async def test_a_closed_post_is_a_stop_for_those_who_ask_for_it(make_node: MakeNode) -> None:
    """GATEWAY_HTTP_DISCONNECT=grace; a reload within the grace still goes on."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url, http_disconnect="grace", abort_grace_seconds=0.05)
        async with HttpChat(node.address) as http:
            stopped = await http.post("stopped")
            await stopped.has(4)
            await stopped.cut()
            await (await backend.exchange(0)).closed()
        node = await make_node(backend.url, http_disconnect="grace", abort_grace_seconds=5.0)
        async with HttpChat(node.address) as http:
            kept = await http.post("kept")
            await kept.has(4)
            await kept.cut()
            await eventually(lambda: bool(node._turns._aborts.pending))
            again = await http.stream("kept")
            await again.has(4)
            await eventually(lambda: not node._turns._aborts.pending)
            exchange = await backend.exchange(1)
            assert not exchange.was_closed.is_set()
            exchange.release.set()
            await again.end()
            assert again.text == "onetwo"


async def test_a_post_closed_before_its_answer_began_is_a_stop_too(make_node: MakeNode) -> None:
    """With GATEWAY_HTTP_DISCONNECT=grace a model that has not begun is stopped as well."""
    async with ScriptedBackend(headless) as backend:
        node = await make_node(backend.url, http_disconnect="grace", abort_grace_seconds=0.05)
        async with HttpChat(node.address) as http:
            waiting = asyncio.create_task(http.post("s"))
            exchange = await backend.exchange()
            waiting.cancel()
            with pytest.raises((asyncio.CancelledError, aiohttp.ClientError)):
                await waiting
            await exchange.closed()
