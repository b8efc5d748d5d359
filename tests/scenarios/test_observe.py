"""What others do, shown by the SDK of 5, 6 and 7: `useGatewayChat`, `observe`, and the bare transport."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, get_args

import pytest

from tests.support.node import Backend, ChatClient, Major
from tests.support.node_program import WAIT_SECONDS
from tests.support.usechat import (
    HALF,
    HELD,
    OF_5,
    OF_20,
    Scenario,
    api,
    as_bytes,
    assert_model_was_stopped,
    each,
    gone,
    part_of,
    roles,
    settled,
    text_of,
    until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from gateway.app import Node
    from tests.support.node import ChatState

    MakeNode = Callable[..., Awaitable[Node]]

pytestmark = pytest.mark.node
majors = pytest.mark.parametrize("major", get_args(Major))

SHOWN: dict[str, Scenario] = {
    "text": {"kind": "text", "metadata": True},
    "named": {"kind": "text", "serverMessageId": True},
    "reasoning": {"kind": "reasoning"},
    "tool": {"kind": "tool"},
    "databefore": {"kind": "databefore"},
    "unicode": {"kind": "unicode"},
    "long": {"kind": "long"},
}

NO_ERROR: list[Any] = []


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend on a starved machine has longer to say that it heard the close."""
    monkeypatch.setattr("gateway.producer.HANG_UP_SECONDS", WAIT_SECONDS)


async def mount(client: ChatClient, node: Node, chat_id: str = "c1", **options: Any) -> ChatState:
    """Show a chat; from then on nothing of it is missed."""
    chat = options.get("chat", "main")
    state = await client.mount(api(node), chat_id, transport="gateway", **options)
    if options.get("hook") == "useChat":
        return state
    return await client.wait(chat=chat, connection="live")


@asynccontextmanager
async def devices(
    node: Node, major: Major, count: int = 2, *, chat: str = "c1", **options: Any
) -> AsyncIterator[list[ChatClient]]:
    """Pages of devices of their own that show one chat."""
    async with AsyncExitStack() as stack:
        pages = [await stack.enter_async_context(ChatClient(major)) for _ in range(count)]
        for page in pages:
            await mount(page, node, chat, **options)
        yield pages


async def has_read(page: ChatClient, other: ChatState) -> ChatState:
    """The state of a page that has received as much as another one had, whatever it shows of it."""
    offset = other["position"]["offset"]
    return await until(page.state, lambda state: state["position"]["offset"] >= offset)


def texts(state: ChatState) -> list[str]:
    return [text_of(message) for message in state["messages"] if message["role"] == "assistant"]


def assert_shown_alike(*states: ChatState, turns: int = 1) -> None:
    """Whoever asked: the same messages and ends, `onFinish` once for each, and nobody is shown an error."""
    first = states[0]
    for state in states:
        assert as_bytes(state) == as_bytes(first)
        assert (state["status"], state["errors"]) == ("ready", NO_ERROR)
        assert state["finishes"] == first["finishes"]
        assert len(state["finishes"]) == turns
        assert state["ends"] == first["ends"]
        assert state["lastTurnEnd"] == state["ends"][-1]


@majors
async def test_a_page_that_was_open_shows_what_another_asks(make_node: MakeNode, major: Major) -> None:
    """Question, parts, data, metadata, status and callbacks: as if it had asked itself."""
    async with Backend(major) as backend, ChatClient(major) as laptop, ChatClient(major) as phone:
        node = await make_node(backend.url)
        for chat, scenario in SHOWN.items():
            await mount(laptop, node, chat, chat=chat)
            await mount(phone, node, chat, chat=chat)
            await laptop.send(scenario, chat=chat)
        asked = await each(SHOWN, lambda chat: settled(laptop, chat=chat, ends=1))
        watched = await each(SHOWN, lambda chat: settled(phone, chat=chat, ends=1))
        assert len(backend.named("request")) == len(SHOWN)
    for chat in SHOWN:
        assert_shown_alike(asked[chat], watched[chat])
        assert roles(watched[chat]) == ["user", "assistant"], chat
        assert watched[chat]["data"] == asked[chat]["data"], chat
    assert len(watched["databefore"]["data"]) == 3


