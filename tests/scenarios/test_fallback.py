"""Where no WebSocket passes: the same records by event stream and long-poll, and commands by POST."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from typing import TYPE_CHECKING, Any

import pytest
from multidict import CIMultiDict

from gateway.core.model import ResyncReason, SessionId
from gateway.edge import requests
from gateway.edge.commands import PIECE_BYTES
from gateway.edge.socketloop import FRAME_BYTES
from gateway.telemetry import registry
from tests.support.backend import SSE_HEADERS, Exchange, ScriptedBackend, answers, never_ends, until_released
from tests.support.client import WAIT_SECONDS, SessionClient, send_body
from tests.support.fallback import (
    CARRIERS,
    FallbackClient,
    following,
    lines_of_poll,
    lines_of_socket,
    lines_of_stream,
)
from tests.support.wires import Answer, HttpChat, SdkClient, eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.app import Node

    MakeNode = Callable[..., Awaitable[Node]]

CHUNKS = 1500
BIG = "x" * 4000
FOREVER = {"wait": "30"}
"""Longer than a client here waits for its answer."""


async def long_answer(exchange: Exchange) -> None:
    """A few chunks a write."""
    await exchange.head()
    await exchange.text(finish=False)
    for number in range(0, CHUNKS, 5):
        deltas = [f"{number + more} " for more in range(5)]
        await exchange.say(*({"type": "text-delta", "id": "t1", "delta": delta} for delta in deltas))
        await asyncio.sleep(0.0005)
    await exchange.text(start=False)


async def big_answer(exchange: Exchange) -> None:
    """Some 12 MB, as fast as it is taken."""
    await exchange.head()
    await exchange.text(finish=False)
    for _ in range(300):
        await exchange.say(*[{"type": "text-delta", "id": "t1", "delta": BIG}] * 10)
    await exchange.text(start=False)


def carriers_of(node: Node, session: str) -> list[str]:
    """How those who are attached are."""
    tail = node._sessions._hub._tails.get(SessionId(session))
    return [] if tail is None else sorted(each.carrier for each in tail.subscribers)


def metric(name: str, carrier: str) -> float:
    value = registry.get_sample_value(name, {"carrier": carrier})
    assert value is not None
    return value


async def was_read(node: Node, session: str) -> bool:
    """Whether the newest turn that ended was read to its end."""
    look = await node._sessions._look(SessionId(session))
    return any(turn.was_read for turn in look.turns if not turn.is_running)


# -- the same records, whatever the carrier


@pytest.mark.parametrize("seed", range(4))
async def test_a_client_that_changes_its_carrier_again_and_again_misses_nothing(
    make_node: MakeNode, seed: int
) -> None:
    """In the middle of a turn, from each carrier to each other: every line once, in order, byte for byte."""
    dice = random.Random(seed)
    async with ScriptedBackend(long_answer) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as sender:
            await sender.send("s", "t1")
            lines: list[str] = []
            changes = set()
            carrier = dice.choice(CARRIERS)
            while not lines or json.loads(lines[-1])["type"] != "turn-end":
                before, carrier = carrier, dice.choice([each for each in CARRIERS if each != carrier])
                changes.add((before, carrier))
                where = {"after": json.loads(lines[-1])["cursor"]} if lines else {}
                wanted = dice.randrange(1, 90)
                async with following(carrier, node.address, "s", **where) as follower:
                    assert "resync" not in follower.attached
                    await follower.has(wanted)
                lines += follower.lines[:wanted]  # the rest was on its way, and is lost
            await sender.ended("t1")
            assert lines == lines_of_socket(sender)
            assert len(lines) == CHUNKS + 8
            assert changes == set(itertools.permutations(CARRIERS, 2))


ODD = [
    '{"type":"start","x":1.00,"big":12345678901234567890123}',
    '{ "type" : "data-odd" , "data" : "\\u00e9 \\ud83d\\ude00 \\/ é 😀 \\u2028" }',
    'not json \\ at "all" 😀',
    '{"type":"finish"}',
]


async def test_a_record_is_the_same_bytes_on_each_carrier(make_node: MakeNode) -> None:
    """Numbers, escapes and spacing are the backend's: nothing reads and writes them again."""

    async def odd(exchange: Exchange) -> None:
        await exchange.head(headers=SSE_HEADERS)
        await exchange.raw(b"event: note\ndata: named\n\n")
        await exchange.raw(b'data: {"a":\ndata: 1}\n\n')
        await exchange.say(*ODD)
        await exchange.end()

    async with ScriptedBackend(odd) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as socket, FallbackClient(node.address) as http:
            await socket.send("s/ö {1}", "t1")
            await socket.ended("t1")
            expected = lines_of_socket(socket)
            assert '"x":1.00,"big":12345678901234567890123' in "".join(expected)
            stream = await http.events("s/ö {1}")
            await stream.has(1 + len(expected))
            assert lines_of_stream(stream) == expected
            assert lines_of_poll(await (await http.asked("s/ö {1}")).end()) == expected


