"""Real `useChat` on its stock HTTP transport, to a real backend, of `ai` 5, 6 and 7: through the gateway."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, get_args

import aiohttp
import pytest
from aiohttp import web

from tests.support.node import Backend, ChatClient, Major
from tests.support.node_program import WAIT_SECONDS
from tests.support.usechat import (
    GATEWAY_ID,
    HALF,
    HELD,
    OF_5,
    OF_20,
    Scenario,
    api,
    as_bytes,
    assert_model_was_stopped,
    each,
    ended,
    gone,
    nobody_attached,
    nothing_to_resume,
    part_of,
    payloads,
    questions,
    roles,
    settled,
    text_of,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from aiohttp.test_utils import TestServer as Server
    from pytest_aiohttp.plugin import AiohttpServer

    from gateway.app import Node
    from tests.support.node import ChatState, Message

    MakeNode = Callable[..., Awaitable[Node]]

pytestmark = pytest.mark.node
majors = pytest.mark.parametrize("major", get_args(Major))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend on a starved machine has longer to say that it heard the close."""
    monkeypatch.setattr("gateway.producer.HANG_UP_SECONDS", WAIT_SECONDS)


KINDS: dict[str, Scenario] = {
    "text": {"kind": "text"},
    "named": {"kind": "text", "serverMessageId": "answer-1"},
    "metadata": {"kind": "text", "metadata": True, "keepAliveMs": 1},
    "reasoning": {"kind": "reasoning"},
    "tool": {"kind": "tool"},
    "clienttool": {"kind": "clienttool"},
    "approval": {"kind": "approval"},
    "data": {"kind": "data"},
    "unicode": {"kind": "unicode"},
    "long": {"kind": "long"},
    "slow": {"kind": "slow"},
    "error": {"kind": "error"},
    "errorpart": {"kind": "errorpart"},
    "errorbefore": {"kind": "errorbefore"},
}
TURNS = {"clienttool": 2, "approval": 2}
"""The kinds that go on after an answer of the page."""


async def answer(
    client: ChatClient, url: str, backend: Backend, *, chat: str, kind: str, major: Major
) -> ChatState:
    """Ask for an answer of a kind, do what it needs, and return what the page has in the end."""
    await client.mount(url, kind, chat=chat, answerTools={"askUser": {"answer": 42}})
    await client.send(KINDS[kind], chat=chat)
    if kind == "slow":
        await backend.wait_event("request", key=kind)
        await backend.answer(kind)
    if kind == "approval" and major > 5:
        asked = await client.wait(chat=chat, status="ready", part={"state": "approval-requested"})
        await client.approve(part_of(asked["messages"][-1], "tool-deleteFile")["approval"]["id"], chat=chat)
    turns = 1 if kind == "approval" and major == 5 else TURNS.get(kind, 1)
    return await settled(client, chat=chat, finishes=turns)


def comparable(state: ChatState) -> list[Message]:
    """The assistant's messages, without what is random in them.

    A named `start` makes a message even if nothing but an error follows, whoever gave it the id.
    """
    messages = [
        message for message in state["messages"] if message["role"] == "assistant" and message["parts"]
    ]
    for message in messages:
        if message["id"] != "answer-1":
            message["id"] = "random"
        for part in message["parts"]:
            if "approval" in part:
                part["approval"]["id"] = "random"
    return messages


@majors
async def test_a_page_has_the_same_answer_as_without_the_gateway(make_node: MakeNode, major: Major) -> None:
    """Nobody should be able to tell from a message whether the gateway was there."""
    async with Backend(major) as beside, Backend(major) as behind, ChatClient(major) as client:
        node = await make_node(behind.url)
        straight, through = {}, {}
        for kind in KINDS:
            url = f"{beside.url}/api/chat"
            straight[kind] = await answer(
                client, url, beside, chat=f"straight-{kind}", kind=kind, major=major
            )
            through[kind] = await answer(
                client, api(node), behind, chat=f"through-{kind}", kind=kind, major=major
            )
    ids = {kind: state["messages"][-1]["id"] for kind, state in through.items()}
    told = {"named", "data"}
    assert [kind for kind in KINDS if not ids[kind].startswith(GATEWAY_ID)] == sorted(told, reverse=True)
    assert ids["named"] == "answer-1"
    for kind in KINDS:
        assert comparable(through[kind]) == comparable(straight[kind]), kind
        assert through[kind]["data"] == straight[kind]["data"], kind
        assert len(through[kind]["toolCalls"]) == len(straight[kind]["toolCalls"]), kind
    # The one difference: the gateway tells what the SDK keeps quiet about.
    assert (straight["error"]["status"], straight["error"]["errors"]) == ("ready", [])
    assert through["error"]["status"] == "error"
    assert "before it was finished" in through["error"]["errors"][0]["message"]
    for kind in KINDS.keys() - {"error"}:
        assert through[kind]["errors"] == straight[kind]["errors"], kind
        assert through[kind]["status"] == straight[kind]["status"], kind


