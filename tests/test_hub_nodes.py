"""Hubs of two nodes on one store: what one journals the other shows, whatever is lost in between."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import redis

from gateway import doorbell, journal
from gateway.core import tail as tail_module
from gateway.core.attachment import place
from gateway.core.model import (
    By,
    Cursor,
    Draft,
    NodeId,
    Overlap,
    Record,
    RecordKind,
    ResyncReason,
    SessionId,
    TurnId,
)
from gateway.doorbell import Doorbell
from gateway.hub import Hub, Resync
from gateway.journal import SessionJournal
from gateway.outcomes import Appended, Begun, Fence, Look, Page
from gateway.repairs import Repairs
from gateway.seen import SeenOffsets
from gateway.store import Store
from tests.support.link import Link
from tests.support.valkey import running_valkey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

SCRIPTS = (*journal.SCRIPTS, *doorbell.SCRIPTS)
SESSION, TURN = SessionId("chat"), TurnId("turn")
WAIT_SECONDS = 10.0
NEVER_SECONDS = 600.0


class CountingJournal(SessionJournal):
    """The real one; it counts what is asked."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.reads = 0
        self.asked: Counter[SessionId] = Counter()

    async def look(self, session: SessionId, *, offset: int = 0) -> Look:
        """As the base class."""
        self.asked[session] += 1
        return await super().look(session, offset=offset)

    async def read(
        self, session: SessionId, *, after: int, check: str = "", limit_bytes: int = journal.PAGE_BYTES
    ) -> Page:
        """As the base class."""
        self.reads += 1
        self.asked[session] += 1
        return await super().read(session, after=after, check=check, limit_bytes=limit_bytes)


class Side:
    """A node, as far as readers see it."""

    def __init__(self, store: Store, name: str, prefix: str, *, poll_seconds: float) -> None:
        node = NodeId(name)
        self.journal = CountingJournal(store, node=node, prefix=prefix, ttl_seconds=60, window_seconds=60)
        self.bell = Doorbell(store, prefix=prefix, node=node, probe_seconds=NEVER_SECONDS)
        self.repairs = Repairs(self.journal, wait_seconds=0.3)
        self.hub = Hub(
            self.journal, doorbell=self.bell, repairs=self.repairs, max_lag_bytes=1024 * 1024,
            poll_seconds=poll_seconds,
        )  # fmt: skip
        self.bell.on_records = self.hub.rung
        self.confirmed = 0
        self.bell.on_missed = self._missed

    def _missed(self, session: SessionId) -> None:
        self.confirmed += 1
        self.hub.missed(session)

    async def reader(self, after: Cursor | None = None, session: SessionId = SESSION) -> Reader:
        reader = Reader(self, session)
        await reader.attach(after)
        return reader

    def forget_what_was_seen(self) -> None:
        """As after many other sessions: then only what a reader itself has had tells of another history."""
        self.journal._seen = SeenOffsets()

    async def is_quiet(self) -> None:
        """Wait until every subscription is confirmed, and what that led to is read."""
        await eventually(lambda: self.confirmed >= len(self.hub._tails) and not self.hub._reader._tasks)


class Reader:
    """One client: what it was given, in the order it came."""

    def __init__(self, side: Side, session: SessionId = SESSION) -> None:
        self.side = side
        self.woken = asyncio.Event()
        self.subscriber = side.hub.subscribe(session, self.woken.set, carrier="websocket")
        self.records: list[Record] = []

    @property
    def offsets(self) -> list[int]:
        return [record.offset for record in self.records]

    async def attach(self, after: Cursor | None = None) -> None:
        self.place(await self.look(after), after)

    async def look(self, after: Cursor | None) -> Look:
        session = self.subscriber.session
        return await self.side.journal.look(session, offset=after.offset if after else 0)

    def place(self, look: Look, after: Cursor | None) -> None:
        where = place(after, epoch=look.epoch, last=look.last, base=look.base, tag=look.tag, check=look.check)
        running = [turn.turn for turn in look.turns if turn.is_running]
        self.subscriber.place_at(where.cursor, last=look.last, last_check=look.last_check, running=running)

    async def read_until(self, offset: int) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while self.subscriber.offset < offset:
                self.woken.clear()
                self.records += await self.subscriber.pull()
                if not self.subscriber.has_more and self.subscriber.offset < offset:
                    await self.woken.wait()

    async def resynced(self) -> ResyncReason:
        try:
            await self.read_until(1_000_000)
        except Resync as resync:
            return resync.reason
        raise AssertionError


