"""`useGatewayChat` as people use it: mounted late, or again, or with a transport that is made inline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import pytest

from gateway.client import GatewayClient
from tests.support.backend import ScriptedBackend, answers
from tests.support.node import Backend, ChatClient, Major
from tests.support.usechat import OF_20, api, ended, part_of, roles, settled, text_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.app import Node

    MakeNode = Callable[..., Awaitable[Node]]

pytestmark = pytest.mark.node
majors = pytest.mark.parametrize("major", get_args(Major))

TOOL: dict[str, Any] = {"kind": "clienttool", "hold": 3, "chunks": 5}
"""It stands still in the input of a call that the page answers."""


@majors
@pytest.mark.parametrize("strict", [False, True])
async def test_a_transport_made_while_rendering_is_one_transport(
    make_node: MakeNode, major: Major, *, strict: bool
) -> None:
    """`useChat` takes the first one too. One chat for each rendering would connect and render for ever."""
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        await client.mount(api(node), "c1", transport="gateway", inline=True, strict=strict)
        await client.send({"kind": "text"})
        first = await settled(client)
        await client.send({"kind": "text", "chunks": 5})
        state = await settled(client, finishes=2, minMessages=4)
        assert roles(state) == ["user", "assistant"] * 2
        assert state["messages"][:2] == first["messages"]
        assert text_of(state["messages"][1]) == OF_20
        assert state["transports"] > first["transports"] > 1
        assert (state["connected"], state["connection"]["state"]) == (1, "live")


@majors
@pytest.mark.parametrize("strict", [False, True])
async def test_a_component_may_be_mounted_on_a_transport_that_is_closed(
    make_node: MakeNode, major: Major, *, strict: bool
) -> None:
    """After a logout, or closed by the gateway for good: the page shows so, and is not taken down."""
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        shared: dict[str, Any] = {"transport": "gateway", "transportName": "one", "strict": strict}
        await client.mount(api(node), "c1", **shared)
        await client.wait(connection="live")
        await client.close_transport()
        state = await client.mount(api(node), "c2", chat="late", **shared)
        assert (state["connection"]["state"], state["status"]) == ("closed", "ready")
        await client.send("hello", chat="late")
        state = await client.wait(chat="late", status="error", errors=1)
        assert state["error"]["name"] == "ClosedError"
        again = await client.remount(messages=state["messages"][:1])
        assert (again["connection"]["state"], roles(again)) == ("closed", ["user"])


@majors
async def test_a_component_that_went_and_came_back_runs_a_tool_once(
    make_node: MakeNode, major: Major
) -> None:
    """The chat that it left still streams: what both would do costs money, or is done twice to the world."""
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        await client.mount(api(node), "c1", transport="gateway", answerTools={"askUser": {"answer": 42}})
        await client.send({**TOOL, "key": "k"})
        half = await client.wait(part={"type": "tool-askUser", "state": "input-streaming"})
        await client.remount(messages=half["messages"][:1])
        await client.wait(part={"type": "tool-askUser", "state": "input-streaming"})
        await backend.release("k")
        first = await backend.wait_event("request")
        await backend.wait_event("request", after=first["n"])
        await backend.release("k")
        state = await settled(client, text="tok4 ")
        await ended(node, "c1")
        assert len(state["toolCalls"]) == 1
        assert len(backend.named("request")) == 2
        assert roles(state) == ["user", "assistant"]
        assert part_of(state["messages"][1], "tool-askUser")["output"] == {"answer": 42}


@majors
@pytest.mark.parametrize("hook", ["useGatewayChat", "observe"])
async def test_a_question_without_id_and_parts_is_shown(make_node: MakeNode, major: Major, hook: str) -> None:
    """A program that asks without the SDK may leave out what every page reads of a message."""
    history = [{"id": "q0", "role": "user", "parts": [{"type": "text", "text": "before"}]}]
    async with ScriptedBackend(answers) as backend, ChatClient(major) as client:
        node = await make_node(backend.url)
        await client.mount(api(node), "c1", transport="gateway", hook=hook, messages=history)
        await client.wait(connection="live")
        async with GatewayClient(f"http://{node.address}") as program:
            asked = {"role": "user", "content": "now"}
            turn = await program.send("c1", {"messages": [asked]})
        state = await settled(client)
        assert [text_of(message) for message in state["messages"]] == ["before", "", "onetwo"]
        assert state["messages"][:2] == [*history, {**asked, "id": turn.id, "parts": []}]
        assert not state["errors"]
