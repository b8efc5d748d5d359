"""Real `useChat` of `ai` 5, 6 and 7 on this project's `GatewayChatTransport`: one device."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING, Any, get_args

import pytest

from tests.support.network import Network
from tests.support.node import Backend, ChatClient, Major
from tests.support.node_program import WAIT_SECONDS
from tests.support.process import GatewayProcess
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
    part_of,
    questions,
    roles,
    settled,
    text_of,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.app import Node
    from tests.support.node import ChatState, Message

    MakeNode = Callable[..., Awaitable[Node]]

pytestmark = pytest.mark.node
majors = pytest.mark.parametrize("major", get_args(Major))

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
    "errorbefore": {"kind": "errorbefore"},
}

NO_ERROR: list[Any] = []


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend on a starved machine has longer to say that it heard the close."""
    monkeypatch.setattr("gateway.producer.HANG_UP_SECONDS", WAIT_SECONDS)


async def mount(client: ChatClient, node: Node, chat_id: str = "c1", **options: Any) -> ChatState:
    return await client.mount(api(node), chat_id, transport="gateway", **options)


async def approved(client: ChatClient, *, chat: str) -> None:
    """Say yes to what the answer asks for."""
    asked = await client.wait(chat=chat, status="ready", part={"state": "approval-requested"})
    await client.approve(part_of(asked["messages"][-1], "tool-deleteFile")["approval"]["id"], chat=chat)


async def answer(client: ChatClient, backend: Backend, kind: str, url: str, **options: Any) -> ChatState:
    """Ask for an answer of a kind, do what it needs, and return what the page has in the end."""
    chat = f"{options['transport']}-{kind}"
    await client.mount(url, kind, chat=chat, answerTools={"askUser": {"answer": 42}}, **options)
    await client.send(KINDS[kind], chat=chat)
    if kind == "slow":
        await backend.wait_event("request", key=kind)
        await backend.answer(kind)
    goes_on = kind == "clienttool" or (kind == "approval" and client.major > 5)
    if kind == "approval" and goes_on:
        await approved(client, chat=chat)
    return await settled(client, chat=chat, finishes=2 if goes_on else 1)


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


def stories(state: ChatState) -> list[dict[str, Any]]:
    """How the answers ended, for `onFinish`."""
    return [{**finish, "messageId": None} for finish in state["finishes"]]


@majors
async def test_a_page_has_the_same_answer_as_over_http_without_the_gateway(
    make_node: MakeNode, major: Major
) -> None:
    """One line is changed in `useChat`: parts, data, tools, approvals, errors and callbacks are as before."""
    async with Backend(major) as beside, Backend(major) as behind, ChatClient(major) as client:
        node = await make_node(behind.url)
        straight = {
            kind: await answer(client, beside, kind, f"{beside.url}/api/chat", transport="http")
            for kind in KINDS
        }
        through = {kind: await answer(client, behind, kind, api(node), transport="gateway") for kind in KINDS}
        posted = [
            [sorted(event["body"]) for kind in KINDS for event in backend.named("request", key=kind)]
            for backend in (beside, behind)
        ]
    for kind in KINDS:
        assert comparable(through[kind]) == comparable(straight[kind]), kind
        assert through[kind]["data"] == straight[kind]["data"], kind
        assert len(through[kind]["toolCalls"]) == len(straight[kind]["toolCalls"]), kind
        if kind != "error":
            assert through[kind]["errors"] == straight[kind]["errors"], kind
            assert through[kind]["status"] == straight[kind]["status"], kind
            assert stories(through[kind]) == stories(straight[kind]), kind
    assert posted[0] == posted[1]


@pytest.mark.usefixtures("patient")
@majors
async def test_the_stop_of_the_hook_stops_the_model(make_node: MakeNode, major: Major) -> None:
    """A Stop costs nothing more, and what was said stays as a finished message that can be answered."""
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        await mount(client, node)
        await client.send({"kind": "hold"})
        await client.wait(text=OF_5)
        await client.stop()
        stopped = await settled(client)
        await assert_model_was_stopped(backend, "c1")
        await client.send({"chunks": 1})
        more = await settled(client, finishes=2)
    assert (stopped["status"], stopped["errors"]) == ("ready", NO_ERROR)
    assert part_of(stopped["messages"][1], "text") == {"type": "text", "text": OF_5, "state": "done"}
    (finish,) = stopped["finishes"]
    assert (finish["isAbort"], finish["isDisconnect"], finish["isError"]) == (True, False, False)
    assert stopped["lastTurnEnd"]["reason"] == "cancelled"
    assert stopped["lastTurnEnd"]["by"]["client"] == stopped["client"]
    assert more["messages"][:2] == stopped["messages"]
    assert text_of(more["messages"][3]) == "tok0 "