@majors
async def test_a_device_that_joins_in_the_middle_ends_with_the_same_message(
    make_node: MakeNode, major: Major
) -> None:
    """Whether it has loaded the question from its own backend, a part of the answer, or nothing."""
    loaded = {"nothing": 0, "question": 1, "part": 2}
    chats = [f"{had}-{kind}" for had in loaded for kind in HELD]
    async with Backend(major) as backend, ChatClient(major) as laptop, ChatClient(major) as phone:
        node = await make_node(backend.url)

        async def ask(chat: str) -> None:
            had, kind = chat.split("-")
            await mount(laptop, node, chat, chat=chat)
            await laptop.send(HELD[kind], chat=chat)
            asked = await laptop.wait(chat=chat, status="streaming", part=HALF[kind])
            await mount(phone, node, chat, chat=chat, messages=asked["messages"][: loaded[had]])
            await phone.wait(chat=chat, status="streaming", part=HALF[kind])

        await each(chats, ask)
        await each(chats, backend.release)
        asked = await each(chats, lambda chat: settled(laptop, chat=chat, ends=1))
        joined = await each(chats, lambda chat: settled(phone, chat=chat, ends=1))
        assert len(backend.named("request")) == len(chats)
    for chat in chats:
        assert_shown_alike(asked[chat], joined[chat])
        assert roles(joined[chat]) == ["user", "assistant"], chat
        assert text_of(joined[chat]["messages"][1]).endswith(OF_20), chat


@majors
async def test_turns_in_a_row_from_either_side_are_one_conversation(
    make_node: MakeNode, major: Major
) -> None:
    """Three devices take turns to ask; the third has only watched until then."""
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with devices(node, major, 3) as pages:
            asking = [pages[0], pages[0], pages[1], pages[2]]
            for turn, page in enumerate(asking, 1):
                await page.send({"chunks": turn})
                for shown in pages:
                    await settled(shown, finishes=turn, ends=turn)
            states = [await page.state() for page in pages]
        bodies = [event["body"] for event in backend.named("request")]
    assert_shown_alike(*states, turns=4)
    assert roles(states[0]) == ["user", "assistant"] * 4
    assert texts(states[2]) == ["tok0 ", "tok0 tok1 ", "tok0 tok1 tok2 ", "tok0 tok1 tok2 tok3 "]
    assert [len(body["messages"]) for body in bodies] == [1, 3, 5, 7]


@majors
async def test_turns_that_follow_on_each_others_heels_are_all_shown(
    make_node: MakeNode, major: Major
) -> None:
    """The watching page shows one after the other; one that joins late has the rest, and each once."""
    async with Backend(major) as backend, ChatClient(major) as late:
        node = await make_node(backend.url)
        async with devices(node, major) as (laptop, phone):
            for turn in range(1, 6):
                await laptop.send({"chunks": turn})
                await settled(laptop, finishes=turn, ends=turn)
            asked = await laptop.state()
            await laptop.send({"kind": "hold"})
            await laptop.wait(text=OF_5)
            await mount(late, node, messages=asked["messages"])
            await late.wait(text=OF_5)
            await backend.release("c1")
            states = [await settled(page, finishes=6, ends=6) for page in (laptop, phone)]
            joined = await settled(late, ends=1)
    assert_shown_alike(*states, turns=6)
    assert as_bytes(joined) == as_bytes(states[0])
    assert len(joined["finishes"]) == 1


@majors
async def test_an_edit_and_a_regenerated_answer_replace_what_others_show(
    make_node: MakeNode, major: Major
) -> None:
    """Also in the middle of the conversation, where what stood behind it goes."""
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with devices(node, major) as (laptop, phone):
            await laptop.send({"chunks": 1})
            await settled(laptop, finishes=1)
            await laptop.send({"chunks": 2})
            before = await settled(laptop, finishes=2)
            steps = [before]

            async def shown(turns: int) -> None:
                steps.extend(
                    [await settled(page, finishes=turns, ends=turns) for page in (laptop, phone)][1:]
                )
                assert_shown_alike(await laptop.state(), steps[-1], turns=turns)

            await laptop.regenerate()
            await shown(3)
            await laptop.send({"chunks": 3}, messageId=before["messages"][2]["id"])
            await shown(4)
            await laptop.regenerate(messageId=before["messages"][1]["id"])
            await shown(5)
            await phone.send({"chunks": 4}, messageId=before["messages"][0]["id"])
            await shown(6)
    assert [texts(state) for state in steps] == [
        ["tok0 ", "tok0 tok1 "],
        ["tok0 ", "tok0 tok1 "],
        ["tok0 ", "tok0 tok1 tok2 "],
        ["tok0 "],
        ["tok0 tok1 tok2 tok3 "],
    ]
    ids = [[message["id"] for message in state["messages"]] for state in steps]
    assert ids[0][:3] == ids[1][:3] == ids[2][:3]
    assert len({told[3] for told in ids[:3]}) == 3
    assert ids[3][0] == ids[4][0] == ids[0][0]
    assert len({ids[0][1], ids[3][1], ids[4][1]}) == 3


