"""The hub on a real journal: everybody attached gets each record once, in order, or is told why not."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import redis
import uvloop
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gateway import doorbell, journal, store, subscriber, tailreader, telemetry
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
    next_check,
    turn_tag,
)
from gateway.doorbell import Doorbell
from gateway.hub import Hub, Resync, Subscriber
from gateway.journal import SessionJournal
from gateway.outcomes import Appended, Begun, Fence, Look, Page
from gateway.repairs import Repairs
from gateway.store import Store, lane
from tests.support.valkey import running_valkey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

SCRIPTS = (*journal.SCRIPTS, *doorbell.SCRIPTS)
SESSION, TURN, CARRIER = SessionId("chat"), TurnId("turn"), "websocket"
SMALL_TAIL_BYTES = 1000
"""Five of the records written here."""

REPAIR_SECONDS = 0.2
POLL_SECONDS = 0.3


class GatedJournal(SessionJournal):
    """The real journal; its answers to readers can be held back on their way."""

    def __init__(self, opened: Store, prefix: str) -> None:
        super().__init__(opened, node=NodeId("n"), prefix=prefix, ttl_seconds=60, window_seconds=60)
        self.gate = asyncio.Event()
        self.gate.set()
        self.held = asyncio.Event()
        self.only_tails = False
        self.reads = 0
        self.page_bytes = journal.PAGE_BYTES

    async def look(self, session: SessionId, *, offset: int = 0) -> Look:
        """As the base class."""
        look = await super().look(session, offset=offset)
        await self._pass()
        return look

    async def read(
        self, session: SessionId, *, after: int, check: str = "", limit_bytes: int = journal.PAGE_BYTES
    ) -> Page:
        """As the base class."""
        self.reads += 1
        limit = min(limit_bytes, self.page_bytes)
        page = await super().read(session, after=after, check=check, limit_bytes=limit)
        await self._pass()
        return page

    async def _pass(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self.only_tails and not task.get_name().startswith("tail-"):
            return
        self.held.set()
        await self.gate.wait()

    def hold(self, *, only_tails: bool = False) -> None:
        self.only_tails = only_tails
        self.gate.clear()
        self.held.clear()


class Reader:
    """One client: what it was given, in the order it came."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.woken = asyncio.Event()
        self.subscriber: Subscriber = chat.hub.subscribe(SESSION, self.woken.set, carrier=CARRIER)
        self.records: list[Record] = []
        self.look: Look | None = None

    @property
    def offsets(self) -> list[int]:
        return [record.offset for record in self.records]

    async def take_look(self, after: Cursor | None = None) -> None:
        self.look = await self.chat.journal.look(SESSION, offset=after.offset if after else 0)

    def place(self, after: Cursor | None = None) -> ResyncReason | None:
        look = self.look
        assert look is not None
        where = place(after, epoch=look.epoch, last=look.last, base=look.base, tag=look.tag, check=look.check)
        running = [turn.turn for turn in look.turns if turn.is_running]
        self.subscriber.place_at(where.cursor, last=look.last, last_check=look.last_check, running=running)
        return where.resync

    async def attach(self, after: Cursor | None = None) -> None:
        await self.take_look(after)
        self.place(after)

    async def pull(self) -> int:
        records = await self.subscriber.pull()
        self.records += records
        return len(records)

    async def read_until(self, offset: int) -> None:
        """As a carrier does: pull what there is, wait for the wake, pull again."""
        async with asyncio.timeout(5):
            while self.subscriber.offset < offset:
                self.woken.clear()
                await self.pull()
                if not self.subscriber.has_more and self.subscriber.offset < offset:
                    await self.woken.wait()

    async def resynced(self) -> ResyncReason:
        """Read until it cannot continue; returns why."""
        try:
            await self.read_until(1_000_000)
        except Resync as resync:
            return resync.reason
        raise AssertionError


