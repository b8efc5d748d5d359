"""The demo's page in a real browser: two devices on one chat, each on a network that can be broken."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import pytest

from gateway.demo.backend import Pace, serve_backend
from tests.support.node import Browser
from tests.support.usechat import api

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from gateway.app import Node

    MakeNode = Callable[..., Awaitable[Node]]

pytestmark = [pytest.mark.node, pytest.mark.browser]

PANES = ("Laptop", "Phone")
QUESTION = "What happens when I cut the network?"
UNTIL_CLICKED = "offline=3600"
"""The network stays away until its button is clicked again."""

IN_THE_MIDDLE = Pace(chunk_seconds=0.016, tool_seconds=0.5)
"""Some six seconds an answer: what is done at its tool's end is done in the middle."""

AT_ONCE = Pace(chunk_seconds=0.001, tool_seconds=0.0)
HELD = Pace(chunk_seconds=0.001, tool_seconds=3600.0)
"""Its tool never comes back: only a Stop ends the answer."""


class Demo:
    """The page: panes are named by their device, elements by what they are."""

    def __init__(self, browser: Browser, page: str = "main") -> None:
        self.browser = browser
        self.page = page

    async def ask(self, pane: str, text: str) -> None:
        await self.browser.do("fill", page=self.page, selector=self._find(pane, "text"), text=text)
        await self.browser.do("click", page=self.page, selector=f"{self._pane(pane)} .send")

    async def click(self, pane: str, button: str) -> None:
        await self.browser.do("click", page=self.page, selector=self._find(pane, button))

    async def wait(self, pane: str, part: str, text: str) -> str:
        selector = f"{self._pane(pane)} {part}"
        return str(await self.browser.do("waitText", page=self.page, selector=selector, text=text))

    async def live(self, pane: str, carrier: str) -> None:
        await self.wait(pane, ".line", f"{carrier} · live")

    async def transcript(self, pane: str) -> str:
        return await self._text(f"{self._pane(pane)} .turns")

    async def answer(self, pane: str) -> str:
        return await self._text(f"{self._pane(pane)} .answer")

    async def counter(self, pane: str) -> str:
        return await self._text(self._find(pane, "counter"))

    async def questions(self, pane: str) -> int:
        selector = f"{self._pane(pane)} .bubble"
        return int(await self.browser.do("count", page=self.page, selector=selector))

    async def assert_alike(self) -> None:
        """Every pane has read the same, each record once, and the page has nothing to complain of."""
        counters = [await self.counter(pane) for pane in PANES]
        transcripts = [await self.transcript(pane) for pane in PANES]
        assert counters[0] == counters[1]
        assert counters[0].endswith("· no gaps · no duplicates")
        assert transcripts[0] == transcripts[1]
        assert await self.browser.page_errors(page=self.page) == []

    async def _text(self, selector: str) -> str:
        return str(await self.browser.do("text", page=self.page, selector=selector))

    @staticmethod
    def _pane(pane: str) -> str:
        return f'.pane[data-name="{pane}"]'

    def _find(self, pane: str, part: str) -> str:
        return f'{self._pane(pane)} [data-is="{part}"]'


class Scene(NamedTuple):
    """A page on a gateway before a demo's backend."""

    demo: Demo
    node: Node
    backend: str

    async def turns_begun(self) -> int:
        async with aiohttp.ClientSession() as session, session.get(f"{self.backend}/demo/status") as response:
            status: dict[str, Any] = await response.json()
        return int(status["started"])


@asynccontextmanager
async def scene(make_node: MakeNode, pace: Pace = IN_THE_MIDDLE, query: str = "") -> AsyncIterator[Scene]:
    async with serve_backend(pace=pace) as port, Browser() as browser:
        backend = f"http://127.0.0.1:{port}"
        node = await make_node(backend)
        demo = Demo(browser)
        await browser.open(api(node, f"/?chat=demo-1&{query}"))
        for pane in PANES:
            await demo.live(pane, "WebSocket")
        yield Scene(demo, node, backend)