class Tee:
    """A backend that hands on to another one and keeps what that answered, byte by byte."""

    def __init__(self, backend: Backend) -> None:
        self._url = backend.url
        self.answered: list[bytes] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        async with (
            aiohttp.ClientSession() as session,
            session.post(self._url + request.path, data=await request.read()) as answer,
        ):
            body = await answer.read()
            self.answered.append(body)
            return web.Response(body=body, headers={"Content-Type": answer.headers["Content-Type"]})


@majors
async def test_every_chunk_passes_byte_for_byte(
    make_node: MakeNode, aiohttp_server: AiohttpServer, major: Major
) -> None:
    """It adds a `messageId` where there is none, an error where the backend broke off, and no more."""
    async with Backend(major) as backend:
        tee = Tee(backend)
        app = web.Application()
        app.router.add_post("/api/chat", tee.handle)
        server: Server = await aiohttp_server(app)
        node = await make_node(str(server.make_url("")).rstrip("/"))
        async with aiohttp.ClientSession() as session:
            for kind in KINDS.keys() - {"slow", "data"}:
                said = {
                    "id": "u1",
                    "role": "user",
                    "parts": [{"type": "text", "text": json.dumps(KINDS[kind])}],
                }
                body = {"id": kind, "messages": [said], "trigger": "submit-message"}
                async with session.post(api(node), json=body) as response:
                    through = payloads(await response.read())
                straight = payloads(tee.answered[-1])
                if kind == "named":
                    assert straight[0] == b'{"type":"start","messageId":"answer-1"}'
                else:
                    named = json.loads(through[0])["messageId"]
                    straight[0] = straight[0][:-1] + b',"messageId":"%b"}' % named.encode()
                if kind == "error":
                    assert straight[-1] != b"[DONE]"
                    assert json.loads(through[-2])["type"] == "error"
                    straight += [through[-2], b"[DONE]"]
                assert through == straight, kind


@majors
async def test_a_reload_ends_with_the_message_of_a_page_that_never_left(
    make_node: MakeNode, major: Major
) -> None:
    """Whoever asked, whoever reloads, wherever in an answer: one message, the same bytes, the same id."""
    async with Backend(major) as backend, ChatClient(major) as stays:
        node = await make_node(backend.url)
        asked_by_who_left = [f"left-{kind}" for kind in HELD]
        asked_by_who_stays = [f"stays-{kind}" for kind in HELD]
        chats = [*asked_by_who_left, *asked_by_who_stays]

        async def show(page: ChatClient, chat: str, messages: Any = (), *, resume: bool) -> ChatState:
            kind = chat.split("-")[1]
            await page.mount(api(node), chat, chat=chat, resume=resume, messages=messages)
            if not resume:
                await page.send(HELD[kind], chat=chat)
            return await page.wait(chat=chat, status="streaming", part=HALF[kind])

        async with ChatClient(major) as leaves:
            asked = await each(asked_by_who_left, lambda chat: show(leaves, chat, resume=False))
            asked |= await each(asked_by_who_stays, lambda chat: show(stays, chat, resume=False))
            had = questions(asked)
            await each(asked_by_who_left, lambda chat: show(stays, chat, had[chat], resume=True))
            await each(asked_by_who_stays, lambda chat: show(leaves, chat, had[chat], resume=True))
            await gone(leaves)
        async with ChatClient(major) as back:
            # Who stores every message has half of this one; who stores at the end has the question.
            # (The hooks of 5 and 6 take a tool's half input for what they go on with, and show it twice.)
            had |= {
                chat: asked[chat]["messages"]
                for chat in asked_by_who_stays
                if major == 7 or chat != "stays-tool"
            }
            await each(chats, lambda chat: show(back, chat, had[chat], resume=True))
            await each(chats, backend.release)
            never_left = await each(chats, lambda chat: settled(stays, chat=chat))
            reloaded = await each(chats, lambda chat: settled(back, chat=chat))
    for chat in chats:
        assert roles(reloaded[chat]) == ["user", "assistant"], chat
        assert as_bytes(reloaded[chat]) == as_bytes(never_left[chat]), chat
        answered = reloaded[chat]["messages"][1]
        assert text_of(answered).endswith(OF_20), chat
        assert answered["id"].startswith(GATEWAY_ID) is not chat.endswith("named"), chat
        assert {part.get("state", "done") for part in answered["parts"]} <= {"done", "output-available"}, chat


