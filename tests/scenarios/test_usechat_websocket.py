"""Real `useChat` of `ai` 7 on its own `WebSocketChatTransport`: the gateway is the server it has none of."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, get_args

import aiohttp
import pytest

from gateway.config import AbortPolicy
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
    questions,
    roles,
    settled,
    text_of,
    until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from gateway.app import Node
    from tests.support.node import ChatState, Message

    MakeNode = Callable[..., Awaitable[Node]]

pytestmark = pytest.mark.node

FOR_EVER = 600.0
"""A grace that no test waits for."""

KINDS: dict[str, Scenario] = {
    "text": {"kind": "text", "metadata": True},
    "named": {"kind": "text", "serverMessageId": "answer-1"},
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
}


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend on a starved machine has longer to say that it heard the close."""
    monkeypatch.setattr("gateway.producer.HANG_UP_SECONDS", WAIT_SECONDS)


async def answer(client: ChatClient, backend: Backend, kind: str, url: str, **options: Any) -> ChatState:
    """Ask for an answer of a kind, do what it needs, and return what the page has in the end."""
    chat = f"{options['transport']}-{kind}"
    await client.mount(url, kind, chat=chat, answerTools={"askUser": {"answer": 42}}, **options)
    await client.send(KINDS[kind], chat=chat)
    if kind == "slow":
        await backend.wait_event("request", key=kind)
        await backend.answer(kind)
    if kind == "approval":
        asked = await client.wait(chat=chat, status="ready", part={"state": "approval-requested"})
        await client.approve(part_of(asked["messages"][-1], "tool-deleteFile")["approval"]["id"], chat=chat)
    return await settled(client, chat=chat, finishes=2 if kind in {"clienttool", "approval"} else 1)


def comparable(state: ChatState) -> list[Message]:
    """The assistant's messages, without what is random in them."""
    messages = [message for message in state["messages"] if message["role"] == "assistant"]
    for message in messages:
        if message["id"] != "answer-1":
            message["id"] = "random"
        for part in message["parts"]:
            if "approval" in part:
                part["approval"]["id"] = "random"
    return messages


async def test_a_page_has_the_same_answer_as_over_http_without_the_gateway(make_node: MakeNode) -> None:
    """What a backend says does not depend on the wire that brings it."""
    async with Backend(7) as beside, Backend(7) as behind, ChatClient(7) as client:
        node = await make_node(behind.url)
        straight = {
            kind: await answer(client, beside, kind, f"{beside.url}/api/chat", transport="http")
            for kind in KINDS
        }
        through = {
            kind: await answer(client, behind, kind, api(node), transport="websocket") for kind in KINDS
        }
        posted = [
            [event["body"] for event in backend.named("request", key="clienttool")]
            for backend in (beside, behind)
        ]
    ids = {kind: state["messages"][-1]["id"] for kind, state in through.items()}
    assert {kind for kind in KINDS if not ids[kind].startswith(GATEWAY_ID)} == {"named", "data"}
    for kind in KINDS:
        assert comparable(through[kind]) == comparable(straight[kind]), kind
        assert through[kind]["data"] == straight[kind]["data"], kind
        assert len(through[kind]["toolCalls"]) == len(straight[kind]["toolCalls"]), kind
        if kind != "error":
            assert through[kind]["errors"] == straight[kind]["errors"], kind
    assert "before it was finished" in through["error"]["errors"][0]["message"]
    assert [sorted(body) for body in posted[0]] == [sorted(body) for body in posted[1]]


async def test_a_reload_ends_with_the_message_of_a_page_that_never_left(make_node: MakeNode) -> None:
    """The SDK's own socket always replays from the first chunk; the page must not notice."""
    async with Backend(7) as backend, ChatClient(7) as stays:
        node = await make_node(backend.url)
        asked_by_who_left = [f"left-{kind}" for kind in HELD]
        asked_by_who_stays = [f"stays-{kind}" for kind in HELD]
        chats = [*asked_by_who_left, *asked_by_who_stays]

        async def show(page: ChatClient, chat: str, messages: Any = (), *, resume: bool) -> ChatState:
            kind = chat.split("-")[1]
            facts = {"resume": resume, "messages": messages}
            await page.mount(api(node), chat, chat=chat, transport="websocket", **facts)
            if not resume:
                await page.send(HELD[kind], chat=chat)
            return await page.wait(chat=chat, status="streaming", part=HALF[kind])

        async with ChatClient(7) as leaves:
            asked = await each(asked_by_who_left, lambda chat: show(leaves, chat, resume=False))
            asked |= await each(asked_by_who_stays, lambda chat: show(stays, chat, resume=False))
            had = questions(asked)
            await each(asked_by_who_left, lambda chat: show(stays, chat, had[chat], resume=True))
            await each(asked_by_who_stays, lambda chat: show(leaves, chat, had[chat], resume=True))
            await gone(leaves)
        async with ChatClient(7) as back:
            had |= {chat: asked[chat]["messages"] for chat in asked_by_who_stays if chat != "stays-tool"}
            await each(chats, lambda chat: show(back, chat, had[chat], resume=True))
            await each(chats, backend.release)
            never_left = await each(chats, lambda chat: settled(stays, chat=chat))
            reloaded = await each(chats, lambda chat: settled(back, chat=chat))
    for chat in chats:
        assert roles(reloaded[chat]) == ["user", "assistant"], chat
        assert as_bytes(reloaded[chat]) == as_bytes(never_left[chat]), chat
        assert text_of(reloaded[chat]["messages"][1]).endswith(OF_20), chat