async def test_a_session_of_an_event_stream_is_no_others(make_node: MakeNode) -> None:
    """Two chats, two streams, two polls; a slash in a name is a name's."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with FallbackClient(node.address) as http:
            streams = {name: await http.events(name) for name in ("a", "a/b")}
            polls = {name: asyncio.create_task(http.poll(name, FOREVER)) for name in ("a", "a/b")}
            await eventually(lambda: carriers_of(node, "a/b") == ["long-poll", "sse"])
            for name, stream in streams.items():
                await http.send(name, f"turn-of-{len(name)}")
                await stream.has(1 + 10)
                turns = {json.loads(line)["turn"] for line in lines_of_stream(stream)}
                assert turns == {f"turn-of-{len(name)}"}
                assert (await polls[name])["records"][0]["turn"] == f"turn-of-{len(name)}"


# -- the event stream


async def test_an_event_stream_begins_with_what_an_attach_is_told(make_node: MakeNode) -> None:
    """No proxy may hold it back or change it, and its reader knows when silence is a loss."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url, heartbeat_seconds=20.0)
        async with FallbackClient(node.address, client="me") as http, SessionClient(node.address) as socket:
            await socket.send("s", "t1")
            await socket.wait(lambda line: line["type"] == "chunk", count=4)
            stream = await http.events("s")
            assert stream.status == 200
            assert stream.headers["Content-Type"] == "text/event-stream"
            assert stream.headers["Cache-Control"] == "no-cache, no-transform"
            assert stream.headers["X-Accel-Buffering"] == "no"
            first, *rest = await stream.has(6)
            reply = await socket.attach("s")
            del reply["id"]
            assert (first.event, first.json) == ("attached", {**reply, "heartbeat": 20.0})
            assert first.id == reply["cursor"]
            assert [event.event for event in rest] == [""] * 5
            (await backend.exchange()).release.set()


@pytest.mark.parametrize(
    ("accept", "is_stream"),
    [
        (["text/event-stream"], True),
        (["application/json, Text/Event-Stream"], True),
        (["application/json;q=0.9,text/event-stream ; charset=utf-8; q=0.1"], True),
        (["text/event-stream;q=0.001"], True),
        (["application/json", "text/event-stream"], True),
        (["text/event-stream", "application/json"], True),
        ([], False),
        (["*/*"], False),
        (["application/json"], False),
        (["text/event-stream;q=0"], False),
        (["text/event-stream; Q=0.000, application/json"], False),
        (["application/json", "text/event-stream;q=0.0"], False),
        (["text/event-streams, x/text/event-stream"], False),
        (['application/json; profile="text/event-stream"'], False),
    ],
)
async def test_who_accepts_an_event_stream_gets_one_and_nobody_else(
    make_node: MakeNode, accept: list[str], *, is_stream: bool
) -> None:
    """A client that says what it does not take, or says it in several lines, is heard."""
    node = await make_node("http://127.0.0.1:1")
    async with FallbackClient(node.address) as http:
        lines = CIMultiDict([("Accept", line) for line in accept])
        # Without any, aiohttp would send a line of its own.
        asked = http.http.get(http.events_url("s"), headers=lines, skip_auto_headers=["Accept"])
        async with asyncio.timeout(WAIT_SECONDS), asked as answer:
            assert answer.status == 200
            assert (answer.content_type == "text/event-stream") is is_stream


async def test_the_last_event_id_wins_over_the_query(make_node: MakeNode) -> None:
    """An ``EventSource`` that reconnects asks for the very URL that it was made with."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with FallbackClient(node.address) as http:
            await http.send("s", "t1")
            whole = await http.events("s")
            events = await whole.has(1 + 10)
            for query in ({}, {"from": "running"}, {"after": events[2].id}, {"from": "start", "after": "?"}):
                stream = await http.events("s", query, headers={"Last-Event-ID": events[7].id})
                assert await stream.has(4) == [stream.events[0], *events[8:]]
                assert stream.events[0].json["offset"] == 7
            ignored = await http.events("s", {"after": events[9].id}, headers={"Last-Event-ID": ""})
            assert (await ignored.has(2))[1:] == events[10:]
            # An attach that brought nothing is continued by the id of its first event.
            again = await http.events("s", headers={"Last-Event-ID": events[0].id})
            assert (await again.has(11))[1:] == events[1:]
            empty = await http.events("new")
            again = await http.events("new", headers={"Last-Event-ID": (await empty.has(1))[0].id})
            assert "resync" not in (await again.has(1))[0].json


async def test_a_quiet_event_stream_gets_comments(make_node: MakeNode) -> None:
    """Proxies cut what is silent, and a client that hears nothing asks again."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url, heartbeat_seconds=0.05)
        async with FallbackClient(node.address) as http:
            stream = await http.events("s")
            await stream.came(b"\n\n: heartbeat\n\n: heartbeat\n\n: heartbeat\n\n")
            await http.send("s", "t1")
            await stream.came(b'"type":"turn-end"')
            await stream.wait(lambda: stream.raw.endswith(b": heartbeat\n\n: heartbeat\n\n"))


def stop_reading(answer: Answer) -> Any:
    """Take no more from the socket; returns its transport."""
    connection = answer.response.connection
    assert connection is not None
    transport: Any = connection.transport
    transport.pause_reading()
    return transport


