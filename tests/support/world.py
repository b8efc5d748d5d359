"""A real page, a network that does what a test says, the gateway and a real backend."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from tests.support.network import Network
from tests.support.node import Backend, ChatClient, Major
from tests.support.usechat import OF_5, OF_20, api, each, roles, settled, text_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from gateway.app import Node
    from tests.support.node import ChatState
    from tests.support.usechat import Scenario

CARRIERS: Final = ("websocket", "sse", "long-poll")
"""Also the names of the chats that are carried by them."""

HOLD: Final[Scenario] = {"kind": "hold"}

NEVER_MS: Final = 1_000_000
TIMING: Final = {
    "helloMs": 1_000,
    "backoffBaseMs": 20,
    "backoffMaxMs": 100,
    "probeMs": 200,
    "reprobeMs": NEVER_MS,
    "reprobeSoonMs": NEVER_MS,
}
"""Of the client: a machine that is busy still says hello in time."""

WENT_WELL: Final = {"isAbort": False, "isDisconnect": False, "isError": False}


class World:
    """A page with chats on the gateway's transport, each behind the same network."""

    def __init__(self, backend: Backend, node: Node, network: Network, client: ChatClient) -> None:
        self.backend = backend
        self.node = node
        self.network = network
        self.client = client

    async def mount(self, chat: str, *, timing: dict[str, Any] | None = None, **options: Any) -> ChatState:
        """Mount a chat on a connection of its own; ``timing`` is what differs from ``TIMING``."""
        url = f"http://{self.network.address}/api/chat"
        timing = {**TIMING, **(timing or {})}
        return await self.client.mount(url, chat, chat=chat, transport="gateway", timing=timing, **options)

    async def ask(self, chat: str, scenario: Scenario = HOLD, **options: Any) -> ChatState:
        """Mount a chat, and come to the middle of its answer."""
        await self.mount(chat, **options)
        await self.client.send(scenario, chat=chat)
        return await self.client.wait(chat=chat, text=OF_5)

    async def ask_each(self, **options: Any) -> dict[str, ChatState]:
        """The same for one chat on each carrier."""
        return await each(CARRIERS, lambda carrier: self.ask(carrier, carriers=[carrier], **options))

    async def attach_each(self) -> None:
        """One chat on each carrier, live."""
        for carrier in CARRIERS:
            await self.mount(carrier, carriers=[carrier])
            await self.client.wait(chat=carrier, connection="live")

    async def watch(self, watcher: ChatClient, chat: str) -> None:
        """Mount the chat on another page, with nothing between that and the gateway."""
        await watcher.mount(api(self.node), chat, chat=chat, transport="gateway")
        await watcher.wait(chat=chat, connection="live")

    async def states(self) -> dict[str, ChatState]:
        return await each(CARRIERS, lambda chat: self.client.state(chat=chat))

    async def settled(self) -> dict[str, ChatState]:
        return await each(CARRIERS, lambda chat: settled(self.client, chat=chat))

    def assert_shown_once(self, state: ChatState, chat: str, text: str = OF_20) -> None:
        """One answer, whole; asked for once; and nobody saw that anything had happened to the network."""
        assert text_of(state["messages"][-1]) == text, chat
        assert roles(state) == ["user", "assistant"], chat
        # An answer that comes at once may be shown whole, without a `streaming` in between.
        seen = [status for status in state["statuses"] if status != "streaming"]
        assert seen == ["ready", "submitted", "ready"], chat
        assert state["errors"] == [], chat
        assert [{name: finish[name] for name in WENT_WELL} for finish in state["finishes"]] == [WENT_WELL], (
            chat
        )
        assert [end["reason"] for end in state["ends"]] == ["complete"], chat
        assert len(self.backend.named("request", id=chat)) == 1, chat
        assert not self.backend.named("close", id=chat), chat


@asynccontextmanager
async def a_world(
    make_node: Callable[..., Awaitable[Node]], major: Major = 7, **settings: Any
) -> AsyncIterator[World]:
    """Make one with the AI SDK of a major; settings are the gateway's."""
    async with Backend(major) as backend, ChatClient(major) as client:
        node = await make_node(backend.url, **settings)
        async with Network(node.address) as network:
            yield World(backend, node, network, client)