@majors
async def test_an_answer_that_ended_while_its_page_reloaded_is_shown_once(
    make_node: MakeNode, major: Major
) -> None:
    """The reload that comes a second too late is the commonest way to lose an answer."""
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with ChatClient(major) as leaves:
            await leaves.mount(api(node), "c1")
            await leaves.send({"kind": "hold"})
            asked = await leaves.wait(text=OF_5)
            await gone(leaves)
        await nobody_attached(node, "c1")
        await backend.release("c1")
        await ended(node, "c1")
        async with ChatClient(major) as back:
            await back.mount(api(node), "c1", resume=True, messages=asked["messages"][:1])
            shown = await settled(back, minMessages=2)
            await nothing_to_resume(node, "c1")
            async with (
                aiohttp.ClientSession() as session,
                session.get(api(node, "/api/chat/c1/stream")) as again,
            ):
                assert again.status == 204
            await back.mount(api(node), "c1", chat="again", resume=True, messages=shown["messages"])
            told_of_nothing = 1 if major == 5 else 0  # 5 says that it finished, with nothing
            await back.wait(chat="again", status="ready", finishes=told_of_nothing)
            await back.send({"chunks": 1}, chat="again")
            more = await settled(back, chat="again", finishes=told_of_nothing + 1, minMessages=4)
        assert not backend.named("close")
    assert roles(shown) == ["user", "assistant"]
    assert shown["messages"][1]["id"] == asked["messages"][1]["id"]
    assert text_of(shown["messages"][1]) == OF_20
    assert more["messages"][:2] == shown["messages"]
    assert roles(more) == ["user", "assistant", "user", "assistant"]


@asynccontextmanager
async def two_devices(
    node: Node, major: Major, scenario: Scenario
) -> AsyncIterator[tuple[ChatClient, ChatClient]]:
    """A page that asked and one that joined, both in the middle of the answer."""
    async with ChatClient(major) as laptop, ChatClient(major) as phone:
        await laptop.mount(api(node), "c1")
        await laptop.send(scenario)
        asked = await laptop.wait(text=OF_5)
        await phone.mount(api(node), "c1", resume=True, messages=asked["messages"][:1])
        await phone.wait(text=OF_5)
        yield laptop, phone


@pytest.mark.usefixtures("patient")
@majors
async def test_the_stop_url_stops_the_model_before_it_answers(make_node: MakeNode, major: Major) -> None:
    """`success` has to mean that the backend knows; and no device may wait for the rest."""
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with two_devices(node, major, {"kind": "hold"}) as devices, aiohttp.ClientSession() as session:
            async with session.post(api(node, "/api/chat/c1/stop")) as response:
                told = await response.json()
            await assert_model_was_stopped(backend, "c1")
            laptop, phone = [await settled(device) for device in devices]
            async with session.post(api(node, "/api/chat/c1/stop")) as response:
                again = await response.json()
    assert told["success"] is True
    assert [turn["result"] for turn in told["turns"]] == ["cancelled"]
    assert again == {"success": True, "turns": []}
    assert laptop["status"] == phone["status"] == "ready"
    assert laptop["errors"] == phone["errors"] == []
    assert as_bytes(laptop) == as_bytes(phone)
    assert part_of(phone["messages"][1], "text") == {"type": "text", "text": OF_5, "state": "done"}


