"""A store that answers, and cannot: each of its refusals costs delay, and no client hears its words."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from gateway.core.model import SessionId
from gateway.store.cluster import slot_of
from tests.faults.watching import (
    Crowd,
    Numbers,
    Watcher,
    command,
    ends_of,
    faults_of,
    numbers,
    readiness,
    send,
    send_until_accepted,
    text_of,
    until,
    whole_journal,
)
from tests.support.backend import ScriptedBackend, answers
from tests.support.bells import listening
from tests.support.certificates import TlsServer, made_certificates
from tests.support.network import Network
from tests.support.process import GatewayProcess
from tests.support.servers import Server
from tests.support.shards import ClusterOfServers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from gateway.app import Node

    MakeNode = Callable[..., Awaitable[Node]]

pytestmark = pytest.mark.usefixtures("node_logs", "_soon_given_up")

PAUSE_MS = 2_500
"""Above what a send is repeated for."""

SECRET = "of-great-secrecy"
OPTIONS = (
    "--enable-debug-command", "yes", "--enable-protected-configs", "yes", "--busy-reply-threshold", "50",
)  # fmt: skip

ITS_WORDS = ("OOM", "READONLY", "MISCONF", "NOREPLICAS", "NOPERM", "WRONGPASS", "BUSY", "LOADING", "clients",
             SECRET, "127.0.0.1", "HTTP/1")  # fmt: skip
"""What no client is told."""


class Store:
    """One server, and the way to it."""

    def __init__(self, server: Server, network: Network) -> None:
        self.server = server
        self.network = network
        self.admin = server.admin

    def config(self, **options: object) -> None:
        for name, value in options.items():
            self.admin.config_set(name.replace("_", "-"), str(value))


@asynccontextmanager
async def read_only_replica(store: Store) -> AsyncIterator[None]:
    store.admin.replicaof("127.0.0.1", "1")
    yield
    store.admin.replicaof("NO", "ONE")


@asynccontextmanager
async def full(store: Store) -> AsyncIterator[None]:
    store.config(maxmemory_policy="noeviction", maxmemory=1)
    yield
    store.config(maxmemory=0)


@asynccontextmanager
async def disk_full(store: Store) -> AsyncIterator[None]:
    store.config(save="3600 1000000", stop_writes_on_bgsave_error="yes", dir="/proc/sys")
    store.admin.bgsave()
    await until(lambda: store.admin.info("persistence")["rdb_last_bgsave_status"] == "err")
    yield
    store.config(save="", dir=store.server.folder)


@asynccontextmanager
async def without_replicas(store: Store) -> AsyncIterator[None]:
    store.config(min_replicas_to_write=1)
    yield
    store.config(min_replicas_to_write=0)


@asynccontextmanager
async def busy(store: Store) -> AsyncIterator[None]:
    def run_for_long() -> None:
        with (
            contextlib.suppress(redis.ResponseError),  # killed
            redis.Redis(port=store.server.port, socket_timeout=60) as other,
        ):
            other.eval("while true do end", 0)

    running = asyncio.create_task(asyncio.to_thread(run_for_long))
    await until(lambda: is_busy(store))
    yield
    store.admin.script_kill()
    await running


def is_busy(store: Store) -> bool:
    try:
        store.admin.ping()
    except redis.ResponseError as error:
        return str(error).startswith("BUSY") or "busy" in str(error).lower()
    return False


@asynccontextmanager
async def without_room(store: Store) -> AsyncIterator[None]:
    store.admin.ping()
    store.config(maxclients=1)
    store.network.cut()
    yield
    store.config(maxclients=10_000)


@asynccontextmanager
async def without_rights(store: Store) -> AsyncIterator[None]:
    store.server.ask("ACL", "SETUSER", "gateway", "-@all")
    yield
    store.server.ask("ACL", "SETUSER", "gateway", "+@all")


@asynccontextmanager
async def without_user(store: Store) -> AsyncIterator[None]:
    store.server.ask("ACL", "DELUSER", "gateway")
    yield
    grant(store.server)


@asynccontextmanager
async def another_service(store: Store) -> AsyncIterator[None]:
    async with ScriptedBackend(answers) as backend:
        store.network.target = backend.url.removeprefix("http://")
        store.network.cut()
        yield
        store.network.target = store.server.address
        store.network.cut()


@asynccontextmanager
async def paused(store: Store) -> AsyncIterator[None]:
    store.server.ask("CLIENT", "PAUSE", PAUSE_MS, "ALL")  # it ends by itself: nobody is heard
    yield


@asynccontextmanager
async def writes_paused(store: Store) -> AsyncIterator[None]:
    store.server.ask("CLIENT", "PAUSE", PAUSE_MS, "WRITE")
    yield


@asynccontextmanager
async def asleep(store: Store) -> AsyncIterator[None]:
    def sleep() -> None:
        with redis.Redis(port=store.server.port, socket_timeout=60) as other:
            other.execute_command("DEBUG", "SLEEP", PAUSE_MS / 1000)

    running = asyncio.create_task(asyncio.to_thread(sleep))
    with redis.Redis(port=store.server.port, socket_timeout=0.2, retry=Retry(NoBackoff(), 0)) as other:
        await until(lambda: is_silent(other))
    yield
    await running


def is_silent(other: redis.Redis) -> bool:
    try:
        other.ping()
    except redis.TimeoutError:
        return True
    return False


@asynccontextmanager
async def loading(store: Store) -> AsyncIterator[None]:
    with store.admin.pipeline(transaction=False) as pipeline:
        for number in range(5000):
            pipeline.set(f"other:{number}", "x")
        pipeline.execute()
    store.admin.bgrewriteaof()  # what it reads at once it says nothing during
    await until(lambda: not store.admin.info("persistence")["aof_rewrite_in_progress"])
    store.server.kill()
    options = store.server._options
    slowly = ("--key-load-delay", "400", "--loading-process-events-interval-bytes", "1024")
    store.server._options = (*options, *slowly)
    starting = asyncio.create_task(asyncio.to_thread(store.server.start))
    await until(lambda: is_loading(store))
    yield
    await starting
    store.server._options = options


def is_loading(store: Store) -> bool:
    with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
        return bool(store.admin.info("persistence")["loading"])
    return False


def grant(server: Server) -> None:
    """The gateway's own user."""
    server.ask("ACL", "SETUSER", "gateway", "on", f">{SECRET}", "~*", "&*", "+@all")


