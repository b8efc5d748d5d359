"""Who is gone, and who may say so: nodes on a real server, with leases of a fraction of a second."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import redis

from gateway import journal, lease, store
from gateway.core.model import Draft, NodeId, Overlap, RecordKind, SessionId, TurnId
from gateway.journal import SessionJournal
from gateway.lease import Lease
from gateway.outcomes import Appended, Begun, Fenced
from gateway.store import Store, StoreError
from tests.support.valkey import running_valkey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

SCRIPTS = (*journal.SCRIPTS, *lease.SCRIPTS)
SESSION = SessionId("a chat {with} spaces")
LEASE_SECONDS = 0.6
END = Draft(RecordKind.TURN_END, b"interrupted")

Seal = tuple[SessionId, TurnId, NodeId]


class Nodes:
    """Nodes that share a server, each with a connection of its own."""

    def __init__(self, url: str, admin: redis.Redis) -> None:
        self.prefix = f"t{secrets.token_hex(4)}"
        self.url = url
        self.admin = admin
        self.sealed: list[Seal] = []

    @asynccontextmanager
    async def node(self, name: str) -> AsyncIterator[Lease]:
        async with Store(self.url, SCRIPTS) as opened:
            yield Lease(opened, node=NodeId(name), prefix=self.prefix, lease_seconds=LEASE_SECONDS)

    @asynccontextmanager
    async def running(
        self, name: str, seal: Callable[[SessionId, TurnId, NodeId], Awaitable[None]] | None = None
    ) -> AsyncIterator[Lease]:
        """A node that beats until the block is left, and then falls silent without a word."""
        async with self.node(name) as place:
            task = asyncio.create_task(place.run(seal or self.note), name=f"lease-{name}")
            try:
                yield place
                assert not task.done()
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def note(self, session: SessionId, turn: TurnId, node: NodeId) -> None:
        self.sealed.append((session, turn, node))

    def known(self) -> dict[str, float]:
        """Who beat last when, by the server's clock."""
        found: Any = self.admin.zrange(f"{self.prefix}:{{nodes}}", 0, -1, withscores=True)
        return {name.decode(): score for name, score in found}

    def claims(self, node: str) -> set[str]:
        found: Any = self.admin.smembers(f"{self.prefix}:{{nodes}}:{node}")
        return {member.decode() for member in found}

    @contextmanager
    def frozen(self) -> Iterator[None]:
        process = int(self.admin.info("server")["process_id"])
        os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(process, signal.SIGCONT)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - a lease and a server set no event
            await asyncio.sleep(0.005)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_valkey() as url:
        yield url


@pytest.fixture
def nodes(url: str) -> Iterator[Nodes]:
    with redis.Redis.from_url(url) as admin:
        yield Nodes(url, admin)


async def test_a_beat_makes_a_node_known(nodes: Nodes) -> None:
    """By the server's clock, so that nodes need not agree on the time."""
    async with nodes.node("a") as place:
        await place.check()
        seconds, micros = nodes.admin.time()
        assert nodes.known()["a"] == pytest.approx(seconds * 1000 + micros / 1000, abs=5000)


async def test_a_running_node_goes_on_beating(nodes: Nodes) -> None:
    """Else it would be taken for gone."""
    async with nodes.running("a"):
        await until(lambda: "a" in nodes.known())
        first = nodes.known()["a"]
        await until(lambda: nodes.known()["a"] > first + 1000 * LEASE_SECONDS)


async def test_nobody_is_gone_before_a_leases_worth_of_contact(nodes: Nodes) -> None:
    """A node that has just come, or come back, has heard nobody yet: that proves nothing."""
    async with nodes.node("a") as place:
        await place.check()
        assert not place.may_seal
        assert not await place.is_gone(NodeId("never-heard-of"))
        assert not place.may_seal


async def test_a_node_that_is_silent_for_a_lease_is_gone(nodes: Nodes) -> None:
    """And one that beats is not, nor is ever the node itself."""
    async with nodes.running("live"), nodes.running("a") as place:
        await until(lambda: place.may_seal)
        assert await place.is_gone(NodeId("never-heard-of"))
        assert not await place.is_gone(NodeId("live"))
        nodes.admin.zrem(f"{nodes.prefix}:{{nodes}}", "a")
        assert not await place.is_gone(NodeId("a"))


async def test_a_node_becomes_gone_when_it_stops(nodes: Nodes) -> None:
    """It said nothing; silence is all there is to go by."""
    async with nodes.running("a") as place:
        async with nodes.running("b"):
            await until(lambda: place.may_seal and "b" in nodes.known())
            assert not await place.is_gone(NodeId("b"))
        async with asyncio.timeout(10):
            while not await place.is_gone(NodeId("b")):  # noqa: ASYNC110 - a lease sets no event
                await asyncio.sleep(0.005)


