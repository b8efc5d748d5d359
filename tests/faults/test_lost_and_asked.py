"""What is asked of a turn that the store has just lost, or may have begun without anybody knowing.

Rule: who cancels a turn that runs, wherever the store stands, has it cancelled; and who sends again what was
refused for now gets an answer, of which the backend was asked once.
"""

from __future__ import annotations

import asyncio
import gc
import json
import secrets
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import redis

from gateway import sends
from gateway.core.model import By, Draft, EndReason, Overlap, RecordKind, SessionId, TurnId
from gateway.core.turn import End
from gateway.core.wire import turn_end
from gateway.outcomes import Begun
from gateway.sends import SendRequest
from gateway.store import lane
from tests.faults.test_redis_loss import Rehearsal, rehearsal
from tests.faults.watching import (
    RETRY_SECONDS,
    WAIT_SECONDS,
    Watcher,
    command,
    ends_of,
    send,
    send_until_accepted,
    until,
    whole_journal,
)
from tests.support.backend import ScriptedBackend, answers
from tests.support.client import send_body
from tests.support.servers import Replicated, Server
from tests.support.valkey import running_valkey
from tests.test_lease import Nodes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from gateway.app import Node

    MakeNode = Callable[..., Awaitable[Node]]

pytestmark = pytest.mark.usefixtures("node_logs", "_soon_given_up")

CANCELLER = "canceller"
BODY_CHARACTERS = 1_000_000
FROST_SECONDS = 4.0
"""Above what a node waits, while the store answers, before it ends what did not come again."""


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


# -- G4: a cancel of what is lost


@asynccontextmanager
async def flushed(stack: AsyncExitStack, make_node: MakeNode) -> AsyncIterator[Rehearsal]:
    """A turn runs at the first node, is watched, and the store knows nothing of it any more."""
    with Server() as server:
        async with stack:
            scene = await rehearsal(stack, make_node, server.url, lease_seconds=60)
            await send(scene.nodes[0], "s", "t")
            await scene.script.allow(3)
            await until(lambda: scene.script.said.get("s/t") == 3)
            await has_words(scene, "t", 3)
            server.admin.flushall()
            yield scene
            await scene.script.finish()


async def has_words(scene: Rehearsal, turn: str, words: int) -> None:
    """Wait until so many are journalled, and shown."""
    async with Watcher("s", scene.nodes[0]) as watcher:
        await watcher.attached()
        await watcher.has_words(turn, words)


@asynccontextmanager
async def failed_over(stack: AsyncExitStack, make_node: MakeNode) -> AsyncIterator[Rehearsal]:
    """The same, of a failover that lost the turn whole; another turn's journal has survived."""
    async with Replicated() as pair, stack:
        scene = await rehearsal(stack, make_node, pair.url)
        await send(scene.nodes[0], "s", "u")
        await until(lambda: pair.is_in_step)
        pair.link.freeze()
        await send(scene.nodes[0], "s", "t")
        await scene.script.allow(3)
        await until(lambda: scene.script.said.get("s/t") == 3)
        await has_words(scene, "t", 3)
        pair.primary.kill()
        pair.promote()
        yield scene
        await scene.script.finish()


async def cancel(address: str, turn: str | None) -> dict[str, str]:
    """Cancel, again as long as that is refused as retryable; returns what became of which turn."""
    named = {} if turn is None else {"turn": turn}
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            reply = await command(address, CANCELLER, type="cancel", session="s", **named)
            if reply["type"] == "cancelled":
                return {told["turn"]: told["result"] for told in reply["turns"]}
            assert reply["retryable"], reply
            await asyncio.sleep(RETRY_SECONDS)


async def end_of(scene: Rehearsal, turn: str) -> dict[str, Any]:
    """A turn's end, as whoever comes now is shown it; it is waited for."""
    async with Watcher("s", scene.nodes[0]) as watcher:
        await watcher.attached()
        return await watcher.ended(turn)


@pytest.mark.parametrize("loses", [flushed, failed_over], ids=["flush", "failover"])
@pytest.mark.parametrize("turn", ["t", None], ids=["named", "all"])
async def test_r13_a_cancel_where_a_lost_turn_runs_closes_its_backend_before_it_is_answered(
    make_node: MakeNode, stack: AsyncExitStack, loses: Any, turn: str | None
) -> None:
    """G4: `unknown` would leave the model running, for somebody who has just been told that it does not."""
    async with loses(stack, make_node) as scene:
        results = await cancel(scene.nodes[0], turn)
        closed = set(scene.script.closed)
        assert results["t"] == "cancelled"
        assert "s/t" in closed
        end = await end_of(scene, "t")
        assert (end["reason"], end["by"]["client"]) == ("cancelled", CANCELLER)
        assert ends_of(await whole_journal(scene.nodes[0], "s"))["t"] == "cancelled"