class Chat:
    """A session with one running turn, written as a producer writes it."""

    def __init__(self, opened: Store, admin: redis.Redis) -> None:
        self.prefix = f"t{secrets.token_hex(4)}"
        self.journal = GatedJournal(opened, self.prefix)
        self.repairs = Repairs(self.journal, wait_seconds=REPAIR_SECONDS)
        self.doorbell = Doorbell(opened, prefix=self.prefix, node=NodeId("n"))
        self.hub = Hub(
            self.journal, doorbell=self.doorbell, repairs=self.repairs, max_lag_bytes=64 * 1024,
            poll_seconds=POLL_SECONDS,
        )  # fmt: skip
        self.admin = admin
        self.fence = Fence(0, "")
        self.count = 0
        self.last = 0

    async def begin(self, epoch: str = "aa", turn: TurnId = TURN) -> list[Record]:
        start = Draft(RecordKind.TURN_START, b"start")
        result = await self.journal.begin(
            SESSION, turn, token="token", new_epoch=epoch, digest="d",
            overlap=Overlap.PARALLEL, path="/", by=By(), start=start, cancelled=start,
        )  # fmt: skip
        assert isinstance(result, Begun)
        self.fence, self.count, self.last = result.fence, 0, result.start.offset
        return [Record(result.start, turn, start)]

    async def append(self, count: int = 1, size: int = 40, turn: TurnId = TURN) -> list[Record]:
        drafts = [Draft(RecordKind.CHUNK, b"%d " % (self.count + n) + b"x" * size) for n in range(count)]
        result = await self.journal.append(SESSION, turn, self.fence, index=self.count, drafts=drafts)
        assert isinstance(result, Appended)
        first = result.last - count + 1
        self.count, self.last = result.count, result.last
        check, records = result.before, []
        for number, draft in enumerate(drafts):
            check = next_check(check, turn, journal.stored_kind(draft), draft.payload)
            cursor = Cursor(result.epoch, first + number, turn_tag(turn), check)
            records.append(Record(cursor, turn, draft))
        assert check == result.check
        return records

    async def write(self, count: int = 1, size: int = 40) -> None:
        self.hub.publish(SESSION, await self.append(count, size))

    async def reader(self, after: Cursor | None = None) -> Reader:
        reader = Reader(self)
        await reader.attach(after)
        return reader

    def forget_everything(self) -> None:
        for key in self.admin.scan_iter(f"{self.prefix}*"):
            self.admin.delete(key)


@asynccontextmanager
async def chat_on(url: str) -> AsyncIterator[Chat]:
    with redis.Redis.from_url(url) as admin:
        async with Store(url, SCRIPTS) as opened:
            chat = Chat(opened, admin)
            yield chat
            await chat.hub.close()
            await chat.repairs.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_valkey() as url:
        yield url


@pytest.fixture
async def chat(url: str) -> AsyncIterator[Chat]:
    async with chat_on(url) as chat:
        yield chat


@pytest.fixture
def small_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail_module, "TAIL_BYTES", SMALL_TAIL_BYTES)


def attached() -> float:
    value = telemetry.registry.get_sample_value("gateway_attached_subscribers", {"carrier": CARRIER})
    assert value is not None
    return value


# -- once and in order


def lose(hub: Hub) -> None:
    """As when the journal is found to be another one."""
    tail = hub._tails.get(SESSION)
    if tail is not None:
        hub._lose(tail)


async def test_what_is_published_is_taken_at_once(chat: Chat) -> None:
    """The live path asks the journal nothing."""
    await chat.begin()
    reader = await chat.reader()
    await reader.read_until(1)
    reads = chat.journal.reads
    for number in range(5):
        await chat.write()
        assert reader.subscriber.has_more
        assert await reader.pull() == 1
        assert reader.records[-1].draft.payload.startswith(b"%d " % number)
    assert reader.offsets == [1, 2, 3, 4, 5, 6]
    assert chat.journal.reads == reads
    assert await reader.pull() == 0


async def test_records_are_encoded_once_for_all(chat: Chat) -> None:
    """Every client is given the same object, on which its line is kept."""
    await chat.begin()
    one, two = await chat.reader(), await chat.reader()
    await asyncio.gather(one.read_until(1), two.read_until(1))
    await chat.write(3)
    await asyncio.gather(one.read_until(4), two.read_until(4))
    assert all(left is right for left, right in zip(one.records[1:], two.records[1:], strict=True))