TROUBLES = {
    "r6-paused": paused,
    "r6-writes-paused": writes_paused,
    "r7-asleep": asleep,
    "r19-full": full,
    "r25-without-room-for-clients": without_room,
    "r26-without-rights": without_rights,
    "r26-without-user": without_user,
    "r29-disk-full": disk_full,
    "r29-without-replicas": without_replicas,
    "r29-read-only-replica": read_only_replica,
    "r29-busy": busy,
    "r29-loading": loading,
    "r30-another-service": another_service,
}
STAYS_READY = {"r6-paused", "r6-writes-paused", "r7-asleep", "r19-full"}
"""Full: beats, cancels and reads go on, which is what a node is asked for. The others end too soon to ask."""

READS_GO_ON = {"r6-writes-paused", "r19-full", "r29-disk-full", "r29-without-replicas"}


@asynccontextmanager
async def a_store(*options: str) -> AsyncIterator[Store]:
    with Server(*OPTIONS, *options, is_persistent=True) as server:
        async with Network(server.address) as network:
            yield Store(server, network)


@pytest.mark.parametrize("name", TROUBLES)
async def test_a_store_that_refuses_costs_delay_only(make_node: MakeNode, name: str) -> None:
    """Turns are held and written on, sends refused as retryable and asked of nobody, readers wait."""
    script = Numbers(3)
    async with a_store() as store, AsyncExitStack() as stack:
        user = ""
        if "loading" not in name:  # a user does not outlive a restart
            grant(store.server)
            user = f"gateway:{SECRET}@"
        backend = await stack.enter_async_context(ScriptedBackend(script))
        settings = {"redis_url": f"redis://{user}{store.network.address}", "lease_seconds": 0.6}
        nodes = [await make_node(backend.url, **settings, poll_seconds=0.3) for _ in range(2)]
        addresses = [node.address for node in nodes]
        crowd = await stack.enter_async_context(Crowd(script, addresses, 6, away=1))
        await crowd.words(3)
        async with TROUBLES[name](store):
            await script.allow(7)
            reply = await send(addresses[0], "s0", "refused")
            assert (reply["type"], reply["code"], reply["retryable"]) == ("error", "store-unavailable", True)
            assert not any(word in str(reply) for word in ITS_WORDS), reply
            assert "s0/refused" not in script.asked
            if name not in STAYS_READY:
                await until(lambda: is_unready(nodes[0]))
            if name in READS_GO_ON:
                async with Watcher("s0", addresses[1]) as reader:
                    await reader.has_words("t", 3)
        await crowd.words(7)
        await until(lambda: is_ready(nodes[0]))
        assert (await send_until_accepted(addresses[0], "s0", "after"))["type"] == "accepted"
        await script.finish()
        await crowd.ended()
        assert (await crowd.watchers[0].ended("after"))["reason"] == "complete"
        for watcher in crowd.watchers:
            assert text_of(watcher.view, "t") == numbers(7)
            assert ends_of(watcher.view)["t"] == "complete"
            assert (watcher.resyncs, watcher.attaches) == ([], 1)
            assert await whole_journal(addresses[0], watcher.session) == watcher.view


