"""Where an attach begins when it brings no cursor, on each carrier, and what it is told of its place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from gateway.telemetry import registry
from tests.support.backend import ScriptedBackend, answers, until_released
from tests.support.client import SessionClient
from tests.support.fallback import CARRIERS, following
from tests.support.wires import HttpChat, eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.app import Node

    MakeNode = Callable[..., Awaitable[Node]]

ANSWER = 10
"""Records of one short answer: its start, seven or eight chunks, its end."""

RUNNING = {"from": "running"}


async def answer_unread(node: Node, backend: ScriptedBackend, session: str) -> str:
    """A turn that ended while nobody was there; returns its id."""
    async with HttpChat(node.address) as http:
        posted = await http.post(session)
        await posted.has(4)
        await posted.cut()
    await eventually(lambda: not node._sessions._hub._tails)
    backend.exchanges[-1].release.set()
    await eventually(lambda: not node._turns._producers)
    return posted.turn


def unread(node: Node, session: str) -> Callable[[], Awaitable[bool]]:
    """Whether the newest ended turn has not been read to its end yet."""

    async def look() -> bool:
        found = await node._sessions._look(session)  # type: ignore[arg-type]  # a test names it
        return any(not turn.was_read for turn in found.turns if not turn.is_running)

    return look


async def read_all(node: Node, session: str) -> None:
    """Read what a session has, to its end."""
    async with following("websocket", node.address, session) as reader:
        await eventually(lambda: len(reader.lines) == reader.attached["last"])

        async def is_read() -> bool:
            return not await unread(node, session)()

        await eventually(is_read)


def place_told(attached: dict[str, Any]) -> tuple[int, int]:
    return attached["offset"], attached["last"]


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_reload_gets_the_oldest_running_turn_and_nothing_older(
    make_node: MakeNode, carrier: str
) -> None:
    """A chat of a year would be sent again with each reload; a second answer that runs must not be missed."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as page:
            await page.send("s", "old")
            (await backend.exchange()).release.set()
            await page.ended("old")
            await page.send("s", "first")
            await page.send("s", "second")
            await page.wait(lambda line: line.get("turn") != "old" and "data" in line, count=8)
            async with following(carrier, node.address, "s", **RUNNING) as reload:
                await eventually(lambda: len(reload.lines) == ANSWER)
                assert [record["type"] for record in reload.records[:1]] == ["turn-start"]
                assert {record["turn"] for record in reload.records} == {"first", "second"}
                assert reload.attached["turns"] == [
                    {"turn": "first", "state": "running", "offset": ANSWER + 1},
                    {"turn": "second", "state": "running", "offset": reload.attached["turns"][1]["offset"]},
                    {"turn": "old", "state": "complete", "offset": 1},
                ]
                assert "resync" not in reload.attached
                for number in (1, 2):
                    (await backend.exchange(number)).release.set()
                await eventually(lambda: len(reload.lines) == 2 * ANSWER)
                assert reload.offsets == list(range(ANSWER + 1, 3 * ANSWER + 1))


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_an_answer_that_ended_unread_is_told_once(make_node: MakeNode, carrier: str) -> None:
    """Whose only page was reloading when it ended must find it; the next reload must not show it again."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http:
            await answer_unread(node, backend, "s")
            newest = await answer_unread(node, backend, "s")
            async with following(carrier, node.address, "s", **RUNNING) as reload:
                await eventually(lambda: len(reload.lines) == ANSWER)
                assert reload.offsets == list(range(ANSWER + 1, 2 * ANSWER + 1))
                assert reload.attached["turns"][0]["turn"] == newest

                async def is_read() -> bool:
                    return not await unread(node, "s")()

                await eventually(is_read)
            assert (await http.stream("s")).status == 204
            async with following(carrier, node.address, "s", **RUNNING) as reload:
                assert place_told(reload.attached) == (2 * ANSWER, 2 * ANSWER)
                assert reload.lines == []


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_what_ended_unread_is_left_out_while_something_runs(make_node: MakeNode, carrier: str) -> None:
    """A reload is in the middle of the turn that runs; what ended before it is the app's to load."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        await answer_unread(node, backend, "s")
        async with SessionClient(node.address) as page:
            await page.send("s", "t2")
            await page.wait(lambda line: line["type"] == "chunk", count=4)
            assert await unread(node, "s")()
            async with following(carrier, node.address, "s", **RUNNING) as reload:
                await eventually(lambda: len(reload.lines) == 5)
                assert reload.offsets == list(range(ANSWER + 1, ANSWER + 6))
            (await backend.exchange(1)).release.set()


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_where_nothing_runs_and_all_was_read_only_what_comes_is_told(
    make_node: MakeNode, carrier: str
) -> None:
    """And its cursor is as good as a record's: it names the turn that it stands in."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as page:
            await page.send("s", "t1")
            end = await page.ended("t1")
            await read_all(node, "s")
            async with following(carrier, node.address, "s", **RUNNING) as reload:
                assert place_told(reload.attached) == (ANSWER, ANSWER)
                assert reload.attached["cursor"] == end["cursor"]
                await page.send("s", "t2")
                await eventually(lambda: len(reload.lines) == ANSWER)
                assert reload.offsets == list(range(ANSWER + 1, 2 * ANSWER + 1))


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("start", ["start", "running"])
async def test_an_unknown_session_is_empty_and_tells_what_comes(
    make_node: MakeNode, carrier: str, start: str
) -> None:
    """A new chat is attached to before its first send; nothing is created by it."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with following(carrier, node.address, "new", **{"from": start}) as follower:
            assert place_told(follower.attached) == (0, 0)
            assert (follower.attached["turns"], follower.lines) == ([], [])
            async with SessionClient(node.address) as page:
                await page.send("new", "t1")
                await eventually(lambda: len(follower.lines) == ANSWER)
            assert follower.offsets == list(range(1, ANSWER + 1))


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_an_attach_is_told_how_far_behind_it_is(make_node: MakeNode, carrier: str) -> None:
    """A page that shows "catching up" must know when it has caught up."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as page:
            await page.send("s", "t1")
            await page.ended("t1")
            await read_all(node, "s")
            async with following(carrier, node.address, "s", after=page.records[3]["cursor"]) as behind:
                await eventually(lambda: len(behind.lines) == ANSWER - 4)
                if carrier != "long-poll":  # whose answer tells where to continue
                    assert behind.attached["offset"] == 4
                assert behind.attached["last"] == ANSWER
            async with following(carrier, node.address, "s", **{"from": "start"}) as whole:
                await eventually(lambda: len(whole.lines) == ANSWER)
                assert whole.attached["last"] == ANSWER
            async with following(carrier, node.address, "s") as default:
                await eventually(lambda: default.lines == whole.lines)


async def test_a_socket_moves_to_a_start_it_names(make_node: MakeNode) -> None:
    """Attached already, the place moves: to what runs as well as to a cursor."""
    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as page:
            await page.send("s", "t1")
            (await backend.exchange()).release.set()
            await page.ended("t1")
            await page.send("s", "t2")
            await page.wait(lambda line: line.get("turn") == "t2" and "data" in line, count=4)
            reply = await page.ask(type="attach", session="s", **RUNNING)
            assert (reply["type"], reply["offset"]) == ("attached", ANSWER)
            await page.wait(lambda line: line.get("turn") == "t2" and "data" in line, count=8)
            assert page.offsets == [*range(1, ANSWER + 6), *range(ANSWER + 1, ANSWER + 6)]
            (await backend.exchange(1)).release.set()


async def test_a_cursor_and_a_start_exclude_each_other(make_node: MakeNode) -> None:
    """One of them is not meant; guessing would lose records, or tell them twice."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as page:
            for start in ("start", "running"):
                reply = await page.ask(type="attach", session="s", after=".0.", **{"from": start})
                assert (reply["type"], reply["code"]) == ("error", "bad-request")
            reply = await page.ask(type="attach", session="s", **{"from": "end"})
            assert (reply["type"], reply["code"]) == ("error", "bad-request")


async def test_joining_a_turn_that_runs_counts_as_a_resume(make_node: MakeNode) -> None:
    """Operators see how often pages come back; an idle chat that is opened is none."""

    def resumes() -> float:
        value = registry.get_sample_value("gateway_resumes_total", {"carrier": "websocket"})
        assert value is not None
        return value

    async with ScriptedBackend(until_released) as backend:
        node = await make_node(backend.url)
        async with SessionClient(node.address) as sender, SessionClient(node.address) as page:
            await sender.send("s", "t1")
            before = resumes()
            await page.ask(type="attach", session="s", **RUNNING)
            assert resumes() == before + 1
            (await backend.exchange()).release.set()
            await sender.ended("t1")
            await page.ended("t1")
            await page.ask(type="attach", session="s", **RUNNING)
            await page.ask(type="attach", session="unknown", **RUNNING)
            assert resumes() == before + 1
