"""The store's lanes against a real server: order, group commit, and every way in which a server goes away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest
import redis
from structlog.testing import capture_logs

from gateway import journal, lease
from gateway.core.model import By, Draft, NodeId, Overlap, RecordKind, SessionId, TurnId
from gateway.journal import SessionJournal
from gateway.outcomes import Appended, Begun, Cancelling, Ended
from gateway.store import Lane, Script, Store, StoreError, StoreUnavailable, load_script, refusals
from gateway.store import lane as lane_module
from gateway.store.calls import CallQueue
from gateway.store.pipeline import Pipeline
from gateway.store.routes import Routes
from tests.support.servers import Server
from tests.support.valkey import free_port, running_valkey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

SCRIPTS = (*journal.SCRIPTS, *lease.SCRIPTS)
CLAIM, ORPHANS = load_script("claim"), load_script("orphans")
SESSION, NODE = SessionId("chat"), NodeId("node")
SHORT_SECONDS = 0.2
Calls = Lane | Routes


@contextlib.contextmanager
def server_on(port: int, *options: str) -> Iterator[redis.Redis]:
    """A server that can be told to stop, and started again at the same address."""
    with (
        running_valkey("--port", str(port), "--bind", "127.0.0.1", *options) as url,
        redis.Redis.from_url(url) as admin,
    ):
        yield admin


@pytest.fixture
def address() -> str:
    return f"redis://127.0.0.1:{free_port()}"


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


@pytest.fixture
def admin(address: str) -> Iterator[redis.Redis]:
    with server_on(port_of(address)) as admin:
        yield admin


@pytest.fixture
async def open_store(admin: redis.Redis, address: str) -> AsyncIterator[Store]:
    del admin
    async with Store(address, SCRIPTS) as opened:
        yield opened


@contextlib.contextmanager
def frozen(admin: redis.Redis) -> Iterator[None]:
    """The server's process is stopped: it takes what is written to it, and answers nothing.

    Only meanwhile is the deadline short: a busy machine may be slow to answer before and after.
    """
    process = int(admin.info("server")["process_id"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane_module, "OPERATION_TIMEOUT_SECONDS", SHORT_SECONDS)
        os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(process, signal.SIGCONT)


def kill(admin: redis.Redis) -> None:
    os.kill(int(admin.info("server")["process_id"]), signal.SIGKILL)


def ours(admin: redis.Redis) -> list[dict[str, Any]]:
    return [client for client in admin.client_list() if client["name"] == "session-gateway"]


def redis_binary() -> str:
    """Redis itself, the oldest that we serve; the test is left out where there is none."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("needs a redis-server (Debian, Ubuntu: redis-server)")
    return binary


def counted(admin: redis.Redis, section: str, name: str) -> int:
    return int(admin.info(section)[name])


def add(lane: Calls, member: str, key: str = "set") -> asyncio.Future[Any]:
    return lane.call(CLAIM, (key,), (member, "add", 60_000))


def members(lane: Calls, key: str) -> asyncio.Future[Any]:
    return lane.call(ORPHANS, (key,), ())


async def refused(call: asyncio.Future[Any]) -> bool:
    """Whether a call fails as unavailable. It must do one or the other: nothing may hang."""
    async with asyncio.timeout(10):
        try:
            await call
        except StoreUnavailable:
            return True
    return False


# -- order and batches


async def test_each_call_gets_its_own_reply(open_store: Store) -> None:
    """Replies are told apart by nothing but their order."""
    for number in range(100):
        open_store.writes.tell(CLAIM, (f"key{number}",), (f"m{number}", "add", 60_000))
    replies = await asyncio.gather(*(members(open_store.writes, f"key{number}") for number in range(100)))
    assert replies == [[f"m{number}".encode()] for number in range(100)]


async def test_calls_are_carried_out_in_the_order_they_were_asked(open_store: Store) -> None:
    """A claim stands before its turn; an add and a remove must not change places, over any batches."""
    lane = open_store.writes
    seen = []
    for number in range(300):
        lane.tell(CLAIM, ("set",), ("m", "add" if number % 2 else "remove", 60_000))
        seen.append(members(lane, "set"))
        if number % 7 == 0:
            await asyncio.sleep(0)
    assert await asyncio.gather(*seen) == [[b"m"] if number % 2 else [] for number in range(300)]