async def test_an_event_stream_that_is_not_read_hurts_nobody_and_is_dropped(make_node: MakeNode) -> None:
    """A half-open connection would hold its buffers for ever; others do not wait for it (G8, G10)."""
    async with ScriptedBackend(big_answer) as backend:
        node = await make_node(backend.url, heartbeat_seconds=0.6)
        async with FallbackClient(node.address) as http, SessionClient(node.address) as other:
            await other.attach("s")
            stuck = await http.events("s")
            await stuck.has(1)
            transport = stop_reading(stuck)
            await other.send("s", "t1")
            await other.ended("t1")
            assert len(other.records) == 3008
            await eventually(lambda: carriers_of(node, "s") == ["websocket"])
            transport.resume_reading()
            await stuck.wait(lambda: stuck.whole is not None)
            assert stuck.whole is False
            had = [json.loads(line) for line in lines_of_stream(stuck)]
            after = {"after": had[-1]["cursor"]} if had else {}
            assert len(had) < 3008
            again = await http.events("s", after)
            await again.came(b'"type":"turn-end"')
            rest = [json.loads(line) for line in lines_of_stream(again)]
            assert had + rest == other.records


async def test_an_event_stream_that_is_left_is_detached(make_node: MakeNode) -> None:
    """And the turn runs on (G5)."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with FallbackClient(node.address) as http, SessionClient(node.address) as other:
            await other.send("s", "t1")
            stream = await http.events("s")
            await stream.has(5)
            assert carriers_of(node, "s") == ["sse", "websocket"]
            await stream.cut()
            await eventually(lambda: carriers_of(node, "s") == ["websocket"])
            (await backend.exchange()).release.set()
            assert (await other.ended("t1"))["reason"] == "complete"


# -- polls


async def test_a_poll_that_waits_is_answered_by_the_first_record(make_node: MakeNode) -> None:
    """And goes on from there: one record after the other, while they are made."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with FallbackClient(node.address) as http:
            empty = await http.poll("s")
            assert empty == {"cursor": ".0.", "offset": 0, "last": 0, "turns": [], "records": []}
            waiting = asyncio.create_task(http.poll("s", {"after": empty["cursor"], **FOREVER}))
            await eventually(lambda: carriers_of(node, "s") == ["long-poll"])
            await http.send("s", "t1")
            told = await waiting
            assert told["records"][0]["type"] == "turn-start"
            while told["offset"] < 5:
                assert told["cursor"] == told["records"][-1]["cursor"]
                told = await http.poll("s", {"after": told["cursor"], **FOREVER})
                assert told["turns"] == [{"turn": "t1", "state": "running", "offset": 1}]
            waiting = asyncio.create_task(http.poll("s", {"after": told["cursor"], **FOREVER}))
            await eventually(lambda: carriers_of(node, "s") == ["long-poll"])
            (await backend.exchange()).release.set()
            told = await waiting
            assert told["records"][0]["data"] == {"type": "text-delta", "id": "t1", "delta": "two"}
            assert told["last"] >= told["offset"] >= 6


async def test_a_poll_that_finds_nothing_is_answered_when_its_wait_is_over(make_node: MakeNode) -> None:
    """With the same place, so that the next continues there."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with FallbackClient(node.address) as http, SessionClient(node.address) as socket:
            await socket.send("s", "t1")
            end = await socket.ended("t1")
            for wait in ("0", "0.05", "00.000001"):
                told = await http.poll("s", {"after": end["cursor"], "wait": wait})
                assert (told["cursor"], told["offset"], told["last"]) == (end["cursor"], 10, 10)
                assert told["records"] == []
            answer = await http.asked("s", {"after": end["cursor"]})
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers["Content-Type"].startswith("application/json")


async def test_a_poll_that_is_left_leaves_nothing_behind(make_node: MakeNode) -> None:
    """A phone that loses its network polls again; what it left must not pile up."""
    node = await make_node("http://127.0.0.1:1")
    async with FallbackClient(node.address) as http:
        for _ in range(5):
            waiting = asyncio.create_task(http.poll("s", {"after": ".0.", "wait": "30"}))
            await eventually(lambda: carriers_of(node, "s") == ["long-poll"])
            assert metric("gateway_attached_subscribers", "long-poll") == 1
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await eventually(lambda: not node._sessions._hub._tails)
            assert metric("gateway_attached_subscribers", "long-poll") == 0


async def test_an_answer_to_a_poll_has_a_bound(make_node: MakeNode) -> None:
    """A long journal comes in pieces; a single record that is larger comes all the same."""

    async def large(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.text(finish=False)
        for size in [4000] * 200 + [400_000, 400_000]:
            await exchange.say({"type": "text-delta", "id": "t1", "delta": "x" * size})
        await exchange.text(start=False)

    async with ScriptedBackend(large) as backend:
        node = await make_node(backend.url)
        async with FallbackClient(node.address) as http, SessionClient(node.address) as socket:
            await socket.send("s", "t1")
            await socket.ended("t1")
            lines: list[str] = []
            query: dict[str, str] = {}
            sizes = []
            while len(lines) < len(socket.records):
                raw = await (await http.asked("s", query)).end()
                sizes.append(len(raw))
                told = lines_of_poll(raw)
                assert len(told) == 1 or sum(map(len, told[:-1])) < FRAME_BYTES
                lines += told
                query = {"after": json.loads(raw)["cursor"]}
                assert json.loads(raw)["last"] == len(socket.records)
            assert lines == lines_of_socket(socket)
            assert len(sizes) >= 5


# -- places that are lost


async def ended(node: Node, session: str) -> list[dict[str, Any]]:
    """A session of one turn that ended; returns its records."""
    async with SessionClient(node.address) as socket:
        await socket.send(session, "t1")
        await socket.ended("t1")
        return socket.records


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("wait", [{}, FOREVER])
async def test_a_place_that_is_lost_is_told_as_resync(
    make_node: MakeNode, carrier: str, wait: dict[str, str]
) -> None:
    """And what follows is the complete state, never a part (G2)."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url, lease_seconds=0.5)
        records = await ended(node, "s")
        epoch, _, tag, _ = records[2]["cursor"].split(".")
        for wrong in (f"{'0' * len(epoch)}.3.{tag}", f"{epoch}.999.{tag}", f"{epoch}.3.abcdef"):
            where = {"after": wrong, **(wait if carrier == "long-poll" else {})}
            async with following(carrier, node.address, "s", **where) as follower:
                await follower.has(10)
                assert follower.attached["resync"] == "epoch-changed"
                assert follower.records == records
        async with FallbackClient(node.address) as http:
            told = await http.poll("new", {"after": f"{epoch}.3.{tag}", **wait})
            assert (told["cursor"], told["resync"], told["records"]) == (".0.", "epoch-changed", [])


