"""The store while its servers fail over: calls fail as an outage, end in time, and succeed on the next one.

A writer asks one call after the other and repeats what failed, as the journal's callers do. What was
acknowledged must be there in the end, in its order, except where a test takes it away on purpose.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from typing import TYPE_CHECKING, Any

import pytest
import redis

from gateway.store import Script, Store, StoreUnavailable
from gateway.store.cluster import SLOTS, slot_of
from gateway.store.lane import OPERATION_TIMEOUT_SECONDS
from tests.support.servers import (
    PRIMARY_NAME,
    Replicated,
    Server,
    running_failover,
    running_sentinels,
    sentinel_url,
    sentinels_agree,
    until,
)
from tests.support.shards import ClusterOfServers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence


def own_script(name: str, source: bytes) -> Script:
    return Script(name, source, hashlib.sha1(source, usedforsecurity=False).hexdigest())


APPEND = own_script(
    "append",
    b"#!lua\nlocal last = redis.call('LLEN', KEYS[1])\n"
    b"if last == tonumber(ARGV[1]) - 1 then redis.call('RPUSH', KEYS[1], ARGV[1]) last = last + 1 end\n"
    b"return last",
)
READ = own_script("read", b"#!lua flags=no-writes\nreturn redis.call('LRANGE', KEYS[1], 0, -1)")
SCRIPTS = (APPEND, READ)


class Writer:
    """Appends 1, 2, 3 ... to a list, each once, whatever fails; knows what was acknowledged.

    Attributes:
        last: The newest number that was acknowledged.
        failures: Calls that failed as an outage.
        shortfalls: How often the list was found shorter than acknowledged: those are written again.
    """

    def __init__(self, store: Store, key: str) -> None:
        self.last = self.failures = self.shortfalls = 0
        self._store = store
        self._key = key
        self.task = asyncio.create_task(self._run(), name=f"writer-{key}")

    async def _run(self) -> None:
        while True:
            try:
                # Ten deadlines would not be in time; one and that of the batch before it is.
                async with asyncio.timeout(2 * OPERATION_TIMEOUT_SECONDS + 1):
                    length = await self._store.writes.call(APPEND, (self._key,), (self.last + 1,))
            except StoreUnavailable:
                self.failures += 1
                await asyncio.sleep(0.01)
                continue
            if length < self.last:
                self.shortfalls += 1
            self.last = length
            await asyncio.sleep(0.001)

    async def goes_on(self, count: int = 20) -> None:
        """Wait until so much more was acknowledged."""
        goal = self.last + count
        await until(lambda: self.last >= goal or self.task.done())
        assert self.last >= goal, self.task

    async def read(self) -> list[int]:
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(StoreUnavailable):
                    told: list[bytes] = await self._store.reads.call(READ, (self._key,), ())
                    return [int(number) for number in told]
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def writing(store: Store, keys: Sequence[str] = ("list",)) -> AsyncIterator[list[Writer]]:
    """Writers that go on; in the end each one's list must be whole."""
    writers = [Writer(store, key) for key in keys]
    try:
        for writer in writers:
            await writer.goes_on(5)
        yield writers
        for writer in writers:
            await writer.goes_on()
    finally:
        for writer in writers:
            writer.task.cancel()
        ended = await asyncio.gather(*(writer.task for writer in writers), return_exceptions=True)
    assert [error for error in ended if not isinstance(error, asyncio.CancelledError)] == []
    for writer in writers:
        assert len(numbers := await writer.read()) >= writer.last
        assert numbers == list(range(1, len(numbers) + 1))


# -- sentinels


@contextlib.asynccontextmanager
async def failover_under_load(
    *, sentinels: int = 1
) -> AsyncIterator[tuple[Replicated, list[Server], Store, Writer]]:
    """A replica that has everything, sentinels, and a writer on the store behind them."""
    async with (
        running_failover(sentinels=sentinels) as (pair, guards),
        Store(sentinel_url(guards), SCRIPTS) as store,
        writing(store) as (writer,),
    ):
        await until(lambda: pair.is_in_step)
        yield pair, guards, store, writer