async def test_what_is_asked_in_one_turn_of_the_loop_leaves_together(
    open_store: Store, admin: redis.Redis
) -> None:
    """Group commit: all turns of a node share one round trip, so the server reads once for all of them."""
    await add(open_store.writes, "first")
    before = counted(admin, "stats", "total_reads_processed")
    await asyncio.gather(*(add(open_store.writes, f"m{number}") for number in range(60)))
    reads = counted(admin, "stats", "total_reads_processed") - before - 1
    assert reads <= 2


async def test_what_is_asked_while_a_batch_is_away_leaves_with_the_next(
    open_store: Store, admin: redis.Redis
) -> None:
    """A lane under load makes bigger batches instead of more of them."""
    await add(open_store.writes, "first")
    calls = []
    with frozen(admin):
        calls.append(add(open_store.writes, "m"))
        await asyncio.sleep(0)  # the lane takes it
        await asyncio.sleep(0)
        for number in range(60):
            calls.append(add(open_store.writes, f"m{number}"))
            await asyncio.sleep(0)
    before = counted(admin, "stats", "total_reads_processed")
    await asyncio.gather(*calls)
    assert counted(admin, "stats", "total_reads_processed") - before - 1 <= 3


async def test_catching_up_does_not_stand_before_appending(open_store: Store, admin: redis.Redis) -> None:
    """Each lane has a connection of its own, and keeps it."""
    for _ in range(5):
        await asyncio.gather(add(open_store.writes, "m"), members(open_store.reads, "set"))
    ours = [client for client in admin.client_list() if client["name"] == "session-gateway"]
    assert len(ours) == 2