async def test_a_journal_that_is_lost_meanwhile_is_told_on_each_carrier(make_node: MakeNode) -> None:
    """A stream is told and ends; a poll starts again in the same answer."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        records = await ended(node, "s")
        after = {"after": records[-1]["cursor"]}
        async with FallbackClient(node.address) as http, SessionClient(node.address) as socket:
            await socket.attach("s", after["after"])
            stream = await http.events("s", after)
            await stream.has(1)
            waiting = asyncio.create_task(http.poll("s", {**after, **FOREVER}))
            await eventually(lambda: len(carriers_of(node, "s")) == 3)
            node._sessions._hub._lose(node._sessions._hub._tails[SessionId("s")])
            expected = {"type": "resync", "session": "s", "reason": ResyncReason.EPOCH_CHANGED}
            assert await socket.wait(lambda line: line["type"] == "resync") == expected
            await stream.end()
            assert stream.whole is True
            last = stream.events[-1]
            assert (last.event, last.id, last.json) == ("resync", ".0.", expected)
            told = await waiting
            assert (told["resync"], told["records"]) == ("epoch-changed", records)
            assert not carriers_of(node, "s")


async def test_an_event_stream_that_is_too_far_behind_starts_again(make_node: MakeNode) -> None:
    """An ``EventSource`` comes back with the last id it was told: after `resync` that is the beginning."""
    async with ScriptedBackend(big_answer) as backend:
        node = await make_node(backend.url, max_lag_bytes=1024 * 1024)
        async with FallbackClient(node.address) as http:
            stream = await http.events("s")
            attached = (await stream.has(1))[0]
            transport = stop_reading(stream)
            await http.send("s", "t1")
            await eventually(lambda: not node._turns._producers)
            transport.resume_reading()
            await stream.end()
            told = stream.events[-1]
            expected = {"type": "resync", "session": "s", "reason": ResyncReason.TOO_FAR_BEHIND}
            assert (told.event, told.id, told.json) == ("resync", ".0.", expected)
            assert len(stream.events) < 3008
            where = {"after": attached.id}  # an EventSource asks for the very URL that it was made with
            again = await http.events("s", where, headers={"Last-Event-ID": told.id})
            await again.came(b'"type":"turn-end"')
            records = [json.loads(line) for line in lines_of_stream(again)]
            assert [record["offset"] for record in records] == list(range(1, 3009))
            assert "resync" not in again.events[0].json


async def chunk_sizes(address: str, path: str, until: bytes) -> list[int]:
    """How large the pieces of a chunked answer are, up to the one that holds something."""
    reader, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {address}\r\nAccept: text/event-stream\r\n\r\n".encode())
    sizes: list[int] = []
    async with asyncio.timeout(WAIT_SECONDS):
        await reader.readuntil(b"\r\n\r\n")
        data = b""
        while until not in data:
            sizes.append(int(await reader.readuntil(b"\r\n"), 16))
            data = await reader.readexactly(sizes[-1] + 2)
    writer.transport.abort()
    return sizes


async def test_a_long_journal_comes_in_pieces_that_a_slow_network_takes(make_node: MakeNode) -> None:
    """Who is slow is not stuck: each piece that it takes counts, and half of a frame would be no use."""
    async with ScriptedBackend(big_answer) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as socket, SessionClient(node.address) as late:
            await socket.send("s", "t1")
            await socket.ended("t1")
            await late.attach("s")
            await late.ended("t1")
            assert late.records == socket.records
            sizes = [len(frame) for frame in late.frames]
            sizes += await chunk_sizes(node.address, "/gateway/v1/sessions/s/events", b'"turn-end"')
            assert len(sizes) > 200
            assert max(sizes) <= PIECE_BYTES + 1000


# -- sessions that are not there yet


async def test_an_unknown_session_wakes_all_who_wait_for_it(make_node: MakeNode) -> None:
    """A page opens its chat before anybody has said a word in it."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with FallbackClient(node.address) as http:
            stream = await http.events("new")
            assert (await stream.has(1))[0].json["cursor"] == ".0."
            polls = [
                asyncio.create_task(http.poll("new", {**query, **FOREVER}))
                for query in ({}, {"after": ".0."}, {"from": "running"})
            ]
            await eventually(lambda: carriers_of(node, "new") == ["long-poll"] * 3 + ["sse"])
            await http.send("new", "t1")
            await stream.has(1 + 10)
            for told in await asyncio.gather(*polls):
                assert told["records"][0]["offset"] == 1
                assert told["last"] == told["offset"] >= 1


