"""The store as a cluster of real servers: who is asked, and what happens while slots move."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from gateway.store import Script, Store, StoreUnavailable, load_script, routes
from gateway.store import cluster as cluster_module
from gateway.store import lane as lane_module
from gateway.store.cluster import slot_of
from tests.support.servers import Server, until
from tests.support.shards import ClusterOfServers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

CLAIM, ORPHANS = load_script("claim"), load_script("orphans")


def own_script(name: str, source: bytes) -> Script:
    return Script(name, source, hashlib.sha1(source, usedforsecurity=False).hexdigest())


FAR = own_script("far", b"#!lua\nreturn redis.call('SADD', ARGV[1], 'm')")
PUSH = own_script("push", b"#!lua\nreturn redis.call('RPUSH', KEYS[1], ARGV[1])")
SCRIPTS = (CLAIM, ORPHANS, FAR, PUSH)


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterOfServers]:
    with ClusterOfServers(3, spare=1) as cluster:
        yield cluster


@pytest.fixture
async def store(cluster: ClusterOfServers) -> AsyncIterator[Store]:
    for server in cluster.servers:
        server.admin.flushall()
    async with Store(cluster.url, SCRIPTS) as opened:
        yield opened


def add(store: Store, key: str, member: str = "m") -> asyncio.Future[Any]:
    return store.writes.call(CLAIM, (key,), (member, "add", 60_000))


def members(store: Store, key: str) -> asyncio.Future[Any]:
    return store.reads.call(ORPHANS, (key,), ())


def another(cluster: ClusterOfServers, key: str) -> Server:
    owner = cluster.owner(key)
    return next(server for server in cluster.primaries if server is not owner)


async def goes_on(ask: Callable[[], asyncio.Future[Any]]) -> Any:
    """Repeat a call as its callers do, until it succeeds; every single one must end."""
    async with asyncio.timeout(15):
        while True:
            try:
                async with asyncio.timeout(2 * lane_module.OPERATION_TIMEOUT_SECONDS):
                    return await ask()
            except StoreUnavailable:
                await asyncio.sleep(0.02)


# -- routing


async def test_each_call_goes_to_who_has_its_slot(store: Store, cluster: ClusterOfServers) -> None:
    """Straight there: a redirection would be a second round trip."""
    keys = [f"{{{number}}}:meta" for number in range(60)]
    with capture_logs() as logs:
        assert await asyncio.gather(*(add(store, key, key) for key in keys)) == [[b"OK"]] * 60
        assert await asyncio.gather(*(members(store, key) for key in keys)) == [
            [key.encode()] for key in keys
        ]
    for server in cluster.primaries:
        assert server.admin.dbsize() > 5
        assert "errorstat_MOVED" not in server.admin.info("errorstats")
    assert [entry["event"] for entry in logs if entry["log_level"] != "info"] == []


async def test_a_shard_is_who_has_the_key(store: Store, cluster: ClusterOfServers) -> None:
    """The doorbell subscribes there; and the map is a thing that comes."""
    assert store.is_sharded
    assert store.shard_of("key") is None
    assert list(store.shards()) == []
    store.on_topology.append((came := asyncio.Event()).set)
    async with asyncio.timeout(5):
        await came.wait()
    assert {shard.name for shard in store.shards()} == {server.address for server in cluster.primaries}
    for number in range(20):
        shard = store.shard_of(f"key{number}")
        assert shard is not None
        assert shard.name == cluster.owner(f"key{number}").address


async def test_calls_of_one_slot_keep_their_order(store: Store) -> None:
    """As of one lane: what is asked first is carried out first."""
    seen = []
    for number in range(200):
        store.writes.tell(CLAIM, ("set",), ("m", "add" if number % 2 else "remove", 60_000))
        seen.append(store.writes.call(ORPHANS, ("set",), ()))
        if number % 7 == 0:
            await asyncio.sleep(0)
    assert await asyncio.gather(*seen) == [[b"m"] if number % 2 else [] for number in range(200)]


async def test_one_seed_that_answers_is_enough(cluster: ClusterOfServers) -> None:
    """Of the others one is frozen, so that its kernel accepts, and one is not there at all."""
    with Server() as frozen, Server() as gone:
        gone.kill()
        seeds = f"redis+cluster://{gone.address},{frozen.address},{cluster.primaries[1].address}"
        with frozen.frozen():
            async with Store(seeds, SCRIPTS) as store:
                assert await goes_on(lambda: add(store, "key")) == [b"OK"]


@pytest.mark.parametrize("kind", ["no cluster", "nobody"])
async def test_no_cluster_is_unavailable(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway starts before its store; or its operator took one scheme for the other."""
    monkeypatch.setattr(lane_module, "OPERATION_TIMEOUT_SECONDS", 0.3)
    with Server() as server:
        if kind == "nobody":
            server.kill()
        async with Store(f"redis+cluster://{server.address}", SCRIPTS) as store, asyncio.timeout(5):
            for call in [add(store, "key"), add(store, "key"), members(store, "other")]:
                with pytest.raises(StoreUnavailable):
                    await call
            assert store.shard_of("key") is None


