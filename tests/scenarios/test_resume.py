"""A client that lost its connection continues where it was: every record once, in order, or it is told."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.support.backend import SSE_HEADERS, Exchange, ScriptedBackend, until_released
from tests.support.client import SessionClient
from tests.support.wires import Event, HttpChat, SdkClient, eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.app import Node

    MakeNode = Callable[..., Awaitable[Node]]

CHUNKS = 2000
LONG_ANSWER = "".join(f"{number} " for number in range(CHUNKS))


async def long_answer(exchange: Exchange) -> None:
    """2,000 chunks, a few a write."""
    await exchange.head()
    await exchange.text(finish=False)
    for number in range(0, CHUNKS, 5):
        deltas = [f"{number + more} " for more in range(5)]
        await exchange.say(*({"type": "text-delta", "id": "t1", "delta": delta} for delta in deltas))
        await asyncio.sleep(0.0005)
    await exchange.text(start=False)


async def answers(exchange: Exchange) -> None:
    await exchange.head()
    await exchange.text("one", "two")


def has_or_ends(client: SessionClient, wanted: int) -> bool:
    return len(client.records) >= wanted or client.records[-1]["type"] == "turn-end"


# -- cut again and again


async def test_a_client_that_is_cut_again_and_again_misses_nothing(make_node: MakeNode) -> None:
    """Every offset once and in order, over some hundred connections (G2)."""
    async with ScriptedBackend(long_answer) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as sender:
            await sender.send("s", "t1")
            records: list[dict[str, object]] = []
            cuts = 0
            while not records or records[-1]["type"] != "turn-end":
                async with SessionClient(node.address) as client:
                    after = str(records[-1]["cursor"]) if records else None
                    reply = await client.attach("s", after)
                    assert "resync" not in reply
                    await client.wait(lambda line: "offset" in line, count=1)
                    wanted = cuts % 97 + 1
                    await eventually(partial(has_or_ends, client, wanted))
                    client.cut()
                    cuts += 1
                    records += client.records[:wanted]  # the rest was on its way, and is lost
            await sender.ended("t1")
            assert cuts > 20
            assert [record["offset"] for record in records] == list(range(1, len(records) + 1))
            assert records == sender.records
            assert sender.text == LONG_ANSWER


async def test_an_http_client_that_is_cut_continues_by_its_last_event_id(make_node: MakeNode) -> None:
    """``EventSource`` and everything like it resume by themselves, to the very last event."""
    async with ScriptedBackend(long_answer) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http:
            answer = await http.post("s")
            events: list[Event] = []
            cuts = 0
            while answer.status == 200:
                count = len(events)
                wanted = cuts % 97 + 1
                await answer.has_or_ends(wanted)
                await answer.cut()
                events += answer.events[:wanted]  # the rest was on its way, and is lost
                assert len(events) > count
                cuts += 1
                answer = await http.stream("s", events[-1].id)
            assert answer.status == 204
            assert cuts > 20
            ids = [event.id for event in events]
            assert len(set(ids)) == len(ids)
            text = [event.json for event in events[:-1]]
            assert "".join(c["delta"] for c in text if c["type"] == "text-delta") == LONG_ANSWER


async def test_the_sdks_socket_continues_after_its_last_sequence(make_node: MakeNode) -> None:
    """Numbers mean the same after a reconnect, whoever asks and whenever."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with SdkClient(node.address) as first:
            await first.send("r1", "s")
            await first.has("r1", 4)
            first.cut()
        async with SdkClient(node.address) as second:
            await second.resume("r1", "s", lastSequence=2)
            await second.has("r1", 1)
            (await backend.exchange()).release.set()
            assert (await second.ended("r1"))["type"] == "end"
            numbers = [frame["sequence"] for frame in second.of("r1") if frame["type"] == "chunk"]
            assert numbers == list(range(3, 8))
            assert second.of("r1")[0]["type"] == "start"
            # What was written to a socket is not what arrived: who says what it has gets the rest.
            await second.resume("r2", "s", lastSequence=5)
            assert (await second.ended("r2"))["type"] == "end"
            assert second.chunks("r2") == [{"type": "finish-step"}, {"type": "finish"}]


# -- the session protocol's places


