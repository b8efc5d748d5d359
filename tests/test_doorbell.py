"""The doorbell on a real server: a bell is a hint, and that one may have been lost is told."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from gateway import bellwire, doorbell
from gateway.core.model import SessionId, TurnId
from gateway.store.cluster import slot_of
from tests.support.bells import WAIT_SECONDS, Ring, eventually, listening, metric
from tests.support.link import Link
from tests.support.shards import ClusterOfServers
from tests.support.valkey import running_cluster_valkey, running_valkey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

SESSION, OTHER = SessionId("chat"), SessionId("other")


@asynccontextmanager
async def linked(url: str, folder: Path) -> AsyncIterator[Link]:
    async with Link(url, folder) as link:
        yield link
        await eventually(lambda: not link._tasks)  # or they would be ended in the middle of ending


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_valkey() as url:
        yield url


@pytest.fixture
async def ring(url: str) -> AsyncIterator[Ring]:
    async with listening(url) as ring:
        yield ring


async def test_what_others_ring_is_told(ring: Ring) -> None:
    """Records to whoever is attached, a turn's change to its producer."""
    heard = metric("bells")
    ring.bell.watch(SESSION)
    await ring.until("missed", SESSION)
    ring.ring(SESSION, "r another")
    ring.ring(SESSION, "c turn/1")
    await ring.until("turn", SESSION, TurnId("turn/1"))
    assert ring.told == [("missed", SESSION), ("records", SESSION), ("turn", SESSION, "turn/1")]
    assert metric("bells") == heard + 2


async def test_its_own_bells_are_not_told(ring: Ring) -> None:
    """What this node journalled it has shown already; it rings for the others, thousands of times."""
    ring.bell.watch(SESSION)
    await ring.until("missed", SESSION)
    for payload in ("r me", "r me", "r men"):
        ring.ring(SESSION, payload)
    await ring.until("records", SESSION)
    assert ring.told == [("missed", SESSION), ("records", SESSION)]


async def test_what_is_watched_twice_is_heard_until_it_is_unwatched_twice(ring: Ring) -> None:
    """Somebody is attached, and a turn of the session is produced here: either may end first."""
    ring.bell.watch(SESSION)
    ring.bell.watch(SESSION)
    await ring.until("missed", SESSION)
    ring.bell.unwatch(SESSION)
    ring.bell.watch(OTHER)
    await ring.until("missed", OTHER)
    assert ring.subscribed() == {ring.channel(SESSION), ring.channel(OTHER)}
    ring.bell.unwatch(SESSION)
    await eventually(lambda: ring.subscribed() == {ring.channel(OTHER)})
    ring.bell.unwatch(OTHER)
    await eventually(lambda: not ring.subscribed())
    assert not ring.bell._sessions
    assert not ring.bell._homes


async def test_a_watch_that_is_taken_back_and_asked_for_again_at_once_is_heard(ring: Ring) -> None:
    """A page is reloaded: the last one detaches, the first attaches."""
    for times in range(1, 4):
        ring.bell.watch(SESSION)
        ring.bell.unwatch(SESSION)
        ring.bell.watch(SESSION)
        await ring.until("missed", SESSION, times=times)
        ring.bell.unwatch(SESSION)
        await eventually(lambda: not ring.subscribed())
    ring.bell.watch(SESSION)
    await ring.until("missed", SESSION, times=4)
    ring.bell.unwatch(SESSION)
    await asyncio.sleep(0)  # it has left
    ring.bell.watch(SESSION)
    await ring.until("missed", SESSION, times=5)
    ring.ring(SESSION, "r another")
    await ring.until("records", SESSION)


async def test_thousands_are_subscribed_in_bounded_steps_and_nothing_is_left_of_them(ring: Ring) -> None:
    """G10: a node's subscriptions follow who is attached."""
    sessions = [SessionId(f"s{number}") for number in range(3000)]
    for session in sessions:
        ring.bell.watch(session)
    most = 0
    async with asyncio.timeout(WAIT_SECONDS):
        while len(ring.told) < len(sessions):
            most = max(most, *(len(wire._unanswered) for wire in ring.bell._wires.values()))
            await asyncio.sleep(0)
    assert {session for _, session in ring.told} == set(sessions)
    assert 0 < most <= bellwire.MAX_UNANSWERED
    for session in sessions:
        ring.bell.unwatch(session)
    await eventually(lambda: not ring.subscribed())
    [wire] = ring.bell._wires.values()
    assert not wire._channels
    assert not wire._asked
    assert not ring.bell._watches
    assert not ring.bell._sessions


