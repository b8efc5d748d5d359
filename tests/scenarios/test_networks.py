"""Real `useChat` on this project's transport, behind proxies that block, hold back, tear and time out."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import pytest

from tests.support.network import Network
from tests.support.node import Backend, Browser, ChatClient, Major
from tests.support.node_program import WAIT_SECONDS
from tests.support.usechat import OF_5, OF_20, as_bytes, each, roles, settled, text_of
from tests.support.world import CARRIERS, HOLD, World, a_world

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.app import Node
    from tests.support.network import BlockedUpgrades
    from tests.support.usechat import Scenario

    MakeNode = Callable[..., Awaitable[Node]]

pytestmark = pytest.mark.node
majors = pytest.mark.parametrize("major", get_args(Major))


class Obstacle(NamedTuple):
    """What a proxy does.

    Attributes:
        major: Whose `useChat` meets it.
        upgrades: What becomes of WebSockets.
        holds_streams: Whether streams are held back until they end.
        carrier: What is left.
        attempts: WebSockets and streams that are tried before.
    """

    major: Major
    upgrades: BlockedUpgrades
    holds_streams: bool
    carrier: str
    attempts: tuple[int, int]


@pytest.mark.parametrize(
    "obstacle",
    [
        Obstacle(5, "refuse", holds_streams=False, carrier="sse", attempts=(2, 0)),
        Obstacle(6, "refuse", holds_streams=True, carrier="long-poll", attempts=(2, 1)),
        Obstacle(7, "swallow", holds_streams=False, carrier="sse", attempts=(1, 0)),
        Obstacle(7, "swallow", holds_streams=True, carrier="long-poll", attempts=(1, 1)),
    ],
    ids=lambda obstacle: f"{obstacle.upgrades}-{obstacle.carrier}",
)
async def test_a_carrier_that_does_not_pass_is_tried_once_in_a_tab(
    make_node: MakeNode, obstacle: Obstacle
) -> None:
    """Company proxies block WebSockets, and some hold streams back: it costs one deadline, and then none."""
    async with a_world(make_node, obstacle.major) as world:
        network = world.network
        network.block_upgrades, network.buffer_streams = obstacle.upgrades, obstacle.holds_streams
        first = await world.ask("first")
        assert (network.upgrades_blocked, network.streams_held) == obstacle.attempts
        again = await world.ask("again")
        assert (network.upgrades_blocked, network.streams_held) == obstacle.attempts
        for chat in ("first", "again"):
            await world.backend.release(chat)
            world.assert_shown_once(await settled(world.client, chat=chat), chat)
    assert [state["connection"]["carrier"] for state in (first, again)] == [obstacle.carrier] * 2


async def test_another_tab_tries_for_itself(make_node: MakeNode) -> None:
    """What one network blocked says nothing about the next one, nor for ever."""
    async with a_world(make_node) as world, ChatClient(7) as tab:
        world.network.block_upgrades = "refuse"
        await world.ask("c1")
        elsewhere = World(world.backend, world.node, world.network, tab)
        shown = await elsewhere.ask("c2")
        assert world.network.upgrades_blocked == 4
    assert shown["connection"]["carrier"] == "sse"


@majors
async def test_an_answer_goes_on_whatever_carries_it(make_node: MakeNode, major: Major) -> None:
    """Down the ladder and up again in the middle of one answer, a word on each rung."""
    async with a_world(make_node, major) as world:
        network, client = world.network, world.client
        said = 5

        async def goes_on_by(carrier: str) -> None:
            nonlocal said
            await client.wait(chat="c1", carrier=carrier, connection="live")
            assert await world.backend.release("c1", 1) == 1
            await client.wait(chat="c1", status="streaming", text=f"tok{said} ")
            said += 1

        await world.ask("c1", timing={"reprobeMs": 50, "reprobeSoonMs": 50})
        await goes_on_by("websocket")
        network.block_upgrades = "refuse"
        network.cut()
        await goes_on_by("sse")
        network.buffer_streams = True
        network.cut()
        await goes_on_by("long-poll")
        network.buffer_streams = False
        await goes_on_by("sse")
        network.block_upgrades = None
        await goes_on_by("websocket")
        network.block_upgrades, network.buffer_streams = "swallow", True
        network.cut(reset=False)
        await goes_on_by("long-poll")
        network.block_upgrades = None
        await goes_on_by("websocket")
        await world.backend.release("c1")
        world.assert_shown_once(await settled(client, chat="c1"), "c1")


async def test_what_was_blocked_is_used_again_when_it_passes(make_node: MakeNode) -> None:
    """From the café home, between two answers: without a reload, and without a word."""
    async with a_world(make_node) as world:
        world.network.block_upgrades = "swallow"
        await world.ask("c1", timing={"reprobeMs": 50})
        await world.backend.release("c1")
        world.assert_shown_once(await settled(world.client, chat="c1"), "c1")
        world.network.block_upgrades = None
        await world.client.wait(chat="c1", carrier="websocket", connection="live")
        await world.client.send({"chunks": 3}, chat="c1")
        shown = await settled(world.client, chat="c1", finishes=2)
    assert text_of(shown["messages"][-1]) == "tok0 tok1 tok2 "
    assert shown["errors"] == []


@pytest.mark.parametrize("kind", ["hold", "slow"])
async def test_a_proxy_that_closes_what_is_idle_shows_nothing(
    make_node: MakeNode, kind: Literal["hold", "slow"]
) -> None:
    """Load balancers do after a minute, and a model may think longer, before its first word or after."""
    async with a_world(make_node) as world:
        for chat in CARRIERS:
            await world.mount(chat, carriers=[chat])
            await world.client.send({"kind": kind}, chat=chat)
            await world.backend.wait_event("request", key=chat)
        if kind == "hold":
            await each(CARRIERS, lambda chat: world.client.wait(chat=chat, text=OF_5))
        before = await world.states()
        world.network.idle_seconds = 0.2
        await world.network.until(lambda: world.network.idle_cuts >= 4 * len(CARRIERS))
        meanwhile = await world.states()
        world.network.idle_seconds = None
        await each(CARRIERS, world.backend.release if kind == "hold" else world.backend.answer)
        shown = await world.settled()
        for chat in CARRIERS:
            assert len(meanwhile[chat]["connections"]) > len(before[chat]["connections"]), f"{chat} was cut"
            assert meanwhile[chat]["status"] == ("streaming" if kind == "hold" else "submitted"), chat
            world.assert_shown_once(shown[chat], chat)


async def test_heartbeats_keep_what_is_idle_open(make_node: MakeNode) -> None:
    """With `GATEWAY_HEARTBEAT` below the proxy's limit there is not even a reconnect."""
    async with a_world(make_node, heartbeat_seconds=0.2) as world:
        # So long that no busy machine makes this client reconnect by itself.
        timing = {"pollSeconds": 0.2, "helloMs": 10_000, "requestMs": 10_000}
        asked = await world.ask_each(timing=timing)
        world.network.idle_seconds = 2.0
        reader, writer = await asyncio.open_connection(*world.network.address.split(":"))
        async with asyncio.timeout(WAIT_SECONDS):
            assert await reader.read() == b"", "one that is idle is cut"
        writer.close()
        await each(CARRIERS, world.backend.release)
        shown = await world.settled()
        for chat in CARRIERS:
            world.assert_shown_once(shown[chat], chat)
            assert shown[chat]["connections"] == asked[chat]["connections"], chat


