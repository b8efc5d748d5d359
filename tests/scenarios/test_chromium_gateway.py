"""`useGatewayChat` in a browser that people use: two pages, two devices, and the networks they are on."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest

from tests.support.network import Network
from tests.support.node import Backend, Browser
from tests.support.node_program import WAIT_SECONDS
from tests.support.usechat import GATEWAY_ID, OF_5, OF_20, assert_model_was_stopped, part_of, roles_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from gateway.app import Node
    from tests.support.node import Message

    MakeNode = Callable[..., Awaitable[Node]]

pytestmark = [pytest.mark.node, pytest.mark.browser]
carriers = pytest.mark.parametrize("carrier", ["websocket", "sse", "long-poll"])

HOLD = {"kind": "hold"}
QUICK = {"backoffBaseMs": 20, "backoffMaxMs": 100, "probeMs": 200, "helloMs": 1_000}


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend on a starved machine has longer to say that it heard the close."""
    monkeypatch.setattr("gateway.producer.HANG_UP_SECONDS", WAIT_SECONDS)


def url_of(address: str, **query: str) -> str:
    return f"http://{address}/?" + urlencode({"chat": "c1", "transport": "gateway", **query})


async def ask(browser: Browser, scenario: dict[str, Any], *, page: str) -> None:
    await browser.fill("input", scenario, page=page)
    await browser.click("send", page=page)


class Devices:
    """A laptop and a tablet, each a context of its own, that show one chat.

    Attributes:
        url: Of the page; through the network, if there is one.
    """

    names = ("laptop", "tablet")

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser = browser
        self.url = url

    async def open(self, *names: str) -> None:
        """Show the chat, and see that nothing of it can be missed from then on."""
        for name in names:
            await self.browser.open(self.url, page=name, context=name)
            await self.browser.wait_text("connection", "live", page=name, exactly=True)

    async def show(self, text: str, status: str) -> None:
        """Wait until the answer to the first question stands on both."""
        for name in self.names:
            await self.browser.wait_text("message-1", text, page=name, exactly=True)
            await self.browser.wait_text("status", status, page=name, exactly=True)

    async def alike(self) -> list[Message]:
        """The messages of both, which are the same; and neither page has complained of anything."""
        laptop, tablet = [await self.browser.messages(page=name) for name in self.names]
        assert json.dumps(laptop) == json.dumps(tablet)
        for name in self.names:
            assert await self.browser.page_errors(page=name) == []
        return laptop


@asynccontextmanager
async def devices(address: str, **query: str) -> AsyncIterator[Devices]:
    async with Browser() as browser:
        yield Devices(browser, url_of(address, **query))


@carriers
@pytest.mark.parametrize("strict", ["false", "true"])
async def test_two_devices_and_a_reload_in_the_middle_show_one_answer(
    make_node: MakeNode, carrier: str, strict: str
) -> None:
    """Ask on one, see it on the other, reload the first while the model speaks, and ask on the other."""
    async with Backend(7) as backend:
        node = await make_node(backend.url)
        async with devices(node.address, carriers=carrier, strict=strict) as both:
            browser = both.browser
            await both.open(*both.names)
            await ask(browser, HOLD, page="laptop")
            await both.show(OF_5, "streaming")
            await browser.reload(page="laptop")
            await both.show(OF_5, "streaming")
            assert await backend.release("c1") == 1
            await both.show(OF_20, "ready")
            await ask(browser, {"chunks": 1}, page="tablet")
            for page in both.names:
                await browser.wait_text("message-3", "tok0 ", page=page, exactly=True)
                await browser.wait_text("status", "ready", page=page, exactly=True)
            shown = await both.alike()
            assert [await browser.text("carrier", page=page) for page in both.names] == [carrier] * 2
            assert len(backend.named("request")) == 2
            assert not backend.named("close")
    assert roles_of(shown) == ["user", "assistant"] * 2
    assert shown[1]["id"].startswith(GATEWAY_ID)