async def test_a_cluster_that_is_away_is_not_asked_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call asks for the map; between two readings there is a pause all the same."""
    monkeypatch.setattr(lane_module, "OPERATION_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(cluster_module, "FIRST_PAUSE_SECONDS", 60.0)
    monkeypatch.setattr(cluster_module, "LONGEST_PAUSE_SECONDS", 60.0)
    with Server() as server, capture_logs() as logs:
        server.kill()
        async with Store(f"redis+cluster://{server.address}", SCRIPTS) as store, asyncio.timeout(5):
            for _ in range(3):
                with pytest.raises(StoreUnavailable):
                    await add(store, "key")
    assert [entry["event"] for entry in logs] == ["store.map_unread"]


async def test_closing_fails_what_waits_for_the_map() -> None:
    """A node that stops leaves nobody waiting."""
    with Server() as server, server.frozen():
        async with Store(f"redis+cluster://{server.address}", SCRIPTS) as store:
            call = add(store, "key")
        late = add(store, "key")
        for failed in (call, late):
            with pytest.raises(StoreUnavailable):
                async with asyncio.timeout(1):
                    await failed


async def test_a_cluster_whose_url_names_one_server_alone_is_unavailable_and_says_why(
    cluster: ClusterOfServers,
) -> None:
    """What is another server's comes to nothing for ever; who reads the error must see what to change."""
    asked = cluster.primaries[0]
    async with Store(asked.url, SCRIPTS) as store:
        await add(store, cluster.key_of(asked))
        with pytest.raises(StoreUnavailable, match=r"one of a cluster; say redis\+cluster://"):
            await add(store, cluster.key_of(cluster.primaries[1]))
        await add(store, cluster.key_of(asked))


# -- slots that move


async def test_a_slot_that_moved_is_followed(store: Store, cluster: ClusterOfServers) -> None:
    """Its calls succeed, in order, and later ones go straight to the new server."""
    key = "moved"
    assert await add(store, key, "0") == [b"OK"]
    target = another(cluster, key)
    store.on_topology.append((changed := asyncio.Event()).set)
    cluster.move(slot_of(key), target)
    seen = []
    for number in range(1, 100):
        store.writes.tell(CLAIM, (key,), ("m", "add" if number % 2 else "remove", 60_000))
        seen.append(store.writes.call(ORPHANS, (key,), ()))
        if number % 9 == 0:
            await asyncio.sleep(0)
    async with asyncio.timeout(5):
        for number, reply in enumerate(await asyncio.gather(*seen), 1):
            assert sorted(reply) == ([b"0", b"m"] if number % 2 else [b"0"])
        await changed.wait()
    shard = store.shard_of(key)
    assert shard is not None
    assert shard.name == target.address
    assert target.admin.exists(key)
    assert await members(store, key) == [b"0"] or await members(store, key) == [b"0", b"m"]