# -- commands


async def test_commands_are_answered_as_on_the_socket(make_node: MakeNode) -> None:
    """One command, one reply; what is refused has the status of its code."""
    async with ScriptedBackend(never_ends) as backend:
        node = await make_node(backend.url)
        async with FallbackClient(node.address, client="me") as http, SessionClient(node.address) as socket:
            await socket.attach("s")
            assert await http.ask(type="ping", id="a") == {"type": "pong", "id": "a"}
            accepted = await http.send("s", "t1")
            assert (accepted["type"], accepted["turn"]) == ("accepted", "t1")
            start = await socket.wait(lambda line: line["type"] == "turn-start")
            assert start["by"] == {"client": "me"}
            assert accepted["cursor"].split(".")[:2] == [start["cursor"].split(".")[0], "0"]
            cancelled = await http.ask(type="cancel", session="s", turn="t1")
            assert cancelled["turns"] == [{"turn": "t1", "result": "cancelled"}]
            assert (await backend.exchange()).was_closed.is_set()
            assert (await socket.ended("t1"))["by"] == {"client": "me"}
            again = await http.ask(type="cancel", session="s")
            assert again == {"type": "cancelled", "id": again["id"], "turns": []}


async def test_a_send_that_is_posted_again_calls_the_backend_once(make_node: MakeNode) -> None:
    """Its first answer may have been lost; on which carrier it is repeated does not matter (G3)."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with FallbackClient(node.address) as http, SessionClient(node.address) as socket:
            first = await http.send("s", "t1")
            again = await http.send("s", "t1")
            assert again == {**first, "id": again["id"], "duplicate": True}
            assert (await socket.send("s", "t1"))["duplicate"]
            conflict = await http.command(type="send", session="s", turn="t1", body=send_body("other"))
            assert (conflict.status, json.loads(conflict.raw)["code"]) == (409, "conflict")
            (await backend.exchange()).release.set()
            await socket.ended("t1")
        assert len(backend.exchanges) == 1


async def test_a_send_whose_client_is_gone_runs(make_node: MakeNode) -> None:
    """Whoever asked may come back for it; a lost connection ends nothing (G5)."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as socket:
            await socket.attach("s")
            body = json.dumps({"type": "send", "id": 1, "session": "s", "turn": "t1", "body": send_body("x")})
            reader, writer = await asyncio.open_connection(*node.address.split(":"))
            head = (
                f"POST /gateway/v1/commands HTTP/1.1\r\nHost: {node.address}\r\nContent-Length: {len(body)}"
            )
            writer.write(f"{head}\r\n\r\n{body}".encode())
            await writer.drain()
            await backend.exchange()
            writer.transport.abort()
            assert (await socket.ended("t1"))["reason"] == "complete"
            del reader


@pytest.mark.parametrize("carrier", ["websocket", "post"])
async def test_the_headers_of_a_send_reach_the_backend_by_the_allow_list(
    make_node: MakeNode, carrier: str
) -> None:
    """A page whose token changes says the new one with each send; what is not listed stays here."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url, forward_headers="x-tenant,x-other")
        headers = {"Authorization": "Bearer new", "X-Tenant": "t", "X-Secret": "s", "Host": "evil"}
        async with FallbackClient(node.address) as http, SessionClient(node.address) as socket:
            if carrier == "websocket":
                reply = await socket.send("s", "t1", headers=headers)
            else:
                command = {
                    "type": "send",
                    "id": 1,
                    "session": "s",
                    "turn": "t1",
                    "body": {},
                    "headers": headers,
                }
                own = {"Authorization": "Bearer old", "X-Other": "o", "X-Secret": "o", "Cookie": "c=1"}
                url = f"{http.base}/gateway/v1/commands"
                reply = json.loads(await (await http.request("POST", url, json=command, headers=own)).end())
            assert reply["type"] == "accepted"
        got = (await backend.exchange()).headers
        assert (got["authorization"], got["x-tenant"]) == ("Bearer new", "t")
        assert "x-secret" not in got
        assert got["host"] != "evil"
        if carrier == "post":
            assert (got["x-other"], got["cookie"]) == ("o", "c=1")


async def test_headers_that_can_be_none_are_refused(make_node: MakeNode) -> None:
    """Before anything is journalled."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with FallbackClient(node.address) as http, SessionClient(node.address) as socket:
            bad: list[Any] = [{"cookie": "a\r\nX: 1"}, {"authorization": "a\0"}, {"cookie": 1}, ["a"]]
            for headers in bad:
                for client in (http, socket):
                    assert (await client.send("s", "t1", headers=headers))["code"] == "bad-request"
            assert (await http.poll("s"))["last"] == 0
        assert backend.exchanges == []