@pytest.mark.usefixtures("patient")
@majors
async def test_a_stop_before_the_first_word_stops_the_model_as_well(
    make_node: MakeNode, major: Major
) -> None:
    """People stop while nothing shows yet."""
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        await mount(client, node)
        await client.send({"kind": "slow"})
        await backend.wait_event("request", key="c1")
        await client.stop()
        stopped = await settled(client)
        await backend.wait_event("close", key="c1")
    assert (stopped["status"], stopped["errors"]) == ("ready", NO_ERROR)
    assert [finish["isAbort"] for finish in stopped["finishes"]] == [True]
    assert [end["reason"] for end in stopped["ends"]] == ["cancelled"]


@pytest.mark.usefixtures("patient")
@majors
async def test_what_is_asked_right_after_a_stop_is_answered(make_node: MakeNode, major: Major) -> None:
    """A Stop ends what ran when it was pressed, and touches the next neither at the backend nor here."""
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        await mount(client, node)
        await client.send({"kind": "hold", "key": "one"})
        await client.wait(text=OF_5)
        await asyncio.gather(client.stop(), client.send({"kind": "hold", "key": "two"}))
        await assert_model_was_stopped(backend, "one")
        await client.wait(text=OF_5, minMessages=4)
        assert await backend.release("two") == 1
        shown = await settled(client, finishes=2, ends=2)
    assert [text_of(message) for message in shown["messages"][1::2]] == [OF_5, OF_20]
    assert [end["reason"] for end in shown["ends"]] == ["cancelled", "complete"]
    assert [finish["isAbort"] for finish in shown["finishes"]] == [True, False]
    assert (shown["status"], shown["errors"]) == ("ready", NO_ERROR)


@majors
async def test_the_sdks_own_stop_is_a_detach_or_a_cancel_as_the_option_says(
    make_node: MakeNode, major: Major
) -> None:
    """Its signal cannot tell a Stop from an unmount: nothing ends, unless the page says that it should."""
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        for chat, policy in {"kept": {}, "ended": {"onAbort": "cancel"}}.items():
            await mount(client, node, chat, chat=chat, hook="useChat", **policy)
            await client.send({"kind": "hold"}, chat=chat)
            await client.wait(chat=chat, text=OF_5)
            await client.stop(chat=chat)
        stopped = await each(("kept", "ended"), lambda chat: settled(client, chat=chat))
        await backend.wait_event("close", key="ended")
        assert await backend.release("kept") == 1
        await backend.wait_event("end", key="kept")
    for state in stopped.values():
        assert (state["status"], state["errors"]) == ("ready", NO_ERROR)
        assert [finish["isAbort"] for finish in state["finishes"]] == [True]


@majors
async def test_regenerated_and_edited_turns_replace_what_they_should(
    make_node: MakeNode, major: Major
) -> None:
    """A stable id must not be so stable that a new answer is taken for the old one."""
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        await mount(client, node)
        await client.send({"chunks": 3})
        states = [await settled(client)]
        question, first = states[0]["messages"]
        await client.regenerate()
        states.append(await settled(client, finishes=2))
        await client.regenerate(messageId=states[1]["messages"][1]["id"])
        states.append(await settled(client, finishes=3))
        await client.send({"chunks": 2}, messageId=question["id"])
        states.append(await settled(client, finishes=4))
        posted = [event["body"] for event in backend.named("request")]
    assert [body["trigger"] for body in posted] == [
        "submit-message",
        *["regenerate-message"] * 2,
        "submit-message",
    ]
    assert [body.get("messageId") for body in posted] == [
        None,
        None,
        states[1]["messages"][1]["id"],
        question["id"],
    ]
    assert [len(body["messages"]) for body in posted] == [1] * 4
    assert [roles(state) for state in states] == [["user", "assistant"]] * 4
    assert len({state["messages"][0]["id"] for state in states}) == 1
    assert len({state["messages"][1]["id"] for state in states}) == 4
    assert first["id"].startswith(GATEWAY_ID)
    assert [text_of(state["messages"][1]) for state in states] == ["tok0 tok1 tok2 "] * 3 + ["tok0 tok1 "]
    assert all(state["errors"] == NO_ERROR for state in states)