async def test_a_pane_of_the_demo_that_was_offline_ends_like_the_other(make_node: MakeNode) -> None:
    """What `make demo` promises in ten seconds: go offline, come back, and not a word is missing or twice."""
    pace = Pace(chunk_seconds=0.002, tool_seconds=8.0)
    async with scene(make_node, pace, UNTIL_CLICKED) as (demo, node, _):
        await demo.ask("Laptop", QUESTION)
        for pane in PANES:
            await demo.wait(pane, ".tool-state", "running")
        await demo.click("Phone", "offline")
        await demo.wait("Phone", ".line", "no network · offline")
        complete = await demo.wait("Laptop", ".ending", "complete")
        assert "complete" not in await demo.transcript("Phone")
        await demo.click("Phone", "offline")
        await demo.wait("Phone", ".ending", complete)
        await demo.wait("Phone", ".news", "caught up: ")
        other = Demo(demo.browser, "other")
        await demo.browser.open(api(node, "/?chat=demo-1"), page="other", context="other")
        for pane in PANES:
            await other.wait(pane, ".ending", complete)
        for shown in (demo, other):
            await shown.assert_alike()
        answers = {await shown.answer("Phone") for shown in (demo, other)}
        counters = {await shown.counter("Phone") for shown in (demo, other)}
    (answer,) = answers
    assert "nothing happens to me" in answer
    assert answer.endswith("I just keep talking.")
    assert len(counters) == 1


async def test_a_pane_of_the_demo_comes_back_by_itself(make_node: MakeNode) -> None:
    """Nobody has to press anything, neither on the page nor in the client."""
    async with scene(make_node, query="offline=0.5") as (demo, _, _):
        await demo.ask("Laptop", QUESTION)
        await demo.wait("Phone", ".tool-state", "done")
        await demo.click("Phone", "offline")
        await demo.wait("Phone", ".news", "goes on after offset")
        await demo.wait("Phone", ".news", "caught up: ")
        await demo.live("Phone", "WebSocket")
        complete = await demo.wait("Laptop", ".ending", "complete")
        await demo.wait("Phone", ".ending", complete)
        await demo.assert_alike()


async def test_the_demo_goes_on_where_websockets_are_blocked(make_node: MakeNode) -> None:
    """The carrier changes in the middle of an answer, and the answer does not notice."""
    async with scene(make_node) as shown:
        demo = shown.demo
        await demo.ask("Laptop", QUESTION)
        await demo.wait("Phone", ".tool-state", "done")
        await demo.click("Phone", "block-websocket")
        await demo.wait("Phone", ".news", "→ SSE")
        await demo.live("Phone", "SSE")
        complete = await demo.wait("Laptop", ".ending", "complete")
        await demo.wait("Phone", ".ending", complete)
        await demo.live("Phone", "SSE")
        await demo.assert_alike()
        assert await shown.turns_begun() == 1


async def test_the_demo_goes_on_where_streams_are_held_back_too_and_finds_back(make_node: MakeNode) -> None:
    """What is left are plain requests, for reading and asking alike, until there is a better carrier."""
    async with scene(make_node) as shown:
        demo = shown.demo
        await demo.ask("Laptop", QUESTION)
        await demo.wait("Phone", ".tool-state", "done")
        await demo.click("Phone", "block-websocket")
        await demo.click("Phone", "block-sse")
        await demo.live("Phone", "long-poll")
        await demo.wait("Phone", ".ending", "complete")
        await demo.assert_alike()
        await demo.ask("Phone", QUESTION)
        await demo.wait("Laptop", ".turns", "from Phone")
        await demo.click("Phone", "block-websocket")
        await demo.click("Phone", "block-sse")
        await demo.wait("Phone", ".news", "→ WebSocket")
        await demo.live("Phone", "WebSocket")
        for pane in PANES:
            await demo.wait(pane, ".turn + .turn .ending", "complete")
        await demo.assert_alike()
        assert await shown.turns_begun() == 2


async def test_a_question_that_the_demo_sends_while_offline_is_asked_once(make_node: MakeNode) -> None:
    """The client keeps it, and says so; however often it is sent again, the model hears it once."""
    async with scene(make_node, AT_ONCE, UNTIL_CLICKED) as shown:
        demo = shown.demo
        await demo.click("Phone", "offline")
        await demo.ask("Phone", QUESTION)
        await demo.wait("Phone", ".waiting", f"will be sent once, when the network is back: “{QUESTION}”")
        await demo.ask("Laptop", "Tell me a story")
        await demo.wait("Laptop", ".ending", "complete")
        assert await demo.questions("Laptop") == 1
        assert await demo.questions("Phone") == 0
        await demo.click("Phone", "offline")
        for pane in PANES:
            await demo.wait(pane, ".turn + .turn .ending", "complete")
        await demo.assert_alike()
        assert [await demo.questions(pane) for pane in PANES] == [2, 2]
        assert await shown.turns_begun() == 2