@pytest.mark.parametrize("when", ["before the look", "after the look"])
async def test_what_is_journalled_while_a_client_attaches_comes_once(chat: Chat, when: str) -> None:
    """Registered first and placed second: neither a gap nor a double (G2)."""
    await chat.begin()
    await chat.append(2)
    reader = Reader(chat)
    if when == "before the look":
        await chat.write(2)
        await reader.take_look()
    else:
        await reader.take_look()
        await chat.write(2)
    reader.place()
    await reader.read_until(5)
    await chat.write(1)
    await reader.read_until(6)
    assert reader.offsets == [1, 2, 3, 4, 5, 6]


async def test_a_look_that_is_ahead_of_what_was_published_is_read_to_its_end(chat: Chat) -> None:
    """It was told of a record; that its publication is still on the way must not hold it back."""
    await chat.begin()
    first = await chat.reader()
    await first.read_until(1)
    unpublished = await chat.append(3)
    late = await chat.reader(first.records[0].cursor)
    await late.read_until(4)
    assert late.offsets == [2, 3, 4]
    chat.hub.publish(SESSION, unpublished)
    await first.read_until(4)
    await chat.write(1)
    await asyncio.gather(late.read_until(5), first.read_until(5))
    assert late.offsets == [2, 3, 4, 5]
    assert first.offsets == [1, 2, 3, 4, 5]


async def test_what_is_published_twice_comes_once(chat: Chat) -> None:
    """A publication may follow a look that knew of it, or another of the same records."""
    await chat.begin()
    reader = await chat.reader()
    await reader.read_until(1)
    records = await chat.append(3)
    chat.hub.publish(SESSION, records[:2])
    chat.hub.publish(SESSION, records[:1])
    chat.hub.publish(SESSION, records)
    await reader.read_until(4)
    assert reader.offsets == [1, 2, 3, 4]


_STEPS = [
    "append", "append", "publish", "publish", "nothing", "drop", "ring", "hold", "release", "subscribe",
    "look", "place", "pull", "again",
]  # fmt: skip


async def _follow(chat: Chat, steps: list[str]) -> None:  # noqa: C901, PLR0912 - an arm for each step
    """Two readers, and a writer whose publications may be late, no more than a hint, or not come at all.

    What a tail reads can be held on its way, so that it comes after what was published since.
    """
    pending = [await chat.begin()]
    readers: list[Reader] = []
    for number, step in enumerate(steps):
        reader = readers[number % len(readers)] if readers else None
        match step:
            case "append":
                pending.append(await chat.append(1 + number % 3))
            case "publish" if pending:
                chat.hub.publish(SESSION, pending.pop(0))
            case "nothing" if pending:
                pending.pop(0)
                chat.hub.publish(SESSION, ())
            case "drop" if pending:
                pending.pop(0)  # another node journalled it; its bell is lost
            case "ring":
                chat.hub.rung(SESSION)
                await asyncio.sleep(0)
            case "hold":
                chat.journal.hold(only_tails=True)
            case "release":
                chat.journal.gate.set()
                await asyncio.sleep(0.001)
            case "subscribe" if len(readers) < 2:
                readers.append(Reader(chat))
            case "look" if reader is not None and not reader.records:
                await reader.take_look()
            case "place" if reader is not None and reader.look is not None and not reader.records:
                reader.place()
            case "again" if reader is not None and reader.records:
                last = reader.records[-1].cursor
                await reader.attach(last)
            case "pull" if reader is not None:
                await reader.pull()
            case _:
                pass
    chat.journal.gate.set()
    for records in pending:
        chat.hub.publish(SESSION, records)
    chat.hub.missed_all()  # as a poll does
    for reader in readers:
        if not reader.records:
            await reader.attach()
        await reader.read_until(chat.last)
        assert reader.offsets == list(range(1, chat.last + 1))
    for tail in chat.hub._tails.values():
        assert tail.size <= tail_module.TAIL_BYTES or len(tail.records) == 1
        assert tail.size == sum(record.size for record in tail.records)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.sampled_from(_STEPS), min_size=5, max_size=40))
@example(steps=["subscribe", "look", "append", "publish", "publish", "place", "pull", "append", "pull"])
@example(steps=["subscribe", "publish", "append", "append", "look", "place", "nothing", "pull", "append"])
@pytest.mark.usefixtures("small_tail")
def test_every_reader_gets_every_record_once(url: str, steps: list[str]) -> None:
    """Whatever comes between subscribing, looking, being placed, pulling and publishing (G2)."""

    async def run() -> None:
        async with chat_on(url) as chat:
            await _follow(chat, steps)

    uvloop.run(run())