async def test_what_waited_behind_a_redirected_call_stays_behind_it(
    store: Store, cluster: ClusterOfServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several batches of one slot, of which only the first has left when it turns out to have moved."""
    monkeypatch.setattr(lane_module, "MAX_BATCH_BYTES", 1000)
    key = "behind"
    await store.writes.call(PUSH, (key,), (0,))
    cluster.move(slot_of(key), another(cluster, key))
    lengths = []
    for number in range(400):
        lengths.append(store.writes.call(PUSH, (key,), (number,)))
        if number % 4 == 0:
            await asyncio.sleep(0)
    assert await asyncio.gather(*lengths) == list(range(2, 402))


async def test_a_key_that_is_not_there_yet_is_asked_for_where_it_will_be(
    store: Store, cluster: ClusterOfServers
) -> None:
    """While a slot moves, its old server sends new keys to the new one, which is told to let them in."""
    for old, new in [("{asked}old", "{asked}new"), ("{spare}old", "{spare}new")]:
        await add(store, old)
        slot = slot_of(old)
        target = cluster.spare[0] if old.startswith("{spare") else another(cluster, old)
        with cluster.migrating(slot, target) as source:
            assert await add(store, new) == [b"OK"]
            shard = store.shard_of(new)
            assert shard is not None
            assert shard.name == source.address
            assert await members(store, new) == [b"m"]
            assert await add(store, old, "n") == [b"OK"]
            assert target.ask("CLUSTER", "GETKEYSINSLOT", slot, 9) == [new.encode()]
            assert source.ask("CLUSTER", "GETKEYSINSLOT", slot, 9) == [old.encode()]
        assert await add(store, new, "n") == [b"OK"]
        assert sorted(await members(store, old)) == [b"m", b"n"]
    cluster.move(slot_of("{spare}"), cluster.primaries[0])


async def test_keys_in_two_places_are_unavailable_until_they_are_in_one(
    store: Store, cluster: ClusterOfServers
) -> None:
    """Nobody can carry out such a call; whoever repeats it will be served."""

    def both() -> asyncio.Future[Any]:
        return store.writes.call(CLAIM, ("{two}a", "{two}b"), ("both", "add", 60_000))

    await asyncio.gather(add(store, "{two}a"), add(store, "{two}b"))
    slot, target = slot_of("{two}a"), another(cluster, "{two}a")
    with cluster.migrating(slot, target) as source:
        source.ask("MIGRATE", "127.0.0.1", target.port, "{two}a", 0, 5000)
        with pytest.raises(StoreUnavailable):
            await both()
    assert await goes_on(both) == [b"OK"]


async def test_a_key_that_a_script_made_up_and_is_elsewhere_is_unavailable(
    store: Store, cluster: ClusterOfServers
) -> None:
    """Scripts of ours make up keys of the same session; those may have moved away under them."""
    here = "here"
    there = cluster.key_of(another(cluster, here))
    with pytest.raises(StoreUnavailable):
        await store.writes.call(FAR, (here,), (there,))
    assert await add(store, here) == [b"OK"]


async def test_servers_that_send_a_call_to_and_fro_are_given_up(
    cluster: ClusterOfServers, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each says that the slot is the other's: no call goes round for ever."""
    key = "fro"
    await add(store, key)
    one, two = cluster.owner(key), another(cluster, key)
    slot = slot_of(key)
    one.admin.delete(key)
    followed = 0
    follow = routes.Routes._followed

    def counted(*arguments: Any) -> Any:
        nonlocal followed
        followed += 1
        return follow(*arguments)

    monkeypatch.setattr(routes.Routes, "_followed", counted)
    one.ask("CLUSTER", "SETSLOT", slot, "NODE", two.ask("CLUSTER", "MYID"))
    try:
        async with asyncio.timeout(5):
            with pytest.raises(StoreUnavailable):
                await add(store, key)
    finally:
        cluster.settle_slot(slot, one)
    assert followed == routes.MAX_REDIRECTIONS + 1
    assert await goes_on(lambda: add(store, key)) == [b"OK"]


# -- servers that go away


async def test_a_frozen_shard_holds_up_no_other(
    store: Store, cluster: ClusterOfServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its calls end by their deadline; the others' do not wait for them."""
    frozen = cluster.primaries[1]
    there, elsewhere = cluster.key_of(frozen), cluster.key_of(cluster.primaries[2])
    await asyncio.gather(add(store, there), add(store, elsewhere))
    with monkeypatch.context() as short, frozen.frozen():
        short.setattr(lane_module, "OPERATION_TIMEOUT_SECONDS", 0.3)
        calls = [add(store, there) for _ in range(5)]
        assert await add(store, elsewhere) == [b"OK"]
        assert not any(call.done() for call in calls)
        async with asyncio.timeout(5):
            for call in calls:
                with pytest.raises(StoreUnavailable):
                    await call
    cluster.settle()
    assert await goes_on(lambda: add(store, there)) == [b"OK"]


async def test_a_shard_that_was_lost_is_told_of_once_it_is_back(
    store: Store, cluster: ClusterOfServers
) -> None:
    """What it had may be gone: whoever relied on it looks. The first connections are no news."""
    told = []
    store.on_reconnect.append(lambda: told.append(store.contact))
    lost = cluster.primaries[2]
    keys = [cluster.key_of(server) for server in cluster.primaries]
    await asyncio.gather(*(add(store, key) for key in keys))
    assert told == []
    for client in lost.admin.client_list():
        if client["name"] == "session-gateway":
            lost.admin.client_kill_filter(_id=client["id"])
    assert await goes_on(lambda: add(store, keys[2])) == [b"OK"]
    await until(lambda: told == [1])