async def test_a_reload_of_a_pane_reads_everything_again(make_node: MakeNode) -> None:
    """It remembers nothing, as a page does, and ends up with the very same words."""
    async with scene(make_node, AT_ONCE) as (demo, _, _):
        await demo.ask("Laptop", QUESTION)
        for pane in PANES:
            await demo.wait(pane, ".ending", "complete")
        await demo.click("Phone", "reload")
        await demo.wait("Phone", ".ending", "complete")
        await demo.live("Phone", "WebSocket")
        await demo.assert_alike()
        await demo.ask("Phone", QUESTION)
        for pane in PANES:
            await demo.wait(pane, ".turn + .turn .ending", "complete")
        await demo.assert_alike()


async def test_the_counter_of_the_demo_can_fail(make_node: MakeNode) -> None:
    """A proof that cannot come out otherwise is none."""
    count = """import('/demo/proof.js').then(({ Proof }) => {
        const proof = new Proof()
        for (const offset of [1, 2, 4, 4, 7]) proof.take({ offset })
        return [String(proof), proof.isBroken]
    })"""
    async with scene(make_node) as (demo, _, _):
        counted = await demo.browser.evaluate(count)
    assert counted == ["offset 7 · 3 gaps · 1 duplicate", True]


@pytest.mark.parametrize("is_blocked", [False, True], ids=["over a WebSocket", "over plain requests"])
async def test_stop_in_one_pane_of_the_demo_stops_the_model_for_both(
    make_node: MakeNode, *, is_blocked: bool
) -> None:
    """The line on top comes from the backend itself: it was closed, and it counts no more chunks."""
    async with scene(make_node, HELD) as (demo, _, _):
        if is_blocked:
            await demo.click("Phone", "block-websocket")
            await demo.click("Phone", "block-sse")
            await demo.live("Phone", "long-poll")
        await demo.ask("Laptop", "Tell me a story")
        await demo.wait("Phone", ".turns", "from Laptop")
        await demo.click("Phone", "stop")
        told = [await demo.wait(pane, ".ending", "stopped by Phone") for pane in PANES]
        model = await demo.browser.do(
            "waitText", selector='[data-is="model-state"]', text="stopped by the gateway"
        )
        await demo.assert_alike()
    assert model == "stopped by the gateway"
    assert told[0] == told[1]


async def test_a_stop_that_the_demo_is_told_while_offline_is_not_lost(make_node: MakeNode) -> None:
    """It ends the answer that was on the screen, as soon as there is a network."""
    async with scene(make_node, HELD, UNTIL_CLICKED) as (demo, _, _):
        await demo.ask("Laptop", QUESTION)
        await demo.wait("Phone", ".tool-state", "running")
        await demo.click("Phone", "offline")
        await demo.click("Phone", "stop")
        await demo.wait("Phone", ".waiting", "when the network is back: Stop")
        assert "stopped" not in await demo.transcript("Laptop")
        await demo.click("Phone", "offline")
        for pane in PANES:
            await demo.wait(pane, ".ending", "stopped by Phone")
        await demo.assert_alike()


async def test_the_demo_says_when_the_client_is_not_built(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A checkout that was started without `make` shows what to do, and not an empty page."""
    monkeypatch.setattr("gateway.edge.clientmodule.BUILT", tmp_path / "client.js")
    async with serve_backend() as port, Browser() as browser:
        node = await make_node(f"http://127.0.0.1:{port}")
        await browser.open(api(node, "/"))
        await browser.do("waitText", selector='[data-is="missing-error"]', text='"make client"')
        assert await browser.evaluate(
            "document.querySelector('.missing').innerText.includes('Run make client')"
        )
        errors = await browser.page_errors()
    assert errors
    assert all("404" in error for error in errors)


async def test_the_demo_says_when_it_is_not_behind_the_gateway() -> None:
    """The backend's port is one digit away, and nothing there can be resumed."""
    async with serve_backend() as port, Browser() as browser:
        await browser.open(f"http://127.0.0.1:{port}/")
        await browser.do("waitText", selector='[data-is="missing-error"]', text="404")
        seen = str(await browser.evaluate("document.querySelector('.missing').innerText"))
    assert "own port" in seen
    assert "not built" not in seen
