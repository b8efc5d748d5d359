"""A store that lost what it had acknowledged: a failover, a flush, a key, a restart without a file.

Rule: what one live producer holds comes back as it was; anything else is told to everybody. Nobody is ever
shown two contents at one cursor (each client's records are held against all others' by the chronicle).
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.watching import (
    Chronicle,
    Numbers,
    Watcher,
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
from tests.support.servers import Replicated, Server, running_failover, sentinel_url
from tests.support.shards import ClusterOfServers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from gateway.app import Node

    MakeNode = Callable[..., Awaitable[Node]]

pytestmark = pytest.mark.usefixtures("node_logs", "_soon_given_up")

SETTINGS: dict[str, Any] = {"lease_seconds": 2.0, "poll_seconds": 0.5}
"""Half a lease is what others have to write back what they hold."""


class Rehearsal:
    """Two nodes, one session, and a client at each; words flow up to where the store stops to be copied.

    Attributes:
        script: The backend's.
        nodes: Their addresses.
        watchers: One at each node.
    """

    def __init__(self, stack: AsyncExitStack, script: Numbers, nodes: list[str]) -> None:
        self.script = script
        self.nodes = nodes
        self.chronicle = Chronicle()
        self.watchers: list[Watcher] = []
        self._stack = stack

    async def watch(self, session: str = "s") -> None:
        for address in self.nodes:
            watcher = Watcher(session, address, *self.nodes, chronicle=self.chronicle)
            await self._stack.enter_async_context(watcher)
            await watcher.attached()
            self.watchers.append(watcher)

    async def words(self, turn: str, count: int) -> None:
        """Have everybody shown so many words of a turn."""
        await self.script.allow(count)
        for watcher in self.watchers:
            await watcher.has_words(turn, count)

    async def finished(self, *turns: str) -> None:
        await self.script.finish()
        for watcher in self.watchers:
            for turn in turns:
                await watcher.ended(turn)

    def assert_unbroken(self, turn: str, words: int) -> None:
        for watcher in self.watchers:
            assert watcher.resyncs == []
            assert text_of(watcher.view, turn) == numbers(words)

    async def assert_all_begin_anew(self) -> list[dict[str, Any]]:
        """Everybody was told, and shows what whoever comes now is shown; returns that."""
        journal = await whole_journal(self.nodes[0], self.watchers[0].session)
        for watcher in self.watchers:
            await watcher.has(len(journal))
            assert set(watcher.resyncs) == {"epoch-changed"}
            assert watcher.view == journal
        return journal


async def rehearsal(
    stack: AsyncExitStack, make_node: MakeNode, redis_url: str, count: int = 2, **settings: Any
) -> Rehearsal:
    script = Numbers()
    backend = await stack.enter_async_context(ScriptedBackend(script))
    nodes = [
        await make_node(backend.url, redis_url=redis_url, **{**SETTINGS, **settings}) for _ in range(count)
    ]
    return Rehearsal(stack, script, [node.address for node in nodes])


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


# -- a failover that loses the newest records


@pytest.mark.parametrize("ended", [False, True], ids=["runs", "has-just-ended"])
async def test_r13_what_a_failover_lost_of_one_live_turn_comes_back_as_it_was(
    make_node: MakeNode, stack: AsyncExitStack, *, ended: bool
) -> None:
    """Its producer holds it: same epoch, same offsets, same contents, nobody is told anything."""
    async with Replicated() as pair, stack:
        scene = await rehearsal(stack, make_node, pair.url)
        await scene.watch()
        await send(scene.nodes[0], "s", "t")
        await scene.words("t", 3)
        await until(lambda: pair.is_in_step)
        pair.link.freeze()
        await scene.words("t", 8)
        if ended:
            await scene.finished("t")
        had = [list(watcher.view) for watcher in scene.watchers]
        pair.primary.kill()
        pair.promote()
        if not ended:
            await scene.words("t", 10)
            await scene.finished("t")
        words = 8 if ended else 10
        scene.assert_unbroken("t", words)
        # Whoever comes now is shown the very records that were shown before.
        await until(lambda: journal_is(scene, scene.watchers[0].view))
        for before, watcher in zip(had, scene.watchers, strict=True):
            assert watcher.view[: len(before)] == before
        await send_until_accepted(scene.nodes[1], "s", "u")
        for watcher in scene.watchers:
            await watcher.ended("u")
        scene.assert_unbroken("t", words)


async def journal_is(scene: Rehearsal, records: list[dict[str, Any]]) -> bool:
    return await whole_journal(scene.nodes[1], "s") == records


async def test_r13_what_a_failover_lost_of_two_turns_is_told_to_everybody(
    make_node: MakeNode, stack: AsyncExitStack, node_logs: list[dict[str, Any]]
) -> None:
    """Neither producer can tell what stood between its records: a new epoch, with both turns whole."""
    async with Replicated() as pair, stack:
        scene = await rehearsal(stack, make_node, pair.url)
        await scene.watch()
        await send(scene.nodes[0], "s", "t")
        await scene.words("t", 3)
        await send(scene.nodes[1], "s", "u")
        await scene.words("u", 3)
        await until(lambda: pair.is_in_step)
        pair.link.freeze()
        for words in range(4, 9):
            await scene.words("t", words)
            await scene.words("u", words)
        pair.primary.kill()
        pair.promote()
        await scene.script.allow(12)
        await scene.script.finish()
        for watcher in scene.watchers:
            await watcher.resynced()
        await scene.finished("t", "u")
        journal = await scene.assert_all_begin_anew()
        assert text_of(journal, "t") == text_of(journal, "u") == numbers(12)
        assert ends_of(journal) == {"t": "complete", "u": "complete"}
        restored = [entry for entry in node_logs if entry["event"] == "turn.restored"]
        assert restored[0]["renewed"], "for a moment the old epoch had another history"


async def test_r13_others_wait_for_a_producer_that_reaches_the_new_primary_later(
    make_node: MakeNode, stack: AsyncExitStack, node_logs: list[dict[str, Any]]
) -> None:
    """Who sees a loss that is not its own renews nothing at once: a reader, a newcomer, a send."""
    async with Replicated() as pair, stack:
        slow = await stack.enter_async_context(Network(pair.front.address))
        scene = await rehearsal(stack, make_node, pair.url)
        backend = await stack.enter_async_context(ScriptedBackend(scene.script))
        late = await make_node(backend.url, redis_url=f"redis://{slow.address}", **SETTINGS)
        await scene.watch()
        newcomer = Watcher("s", late.address, chronicle=scene.chronicle)
        scene.watchers.append(await stack.enter_async_context(newcomer))
        await newcomer.attached()
        await send(late.address, "s", "t")
        await scene.words("t", 3)
        await until(lambda: pair.is_in_step)
        pair.link.freeze()
        await scene.words("t", 8)
        pair.primary.kill()
        slow.refuse()
        slow.cut()
        pair.promote()
        newcomer.addresses[:] = scene.nodes[1:]
        newcomer.cut()
        await until(lambda: any(entry["event"] == "journal.rewound" for entry in node_logs))
        asked = asyncio.create_task(send_until_accepted(scene.nodes[0], "s", "u"))
        await slow.until(lambda: slow.refused >= 3)  # those who wait have looked in vain meanwhile
        slow.accept()
        await asked
        await scene.script.allow(10)
        await scene.finished("t", "u")
        scene.assert_unbroken("t", 10)
        assert await whole_journal(scene.nodes[0], "s") == scene.watchers[0].view


async def test_r14_what_a_failover_lost_with_its_node_is_told_to_everybody(
    make_node: MakeNode, make_config: Callable[..., Any], stack: AsyncExitStack
) -> None:
    """Nobody holds it any more: clients begin anew with what is left, and the turn is interrupted (G3)."""
    async with Replicated() as pair, stack:
        scene = await rehearsal(stack, make_node, pair.url, 1)
        settings = {
            "upstream": make_config("http://127.0.0.1:9").upstream,
            "redis_url": pair.url,
            "key_prefix": make_config("http://127.0.0.1:9").key_prefix,
            "lease": SETTINGS["lease_seconds"],
        }
        backend = await stack.enter_async_context(ScriptedBackend(scene.script))
        settings["upstream"] = backend.url
        async with GatewayProcess(**settings) as doomed:
            await doomed.started()
            await scene.watch()
            extra = Watcher("s", doomed.address, *scene.nodes, chronicle=scene.chronicle)
            scene.watchers.append(await stack.enter_async_context(extra))
            await extra.attached()
            await send(doomed.address, "s", "t")
            await scene.words("t", 3)
            await until(lambda: pair.is_in_step)
            pair.link.freeze()
            await scene.words("t", 8)
            await doomed.kill()
            pair.primary.kill()
            pair.promote()
            for watcher in scene.watchers:
                await watcher.resynced()
                await watcher.ended("t")
            journal = await scene.assert_all_begin_anew()
            assert text_of(journal, "t") == numbers(3)
            assert ends_of(journal) == {"t": "interrupted"}
            assert not faults_of(doomed)


async def test_r15_a_place_whose_offset_was_used_again_is_told_as_resync(
    make_node: MakeNode, make_config: Callable[..., Any], stack: AsyncExitStack
) -> None:
    """Nobody was there to see the loss: all nodes are new, and another turn stands at its offset."""
    async with Replicated() as pair, stack:
        script = Numbers(8)
        backend = await stack.enter_async_context(ScriptedBackend(script))
        settings = {
            "upstream": backend.url,
            "redis_url": pair.url,
            "key_prefix": make_config(backend.url).key_prefix,
            "lease": SETTINGS["lease_seconds"],
        }
        chronicle = Chronicle(by_offset=False)
        async with GatewayProcess(**settings) as doomed:
            await doomed.started()
            await script.finish()
            await send_until_accepted(doomed.address, "s", "t")
            watcher = await stack.enter_async_context(Watcher("s", doomed.address, chronicle=chronicle))
            await watcher.ended("t")
            await until(lambda: pair.is_in_step)
            pair.link.freeze()
            await send_until_accepted(doomed.address, "s", "lost")
            await watcher.ended("lost")
            await doomed.kill()
            pair.primary.kill()
        pair.promote()
        node = await make_node(backend.url, redis_url=pair.url, **SETTINGS)
        await send_until_accepted(node.address, "s", "other")
        watcher.addresses[:] = [node.address]
        await watcher.resynced()
        await watcher.ended("other")
        assert ends_of(watcher.view) == {"t": "complete", "other": "complete"}


@pytest.mark.parametrize("producers", [1, 2])
async def test_r13_a_failover_of_sentinels_that_loses_the_newest_records(
    make_node: MakeNode, stack: AsyncExitStack, producers: int
) -> None:
    """As with an address that is led elsewhere; here the nodes find the new primary by themselves."""
    async with running_failover() as (pair, sentinels), stack:
        scene = await rehearsal(stack, make_node, sentinel_url(sentinels))
        await scene.watch()
        turns = ["t", "u"][:producers]
        for number, turn in enumerate(turns):
            await send(scene.nodes[number], "s", turn)
        await lose_by_failover(scene, turns, lambda: pair.is_in_step, pair.link.freeze, pair.primary)


@pytest.mark.parametrize("producers", [1, 2])
async def test_r17_a_failover_of_a_cluster_that_loses_the_newest_records(
    make_node: MakeNode, stack: AsyncExitStack, producers: int
) -> None:
    """As before; here a replica, whose link was cut, is elected, and the slots move to it."""
    with ClusterOfServers(3, replicas=1) as cluster:
        async with stack:
            scene = await rehearsal(stack, make_node, cluster.url)
            await scene.watch()
            turns = ["t", "u"][:producers]
            for number, turn in enumerate(turns):
                await send(scene.nodes[number], "s", turn)
            primary = next(s for s in cluster.primaries if s.admin.keys("*:journal"))
            replica = cluster.replicas[cluster.primaries.index(primary)]

            await lose_by_failover(
                scene, turns, lambda: in_step(primary, replica), lambda: cut_off_replica(primary), primary
            )


def in_step(primary: Server, replica: Server) -> bool:
    theirs, ours = replica.admin.info("replication"), primary.admin.info("replication")
    return int(theirs["slave_repl_offset"]) >= int(ours["master_repl_offset"])


async def lose_by_failover(
    scene: Rehearsal,
    turns: list[str],
    is_in_step: Callable[[], bool],
    cut: Callable[[], None],
    primary: Server,
) -> None:
    """Words flow, the link is cut, words flow and are shown, the primary dies; another takes over."""
    for turn in turns:
        await scene.words(turn, 3)
    await until(is_in_step)
    cut()
    for words in range(4, 9):
        for turn in turns:
            await scene.words(turn, words)
    primary.kill()
    await scene.script.allow(12)
    await scene.finished(*turns)
    if len(turns) == 1:
        scene.assert_unbroken(turns[0], 12)
        assert await whole_journal(scene.nodes[1], "s") == scene.watchers[0].view
    else:
        for watcher in scene.watchers:
            await watcher.resynced()
        await scene.finished(*turns)
        journal = await scene.assert_all_begin_anew()
        for turn in turns:
            assert text_of(journal, turn) == numbers(12)


@pytest.mark.parametrize("by", ["address", "sentinel", "cluster"])
async def test_r13_a_failover_amid_many_answers_is_not_noticed_where_one_live_producer_has_all(
    make_node: MakeNode, stack: AsyncExitStack, by: str
) -> None:
    """With calls on their way, clients cut off at that moment, and a node that has seen nothing of it.

    In every third session two turns run on two nodes: there everybody is told, or nothing was lost.
    """
    script = Numbers(float("inf"), pace_seconds=0.08)
    async with stack:
        store = await stack.enter_async_context(lossy_store(by))
        backend = await stack.enter_async_context(ScriptedBackend(script))
        # Half of it is more than the longest pause before a producer asks again.
        settings = {**SETTINGS, "lease_seconds": 6.0}
        nodes = [await make_node(backend.url, redis_url=store.url, **settings) for _ in range(3)]
        addresses = [node.address for node in nodes]
        sessions = {f"s{number}": ["t", "u"] if number % 3 == 2 else ["t"] for number in range(18)}
        watchers = await watch_all(stack, addresses, sessions)
        for number, (session, turns) in enumerate(sessions.items()):
            for turn in turns:
                await send_until_accepted(addresses[(number + (turn == "u")) % 2], session, turn)
        for watcher in watchers:
            await watcher.has_words("t", 3)
        store.stop_copying()
        await script.says_more(12)
        store.fail_over()
        for watcher in watchers[::2]:
            watcher.cut()
        await script.says_more(12)
        await script.finish()
        for watcher in watchers:
            turns = sessions[watcher.session]
            await watcher.ended_all(*turns)
            journal = await whole_journal(addresses[2], watcher.session)
            await watcher.shows(journal)
            assert set(ends_of(journal).values()) == {"complete"}
            assert watcher.resyncs == [] or len(turns) == 2
            for turn in turns:
                assert text_of(journal, turn) == numbers(script.said[f"{watcher.session}/{turn}"])
        assert set(script.asked.values()) == {1}


async def watch_all(stack: AsyncExitStack, addresses: list[str], sessions: Iterable[str]) -> list[Watcher]:
    """Two clients of each session, which begin at two nodes."""
    watchers, chronicle = [], Chronicle()
    for number, session in enumerate(sessions):
        for first in (number % 3, (number + 1) % 3):
            watcher = Watcher(session, *addresses[first:], *addresses[:first], chronicle=chronicle)
            watchers.append(await stack.enter_async_context(watcher))
    for watcher in watchers:
        await watcher.attached()
    return watchers


class LossyStore:
    """A store, and how to have it lose its newest records."""

    def __init__(self, url: str, stop_copying: Callable[[], None], fail_over: Callable[[], None]) -> None:
        self.url = url
        self.stop_copying = stop_copying
        self.fail_over = fail_over


@asynccontextmanager
async def lossy_store(by: str) -> AsyncIterator[LossyStore]:
    match by:
        case "address":
            async with Replicated() as pair:

                def promote() -> None:
                    pair.primary.kill()
                    pair.promote()

                yield LossyStore(pair.url, pair.link.freeze, promote)
        case "sentinel":
            async with running_failover() as (pair, sentinels):
                yield LossyStore(sentinel_url(sentinels), pair.link.freeze, pair.primary.kill)
        case _:
            with ClusterOfServers(3, replicas=1) as cluster:
                doomed = cluster.primaries[0]
                yield LossyStore(cluster.url, lambda: cut_off_replica(doomed), doomed.kill)


def cut_off_replica(primary: Server) -> None:
    """Who is connected to a primary stays so; its replica does not get back in."""
    primary.ask("CONFIG", "SET", "maxclients", 1)
    primary.ask("CLIENT", "KILL", "TYPE", "replica")


# -- a store that forgets


@pytest.mark.parametrize(
    "how", ["r10-flushall", "r12-meta", "r12-journal", "r12-turns", "r12-turn", "r12-all"]
)
async def test_r10_r12_what_is_deleted_in_the_middle_of_an_answer_ends_in_the_whole_answer(
    make_node: MakeNode, stack: AsyncExitStack, how: str
) -> None:
    """Whatever key is gone: everybody ends with the whole answer, unbroken or told to begin anew."""
    with Server() as server:
        async with stack:
            scene = await rehearsal(stack, make_node, server.url)
            await scene.watch()
            await send(scene.nodes[0], "s", "t")
            await scene.words("t", 5)
            part = how.partition("-")[2]
            if part == "flushall":
                server.admin.flushall()
            else:
                patterns = {"turn": "*:turn:*", "all": "*}:*"}
                found = [
                    k for k in server.admin.keys(patterns.get(part, f"*:{part}")) if "nodes" not in str(k)
                ]
                assert found
                server.admin.delete(*found)
            await scene.script.allow(9)
            await scene.script.finish()
            for watcher in scene.watchers:
                await watcher.has_whole("t", 9)
            journal = await whole_journal(scene.nodes[1], "s")
            for watcher in scene.watchers:
                await watcher.shows(journal)
                assert set(watcher.resyncs) <= {"epoch-changed"}
            assert ends_of(journal) == {"t": "complete"}
            assert scene.script.asked == {"s/t": 1}


async def test_r11_a_flush_between_turns_is_told_to_who_comes_with_an_old_place(
    make_node: MakeNode, stack: AsyncExitStack
) -> None:
    """The history is gone; what is asked next begins another one, and is not put behind the old."""
    with Server() as server:
        async with stack:
            # An ended turn is held for ten seconds, but not where its room is wanted.
            scene = await rehearsal(stack, make_node, server.url, max_buffer_bytes=1024)
            await scene.watch()
            await send(scene.nodes[0], "s", "t")
            await scene.script.allow(3)
            await scene.finished("t")
            for watcher in scene.watchers:
                watcher.addresses[:] = ["127.0.0.1:9"]
                watcher.cut()
                await watcher.detached()
            server.admin.flushall()
            late = await make_node_like(scene, make_node, server.url)
            await send_until_accepted(late, "s", "u")
            for watcher in scene.watchers:
                watcher.addresses[:] = [late]
                await watcher.resynced()
                await watcher.ended("u")
                assert text_of(watcher.view, "u") == numbers(3)


async def make_node_like(scene: Rehearsal, make_node: MakeNode, redis_url: str) -> str:
    backend = await scene._stack.enter_async_context(ScriptedBackend(scene.script))
    return (await make_node(backend.url, redis_url=redis_url, **SETTINGS)).address


async def test_r9_a_restart_without_a_file_loses_no_word_of_what_runs(
    make_node: MakeNode, stack: AsyncExitStack
) -> None:
    """Its producer writes it all again; and sends are refused for as long as there is no store."""
    with Server() as server:
        async with stack:
            scene = await rehearsal(stack, make_node, server.url)
            await scene.watch()
            await send(scene.nodes[0], "s", "t")
            await scene.words("t", 5)
            server.kill()
            reply = await send(scene.nodes[1], "s", "u")
            assert (reply["type"], reply["code"], reply["retryable"]) == ("error", "store-unavailable", True)
            await scene.script.allow(9)
            server.start()
            await scene.script.finish()
            for watcher in scene.watchers:
                await watcher.has_whole("t", 9)
            await send_until_accepted(scene.nodes[1], "s", "u")
            for watcher in scene.watchers:
                await watcher.ended("u")
            assert ends_of(await whole_journal(scene.nodes[0], "s"))["u"] == "complete"
            assert scene.script.asked == {"s/t": 1, "s/u": 1}


async def test_r28_a_trim_below_a_live_reader_is_told_to_it_alone(
    make_node: MakeNode, stack: AsyncExitStack
) -> None:
    """A stream cut from outside is a loss like any other: all end with the same, complete state."""
    with Server() as server:
        async with stack:
            scene = await rehearsal(stack, make_node, server.url)
            await scene.watch()
            await send(scene.nodes[0], "s", "t")
            await scene.words("t", 5)
            (key,) = server.admin.keys("*:journal")
            server.admin.xtrim(key, minid="4-0", approximate=False)
            await scene.script.allow(9)
            await scene.script.finish()
            for watcher in scene.watchers:
                await watcher.has_whole("t", 9)
            journal = await whole_journal(scene.nodes[1], "s")
            for watcher in scene.watchers:
                await watcher.shows(journal)