async def test_much_is_split_over_several_writes(
    open_store: Store, admin: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G10: one write holds MAX_BATCH_BYTES and no more, give or take a call; nothing is lost between them."""
    taken: list[int] = []
    take = CallQueue.take

    def watched(queue: CallQueue, size: int) -> list[Any]:
        batch = take(queue, size)
        taken.append(sum(call.size for call in batch) if len(batch) > 1 else 0)
        return batch

    monkeypatch.setattr(CallQueue, "take", watched)
    mib = 1024 * 1024
    values = [f"{number:02}" + "x" * mib for number in range(12)]
    values.append("whole" + "y" * (lane_module.MAX_BATCH_BYTES + 1))
    replies = await asyncio.gather(*(add(open_store.writes, value, "big") for value in values))
    assert replies == [[b"OK"]] * 13
    assert admin.scard("big") == 13
    assert max(taken) <= lane_module.MAX_BATCH_BYTES
    assert len(taken) >= 5


async def test_replies_that_will_be_large_are_split_too(
    open_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand clients that read back at once must not make one batch that misses its deadline."""
    taken: list[int] = []
    take = CallQueue.take

    def watched(queue: CallQueue, size: int) -> list[Any]:
        batch = take(queue, size)
        taken.append(len(batch))
        return batch

    monkeypatch.setattr(CallQueue, "take", watched)
    pages = SessionJournal(open_store, node=NODE, prefix="p", ttl_seconds=60, window_seconds=60)
    await asyncio.gather(*(pages.read(SESSION, after=0) for _ in range(40)))
    assert max(taken) <= lane_module.MAX_BATCH_BYTES // journal.PAGE_BYTES
    taken.clear()
    await asyncio.gather(*(pages.look(SESSION) for _ in range(40)))
    assert len(taken) <= 2


# -- scripts


async def test_scripts_that_were_flushed_are_loaded_again(open_store: Store, admin: redis.Redis) -> None:
    """SCRIPT FLUSH, or a replica that became the primary: nobody notices, and the order is kept."""
    lane = open_store.writes
    await add(lane, "first")
    admin.script_flush()
    calls: list[asyncio.Future[Any]] = []
    for number in range(20):
        calls += (add(lane, str(number), f"set{number}"), members(lane, f"set{number}"))
    replies = await asyncio.gather(*calls)
    for number in range(20):
        assert replies[2 * number : 2 * number + 2] == [[b"OK"], [str(number).encode()]]


async def test_a_wrong_type_is_our_fault_and_harms_no_other(open_store: Store, admin: redis.Redis) -> None:
    """Repeating it would not help; the calls beside it are answered."""
    admin.set("string", "x")
    lane = open_store.writes
    calls = [add(lane, "a"), add(lane, "b", "string"), members(lane, "set")]
    replies = await asyncio.gather(*calls, return_exceptions=True)
    assert replies[0] == [b"OK"]
    assert isinstance(replies[1], StoreError)
    assert replies[2] == [b"a"]


async def test_a_script_that_cannot_be_compiled_does_not_stop_the_lane(
    admin: redis.Redis, address: str
) -> None:
    """A server that is too old says so to each caller; none of them hangs."""
    del admin
    async with Store(address, (Script("bad", b"#!lua\nnot lua", "0" * 40),)) as opened:
        for _ in range(2):
            with pytest.raises((StoreError, StoreUnavailable)):
                async with asyncio.timeout(5):
                    await add(opened.writes, "m")


async def test_a_script_that_is_never_loaded_is_our_fault(open_store: Store) -> None:
    """The lane loads once and asks again once; it does not ask for ever."""
    unknown = Script("unknown", b"", "f" * 40)
    calls = [open_store.writes.call(unknown, ("k",), ()), add(open_store.writes, "m")]
    replies = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(replies[0], StoreError)
    assert replies[1] == [b"OK"]


async def test_a_bug_in_the_lane_does_not_leave_its_callers_waiting(
    open_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that died would be a wait without an end for everyone after it."""
    await add(open_store.writes, "m")
    with monkeypatch.context() as broken:
        broken.setattr(Lane, "_send", None)
        with pytest.raises(StoreError):
            async with asyncio.timeout(5):
                await add(open_store.writes, "m")
    assert await add(open_store.writes, "m") == [b"OK"]


# -- a server that goes away


async def test_no_server_is_unavailable(address: str) -> None:
    """The gateway starts before its store, or the other way round."""
    async with Store(address, SCRIPTS) as opened:
        assert await refused(add(opened.writes, "m"))
        with server_on(port_of(address)):
            assert await add(opened.writes, "m") == [b"OK"]


async def test_a_killed_server_fails_what_was_asked_and_serves_what_comes_later(address: str) -> None:
    """G9: the outcome is unknown, the caller repeats it, the lane goes on by itself."""
    async with Store(address, SCRIPTS) as opened:
        with server_on(port_of(address)) as admin:
            await add(opened.writes, "m")
            process = int(admin.info("server")["process_id"])
            with frozen(admin):
                calls = [add(opened.writes, str(number)) for number in range(5)]
                await asyncio.sleep(0)
                os.kill(process, signal.SIGKILL)
                assert [await refused(call) for call in calls] == [True] * 5
                assert await refused(add(opened.writes, "m"))
        with server_on(port_of(address)):
            assert await add(opened.writes, "m") == [b"OK"]


async def test_a_server_that_restarted_while_nothing_was_asked_costs_no_error(address: str) -> None:
    """The connection is known to be closed before anything is sent on it."""
    async with Store(address, SCRIPTS) as opened:
        with server_on(port_of(address)) as admin:
            await add(opened.writes, "m")
            kill(admin)
            assert isinstance(opened.writes, Lane)
            async with asyncio.timeout(5):
                while opened.writes._pipeline is not None:  # noqa: ASYNC110 - nobody but a test waits for it
                    await asyncio.sleep(0.001)
        with server_on(port_of(address)):
            assert await add(opened.writes, "m") == [b"OK"]


async def test_a_frozen_server_fails_calls_within_the_deadline(open_store: Store, admin: redis.Redis) -> None:
    """Nothing hangs, whatever waits behind the batch that is away; afterwards the lane works."""
    await add(open_store.writes, "m")
    with frozen(admin):
        calls = [add(open_store.writes, "x" * 1024 * 1024) for _ in range(30)]
        assert [await refused(call) for call in calls] == [True] * 30
        assert await refused(members(open_store.reads, "set"))
    assert await add(open_store.writes, "m") == [b"OK"]


async def test_a_call_behind_many_waits_no_longer_than_they(
    open_store: Store, admin: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that misses its deadline takes what is overdue with it: waits do not add up."""
    failed = 0
    perform = Lane._perform

    def watched(lane: Lane) -> None:
        nonlocal failed
        failed += 1
        perform(lane)

    await add(open_store.writes, "m")
    monkeypatch.setattr(Lane, "_perform", watched)
    with frozen(admin):
        calls = [add(open_store.writes, "x" * lane_module.MAX_BATCH_BYTES) for _ in range(10)]
        assert [await refused(call) for call in calls] == [True] * 10
    assert failed <= 2


async def test_a_late_reply_is_nobody_elses(open_store: Store, admin: redis.Redis) -> None:
    """After a timeout the connection is dropped: its replies would be taken for those of later calls."""
    lane = open_store.writes
    for number in range(10):
        await add(lane, f"m{number}", f"set{number}")
    for _ in range(3):
        with frozen(admin):
            calls = [members(lane, f"set{number}") for number in range(10)]
            assert [await refused(call) for call in calls] == [True] * 10
        replies = await asyncio.gather(*(members(lane, f"set{number}") for number in reversed(range(10))))
        assert replies == [[f"m{number}".encode()] for number in reversed(range(10))]


async def test_what_a_frozen_server_did_not_take_is_given_up(open_store: Store, admin: redis.Redis) -> None:
    """G10: bytes of a failed batch are not kept for a server that may never read them."""
    await add(open_store.writes, "m")
    assert isinstance(open_store.writes, Lane)
    pipeline = open_store.writes._pipeline
    assert pipeline is not None
    transport = pipeline._transport
    with frozen(admin):
        assert await refused(add(open_store.writes, "x" * 16 * 1024 * 1024))
        assert transport.is_closing()
        async with asyncio.timeout(5):
            while transport.get_write_buffer_size():  # noqa: ASYNC110 - a transport sets no event
                await asyncio.sleep(0.001)
    assert await add(open_store.writes, "m") == [b"OK"]


async def test_a_caller_that_goes_away_does_not_break_the_lane(open_store: Store, admin: redis.Redis) -> None:
    """A cancelled waiter takes nothing back, and the replies of others stay theirs."""
    lane = open_store.writes
    await add(lane, "first")
    with frozen(admin):
        calls = [add(lane, f"m{number}", f"set{number}") for number in range(10)]
        calls += [members(lane, f"set{number}") for number in range(10)]
        await asyncio.sleep(0)
        for number in (0, 3, 12, 19):
            calls[number].cancel()
    replies = await asyncio.gather(*calls, return_exceptions=True)
    for number, reply in enumerate(replies):
        if number in {0, 3, 12, 19}:
            assert isinstance(reply, asyncio.CancelledError)
        else:
            assert reply == [b"OK" if number < 10 else f"m{number - 10}".encode()]
    assert [admin.scard(f"set{number}") for number in range(10)] == [1] * 10


async def test_closing_fails_what_waits_and_what_comes_later(admin: redis.Redis, address: str) -> None:
    """A node that stops leaves nobody waiting."""
    async with Store(address, SCRIPTS) as opened:
        await add(opened.writes, "m")
        with frozen(admin):
            calls = [add(opened.writes, "x" * lane_module.MAX_BATCH_BYTES) for _ in range(3)]
            opened.writes.tell(CLAIM, ("set",), ("lost", "add", 60_000))
            await asyncio.sleep(0)
            await opened.writes.close()
            assert [await refused(call) for call in calls] == [True] * 3
            assert await refused(add(opened.writes, "m"))


async def test_a_password_that_is_wrong_is_unavailable(address: str) -> None:
    """The lane goes on when the operator has put it right."""
    async with Store(address, SCRIPTS) as opened:
        with server_on(port_of(address)) as admin:
            admin.config_set("requirepass", "secret")
            assert await refused(add(opened.writes, "m"))
            admin.auth("secret")
            admin.config_set("requirepass", "")
            assert await add(opened.writes, "m") == [b"OK"]


# -- a server that cannot write


async def test_a_full_server_refuses_sends_and_still_ends_turns(
    open_store: Store, admin: redis.Redis
) -> None:
    """FAULTS R19: what adds much is unavailable; cancel, end, seal and reads are what frees a full server."""
    prefix = f"t{secrets.token_hex(4)}"
    full = SessionJournal(open_store, node=NODE, prefix=prefix, ttl_seconds=60, window_seconds=60)
    node = lease.Lease(open_store, node=NODE, prefix="p", lease_seconds=1)
    ending = Draft(RecordKind.TURN_END, b"end")

    async def begin(turn: str, overlap: Overlap = Overlap.PARALLEL) -> Begun:
        result = await full.begin(
            SESSION, TurnId(turn), token="token", new_epoch="ab", digest="d", overlap=overlap,
            path="/", by=By(), start=Draft(RecordKind.TURN_START, b"start"), cancelled=ending,
        )  # fmt: skip
        assert isinstance(result, Begun)
        return result

    one, two = TurnId("t1"), TurnId("t2")
    fence = (await begin(one)).fence
    await begin(two)
    queued = (await begin("t3", Overlap.INTERRUPT)).fence
    await node.check()
    admin.config_set("maxmemory-policy", "noeviction")
    admin.config_set("maxmemory", "1")

    with pytest.raises(StoreUnavailable):
        await begin("t4")
    with pytest.raises(StoreUnavailable):
        await full.append(SESSION, one, fence, index=0, drafts=[Draft(RecordKind.CHUNK, b"c")])
    assert (await full.read(SESSION, after=0)).last == 3
    assert len((await full.look(SESSION)).turns) == 3
    assert await full.cancel(SESSION, one, by=By()) == Cancelling(NODE)
    assert await full.start(SESSION, TurnId("t3"), queued)
    await full.abort(SESSION, TurnId("t3"), by=By(), seconds=9)
    await full.abort(SESSION, TurnId("t3"), by=By(), seconds=None)
    ended = await full.end(SESSION, one, fence, index=0, reason="cancelled", drafts=[ending])
    assert isinstance(ended, Appended)
    sealed = await full.seal(SESSION, two, node=NODE, reason="interrupted", end=ending)
    assert isinstance(sealed, Appended)
    await full.mark_read(SESSION, one)
    assert await full.cancel(SESSION, one, by=By()) == Ended("cancelled")
    await node.check()
    await node.leave()

    admin.config_set("maxmemory", "0")
    await begin("t4")


async def test_a_replica_is_unavailable_for_writing(open_store: Store, admin: redis.Redis) -> None:
    """After a failover the old primary refuses: the same call succeeds when the address is the new one's."""
    await add(open_store.writes, "m")
    admin.replicaof("127.0.0.1", free_port())
    assert await refused(add(open_store.writes, "m"))
    admin.replicaof("NO", "ONE")
    assert await add(open_store.writes, "m") == [b"OK"]


async def test_a_primary_that_was_demoted_is_left_by_both_lanes(
    open_store: Store, admin: redis.Redis
) -> None:
    """Its address may lead to the new one by now: who stays is refused for ever, or reads what is old."""
    await asyncio.gather(add(open_store.writes, "m"), members(open_store.reads, "set"))
    before = {client["id"] for client in ours(admin)}
    admin.replicaof("127.0.0.1", free_port())
    assert await refused(add(open_store.writes, "m"))
    admin.replicaof("NO", "ONE")
    await asyncio.gather(add(open_store.writes, "m"), members(open_store.reads, "set"))
    await members(open_store.reads, "set")
    after = {client["id"] for client in ours(admin)}
    assert len(after) == 2
    assert not before & after


@pytest.mark.parametrize("taken", ["-evalsha", "-sadd", "-script", "resetkeys"])
@pytest.mark.parametrize("binary", ["valkey", "redis"])
async def test_an_acl_that_was_taken_away_is_an_outage(taken: str, binary: str) -> None:
    """It comes back as an outage does; nobody is told that the gateway has a bug."""
    with (
        Server(binary=redis_binary() if binary == "redis" else None) as server,
        redis.Redis(port=server.port) as admin,
    ):
        user: dict[str, Any] = {"enabled": True, "passwords": ["+p"], "keys": ["*"], "commands": ["+@all"]}
        admin.acl_setuser("app", **user)
        async with Store(f"redis://app:p@{server.address}", SCRIPTS) as opened:
            assert await add(opened.writes, "m") == [b"OK"]
            admin.script_flush()
            admin.execute_command("ACL", "SETUSER", "app", taken)
            assert await refused(add(opened.writes, "n"))
            admin.acl_setuser("app", **user)
            assert await add(opened.writes, "n") == [b"OK"]


async def test_thousands_of_refusals_are_one_line_in_the_log_and_counted(
    monkeypatch: pytest.MonkeyPatch, open_store: Store, admin: redis.Redis
) -> None:
    """A store that is full refuses each call of each turn: a log that fills the disk is one more outage."""
    monkeypatch.setattr(refusals, "_refusals", refusals._Refusals())
    monkeypatch.setattr(refusals, "SAID_AGAIN_SECONDS", 600.0)
    assert await add(open_store.writes, "m") == [b"OK"]
    admin.set("wrong", "type")
    admin.acl_setuser("default", enabled=True, commands=["-sadd"])
    try:
        with capture_logs() as logs:
            calls = [add(open_store.writes, "m") for _ in range(1000)]
            assert all([await refused(call) for call in calls])
            with pytest.raises(StoreError):  # another kind of trouble is not hidden by the first
                await open_store.reads.call(ORPHANS, ("wrong",), ())
            monkeypatch.setattr(refusals, "SAID_AGAIN_SECONDS", 0.0)
            assert await refused(add(open_store.writes, "m"))
            assert await refused(add(open_store.writes, "m"))
    finally:
        admin.acl_setuser("default", enabled=True, commands=["+@all"])
    told = [
        (entry["log_level"], entry.get("left_out", 0)) for entry in logs if entry["event"] == "store.refused"
    ]
    assert told == [("warning", 0), ("error", 0), ("warning", 999), ("warning", 0)]


async def test_a_server_with_too_many_clients_is_unavailable(admin: redis.Redis, address: str) -> None:
    """FAULTS R25: who finds no place tries again, and is served when there is one."""
    admin.config_set("maxclients", 1)
    async with Store(address, SCRIPTS) as opened:
        assert await refused(add(opened.writes, "m"))
        assert await refused(add(opened.writes, "m"))
        admin.config_set("maxclients", 10)
        assert await add(opened.writes, "m") == [b"OK"]


# -- what is no server of ours


@pytest.mark.parametrize(
    "bytes_said",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00\xff" * 50, b"$-7\r\n", b"-ERR no\r\n", b":1\r\n" * 9, b""],
)
async def test_a_wrong_service_is_unavailable(bytes_said: bytes) -> None:
    """FAULTS R30: a port that was mixed up. It is left at once, or when it says nothing, in time."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(bytes_said)
        await writer.drain()
        await reader.read()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane_module, "OPERATION_TIMEOUT_SECONDS", SHORT_SECONDS)
        async with Store(url, SCRIPTS) as opened:
            for _ in range(2):
                assert await refused(add(opened.writes, "m"))
                assert await refused(members(opened.reads, "m"))
    listening.close()


async def test_a_server_that_refuses_at_once_is_not_asked_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever repeats a call without a pause must not make thousands of connections in a second."""
    taken = 0

    def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        del reader
        taken += 1
        writer.transport.abort()

    monkeypatch.setattr(lane_module, "OPERATION_TIMEOUT_SECONDS", SHORT_SECONDS)
    monkeypatch.setattr(lane_module, "FIRST_PAUSE_SECONDS", 60.0)
    monkeypatch.setattr(lane_module, "LONGEST_PAUSE_SECONDS", 60.0)
    listening = await asyncio.start_server(refuse, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    async with Store(url, SCRIPTS) as opened:
        for _ in range(3):
            assert await refused(add(opened.writes, "m"))
    listening.close()
    assert taken == 1


# -- what is told of a connection that was made again


async def test_the_first_connection_is_no_news_and_each_later_one_is(
    open_store: Store, admin: redis.Redis
) -> None:
    """The server may have lost what it said it had: producers look, and silence is judged anew."""
    told = []
    open_store.on_reconnect.append(lambda: told.append(open_store.contact))
    await add(open_store.writes, "m")
    await members(open_store.reads, "set")
    assert (told, open_store.contact) == ([], 0)
    for count in (1, 2):
        admin.client_kill_filter(_type="normal", skipme=True)
        await asyncio.sleep(0)
        while await refused(add(open_store.writes, "m")):
            pass
        assert told == list(range(1, count + 1))


async def test_a_try_that_comes_to_nothing_is_no_contact(address: str) -> None:
    """Only a batch that was answered tells that somebody is there; or each try would be news."""
    told = []
    async with Store(address, SCRIPTS) as opened:
        opened.on_reconnect.append(lambda: told.append(opened.contact))
        with server_on(port_of(address)) as admin:
            await add(opened.writes, "m")
            kill(admin)
        for _ in range(3):
            assert await refused(add(opened.writes, "m"))
        assert told == []
        with server_on(port_of(address)):
            assert await add(opened.writes, "m") == [b"OK"]
            assert told == [1]


async def test_the_plain_store_has_one_shard(open_store: Store) -> None:
    """What listens per shard needs no second way for it."""
    (shard,) = open_store.shards()
    assert open_store.shard_of("any") == shard
    assert not open_store.is_sharded
    open_store.refresh_soon()
    pipeline = await Pipeline.connect(shard.pool, lambda _: None, lambda _: None)
    assert not pipeline.is_closing
    pipeline.close()