async def test_each_refusal_has_its_status(make_node: MakeNode) -> None:
    """An HTTP client, and whatever stands between, knows by it whether to try again."""
    async with ScriptedBackend(never_ends) as backend:
        node = await make_node(backend.url, max_buffer_bytes=200_000, max_body_bytes=150_000)
        async with FallbackClient(node.address) as http:

            async def refused(status: int, code: str, **command: Any) -> Answer:
                answer = await http.command(id="x", **command)
                body = json.loads(answer.raw)
                assert (answer.status, body["code"]) == (status, code)
                assert (body["type"], body["id"]) == ("error", "x")
                assert body["message"].startswith("unable to ")
                seconds = body.get("retryAfter")
                assert answer.headers.get("Retry-After") == (seconds and str(math.ceil(seconds)))
                return answer

            send: dict[str, Any] = {"type": "send", "session": "s", "turn": "t1", "body": {"messages": []}}
            await http.command(**send)
            await refused(400, "bad-request", **{**send, "turn": "a b"})
            await refused(400, "bad-request", **{**send, "overlap": "queue"})
            await refused(400, "bad-request", **{**send, "path": "/nowhere"})
            await refused(400, "bad-request", **{**send, "body": {"id": "other"}})
            await refused(400, "bad-request", type="cancel", session="..")
            await refused(409, "conflict", **{**send, "body": {"messages": [1]}})
            await refused(409, "busy", **{**send, "turn": "t2", "overlap": "reject"})
            await http.command(**{**send, "turn": "t3", "body": {"x": "y" * 120_000}})
            await http.command(**{**send, "turn": "t4", "body": {"x": "y" * 120_000}})
            full = await refused(429, "rate-limited", **{**send, "turn": "t5"})
            assert json.loads(full.raw)["retryable"] is True
            too_large = await http.command(**{**send, "body": {"x": "y" * 200_000}})
            assert (too_large.status, json.loads(too_large.raw)["code"]) == (413, "too-large")
            assert "GATEWAY_MAX_BODY" in json.loads(too_large.raw)["message"]
            node._sessions.drain()
            draining = await refused(503, "draining", **{**send, "turn": "t6"})
            assert json.loads(draining.raw)["retryable"] is True


NO_COMMANDS: list[tuple[bytes, object]] = [
    (b"", None),
    (b"hello", None),
    (b"[]", None),
    (b'{"type":"ping"}', None),
    (b'{"type":"ping","id":"a"}\n{"type":"ping","id":"b"}', None),
    (b"\xff\xfe", None),
    (b"\x1f\x8b\x08\x00", None),
    (b'{"type":"dance","id":7}', 7),
    (b'{"type":"attach","id":7,"session":"s"}', 7),
    (b'{"type":"detach","id":7,"session":"s"}', 7),
    (b'{"type":"signal","id":7,"session":"s","name":"n","data":1}', 7),
    (b'{"type":"send","id":7,"session":"s","turn":"t","body":"x"}', 7),
    (b'{"type":"send","id":7,"session":"s","turn":"t","body":{},"headers":{"a":1}}', 7),
    (b'{"type":"cancel","id":7,"session":""}', 7),
]


@pytest.mark.parametrize(("body", "identifier"), NO_COMMANDS)
async def test_what_is_no_command_is_a_400_that_says_why(
    make_node: MakeNode, body: bytes, identifier: object
) -> None:
    """With its id where it had one, as on the socket."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with FallbackClient(node.address) as http:
            answer = await http.request("POST", f"{http.base}/gateway/v1/commands", data=body)
            told = json.loads(await answer.end())
            assert (answer.status, told["type"], told["code"]) == (400, "error", "bad-request")
            assert told.get("id") == identifier
            assert told["message"].startswith("unable to ")
            if b"tach" in body:
                assert "/events" in told["message"]
        assert backend.exchanges == []


async def test_a_command_that_does_not_come_ends_its_request(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that gives nothing must not hold anything for ever; nor one that gives without an end."""
    monkeypatch.setattr(requests, "BODY_SECONDS", 0.1)
    node = await make_node("http://127.0.0.1:1", max_body_bytes=100_000)
    start = f"POST /gateway/v1/commands HTTP/1.1\r\nHost: {node.address}\r\n"
    for head, body, status in (
        ("Content-Length: 100\r\n\r\n", b"{", b" 408 "),
        ("Transfer-Encoding: chunked\r\n\r\n", b"4000\r\n" + b"x" * 0x4000 + b"\r\n", b" 413 "),
    ):
        reader, writer = await asyncio.open_connection(*node.address.split(":"))
        writer.write((start + head).encode() + body * (1 if status == b" 408 " else 8))
        async with asyncio.timeout(WAIT_SECONDS):
            assert status in await reader.readuntil(b"\r\n")
        writer.transport.abort()