# -- the tail, and falling off it


@pytest.mark.usefixtures("small_tail")
async def test_who_falls_off_the_tail_reads_the_journal(chat: Chat) -> None:
    """G8: a slow client gets bigger batches and costs nobody anything."""
    await chat.begin()
    slow, fast = await chat.reader(), await chat.reader()
    for _ in range(50):
        await chat.write()
        await fast.read_until(chat.last)
        [tail] = chat.hub._tails.values()
        assert tail.size <= SMALL_TAIL_BYTES
    await slow.read_until(51)
    assert slow.offsets == fast.offsets == list(range(1, 52))
    await chat.write()
    await slow.read_until(52)
    assert slow.offsets == list(range(1, 53))


async def test_a_page_is_read_once_for_all_who_join_together(chat: Chat) -> None:
    """A class of two hundred opens the chat; the store hears of it a few times, not two hundred."""
    await chat.begin()
    await chat.append(20)
    readers = [await chat.reader() for _ in range(50)]
    await asyncio.gather(*(reader.pull() for reader in readers))
    assert chat.journal.reads == 1
    assert {tuple(reader.offsets) for reader in readers} == {tuple(range(1, 22))}


async def test_who_leaves_while_a_page_is_read_does_not_take_it_from_the_others(chat: Chat) -> None:
    """The read is shared; its first asker is nobody special."""
    await chat.begin()
    leaving, staying = await chat.reader(), await chat.reader()
    chat.journal.hold()
    asked = [asyncio.create_task(reader.pull()) for reader in (leaving, staying)]
    await chat.journal.held.wait()
    asked[0].cancel()
    chat.journal.gate.set()
    async with asyncio.timeout(5):
        assert await asked[1] == 1
    assert chat.journal.reads == 1


@pytest.mark.usefixtures("small_tail")
async def test_who_stays_behind_by_the_same_is_not_falling_behind(chat: Chat) -> None:
    """A client whose line is just fast enough reads the journal for the whole turn."""
    chat.journal.page_bytes = 20_000
    await chat.begin()
    reader = await chat.reader()
    for _ in range(10):
        await chat.write(20, 1000)
        assert await reader.pull()
        assert reader.subscriber.has_more
    assert chat.last * 1000 > chat.hub.max_lag_bytes * 2
    await reader.read_until(chat.last)
    assert reader.offsets == list(range(1, chat.last + 1))


@pytest.mark.usefixtures("small_tail")
async def test_a_record_larger_than_the_tail_comes_all_the_same(chat: Chat) -> None:
    """The bound gives way to one record, never to more."""
    await chat.begin()
    reader = await chat.reader()
    for size in (5000, 40, 6000, 7000, 40):
        await chat.write(1, size)
        [tail] = chat.hub._tails.values()
        assert tail.size <= SMALL_TAIL_BYTES or len(tail.records) == 1
    await reader.read_until(6)
    assert reader.offsets == [1, 2, 3, 4, 5, 6]


async def test_a_gap_in_what_is_published_is_read_from_the_journal(chat: Chat) -> None:
    """Another node, or a call of unknown fate, journalled what was not shown here."""
    await chat.begin()
    reader = await chat.reader()
    await chat.write(1)
    await reader.read_until(2)
    await chat.append(2)
    await chat.write(1)
    await reader.read_until(5)
    await chat.append(2)
    chat.hub.publish(SESSION, ())
    await reader.read_until(7)
    assert reader.offsets == [1, 2, 3, 4, 5, 6, 7]


async def test_a_hint_during_a_look_is_looked_after_again(chat: Chat) -> None:
    """The look on its way may be older than the hint; the last record of a turn has none after it."""
    await chat.begin()
    reader = await chat.reader()
    await reader.read_until(1)
    chat.journal.hold()
    chat.hub.publish(SESSION, ())
    await chat.journal.held.wait()
    await chat.append(1)
    chat.hub.publish(SESSION, ())
    chat.journal.gate.set()
    await reader.read_until(2)
    assert reader.offsets == [1, 2]
    async with asyncio.timeout(5):
        while chat.hub._reader._tasks:  # noqa: ASYNC110 - and then nobody asks any more
            await asyncio.sleep(0)