async def test_a_lost_connection_is_made_again_and_all_are_told_that_bells_were_missed(ring: Ring) -> None:
    """FAULTS R22: a bell that rang meanwhile is not told by anybody else."""
    made = metric("doorbell_reconnects")
    ring.bell.watch(SESSION)
    ring.bell.watch(OTHER)
    for times in range(2, 5):
        await ring.until("missed", SESSION, times=times - 1)
        await ring.until("missed", OTHER, times=times - 1)
        ring.command("CLIENT", "KILL", "TYPE", "pubsub")
    await ring.until("missed", SESSION, times=4)
    await ring.until("missed", OTHER, times=4)
    ring.ring(SESSION, "r another")
    await ring.until("records", SESSION)
    assert metric("doorbell_reconnects") == made + 3


async def test_a_connection_whose_buffer_overflowed_is_made_again(ring: Ring) -> None:
    """FAULTS R24: the server drops who does not read, without a word to it."""
    ring.bell.watch(SESSION)
    await ring.until("missed", SESSION)
    ring.admin.config_set("client-output-buffer-limit", "pubsub 16kb 8kb 1")
    try:
        ring.ring(SESSION, "x" * 100_000)
        await ring.until("missed", SESSION, times=2)
    finally:
        ring.admin.config_set("client-output-buffer-limit", "pubsub 32mb 8mb 60")


async def test_what_is_watched_while_there_is_no_connection_is_subscribed_with_the_next(
    url: str, tmp_path: Path
) -> None:
    """A node that starts before its store, or whose store restarts; unwatched meanwhile is not."""
    async with listening(f"unix://{tmp_path}/link.sock", url) as ring:
        ring.bell.watch(SESSION)
        ring.bell.watch(OTHER)
        failed = metric("doorbell_reconnects")
        await eventually(lambda: metric("doorbell_reconnects") > failed + 1)
        ring.bell.unwatch(OTHER)
        async with Link(url, tmp_path):
            await ring.until("missed", SESSION)
            assert ring.subscribed() == {ring.channel(SESSION)}


async def test_a_connection_that_went_silent_is_replaced(url: str, tmp_path: Path) -> None:
    """FAULTS R23: half-open, and no error ever comes of it."""
    failed = metric("doorbell_probes_failed")
    async with linked(url, tmp_path) as link, listening(link.url, url, probe_seconds=0.2) as ring:
        ring.bell.watch(SESSION)
        await ring.until("missed", SESSION)
        link.lose(b"SSUBSCRIBE")
        ring.bell.watch(OTHER)
        await ring.until("missed", SESSION, times=2)
        await ring.until("missed", OTHER)
        ring.ring(SESSION, "r another")
        await ring.until("records", SESSION)
        assert metric("doorbell_probes_failed") == failed + 1


async def test_a_connection_on_which_nothing_is_ever_confirmed_is_replaced(url: str, tmp_path: Path) -> None:
    """It was accepted by something that does not pass it on."""
    failed = metric("doorbell_probes_failed")
    async with linked(url, tmp_path) as link, listening(link.url, url, probe_seconds=0.2) as ring:
        link.lose(b"SSUBSCRIBE")
        ring.bell.watch(SESSION)
        await ring.until("missed", SESSION)
        assert metric("doorbell_probes_failed") == failed + 1


async def test_a_connection_that_hears_itself_is_kept(url: str) -> None:
    """A probe that cried wolf would cost every session a look, for nothing."""
    async with listening(url, probe_seconds=0.05) as ring:
        ring.bell.watch(SESSION)
        await ring.until("missed", SESSION)
        [wire] = ring.bell._wires.values()
        [connection] = ring.connections()
        heard = wire._last_heard
        await eventually(lambda: wire._last_heard >= heard + 5)
        assert ring.connections() == [connection]
        assert ring.told == [("missed", SESSION)]


async def test_a_probe_that_the_store_did_not_take_proves_nothing(url: str, tmp_path: Path) -> None:
    """The writer's trouble is not the doorbell's: its connection may be the only one that is well."""
    failed = metric("doorbell_probes_failed")
    async with linked(url, tmp_path) as link, listening(link.url, url, probe_seconds=0.2) as ring:
        ring.bell.watch(SESSION)
        await ring.until("missed", SESSION)
        [connection] = ring.connections()
        [wire] = ring.bell._wires.values()
        held = link.hold(doorbell._RING.sha.encode())
        await held.reached()
        probes = wire._probes
        await eventually(lambda: wire._probes >= probes + 2)
        assert ring.connections() == [connection]
        held.release()
    assert metric("doorbell_probes_failed") == failed