# -- what cannot be asked


@pytest.mark.parametrize(
    ("session", "query"),
    [
        ("s", "after=x"),
        ("s", "after="),
        ("s", "after=1.2.3.4"),
        ("s", "after=.0.&from=start"),
        ("s", "after=.0.&from=running"),
        ("s", "from="),
        ("s", "from=end"),
        ("s", "client=a%20b"),
        ("s", "client="),
        ("..", ""),
        ("%2e%2E", ""),
        ("%00", ""),
        ("a%0Ab", ""),
        ("%FF", ""),
        ("x" * 513, ""),
    ],
)
async def test_events_that_cannot_be_are_a_400(make_node: MakeNode, session: str, query: str) -> None:
    """On both carriers, before anything is attached."""
    node = await make_node("http://127.0.0.1:1")
    async with FallbackClient(node.address) as http:
        for accept in ("text/event-stream", "application/json"):
            url = f"{http.base}/gateway/v1/sessions/{session}/events?{query}"
            answer = await http.request("GET", url, headers={"Accept": accept})
            told = json.loads(await answer.end())
            assert (answer.status, told["type"], told["code"]) == (400, "error", "bad-request")
            assert told["message"].startswith("unable to ")
        assert not node._sessions._hub._tails


@pytest.mark.parametrize(
    "wait", ["-1", "31", "30.1", "x", "", "nan", "inf", "1e1", "1_0", "%D9%A1", "0x1", "%201"]
)
async def test_a_wait_that_is_no_number_of_seconds_up_to_thirty_is_refused(
    make_node: MakeNode, wait: str
) -> None:
    """A poll that waits for ever would be cut by the proxies it was made to get through."""
    node = await make_node("http://127.0.0.1:1")
    async with FallbackClient(node.address) as http:
        answer = await http.request("GET", f"{http.base}/gateway/v1/sessions/s/events?after=.0.&wait={wait}")
        assert (answer.status, json.loads(await answer.end())["code"]) == (400, "bad-request")


async def test_a_last_event_id_that_is_no_cursor_is_refused(make_node: MakeNode) -> None:
    """Every id that this stream has written is one."""
    node = await make_node("http://127.0.0.1:1")
    async with FallbackClient(node.address) as http:
        answer = await http.events("s", headers={"Last-Event-ID": "msg_1"})
        assert (answer.status, json.loads(await answer.end())["code"]) == (400, "bad-request")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "commands", "POST"),
        ("PUT", "commands", "POST"),
        ("OPTIONS", "commands", "POST"),
        ("POST", "sessions/s/events", "GET"),
        ("DELETE", "sessions/s/events", "GET"),
        ("POST", "client.js", "GET, HEAD"),
    ],
)
async def test_another_method_is_told_which_it_is(
    make_node: MakeNode, method: str, path: str, allowed: str
) -> None:
    """405 with ``Allow``, as HTTP says."""
    node = await make_node("http://127.0.0.1:1")
    async with FallbackClient(node.address) as http:
        answer = await http.request(method, f"{http.base}/gateway/v1/{path}")
        assert (answer.status, answer.headers["Allow"]) == (405, allowed)


@pytest.mark.parametrize(
    "path", ["sessions/s", "sessions//events", "sessions/a/b/events", "sessions/s/events/", "x"]
)
async def test_what_is_no_endpoint_is_a_404(make_node: MakeNode, path: str) -> None:
    """Never the backend's to answer."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with FallbackClient(node.address) as http:
            assert (await http.request("GET", f"{http.base}/gateway/v1/{path}")).status == 404
        assert backend.exchanges == []


async def test_a_foreign_page_gets_nothing(make_node: MakeNode) -> None:
    """And a page that GATEWAY_ORIGINS names may read what it gets, streams and refusals too."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url, origins="https://app.example")
        async with FallbackClient(node.address) as http:
            commands = f"{http.base}/gateway/v1/commands"
            ping = {"type": "ping", "id": 1}
            for origin, status in (("https://evil.example", 403), ("https://app.example", 200)):
                headers = {"Origin": origin}
                told = [
                    await http.events("s", headers=headers),
                    await http.request("GET", http.events_url("s"), headers=headers),
                    await http.request("POST", commands, json=ping, headers=headers),
                ]
                assert [answer.status for answer in told] == [status] * 3
                shared = origin if status == 200 else None
                assert {answer.headers.get("Access-Control-Allow-Origin") for answer in told} == {shared}
            bad = await http.request("POST", commands, data=b"x", headers={"Origin": "https://app.example"})
            assert bad.headers["Access-Control-Allow-Origin"] == "https://app.example"
            preflight = await http.request(
                "OPTIONS",
                http.events_url("s"),
                headers={
                    "Origin": "https://app.example",
                    "Access-Control-Request-Method": "GET",
                    "Access-Control-Request-Headers": "last-event-id",
                },
            )
            assert (preflight.status, preflight.headers["Access-Control-Allow-Headers"]) == (
                204,
                "last-event-id",
            )
        assert backend.exchanges == []