async def test_a_look_for_a_tail_that_is_gone_does_not_stand_before_the_next(chat: Chat) -> None:
    """Everybody detached and somebody attached again while a look was on its way."""
    await chat.begin()
    first = await chat.reader()
    chat.journal.hold()
    chat.hub.publish(SESSION, ())
    await chat.journal.held.wait()
    first.subscriber.close()
    second = Reader(chat)
    second.look = await SessionJournal.look(chat.journal, SESSION)
    second.place()
    chat.journal.gate.set()
    chat.journal.held.clear()
    await second.read_until(1)
    await chat.append(1)
    chat.hub.publish(SESSION, ())
    await second.read_until(2)
    assert second.offsets == [1, 2]


async def test_a_client_placed_elsewhere_during_a_read_gets_nothing_of_the_old_place(chat: Chat) -> None:
    """A second attach moves the place; what was being read for the first would be out of order."""
    await chat.begin()
    await chat.append(5)
    reader = await chat.reader()
    chat.journal.hold()
    pull = asyncio.create_task(reader.pull(), name="pull")
    await chat.journal.held.wait()
    reader.look = await SessionJournal.look(chat.journal, SESSION, offset=4)
    reader.place(Cursor("aa", 4, turn_tag(TURN)))
    chat.journal.gate.set()
    assert await pull == 0
    await reader.read_until(6)
    assert reader.offsets == [5, 6]


async def test_a_client_can_go_back(chat: Chat) -> None:
    """An attach with an older cursor gives the same records again."""
    await chat.begin()
    await chat.append(3)
    reader = await chat.reader()
    await reader.read_until(4)
    first, reader.records = reader.records, []
    await reader.attach(first[1].cursor)
    await reader.read_until(4)
    assert reader.records == first[2:]


