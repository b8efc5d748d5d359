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

from gateway import journal, lease
from gateway.core.model import By, Draft, NodeId, Overlap, RecordKind, SessionId, TurnId
from gateway.journal import SessionJournal
from gateway.lease import Lease
from gateway.outcomes import Appended, Begun, Fenced
from gateway.store import Store, StoreError, StoreUnavailable, lane
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
        self,
        name: str,
        seal: Callable[[SessionId, TurnId, NodeId], Awaitable[None]] | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> AsyncIterator[Lease]:
        """A node that beats until the block is left, and then falls silent without a word."""
        async with self.node(name) as place:
            task = asyncio.create_task(place.run(seal or self.note, beat), name=f"lease-{name}")
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

    def beat(self, node: str, score: float) -> None:
        """What a beat does to the list, with a score of one's own."""
        self.admin.zadd(f"{self.prefix}:{{nodes}}", {node: score})

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


async def dead(nodes: Nodes, name: str, turns: int) -> None:
    """A node that has claimed turns and is heard of no more."""
    async with nodes.node(name) as place:
        await place.check()
        for number in range(turns):
            await place.claim(SESSION, TurnId(f"t{number}"))
        await place.check()


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

        def pages_of(node: NodeId) -> SessionJournal:
            return SessionJournal(opened, node=node, prefix=nodes.prefix, ttl_seconds=60, window_seconds=60)

        pages = pages_of(NodeId("a"))
        fences = {}

        async def begin(turn: str, place: Lease) -> None:
            await place.claim(SESSION, TurnId(turn))
            start = Draft(RecordKind.TURN_START, b"start")
            result = await pages_of(place.node).begin(
                SESSION, TurnId(turn), token=turn, new_epoch="aa", digest="d",
                overlap=Overlap.PARALLEL, path="/", by=By(), start=start, cancelled=END,
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
            await dead.claim(SESSION, TurnId(f"t{number}"))
        dead.release(SESSION, TurnId("t1"))
        await dead.check()
    async with nodes.running("a"):
        await until(lambda: "b" not in nodes.known())
    assert sorted(nodes.sealed) == [(SESSION, "t0", "b"), (SESSION, "t2", "b")]


async def test_claims_live_as_long_as_their_node_beats(nodes: Nodes) -> None:
    """They expire, so that a fleet that is gone for good leaves nothing; but a turn may run for long."""
    async with nodes.node("b") as place:
        await place.claim(SESSION, TurnId("t1"))
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
        await place.claim(SESSION, TurnId("t1"))
        await place.leave()
        await until(lambda: len(nodes.claims("b")) == 1)  # it is found silent, and the turn is ended
        place.release(SESSION, TurnId("t1"))
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
            await dead.claim(SESSION, TurnId(f"t{number}"))
        await dead.check()
    async with nodes.running("a", seal):
        await until(lambda: "b" not in nodes.known())
    assert sorted(turn for _, turn, _ in nodes.sealed) == ["t0", "t2", "t3"]


async def test_who_ends_many_turns_does_not_fall_silent_itself(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a third node would end the turns of the second, and so on."""
    monkeypatch.setattr(lease, "SEALS_AT_ONCE", 1)
    beats: set[float] = set()

    async def seal(session: SessionId, turn: TurnId, node: NodeId) -> None:
        await nodes.note(session, turn, node)
        beats.add(nodes.known()["a"])
        await asyncio.sleep(0.03)  # a store that is far away

    async with nodes.node("b") as dead:
        await dead.check()
        for number in range(40):
            await dead.claim(SESSION, TurnId(f"t{number}"))
        await dead.check()
    async with nodes.running("a", seal):
        await until(lambda: "b" not in nodes.known())
    assert len(beats) >= 4
    assert len(nodes.sealed) == len(set(nodes.sealed)) == 40


async def test_an_outage_of_the_store_seals_nothing(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """All nodes were silent for longer than a lease; whoever comes back first must not judge the others."""
    monkeypatch.setattr(lane, "OPERATION_TIMEOUT_SECONDS", 0.5)
    async with nodes.running("a") as one, nodes.running("b") as two:
        await one.claim(SESSION, TurnId("t1"))
        await two.claim(SESSION, TurnId("t2"))
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


# -- whose clock


async def test_no_clock_but_ones_own_judges(nodes: Nodes) -> None:
    """A server that takes over has another clock; what it writes may be older than all that was known."""
    async with nodes.running("a") as place:
        await until(lambda: "a" in nodes.known())
        scores = iter(range(1, 1_000_000))
        loop = asyncio.get_running_loop()
        over_at = loop.time() + 3 * LEASE_SECONDS
        while loop.time() < over_at:
            nodes.beat("b", next(scores))
            assert not await place.is_gone(NodeId("b"))
            await asyncio.sleep(0.01)
        assert place.may_seal
        await until(
            lambda: "b" not in nodes.known()
        )  # and now it says nothing more, with a score ever so new
        nodes.beat("c", 1e15)
        await until(lambda: "c" not in nodes.known())


async def test_a_list_of_nodes_that_was_lost_makes_nobody_gone(nodes: Nodes) -> None:
    """An evicted key, or FLUSHALL: the others are there, they have just not said so again."""
    async with nodes.running("a") as place, nodes.running("b") as other:
        await until(lambda: place.may_seal and other.may_seal)
        await other.claim(SESSION, TurnId("t1"))
        nodes.admin.delete(f"{nodes.prefix}:{{nodes}}")
        await place.check()
        assert not await place.is_gone(NodeId("b"))
        assert not place.may_seal
        await until(lambda: place.may_seal)
        assert not await place.is_gone(NodeId("b"))
    assert nodes.sealed == []


async def test_a_new_connection_to_the_store_begins_the_contact_anew(nodes: Nodes) -> None:
    """Who answers now may be a replica that has not heard the last second of the others."""
    async with nodes.running("a") as place:
        await until(lambda: place.may_seal)
        nodes.admin.client_kill_filter(_type="normal", skipme=True)
        await until(lambda: not place.may_seal)
        await until(lambda: place.may_seal)


async def test_a_node_that_wakes_after_it_was_buried_beats_again(nodes: Nodes) -> None:
    """It lives, and takes sends; but it has heard nobody for long enough to judge anybody."""
    async with nodes.node("b") as frozen:
        await frozen.check()
        async with nodes.running("a") as place:
            await until(lambda: "b" not in nodes.known())
            assert await place.is_gone(NodeId("b"))
            await frozen.check()
            assert "b" in nodes.known()
            assert not frozen.may_seal
            loop = asyncio.get_running_loop()
            over_at = loop.time() + LEASE_SECONDS
            await until(lambda: loop.time() > over_at)
            await frozen.check()
            assert not frozen.may_seal or await place.is_gone(NodeId("b")) is False


# -- ending the turns of others


async def test_the_turns_of_a_dead_node_are_ended_many_at_a_time(nodes: Nodes) -> None:
    """Hundreds of turns, and a store that is far away: they end within the 5 s; yet not all at once."""
    at_once: set[TurnId] = set()
    most = 0

    async def seal(session: SessionId, turn: TurnId, node: NodeId) -> None:
        nonlocal most
        at_once.add(turn)
        most = max(most, len(at_once))
        await asyncio.sleep(0.005)
        at_once.discard(turn)
        await nodes.note(session, turn, node)

    await dead(nodes, "b", 150)
    async with nodes.running("a", seal):
        await until(lambda: "b" not in nodes.known())
    assert most == lease.SEALS_AT_ONCE
    assert len(nodes.sealed) == len(set(nodes.sealed)) == 150


async def test_a_turn_that_cannot_be_ended_yet_is_ended_later(nodes: Nodes) -> None:
    """The store is away, or has lost records that their producer may yet write back: nothing is dropped."""
    refusals = 3

    async def seal(session: SessionId, turn: TurnId, node: NodeId) -> None:
        nonlocal refusals
        if turn == "t1" and refusals:
            refusals -= 1
            assert "b" in nodes.known()
            raise StoreUnavailable("unable to end the turn; the journal is behind what was seen of it")
        await nodes.note(session, turn, node)

    await dead(nodes, "b", 3)
    async with nodes.running("a", seal):
        await until(lambda: "b" not in nodes.known())
    assert refusals == 0
    assert [turn for _, turn, _ in nodes.sealed][-1] == "t1"
    assert len(nodes.sealed) == 3
    assert nodes.claims("b") == set()


async def test_a_node_that_wakes_while_it_is_buried_keeps_the_rest(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can end them itself, and much better; and it must not be forgotten with turns to its name."""
    monkeypatch.setattr(lease, "SEALS_AT_ONCE", 1)
    await dead(nodes, "b", 20)
    async with nodes.node("b") as woken:

        async def seal(session: SessionId, turn: TurnId, node: NodeId) -> None:
            await nodes.note(session, turn, node)
            await woken.check()
            await place.check()

        async with nodes.running("a", seal) as place:
            await until(lambda: bool(nodes.sealed))
            await until(lambda: place._ending is not None and place._ending.done())
            assert "b" in nodes.known()
            assert len(nodes.claims("b")) == 19
    assert len(nodes.sealed) == 1


async def test_a_node_that_wakes_as_its_last_turn_is_ended_is_not_forgotten(nodes: Nodes) -> None:
    """Whoever buries it has not heard yet; a node that lives and is on no list would be gone for all."""
    await dead(nodes, "b", 1)
    async with nodes.node("b") as woken:

        async def seal(session: SessionId, turn: TurnId, node: NodeId) -> None:
            await woken.check()
            await nodes.note(session, turn, node)

        async with nodes.running("a", seal) as place:
            await until(lambda: place._ending is not None and place._ending.done())
            assert "b" in nodes.known()
            assert nodes.claims("b") == set()
    assert len(nodes.sealed) == 1


async def test_every_beat_is_told(nodes: Nodes) -> None:
    """It is when this node's producers ask whether their turns are still theirs."""
    beats: list[float] = []

    def beat() -> None:
        beats.append(nodes.known()["a"])

    async with nodes.running("a", beat=beat):
        await until(lambda: len(beats) >= 3)
    assert sorted(set(beats)) == beats


# -- a node's own claims


async def test_an_own_turn_that_nobody_produces_is_ended(nodes: Nodes) -> None:
    """Its producer gave it up, and only the store knows whether it has ended: it must, at some time (G7)."""
    async with nodes.running("a") as place:
        await until(lambda: "a" in nodes.known())
        for number in range(3):
            await place.claim(SESSION, TurnId(f"t{number}"))
        place.abandon(SESSION, TurnId("t1"))
        assert not place.has_claimed(SESSION, TurnId("t1"))
        await place.leave()
        assert "a" in nodes.known(), "what it does not know to have ended is for others to end"
        await until(lambda: nodes.claims("a") == {f"t0 {SESSION}", f"t2 {SESSION}"})
        assert not place._abandoned
        beats = nodes.known()["a"]
        await until(lambda: nodes.known()["a"] > beats + 1000 * LEASE_SECONDS)
    assert nodes.sealed == [(SESSION, "t1", "a")]


async def test_an_own_turn_is_ended_when_it_was_nobodys_at_two_beats(nodes: Nodes) -> None:
    """Its end may be on its way."""
    async with nodes.node("a") as place:
        await place.claim(SESSION, TurnId("t1"))
        assert await place._find_strays() == set()
        place.abandon(SESSION, TurnId("t1"))
        assert await place._find_strays() == set()
        assert await place._find_strays() == {f"t1 {SESSION}"}
        place.release(SESSION, TurnId("t1"))
        assert await place._find_strays() == set()


async def test_a_claim_that_the_store_lost_is_made_again(nodes: Nodes) -> None:
    """An evicted key, or a failover: else nobody would end the turn when this node dies."""
    async with nodes.running("a") as place:
        await place.claim(SESSION, TurnId("t1"))
        await until(lambda: bool(nodes.claims("a")))
        nodes.admin.delete(f"{nodes.prefix}:{{nodes}}:a")
        await until(lambda: nodes.claims("a") == {f"t1 {SESSION}"})
    assert nodes.sealed == []


async def test_a_claim_is_waited_for_where_order_is_not_kept(nodes: Nodes) -> None:
    """On a cluster the claim and the turn are on two servers: a claim that came second might never come."""
    async with nodes.node("a") as place:
        place._store.is_sharded = True
        assert not place.claim(SESSION, TurnId("t0")).done()
        await place.claim(SESSION, TurnId("t1"))
        assert nodes.claims("a") == {f"t0 {SESSION}", f"t1 {SESSION}"}
    with pytest.raises(StoreUnavailable):
        await place.claim(SESSION, TurnId("t2"))
    await until(lambda: f"t2 {SESSION}" not in place._claimed)
    assert place._claimed == {f"t0 {SESSION}", f"t1 {SESSION}"}


# -- where clients can go


async def test_a_node_that_lives_and_stays_is_one_to_go_to(nodes: Nodes) -> None:
    """Who stops sends its clients elsewhere, if there is one: neither the dead nor who stops as well."""
    await dead(nodes, "dead", 0)
    async with nodes.running("a") as place:
        await until(lambda: "dead" not in nodes.known())
        assert not place.others_live
        async with nodes.running("b") as other:
            await until(lambda: place.others_live and other.others_live)
            other.leaving = True
            await until(lambda: not place.others_live)
            assert other.others_live
            assert not await place.is_gone(NodeId("b"))
            other.leaving = False
            await until(lambda: place.others_live)
        await until(lambda: not place.others_live)


async def test_who_was_silent_for_long_when_this_node_came_is_none_to_go_to(nodes: Nodes) -> None:
    """A fleet that was killed is on the list still, for as long as it takes to end its turns."""
    async with nodes.node("a") as place:
        await place.check()
        nodes.beat("dead", nodes.known()["a"] - 1000 * LEASE_SECONDS - 1)
        await place.check()
        assert not place.others_live
        nodes.beat("live", nodes.known()["a"])
        await place.check()
        assert place.others_live