async def is_unready(node: Node) -> bool:
    return await readiness(node.admin_address) == 503


async def is_ready(node: Node) -> bool:
    return await readiness(node.admin_address) == 200


async def test_r19_a_cancel_reaches_the_backend_while_the_store_is_full(make_node: MakeNode) -> None:
    """Memory is no reason to pay for an answer that nobody wants; and its end frees some, in time."""
    script = Numbers(3)
    async with a_store() as store, ScriptedBackend(script) as backend:
        one, two = [await make_node(backend.url, redis_url=store.server.url) for _ in range(2)]
        async with Crowd(script, [one.address], 1) as crowd:
            await crowd.words(3)
            async with full(store):
                reply = await command(two.address, type="cancel", session="s0", turn="t")
                assert reply["turns"] == [{"turn": "t", "result": "cancelled"}]
                assert script.closed == {"s0/t"}
            assert (await crowd.watchers[0].ended("t"))["reason"] == "cancelled"


# -- what is no outage


@pytest.mark.parametrize("what", ["r21-scripts-flushed", "r22-connections-killed", "r22-pubsub-killed"])
async def test_a_store_that_forgets_scripts_or_connections_costs_no_client_an_error(
    make_node: MakeNode, what: str
) -> None:
    """Again and again, in the middle of answers and of sends."""
    script = Numbers(float("inf"), pace_seconds=0.01)
    async with a_store() as store, AsyncExitStack() as stack:
        backend = await stack.enter_async_context(ScriptedBackend(script))
        settings = {"redis_url": store.server.url, "poll_seconds": 0.3}
        nodes = [await make_node(backend.url, **settings) for _ in range(2)]
        addresses = [node.address for node in nodes]
        crowd = await stack.enter_async_context(Crowd(script, addresses, 20, away=1))
        for number in range(12):
            match what:
                case "r21-scripts-flushed":
                    store.admin.script_flush("SYNC")
                case "r22-connections-killed":
                    store.server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                case _:
                    store.server.ask("CLIENT", "KILL", "TYPE", "pubsub")
            reply = await send(addresses[number % 2], f"more{number}", "t")
            assert reply["type"] == "accepted"
            await crowd.words(5 * (number + 1))
        await script.finish()
        await crowd.ended()
        for watcher in crowd.watchers:
            assert text_of(watcher.view, "t") == numbers(script.said[f"{watcher.session}/t"])
            assert (watcher.resyncs, watcher.attaches) == ([], 1)
        assert set(script.asked.values()) == {1}


