"""Many nodes, one session: whatever is asked of one of them is true of all."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import redis

from gateway import lease
from gateway.app import Node
from gateway.core.model import SessionId, TurnId
from tests.support.backend import Exchange, ScriptedBackend, answers, never_ends, until_released
from tests.support.client import SessionClient
from tests.support.link import Link
from tests.support.wires import HttpChat, SdkClient, eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from gateway.config import Config

    MakeNode = Callable[..., Awaitable[Node]]
    MakeConfig = Callable[..., Config]

LEASE_SECONDS = 0.6


async def nodes(make_node: MakeNode, backend: ScriptedBackend, count: int = 2, **settings: Any) -> list[Node]:
    """So many nodes on one store; no bell is waited for where a poll would find it."""
    return [await make_node(backend.url, poll_seconds=60, **settings) for _ in range(count)]


def chunks_of(turn: str) -> Callable[[dict[str, Any]], bool]:
    return lambda line: line.get("turn") == turn and line["type"] == "chunk"


def says(delta: str) -> Callable[[dict[str, Any]], bool]:
    return lambda line: bool(line.get("data", {}).get("delta") == delta)


async def ends(node: Node, session: str) -> list[str]:
    """The reasons of all the session's turn-ends, in order; of a session whose turns have ended."""
    async with SessionClient(node.address) as reader:
        reply = await reader.attach(session)
        for turn in reply["turns"]:
            await reader.ended(turn["turn"])
        await reader.ask(type="ping")
        return [record["reason"] for record in reader.records if record["type"] == "turn-end"]


# -- one session, seen from anywhere


async def test_what_one_node_produces_is_seen_live_on_another(make_node: MakeNode) -> None:
    """The same records at the same offsets with the same cursors, while the turn runs."""
    said = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.text("one", finish=False)
        await said.wait()
        await exchange.text("two", start=False, finish=False)
        await exchange.release.wait()
        await exchange.text("three", start=False)

    async with ScriptedBackend(script) as backend:
        one, two = await nodes(make_node, backend)
        async with SessionClient(one.address) as here, SessionClient(two.address) as there:
            await there.attach("s")
            await here.send("s", "t1")
            await there.wait(chunks_of("t1"), 4)
            said.set()
            await there.wait(chunks_of("t1"), 5)
            assert there.records[-1]["data"]["delta"] == "two"
            async with SessionClient(two.address) as late:
                await late.attach("s", there.records[2]["cursor"])
                (await backend.exchange()).release.set()
                for client in (here, there, late):
                    assert (await client.ended("t1"))["reason"] == "complete"
                assert here.records == there.records
                assert late.records == there.records[3:]
            assert there.offsets == list(range(1, len(there.records) + 1))


async def test_a_reload_on_another_node_gets_the_whole_answer(make_node: MakeNode) -> None:
    """A load balancer sends the page anywhere; the stock transport's resume must not notice."""
    async with ScriptedBackend(until_released) as backend:
        one, two = await nodes(make_node, backend)
        async with HttpChat(one.address) as before, HttpChat(two.address) as after:
            answer = await before.post("s")
            await answer.has(4)
            await answer.cut()
            again = await after.stream("s")
            await again.has(4)
            (await backend.exchange()).release.set()
            await again.end()
            assert (again.status, again.whole, again.text) == (200, True, "onetwo")
            assert again.turn == answer.turn
            await eventually(lambda: gone(after))
            assert (await before.stream("s")).status == 204, "it was read, wherever that was"


async def gone(http: HttpChat) -> bool:
    answer = await http.stream("s")
    return answer.status == 204