async def test_a_subscription_that_is_refused_for_good_does_not_spin(url: str) -> None:
    """An ACL without the channels: records come by GATEWAY_POLL, and the log says why."""
    async with listening(url, probe_seconds=0.05) as ring:
        ring.command("ACL", "SETUSER", "default", "resetchannels")
        try:
            made = metric("doorbell_reconnects")
            ring.bell.watch(SESSION)
            await eventually(lambda: ring.bell._wires and ring.connections() == [])
            [wire] = ring.bell._wires.values()
            await eventually(lambda: wire._can_probe.is_set() and not wire._unanswered)
            assert not wire._is_probed
            assert not wire._asked
            assert metric("doorbell_reconnects") == made
            assert ring.told == []
        finally:
            ring.command("ACL", "SETUSER", "default", "allchannels")


async def test_a_subscription_that_was_refused_is_asked_for_again(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its operator puts the ACL right; nobody thinks of starting the nodes anew for that."""
    monkeypatch.setattr(bellwire, "REFUSED_AGAIN_SECONDS", 0.05)
    async with listening(url, probe_seconds=0.05) as ring:
        ring.command("ACL", "SETUSER", "default", "resetchannels")
        try:
            ring.bell.watch(SESSION)
            ring.bell.watch(OTHER)
            await eventually(lambda: ring.bell._wires)
            [wire] = ring.bell._wires.values()
            await eventually(lambda: wire._refused_timer is not None and len(wire._refusals) == 3)
            ring.bell.unwatch(OTHER)
            assert not wire._is_probed
        finally:
            ring.command("ACL", "SETUSER", "default", "allchannels")
        await ring.until("missed", SESSION)
        ring.ring(SESSION, "r another")
        await ring.until("records", SESSION)
        assert ring.subscribed() == {ring.channel(SESSION)}
        heard = wire._last_heard
        await eventually(lambda: wire._is_probed and wire._last_heard > heard)  # by its own bell too


async def test_a_shard_that_begins_with_one_slot_is_probed_once_it_has_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cluster that is being resharded: none of the names tried was the new server's at first."""
    monkeypatch.setattr(doorbell, "MAX_PROBE_NAMES", 1)
    with ClusterOfServers(1, spare=1) as cluster:
        [first], [second] = cluster.primaries, cluster.spare
        async with listening(cluster.url, first.url, probe_seconds=0.1) as ring:
            only = f"{ring.prefix}:{{probe-me-0}}:bell"
            ring.bell.watch(SESSION)
            await ring.until("missed", SESSION)
            cluster.move(slot_of(ring.channel(SESSION)), second)
            await ring.until("missed", SESSION, times=2)
            wires = {wire.shard.name: wire for wire in ring.bell._wires.values()}
            assert wires[second.address].probe == b""
            cluster.move(slot_of(only), second)
            await eventually(lambda: wires[second.address].probe == only.encode())
            await eventually(lambda: wires[second.address]._last_heard)
            await eventually(lambda: wires[first.address].probe == b"" if first.address in wires else True)


async def test_a_slot_that_moves_away_and_comes_back_is_subscribed_again() -> None:
    """The server takes the subscription back, and for a while nobody takes it."""
    with running_cluster_valkey() as url:
        async with listening(url) as ring:
            ring.bell.watch(SESSION)
            await ring.until("missed", SESSION)
            slot = ring.command("CLUSTER", "KEYSLOT", ring.channel(SESSION))
            ring.command("CLUSTER", "DELSLOTS", slot)
            [wire] = ring.bell._wires.values()
            await eventually(lambda: wire._misplaced >= 2)
            ring.command("CLUSTER", "ADDSLOTS", slot)
            await ring.until("missed", SESSION, times=2)
            ring.ring(SESSION, "r another")
            await ring.until("records", SESSION)


async def test_a_callback_that_fails_costs_the_connection_and_not_the_doorbell(ring: Ring) -> None:
    """A bug of ours must not make a node deaf."""
    ring.bell.watch(SESSION)
    await ring.until("missed", SESSION)

    def fail(_: SessionId) -> None:
        raise RuntimeError("planted")

    told = ring.bell.on_records
    ring.bell.on_records = fail
    ring.ring(SESSION, "r another")
    await ring.until("missed", SESSION, times=2)
    ring.bell.on_records = told
    ring.ring(SESSION, "r another")
    await ring.until("records", SESSION)