class World:
    """Two nodes, a writer on the first, and a store that can be put back to what it was."""

    def __init__(self, stack: AsyncExitStack, url: str) -> None:
        self.stack = stack
        self.url = url
        self.prefix = f"t{secrets.token_hex(4)}"
        self.admin = stack.enter_context(redis.Redis.from_url(url, protocol=2))
        self.fence = Fence(0, "")
        self.count = 0

    async def side(self, name: str, *, url: str = "", poll_seconds: float = NEVER_SECONDS) -> Side:
        store = await self.stack.enter_async_context(Store(url or self.url, SCRIPTS))
        side = Side(store, name, self.prefix, poll_seconds=poll_seconds)
        for work in (side.bell.run(), side.hub.run()):
            task = asyncio.create_task(work, name=name)
            self.stack.push_async_callback(_end, task)
        self.stack.push_async_callback(side.repairs.close)
        self.stack.push_async_callback(side.hub.close)
        return side

    async def begin(self, side: Side) -> None:
        start = Draft(RecordKind.TURN_START, b"start")
        result = await side.journal.begin(
            SESSION, TURN, token="token", new_epoch="aa", digest="d", overlap=Overlap.PARALLEL, path="/",
            by=By(), start=start, cancelled=start,
        )  # fmt: skip
        assert isinstance(result, Begun)
        self.fence, self.count = result.fence, 0
        side.hub.publish(SESSION, [Record(result.start, TURN, start)])

    async def append(self, side: Side, *words: str) -> int:
        """Journal and publish chunks on a node; returns the newest offset."""
        drafts = [Draft(RecordKind.CHUNK, word.encode()) for word in words]
        result = await side.journal.append(SESSION, TURN, self.fence, index=self.count, drafts=drafts)
        assert isinstance(result, Appended)
        self.count = result.count
        side.hub.publish(SESSION, ())
        return result.last

    def snapshot(self) -> dict[bytes, Any]:
        return {key: self.admin.dump(key) for key in self.admin.scan_iter(f"{self.prefix}*")}

    def restore(self, snapshot: dict[bytes, Any]) -> None:
        """What a failover does that loses the newest writes."""
        for key in self.admin.scan_iter(f"{self.prefix}*"):
            self.admin.delete(key)
        for key, value in snapshot.items():
            self.admin.restore(key, 60_000, value)

    def kill_bells(self) -> None:
        self.admin.execute_command("CLIENT", "KILL", "TYPE", "pubsub")


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def eventually(true: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not true():  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.005)


@asynccontextmanager
async def world_on(url: str) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(stack, url)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_valkey() as url:
        yield url


@pytest.fixture
async def world(url: str) -> AsyncIterator[World]:
    async with world_on(url) as world:
        yield world


# -- bells


async def test_what_one_node_journals_the_other_shows_at_once(world: World) -> None:
    """Any node, any session: the same records at the same offsets. No poll helps here."""
    one, two = await world.side("one"), await world.side("two")
    await world.begin(one)
    here, there = await one.reader(), await two.reader()
    await two.is_quiet()
    for number in range(20):
        last = await world.append(one, f"word {number}", "more")
        await asyncio.gather(here.read_until(last), there.read_until(last))
    assert here.records == there.records
    assert there.offsets == list(range(1, 42))


async def test_a_session_that_begins_elsewhere_is_shown_to_who_waits_for_it(world: World) -> None:
    """The second device has the chat open before the first message is sent."""
    one, two = await world.side("one"), await world.side("two")
    there = await two.reader()
    await two.is_quiet()
    await world.begin(one)
    await there.read_until(await world.append(one, "word"))
    assert there.offsets == [1, 2]


async def test_a_node_does_not_read_what_it_wrote(world: World) -> None:
    """Its own bells come back to it, thousands a second; the tail has the records already."""
    one, two = await world.side("one"), await world.side("two")
    await world.begin(one)
    here, there = await one.reader(), await two.reader()
    await asyncio.gather(one.is_quiet(), two.is_quiet(), here.read_until(1), there.read_until(1))
    reads = one.journal.reads
    drafts = [Draft(RecordKind.CHUNK, b"word")]
    for index in range(10):
        result = await one.journal.append(SESSION, TURN, world.fence, index=index, drafts=drafts)
        assert isinstance(result, Appended)
        one.hub.publish(SESSION, [Record(Cursor("aa", result.last, "", result.check), TURN, drafts[0])])
    await asyncio.gather(here.read_until(11), there.read_until(11))
    assert one.journal.reads == reads
    assert here.offsets == there.offsets


async def test_many_bells_during_one_read_are_one_more_read(world: World) -> None:
    """A node that is slow must not be made slower by what it has not read yet."""
    one, two = await world.side("one"), await world.side("two")
    await world.begin(one)
    there = await two.reader()
    await asyncio.gather(two.is_quiet(), there.read_until(1))
    reads = two.journal.reads
    last = await world.append(one, "word")
    for _ in range(100):
        two.hub.rung(SESSION)
    await there.read_until(last)
    await eventually(lambda: not two.hub._reader._tasks)
    assert two.journal.reads <= reads + 3