@majors
async def test_a_continuation_keeps_its_message(make_node: MakeNode, major: Major) -> None:
    """A tool's result and an approval go on in the message that asked, and are sent once."""
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        await mount(client, node, "tool", chat="tool", answerTools={"askUser": {"answer": 42}})
        await client.send({"kind": "clienttool", "chunks": 3}, chat="tool")
        after = {"tool": await settled(client, chat="tool", finishes=2)}
        if major > 5:
            await mount(client, node, "approval", chat="approval")
            await client.send({"kind": "approval", "chunks": 3}, chat="approval")
            await approved(client, chat="approval")
            after["approval"] = await settled(client, chat="approval", finishes=2)
        asked = {chat: backend.named("request", id=chat) for chat in after}
    for chat, state in after.items():
        assert roles(state) == ["user", "assistant"], chat
        assert len(asked[chat]) == 2, chat
        assert asked[chat][1]["body"]["messageId"] == state["messages"][1]["id"], chat
        assert text_of(state["messages"][1]) == "before tok0 tok1 tok2 ", chat
    assert part_of(after["tool"]["messages"][1], "tool-askUser")["output"] == {"answer": 42}


@majors
async def test_an_answer_that_failed_says_why(make_node: MakeNode, major: Major) -> None:
    """A page can tell a full quota from a broken backend, and what was said before is kept."""
    refusal = {"kind": "refuse", "status": 429, "headers": {"retry-after": "7"}, "body": "too many"}
    scenarios: dict[str, Scenario] = {
        "refused": refusal,
        "cut": {"kind": "hold"},
        "ended": {"kind": "error"},
        "said": {"kind": "errorpart"},
    }
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        for chat, scenario in scenarios.items():
            await mount(client, node, chat, chat=chat)
            await client.send(scenario, chat=chat)
        await client.wait(chat="cut", text=OF_5)
        assert await backend.cut("cut") == 1
        failed = await each(scenarios, lambda chat: settled(client, chat=chat, ends=1))
        await client.clear_error(chat="refused")
        await client.send({"chunks": 1}, chat="refused")
        again = await settled(client, chat="refused", finishes=2)
    errors = {chat: state["errors"] for chat, state in failed.items()}
    assert [len(told) for told in errors.values()] == [1] * 4
    for chat, state in failed.items():
        assert state["status"] == "error", chat
        (finish,) = state["finishes"]
        assert (finish["isAbort"], finish["isDisconnect"], finish["isError"]) == (False, False, True), chat
        assert [end["reason"] for end in state["ends"]] == ["error"], chat
    told = {chat: error["name"] for chat, (error,) in errors.items()}
    assert told == {"refused": "TurnError", "cut": "TurnError", "ended": "TurnError", "said": "Error"}
    (refused,) = errors["refused"]
    assert (refused["code"], refused["status"], refused["retryAfter"]) == ("upstream-refused", 429, 7)
    assert [errors[chat][0]["code"] for chat in ("cut", "ended")] == ["upstream-cut-off"] * 2
    assert text_of(failed["cut"]["messages"][1]) == OF_5
    assert text_of(failed["said"]["messages"][1]) == OF_20
    assert (again["status"], text_of(again["messages"][-1])) == ("ready", "tok0 ")


@majors
async def test_an_answer_whose_node_was_killed_is_interrupted(
    valkey_url: str, make_config: Callable[..., Any], major: Major
) -> None:
    """Another node ends it; the page is told by that one, without being asked anything."""
    async with Backend(major) as backend, ChatClient(major) as client:
        config = make_config(backend.url)
        settings = {
            "upstream": backend.url,
            "redis_url": valkey_url,
            "key_prefix": config.key_prefix,
            "lease": 0.5,
        }
        async with GatewayProcess(**settings) as doomed, GatewayProcess(**settings) as other:
            await doomed.started()
            await other.started()
            async with Network(doomed.address) as network:
                url = f"http://{network.address}/api/chat"
                await client.mount(url, "c1", transport="gateway", timing={"backoffBaseMs": 20})
                await client.send({"kind": "hold"})
                await client.wait(text=OF_5)
                network.target = other.address
                await doomed.kill()
                told = await settled(client)
    (error,) = told["errors"]
    assert (told["status"], error["reason"], error["code"]) == ("error", "interrupted", "node-lost")
    assert [end["reason"] for end in told["ends"]] == ["interrupted"]
    assert text_of(told["messages"][1]) == OF_5


