"""The store carried a call out and its reply was lost: done, and done once, whichever call it was."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest

from tests.faults.watching import Crowd, Numbers, Watcher, command, ends_of, send, until, whole_journal
from tests.support.backend import ScriptedBackend
from tests.support.link import Link, script
from tests.support.process import GatewayProcess

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from gateway.app import Node
    from gateway.config import Config

    MakeNode = Callable[..., Awaitable[Node]]

pytestmark = pytest.mark.usefixtures("node_logs", "_soon_given_up")


async def test_r1_appends_whose_replies_are_lost_are_journalled_once(
    make_node: MakeNode, valkey_url: str, tmp_path: Path
) -> None:
    """Again and again, with turns of two nodes in one session: each record is there once, on all nodes."""
    words = Numbers(0)
    async with Link(valkey_url, tmp_path) as link, ScriptedBackend(words) as backend:
        one = await make_node(backend.url, redis_url=link.url, poll_seconds=0.3)
        two = await make_node(backend.url, poll_seconds=0.3)
        async with Watcher("s", one.address) as here, Watcher("s", two.address) as there:
            for watcher in (here, there):
                await watcher.attached()
            await send(one.address, "s", "t")
            await send(two.address, "s", "u")
            for count in range(1, 9):
                lost = link.lose(script("append"))
                await words.allow(5 * count)
                await lost.reached()
                for turn in ("t", "u"):
                    for watcher in (here, there):
                        await watcher.has_words(turn, 5 * count)
            await words.finish()
            for watcher in (here, there):
                await watcher.ended("t")
                await watcher.ended("u")
                assert (watcher.resyncs, watcher.attaches) == ([], 1)
            assert here.view == there.view == await whole_journal(two.address, "s")
            assert len(here.view) == 2 * (2 + 3 + 40 + 3)


async def test_r3_the_reply_to_an_end_is_lost_and_the_turn_ends_once(
    make_node: MakeNode, valkey_url: str, tmp_path: Path
) -> None:
    """Everybody is shown one end, and the node gives the turn up as ended, not as another's."""
    words = Numbers(2)
    async with Link(valkey_url, tmp_path) as link, ScriptedBackend(words) as backend:
        one = await make_node(backend.url, redis_url=link.url, poll_seconds=0.3)
        two = await make_node(backend.url, poll_seconds=0.3)
        async with Crowd(words, [one.address], 5) as crowd, Watcher("s0", two.address) as there:
            await crowd.words(2)
            await there.has_words("t", 2)
            lost = link.lose(script("end"))
            await words.finish()
            await lost.reached()
            await crowd.ended()
            await there.ended("t")
            crowd.assert_whole(attaches=1)
            assert there.view == crowd.watchers[0].view
            await until(lambda: not one._turns._producers)
            assert not one._lease._claimed


@pytest.mark.parametrize("what", ["cancel", "end"])
async def test_c6_the_reply_to_a_cancels_call_is_lost_and_the_turn_is_cancelled_once(
    make_node: MakeNode, valkey_url: str, tmp_path: Path, what: str
) -> None:
    """The client is told the truth, at once or when it asks again."""
    words = Numbers(2)
    async with Link(valkey_url, tmp_path) as link, ScriptedBackend(words) as backend:
        one = await make_node(backend.url, redis_url=link.url, poll_seconds=0.3)
        async with Crowd(words, [one.address], 1) as crowd:
            await crowd.words(2)
            lost = link.lose(script(what))
            reply = await command(one.address, type="cancel", session="s0", turn="t")
            await lost.reached()
            if reply["type"] == "error":
                assert reply["retryable"]
                reply = await command(one.address, type="cancel", session="s0", turn="t")
            assert reply["turns"][0]["result"] in {"cancelled", "already-ended"}
            await crowd.ended()
            assert words.closed == {"s0/t"}
            assert ends_of(crowd.watchers[0].view) == {"t": "cancelled"}


async def test_r3_the_reply_to_a_seal_is_lost_and_the_turn_ends_once(
    make_node: MakeNode, make_config: Callable[..., Config], valkey_url: str, tmp_path: Path
) -> None:
    """Who ends a dead node's turn asks again, and finds it ended."""
    words = Numbers(2)
    async with Link(valkey_url, tmp_path) as link, ScriptedBackend(words) as backend:
        two = await make_node(backend.url, redis_url=link.url, poll_seconds=0.3, lease_seconds=0.6)
        settings = {"redis_url": valkey_url, "key_prefix": make_config(backend.url).key_prefix, "lease": 0.6}
        async with GatewayProcess(upstream=backend.url, **settings) as doomed:
            await doomed.started()
            async with Crowd(words, [doomed.address], 3) as crowd, Watcher("s0", two.address) as there:
                await crowd.words(2)
                await there.has_words("t", 2)
                lost = link.lose(script("end"))
                await doomed.kill()
                await lost.reached()
                assert (await there.ended("t"))["reason"] == "interrupted"
                for session in crowd.sessions:
                    await until(functools.partial(has_ended, two.address, session))
                    assert ends_of(await whole_journal(two.address, session)) == {"t": "interrupted"}


async def has_ended(address: str, session: str) -> bool:
    return bool(ends_of(await whole_journal(address, session)))