async def test_the_turns_of_a_dead_node_are_ended_by_another(nodes: Nodes) -> None:
    """G7: every turn ends, also when nobody looks at it; and the dead one is refused when it wakes."""
    async with Store(nodes.url, SCRIPTS) as opened:
        pages = SessionJournal(opened, prefix=nodes.prefix, ttl_seconds=60, window_seconds=60)
        fences = {}

        async def begin(turn: str, place: Lease) -> None:
            place.claim(SESSION, TurnId(turn))
            start = Draft(RecordKind.TURN_START, b"start")
            result = await pages.begin(
                SESSION, TurnId(turn), node=place.node, token=turn, new_epoch="aa", digest="d",
                overlap=Overlap.PARALLEL, path="/", user="", start=start, cancelled=END,
            )  # fmt: skip
            assert isinstance(result, Begun)
            fences[turn] = result.fence

        async def seal(session: SessionId, turn: TurnId, node: NodeId) -> None:
            result = await pages.seal(session, turn, node=node, reason="interrupted", end=END)
            assert isinstance(result, Appended)

        async with nodes.running("a", seal) as live:
            async with nodes.running("b") as dying:
                await dying.check()
                await begin("t1", dying)
                await begin("t2", dying)
                await begin("t3", live)
            await until(lambda: "b" not in nodes.known())
            running = [turn.turn for turn in (await pages.look(SESSION)).turns if turn.is_running]
            assert running == ["t3"]
            for turn in ("t1", "t2"):
                known = await pages.turn(SESSION, TurnId(turn))
                assert known is not None
                assert known.state == "interrupted"
                late = await pages.append(SESSION, TurnId(turn), fences[turn], index=0, drafts=[END])
                assert late == Fenced()
            assert nodes.claims("b") == set()
            assert nodes.claims("a") == {f"t3 {SESSION}"}


async def test_only_what_is_claimed_is_ended(nodes: Nodes) -> None:
    """A turn that ended is released; a node may run thousands over its life."""
    async with nodes.node("b") as dead:
        await dead.check()
        for number in range(3):
            dead.claim(SESSION, TurnId(f"t{number}"))
        dead.release(SESSION, TurnId("t1"))
        await dead.check()
    async with nodes.running("a"):
        await until(lambda: "b" not in nodes.known())
    assert sorted(nodes.sealed) == [(SESSION, "t0", "b"), (SESSION, "t2", "b")]


async def test_claims_live_as_long_as_their_node_beats(nodes: Nodes) -> None:
    """They expire, so that a fleet that is gone for good leaves nothing; but a turn may run for long."""
    async with nodes.node("b") as place:
        place.claim(SESSION, TurnId("t1"))
        await place.check()
        key = f"{nodes.prefix}:{{nodes}}"
        for name in (key, f"{key}:b"):
            nodes.admin.pexpire(name, 60_000)
        await place.check()
        for name in (key, f"{key}:b"):
            assert nodes.admin.pttl(name) > 60_000


async def test_who_leaves_has_no_turns_to_end(nodes: Nodes) -> None:
    """A node that stopped in order is not waited for, and nobody looks for its turns."""
    async with nodes.node("b") as place:
        await place.check()
        place.claim(SESSION, TurnId("t1"))
        await place.leave()
    assert "b" not in nodes.known()
    assert nodes.claims("b") == set()
    async with nodes.node("dead") as place:
        await place.check()
    async with nodes.running("a"):
        await until(lambda: "dead" not in nodes.known())
    assert nodes.sealed == []


async def test_one_turn_that_cannot_be_ended_does_not_keep_the_others(nodes: Nodes) -> None:
    """A broken key of one session is a matter of that session."""

    async def seal(session: SessionId, turn: TurnId, node: NodeId) -> None:
        if turn == "t1":
            raise StoreError("unable to run end; the store refused it")
        await nodes.note(session, turn, node)

    async with nodes.node("b") as dead:
        await dead.check()
        for number in range(4):
            dead.claim(SESSION, TurnId(f"t{number}"))
        await dead.check()
    async with nodes.running("a", seal):
        await until(lambda: "b" not in nodes.known())
    assert sorted(turn for _, turn, _ in nodes.sealed) == ["t0", "t2", "t3"]


async def test_who_ends_many_turns_does_not_fall_silent_itself(nodes: Nodes) -> None:
    """Else a third node would end the turns of the second, and so on."""
    beats: set[float] = set()

    async def seal(session: SessionId, turn: TurnId, node: NodeId) -> None:
        await nodes.note(session, turn, node)
        beats.add(nodes.known()["a"])
        await asyncio.sleep(0.03)  # a store that is far away

    async with nodes.node("b") as dead:
        await dead.check()
        for number in range(40):
            dead.claim(SESSION, TurnId(f"t{number}"))
        await dead.check()
    async with nodes.running("a", seal):
        await until(lambda: "b" not in nodes.known())
    assert len(beats) >= 4
    assert len(nodes.sealed) == len(set(nodes.sealed)) == 40


async def test_an_outage_of_the_store_seals_nothing(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """All nodes were silent for longer than a lease; whoever comes back first must not judge the others."""
    monkeypatch.setattr(store, "OPERATION_TIMEOUT_SECONDS", 0.5)
    async with nodes.running("a") as one, nodes.running("b") as two:
        one.claim(SESSION, TurnId("t1"))
        two.claim(SESSION, TurnId("t2"))
        await until(lambda: one.may_seal and two.may_seal)
        with nodes.frozen():
            await until(lambda: not one.may_seal and not two.may_seal)
            loop = asyncio.get_running_loop()
            back_at = loop.time() + 2 * LEASE_SECONDS
            await until(lambda: loop.time() > back_at)
        assert not await one.is_gone(NodeId("b"))
        await until(lambda: one.may_seal and two.may_seal)
        assert not await one.is_gone(NodeId("b"))
    assert nodes.sealed == []