@pytest.mark.usefixtures("small_tail")
async def test_a_reader_waits_while_the_store_is_away(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has nothing to pull until it is woken: a carrier that asked at once again would ask in a circle."""
    monkeypatch.setattr(lane, "OPERATION_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(subscriber, "READ_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(tailreader, "RETRY_SECONDS", 0.05)
    await chat.begin()
    reader = await chat.reader()
    for _ in range(20):
        await chat.write()
    process = int(chat.admin.info("server")["process_id"])
    os.kill(process, signal.SIGSTOP)
    try:
        reader.woken.clear()
        assert await reader.pull() == 0
        assert not reader.subscriber.has_more
        async with asyncio.timeout(5):
            await reader.woken.wait()
        assert reader.subscriber.has_more
        assert await reader.pull() == 0
    finally:
        os.kill(process, signal.SIGCONT)
    await reader.read_until(21)
    assert reader.offsets == list(range(1, 22))


@pytest.mark.usefixtures("small_tail")
async def test_a_hint_while_the_store_is_away_is_not_forgotten(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look is repeated until it is answered."""
    monkeypatch.setattr(lane, "OPERATION_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(subscriber, "READ_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(tailreader, "RETRY_SECONDS", 0.05)
    await chat.begin()
    reader = await chat.reader()
    await reader.read_until(1)
    await chat.append(1)
    process = int(chat.admin.info("server")["process_id"])
    os.kill(process, signal.SIGSTOP)
    try:
        chat.hub.publish(SESSION, ())
        probe = chat.journal._store.reads.call(journal._TURN, ("{x}",), ())
        with pytest.raises(store.StoreUnavailable):
            await probe
    finally:
        os.kill(process, signal.SIGCONT)
    await reader.read_until(2)
    assert reader.offsets == [1, 2]


# -- sessions that begin, and are lost


async def test_a_client_that_came_before_the_session_gets_its_first_record(chat: Chat) -> None:
    """An observer opens a chat that nobody has sent anything to."""
    early, other = await chat.reader(), Reader(chat)
    assert not early.subscriber.has_more
    await other.take_look()
    chat.hub.publish(SESSION, await chat.begin())
    other.place()
    await chat.write(2)
    await early.read_until(3)
    await other.read_until(3)
    assert early.offsets == other.offsets == [1, 2, 3]


async def test_a_client_that_comes_with_the_first_send_does_not_disturb_who_came_before(chat: Chat) -> None:
    """The look of the second knows the session before its first record is published."""
    early = await chat.reader()
    early.woken.clear()
    unpublished = await chat.begin()
    late = await chat.reader()
    assert early.woken.is_set()
    await late.read_until(1)
    chat.hub.publish(SESSION, unpublished)
    await early.read_until(1)
    await chat.write(1)
    await asyncio.gather(early.read_until(2), late.read_until(2))
    assert early.offsets == late.offsets == [1, 2]


async def test_a_look_from_before_the_session_does_not_end_it(chat: Chat) -> None:
    """The session began, and its first record was published, while a look was on its way back."""
    reader = await chat.reader()
    chat.journal.hold()
    chat.hub.publish(SESSION, ())
    await chat.journal.held.wait()
    chat.hub.publish(SESSION, await chat.begin())
    chat.journal.gate.set()
    await chat.write(1)
    await reader.read_until(2)
    async with asyncio.timeout(5):
        while chat.hub._reader._tasks:  # noqa: ASYNC110 - no event is set by it
            await asyncio.sleep(0)
    await chat.write(1)
    await reader.read_until(3)
    assert reader.offsets == [1, 2, 3]


async def test_a_new_epoch_is_told(chat: Chat) -> None:
    """What follows is another history: never a silently different one."""
    await chat.begin("aa")
    reader = await chat.reader()
    await reader.read_until(1)
    chat.forget_everything()
    chat.hub.publish(SESSION, await chat.begin("bb"))
    assert await reader.resynced() is ResyncReason.EPOCH_CHANGED
    assert reader.offsets == [1]
    reader.subscriber.close()
    again = await chat.reader()
    await chat.write(1)
    await again.read_until(2)
    assert [record.cursor.epoch for record in again.records] == ["bb", "bb"]


async def test_who_attaches_after_a_loss_that_nobody_saw_is_not_shown_what_was_lost(chat: Chat) -> None:
    """G1: this node's memory still holds the old records, but the journal does not."""
    await chat.begin("aa")
    old = await chat.reader()
    await chat.write(3)
    await old.read_until(4)
    chat.forget_everything()
    new = await chat.reader()
    assert not new.subscriber.has_more
    assert await old.resynced() is ResyncReason.EPOCH_CHANGED
    old.subscriber.close()
    chat.hub.publish(SESSION, await chat.begin("bb"))
    await chat.write(1)
    await new.read_until(2)
    assert [record.cursor.epoch for record in new.records] == ["bb", "bb"]


async def test_who_attaches_to_a_new_epoch_gets_it_while_the_others_are_told(chat: Chat) -> None:
    """The sender of the first turn after a loss must not lose its own answer to the news of it."""
    await chat.begin("aa")
    old = await chat.reader()
    await chat.write(3)
    await old.read_until(4)
    chat.forget_everything()
    unpublished = await chat.begin("bb")
    new = await chat.reader()
    chat.hub.publish(SESSION, unpublished)
    await chat.write(2)
    await new.read_until(3)
    assert [record.cursor.epoch for record in new.records] == ["bb"] * 3
    assert await old.resynced() is ResyncReason.EPOCH_CHANGED
    assert old.offsets == [1, 2, 3, 4]


async def test_what_is_published_while_a_client_moves_to_a_new_tail_is_not_lost(chat: Chat) -> None:
    """It went to the old one, whose journal is gone, and may be the last of the turn."""
    await chat.begin("aa")
    old = await chat.reader()
    await chat.write(1)
    await old.read_until(2)
    chat.forget_everything()
    [start] = await chat.begin("bb")
    new = Reader(chat)
    await new.take_look(start.cursor)
    chat.hub.publish(SESSION, await chat.append(1))
    new.place(start.cursor)
    await new.read_until(2)
    assert [str(record.cursor)[:4] for record in new.records] == ["bb.2"]


async def test_a_lost_journal_is_told_to_everybody_at_once(chat: Chat) -> None:
    """The producer that hears `Lost` knows it first."""
    await chat.begin()
    readers = [await chat.reader() for _ in range(3)]
    lose(chat.hub)
    lose(chat.hub)
    for reader in readers:
        assert reader.woken.is_set()
        assert await reader.resynced() is ResyncReason.EPOCH_CHANGED
    again = await chat.reader()
    await again.read_until(1)
    assert again.offsets == [1]


async def test_a_journal_that_went_back_is_told(chat: Chat) -> None:
    """Records that were shown are gone from it: to wait for them would be to wait for ever."""
    await chat.begin()
    reader = await chat.reader()
    await reader.read_until(1)
    records = await chat.append(4)
    key = chat.journal._keys(SESSION)
    chat.admin.xtrim(key.journal, maxlen=0)
    chat.admin.hset(key.meta, mapping={"last": 1, "base": 2})
    chat.hub.publish(SESSION, records[2:])
    chat.hub.publish(SESSION, records)
    [tail] = chat.hub._tails.values()
    tail.skip_to(5, "aa")
    assert await reader.resynced() is ResyncReason.EPOCH_CHANGED


async def test_a_place_before_the_first_record_kept_is_told(chat: Chat) -> None:
    """Trimmed while the client was behind: a part is never given for the whole."""
    await chat.begin()
    reader = await chat.reader()
    await chat.append(3)
    key = chat.journal._keys(SESSION)
    chat.admin.xtrim(key.journal, minid="3-0", approximate=False)
    chat.admin.hset(key.meta, "base", 3)
    assert await reader.resynced() is ResyncReason.TRIMMED
    assert reader.offsets == []


async def test_who_is_too_far_behind_is_told(chat: Chat) -> None:
    """G10: GATEWAY_MAX_LAG bounds what a client can make the journal send again."""
    await chat.begin()
    slow, fast = await chat.reader(), await chat.reader()
    while chat.last * 1100 < chat.hub.max_lag_bytes * 1.2:
        await chat.write(1, 1000)
        await fast.read_until(chat.last)
    assert await slow.resynced() is ResyncReason.TOO_FAR_BEHIND
    assert slow.offsets == []
    await chat.write(1)
    await fast.read_until(chat.last)


async def test_who_reads_on_is_never_too_far_behind(chat: Chat) -> None:
    """The lag is what is unread, not what was ever written; an old history is no lag."""
    await chat.begin()
    await chat.append(90, 1000)
    reader = await chat.reader()
    for _ in range(8):
        await chat.write(20, 1000)
        await chat.write(20, 1000)
        await reader.pull()
    await reader.read_until(chat.last)
    assert reader.offsets == list(range(1, chat.last + 1))


# -- what is kept


async def test_nothing_is_kept_for_a_session_without_subscribers(chat: Chat) -> None:
    """G10: a node's memory follows those attached, not the sessions it ever saw."""
    chat.hub.publish(SESSION, await chat.begin())
    assert not chat.hub._tails
    before = attached()
    readers = [await chat.reader() for _ in range(3)]
    assert attached() == before + 3
    await chat.write(1)
    for reader in readers:
        assert chat.hub._tails
        reader.subscriber.close()
        reader.subscriber.close()
    assert not chat.hub._tails
    assert attached() == before
    chat.hub.publish(SESSION, ())
    assert not chat.hub._reader._tasks


async def test_a_subscriber_that_was_moved_is_counted_once(chat: Chat) -> None:
    """The gauge returns to what it was also when the journal was lost in between."""
    before = attached()
    await chat.begin("aa")
    old = await chat.reader()
    await chat.write(1)
    await old.read_until(2)
    chat.forget_everything()
    new = await chat.reader()
    lose(chat.hub)
    assert await old.resynced() is ResyncReason.EPOCH_CHANGED
    assert await new.pull() == 0
    assert attached() == before + 2
    for reader in (old, new):
        reader.subscriber.close()
    assert attached() == before
    assert not chat.hub._tails
    assert not chat.doorbell._watches


async def test_a_client_that_left_while_it_was_placed_is_not_kept(chat: Chat) -> None:
    """Detached while its look was on the way, and the journal lost meanwhile."""
    before = attached()
    await chat.begin()
    reader = await chat.reader()
    await reader.take_look()
    lose(chat.hub)
    reader.subscriber.close()
    reader.place()
    assert not chat.hub._tails
    assert attached() == before


async def test_closing_the_hub_ends_what_it_runs(chat: Chat) -> None:
    """A look that hangs must not outlive the node."""
    await chat.begin()
    await chat.reader()
    chat.journal.hold()
    chat.hub.publish(SESSION, ())
    [task] = chat.hub._reader._tasks.values()
    await chat.hub.close()
    assert task.done()
    assert not chat.hub._reader._tasks
