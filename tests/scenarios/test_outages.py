"""Real `useChat` on this project's transport, whose network or gateway is away for a while."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal, get_args

import pytest

from tests.support.node import Backend, ChatClient, Major
from tests.support.node_program import WAIT_SECONDS
from tests.support.process import GatewayProcess
from tests.support.usechat import OF_5, OF_20, as_bytes, each, ended, settled, text_of
from tests.support.valkey import free_port
from tests.support.world import CARRIERS, HOLD, TIMING, a_world

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.app import Node

    MakeNode = Callable[..., Awaitable[Node]]

pytestmark = pytest.mark.node
majors = pytest.mark.parametrize("major", get_args(Major))

AWAY = ["connecting", "offline"]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend on a starved machine has longer to say that it heard the close."""
    monkeypatch.setattr("gateway.producer.HANG_UP_SECONDS", WAIT_SECONDS)


@pytest.mark.parametrize("comes_back", ["thaw", "wake"])
async def test_a_laptop_closed_in_the_middle_of_an_answer_has_it_whole(
    make_node: MakeNode, comes_back: Literal["thaw", "wake"]
) -> None:
    """Its connections stay open and nothing passes; the answer ends meanwhile.

    Then its network is as it was; or it has another one, and the browser says that it woke up.
    """
    async with a_world(make_node) as world:
        # After a wake it may ask on a pooled connection that is as dead as the others: so long it waits then.
        await world.ask_each(timing={"requestMs": 1_000})
        world.network.freeze(newcomers=comes_back == "thaw")
        await each(CARRIERS, world.backend.release)
        await ended(world.node, *CARRIERS)
        asleep = await world.states()
        if comes_back == "thaw":
            world.network.thaw()
        else:
            await world.client.wake()
        shown = await world.settled()
        for chat in CARRIERS:
            assert text_of(asleep[chat]["messages"][1]) == OF_5, chat
            world.assert_shown_once(shown[chat], chat)


@pytest.mark.parametrize("newcomers", [False, True], ids=["moved", "frozen"])
async def test_a_connection_that_died_silently_is_found_out(make_node: MakeNode, *, newcomers: bool) -> None:
    """Nobody says a word: after two heartbeats the page knows, and after a poll that is not answered.

    New connections pass; or those are frozen as well, until the network comes back.
    """
    async with a_world(make_node, heartbeat_seconds=0.3) as world:
        await world.ask_each(timing={"pollSeconds": 0.5, "requestMs": 500})
        world.network.freeze(newcomers=newcomers)
        await each(CARRIERS, world.backend.release)
        await ended(world.node, *CARRIERS)
        if newcomers:
            await each(CARRIERS, lambda chat: world.client.wait(chat=chat, connection=AWAY))
            world.network.thaw()
        shown = await world.settled()
        for chat in CARRIERS:
            world.assert_shown_once(shown[chat], chat)


async def test_a_question_lost_on_the_way_is_asked_once(make_node: MakeNode) -> None:
    """It went into a connection that was dead already: nobody knows what arrived, so it is asked by name."""
    async with a_world(make_node) as world:
        await world.attach_each()
        world.network.freeze(discard=True)
        await each(CARRIERS, lambda chat: world.client.send({}, chat=chat))
        assert not world.backend.named("request")
        world.network.thaw()
        await world.client.wake()
        shown = await world.settled()
        for chat in CARRIERS:
            world.assert_shown_once(shown[chat], chat)


async def test_a_question_whose_acceptance_is_lost_is_asked_once(make_node: MakeNode) -> None:
    """The gateway has it and the page does not know: the repeated send joins the turn."""
    async with a_world(make_node) as world:
        await world.attach_each()
        for chat in CARRIERS:
            # Of what the gateway says no whole line arrives, on this connection or on the next one.
            world.network.tear(bytes_down=1)
            world.network.cut_after(bytes_down=1)
            await world.client.send({"kind": "slow"}, chat=chat)
            await world.backend.wait_event("request", id=chat)
        await each(CARRIERS, world.backend.answer)
        shown = await world.settled()
        for chat in CARRIERS:
            world.assert_shown_once(shown[chat], chat)


@pytest.mark.usefixtures("patient")
async def test_a_stop_on_a_dead_network_stops_the_model_when_it_is_back(make_node: MakeNode) -> None:
    """The page stops at once; the cancel comes first when there is a way, and spares what was asked later."""
    async with a_world(make_node) as world:
        client, backend, network = world.client, world.backend, world.network
        await world.ask_each()
        network.refuse()
        network.cut()
        async with asyncio.TaskGroup() as stops:
            for chat in CARRIERS:
                stops.create_task(client.stop(chat=chat), name=f"stop {chat}")
            stopped = await each(CARRIERS, lambda chat: client.wait(chat=chat, status="ready"))
            assert not backend.named("abort")
            await each(CARRIERS, lambda chat: client.send({"key": "next"}, chat=chat))
            network.accept()
        shown = await each(CARRIERS, lambda chat: settled(client, chat=chat, finishes=2))
        for chat in CARRIERS:
            (abort,) = backend.named("abort", id=chat)
            (_, asked) = backend.named("request", id=chat)
            assert (abort["key"], asked["key"]) == (chat, "next")
            assert abort["n"] < asked["n"], chat
    for chat, state in shown.items():
        answers = [text_of(message) for message in state["messages"] if message["role"] == "assistant"]
        assert text_of(stopped[chat]["messages"][1]) == OF_5, chat
        assert answers == [OF_5, OF_20], chat
        assert state["errors"] == [], chat
        assert [finish["isAbort"] for finish in state["finishes"]] == [True, False], chat


