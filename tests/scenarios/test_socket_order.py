"""The order of one socket: a detach is final, and an attach counts once, whatever is under way."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import pytest

from gateway.app import Node
from gateway.telemetry import registry
from tests.support.backend import ScriptedBackend, answers, never_ends
from tests.support.client import RECORDS, SessionClient, send_body
from tests.support.link import Link, script
from tests.support.wires import eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from gateway.config import Config

    MakeConfig = Callable[..., Config]
    MakeNode = Callable[..., Awaitable[Node]]

ROUNDS = 30
MARKER = "a-question-like-no-other"


def subscribers() -> int:
    """The metric, for sockets that speak the session protocol."""
    return int(registry.get_sample_value("gateway_attached_subscribers", {"carrier": "websocket"}) or 0)


async def say(client: SessionClient, **command: Any) -> None:
    """Give a command and do not wait for its reply."""
    await client.socket.send_str(json.dumps(command))


async def say_send(client: SessionClient, identifier: str, session: str, text: str = "hello") -> None:
    """Send and do not wait for the reply."""
    await say(
        client, type="send", id=identifier, session=session, turn=f"turn-{session}", body=send_body(text)
    )


async def replied(client: SessionClient, identifier: str) -> dict[str, Any]:
    """Wait for a reply."""
    return await client.wait(lambda line: line.get("id") == identifier)


async def settle(client: SessionClient, session: str) -> None:
    """End the session's turn, and wait until nothing of it can be under way any more."""
    await client.cancel(session, f"turn-{session}")
    # The reads of one node keep their order: what a send still looked up has been answered after this.
    await client.attach(f"another-than-{session}")
    await client.ask(type="detach", session=f"another-than-{session}")
    await client.ask(type="ping")


def records_after(client: SessionClient, identifier: str, session: str) -> list[dict[str, Any]]:
    """A session's records that were told behind a reply."""
    behind = itertools.dropwhile(lambda line: line.get("id") != identifier, client.told)
    return [line for line in behind if line["type"] in RECORDS and line["session"] == session]


@pytest.mark.parametrize("waits", [False, True], ids=["pipelined", "after-accepted"])
async def test_no_record_follows_the_reply_to_a_detach(make_node: MakeNode, waits: bool) -> None:  # noqa: FBT001 - pytest's way
    """A client forgets the session with that reply; a record of what it forgot is a bug report."""
    async with ScriptedBackend(never_ends) as backend:
        node = await make_node(backend.url)
        before = subscribers()
        async with SessionClient(node.address) as client:
            for number in range(ROUNDS):
                session = f"s{number}"
                await say_send(client, f"send-{session}", session)
                if waits:
                    await replied(client, f"send-{session}")
                await say(client, type="detach", id=f"detach-{session}", session=session)
                await replied(client, f"send-{session}")
                await replied(client, f"detach-{session}")
                await settle(client, session)
                assert records_after(client, f"detach-{session}", session) == []
            assert subscribers() == before


@pytest.mark.usefixtures("_never_given_up")
@pytest.mark.parametrize("call", [MARKER.encode(), script("look")], ids=["begun", "attached"])
async def test_a_send_under_way_does_not_attach_again_after_a_detach(
    make_config: MakeConfig, valkey_url: str, tmp_path: Path, call: bytes
) -> None:
    """Wherever the send is when the detach comes: waiting for its turn to begin, or for its place."""
    async with (
        Link(valkey_url, tmp_path) as link,
        ScriptedBackend(answers) as backend,
        Node(make_config(backend.url, redis_url=link.url)) as node,
        SessionClient(node.address) as client,
    ):
        before = subscribers()
        held = link.hold(call)
        await say_send(client, "1", "s", MARKER)
        await held.reached()
        assert (await client.ask(type="detach", id="2", session="s"))["type"] == "ok"
        held.release()
        assert (await replied(client, "1"))["type"] == "accepted"
        await settle(client, "s")
        assert client.records == []
        assert subscribers() == before
        # And what was left can be come back to.
        await client.attach("s")
        await client.ended("turn-s")


@pytest.mark.usefixtures("_never_given_up")
async def test_records_that_were_being_read_when_a_detach_came_are_dropped(
    make_config: MakeConfig, valkey_url: str, tmp_path: Path
) -> None:
    """The writer waits for the journal while the reader goes on."""
    before = subscribers()
    async with (
        Link(valkey_url, tmp_path) as link,
        ScriptedBackend(answers) as backend,
        Node(make_config(backend.url, redis_url=link.url)) as node,
    ):
        async with SessionClient(node.address) as client:
            await client.send("s", "turn-s")
            await client.ended("turn-s")
        await eventually(lambda: subscribers() == before)
        async with SessionClient(node.address) as client:
            held = link.hold(script("read"))
            await say(client, type="attach", id="1", session="s")
            await held.reached()
            assert subscribers() == before + 1
            await say(client, type="detach", id="2", session="s")
            await eventually(lambda: subscribers() == before)
            held.release()
            await replied(client, "2")
            await settle(client, "s")
            assert client.records == []


@pytest.mark.usefixtures("_never_given_up")
async def test_an_attach_behind_a_send_that_is_attaching_leaks_no_subscriber(
    make_config: MakeConfig, valkey_url: str, tmp_path: Path
) -> None:
    """Both place a subscriber, and the socket keeps one: the other must not stay to be fed for ever."""
    async with (
        Link(valkey_url, tmp_path) as link,
        ScriptedBackend(answers) as backend,
        Node(make_config(backend.url, redis_url=link.url)) as node,
    ):
        before = subscribers()
        async with SessionClient(node.address) as client:
            held = link.hold(script("look"))
            await say_send(client, "1", "s")
            await held.reached()
            await say(client, type="attach", id="2", session="s")
            await eventually(lambda: subscribers() == before + 2)
            held.release()
            await replied(client, "2")
            await client.ended("turn-s")
            await settle(client, "s")
            assert subscribers() == before + 1
            offsets = client.offsets
            assert offsets == sorted(set(offsets))
        await eventually(lambda: subscribers() == before)


@pytest.mark.parametrize("waits", [False, True], ids=["pipelined", "after-accepted"])
async def test_there_is_a_subscriber_for_each_session_attached_to(make_node: MakeNode, waits: bool) -> None:  # noqa: FBT001 - pytest's way
    """As pages do it that send and attach without knowing of each other."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url)
        before = subscribers()
        async with SessionClient(node.address) as client:
            for number in range(ROUNDS):
                session = f"s{number}"
                await say_send(client, f"send-{session}", session)
                if waits:
                    await replied(client, f"send-{session}")
                await say(client, type="attach", id=f"attach-{session}", session=session)
                await replied(client, f"attach-{session}")
                await client.ended(f"turn-{session}")
                await settle(client, session)
            assert subscribers() == before + ROUNDS
        await eventually(lambda: subscribers() == before)
