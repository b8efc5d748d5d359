"""A store that is away for a while, for all nodes or for one; nobody loses a word, and nobody goes mad."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.watching import (
    Crowd,
    Numbers,
    Watcher,
    command,
    cpu_seconds,
    ends_of,
    faults_of,
    numbers,
    send,
    send_until_accepted,
    text_of,
    until,
    whole_journal,
)
from tests.support.backend import ScriptedBackend
from tests.support.network import Network
from tests.support.process import GatewayProcess
from tests.support.servers import Server

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.app import Node

    MakeNode = Callable[..., Awaitable[Node]]

MANY = 50
FOREVER = float("inf")


@pytest.mark.usefixtures("node_logs", "_soon_given_up")
@pytest.mark.parametrize("lease_seconds", [10.0, 0.8], ids=["within-the-lease", "beyond-the-lease"])
async def test_r4_a_store_that_is_frozen_in_the_middle_of_fifty_answers_costs_delay_only(
    make_node: MakeNode, lease_seconds: float
) -> None:
    """No chunk is lost, no turn sealed, no client sees more than a pause (G9)."""
    script = Numbers(FOREVER, pace_seconds=0.05)
    with Server() as server:
        async with AsyncExitStack() as stack:
            backend = await stack.enter_async_context(ScriptedBackend(script))
            settings = {"redis_url": server.url, "lease_seconds": lease_seconds, "poll_seconds": 0.5}
            nodes = [await make_node(backend.url, **settings) for _ in range(2)]
            crowd = Crowd(script, [node.address for node in nodes], MANY, away=1)
            await stack.enter_async_context(crowd)
            await crowd.words(5)
            with server.frozen():
                await script.says_more(40)  # the backend is not slowed, for seconds
            await script.finish()
            await crowd.ended()
            crowd.assert_whole(attaches=1)


@pytest.mark.usefixtures("node_logs", "_soon_given_up")
async def test_r5_a_store_that_is_away_for_too_long_ends_turns_as_interrupted_once_it_is_back(
    make_node: MakeNode,
) -> None:
    """The backend is not made to talk to nobody: its connections are closed past GATEWAY_OUTAGE."""
    script = Numbers(FOREVER, pace_seconds=0.05)
    with Server() as server:
        async with AsyncExitStack() as stack:
            backend = await stack.enter_async_context(ScriptedBackend(script))
            settings = {"redis_url": server.url, "lease_seconds": 5.0, "outage_seconds": 0.8}
            nodes = [await make_node(backend.url, **settings) for _ in range(2)]
            crowd = Crowd(script, [node.address for node in nodes], 10, away=1)
            await stack.enter_async_context(crowd)
            await crowd.words(3)
            with server.frozen():
                await until(lambda: script.closed == set(script.said))
            for end in (await crowd.ended()).values():
                assert (end["reason"], end["error"]["code"]) == ("interrupted", "store-lost")
            for watcher in crowd.watchers:
                shown = text_of(watcher.view, "t")
                assert shown == numbers(shown.count(" "))
                assert watcher.resyncs == []
                assert await whole_journal(nodes[0].address, watcher.session) == watcher.view
            assert (await send_until_accepted(nodes[0].address, "s0", "u"))["type"] == "accepted"
            await script.finish()
            assert (await crowd.watchers[0].ended("u"))["reason"] == "complete"


@pytest.mark.usefixtures("node_logs", "_soon_given_up")
async def test_r8_a_store_that_is_killed_and_started_again_on_its_file_has_lost_nothing(
    make_node: MakeNode,
) -> None:
    """What was acknowledged is there, and what was not is asked again."""
    script = Numbers(FOREVER, pace_seconds=0.02)
    with Server(is_persistent=True) as server:
        async with AsyncExitStack() as stack:
            backend = await stack.enter_async_context(ScriptedBackend(script))
            nodes = [await make_node(backend.url, redis_url=server.url, poll_seconds=0.5) for _ in range(2)]
            crowd = Crowd(script, [node.address for node in nodes], 10, away=1)
            await stack.enter_async_context(crowd)
            for round_ in range(3):
                await crowd.words(5 + 20 * round_)
                server.kill()
                await script.says_more(10)
                server.start()
            await crowd.words(50)
            await script.finish()
            await crowd.ended()
            crowd.assert_whole(attaches=1)


# -- what clients are told meanwhile


@pytest.mark.usefixtures("node_logs", "_soon_given_up")
@pytest.mark.parametrize("how", ["frozen", "refused"])
async def test_r4_every_command_is_answered_while_the_store_is_away(make_node: MakeNode, how: str) -> None:
    """As retryable: nothing waits for ever, nothing is said to be done that is not (C18)."""
    script = Numbers(3)
    with Server(is_persistent=True) as server:
        async with ScriptedBackend(script) as backend:
            node = await make_node(backend.url, redis_url=server.url, heartbeat_seconds=0.5)
            async with Watcher("s", node.address) as watcher:
                await watcher.attached()
                await send(node.address, "s", "t")
                await watcher.has_words("t", 3)
                if how == "frozen":
                    server.freeze()
                else:
                    server.kill()
                replies = await asyncio.gather(
                    send(node.address, "s", "u"),
                    send(node.address, "other", "u"),
                    command(node.address, type="cancel", session="s", turn="unheard-of"),
                    command(node.address, type="cancel", session="s"),
                )
                for reply in replies:
                    assert (reply["type"], reply["code"]) == ("error", "store-unavailable"), reply
                    assert reply["retryable"]
                    assert "127.0.0.1" not in reply["message"]
                assert (await command(node.address, type="ping"))["type"] == "pong"
                async with Watcher("s", node.address) as newcomer:
                    await newcomer.wait(lambda: "store-unavailable" in newcomer.refusals)
                    cancel = asyncio.create_task(cancelled(node.address, "s", "t"))
                    await until(lambda: "s/t" in script.closed)
                    assert not cancel.done()
                    if how == "frozen":
                        server.thaw()
                    else:
                        server.start()
                    assert await cancel in {"cancelled", "already-ended"}
                    for client in (watcher, newcomer):
                        assert (await client.ended("t"))["reason"] == "cancelled"
                assert watcher.attaches == 1
                await script.finish()
                await send_until_accepted(node.address, "s", "v")
                assert (await watcher.ended("v"))["reason"] == "complete"
                # What was refused may have arrived at the store all the same: then it was ended, and says so.
                reply = await send_until_accepted(node.address, "s", "u")
                end = await watcher.ended("u")
                found = (reply.get("duplicate", False), end["reason"], script.asked.get("s/u", 0))
                assert found in {(True, "interrupted", 0), (False, "complete", 1)}


async def cancelled(address: str, session: str, turn: str) -> str:
    """Cancel until that is not refused; what became of the turn."""
    while True:
        reply = await command(address, type="cancel", session=session, turn=turn)
        if reply["type"] == "cancelled":
            return str(reply["turns"][0]["result"])
        assert reply["retryable"], reply
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("how", ["frozen", "refused", "silent-network"])
async def test_r4_nothing_spins_while_the_store_is_away(make_config: Callable[..., Any], how: str) -> None:
    """A node with turns to write and clients who wait is idle, nearly; and takes few connections."""
    script = Numbers(3, pace_seconds=0.1)
    with Server(is_persistent=True) as server:
        async with AsyncExitStack() as stack:
            network = await stack.enter_async_context(Network(server.address))
            backend = await stack.enter_async_context(ScriptedBackend(script))
            node = GatewayProcess(
                upstream=backend.url,
                redis_url=f"redis://{network.address}",
                key_prefix=make_config(backend.url).key_prefix,
                lease=1,
                poll=0.5,
            )
            await stack.enter_async_context(node)
            await node.started()
            crowd = Crowd(script, [node.address], 20)
            await stack.enter_async_context(crowd)
            await crowd.words(3)
            befall(how, server, network)
            before, tried = cpu_seconds(node), network.accepted + network.refused
            # The backend's pace is the clock: all turns have something to write, all clients wait.
            await script.allow(40)
            await script.says_more(30)
            spent, connections = cpu_seconds(node) - before, network.accepted + network.refused - tried
            heal(how, server, network)
            await script.finish()
            await crowd.ended()
            crowd.assert_whole(attaches=1)
            assert not faults_of(node)
    assert connections < 130, connections
    assert spent < 0.6, spent


def befall(how: str, server: Server, network: Network) -> None:
    match how:
        case "frozen":
            server.freeze()
        case "refused":
            network.refuse()
            network.cut()
        case _:
            network.freeze()


def heal(how: str, server: Server, network: Network) -> None:
    match how:
        case "frozen":
            server.thaw()
        case "refused":
            network.accept()
        case _:
            network.cut()
            network.thaw()


# -- one node that is cut off alone


@pytest.mark.usefixtures("node_logs", "_soon_given_up")
@pytest.mark.parametrize("how", ["refused", "silent-network"])
@pytest.mark.parametrize("outage_seconds", [60.0, 0.8], ids=["back-before-its-outage", "and-for-longer"])
async def test_g6_the_turns_of_a_node_that_alone_is_cut_off_are_ended_by_another(
    make_node: MakeNode, how: str, outage_seconds: float
) -> None:
    """It closes its upstreams, and writes nothing more when it is back: it is fenced (G6, G9)."""
    script = Numbers(FOREVER, pace_seconds=0.05)
    with Server() as server:
        async with AsyncExitStack() as stack:
            network = await stack.enter_async_context(Network(server.address))
            backend = await stack.enter_async_context(ScriptedBackend(script))
            settings = {"lease_seconds": 1.0, "outage_seconds": outage_seconds, "poll_seconds": 0.5}
            lonely = await make_node(backend.url, redis_url=f"redis://{network.address}", **settings)
            other = await make_node(backend.url, redis_url=server.url, **settings)
            crowd = Crowd(script, [lonely.address, other.address], 10, away=1)
            await stack.enter_async_context(crowd)
            await crowd.words(3)
            befall(how, server, network)
            doomed, safe = crowd.sessions[::2], crowd.sessions[1::2]
            for watcher in crowd.watchers[::2]:  # of its turns; they are at the other node
                end = await watcher.ended("t")
                assert (end["reason"], end["error"]["code"]) == ("interrupted", "node-lost")
            if outage_seconds < 10:
                await until(lambda: {f"{session}/t" for session in doomed} <= script.closed)
            heal(how, server, network)
            await until(lambda: {f"{session}/t" for session in doomed} == script.closed)
            await until(lambda: not lonely._turns._producers or not set(doomed) & running(lonely))
            await script.finish()
            for watcher in crowd.watchers[1::2]:
                assert (await watcher.ended("t"))["reason"] == "complete"
            for watcher in crowd.watchers:
                assert await whole_journal(lonely.address, watcher.session) == watcher.view
                assert watcher.resyncs == []
                assert list(ends_of(watcher.view)) == ["t"]
            assert len(safe) == len(doomed)
            reply = await send_until_accepted(lonely.address, doomed[0], "u")
            assert reply["type"] == "accepted"
            assert (await crowd.watchers[0].ended("u"))["reason"] == "complete"


def running(node: Node) -> set[str]:
    return {session for session, _ in node._turns._producers}


async def test_r5_a_node_that_starts_without_a_store_says_so_and_ends() -> None:
    """Whoever supervises it starts it again; it does not pretend, and it tells no password."""
    with Server() as server:
        server.kill()
        url = f"redis://someone:of-great-secrecy@{server.address}"
        async with GatewayProcess(upstream="http://127.0.0.1:9", redis_url=url) as node:
            assert await node.exited() != 0
            said = str(node.log)
            assert "unable to" in said
            assert "of-great-secrecy" not in said
            assert "Traceback" not in said