@majors
@pytest.mark.parametrize("first", ["laptop", "phone"])
async def test_a_page_may_ask_while_anothers_answer_runs(
    make_node: MakeNode, major: Major, first: str
) -> None:
    """Both answers run; whichever ends first, both pages end with both, in the order of their questions."""
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with devices(node, major) as (laptop, phone):
            await laptop.send({"kind": "hold", "key": "laptop"})
            await phone.wait(text=OF_5)
            await phone.send({"kind": "hold", "key": "phone", "chunks": 7})
            had = await phone.wait(text=OF_5, minMessages=4)
            busy = await has_read(laptop, had)
            for key in (first, "phone" if first == "laptop" else "laptop"):
                await backend.release(key)
                await backend.wait_event("end", key=key)
            states = [await settled(page, finishes=2, ends=2) for page in (laptop, phone)]
        assert len(backend.named("request")) == 2
    assert roles(busy).count("user") == 1, "what comes meanwhile waits"
    for state in states:
        assert roles(state) == ["user", "assistant"] * 2
        assert texts(state) == [OF_20, OF_5 + "tok5 tok6 "]
        assert (state["status"], state["errors"]) == ("ready", NO_ERROR)
        assert len(state["finishes"]) == 2
    assert as_bytes(states[0]) == as_bytes(states[1])


@majors
async def test_what_came_while_a_page_was_busy_is_shown_in_its_order(
    make_node: MakeNode, major: Major
) -> None:
    """Several turns may have ended before its own does."""
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with devices(node, major) as (laptop, phone):
            await laptop.send({"kind": "hold"})
            await phone.wait(text=OF_5)
            for turn in (1, 2, 3):
                await phone.send({"chunks": turn, "key": "phone"})
                await phone.wait(ends=turn)
            busy = await has_read(laptop, await phone.state())
            await backend.release("c1")
            states = [await settled(page, finishes=4, ends=4) for page in (laptop, phone)]
    assert roles(busy).count("user") == 1
    assert texts(states[0]) == [OF_20, "tok0 ", "tok0 tok1 ", "tok0 tok1 tok2 "]
    assert as_bytes(states[0]) == as_bytes(states[1])
    assert states[0]["errors"] == states[1]["errors"] == NO_ERROR


@pytest.mark.usefixtures("patient")
@majors
async def test_a_stop_on_one_device_ends_the_answer_on_all(make_node: MakeNode, major: Major) -> None:
    """The model has heard of it before anybody is told, and all are left with the same finished message."""
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with devices(node, major, 3) as pages:
            await pages[0].send({"kind": "hold"})
            for page in pages:
                await page.wait(text=OF_5)
            await pages[1].stop()
            await assert_model_was_stopped(backend, "c1")
            states = [await settled(page, ends=1) for page in pages]
            await pages[2].send({"chunks": 1})
            more = [await settled(page, finishes=2, ends=2) for page in pages]
    assert_shown_alike(*states)
    for state in states:
        assert [finish["isAbort"] for finish in state["finishes"]] == [True]
        assert part_of(state["messages"][1], "text") == {"type": "text", "text": OF_5, "state": "done"}
        assert state["ends"][0]["by"]["client"] == states[1]["client"]
    assert_shown_alike(*more, turns=2)
    assert more[0]["messages"][:2] == states[0]["messages"]


@pytest.mark.usefixtures("patient")
@majors
async def test_an_answer_stopped_before_its_first_word_leaves_the_question(
    make_node: MakeNode, major: Major
) -> None:
    """On the page that watches as well: no empty answer, no spinner, no error."""
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with devices(node, major) as (laptop, phone):
            await laptop.send({"kind": "slow"})
            await backend.wait_event("request", key="c1")
            waiting = await phone.wait(minMessages=1, status="submitted")
            await phone.stop()
            await backend.wait_event("close", key="c1")
            states = [await settled(page, ends=1) for page in (laptop, phone)]
            await laptop.send({"chunks": 1})
            more = [await settled(page, finishes=2, ends=2) for page in (laptop, phone)]
    assert roles(waiting) == ["user"]
    for state in states:
        assert (roles(state), state["status"], state["errors"]) == (["user"], "ready", NO_ERROR)
        assert [finish["isAbort"] for finish in state["finishes"]] == [True]
    for state in more:
        assert roles(state) == ["user", "user", "assistant"]
        assert texts(state) == ["tok0 "]
    assert as_bytes(more[0]) == as_bytes(more[1])