@pytest.mark.parametrize("loses", [flushed, failed_over], ids=["flush", "failover"])
async def test_r13_a_cancel_elsewhere_of_a_lost_turn_is_met_by_it_when_it_is_written_back(
    make_node: MakeNode, stack: AsyncExitStack, loses: Any
) -> None:
    """G4: the other node knows nothing of it and says so; the cancel stands all the same."""
    async with loses(stack, make_node) as scene:
        results = await cancel(scene.nodes[1], "t")
        assert results["t"] in {"unknown", "cancelled"}
        await until(lambda: "s/t" in scene.script.closed)
        end = await end_of(scene, "t")
        assert (end["reason"], end["by"]["client"]) == ("cancelled", CANCELLER)
        assert scene.script.asked["s/t"] == 1


async def begun_late(node: Node) -> None:
    """A turn ``t`` of session ``s`` is this node's in the journal, and nobody produces it."""
    begun = await node._sessions._journal.begin(
        SessionId("s"), TurnId("t"), token="late", new_epoch=secrets.token_hex(8), digest="d",
        overlap=Overlap.PARALLEL, path="/api/chat", by=By(),
        start=Draft(RecordKind.TURN_START, b'"path":"/api/chat","by":{}'),
        cancelled=turn_end(End(EndReason.CANCELLED)),
    )  # fmt: skip
    assert isinstance(begun, Begun)


async def test_r13_a_cancel_whose_mark_is_lost_while_it_is_waited_for_is_asked_for_again(
    make_node: MakeNode,
) -> None:
    """G4: a turn that the store knows nothing of has not ended; `already-ended` would leave it running."""
    async with ScriptedBackend(answers) as backend:
        with Server() as server:
            settings = {"redis_url": server.url, "lease_seconds": 60}
            slow, other = [await make_node(backend.url, **settings) for _ in range(2)]
            session, turn = SessionId("s"), TurnId("t")
            await slow._lease.claim(session, turn)
            await begun_late(slow)
            cancelling = asyncio.create_task(command(other.address, type="cancel", session="s", turn="t"))

            async def is_marked() -> bool:
                look = await slow._sessions.turn(session, turn)
                return look is not None and look.state == "cancelling"

            await until(is_marked)
            server.admin.flushall()
            reply = await cancelling
            assert (reply["type"], reply.get("code"), reply.get("retryable")) == (
                "error",
                "store-unavailable",
                True,
            )


# -- G9: a send that was refused for now, and comes again


@pytest.mark.parametrize("when", ["before the thaw", "after the thaw"])
async def test_r12_a_send_that_a_frost_refused_is_carried_out_when_it_comes_again(
    make_node: MakeNode, stack: AsyncExitStack, when: str
) -> None:
    """G9: the refused one may have begun it; the client was told that it may send again, and means it."""
    with Server() as server:
        async with stack:
            scene = await rehearsal(stack, make_node, server.url, 1)
            await scene.script.finish()
            for number in range(5):
                turn = f"t{number}"
                with server.frozen():
                    refused = await send(scene.nodes[0], "s", turn)
                    assert (refused["type"], refused["retryable"]) == ("error", True)
                    again = None
                    if when == "before the thaw":
                        again = asyncio.create_task(send_until_accepted(scene.nodes[0], "s", turn))
                        await asyncio.sleep(0.1 * number)  # at whatever point of its attempts
                await (again or send_until_accepted(scene.nodes[0], "s", turn))
                end = await end_of(scene, turn)
                assert end["reason"] == "complete", (number, end)
                assert scene.script.asked[f"s/{turn}"] == 1