@pytest.mark.parametrize("user", ["-evalsha", "-script", "resetchannels"])
async def test_r26_a_user_without_the_rights_is_told_of_at_the_start_or_goes_on_without(
    make_config: Callable[..., Any], user: str
) -> None:
    """Without scripts nothing works, and the log says why; without channels what others wrote is polled."""
    script = Numbers(3)
    async with a_store() as store, ScriptedBackend(script) as backend:
        grant(store.server)
        store.server.ask("ACL", "SETUSER", "gateway", user)
        settings = {
            "upstream": backend.url,
            "redis_url": f"redis://gateway:{SECRET}@{store.server.address}",
            "key_prefix": make_config(backend.url).key_prefix,
            "poll": 0.3,
        }
        async with GatewayProcess(**settings) as one:
            if user == "resetchannels":
                await one.started()
                async with GatewayProcess(**settings) as two:
                    await two.started()
                    async with Crowd(script, [one.address, two.address], 2, away=1) as crowd:
                        await crowd.words(3)
                        await script.finish()
                        await crowd.ended()
                        crowd.assert_whole()
                assert not faults_of(two, "doorbell.refused")
            else:
                assert await one.exited() != 0
                assert any("unable to" in str(line) for line in one.log)
                assert "NOPERM" in str(one.log)
        assert SECRET not in str(one.log)
        assert "Traceback" not in str(one.log)


async def test_a_store_behind_tls_outlives_cuts_and_a_restart(make_node: MakeNode) -> None:
    """A managed store has TLS; its trouble is the same."""
    script = Numbers(3)
    with made_certificates() as certificates, TlsServer(certificates) as server:
        async with AsyncExitStack() as stack:
            backend = await stack.enter_async_context(ScriptedBackend(script))
            network = await stack.enter_async_context(Network(server.address))
            url = f"rediss://{network.address}?ssl_ca_certs={certificates.authority}"
            nodes = [await make_node(backend.url, redis_url=url, poll_seconds=0.3) for _ in range(2)]
            crowd = Crowd(script, [node.address for node in nodes], 4, away=1)
            await stack.enter_async_context(crowd)
            for words in range(4, 10):
                await crowd.words(words - 1)
                network.cut()
                await script.allow(words)
            await crowd.words(9)
            server.kill()
            await script.allow(12)
            server.start()  # it has no file: all is written again
            await script.finish()
            for watcher in crowd.watchers:
                await watcher.has_whole("t", 12)
            assert set(script.asked.values()) == {1}


# -- clusters


async def test_r18_slots_that_move_while_many_sessions_run_lose_nothing(make_node: MakeNode) -> None:
    """A reshard of all of them, back and forth, with their keys in the middle of being moved."""
    script = Numbers(float("inf"), pace_seconds=0.02)
    with ClusterOfServers(3) as cluster:
        async with AsyncExitStack() as stack:
            backend = await stack.enter_async_context(ScriptedBackend(script))
            settings = {"redis_url": cluster.url, "poll_seconds": 0.5}
            nodes = [await make_node(backend.url, **settings) for _ in range(2)]
            crowd = Crowd(script, [node.address for node in nodes], 24, away=1)
            await stack.enter_async_context(crowd)
            await crowd.words(3)
            for round_ in range(3):
                # To one server in a round: two that take slots at once may claim them with the same epoch,
                # and then it is the servers who do not agree.
                target = cluster.primaries[round_]
                for slot in sorted(slots_in_use(cluster)):
                    if cluster.owner_of_slot(slot) is not target:
                        await asyncio.to_thread(cluster.move, slot, target)
                await until(lambda: agree(cluster))
                await crowd.words(10 * (round_ + 1))
            await script.finish()
            await crowd.ended()
            crowd.assert_whole(attaches=1)
            for watcher in crowd.watchers:
                assert await whole_journal(nodes[0].address, watcher.session) == watcher.view


