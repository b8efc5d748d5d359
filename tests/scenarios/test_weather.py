"""Real `useChat` for 200 turns on networks that do all that networks do."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from tests.support.network import KINDS, Network
from tests.support.node import Backend, ChatClient
from tests.support.usechat import as_bytes, each, roles, settled, text_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from gateway.app import Node
    from tests.support.network import BlockedUpgrades, Kind
    from tests.support.node import ChatState

    MakeNode = Callable[..., Awaitable[Node]]

pytestmark = pytest.mark.node

SESSIONS: Final = [f"s{number}" for number in range(20)]
TURNS: Final = 10
"""Of each session: 200 in all."""

CONNECTIONS: Final = 4
"""Of each page; its sessions share them."""

TIMING: Final = {
    "helloMs": 300,
    "backoffBaseMs": 20,
    "backoffMaxMs": 200,
    "probeMs": 200,
    "reprobeMs": 200,
    "reprobeSoonMs": 100,
    "pollSeconds": 1,
    "requestMs": 1_000,
}
HEARTBEAT_SECONDS: Final = 0.4
PATIENCE_SECONDS: Final = 90.0

WITHOUT_UPGRADES: Final[tuple[Kind, ...]] = tuple(
    kind for kind in KINDS if not kind.endswith("-upgrades") and kind != "long-poll-only"
)
"""Faults that leave it to the test how WebSockets are blocked."""


class Page(NamedTuple):
    """A device: a page with all sessions, behind a network of its own."""

    client: ChatClient
    network: Network

    async def mount(self, chat: str) -> None:
        name = f"connection {SESSIONS.index(chat) % CONNECTIONS}"
        url = f"http://{self.network.address}/api/chat"
        await self.client.mount(
            url, chat, chat=chat, transport="gateway", transportName=name, timing=TIMING
        )  # fmt: skip

    async def shown(self) -> dict[str, ChatState]:
        return await each(SESSIONS, lambda chat: self.client.state(chat=chat))


class Talk:
    """200 turns; in each session one after the other, asked from one page and the other.

    Args:
        blocked: Whether WebSockets pass in one turn of five only.
    """

    def __init__(self, pages: tuple[Page, Page], *, blocked: bool) -> None:
        self.pages = pages
        self._blocked = blocked
        self._answered = 0

    async def run(self) -> None:
        self._block()
        async with asyncio.TaskGroup() as sessions:
            for chat in SESSIONS:
                sessions.create_task(self._session(chat), name=f"session {chat}")

    async def _session(self, chat: str) -> None:
        for number in range(TURNS):
            scenario = {
                "key": key_of(chat, number),
                "word": word_of(chat, number),
                "chunks": 12,
                "delayMs": 8,
            }
            await self.pages[number % 2].client.send(scenario, chat=chat)
            for page in self.pages:
                await settled(page.client, chat=chat, finishes=number + 1, seconds=PATIENCE_SECONDS)
            self._answered += 1
            self._block()

    def _block(self) -> None:
        if not self._blocked:
            return
        for page in self.pages:
            how: BlockedUpgrades = "swallow" if self._answered % 100 < 50 else "refuse"
            page.network.block_upgrades = how if self._answered % 50 < 40 else None


def key_of(chat: str, number: int) -> str:
    return f"{chat}/{number}"


def word_of(chat: str, number: int) -> str:
    """No two turns have a word in common, and some bytes are no letter of their own."""
    return f"{key_of(chat, number)}/é😀/"


@contextmanager
def told_of_weather(seed: int, pages: tuple[Page, Page]) -> Iterator[None]:
    """Whoever sees a failure sees what the weather was."""
    try:
        yield
    except BaseException as error:
        for number, (_, network) in enumerate(pages):
            faults = ", ".join(
                f"{kind} {pause:.3f} {seconds:.3f}" for kind, pause, seconds, _ in network.faults
            )
            error.add_note(f"the weather of page {number} had seed {seed + number}, and was: {faults}")
        raise


def assert_as_if_nothing_had_been(chat: str, state: ChatState) -> None:
    """Every answer once and whole, and not one error to be seen."""
    texts = [text_of(message) for message in state["messages"] if message["role"] == "assistant"]
    said = ["".join(f"{word_of(chat, number)}{index} " for index in range(12)) for number in range(TURNS)]
    assert texts == said, chat
    assert roles(state) == ["user", "assistant"] * TURNS, chat
    assert state["errors"] == [], chat
    assert set(state["statuses"]) <= {"ready", "submitted", "streaming"}, chat
    assert len(state["finishes"]) == TURNS, chat
    for finish in state["finishes"]:
        assert (finish["isAbort"], finish["isDisconnect"], finish["isError"]) == (False, False, False), chat
    assert [end["reason"] for end in state["ends"]] == ["complete"] * TURNS, chat


@pytest.mark.parametrize(("seed", "blocked"), [(1, False), (2, True)], ids=["all carriers", "mostly blocked"])
async def test_200_turns_in_bad_weather(make_node: MakeNode, seed: int, *, blocked: bool) -> None:
    """Every answer is right on both devices and was asked for once; nobody saw that anything was wrong."""
    async with Backend(7) as backend, ChatClient(7) as laptop, ChatClient(7) as phone:
        node = await make_node(backend.url, heartbeat_seconds=HEARTBEAT_SECONDS)
        async with Network(node.address) as one, Network(node.address) as other:
            pages = (Page(laptop, one), Page(phone, other))
            with told_of_weather(seed, pages):
                for page in pages:
                    await each(SESSIONS, page.mount)
                for number, page in enumerate(pages):
                    kinds = WITHOUT_UPGRADES if blocked else KINDS
                    page.network.weather(seed + number, pauses=(0.02, 0.2), lengths=(0.02, 0.9), kinds=kinds)
                await Talk(pages, blocked=blocked).run()
                on_laptop, on_phone = [await page.shown() for page in pages]
                for chat in SESSIONS:
                    assert_as_if_nothing_had_been(chat, on_laptop[chat])
                    assert_as_if_nothing_had_been(chat, on_phone[chat])
                    assert as_bytes(on_laptop[chat]) == as_bytes(on_phone[chat]), chat
                asked = Counter(event["key"] for event in backend.named("request"))
                assert asked == {key_of(chat, number): 1 for chat in SESSIONS for number in range(TURNS)}
                assert not backend.named("close")
                # How much of it depends on how fast the machine is.
                assert all(page.network.cuts for page in pages), "there was a weather"