@pytest.mark.parametrize("sentinels", [1, 3])
async def test_a_killed_primary_is_replaced_by_what_the_sentinels_name(sentinels: int) -> None:
    """FAULTS R13 without the loss: nobody is told a new address."""
    async with failover_under_load(sentinels=sentinels) as (pair, guards, store, writer):
        pair.primary.kill()
        if sentinels == 3:
            guards[0].kill()
        await until(lambda: pair.replica.admin.info("replication")["role"] == "master")
        await writer.goes_on()
        assert writer.failures > 0
        assert store.contact >= 1
        # It comes back as a replica of the new one; nobody is led to it.
        pair.primary.start()
        await writer.goes_on()


async def test_a_failover_that_an_operator_asks_for_is_followed() -> None:
    """FAULTS R16: both servers live, and both take writes for a while; ours go to the new one."""
    async with failover_under_load() as (pair, guards, _, writer):
        await until(lambda: _accepts_failover(guards[0]))
        # The sentinels tell the old one late; it would go on taking writes that are lost then.
        await until(lambda: int(pair.replica.admin.llen("list")) >= writer.last)
        assert pair.primary.admin.info("replication")["role"] == "master"
        await writer.goes_on()
        # The other lane is led away too: it would read old data, and nothing would say so.
        assert len(await writer.read()) >= writer.last - 1
        await until(lambda: not _ours(pair.primary))


async def test_a_primary_that_freezes_is_replaced_and_left() -> None:
    """Its kernel goes on taking connections and bytes; when it thaws it is a replica."""
    async with failover_under_load() as (pair, guards, _, writer):
        with pair.primary.frozen():
            await sentinels_agree(guards, primary=pair.replica)
            await writer.goes_on()
        await until(lambda: pair.primary.admin.info("replication")["role"] == "slave")
        await writer.goes_on()
        assert pair.replica.admin.llen("list") >= writer.last - 1


async def test_a_failover_that_loses_what_was_acknowledged_is_told() -> None:
    """FAULTS R13: the new primary is older; whoever wrote looks, because it was told of the reconnect."""
    async with failover_under_load() as (pair, _, store, writer):
        store.on_reconnect.append((told := asyncio.Event()).set)
        pair.link.freeze()
        await writer.goes_on(50)
        pair.primary.kill()
        async with asyncio.timeout(30):
            await told.wait()
        await writer.goes_on()
        assert writer.shortfalls > 0


async def test_an_address_that_leads_elsewhere_is_followed() -> None:
    """A cloud's virtual address: the same URL, another server, older than the first."""
    async with Replicated() as pair, Store(pair.url, SCRIPTS) as store, writing(store) as (writer,):
        pair.link.freeze()
        await writer.goes_on(50)
        pair.primary.kill()
        pair.promote()
        await writer.goes_on()
        assert writer.shortfalls > 0
        assert store.contact >= 1


@pytest.mark.parametrize("is_persistent", [True, False])
async def test_a_server_that_is_killed_and_started_again_is_found(*, is_persistent: bool) -> None:
    """FAULTS R8, R9: with a file nothing acknowledged is lost; without one all is, and it is told."""
    with Server(is_persistent=is_persistent) as server:
        async with Store(server.url, SCRIPTS) as store, writing(store) as (writer,):
            await writer.goes_on(50)
            server.kill()
            await until(lambda: writer.failures > 0)
            server.start()
            await writer.goes_on()
            assert (writer.shortfalls == 0) == is_persistent
            assert store.contact >= 1


async def test_sentinels_that_all_die_leave_the_connection_as_it_is() -> None:
    """They are asked when a connection is made, and at no other time."""
    with Server() as primary, running_sentinels(primary, count=3) as guards:
        async with Store(sentinel_url(guards), SCRIPTS) as store, writing(store) as (writer,):
            await writer.read()
            for guard in guards:
                guard.kill()
            await writer.goes_on()
            assert (writer.failures, store.contact) == (0, 0)