@pytest.mark.usefixtures("patient")
@majors
async def test_a_page_that_stops_by_the_url_and_by_the_hook_is_settled(
    make_node: MakeNode, major: Major
) -> None:
    """Three lines beside `stop()` are what the stock HTTP transport needs, in either order."""
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with two_devices(node, major, {"kind": "hold"}) as (laptop, phone):
            await laptop.stop()
            async with (
                aiohttp.ClientSession() as session,
                session.post(api(node, "/api/chat/c1/stop")) as response,
            ):
                told = await response.json()
            await assert_model_was_stopped(backend, "c1")
            stopped, watched = await settled(laptop), await settled(phone)
    assert [turn["result"] for turn in told["turns"]] == ["cancelled"]
    assert (stopped["status"], watched["status"]) == ("ready", "ready")
    assert stopped["messages"][1]["id"] == watched["messages"][1]["id"]
    assert part_of(watched["messages"][1], "text")["state"] == "done"


@majors
async def test_closing_every_page_cancels_nothing(make_node: MakeNode, major: Major) -> None:
    """A killed tab, a lost network, an unmounted component, a `stop()` without the stop URL: all detach."""
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with two_devices(node, major, {"kind": "hold"}) as (laptop, phone), ChatClient(major) as tablet:
            history = (await laptop.state())["messages"][:1]
            for chat in ("unmounted", "stopped"):
                await tablet.mount(api(node), "c1", chat=chat, resume=True, messages=history)
                await tablet.wait(chat=chat, text=OF_5)
            await tablet.unmount(chat="unmounted")
            await tablet.stop(chat="stopped")
            assert await phone.cut() >= 1
            await gone(laptop)
            await gone(tablet)
            await nobody_attached(node, "c1")
        assert await backend.release("c1") == 1
        await backend.wait_event("end", key="c1")
        await ended(node, "c1")
        said = [event["delta"] for event in backend.named("chunk", key="c1") if "delta" in event]
        assert not [
            event for event in backend.events if event["event"] in {"close", "abort", "cancel", "stop"}
        ]
        async with ChatClient(major) as back:
            await back.mount(api(node), "c1", resume=True, messages=history)
            shown = await settled(back, minMessages=2)
    assert said == list(range(20))
    assert roles(shown) == ["user", "assistant"]
    assert text_of(shown["messages"][1]) == OF_20


@majors
async def test_an_unmounted_sender_is_a_detach(make_node: MakeNode, major: Major) -> None:
    """7 calls `stop()` when its component goes, which on this wire is a closed connection."""
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        await client.mount(api(node), "c1")
        await client.send({"kind": "hold"})
        asked = await client.wait(text=OF_5)
        await client.unmount()
        if major == 7:  # the hooks of 5 and 6 read on without their component
            await nobody_attached(node, "c1")
        await client.mount(api(node), "c1", resume=True, messages=asked["messages"][:1])
        await client.wait(text=OF_5)
        assert await backend.release("c1") == 1
        shown = await settled(client)
        assert not backend.named("close")
    assert roles(shown) == ["user", "assistant"]
    assert shown["messages"][1]["id"] == asked["messages"][1]["id"]
    assert text_of(shown["messages"][1]) == OF_20


@majors
async def test_regenerated_and_edited_turns_replace_what_they_should(
    make_node: MakeNode, major: Major
) -> None:
    """A stable id must not be so stable that a new answer is taken for the old one."""
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        await client.mount(api(node), "c1")
        await client.send({"chunks": 3})
        first = await settled(client)
        await client.regenerate()
        second = await settled(client, finishes=2)
        await client.send({"chunks": 2}, messageId=first["messages"][0]["id"])
        third = await settled(client, finishes=3)
        triggers = [event["body"]["trigger"] for event in backend.named("request")]
    states = [first, second, third]
    assert triggers == ["submit-message", "regenerate-message", "submit-message"]
    assert [roles(state) for state in states] == [["user", "assistant"]] * 3
    assert len({state["messages"][0]["id"] for state in states}) == 1
    assert len({state["messages"][1]["id"] for state in states}) == 3
    assert [text_of(state["messages"][1]) for state in states] == ["tok0 tok1 tok2 "] * 2 + ["tok0 tok1 "]