async def test_frames_torn_into_bytes_change_nothing(make_node: MakeNode) -> None:
    """A packet may end anywhere, in the middle of a letter too, on any carrier."""
    scenarios: dict[str, Scenario] = {"unicode": {"kind": "unicode"}, "tool": {"kind": "tool"}}
    chats = [f"{carrier} {kind}" for carrier in CARRIERS for kind in scenarios]
    async with a_world(make_node) as world, ChatClient(7) as straight:
        for chat in chats:
            await world.mount(chat, carriers=[chat.split()[0]])
            await world.watch(straight, chat)
        world.network.split, world.network.delay_seconds = 1, 0.005
        await each(chats, lambda chat: world.client.send(scenarios[chat.split()[1]], chat=chat))
        torn = await each(chats, lambda chat: settled(world.client, chat=chat))
        whole = await each(chats, lambda chat: settled(straight, chat=chat))
    for chat in chats:
        assert as_bytes(torn[chat]) == as_bytes(whole[chat]), chat
        assert roles(torn[chat]) == ["user", "assistant"], chat
        assert torn[chat]["errors"] == [], chat


@pytest.mark.browser
async def test_a_browser_remembers_what_passes(make_node: MakeNode) -> None:
    """Real Chromium, whose WebSocket would wait for ever; a reload keeps the tab's memory."""
    async with Backend(7) as backend, Browser() as browser:
        node = await make_node(backend.url)
        async with Network(node.address) as network:
            network.block_upgrades = "swallow"
            await browser.open(f"http://{network.address}/?chat=c1&transport=gateway&helloMs=1000")
            await browser.fill("input", HOLD)
            await browser.click("send")
            await browser.wait_text("message-1", OF_5, exactly=True)
            carriers = [await browser.text("carrier")]
            assert network.upgrades_blocked == 1
            await browser.reload()
            await browser.wait_text("message-1", OF_5, exactly=True)
            carriers.append(await browser.text("carrier"))
            assert network.upgrades_blocked == 1
            await backend.release("c1")
            await browser.wait_text("message-1", OF_20, exactly=True)
            await browser.wait_text("status", "ready")
            assert len(backend.named("request")) == 1
    assert carriers == ["sse", "sse"]