async def test_clients_move_between_nodes_in_the_middle_of_an_answer(make_node: MakeNode) -> None:
    """And between carriers: a cursor of one node is a cursor of all."""
    steps = 12

    async def script(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.text(finish=False)
        for number in range(steps):
            exchange.release.clear()
            await exchange.text(f"{number} ", start=False, finish=False)
            await exchange.release.wait()
        await exchange.text(start=False)

    async with ScriptedBackend(script) as backend:
        three = await nodes(make_node, backend, 3)
        async with SessionClient(three[0].address) as sender:
            await sender.send("s", "t1")
            exchange = await backend.exchange()
            records = [await sender.wait(lambda line: line["type"] == "turn-start")]
            for number in range(steps):
                async with SessionClient(three[number % 3].address) as client:
                    reply = await client.attach("s", records[-1]["cursor"])
                    assert "resync" not in reply
                    await client.wait(says(f"{number} "))
                    records += client.records
                    exchange.release.set()
            await sender.ended("t1")
            assert sender.records[: len(records)] == records


async def test_a_place_that_the_journal_has_not_yet_is_waited_for(make_node: MakeNode) -> None:
    """A failover lost it, the turn's node has it and is writing it back: no reason to begin anew."""
    async with ScriptedBackend(until_released) as backend:
        one, two = await nodes(make_node, backend, lease_seconds=20)
        async with SessionClient(one.address) as here, SessionClient(two.address) as there:
            await here.send("s", "t1")
            await here.wait(chunks_of("t1"), 4)
            epoch, offset, tag, *_ = here.records[-1]["cursor"].split(".")
            attaching = asyncio.create_task(there.attach("s", f"{epoch}.{int(offset) + 1}.{tag}"))
            assert (await there.ask(type="ping"))["type"] == "pong"
            assert not attaching.done()
            (await backend.exchange()).release.set()
            await here.ended("t1")
            assert "resync" not in await attaching
            await there.ended("t1")
            assert there.records == here.records[int(offset) + 1 :]


async def test_a_place_that_does_not_come_is_told_as_resync(make_node: MakeNode) -> None:
    """Nobody has it; and on a client's word alone no journal is given up."""
    async with ScriptedBackend(answers) as backend:
        one, two = await nodes(make_node, backend, lease_seconds=0.2)
        async with SessionClient(one.address) as here, SessionClient(two.address) as there:
            await here.send("s", "t1")
            await here.ended("t1")
            epoch, offset, *rest = here.records[-1]["cursor"].split(".")
            assert (await there.attach("s", f"{epoch}.{int(offset) + 7}.{'.'.join(rest)}"))["resync"] == (
                "epoch-changed"
            )
            assert (await there.ended("t1"))["reason"] == "complete"
            assert there.records == here.records
            assert "resync" not in await here.attach("s", here.records[3]["cursor"])


async def test_a_place_in_another_history_is_told_as_resync(make_node: MakeNode) -> None:
    """The offset is there, in the same epoch, of the same turn; what stands before it is something else."""
    async with ScriptedBackend(answers) as backend:
        (node,) = await nodes(make_node, backend, 1)
        async with SessionClient(node.address) as client:
            await client.send("s", "t1")
            await client.ended("t1")
            place, _, check = client.records[3]["cursor"].rpartition(".")
            other = "0" * 8 if check != "0" * 8 else "1" * 8
            assert (await client.attach("s", f"{place}.{other}"))["resync"] == "epoch-changed"
            assert "resync" not in await client.attach("s", f"{place}.{check}")


# -- one send, one generation (G3)


async def test_a_send_that_is_repeated_elsewhere_at_once_asks_the_backend_once(make_node: MakeNode) -> None:
    """A client whose connection died while it sent cannot know, and asks the next node."""
    async with ScriptedBackend(answers) as backend:
        one, two = await nodes(make_node, backend)
        async with SessionClient(one.address) as here, SessionClient(two.address) as there:
            for number in range(20):
                turn = f"t{number}"
                replies = await asyncio.gather(here.send("s", turn), there.send("s", turn))
                assert [reply["type"] for reply in replies] == ["accepted"] * 2
                assert sorted(reply.get("duplicate", False) for reply in replies) == [False, True]
                assert replies[0]["cursor"] == replies[1]["cursor"]
                for client in (here, there):
                    assert (await client.ended(turn))["reason"] == "complete"
            assert here.records == there.records
        assert len(backend.exchanges) == 20
        for node in (one, two):
            assert node._lease._claimed == set()


async def test_a_post_that_is_repeated_on_another_node_gets_the_same_answer(make_node: MakeNode) -> None:
    """While it comes, when it is there, and when it was a refusal (C6)."""

    async def script(exchange: Exchange) -> None:
        if exchange.json["id"] == "refused":
            await exchange.head("429 Too Many Requests", {"Content-Type": "text/plain"})
            await exchange.raw(b"slow down")
            await exchange.end()
        else:
            await until_released(exchange)

    async with ScriptedBackend(script) as backend:
        one, two = await nodes(make_node, backend)
        async with HttpChat(one.address) as here, HttpChat(two.address) as there:
            first = await here.post("s", headers={"Idempotency-Key": "k1"})
            await first.has(4)
            second = await there.post("s", headers={"Idempotency-Key": "k1"})
            await second.has(4)
            (await backend.exchange()).release.set()
            for answer in (first, second):
                await answer.end()
                third = await there.post("s", headers={"Idempotency-Key": "k1"})
                await third.end()
                assert [(event.id, event.data) for event in third.events] == [
                    (event.id, event.data) for event in answer.events
                ]
            for http in (here, there):
                refused = await http.post("refused", headers={"Idempotency-Key": "k2"})
                assert (refused.status, await refused.end()) == (429, b"slow down")
        assert len(backend.exchanges) == 2


# -- cancel means stopped (G4)


async def test_a_cancel_on_another_node_closes_the_upstream_before_it_is_answered(
    make_node: MakeNode,
) -> None:
    """Stop reaches the model from any device through any replica."""
    async with ScriptedBackend(never_ends) as backend:
        one, two = await nodes(make_node, backend)
        async with SessionClient(one.address) as here, SessionClient(two.address) as there:
            await here.send("s", "t1")
            await here.wait(chunks_of("t1"), 4)
            exchange = await backend.exchange()
            reply = await there.cancel("s", "t1")
            assert exchange.was_closed.is_set()
            assert reply["turns"] == [{"turn": "t1", "result": "cancelled"}]
            assert (await here.ended("t1"))["reason"] == "cancelled"
            assert (await there.cancel("s", "t1"))["turns"] == [{"turn": "t1", "result": "already-ended"}]
            await here.ask(type="ping")
            assert here.records[-1]["type"] == "turn-end"
        assert await ends(two, "s") == ["cancelled"]


async def test_a_cancel_on_another_node_reaches_a_backend_that_has_said_nothing(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is appended meanwhile, so nothing but the bell tells the turn's node (C12)."""
    monkeypatch.setattr(lease, "MAX_BEAT_SECONDS", 60.0)  # no beat comes to the rescue

    async def says_nothing(exchange: Exchange) -> None:
        await exchange.closed()

    async with ScriptedBackend(says_nothing) as backend:
        one, two = await nodes(make_node, backend, lease_seconds=180)
        async with SessionClient(one.address) as here, HttpChat(two.address) as there:
            for number in range(5):
                await here.send("s", f"t{number}")
                exchange = await backend.exchange(number)
                told = await there.stop("s")
                assert exchange.was_closed.is_set()
                assert told["turns"] == [{"turn": f"t{number}", "result": "cancelled"}]
        assert await ends(two, "s") == ["cancelled"] * 5


@pytest.mark.usefixtures("_never_given_up")
async def test_a_cancel_that_is_faster_than_the_reply_to_the_send_is_not_forgotten(
    make_node: MakeNode, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bell comes by another connection; the turn's node hears it before it knows that it has the turn."""
    monkeypatch.setattr(lease, "MAX_BEAT_SECONDS", 60.0)  # no beat comes to the rescue
    async with Link(valkey_url, tmp_path) as link, ScriptedBackend(never_ends) as backend:
        one = await make_node(backend.url, redis_url=link.url, poll_seconds=60, lease_seconds=180)
        (two,) = await nodes(make_node, backend, 1)
        async with SessionClient(one.address) as here, SessionClient(two.address) as there:
            await here.attach("s")
            await there.send("s", "t0")
            await here.wait(chunks_of("t0"), 4)  # so it hears the bells of the session
            held = link.hold(b"a-question-of-its-own")
            sending = asyncio.create_task(here.send("s", "t1", "a-question-of-its-own"))
            await held.reached()
            cancelling = asyncio.create_task(there.cancel("s", "t1"))
            await eventually(lambda: bool(one._turns._rung_early))
            held.release()
            await sending
            assert (await cancelling)["turns"] == [{"turn": "t1", "result": "cancelled"}]
            assert len(backend.exchanges) == 1 or backend.exchanges[1].was_closed.is_set()


async def test_a_cancel_whose_bell_was_lost_is_seen_at_the_next_beat(make_node: MakeNode) -> None:
    """A doorbell is a hint (C20); the answer to the cancel waits, and is true."""
    async with ScriptedBackend(never_ends) as backend:
        one, two = await nodes(make_node, backend, lease_seconds=LEASE_SECONDS)
        one._turns._doorbell.on_turn = lambda *_: None  # what it would say never arrives
        async with SessionClient(one.address) as here, SessionClient(two.address) as there:
            await here.send("s", "t1")
            await here.wait(chunks_of("t1"), 4)
            exchange = await backend.exchange()
            reply = await there.cancel("s", "t1")
            assert reply["turns"] == [{"turn": "t1", "result": "cancelled"}]
            assert exchange.was_closed.is_set()


async def test_a_hundred_cancels_from_three_nodes_give_one_end(make_node: MakeNode) -> None:
    """Everybody presses Stop; everybody is told the same (C15)."""
    async with ScriptedBackend(never_ends) as backend:
        three = await nodes(make_node, backend, 3)
        async with (
            SessionClient(three[0].address) as first,
            SessionClient(three[1].address) as second,
            SessionClient(three[2].address) as third,
        ):
            await first.send("s", "t1")
            await first.wait(chunks_of("t1"), 4)
            clients = (first, second, third)
            replies = await asyncio.gather(*(clients[number % 3].cancel("s", "t1") for number in range(100)))
            results = {reply["turns"][0]["result"] for reply in replies}
            assert "cancelled" in results
            assert results <= {"cancelled", "already-ended"}
        assert await ends(three[2], "s") == ["cancelled"]
        assert len(backend.exchanges) == 1


async def test_a_cancel_on_another_node_that_races_with_the_end_gives_one_end(make_node: MakeNode) -> None:
    """What the client is told of it is what the journal says (C16)."""
    async with ScriptedBackend(until_released) as backend:
        one, two = await nodes(make_node, backend)
        async with SessionClient(one.address) as here, SessionClient(two.address) as there:
            for number in range(20):
                turn = f"t{number}"
                await here.send("s", turn)
                exchange = await backend.exchange(number)
                await here.wait(chunks_of(turn), 4)
                exchange.release.set()
                for _ in range(number % 5):
                    await asyncio.sleep(0)
                result = (await there.cancel("s", turn))["turns"][0]["result"]
                reason = (await here.ended(turn))["reason"]
                assert (result, reason) in {("cancelled", "cancelled"), ("already-ended", "complete")}
        assert len(await ends(one, "s")) == 20


async def test_a_cancel_on_one_node_that_overtook_its_send_to_another_keeps_it_from_the_backend(
    make_node: MakeNode,
) -> None:
    """A Stop that was faster than the send is meant all the same, whichever way the two went (C10)."""
    async with ScriptedBackend(answers) as backend:
        one, two = await nodes(make_node, backend)
        async with SessionClient(one.address) as here, SessionClient(two.address) as there:
            assert (await there.cancel("s", "t1"))["turns"] == [{"turn": "t1", "result": "unknown"}]
            assert (await here.send("s", "t1"))["type"] == "accepted"
            assert (await here.ended("t1"))["reason"] == "cancelled"
        assert backend.exchanges == []


async def test_cancelling_a_turn_of_one_node_leaves_that_of_another_alone(make_node: MakeNode) -> None:
    """A Stop is about one answer (G4, C17)."""
    async with ScriptedBackend(until_released) as backend:
        one, two = await nodes(make_node, backend)
        async with SessionClient(one.address) as here, SessionClient(two.address) as there:
            await here.send("s", "t1")
            first = await backend.exchange(0)
            await there.send("s", "t2")
            second = await backend.exchange(1)
            await here.cancel("s", "t2")
            assert second.was_closed.is_set()
            assert not first.was_closed.is_set()
            first.release.set()
            for client in (here, there):
                assert (await client.ended("t1"))["reason"] == "complete"
                assert (await client.ended("t2"))["reason"] == "cancelled"


async def test_the_backends_own_stop_is_called_by_the_node_that_has_the_turn(make_node: MakeNode) -> None:
    """It alone has the sender's credentials; and once, however many ask."""

    async def script(exchange: Exchange) -> None:
        if exchange.target.endswith("/stop"):
            await answers(exchange)
        else:
            await never_ends(exchange)

    async with ScriptedBackend(script) as backend:
        one, two = await nodes(make_node, backend, upstream_stop="POST /api/chat/{id}/stop")
        async with HttpChat(one.address) as here, HttpChat(two.address) as there:
            answer = await here.post("s", headers={"Authorization": "Bearer of-the-sender"})
            await answer.has(4)
            await asyncio.gather(there.stop("s"), there.stop("s"), here.stop("s"))
            stop = await backend.exchange(1)
            assert (stop.method, stop.target) == ("POST", "/api/chat/s/stop")
            assert stop.headers["authorization"] == "Bearer of-the-sender"
            await here.stop("s")
        assert len(backend.exchanges) == 2


# -- interrupt


async def test_a_send_that_interrupts_a_turn_of_another_node_waits_until_it_has_let_go(
    make_node: MakeNode,
) -> None:
    """The backend must not hear the new question before it has heard that the old one is over (C23)."""
    order: list[str] = []

    async def script(exchange: Exchange) -> None:
        text = exchange.json["messages"][0]["parts"][0]["text"]
        order.append(f"{text} came")
        await exchange.head()
        await exchange.text("one", finish=False)
        await exchange.closed()
        order.append(f"{text} closed")

    async with ScriptedBackend(script) as backend:
        one, two = await nodes(make_node, backend)
        async with SessionClient(one.address) as here, SessionClient(two.address) as there:
            for number in range(0, 10, 2):
                await here.send("s", f"t{number}", f"{number}", overlap="interrupt")
                await here.wait(chunks_of(f"t{number}"), 4)
                await there.send("s", f"t{number + 1}", f"{number + 1}", overlap="interrupt")
                await there.wait(chunks_of(f"t{number + 1}"), 4)
                assert (await there.ended(f"t{number}"))["reason"] == "cancelled"
            await here.cancel("s")
        expected = [f"{number} {what}" for number in range(10) for what in ("came", "closed")]
        assert order == expected


# -- the SDK's own abort


async def test_an_abort_on_another_node_cancels_when_nobody_resumes(make_node: MakeNode) -> None:
    """Its deadline stands with the turn, and the turn's node keeps it."""
    async with ScriptedBackend(never_ends) as backend:
        one, two = await nodes(make_node, backend, abort_grace_seconds=0.05, lease_seconds=10)
        async with SdkClient(one.address) as here, SdkClient(two.address) as there:
            await here.send("r1", "s")
            await here.has("r1", 4)
            await there.resume("r2", "s")
            await there.has("r2", 4)
            await there.abort("r2")
            await (await backend.exchange()).closed()
            assert (await here.ended("r1"))["type"] == "end"
        assert await ends(two, "s") == ["cancelled"]


@pytest.mark.parametrize("by", ["sdk", "http", "session"])
async def test_a_resume_on_a_third_node_takes_an_abort_back(make_node: MakeNode, by: str) -> None:
    """The socket that said it is on one node, the turn on another, and the page is back on a third."""
    async with ScriptedBackend(until_released) as backend:
        one, two, three = await nodes(make_node, backend, 3, abort_grace_seconds=0.8)
        async with (
            SdkClient(one.address) as sender,
            SdkClient(two.address) as leaver,
            SdkClient(three.address) as sdk,
            HttpChat(three.address) as http,
            SessionClient(three.address) as client,
        ):
            await sender.send("r1", "s")
            await sender.has("r1", 4)
            await leaver.resume("r2", "s")
            await leaver.has("r2", 4)
            await leaver.abort("r2")
            await eventually(lambda: bool(one._turns._aborts.pending))
            if by == "sdk":
                await sdk.resume("r3", "s")
                await sdk.has("r3", 4)
            elif by == "http":
                await (await http.stream("s")).has(4)
            else:
                await client.attach("s")
            # Until its node has looked, and found that nothing is asked any more.
            await eventually(lambda: not one._turns._aborts.pending)
            exchange = await backend.exchange()
            assert not exchange.was_closed.is_set()
            exchange.release.set()
            await sender.ended("r1")
        assert await ends(two, "s") == ["complete"]


async def test_an_abort_outlives_the_node_that_took_it(make_node: MakeNode, make_config: MakeConfig) -> None:
    """The page said it to a node that was just being replaced."""
    async with ScriptedBackend(never_ends) as backend:
        (one,) = await nodes(make_node, backend, 1, abort_grace_seconds=0.5)
        async with SdkClient(one.address) as here:
            await here.send("r1", "s")
            await here.has("r1", 4)
            async with Node(make_config(backend.url, abort_grace_seconds=0.5)) as two:
                async with SdkClient(two.address) as there:
                    await there.resume("r2", "s")
                    await there.has("r2", 4)
                    await there.abort("r2")
                    await eventually(lambda: bool(one._turns._aborts.pending))
                two.hurry()
            exchange = await backend.exchange()
            assert not exchange.was_closed.is_set()
            await exchange.closed()
            await here.ended("r1")
        assert await ends(one, "s") == ["cancelled"]


async def test_an_abort_whose_bell_was_lost_is_kept_all_the_same(make_node: MakeNode) -> None:
    """The journal tells the turn's node of it at a beat once it is due."""
    async with ScriptedBackend(never_ends) as backend:
        one, two = await nodes(make_node, backend, abort_grace_seconds=0.05, lease_seconds=LEASE_SECONDS)
        one._turns._doorbell.on_turn = lambda *_: None  # what it would say never arrives
        async with SdkClient(one.address) as here, SdkClient(two.address) as there:
            await here.send("r1", "s")
            await here.has("r1", 4)
            await there.resume("r2", "s")
            await there.has("r2", 4)
            await there.abort("r2")
            await (await backend.exchange()).closed()
            await here.ended("r1")
        assert await ends(two, "s") == ["cancelled"]


# -- nodes that leave


async def test_a_turn_that_its_node_gave_up_is_ended_by_that_node(make_node: MakeNode) -> None:
    """Every turn ends (G7), also when what was to end it could not; its node lives, so no other may."""
    async with ScriptedBackend(until_released) as backend:
        one, two = await nodes(make_node, backend, lease_seconds=LEASE_SECONDS)
        async with SessionClient(two.address) as there, SessionClient(one.address) as here:
            await there.attach("s")
            await here.send("s", "t1")
            await there.wait(chunks_of("t1"), 4)
            # As if a failover had given its fence to another.
            key = one._sessions._journal._keys(SessionId("s")).turn(TurnId("t1"))
            with redis.Redis.from_url(one.config.redis_url or "") as admin:
                admin.hset(key, "token", "of-another")
            (await backend.exchange()).release.set()
            end = await there.ended("t1")
            assert (end["reason"], end["error"]["code"]) == ("interrupted", "node-lost")
            await eventually(lambda: not one._lease._abandoned)


async def test_an_ended_turn_that_is_kept_stands_in_nobodys_way(make_node: MakeNode) -> None:
    """For a failover that loses it; not for a cancel, not for a send that needs the room, nor for a stop."""
    async with ScriptedBackend(answers) as backend:
        (node,) = await nodes(make_node, backend, 1, max_buffer_bytes=100_000)
        async with SessionClient(node.address) as client:
            for number in range(10):
                reply = await client.send("s", f"t{number}", "x" * 30_000)
                assert reply["type"] == "accepted", reply
                await client.ended(f"t{number}")
                await eventually(lambda: not node._turns._producers)
                assert 30_000 < node._turns.budget.used < 130_000
                assert (await client.cancel("s", f"t{number}"))["turns"][0]["result"] == "already-ended"
                assert not node._turns.is_full
        assert [*node._turns._kept]
        await node.stop()
        assert not [*node._turns._kept]
        with redis.Redis.from_url(node.config.redis_url or "") as admin:
            known = admin.zscore(f"{node.config.key_prefix}:{{nodes}}", node.id)
        assert known is None, "all its turns have ended, so it has left"