@majors
async def test_a_continuation_keeps_its_message(make_node: MakeNode, major: Major) -> None:
    """A tool's result and an approval go on in the message that asked; a new id would make a second one."""
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        await client.mount(api(node), "tool", chat="tool")
        await client.send({"kind": "clienttool", "chunks": 3}, chat="tool")
        called = await client.wait(chat="tool", status="ready", toolCalls=1)
        call = called["toolCalls"][0]
        await client.add_tool_output(call["toolName"], call["toolCallId"], {"answer": 42}, chat="tool")
        before, after = [called], [await settled(client, chat="tool", finishes=2)]
        if major > 5:
            await client.mount(api(node), "approval", chat="approval")
            await client.send({"kind": "approval", "chunks": 3}, chat="approval")
            asked = await client.wait(chat="approval", status="ready", part={"state": "approval-requested"})
            approval = part_of(asked["messages"][1], "tool-deleteFile")["approval"]["id"]
            await client.approve(approval, chat="approval")
            before.append(asked)
            after.append(await settled(client, chat="approval", finishes=2))
    for one, other in zip(before, after, strict=True):
        assert roles(other) == ["user", "assistant"]
        assert [message["id"] for message in other["messages"]] == [
            message["id"] for message in one["messages"]
        ]
        assert other["messages"][1]["id"].startswith(GATEWAY_ID)
        assert text_of(other["messages"][1]) == "before tok0 tok1 tok2 "
    assert part_of(after[0]["messages"][1], "tool-askUser")["output"] == {"answer": 42}


@majors
async def test_data_before_the_start_makes_no_message_of_its_own(make_node: MakeNode, major: Major) -> None:
    """Named in the later `start` alone, what came before it would stay behind as a message of its own."""
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        await client.mount(f"{backend.url}/api/chat", "c1", chat="straight")
        await client.send({"kind": "databefore", "chunks": 3}, chat="straight")
        straight = await settled(client, chat="straight")
        await client.mount(api(node), "c1", chat="through")
        await client.send({"kind": "databefore", "chunks": 3}, chat="through")
        through = await settled(client, chat="through")
    assert through["data"] == straight["data"]
    assert roles(through) == roles(straight) == ["user", "assistant"]
    assert through["messages"][1]["parts"] == straight["messages"][1]["parts"]
    assert through["messages"][1]["id"].startswith(GATEWAY_ID)


async def test_a_whole_app_is_behind_it(make_node: MakeNode, aiohttp_server: AiohttpServer) -> None:
    """One origin for the page, its files, its other requests and its own sockets."""

    async def echo(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_str(f"{request.path_qs} {message.data}")
        return socket

    async def post(request: web.Request) -> web.Response:
        return web.Response(status=201, text=f"{request.method} {(await request.read()).decode()}")

    app = web.Application()
    app.router.add_get("/live", echo)
    app.router.add_post("/api/votes", post)
    other: Server = await aiohttp_server(app)
    async with Backend(7) as backend, aiohttp.ClientSession() as session:
        node, apps_node = await make_node(backend.url), await make_node(str(other.make_url("")).rstrip("/"))
        for path in ("/", "/main.js"):
            async with session.get(api(node, path)) as through, session.get(backend.url + path) as straight:
                assert through.status == 200
                assert through.content_type == straight.content_type
                assert await through.read() == await straight.read()
        history = [{"id": "u1", "role": "user", "parts": []}]
        async with session.put(api(node, "/api/chat/c1/messages"), json=history) as kept:
            assert await kept.json() == history
        async with session.get(api(node, "/no/such?page=1")) as missing:
            assert (missing.status, await missing.json()) == (404, {"error": "not found"})
        assert (await backend.wait_event("other", url="/no/such?page=1"))["method"] == "GET"
        async with session.post(api(apps_node, "/api/votes"), data="yes") as voted:
            assert (voted.status, await voted.text()) == (201, "POST yes")
        async with session.ws_connect(api(apps_node, "/live?room=1")) as socket:
            await socket.send_str("hello")
            async with asyncio.timeout(15):
                assert await socket.receive_str() == "/live?room=1 hello"
