"""A call that the store carried out and whose reply nobody heard: it is done, and done once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from gateway.app import Node
from gateway.store import lane
from tests.support.backend import ScriptedBackend, answers, never_ends
from tests.support.client import SessionClient
from tests.support.link import Link, script
from tests.support.wires import SdkClient, eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gateway.config import Config

    MakeConfig = Callable[..., Config]

MARKER = "a-question-like-no-other"


@pytest.fixture
def _soon_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply that does not come need not be waited for as long as in earnest."""
    monkeypatch.setattr(lane, "OPERATION_TIMEOUT_SECONDS", 0.5)


async def states(client: SessionClient, session: str) -> dict[str, Any]:
    """The turns of a session, as whoever attaches is told."""
    return {turn["turn"]: turn["state"] for turn in (await client.attach(session))["turns"]}


@pytest.mark.usefixtures("_soon_given_up")
async def test_a_send_whose_begin_was_not_heard_of_is_answered_all_the_same(
    make_config: MakeConfig, valkey_url: str, tmp_path: Path
) -> None:
    """Taken for another's, the turn would run on paper for as long as the node lives."""
    async with (
        Link(valkey_url, tmp_path) as link,
        ScriptedBackend(answers) as backend,
        Node(make_config(backend.url, redis_url=link.url)) as node,
        SessionClient(node.address) as client,
    ):
        lost = link.lose(MARKER.encode())
        accepted = await client.send("s", "t", MARKER)
        await lost.reached()
        assert accepted["type"] == "accepted"
        assert "duplicate" not in accepted
        assert (await client.ended("t"))["reason"] == "complete"
        assert (await client.send("s", "t", MARKER))["duplicate"]
        assert len(backend.exchanges) == 1
        assert await states(client, "s") == {"t": "complete"}


@pytest.mark.usefixtures("_soon_given_up")
async def test_a_send_that_is_refused_as_unknown_leaves_no_turn_that_runs(
    make_config: MakeConfig, valkey_url: str, tmp_path: Path
) -> None:
    """Its client was told that nothing was sent; a turn without a producer would be in everybody's way."""
    async with (
        Link(valkey_url, tmp_path) as link,
        ScriptedBackend(answers) as backend,
        Node(make_config(backend.url, redis_url=link.url)) as node,
        SessionClient(node.address) as client,
    ):
        lost = link.lose(MARKER.encode(), times=2)
        refused = await client.send("s", "t", MARKER)
        await lost.reached(2)
        assert (refused["type"], refused["code"]) == ("error", "store-unavailable")
        assert refused["retryable"]

        async def has_ended() -> bool:
            return await states(client, "s") == {"t": "interrupted"}

        await eventually(has_ended)
        assert (await client.ended("t"))["error"]["code"] == "store-lost"
        assert (await client.send("s", "u", overlap="reject"))["type"] == "accepted"
        assert (await client.ended("u"))["reason"] == "complete"
        assert len(backend.exchanges) == 1


@pytest.mark.usefixtures("_soon_given_up")
async def test_a_queued_turn_whose_start_was_not_heard_of_starts(
    make_config: MakeConfig, valkey_url: str, tmp_path: Path
) -> None:
    """Asked for again, the start is no cancel: nobody cancelled."""
    async with (
        Link(valkey_url, tmp_path) as link,
        ScriptedBackend(never_ends) as backend,
        Node(make_config(backend.url, redis_url=link.url)) as node,
        SessionClient(node.address) as client,
    ):
        await client.send("s", "t")
        await backend.exchange(0)
        lost = link.lose(script("start"))
        backend.script = answers
        await client.send("s", "u", overlap="interrupt")
        await lost.reached()
        assert (await client.ended("t"))["reason"] == "cancelled"
        assert (await client.ended("u"))["reason"] == "complete"
        assert len(backend.exchanges) == 2


@pytest.mark.usefixtures("_never_given_up")
async def test_a_resume_that_comes_while_a_due_abort_is_carried_out_leaves_no_half_cancel(
    make_config: MakeConfig, valkey_url: str, tmp_path: Path
) -> None:
    """Marked as cancelled and left to run, the turn would be paid for and shown to nobody."""
    async with (
        Link(valkey_url, tmp_path) as link,
        ScriptedBackend(never_ends) as backend,
        Node(make_config(backend.url, redis_url=link.url, abort_grace_seconds=0.05)) as node,
        SdkClient(node.address) as page,
        SessionClient(node.address) as client,
    ):
        await page.send("r1", "s")
        await page.has("r1", 4)
        held = link.hold(script("cancel"))
        await page.abort("r1")
        await held.reached()
        await page.resume("r2", "s")
        await page.wait(lambda: bool(page.of("r2")))
        held.release()
        await backend.exchanges[0].closed()
        await page.ended("r2")
        assert list((await states(client, "s")).values()) == ["cancelled"]