# -- a node that stops


async def test_a_node_that_stops_ends_streams_and_polls_as_they_should(make_node: MakeNode) -> None:
    """A clean end says: ask again; nobody waits for a node that is going."""
    node = await make_node("http://127.0.0.1:1")
    async with FallbackClient(node.address) as http:
        stream = await http.events("s")
        await stream.has(1)
        waiting = asyncio.create_task(http.poll("s", {"after": ".0.", **FOREVER}))
        await eventually(lambda: carriers_of(node, "s") == ["long-poll", "sse"])
        await node.stop()
        told = await waiting
        assert told["records"] == []
        await stream.end()
        assert stream.whole is True
        assert len(stream.events) == 1


async def test_a_node_that_stops_writes_what_is_due_first(make_node: MakeNode) -> None:
    """Who was about to be done need not come back for the end."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url, drain_seconds=60.0)
        async with FallbackClient(node.address) as http:
            await http.send("s", "t1")
            stream = await http.events("s")
            await stream.has(1 + 5)
            stopping = asyncio.create_task(node.stop())
            await eventually(lambda: node._sessions.draining)
            (await backend.exchange()).release.set()
            await stopping
            await stream.end()
            assert stream.whole is True
            assert json.loads(lines_of_stream(stream)[-1])["reason"] == "complete"


# -- read to its end, and what takes an abort back


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_what_was_read_to_its_end_is_not_told_again(make_node: MakeNode, carrier: str) -> None:
    """On any carrier, told on any other: a reload of the stock transport shows the answer once."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http, FallbackClient(node.address) as client:
            await client.send("s", "t1")
            async with following(carrier, node.address, "s") as follower:
                await eventually(lambda: len(follower.lines) == 5)
                assert (await http.stream("s")).status == 200
                (await backend.exchange()).release.set()
                await eventually(lambda: len(follower.lines) == 10)
                await eventually(lambda: was_read(node, "s"))
            told = await client.poll("s", {"from": "running"})
            assert (told["offset"], told["records"]) == (10, [])


@pytest.mark.parametrize("carrier", ["sse", "long-poll"])
async def test_what_nobody_read_to_its_end_is_told_by_the_stock_transports_stream(
    make_node: MakeNode, carrier: str
) -> None:
    """A part is not the whole: the mark is the end's alone."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http, FallbackClient(node.address) as client:
            await client.send("s", "t1")
            async with following(carrier, node.address, "s") as follower:
                await eventually(lambda: len(follower.lines) == 5)
            await eventually(lambda: not carriers_of(node, "s"))
            (await backend.exchange()).release.set()
            await eventually(lambda: not node._turns._producers)
            stream = await http.stream("s")
            await stream.end()
            assert (stream.status, stream.text) == (200, "onetwo")


async def aborted(sdk: SdkClient, backend: ScriptedBackend, node: Node) -> str:
    """A turn of the SDK's socket whose abort is pending; returns a cursor in it."""
    await sdk.send("r1", "s")
    await sdk.has("r1", 4)
    await backend.exchange()
    async with FallbackClient(node.address) as http:
        told = await http.poll("s")
    await sdk.abort("r1")
    await eventually(lambda: bool(node._turns._aborts.pending))
    cursor: str = told["cursor"]
    return cursor


async def test_a_poll_that_goes_on_takes_no_abort_back(make_node: MakeNode) -> None:
    """Another device that only watches would undo every Stop within seconds."""
    async with ScriptedBackend(never_ends) as backend:
        node = await make_node(backend.url, abort_grace_seconds=0.5)
        async with SdkClient(node.address) as sdk, FallbackClient(node.address) as http:
            resumes = metric("gateway_resumes_total", "long-poll")
            cursor = await aborted(sdk, backend, node)
            told = await http.poll("s", {"after": cursor, **FOREVER})
            assert metric("gateway_resumes_total", "long-poll") == resumes
            assert told["records"][-1]["type"] in {"chunk", "turn-end"}
            await backend.exchanges[0].closed()


@pytest.mark.parametrize("how", ["sse", "first-poll", "poll-now", "socket"])
async def test_an_attach_takes_an_abort_back(make_node: MakeNode, how: str) -> None:
    """The page was only unmounted, and is here again."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url, abort_grace_seconds=60.0)
        async with SdkClient(node.address) as sdk, FallbackClient(node.address) as http:
            cursor = await aborted(sdk, backend, node)
            async with SessionClient(node.address) as socket:
                match how:
                    case "sse":
                        await http.events("s", {"after": cursor})
                    case "first-poll":
                        await http.poll("s", {"from": "running", **FOREVER})
                    case "poll-now":
                        await http.poll("s", {"after": cursor, "wait": "0"})
                    case _:
                        await socket.ask(type="attach", session="s", **{"from": "running"})
            assert not node._turns._aborts.pending
            (await backend.exchange()).release.set()