async def test_r12_a_send_that_comes_again_after_a_long_frost_is_carried_out_all_the_same(
    make_node: MakeNode, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: nothing that would end it may wait for the frozen store, to come before it at the thaw."""
    with Server() as server:
        async with stack:
            scene = await rehearsal(stack, make_node, server.url, 1)
            await scene.script.finish()
            with server.frozen():
                assert (await send(scene.nodes[0], "s", "t"))["retryable"]
                monkeypatch.setattr(lane, "OPERATION_TIMEOUT_SECONDS", 60.0)  # what waits is not given up
                await asyncio.sleep(FROST_SECONDS)
            await send_until_accepted(scene.nodes[0], "s", "t")
            assert (await end_of(scene, "t"))["reason"] == "complete"
            assert scene.script.asked["s/t"] == 1


# -- G10: what is refused is not kept


async def test_r12_what_a_store_outage_refuses_is_not_kept_until_it_is_over(make_node: MakeNode) -> None:
    """G10: each client sends again and again, with all of its messages in it."""
    turns, times = 4, 3
    body = json.dumps(send_body("x" * BODY_CHARACTERS))
    async with ScriptedBackend(answers) as backend, aiohttp.ClientSession() as http:
        with Server() as server:
            node = await make_node(backend.url, redis_url=server.url)
            url = f"http://{node.address}/gateway/v1/commands?client=c"
            server.kill()
            for _ in range(times):
                for number in range(turns):
                    line = f'{{"id":"1","type":"send","session":"s","turn":"t{number}","body":{body}}}'
                    headers = {"Content-Type": "application/json"}
                    async with http.post(url, data=line, headers=headers) as response:
                        assert (await response.json())["retryable"]
            await until(lambda: live_requests() == 0)
            assert sorted(undoing()) == [f"undo-t{number}" for number in range(turns)]
            server.start()
            await until(lambda: not undoing())


async def test_r12_no_more_than_so_many_sends_are_left_unsure(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G10: an outage may be long, and each new turn would leave something behind."""
    monkeypatch.setattr(sends, "MAX_UNSURE", 2)
    async with ScriptedBackend(answers) as backend:
        with Server() as server:
            node = await make_node(backend.url, redis_url=server.url)
            server.kill()
            for turn in ("t0", "t1", "t2", "t0"):
                assert (await send(node.address, "s", turn))["retryable"]
            assert sorted(undoing()) == ["undo-t0", "undo-t1"]
            server.start()
            await send_until_accepted(node.address, "s", "t2")
            await until(lambda: not undoing())


def live_requests() -> int:
    gc.collect()
    return sum(type(held) is SendRequest for held in gc.get_objects())


def undoing() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("undo-")]


# -- the order of what comes back


async def test_r13_the_turns_of_a_flushed_session_come_back_in_their_order(
    make_node: MakeNode, stack: AsyncExitStack
) -> None:
    """Nobody writes; the beat finds it out, of those that have ended as of the one that runs."""
    with Server() as server:
        async with stack:
            scene = await rehearsal(stack, make_node, server.url, 1)
            for turn in ("q1", "q2", "q3"):
                await send(scene.nodes[0], "s", turn)
                await until(lambda turn=turn: f"s/{turn}" in scene.script.said)  # type: ignore[misc]
                if turn != "q3":
                    assert await cancel(scene.nodes[0], turn) == {turn: "cancelled"}
            async with Watcher("s", *scene.nodes) as watcher:
                await watcher.attached()
                await watcher.has_words("q3", 0)
                server.admin.flushall()
                await watcher.resynced()
                await watcher.wait(lambda: set(starts_of(watcher)) == {"q1", "q2", "q3"})
                assert starts_of(watcher) == ["q1", "q2", "q3"]
            await scene.script.finish()


def starts_of(watcher: Watcher) -> list[str]:
    return [record["turn"] for record in watcher.view if record["type"] == "turn-start"]


# -- turns that nobody produces


async def test_r9_a_turn_of_this_very_node_that_it_knows_nothing_of_is_ended_by_who_looks(
    make_node: MakeNode,
) -> None:
    """Its begin came late, after it was undone: nobody would ever end it, for its node lives."""
    async with ScriptedBackend(answers) as backend:
        node = await make_node(backend.url, lease_seconds=60)
        await begun_late(node)
        records = await whole_journal(node.address, "s")
        assert ends_of(records) == {"t": "interrupted"}


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with running_valkey() as url, redis.Redis.from_url(url) as admin:
        yield Nodes(url, admin)


async def test_r9_an_abandoned_turn_whose_claim_the_store_lost_is_ended_all_the_same(nodes: Nodes) -> None:
    """A failover lost the claim, and nobody else knows of the turn: it would run for ever."""
    session, turn = SessionId("s"), TurnId("t")
    async with nodes.running("a") as place:
        await place.claim(session, turn)
        await until(lambda: nodes.claims("a") == {"t s"})
        nodes.admin.delete(f"{nodes.prefix}:{{nodes}}:a")
        place.abandon(session, turn)  # before any beat can tell it again as one that runs
        await until(lambda: (session, turn, "a") in nodes.sealed)
        await until(lambda: nodes.claims("a") == set())