async def test_one_bell_for_more_than_a_tail_reads_at_once_is_enough(world: World) -> None:
    """A long answer that came while this node was busy: no further bell tells of its end."""
    one, two = await world.side("one"), await world.side("two")
    await world.begin(one)
    there = await two.reader()
    await asyncio.gather(two.is_quiet(), there.read_until(1))
    last = await world.append(one, *["x" * 1000] * 300)
    await there.read_until(last)
    assert there.offsets == list(range(1, 302))


async def test_bells_that_are_lost_with_their_connection_are_made_up_for(world: World) -> None:
    """FAULTS R22: whoever subscribes looks, so nothing waits for the next record. No poll helps here."""
    one, two = await world.side("one"), await world.side("two")
    await world.begin(one)
    there = await two.reader()
    last = 1
    for number in range(40):
        last = await world.append(one, f"word {number}")
        if number % 10 == 5:
            world.kill_bells()
    await there.read_until(last)
    world.kill_bells()
    last = await world.append(one, "the last word")
    await there.read_until(last)
    assert there.offsets == list(range(1, last + 1))


async def test_a_bell_that_is_lost_and_nobody_knows_costs_a_poll_and_no_record(
    world: World, url: str, tmp_path: Path
) -> None:
    """FAULTS R23: half-open, and the probe has not found out yet."""
    async with Link(url, tmp_path) as link:
        one = await world.side("one")
        two = await world.side("two", url=link.url, poll_seconds=0.2)
        silent = link.lose(b"SSUBSCRIBE")
        await world.begin(one)
        there = await two.reader()
        await silent.reached()
        for number in range(3):
            await there.read_until(await world.append(one, f"word {number}"))
        assert two.confirmed == 0
        assert there.offsets == [1, 2, 3, 4]
        there.subscriber.close()
        await world.stack.aclose()
        await eventually(lambda: not link._tasks)


async def test_a_session_in_which_a_turn_runs_is_looked_at_more_often(world: World) -> None:
    """Five thousand idle clients must not keep the store busy."""
    two = await world.side("two", poll_seconds=0.06)
    await world.begin(two)
    busy = await two.reader()
    await two.reader(session=SessionId("idle"))
    await asyncio.gather(two.is_quiet(), busy.read_until(1))
    asked = two.journal.asked
    of_busy, of_idle = asked[SESSION], asked[SessionId("idle")]
    await eventually(lambda: asked[SessionId("idle")] > of_idle)
    assert asked[SESSION] >= of_busy + 4


async def test_a_store_that_was_away_is_looked_at_for_every_session(world: World) -> None:
    """It may be another one now; bells of the time without it never rang."""
    one, two = await world.side("one"), await world.side("two")
    await world.begin(one)
    there = await two.reader()
    await asyncio.gather(two.is_quiet(), there.read_until(1))
    two.bell.on_records = lambda _: None
    last = await world.append(one, "word")
    two.hub.missed_all()
    await there.read_until(last)


async def test_nothing_is_left_of_thousands_that_were_attached(world: World) -> None:
    """G10: tails, watches, subscriptions and tasks follow who is attached."""
    two = await world.side("two")
    sessions = [SessionId(f"s{number}") for number in range(2000)]
    readers = [await two.reader(session=session) for session in sessions]
    await two.is_quiet()
    assert len(two.hub._tails) == len(two.bell._watches) == 2000
    for reader in readers:
        reader.subscriber.close()
    assert not two.hub._tails
    assert not two.bell._watches
    assert not two.bell._sessions
    command = ("PUBSUB", "SHARDCHANNELS", f"{world.prefix}:*")
    ask = world.admin.execute_command
    await eventually(lambda: len(ask(*command)) == 1)  # its own
    assert not two.hub._reader._tasks
    assert not two.hub._pages._readings


# -- histories


async def test_what_a_failover_lost_and_its_producer_wrote_again_is_no_loss(world: World) -> None:
    """The same records at the same offsets: whoever is attached only waits."""
    one, two = await world.side("one"), await world.side("two")
    await world.begin(one)
    there = await two.reader()
    early = world.snapshot()
    last = await world.append(one, "a", "b", "c")
    late = world.snapshot()
    await there.read_until(last)
    await two.is_quiet()
    world.restore(early)
    two.hub.missed_all()
    await eventually(lambda: there.subscriber.tail.in_doubt)
    assert not there.subscriber.has_more
    world.restore(late)
    await there.read_until(await world.append(one, "d"))
    assert there.offsets == [1, 2, 3, 4, 5]
    assert not there.subscriber.tail.in_doubt