async def test_an_answer_that_ended_while_its_page_reloaded_is_shown_once(make_node: MakeNode) -> None:
    """And a second reload is told `no-active`, so that no page streams what it has."""
    async with Backend(7) as backend:
        node = await make_node(backend.url)
        async with ChatClient(7) as leaves:
            await leaves.mount(api(node), "c1", transport="websocket")
            await leaves.send({"kind": "hold"})
            asked = await leaves.wait(text=OF_5)
            await gone(leaves)
        await nobody_attached(node, "c1")
        await backend.release("c1")
        await ended(node, "c1")
        resumed: dict[str, Any] = {"transport": "websocket", "resume": True}
        async with ChatClient(7) as back:
            await back.mount(api(node), "c1", messages=asked["messages"][:1], **resumed)
            shown = await settled(back, minMessages=2)
            await nothing_to_resume(node, "c1")
            async with aiohttp.ClientSession() as session, session.ws_connect(api(node)) as socket:
                await socket.send_json({"type": "resume", "requestId": "r1", "id": "c1"})
                told = await socket.receive_json(timeout=15)
            await back.mount(api(node), "c1", chat="again", messages=shown["messages"], **resumed)
            await back.send({"chunks": 1}, chat="again")
            more = await settled(back, chat="again", minMessages=4)
        assert not backend.named("close")
    assert told == {"type": "no-active", "requestId": "r1"}
    assert roles(shown) == ["user", "assistant"]
    assert shown["messages"][1]["id"] == asked["messages"][1]["id"]
    assert text_of(shown["messages"][1]) == OF_20
    assert more["messages"][:2] == shown["messages"]
    assert roles(more) == ["user", "assistant", "user", "assistant"]


@asynccontextmanager
async def two_devices(
    node: Node, *, phone_transport: str = "websocket", phone_major: Major = 7
) -> AsyncIterator[tuple[ChatClient, ChatClient]]:
    """A page that asked over its socket and one that joined, both in the middle of the answer."""
    async with ChatClient(7) as laptop, ChatClient(phone_major) as phone:
        await laptop.mount(api(node), "c1", transport="websocket")
        await laptop.send({"kind": "hold"})
        asked = await laptop.wait(text=OF_5)
        joined: dict[str, Any] = {"transport": phone_transport, "messages": asked["messages"][:1]}
        await phone.mount(api(node), "c1", resume=True, **joined)
        await phone.wait(text=OF_5)
        yield laptop, phone


@pytest.mark.parametrize("major", get_args(Major))
async def test_a_device_of_another_wire_and_major_sees_the_same(make_node: MakeNode, major: Major) -> None:
    """One journal, three wires: what was asked over a socket of 7 is followed over HTTP by 5, 6 and 7."""
    async with Backend(7) as backend:
        node = await make_node(backend.url)
        async with two_devices(node, phone_transport="http", phone_major=major) as (laptop, phone):
            await backend.release("c1")
            asked, joined = await settled(laptop), await settled(phone)
    assert as_bytes(asked) == as_bytes(joined)
    assert text_of(joined["messages"][1]) == OF_20


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    "policy", [{"abort": AbortPolicy.CANCEL}, {"abort": AbortPolicy.GRACE, "abort_grace_seconds": 0.05}]
)
async def test_a_stop_stops_the_model_before_the_other_device_is_told(
    make_node: MakeNode, policy: dict[str, Any]
) -> None:
    """`stop()` is all that its users have; a phone that shows the chat must not stream for ever."""
    async with Backend(7) as backend:
        node = await make_node(backend.url, **policy)
        async with two_devices(node) as (laptop, phone):
            await laptop.stop()
            watched = await settled(phone)
            await assert_model_was_stopped(backend, "c1")
            stopped = await settled(laptop)
    assert (stopped["status"], watched["status"]) == ("ready", "ready")
    assert watched["errors"] == []
    assert stopped["finishes"][0]["isAbort"] is True
    assert part_of(watched["messages"][1], "text") == {"type": "text", "text": OF_5, "state": "done"}
    assert watched["messages"][1]["id"] == stopped["messages"][1]["id"]