async def test_a_place_that_cannot_be_continued_is_told_as_resync(make_node: MakeNode) -> None:
    """Never a partial recovery (G2)."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url, lease_seconds=0.5)
        async with SessionClient(node.address) as client:
            await client.send("s", "t1")
            await client.ended("t1")
            epoch, offset, tag, check = client.records[2]["cursor"].split(".")
            other = f"{int(check, 16) ^ 1:08x}"
            for wrong in (
                f"{'0' * len(epoch)}.3.{tag}.{check}",
                f"{epoch}.999.{tag}",
                f"{epoch}.{offset}.abcdef",
                f"{epoch}.{offset}.{tag}.{other}",
            ):
                count = len(client.records)
                reply = await client.attach("s", wrong)
                assert reply["resync"] == "epoch-changed"
                await client.wait(lambda line: line["type"] == "turn-end", count=count // 10 + 1)
                assert client.offsets[count:] == list(range(1, 11))
            for wrong in ("", "x", "1.2", f"{epoch}.{'9' * 16}.", f"{epoch}.-1."):
                assert (await client.attach("s", wrong))["code"] == "bad-request"


async def test_attach_moves_the_place_and_detach_ends_the_pushes(make_node: MakeNode) -> None:
    """A client decides what it has; the gateway does not argue."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as client:
            await client.send("s", "t1")
            await client.wait(lambda line: line["type"] == "chunk", count=4)
            reply = await client.attach("s", client.records[1]["cursor"])
            assert reply["cursor"] == client.records[1]["cursor"]
            await client.wait(lambda line: line["type"] == "chunk", count=7)
            assert client.offsets == [1, 2, 3, 4, 5, 3, 4, 5]
            assert (await client.ask(type="detach", session="s"))["type"] == "ok"
            assert (await client.ask(type="detach", session="never"))["type"] == "ok"
            (await backend.exchange()).release.set()
            async with SessionClient(node.address) as other:
                await other.attach("s")
                await other.ended("t1")
            await client.ask(type="ping")
            assert len(client.records) == 8
            reply = await client.attach("s", client.records[-1]["cursor"])
            assert reply["turns"] == [{"turn": "t1", "state": "complete", "offset": 1}]
            await client.ended("t1")
            assert client.offsets[8:] == list(range(6, 11))


async def test_an_unknown_session_is_empty_and_grows_later(make_node: MakeNode) -> None:
    """A page that opens before its first question is attached before there is anything."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as early, SessionClient(node.address) as sender:
            reply = await early.attach("s")
            assert reply["turns"] == []
            assert "resync" not in reply
            await sender.send("s", "t1")
            await early.ended("t1")
            assert early.offsets == list(range(1, 11))
            async with SessionClient(node.address) as again:
                assert "resync" not in await again.attach("s", reply["cursor"])
                await again.ended("t1")
                assert again.records == early.records


# -- the stock wires after a reload


async def test_a_stream_is_told_from_its_first_chunk_then_once_when_it_ended(make_node: MakeNode) -> None:
    """The rule of ``GET .../stream``: running from the start; ended and unread once; else 204."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http:
            assert (await http.stream("unknown")).status == 204
            posted = await http.post("s")
            await posted.has(4)
            running = await http.stream("s")
            await running.has(4)
            assert running.raw == posted.raw
            assert running.turn == posted.turn
            await posted.cut()
            await running.cut()
            (await backend.exchange()).release.set()
            await eventually(lambda: is_idle(node))
            unread = await http.stream("s")
            assert unread.status == 200
            await unread.end()
            assert unread.whole
            assert unread.text == "onetwo"
            assert unread.events[-1].data == "[DONE]"
            assert (await http.stream("s")).status == 204
            # But who says that it has not had all of it gets the rest.
            rest = await http.stream("s", unread.events[3].id)
            await rest.end()
            assert rest.events == unread.events[4:]
            assert (await http.stream("s", unread.events[-1].id)).status == 204
            assert (await http.stream("s", "nonsense")).status == 204


def is_idle(node: Node) -> bool:
    """Nothing runs; asking the gateway would read what is to stay unread."""
    return not node._turns._producers