@majors
async def test_two_chats_of_a_page_have_one_connection_and_a_turn_each(
    make_node: MakeNode, major: Major
) -> None:
    """One transport serves a page; answers that run together must not mix."""
    chats = ("c1", "c2")
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        async with Network(node.address) as network:
            for chat in chats:
                url = f"http://{network.address}/api/chat"
                await client.mount(url, chat, chat=chat, transport="gateway", transportName="page")
            await each(
                chats, lambda chat: client.send({"kind": "hold", "chunks": 6 + int(chat[1])}, chat=chat)
            )
            await each(chats, lambda chat: client.wait(chat=chat, text=OF_5))
            assert network.accepted == 1
            await each(chats, backend.release)
            await each(chats, lambda chat: settled(client, chat=chat, ends=1))
            states = await each(chats, lambda chat: client.state(chat=chat))
        assert [len(backend.named("request", id=chat)) for chat in chats] == [1, 1]
    assert [text_of(states[chat]["messages"][1]) for chat in chats] == [
        OF_5 + "tok5 tok6 ",
        OF_5 + "tok5 tok6 tok7 ",
    ]
    assert [state["ends"] for state in states.values()] == [
        [state["lastTurnEnd"]] for state in states.values()
    ]


@majors
async def test_a_question_asked_before_the_gateway_is_up_is_answered_once(
    make_node: MakeNode, major: Major
) -> None:
    """Whoever asks in a tunnel is answered at its end."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        listen = f"127.0.0.1:{reserved.getsockname()[1]}"
    async with Backend(major) as backend, ChatClient(major) as client:
        timing = {"backoffBaseMs": 20, "backoffMaxMs": 50}
        await client.mount(f"http://{listen}/api/chat", "c1", transport="gateway", timing=timing)
        await client.send({"chunks": 3})
        waiting = await client.wait(connection="offline")
        await make_node(backend.url, listen=listen)
        shown = await settled(client)
        assert len(backend.named("request")) == 1
    assert (waiting["status"], waiting["errors"]) == ("submitted", NO_ERROR)
    assert (shown["status"], shown["errors"]) == ("ready", NO_ERROR)
    assert roles(shown) == ["user", "assistant"]
    assert text_of(shown["messages"][1]) == "tok0 tok1 tok2 "


@majors
async def test_a_question_asked_offline_goes_out_when_the_network_is_back(
    make_node: MakeNode, major: Major
) -> None:
    """At once on the browser's word, not when some backoff is over: here it would outlast the test."""
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        async with Network(node.address) as network:
            timing = {"backoffBaseMs": 10_000_000, "backoffMaxMs": 10_000_000}
            url = f"http://{network.address}/api/chat"
            await client.mount(url, "c1", transport="gateway", timing=timing)
            await client.wait(connection="live")
            network.refuse()
            network.cut()
            await client.set_online(online=False)
            await client.wait(connection="offline")
            await client.send({"chunks": 3})
            asked = await client.state()
            network.accept()
            await client.set_online(online=True)
            shown = await settled(client)
            assert len(backend.named("request")) == 1
    assert (asked["status"], roles(asked)) == ("submitted", ["user"])
    assert (shown["status"], shown["errors"], shown["connection"]["state"]) == ("ready", NO_ERROR, "live")
    assert text_of(shown["messages"][1]) == "tok0 tok1 tok2 "