@pytest.mark.usefixtures("patient")
@majors
async def test_a_stop_ends_all_that_runs_in_the_chat(make_node: MakeNode, major: Major) -> None:
    """Its own answer and the one that it watches: after a Stop nothing in the chat costs anything."""
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with devices(node, major) as (laptop, phone):
            await laptop.send({"kind": "hold", "key": "laptop"})
            await phone.wait(text=OF_5)
            await phone.send({"kind": "hold", "key": "phone"})
            await phone.wait(minMessages=4, text=OF_5)
            await phone.stop()
            for key in ("laptop", "phone"):
                await assert_model_was_stopped(backend, key)
            states = [await settled(page, finishes=2, ends=2) for page in (laptop, phone)]
    for state in states:
        assert (state["status"], state["errors"]) == ("ready", NO_ERROR)
        assert [end["reason"] for end in state["ends"]] == ["cancelled"] * 2
        assert texts(state) == [OF_5] * 2
    assert as_bytes(states[0]) == as_bytes(states[1])


@pytest.mark.usefixtures("patient")
@majors
async def test_what_another_asks_right_after_a_stop_is_shown(make_node: MakeNode, major: Major) -> None:
    """The page that pressed it waits for what it stopped, and not for what came after."""
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with devices(node, major) as (laptop, phone):
            await laptop.send({"kind": "hold", "key": "one"})
            await phone.wait(text=OF_5)
            stopping = asyncio.create_task(phone.stop())
            await laptop.wait(ends=1)
            await laptop.send({"kind": "hold", "key": "two"})
            await stopping
            for page in (laptop, phone):
                await page.wait(text=OF_5, minMessages=4)
            assert await backend.release("two") == 1
            states = [await settled(page, finishes=2, ends=2) for page in (laptop, phone)]
    assert_shown_alike(*states, turns=2)
    assert texts(states[1]) == [OF_5, OF_20]


@majors
async def test_a_turn_that_waited_to_be_shown_outlives_the_component(
    make_node: MakeNode, major: Major
) -> None:
    """A chat made outside of it goes on when it comes back: with what it had no time to show before, too."""
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with devices(node, major, external=True) as (laptop, phone):
            await phone.send({"kind": "hold", "key": "phone"})
            await laptop.wait(text=OF_5)
            await laptop.send({"kind": "hold", "key": "laptop"})
            await has_read(phone, await laptop.wait(text=OF_5, minMessages=4))
            await phone.remount()
            await phone.wait(connection="live")
            await backend.release("laptop")
            await backend.release("phone")
            states = [await settled(page, finishes=2, ends=2) for page in (laptop, phone)]
    for state in states:
        assert texts(state) == [OF_20] * 2
        assert (state["status"], state["errors"]) == ("ready", NO_ERROR)
    assert as_bytes(states[0]) == as_bytes(states[1])


@majors
async def test_a_component_that_comes_back_while_another_answers_shows_that_once(
    make_node: MakeNode, major: Major
) -> None:
    """Its chat goes on showing what it began with; a second observer must not begin anew."""
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with devices(node, major, external=True) as (laptop, phone):
            await laptop.send({"kind": "hold"})
            await phone.wait(text=OF_5, status="streaming")
            await phone.remount()
            await phone.wait(connection="live", status="streaming", text=OF_5)
            await backend.release("c1")
            for page in (laptop, phone):
                await settled(page, ends=1)
            await phone.send({"chunks": 1})
            states = [await settled(page, finishes=2, ends=2) for page in (laptop, phone)]
    assert_shown_alike(*states, turns=2)
    assert texts(states[1]) == [OF_20, "tok0 "]


@majors
async def test_a_watching_page_that_reloads_shows_the_rest(make_node: MakeNode, major: Major) -> None:
    """With what it had shown as its history, as a page that stores what it sees would have it."""
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with devices(node, major) as (laptop, phone), ChatClient(major) as back:
            await laptop.send({"chunks": 1})
            await settled(laptop)
            await laptop.send({"kind": "hold"})
            shown = await phone.wait(text=OF_5)
            await gone(phone)
            await mount(back, node, messages=shown["messages"])
            await back.wait(text=OF_5, status="streaming")
            await backend.release("c1")
            states = [await settled(page, minMessages=4, text=OF_20) for page in (laptop, back)]
    assert as_bytes(states[0]) == as_bytes(states[1])
    assert roles(states[1]) == ["user", "assistant"] * 2
    assert [len(state["finishes"]) for state in states] == [2, 1]