async def test_a_device_that_joins_in_the_middle_shows_the_same(make_node: MakeNode) -> None:
    """Its page has the question from the backend at most, and asks nobody for the rest."""
    async with Backend(7) as backend:
        node = await make_node(backend.url)
        async with devices(node.address) as both:
            await both.open("laptop")
            await ask(both.browser, HOLD, page="laptop")
            await both.browser.wait_text("message-1", OF_5, page="laptop", exactly=True)
            await both.open("tablet")
            await both.show(OF_5, "streaming")
            await backend.release("c1")
            await both.show(OF_20, "ready")
            shown = await both.alike()
    assert roles_of(shown) == ["user", "assistant"]


@pytest.mark.usefixtures("patient")
async def test_a_stop_on_one_device_ends_the_answer_on_both(make_node: MakeNode) -> None:
    """On the one that did not ask: the model is stopped, and both have the same finished message."""
    async with Backend(7) as backend:
        node = await make_node(backend.url)
        async with devices(node.address) as both:
            await both.open(*both.names)
            await ask(both.browser, HOLD, page="laptop")
            await both.show(OF_5, "streaming")
            await both.browser.click("stop", page="tablet")
            await both.show(OF_5, "ready")
            await assert_model_was_stopped(backend, "c1")
            for page in both.names:
                await both.browser.wait_text("end", "cancelled", page=page, exactly=True)
            shown = await both.alike()
    assert part_of(shown[1], "text") == {"type": "text", "text": OF_5, "state": "done"}


async def test_a_laptop_that_was_closed_and_opened_again_shows_the_rest(make_node: MakeNode) -> None:
    """Its socket is not closed but dead: only the page's own question finds that out."""
    async with Backend(7) as backend:
        node = await make_node(backend.url)
        async with (
            Network(node.address) as network,
            devices(network.address, timing=json.dumps(QUICK)) as both,
        ):
            await both.open(*both.names)
            await ask(both.browser, HOLD, page="laptop")
            await both.show(OF_5, "streaming")
            network.freeze(newcomers=False)
            await backend.release("c1")
            await backend.wait_event("end", key="c1")
            for page in both.names:
                await both.browser.evaluate("window.dispatchEvent(new Event('pageshow'))", page=page)
            await both.show(OF_20, "ready")
            await both.alike()
            assert len(backend.named("request")) == 1


async def test_a_device_without_a_network_says_so_and_catches_up(make_node: MakeNode) -> None:
    """What was asked meanwhile is sent once it is back, and what others did is shown."""
    async with Backend(7) as backend:
        node = await make_node(backend.url)
        async with (
            Network(node.address) as network,
            devices(network.address, timing=json.dumps(QUICK)) as both,
        ):
            browser = both.browser
            await both.open(*both.names)
            await ask(browser, HOLD, page="laptop")
            await both.show(OF_5, "streaming")
            await browser.offline(offline=True, context="laptop")
            network.cut()
            await browser.wait_text("connection", "offline", page="laptop", exactly=True)
            await browser.wait_text("connection", "live", page="tablet", exactly=True)
            await backend.release("c1")
            await browser.wait_text("message-1", OF_20, page="tablet", exactly=True)
            before = await browser.text("message-1", page="laptop")
            await browser.offline(offline=False, context="laptop")
            await both.show(OF_20, "ready")
            await browser.wait_text("connection", "live", page="laptop", exactly=True)
            errors = await browser.page_errors(page="laptop")
            shown = [await browser.messages(page=page) for page in both.names]
            assert len(backend.named("request")) == 1
    assert before == OF_5
    assert json.dumps(shown[0]) == json.dumps(shown[1])
    # Chromium itself complains of what it could not connect; the page of nothing.
    assert [error for error in errors if "ERR_INTERNET_DISCONNECTED" not in error] == []