# -- a cluster


def keys_for(cluster: ClusterOfServers) -> list[str]:
    return [cluster.key_of(server) for server in cluster.primaries]


@pytest.mark.parametrize("way", ["killed", "frozen"])
async def test_a_shard_whose_primary_is_gone_goes_on_with_its_replica(way: str) -> None:
    """FAULTS R17: its calls fail meanwhile and then succeed, the other shards' do not fail at all."""
    partial = ("--cluster-require-full-coverage", "no")
    with ClusterOfServers(3, replicas=1, options=partial) as cluster:
        keys = keys_for(cluster)
        async with Store(cluster.url, SCRIPTS) as store, writing(store, keys) as writers:
            before = [writer.failures for writer in writers]
            (cluster.primaries[1].kill if way == "killed" else cluster.primaries[1].freeze)()
            await until(lambda: cluster.replicas[1].admin.info("replication")["role"] == "master")
            await writers[1].goes_on()
            assert writers[1].failures > 0
            assert [writer.failures for writer in (writers[0], writers[2])] == [before[0], before[2]]
            assert store.contact == 1
            assert {shard.name for shard in store.shards()} == {
                server.address for server in (cluster.primaries[0], cluster.replicas[1], cluster.primaries[2])
            }
            if way == "killed":
                cluster.primaries[1].start()
            else:
                cluster.primaries[1].thaw()
            await until(lambda: cluster.primaries[1].admin.info("replication")["role"] == "slave")
            await writers[1].goes_on()


async def test_a_failover_of_a_shard_that_an_operator_asks_for_is_followed() -> None:
    """FAULTS R16: the old primary says where its slots went."""
    with ClusterOfServers(3, replicas=1) as cluster:
        keys = keys_for(cluster)
        async with Store(cluster.url, SCRIPTS) as store, writing(store, keys) as writers:
            cluster.replicas[0].ask("CLUSTER", "FAILOVER")
            await until(lambda: cluster.replicas[0].admin.info("replication")["role"] == "master")
            await writers[0].goes_on()
            shard = store.shard_of(keys[0])
            assert shard is not None
            assert shard.name == cluster.replicas[0].address


async def test_slots_that_are_moved_under_load_fail_no_call() -> None:
    """FAULTS R18: one key of each slot is on one side or the other, and a call finds it."""
    with ClusterOfServers(3, spare=1) as cluster:
        keys = [f"list{number}" for number in range(12)]
        async with Store(cluster.url, SCRIPTS) as store, writing(store, keys) as writers:
            for key in keys:
                await asyncio.to_thread(cluster.move, slot_of(key), cluster.spare[0])
                await writers[0].goes_on(3)
            for writer in writers:
                await writer.goes_on()
            assert [writer.failures for writer in writers] == [0] * len(writers)
        assert cluster.spare[0].admin.dbsize() == len(keys)


async def test_a_server_that_joins_and_takes_slots_is_used() -> None:
    """The map is read again; nothing is restarted."""
    with ClusterOfServers(2, spare=1) as cluster:
        async with Store(cluster.url, SCRIPTS) as store, writing(store, ["list"]) as (writer,):
            for slot in range(0, SLOTS, 256):
                await asyncio.to_thread(cluster.move, slot, cluster.spare[0])
            key = next(name for name in map(str, range(100_000)) if slot_of(name) % 256 == 0)
            assert await _length(store, key) == 1
            await until(lambda: len(store.shards()) == 3)
            await writer.goes_on()


def _accepts_failover(guard: Server) -> bool:
    """It needs to have heard of the replica; then it begins at once."""
    try:
        guard.ask("SENTINEL", "FAILOVER", PRIMARY_NAME)
    except redis.ResponseError:
        return False
    return True


async def _length(store: Store, key: str) -> Any:
    async with asyncio.timeout(10):
        return await store.writes.call(APPEND, (key,), (1,))


def _ours(server: Server) -> list[Any]:
    return [client for client in server.admin.client_list() if client["name"] == "session-gateway"]