@majors
async def test_a_stream_given_up_goes_on_where_it_was(make_node: MakeNode, major: Major) -> None:
    """The SDK is told of a lost network; the same page has the rest of the same parts when that is back.

    With the hook of the gateway by itself, with the SDK's own by `resumeStream`.
    """
    hooks = {"hook": "useGatewayChat", "bare": "useChat"}
    run, end = [[f"{hook} {meanwhile}" for hook in hooks] for meanwhile in ("runs", "ends")]
    chats = [*run, *end]
    async with a_world(make_node, major) as world, ChatClient(major) as stays:
        client, backend, network = world.client, world.backend, world.network
        for chat in chats:
            await world.watch(stays, chat)
            await world.ask(chat, hook=hooks[chat.split()[0]], timing={"giveUpMs": 100})
        network.refuse()
        network.cut()
        failed = await each(chats, lambda chat: client.wait(chat=chat, status="error", finishes=1))
        await each(end, backend.release)
        await ended(world.node, *end)
        await each(run, lambda chat: backend.release(chat, 2))
        network.accept()
        for bare in (run[1], end[1]):
            await client.resume_stream(chat=bare)
        await each(run, lambda chat: client.wait(chat=chat, status="streaming", text="tok6 "))
        await each(run, backend.release)
        shown = await each(chats, lambda chat: client.wait(chat=chat, status="ready", finishes=2))
        whole = await each(chats, lambda chat: settled(stays, chat=chat))
        assert [len(backend.named("request", id=chat)) for chat in chats] == [1] * 4
    for chat in chats:
        (error,), (finish,) = failed[chat]["errors"], failed[chat]["finishes"]
        assert error["name"] == "TypeError", chat
        assert (finish["isDisconnect"], finish["isAbort"]) == (True, False), chat
        assert text_of(failed[chat]["messages"][1]) == OF_5, chat
        assert text_of(shown[chat]["messages"][1]) == OF_20, chat
        assert as_bytes(shown[chat]) == as_bytes(whole[chat]), chat
        assert len(shown[chat]["errors"]) == 1, chat


@pytest.mark.parametrize("ending", ["told", "killed"])
async def test_a_gateway_that_restarts_is_found_again(
    valkey_url: str, make_config: Callable[..., Any], ending: Literal["told", "killed"]
) -> None:
    """A deploy, or a crash: what ran is interrupted and says so, what is asked meanwhile is asked once."""
    asked = [f"asked {carrier}" for carrier in CARRIERS]
    async with Backend(7) as backend, ChatClient(7) as client:
        settings = {
            "upstream": backend.url,
            "redis_url": valkey_url,
            "key_prefix": make_config(backend.url).key_prefix,
            "lease": 0.5,
            "drain": 0.1,
            "listen": f"127.0.0.1:{free_port()}",
        }

        async def mount(chat: str) -> None:
            url = f"http://{settings['listen']}/api/chat"
            options: dict[str, Any] = {
                "transport": "gateway",
                "timing": TIMING,
                "carriers": [chat.rsplit(maxsplit=1)[-1]],
            }
            await client.mount(url, chat, chat=chat, **options)
            await client.wait(chat=chat, connection="live")

        async with GatewayProcess(**settings) as first:
            await first.started()
            await each([*CARRIERS, *asked], mount)
            await each(CARRIERS, lambda chat: client.send(HOLD, chat=chat))
            await each(CARRIERS, lambda chat: client.wait(chat=chat, text=OF_5))
            if ending == "told":
                first.terminate()
                await first.exited()
            else:
                await first.kill()
        await each(asked, lambda chat: client.wait(chat=chat, connection=AWAY))
        await each(asked, lambda chat: client.send({}, chat=chat))
        async with GatewayProcess(**settings) as second:
            await second.started()
            cut_off = await each(CARRIERS, lambda chat: settled(client, chat=chat))
            answered = await each(asked, lambda chat: settled(client, chat=chat))
        requests = [len(backend.named("request", id=chat)) for chat in (*CARRIERS, *asked)]
    for chat, state in cut_off.items():
        assert state["status"] == "error", chat
        assert [error["reason"] for error in state["errors"]] == ["interrupted"], chat
        assert [end["reason"] for end in state["ends"]] == ["interrupted"], chat
        assert text_of(state["messages"][1]) == OF_5, chat
    for chat, state in answered.items():
        assert text_of(state["messages"][-1]) == OF_20, chat
        assert state["errors"] == [], chat
    assert requests == [1] * len(requests)