@majors
@pytest.mark.parametrize("carrier", ["websocket", "long-poll"])
@pytest.mark.parametrize("resolvable", [False, True])
async def test_what_a_page_adds_to_its_sends_reaches_the_backend(
    make_node: MakeNode, major: Major, carrier: str, *, resolvable: bool
) -> None:
    """Tokens and settings of the app go where they went before; what is not on the list goes nowhere."""
    asked = {"authorization": "Bearer page", "x-tenant": "one", "x-secret": "two"}
    options = {"resolvable": resolvable, "carriers": [carrier], "headers": asked, "body": {"model": "small"}}
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url, forward_headers=("x-tenant",))
        await mount(client, node, "plain", chat="plain", **options)
        await mount(client, node, "only", chat="only", messageOnly=True, **options)
        await mount(
            client, node, "own", chat="own", prepared={"headers": {"authorization": "own"}}, **options
        )
        for chat in ("plain", "only", "own"):
            facts = {"headers": {"Authorization": "Bearer send"}, "body": {"model": "large", "seed": 1}}
            await client.send({"chunks": 1}, chat=chat, metadata={"is": "not sent"}, **facts)
            await settled(client, chat=chat)
        requests = {chat: backend.named("request", id=chat) for chat in ("plain", "only", "own")}
    assert [len(told) for told in requests.values()] == [1] * 3
    told = {chat: request["body"] for chat, (request,) in requests.items()}
    assert sorted(told["plain"]) == ["id", "messages", "model", "seed", "trigger"]
    assert sorted(told["only"]) == ["id", "message", "model", "requestMetadata", "seed"]
    assert told["only"]["requestMetadata"] == {"is": "not sent"}
    assert all((body["model"], body["seed"]) == ("large", 1) for body in told.values())
    headers = {chat: request["headers"] for chat, (request,) in requests.items()}
    assert [headers[chat].get("authorization") for chat in headers] == ["Bearer send"] * 2 + ["own"]
    # Of a carrier's own requests, the transport's headers stay what they are.
    left = None if carrier == "websocket" else "one"
    assert [headers[chat].get("x-tenant") for chat in headers] == ["one", "one", left]
    assert [headers[chat].get("x-secret") for chat in headers] == [None] * 3


@majors
async def test_a_reload_ends_with_the_message_of_a_page_that_never_left(
    make_node: MakeNode, major: Major
) -> None:
    """Byte for byte, whether the reloaded page has stored the question only or a part of the answer."""
    async with Backend(major) as backend, ChatClient(major) as stays:
        node = await make_node(backend.url)
        chats = [f"{which}-{kind}" for which in ("question", "partial") for kind in HELD]
        async with ChatClient(major) as leaves:

            async def ask(chat: str) -> ChatState:
                kind = chat.split("-")[1]
                await mount(stays, node, chat, chat=chat)
                await stays.wait(chat=chat, connection="live")
                await mount(leaves, node, chat, chat=chat)
                await leaves.send(HELD[kind], chat=chat)
                return await leaves.wait(chat=chat, status="streaming", part=HALF[kind])

            asked = await each(chats, ask)
            await gone(leaves)
        had = questions(asked)
        had |= {chat: state["messages"] for chat, state in asked.items() if chat.startswith("partial")}
        async with ChatClient(major) as back:
            await each(chats, lambda chat: mount(back, node, chat, chat=chat, messages=had[chat]))
            await each(
                chats,
                lambda chat: back.wait(chat=chat, status="streaming", part=HALF[chat.split("-")[1]]),
            )
            await each(chats, backend.release)
            never_left = await each(chats, lambda chat: settled(stays, chat=chat))
            reloaded = await each(chats, lambda chat: settled(back, chat=chat))
        assert [len(backend.named("request", id=chat)) for chat in chats] == [1] * len(chats)
    for chat in chats:
        assert roles(reloaded[chat]) == ["user", "assistant"], chat
        assert as_bytes(reloaded[chat]) == as_bytes(never_left[chat]), chat
        assert text_of(reloaded[chat]["messages"][1]).endswith(OF_20), chat
        assert len(reloaded[chat]["finishes"]) == 1, chat
        assert reloaded[chat]["errors"] == never_left[chat]["errors"] == NO_ERROR, chat


@majors
async def test_an_answer_that_ended_while_its_only_page_reloaded_is_shown_once(
    make_node: MakeNode, major: Major
) -> None:
    """And a second reload shows nothing anew: the page that stored the answer has it."""
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with ChatClient(major) as leaves:
            await mount(leaves, node)
            await leaves.send({"kind": "hold"})
            asked = await leaves.wait(text=OF_5)
            await gone(leaves)
        await nobody_attached(node, "c1")
        await backend.release("c1")
        await ended(node, "c1")
        async with ChatClient(major) as back:
            await mount(back, node, messages=asked["messages"][:1])
            shown = await settled(back, minMessages=2)
        async with ChatClient(major) as again:
            await mount(again, node, messages=shown["messages"])
            await again.wait(connection="live")
            await again.send({"chunks": 1})
            more = await settled(again)
    assert roles(shown) == ["user", "assistant"]
    assert shown["messages"][1]["id"] == asked["messages"][1]["id"]
    assert text_of(shown["messages"][1]) == OF_20
    assert more["messages"][:2] == shown["messages"]
    assert roles(more) == ["user", "assistant"] * 2
    assert len(more["finishes"]) == 1


