"""The main path in a browser that people use, with the stock transports of `ai` 7."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from gateway.config import AbortPolicy
from tests.support.node import Backend, Browser
from tests.support.node_program import WAIT_SECONDS
from tests.support.usechat import (
    GATEWAY_ID,
    OF_5,
    OF_20,
    api,
    assert_model_was_stopped,
    ended,
    nobody_attached,
    part_of,
    text_of,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.app import Node
    from tests.support.node import Message

    MakeNode = Callable[..., Awaitable[Node]]

pytestmark = [pytest.mark.node, pytest.mark.browser]
transports = pytest.mark.parametrize("transport", ["http", "websocket"])

HOLD = {"kind": "hold"}


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend on a starved machine has longer to say that it heard the close."""
    monkeypatch.setattr("gateway.producer.HANG_UP_SECONDS", WAIT_SECONDS)


async def ask(browser: Browser, scenario: dict[str, Any], *, page: str = "main") -> None:
    await browser.fill("input", scenario, page=page)
    await browser.click("send", page=page)


async def stored(backend: Backend, count: int) -> None:
    """Wait until the backend has as many messages as the page hands it at an answer's end."""

    async def messages() -> list[Message]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{backend.url}/api/chat/c1/messages") as response,
        ):
            found: list[Message] = await response.json()
            return found

    await until(messages, lambda found: len(found) == count)


@transports
async def test_two_devices_and_a_reload_in_the_middle_show_one_answer(
    make_node: MakeNode, transport: str
) -> None:
    """Ask on one device, open it on another, reload the first while the model speaks."""
    async with Backend(7) as backend, Browser() as browser:
        node = await make_node(backend.url)
        url = api(node, f"/?chat=c1&transport={transport}")
        await browser.open(url)
        await ask(browser, HOLD)
        await browser.wait_text("message-1", OF_5, exactly=True)
        await browser.open(url, page="tablet", context="tablet")
        await browser.wait_text("message-1", OF_5, page="tablet", exactly=True)
        await browser.reload()
        await browser.wait_text("message-1", OF_5, exactly=True)
        for page in ("main", "tablet"):
            await browser.wait_text("status", "streaming", page=page)
        assert await backend.release("c1") == 1
        for page in ("main", "tablet"):
            await browser.wait_text("message-1", OF_20, page=page, exactly=True)
            await browser.wait_text("status", "ready", page=page)
        laptop, tablet = await browser.messages(), await browser.messages(page="tablet")
        assert len(backend.named("request")) == 1
        assert not backend.named("close")
        assert await browser.page_errors() == await browser.page_errors(page="tablet") == []
    assert json.dumps(laptop) == json.dumps(tablet)
    assert [message["role"] for message in laptop] == ["user", "assistant"]
    assert laptop[1]["id"].startswith(GATEWAY_ID)


@transports
async def test_an_answer_that_ended_while_its_only_tab_was_away_is_shown_once(
    make_node: MakeNode, transport: str
) -> None:
    """A tab that comes back finds the answer, and finds it once however often it is reloaded."""
    async with Backend(7) as backend, Browser() as browser:
        node = await make_node(backend.url)
        url = api(node, f"/?chat=c1&transport={transport}")
        await browser.open(url)
        await ask(browser, HOLD)
        await browser.wait_text("message-1", OF_5)
        await browser.close()
        await nobody_attached(node, "c1")
        await backend.release("c1")
        await ended(node, "c1")
        await browser.open(url)
        await browser.wait_text("message-1", OF_20, exactly=True)
        await browser.wait_text("status", "ready")
        shown = await browser.messages()
        await stored(backend, 2)
        await browser.reload()
        await browser.wait_text("message-1", OF_20, exactly=True)
        await ask(browser, {"chunks": 1})
        await browser.wait_text("message-3", "tok0 ", exactly=True)
        await browser.wait_text("status", "ready")
        again = await browser.messages()
        assert await browser.page_errors() == []
    assert text_of(shown[1]) == OF_20
    assert again[:2] == shown
    assert [message["role"] for message in again] == ["user", "assistant"] * 2


@pytest.mark.usefixtures("patient")
@transports
async def test_stop_on_one_device_settles_the_other(make_node: MakeNode, transport: str) -> None:
    """The button reaches the model, and the device that only watches knows that nothing more comes."""
    async with Backend(7) as backend, Browser() as browser:
        node = await make_node(backend.url, abort=AbortPolicy.CANCEL)
        url = api(node, f"/?chat=c1&transport={transport}")
        await browser.open(url)
        await ask(browser, HOLD)
        await browser.wait_text("message-1", OF_5)
        await browser.open(url, page="tablet", context="tablet")
        await browser.wait_text("message-1", OF_5, page="tablet")
        await browser.click("stop")
        await browser.wait_text("status", "ready", page="tablet")
        await assert_model_was_stopped(backend, "c1")
        await browser.wait_text("status", "ready")
        laptop, tablet = await browser.messages(), await browser.messages(page="tablet")
        assert await browser.page_errors() == await browser.page_errors(page="tablet") == []
    assert part_of(tablet[1], "text") == {"type": "text", "text": OF_5, "state": "done"}
    assert (laptop[1]["id"], text_of(laptop[1])) == (tablet[1]["id"], OF_5)