async def test_an_answer_that_ended_while_its_only_client_reloaded_is_shown(make_node: MakeNode) -> None:
    """On both stock wires: a reload at the wrong moment must not lose what was paid for."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        for number, session in enumerate(("h", "w")):
            async with HttpChat(node.address) as http, SdkClient(node.address) as sdk:
                if session == "h":
                    await (await http.post(session)).has(4)
                else:
                    await sdk.send("r1", session)
                    await sdk.has("r1", 4)
                    sdk.cut()
            (await backend.exchange(number)).release.set()
            await eventually(lambda: is_idle(node))
        async with HttpChat(node.address) as http, SdkClient(node.address) as sdk:
            shown = await http.stream("h")
            await shown.end()
            assert shown.text == "onetwo"
            await sdk.resume("r2", "w")
            await sdk.ended("r2")
            assert sdk.text("r2") == "onetwo"
            assert sdk.told[0]["type"] == "start"
            await eventually(lambda: nothing_to_resume(sdk, "w"))
            assert (await http.stream("w")).status == 204
            assert (await http.stream("h")).status == 204


async def nothing_to_resume(sdk: SdkClient, session: str) -> bool:
    request = f"again-{len(sdk.told)}"
    await sdk.resume(request, session)
    return bool((await sdk.ended(request))["type"] == "no-active")


async def test_a_refusal_that_its_sender_was_told_is_not_told_again(make_node: MakeNode) -> None:
    """A page that showed a 401 and reloads has nothing to resume."""

    async def refuse(exchange: Exchange) -> None:
        await exchange.head("401 Unauthorized", {"Content-Type": "text/plain"})
        await exchange.raw(b"log in")
        await exchange.end()

    async with ScriptedBackend(refuse) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http, SessionClient(node.address) as client:
            for number in range(10):
                refused = await http.post(f"s{number}")
                assert refused.status == 401
                assert await refused.end() == b"log in"
                assert (await http.stream(f"s{number}")).status == 204
            down = await make_node("http://127.0.0.1:1")
            async with HttpChat(down.address) as unreachable:
                failed = await unreachable.post("down")
                assert failed.status == 502
                await failed.end()
                assert (await unreachable.stream("down")).status == 204
            # One whose sender could not be told is told once, as the chunk that the SDK understands.
            await client.ask(type="detach", session="socket")
            async with SessionClient(node.address) as gone:
                await gone.send("socket", "t1")
                gone.cut()
            await eventually(lambda: len(backend.exchanges) == 11 and is_idle(node))
            told = await http.stream("socket")
            if told.status == 200:  # the cut may have come after the end was written
                await told.end()
                assert told.whole
                assert told.chunks == [{"type": "error", "errorText": "log in"}]
                assert told.events[-1].data == "[DONE]"


# -- early open and replays


@pytest.mark.parametrize("later", ["refused", "streams", "drops", "json"])
async def test_a_stream_that_was_opened_early_tells_what_comes_later(make_node: MakeNode, later: str) -> None:
    """Proxies on the way give up on a silent POST; its 200 is then a promise to say the rest inside."""

    async def script(exchange: Exchange) -> None:
        await exchange.release.wait()
        match later:
            case "refused":
                await exchange.head("429 Slow", {"Content-Type": "text/plain", "Retry-After": "3"})
                await exchange.raw(b"slow down")
                await exchange.end()
            case "json":
                await exchange.head(headers={"Content-Type": "application/json"})
                await exchange.raw(b"{}")
                await exchange.end()
            case "drops":
                exchange.drop()
            case _:
                await answers(exchange)

    async with ScriptedBackend(script) as backend:
        node = await make_node(backend.url, early_open_seconds=0.02, heartbeat_seconds=0.02)
        async with HttpChat(node.address) as http:
            answer = await http.post("s")
            assert answer.status == 200
            assert answer.headers["x-vercel-ai-ui-message-stream"] == "v1"
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            assert answer.turn
            await answer.wait(lambda: answer.raw.count(b":") >= 2)
            assert answer.events == []
            (await backend.exchange()).release.set()
            await answer.end()
            assert answer.whole
            assert answer.events[-1].data == "[DONE]"
            if later == "streams":
                assert answer.text == "onetwo"
            else:
                assert [chunk["type"] for chunk in answer.chunks] == ["error"]
                said = {"refused": "slow down", "json": "application/json", "drops": "broke off"}[later]
                assert said in answer.chunks[0]["errorText"]
            assert (await http.stream("s")).status == 204


async def test_replays_are_the_bytes_of_the_live_stream(make_node: MakeNode) -> None:
    """Whatever the backend is: an AI SDK one, or one of named events and text."""

    async def script(exchange: Exchange) -> None:
        if exchange.json["messages"][0]["parts"][0]["text"] == "plain":
            await exchange.head(headers=SSE_HEADERS)
            await exchange.raw(
                'event: note\r\ndata: grüße\r\ndata: {\r\n\r\ndata: {"a": 1.0}\r\n\r\n'.encode()
            )
            await exchange.release.wait()
            await exchange.raw(b": comment\n\ndata: [1,2]\n\ndata: [DONE]\n\n")
            await exchange.end()
        else:
            await until_released(exchange)

    async with ScriptedBackend(script) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http:
            for number, kind in enumerate(("plain", "sdk")):
                key = {"Idempotency-Key": kind}
                live = await http.post(kind, kind, headers=key)
                await live.has(2)
                joined = await http.stream(kind)
                (await backend.exchange(number)).release.set()
                await live.end()
                assert live.whole
                assert await joined.end() == live.raw
                assert await (await http.post(kind, kind, headers=key)).end() == live.raw
                assert live.events[-1].data == "[DONE]"
                if kind == "plain":
                    assert [(e.event, e.data) for e in live.events[:-1]] == [
                        ("note", "grüße\n{"), ("", '{"a": 1.0}'), ("", "[1,2]"),
                    ]  # fmt: skip


async def test_a_late_client_reads_what_everybody_saw(make_node: MakeNode) -> None:
    """What any client has seen can be read by every client attached later, at the same offset (G1)."""
    async with ScriptedBackend(long_answer) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as live:
            await live.send("s", "t1")
            await live.ended("t1")
            async with SessionClient(node.address) as late:
                await late.attach("s")
                await late.ended("t1")
                lines = [line for frame in late.frames[1:] for line in frame.split("\n")]
                shown = [line for frame in live.frames[1:] for line in frame.split("\n")]
                pushed = [line for line in shown if "offset" in json.loads(line)]
                assert [line for line in lines if '"cursor"' in line and '"offset":' in line][1:] == pushed