@majors
@pytest.mark.parametrize("external", [False, True])
async def test_a_component_that_goes_and_comes_back_ends_nothing_and_shows_one_answer(
    make_node: MakeNode, major: Major, *, external: bool
) -> None:
    """On the way to another page and back; 7 tells its transport of an unmount as it does of a Stop."""
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        await mount(client, node, external=external)
        await client.send({"kind": "hold"})
        asked = await client.wait(text=OF_5)
        await client.remount(messages=asked["messages"][:1])
        await client.wait(text=OF_5, status="streaming")
        assert await backend.release("c1") == 1
        shown = await client.wait(status="ready", text=OF_20)
        assert not backend.named("close")
        assert len(backend.named("request")) == 1
    assert roles(shown) == ["user", "assistant"]
    assert shown["messages"][1]["id"] == asked["messages"][1]["id"]
    assert text_of(shown["messages"][1]) == OF_20
    assert shown["errors"] == NO_ERROR


@majors
async def test_strict_mode_shows_one_answer(make_node: MakeNode, major: Major) -> None:
    """React mounts each component twice there: the stock hook of 7 stops what it finds running."""
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        await mount(client, node, strict=True)
        await client.send({"kind": "hold"})
        asked = await client.wait(text=OF_5)
        async with ChatClient(major) as back:
            await mount(back, node, strict=True, messages=asked["messages"][:1])
            await back.wait(text=OF_5, status="streaming")
            await backend.release("c1")
            shown = [await settled(page) for page in (client, back)]
            assert not backend.named("close")
            assert len(backend.named("request")) == 1
    assert as_bytes(shown[0]) == as_bytes(shown[1])
    assert text_of(shown[0]["messages"][1]) == OF_20
    assert [state["statuses"][-2:] for state in shown] == [["streaming", "ready"]] * 2
    assert [len(state["finishes"]) for state in shown] == [1, 1]


@majors
@pytest.mark.parametrize("stored", [1, 2])
async def test_the_bare_transport_is_one_line_in_use_chat(
    make_node: MakeNode, major: Major, stored: int
) -> None:
    """`useChat({ transport, resume: true })` of the SDK itself: send, reload in the middle, end."""
    # Of a tool's input that was stored in its middle, the hooks of 5 and 6 make two.
    kinds = list(HELD) if stored == 1 or major == 7 else [kind for kind in HELD if kind != "tool"]
    bare: dict[str, Any] = {"hook": "useChat", "resume": True}
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with ChatClient(major) as leaves:

            async def ask(kind: str) -> ChatState:
                await mount(leaves, node, kind, chat=kind, **bare)
                await leaves.send(HELD[kind], chat=kind)
                return await leaves.wait(chat=kind, part=HALF[kind])

            asked = await each(kinds, ask)
            await gone(leaves)
        async with ChatClient(major) as back:
            for kind in kinds:
                await mount(back, node, kind, chat=kind, messages=asked[kind]["messages"][:stored], **bare)
                await back.wait(chat=kind, part=HALF[kind], status="streaming")
                assert await backend.release(kind) == 1
            shown = await each(kinds, lambda kind: settled(back, chat=kind))
        async with ChatClient(major) as again:
            await mount(again, node, "text", messages=shown["text"]["messages"], **bare)
            await again.send({"chunks": 1})
            more = await again.wait(status="ready", minMessages=4)
    for kind in kinds:
        assert roles(shown[kind]) == ["user", "assistant"], kind
        assert shown[kind]["messages"][1]["id"] == asked[kind]["messages"][1]["id"], kind
        assert text_of(shown[kind]["messages"][1]).endswith(OF_20), kind
        kinds_of_parts = [part["type"] for part in shown[kind]["messages"][1]["parts"]]
        assert kinds_of_parts.count("tool-weather") == (kind == "tool"), kind
        assert shown[kind]["errors"] == NO_ERROR, kind
    assert json.dumps(more["messages"][:2]) == as_bytes(shown["text"])
    assert more["errors"] == NO_ERROR
