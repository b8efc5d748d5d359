"""Bells on a cluster, whose slots move and whose servers die: what is watched is heard again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from gateway.core.model import SessionId
from gateway.store.cluster import slot_of
from tests.support.bells import Ring, eventually, listening
from tests.support.shards import ClusterOfServers

if TYPE_CHECKING:
    from collections.abc import Iterator

SESSIONS = [SessionId(f"chat-{number}") for number in range(60)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterOfServers]:
    with ClusterOfServers(3, replicas=1) as cluster:
        yield cluster


def ring_at(cluster: ClusterOfServers, ring: Ring, session: SessionId) -> None:
    channel = ring.channel(session)
    cluster.owner(channel).ask("SPUBLISH", channel, "r another")


async def is_heard(cluster: ClusterOfServers, ring: Ring, session: SessionId) -> None:
    """Ring until it is told: while a slot moves a bell may be lost."""
    told = ring.told.count(("records", session))

    def heard() -> bool:
        ring_at(cluster, ring, session)
        return ring.told.count(("records", session)) > told

    await eventually(heard)


async def test_each_session_is_heard_at_its_shard(cluster: ClusterOfServers) -> None:
    """One connection for each, and each hears itself."""
    async with listening(cluster.url, cluster.primaries[0].url, probe_seconds=0.2) as ring:
        for session in SESSIONS:
            ring.bell.watch(session)
        for session in SESSIONS:
            await ring.until("missed", session)
            ring_at(cluster, ring, session)
            await ring.until("records", session)
        wires = list(ring.bell._wires.values())
        assert len(wires) == 3
        heard = [wire._last_heard for wire in wires]
        await eventually(
            lambda: all(wire._last_heard > before for wire, before in zip(wires, heard, strict=True))
        )
        for session in SESSIONS:
            ring.bell.unwatch(session)
        assert not any(wire._channels for wire in wires)


async def test_a_session_whose_slot_moves_is_heard_where_it_is_now(cluster: ClusterOfServers) -> None:
    """A reshard, under way while people read."""
    async with listening(cluster.url, cluster.primaries[0].url) as ring:
        for session in SESSIONS:
            ring.bell.watch(session)
        for session in SESSIONS:
            await ring.until("missed", session)
        moving = SESSIONS[0]
        slot = slot_of(ring.channel(moving))
        source = cluster.owner_of_slot(slot)
        target = next(server for server in cluster.primaries if server is not source)
        cluster.move(slot, target)
        try:
            await ring.until("missed", moving, times=2)
            ring_at(cluster, ring, moving)
            await ring.until("records", moving)
            assert [name for what, *names in ring.told for name in names if what == "records"] == [moving]
        finally:
            cluster.move(slot, source)


async def test_a_probe_whose_slot_moves_is_replaced(cluster: ClusterOfServers) -> None:
    """Otherwise its connection would be taken for deaf, again and again."""
    async with listening(cluster.url, cluster.primaries[0].url, probe_seconds=0.2) as ring:
        ring.bell.watch(SESSIONS[0])
        await ring.until("missed", SESSIONS[0])
        [wire] = ring.bell._wires.values()
        old = wire.probe
        slot = slot_of(old.decode())
        source = cluster.owner_of_slot(slot)
        target = next(server for server in cluster.primaries if server is not source)
        cluster.move(slot, target)
        try:
            await eventually(lambda: wire.probe != old)
            probes = wire._probes
            await eventually(lambda: wire._last_heard > probes)
            await is_heard(cluster, ring, SESSIONS[0])
        finally:
            cluster.move(slot, source)


async def test_sessions_of_a_server_that_died_are_heard_at_its_replica(cluster: ClusterOfServers) -> None:
    """A failover; last, for it changes who is primary."""
    async with listening(cluster.url, cluster.primaries[1].url, probe_seconds=0.5) as ring:
        for session in SESSIONS:
            ring.bell.watch(session)
        for session in SESSIONS:
            await ring.until("missed", session)
        there = [s for s in SESSIONS if cluster.owner(ring.channel(s)) is cluster.primaries[0]]
        assert there
        cluster.primaries[0].kill()
        async with asyncio.timeout(30):
            for session in there:
                await ring.until("missed", session, times=2)
        await is_heard(cluster, ring, there[0])