async def test_what_a_failover_lost_and_nobody_wrote_again_is_told(world: World) -> None:
    """A new epoch, and every client begins anew; it is not for ever that one waits."""
    one, two = await world.side("one"), await world.side("two")
    await world.begin(one)
    there = await two.reader()
    early = world.snapshot()
    await there.read_until(await world.append(one, "a", "b", "c"))
    world.restore(early)
    two.hub.missed_all()
    assert await there.resynced() is ResyncReason.EPOCH_CHANGED
    assert there.offsets == [1, 2, 3, 4]
    there.subscriber.close()
    again = await two.reader(there.records[0].cursor)
    await again.read_until(1)
    assert again.records[0].cursor.epoch != "aa"


@pytest.mark.parametrize("forgotten", [False, True])
async def test_nobody_is_shown_other_records_at_offsets_that_were_shown(
    world: World, *, forgotten: bool
) -> None:
    """A node that had seen nothing of what was lost went on writing: one cursor, one content (G1)."""
    one, two = await world.side("one"), await world.side("two")
    await world.begin(one)
    there = await two.reader()
    early, count = world.snapshot(), world.count
    await there.read_until(await world.append(one, "a", "b", "c"))
    world.restore(early)
    world.count = count
    if forgotten:
        two.forget_what_was_seen()
    await world.append(await world.side("three"), "x", "y", "z", "and more")
    assert await there.resynced() is ResyncReason.EPOCH_CHANGED
    assert [record.draft.payload for record in there.records] == [b"start", b"a", b"b", b"c"]


async def test_who_reads_back_is_not_shown_another_history(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has fallen off the tail, so only the journal has what follows; and there others follow."""
    monkeypatch.setattr(tail_module, "TAIL_BYTES", 1000)
    one, two = await world.side("one"), await world.side("two")
    await world.begin(one)
    slow, fast = await two.reader(), await two.reader()
    early, count = world.snapshot(), world.count
    await slow.read_until(await world.append(one, "a", "b"))
    await fast.read_until(await world.append(one, *(f"word {number}" for number in range(20))))
    await eventually(lambda: slow.subscriber.tail.after(3) is None)
    two.bell.on_records = lambda _: None
    world.restore(early)
    world.count = count
    await world.append(await world.side("three"), *(f"other {number}" for number in range(40)))
    two.forget_what_was_seen()
    assert await slow.resynced() is ResyncReason.EPOCH_CHANGED
    assert slow.offsets == [1, 2, 3]
    assert await fast.resynced() is ResyncReason.EPOCH_CHANGED


async def test_who_alone_is_of_another_history_is_told_and_the_others_go_on(world: World) -> None:
    """It looked before the loss and was placed after it; to wait on would be to wait for ever."""
    one, two = await world.side("one"), await world.side("two")
    two.bell.on_missed = lambda _: None  # so that the tail begins where the other reader finds it
    await world.begin(one)
    early, count = world.snapshot(), world.count
    last = await world.append(one, "a", "b")
    lost = (await one.journal.read(SESSION, after=last - 1)).records[0].cursor
    stale = Reader(two)
    look = await stale.look(lost)
    world.restore(early)
    world.count = count
    third = await world.side("three")
    await world.append(third, "x", "y", "z")
    two.forget_what_was_seen()
    good = await two.reader()
    stale.place(look, lost)
    assert await stale.resynced() is ResyncReason.EPOCH_CHANGED
    assert not stale.records
    await good.read_until(await world.append(third, "more"))
    assert good.offsets == [1, 2, 3, 4, 5]


async def test_who_comes_from_another_history_is_not_shown_what_the_tail_has(world: World) -> None:
    """Its cursor is right by the journal as it is; this node still holds what was lost."""
    one, two = await world.side("one"), await world.side("two")
    await world.begin(one)
    old = await two.reader()
    early, count = world.snapshot(), world.count
    await old.read_until(await world.append(one, "a", "b", "c"))
    two.bell.on_records = lambda _: None
    world.restore(early)
    world.count = count
    third = await world.side("three")
    there = await third.reader()
    await there.read_until(await world.append(third, "x", "y"))
    new = await two.reader(there.records[1].cursor)
    try:
        await new.read_until(3)
    except Resync as resync:
        assert resync.reason is ResyncReason.EPOCH_CHANGED  # noqa: PT017 - it may have been served, and rightly
    assert [record.draft.payload for record in new.records] in ([], [b"y"])
    assert await old.resynced() is ResyncReason.EPOCH_CHANGED


async def test_a_session_that_is_gone_is_told_and_who_comes_then_is_not_in_its_way(world: World) -> None:
    """It expired, or the store was flushed: nobody can write it again."""
    one, two = await world.side("one"), await world.side("two")
    await world.begin(one)
    there = await two.reader()
    await there.read_until(1)
    world.restore({})
    early = await two.reader()
    assert await there.resynced() is ResyncReason.EPOCH_CHANGED
    there.subscriber.close()
    await world.begin(one)
    await early.read_until(await world.append(one, "word"))
    assert early.offsets == [1, 2]