@majors
async def test_a_bare_chat_that_is_observed_shows_the_same(make_node: MakeNode, major: Major) -> None:
    """Vue, Svelte and whatever else has a `Chat`: `observe(chat, transport)` is all there is to the hook."""
    async with Backend(major) as backend, ChatClient(major) as bare:
        node = await make_node(backend.url)
        await mount(bare, node, hook="observe")
        async with devices(node, major, 1) as (laptop,):
            await laptop.send({"kind": "databefore"})
            watched = await settled(bare, ends=1)
            await bare.send({"kind": "hold"})
            await laptop.wait(text=OF_5)
            await backend.release("c1")
            states = [await settled(page, finishes=2, ends=2) for page in (laptop, bare)]
    assert len(watched["data"]) == 3
    assert as_bytes(states[0]) == as_bytes(states[1])
    assert states[0]["finishes"] == states[1]["finishes"]
    assert states[0]["ends"] == states[1]["ends"]


@majors
async def test_the_bare_transport_follows_what_runs_when_its_page_is_opened(
    make_node: MakeNode, major: Major
) -> None:
    """`useChat({ transport, resume: true })`: no later turns, but this one from first to last chunk."""
    async with Backend(major) as backend, ChatClient(major) as phone:
        node = await make_node(backend.url)
        async with devices(node, major, 1) as (laptop,):
            await laptop.send({"chunks": 1})
            await settled(laptop)
            await laptop.send({"kind": "hold"})
            asked = await laptop.wait(text=OF_5)
            await mount(phone, node, hook="useChat", resume=True, messages=asked["messages"][:3])
            await phone.wait(text=OF_5, status="streaming")
            await backend.release("c1")
            states = [await settled(page, text=OF_20) for page in (laptop, phone)]
    assert as_bytes(states[0]) == as_bytes(states[1])
    assert states[1]["errors"] == NO_ERROR
    assert len(states[1]["finishes"]) == 1


@majors
async def test_an_error_is_shown_to_all_and_gone_with_the_next_answer(
    make_node: MakeNode, major: Major
) -> None:
    """Whoever watched was told why nothing came, and is not stuck in it when somebody asks again."""
    refusal = {"kind": "refuse", "status": 429, "headers": {"retry-after": "7"}, "body": "too many"}
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with devices(node, major) as (laptop, phone):
            await phone.send(refusal)
            failed = [await settled(page, ends=1) for page in (laptop, phone)]
            await laptop.send({"chunks": 2})
            states = [await settled(page, finishes=2, ends=2) for page in (laptop, phone)]
    for state in failed:
        (error,) = state["errors"]
        assert (state["status"], error["code"], error["status"]) == ("error", "upstream-refused", 429)
        assert roles(state) == ["user"]
    assert failed[0]["ends"] == failed[1]["ends"]
    for state in states:
        assert (state["status"], state.get("error")) == ("ready", None)
        assert roles(state) == ["user", "user", "assistant"]
    assert as_bytes(states[0]) == as_bytes(states[1])


@majors
async def test_a_page_with_an_error_of_its_own_still_shows_what_others_do(
    make_node: MakeNode, major: Major
) -> None:
    """A send that the gateway refused concerns nobody else, and must not end the watching."""
    async with Backend(major) as backend, ChatClient(major) as phone:
        node = await make_node(backend.url)
        await mount(phone, node, path="/no/chat/path")
        await phone.send({"chunks": 1})
        refused = await phone.wait(errors=1, status="error")
        async with devices(node, major, 1) as (laptop,):
            await laptop.send({"kind": "hold"})
            await phone.wait(text=OF_5, status="streaming")
            await backend.release("c1")
            states = [await settled(page, ends=1, text=OF_20) for page in (laptop, phone)]
        assert len(backend.named("request")) == 1
    assert (refused["status"], refused["errors"][0]["name"]) == ("error", "RefusedError")
    assert roles(states[0]) == ["user", "assistant"]
    assert (states[1]["status"], roles(states[1])) == ("ready", ["user", "user", "assistant"])
    assert states[1]["messages"][1:] == states[0]["messages"]


@majors
async def test_strict_mode_shows_others_once(make_node: MakeNode, major: Major) -> None:
    """React mounts each component twice there: two observers would show two answers."""
    async with Backend(major) as backend:
        node = await make_node(backend.url)
        async with devices(node, major, strict=True) as (laptop, phone):
            await laptop.send({"chunks": 3})
            await settled(phone, ends=1)
            await phone.send({"kind": "hold"})
            await laptop.wait(text=OF_5)
            await backend.release("c1")
            states = [await settled(page, finishes=2, ends=2) for page in (laptop, phone)]
    assert_shown_alike(*states, turns=2)
    assert roles(states[0]) == ["user", "assistant"] * 2