async def test_an_unmount_that_is_resumed_within_the_grace_is_no_stop(make_node: MakeNode) -> None:
    """7 sends the same `abort` when a component goes, as on a way to another page and back."""
    async with Backend(7) as backend, ChatClient(7) as client:
        node = await make_node(backend.url, abort_grace_seconds=FOR_EVER)
        pending = node._turns._aborts.pending

        async def aborts() -> int:
            return len(pending)

        await client.mount(api(node), "c1", transport="websocket")
        await client.send({"kind": "hold"})
        asked = await client.wait(text=OF_5)
        await client.unmount()
        await until(aborts, lambda count: count == 1)
        await client.mount(
            api(node), "c1", transport="websocket", resume=True, messages=asked["messages"][:1]
        )
        await client.wait(text=OF_5)
        await until(aborts, lambda count: count == 0)
        assert await backend.release("c1") == 1
        shown = await settled(client)
        assert not backend.named("close")
    assert roles(shown) == ["user", "assistant"]
    assert shown["messages"][1]["id"] == asked["messages"][1]["id"]
    assert text_of(shown["messages"][1]) == OF_20


async def test_an_unmount_is_a_detach_where_the_policy_says_so(make_node: MakeNode) -> None:
    """For apps that have a stop button of their own, which uses the stop URL."""
    async with Backend(7) as backend, ChatClient(7) as client:
        node = await make_node(backend.url, abort=AbortPolicy.DETACH)
        await client.mount(api(node), "c1", transport="websocket")
        await client.send({"kind": "hold"})
        await client.wait(text=OF_5)
        await client.unmount()
        await nobody_attached(node, "c1")  # the abort has come
        assert await backend.release("c1") == 1
        await backend.wait_event("end", key="c1")
        assert not backend.named("close")


async def test_killing_every_page_cancels_nothing(make_node: MakeNode) -> None:
    """A closed socket says nothing, whoever it was; the answer is there afterwards."""
    async with Backend(7) as backend:
        node = await make_node(backend.url, abort=AbortPolicy.CANCEL)
        async with two_devices(node) as (laptop, phone):
            history = (await laptop.state())["messages"][:1]
            assert await phone.cut() >= 1
            await gone(laptop)
            await nobody_attached(node, "c1")
        assert await backend.release("c1") == 1
        await backend.wait_event("end", key="c1")
        await ended(node, "c1")
        said = [event["delta"] for event in backend.named("chunk", key="c1") if "delta" in event]
        assert not [event for event in backend.events if event["event"] in {"close", "abort", "cancel"}]
        async with ChatClient(7) as back:
            await back.mount(api(node), "c1", transport="websocket", resume=True, messages=history)
            shown = await settled(back, minMessages=2)
    assert said == list(range(20))
    assert roles(shown) == ["user", "assistant"]
    assert text_of(shown["messages"][1]) == OF_20


async def test_regenerated_edited_and_continued_turns_have_the_ids_they_should(make_node: MakeNode) -> None:
    """A new answer is a new message; the rest of an answer is none."""
    async with Backend(7) as backend, ChatClient(7) as client:
        node = await make_node(backend.url)
        await client.mount(api(node), "c1", transport="websocket")
        await client.send({"chunks": 3})
        states = [await settled(client)]
        await client.regenerate()
        states.append(await settled(client, finishes=2))
        await client.send({"kind": "clienttool", "chunks": 2}, messageId=states[0]["messages"][0]["id"])
        states.append(await client.wait(status="ready", toolCalls=1))
        call = states[-1]["toolCalls"][0]
        await client.add_tool_output(call["toolName"], call["toolCallId"], {"answer": 42})
        continued = await settled(client, finishes=4)
        posted = [event["body"] for event in backend.named("request")]
    assert [roles(state) for state in [*states, continued]] == [["user", "assistant"]] * 4
    assert len({state["messages"][0]["id"] for state in states}) == 1
    assert len({state["messages"][1]["id"] for state in states}) == 3
    assert continued["messages"][1]["id"] == states[-1]["messages"][1]["id"]
    assert text_of(continued["messages"][1]) == "before tok0 tok1 "
    assert part_of(continued["messages"][1], "tool-askUser")["output"] == {"answer": 42}
    assert [body["trigger"] for body in posted] == ["submit-message", "regenerate-message"] + [
        "submit-message"
    ] * 2
    assert [body.get("messageId") for body in posted[2:]] == [
        states[0]["messages"][0]["id"],
        states[-1]["messages"][1]["id"],
    ]