def agree(cluster: ClusterOfServers) -> bool:
    """Whether all servers have the same map."""
    maps = [
        sorted((first, last, primary[1]) for first, last, primary, *_ in server.ask("CLUSTER", "SLOTS"))
        for server in cluster.servers
    ]
    return all(map_ == maps[0] for map_ in maps)


def slots_in_use(cluster: ClusterOfServers) -> set[int]:
    return {
        int(server.ask("CLUSTER", "KEYSLOT", key))
        for server in cluster.primaries
        for key in server.admin.keys("*")
    }


async def test_r18_a_session_that_is_left_as_its_slot_moves_costs_the_others_nothing() -> None:
    """The server ends the subscription by itself, and answers to our own word that the slot is another's."""
    left = SessionId("left")
    with ClusterOfServers(3) as cluster:
        async with listening(cluster.url, cluster.primaries[0].url) as ring:
            slot = slot_of(ring.channel(left))
            source = cluster.owner_of_slot(slot)
            target = next(server for server in cluster.primaries if server is not source)
            stays = next(
                session
                for session in (SessionId(f"stays{number}") for number in range(1000))
                if cluster.owner(ring.channel(session)) is source
            )
            for session in (left, stays):
                ring.bell.watch(session)
                await ring.until("missed", session)
            cluster.move(slot, target)  # the loop stands still: what the server says of it waits to be read
            ring.bell.unwatch(left)
            for wire in ring.bell._wires.values():
                wire._flush()  # before anything is read
            await ring.bell._ring(ring.channel(stays).encode(), b"r me")  # there and back
            source.ask("SPUBLISH", ring.channel(stays), "r another")
            await ring.until("records", stays)
            assert ring.told.count(("missed", stays)) == 1, "its connection was made again"


async def test_r16_a_graceful_failover_of_a_cluster_shows_nobody_anything(make_node: MakeNode) -> None:
    """An upgrade of the store: each primary hands over to its replica, twice."""
    script = Numbers(float("inf"), pace_seconds=0.02)
    with ClusterOfServers(3, replicas=1) as cluster:
        async with AsyncExitStack() as stack:
            backend = await stack.enter_async_context(ScriptedBackend(script))
            settings = {"redis_url": cluster.url, "poll_seconds": 0.5}
            nodes = [await make_node(backend.url, **settings) for _ in range(2)]
            crowd = Crowd(script, [node.address for node in nodes], 12, away=1)
            await stack.enter_async_context(crowd)
            await crowd.words(3)
            for round_, servers in enumerate((cluster.replicas, cluster.primaries)):
                for server in servers:
                    server.ask("CLUSTER", "FAILOVER")
                    await until(functools.partial(is_primary, server))
                await crowd.words(30 * (round_ + 1))
            await script.finish()
            await crowd.ended()
            crowd.assert_whole(attaches=1)


def is_primary(server: Server) -> bool:
    return bool(server.admin.info("replication")["role"] == "master")


async def test_r17_a_killed_primary_of_a_cluster_costs_delay_only(make_node: MakeNode) -> None:
    """The sessions of the other shards do not even wait."""
    script = Numbers(float("inf"), pace_seconds=0.02)
    with ClusterOfServers(3, replicas=1) as cluster:
        async with AsyncExitStack() as stack:
            backend = await stack.enter_async_context(ScriptedBackend(script))
            settings = {"redis_url": cluster.url, "poll_seconds": 0.5, "lease_seconds": 1.0}
            nodes = [await make_node(backend.url, **settings) for _ in range(2)]
            crowd = Crowd(script, [node.address for node in nodes], 24, away=1)
            await stack.enter_async_context(crowd)
            await crowd.words(3)
            cluster.primaries[1].kill()
            await script.says_more(60)
            await crowd.words(63)
            await script.finish()
            await crowd.ended()
            crowd.assert_whole(attaches=1)
