"""The journal against a real server: what it stores, refuses, forgets, and never lets two write."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import redis
import uvloop
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gateway import journal, lease, outcomes
from gateway import seen as seen_module
from gateway.core.model import (
    By,
    Cursor,
    Draft,
    NodeId,
    Overlap,
    RecordKind,
    SessionId,
    TurnId,
    next_check,
    turn_tag,
)
from gateway.journal import SessionJournal, stored_kind
from gateway.keys import session_keys
from gateway.outcomes import (
    Appended,
    AppendResult,
    BeginResult,
    Begun,
    BegunCancelled,
    Behind,
    Busy,
    Cancelling,
    CancelMark,
    Conflict,
    Duplicate,
    Ended,
    Fence,
    Fenced,
    Lost,
    NotYet,
    Rewound,
    Seen,
)
from gateway.store import Store, StoreUnavailable
from tests.support.snapshot import Snapshot, take_snapshot
from tests.support.valkey import running_cluster_valkey, running_valkey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

SCRIPTS = (*journal.SCRIPTS, *lease.SCRIPTS)
SESSION = SessionId("chat-1")
NODE, OTHER_NODE = NodeId("node-a"), NodeId("node-b")
HOSTILE = ("{x}", "a{}b", "a/../b", "..%2f", "a b", "a\0b", "}{", "*", "ü\u202e🙂", "x" * 512)


def chunk(text: str) -> Draft:
    return Draft(RecordKind.CHUNK, text.encode())


def chunks(first: int, past: int) -> list[Draft]:
    return [chunk(f"c{number}") for number in range(first, past)]


def told(result: AppendResult) -> tuple[str, int, int, str]:
    """What an append says of the journal, without the checks."""
    assert isinstance(result, Appended)
    return result.epoch, result.last, result.count, result.state


def unchecked(cursor: Cursor) -> Cursor:
    """A place without its check, where that does not matter."""
    return Cursor(cursor.epoch, cursor.offset, cursor.tag)


def chained(records: Sequence[tuple[str, Draft]], check: str = "") -> list[str]:
    """The checks of records, one after the other, as Python makes them."""
    checks = []
    for turn, draft in records:
        check = next_check(check, TurnId(turn), stored_kind(draft), draft.payload)
        checks.append(check)
    return checks


def turn_end(reason: str) -> Draft:
    return Draft(RecordKind.TURN_END, reason.encode(), ai_sdk=True, done=True)


@dataclass
class Bench:
    """A journal, the server below it, and the shortest way to say a verb."""

    journal: SessionJournal
    store: Store
    admin: redis.Redis
    prefix: str
    fences: dict[TurnId, Fence] = field(default_factory=dict)
    others: dict[NodeId, SessionJournal] = field(default_factory=dict)

    def of(self, node: NodeId) -> SessionJournal:
        """The journal as a node has it: what another has seen it has not."""
        if node == NODE:
            return self.journal
        if node not in self.others:
            self.others[node] = SessionJournal(
                self.store, node=node, prefix=self.prefix, ttl_seconds=60, window_seconds=60
            )
        return self.others[node]

    async def begin(
        self,
        turn: str = "t1",
        *,
        session: SessionId = SESSION,
        overlap: Overlap = Overlap.PARALLEL,
        digest: str = "d",
        node: NodeId = NODE,
        user: str = "",
        epoch: str | None = None,
    ) -> BeginResult:
        name = TurnId(turn)
        result = await self.of(node).begin(
            session,
            name,
            token=secrets.token_hex(4),
            new_epoch=epoch or secrets.token_hex(8),
            digest=digest,
            overlap=overlap,
            path="/api/chat",
            by=By(user=user),
            start=Draft(RecordKind.TURN_START, f"start {turn}".encode()),
            cancelled=turn_end("cancelled"),
        )
        if isinstance(result, Begun):
            self.fences[name] = result.fence
        return result

    async def append(
        self, turn: str, index: int, drafts: Sequence[Draft], *, fence: Fence | None = None
    ) -> AppendResult:
        name = TurnId(turn)
        fence = fence or self.fences[name]
        return await self.journal.append(SESSION, name, fence, index=index, drafts=drafts)

    async def end(
        self, turn: str, index: int, reason: str = "complete", *, fence: Fence | None = None
    ) -> AppendResult:
        name = TurnId(turn)
        fence = fence or self.fences[name]
        return await self.journal.end(
            SESSION, name, fence, index=index, reason=reason, drafts=[turn_end(reason)]
        )

    async def seal(self, turn: str, node: NodeId = NODE) -> AppendResult:
        return await self.journal.seal(
            SESSION, TurnId(turn), node=node, reason="interrupted", end=turn_end("interrupted")
        )

    async def cancel(self, turn: str, *, user: str = "") -> CancelMark:
        return await self.journal.cancel(SESSION, TurnId(turn), by=By(user=user))

    async def payloads(self, session: SessionId = SESSION) -> list[str]:
        """Everything, read in small pages; and the offsets are 1, 2, 3 ..."""
        found: list[str] = []
        while True:
            page = await self.journal.read(session, after=len(found), limit_bytes=400)
            assert [record.offset for record in page.records] == list(
                range(len(found) + 1, len(found) + 1 + len(page.records))
            )
            found += [record.draft.payload.decode() for record in page.records]
            if not page.records:
                assert page.last == len(found)
                return found

    async def trim(self, window_ms: int, session: SessionId = SESSION) -> Any:
        keys = self.journal._keys(session)
        return await self.store.writes.call(
            journal._TRIM, (keys.meta, keys.journal, keys.turns), (window_ms,)
        )

    async def passed(self, milliseconds: int) -> None:
        """Wait until the server's clock has gone on, whatever ours says."""

        def now() -> int:
            seconds, micros = self.admin.time()
            return int(seconds) * 1000 + int(micros) // 1000

        target = now() + milliseconds
        async with asyncio.timeout(5):
            while now() < target:  # noqa: ASYNC110 - the server's clock sets no event
                await asyncio.sleep(0.001)

    def snapshot(self) -> Snapshot:
        """The session as a replica has it that hears nothing more; its ``restore`` is the failover to it."""
        return take_snapshot(self.admin, self.journal._keys(SESSION).prefix)

    def key(self, name: str) -> str:
        return str(getattr(self.journal._keys(SESSION), name))

    def stored_keys(self) -> list[str]:
        return [key.decode() for key in self.admin.scan_iter(f"{self.prefix}*")]


@asynccontextmanager
async def bench_on(url: str, *, ttl: float = 60.0, window: float = 60.0) -> AsyncIterator[Bench]:
    prefix = f"t{secrets.token_hex(4)}"
    with redis.Redis.from_url(url) as admin:
        async with Store(url, SCRIPTS) as store:
            yield Bench(
                SessionJournal(store, node=NODE, prefix=prefix, ttl_seconds=ttl, window_seconds=window),
                store,
                admin,
                prefix,
            )


@pytest.fixture(scope="module", params=["plain", "cluster"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both kinds: on the second a script that touches two slots fails."""
    with (running_valkey if request.param == "plain" else running_cluster_valkey)() as url:
        yield url


@pytest.fixture
async def bench(url: str) -> AsyncIterator[Bench]:
    async with bench_on(url) as bench:
        yield bench


# -- begin


async def test_the_first_send_makes_the_journal(bench: Bench) -> None:
    """Offset 1 is the start, and the epoch is the one that was brought along."""
    result = await bench.begin("t1", epoch="ab12")
    assert isinstance(result, Begun)
    [check] = chained([("t1", Draft(RecordKind.TURN_START, b"start t1"))])
    assert result.start == Cursor("ab12", 1, turn_tag(TurnId("t1")), check)
    assert result.waits_for == ()
    page = await bench.journal.read(SESSION, after=0)
    assert (page.epoch, page.last, page.base) == ("ab12", 1, 1)
    assert page.records[0].draft == Draft(RecordKind.TURN_START, b"start t1")


async def test_later_sends_keep_the_epoch_and_get_a_higher_fence(bench: Bench) -> None:
    """An epoch is of the journal, not of a turn; a fence number is never given out twice."""
    first = await bench.begin("t1", epoch="ab12")
    second = await bench.begin("t2", epoch="cd34")
    assert isinstance(first, Begun)
    assert isinstance(second, Begun)
    assert unchecked(second.start) == Cursor("ab12", 2, turn_tag(TurnId("t2")))
    assert second.fence.number > first.fence.number


async def test_a_turn_id_begins_once(bench: Bench) -> None:
    """G3: a repeated send is told where the turn stands and starts nothing."""
    begun = await bench.begin("t1")
    assert isinstance(begun, Begun)
    assert await bench.begin("t1") == Duplicate(unchecked(begun.start), "running")
    await bench.append("t1", 0, chunks(0, 2))
    await bench.end("t1", 2)
    assert await bench.begin("t1") == Duplicate(unchecked(begun.start), "complete")
    assert await bench.payloads() == ["start t1", "c0", "c1", "complete"]


async def test_twenty_sends_at_once_begin_one_turn(bench: Bench) -> None:
    """G3 again: the backend is called once, whoever comes first."""
    results = await asyncio.gather(*(bench.begin("t1", node=NodeId(f"n{n}")) for n in range(20)))
    assert sum(isinstance(result, Begun) for result in results) == 1
    assert sum(isinstance(result, Duplicate) for result in results) == 19
    assert await bench.payloads() == ["start t1"]


async def test_another_body_for_the_same_turn_is_a_conflict(bench: Bench) -> None:
    """Two questions must not share one answer, running or ended."""
    await bench.begin("t1", digest="one")
    assert await bench.begin("t1", digest="two") == Conflict()
    await bench.end("t1", 0)
    assert await bench.begin("t1", digest="two") == Conflict()


async def test_reject_is_busy_only_while_a_turn_runs(bench: Bench) -> None:
    """`overlap: reject` looks at running turns, not at ended ones, and writes nothing when it refuses."""
    await bench.begin("t1")
    assert await bench.begin("t2", overlap=Overlap.REJECT) == Busy()
    assert await bench.payloads() == ["start t1"]
    await bench.end("t1", 0)
    assert isinstance(await bench.begin("t2", overlap=Overlap.REJECT), Begun)


async def test_interrupt_cancels_the_others_and_waits_in_the_queue(bench: Bench) -> None:
    """Steering: the old turns are marked in the same step, so that no other send comes between."""
    await bench.begin("t1")
    await bench.begin("t2")
    begun = await bench.begin("t3", overlap=Overlap.INTERRUPT)
    assert isinstance(begun, Begun)
    assert set(begun.waits_for) == {"t1", "t2"}
    look = await bench.journal.look(SESSION)
    assert {turn.turn: turn.state for turn in look.turns} == {
        "t1": "cancelling", "t2": "cancelling", "t3": "queued",
    }  # fmt: skip
    appended = await bench.append("t1", 0, chunks(0, 1))
    assert isinstance(appended, Appended)
    assert appended.state == "cancelling"
    assert await bench.journal.start(SESSION, TurnId("t3"), bench.fences[TurnId("t3")])
    known = await bench.journal.turn(SESSION, TurnId("t3"))
    assert known is not None
    assert known.state == "running"


async def test_interrupt_with_nothing_to_interrupt_runs_at_once(bench: Bench) -> None:
    """A turn that waits for nobody must not stand in the queue."""
    begun = await bench.begin("t1", overlap=Overlap.INTERRUPT)
    assert isinstance(begun, Begun)
    assert begun.waits_for == ()
    known = await bench.journal.turn(SESSION, TurnId("t1"))
    assert known is not None
    assert known.state == "running"


async def test_a_queued_turn_that_was_cancelled_does_not_start(bench: Bench) -> None:
    """Neither it nor one whose fence is another's goes to the backend."""
    await bench.begin("t1")
    await bench.begin("t2", overlap=Overlap.INTERRUPT)
    assert not await bench.journal.start(SESSION, TurnId("t2"), Fence(2, "not it"))
    assert isinstance(await bench.cancel("t2"), Cancelling)
    assert not await bench.journal.start(SESSION, TurnId("t2"), bench.fences[TurnId("t2")])


async def test_a_cancel_before_its_send_ends_it_at_birth(bench: Bench) -> None:
    """Stop pressed while the send is on its way: both records are journalled, the backend never hears."""
    assert await bench.cancel("t1", user="ann") == NotYet()
    result = await bench.begin("t1", user="ann")
    assert isinstance(result, BegunCancelled)
    assert result.start.offset == 1
    page = await bench.journal.read(SESSION, after=0)
    assert [record.kind for record in page.records] == [RecordKind.TURN_START, RecordKind.TURN_END]
    assert page.records[1].draft == turn_end("cancelled")
    assert page.last == 2
    assert await bench.begin("t1", user="ann") == Duplicate(result.start, "cancelled")
    look = await bench.journal.look(SESSION)
    assert [(turn.turn, turn.state) for turn in look.turns] == [("t1", "cancelled")]
    assert await bench.begin("t2", overlap=Overlap.REJECT, user="ann") != Busy()


async def test_a_cancel_before_its_send_is_of_one_user_and_one_minute(bench: Bench) -> None:
    """Nobody stops another's turn by guessing its id, and a forgotten wish does not wait for ever."""
    assert await bench.cancel("t1", user="eve") == NotYet()
    [tombstone] = [key for key in bench.stored_keys() if "tombstone" in key]
    assert 55_000 < bench.admin.pttl(tombstone) <= 60_000
    assert isinstance(await bench.begin("t1", user="ann"), Begun)


async def test_a_cancel_before_its_send_beats_overlap(bench: Bench) -> None:
    """A send that is cancelled already neither is refused as busy nor interrupts anybody."""
    await bench.begin("t1")
    await bench.cancel("t2")
    await bench.cancel("t3")
    assert isinstance(await bench.begin("t2", overlap=Overlap.REJECT), BegunCancelled)
    assert isinstance(await bench.begin("t3", overlap=Overlap.INTERRUPT), BegunCancelled)
    known = await bench.journal.turn(SESSION, TurnId("t1"))
    assert known is not None
    assert known.state == "running"


# -- append


async def test_an_append_returns_where_its_records_are(bench: Bench) -> None:
    """Two turns share one journal: offsets are dense over both, counts are each turn's own."""
    await bench.begin("t1", epoch="ab")
    await bench.begin("t2")
    assert told(await bench.append("t1", 0, chunks(0, 2))) == ("ab", 4, 2, "running")
    assert told(await bench.append("t2", 0, chunks(10, 13))) == ("ab", 7, 3, "running")
    assert told(await bench.append("t1", 2, chunks(2, 3))) == ("ab", 8, 3, "running")
    assert await bench.payloads() == ["start t1", "start t2", "c0", "c1", "c10", "c11", "c12", "c2"]


async def test_a_repeated_append_adds_nothing(bench: Bench) -> None:
    """The answer to it may have been lost: a retry is safe, and the next append goes on."""
    await bench.begin("t1", epoch="ab")
    for _ in range(3):
        assert told(await bench.append("t1", 0, chunks(0, 3))) == ("ab", 4, 3, "running")
    assert told(await bench.append("t1", 0, chunks(0, 1))) == ("ab", 4, 3, "running")
    assert told(await bench.append("t1", 3, chunks(3, 4))) == ("ab", 5, 4, "running")
    assert await bench.payloads() == ["start t1", "c0", "c1", "c2", "c3"]


async def test_an_append_that_overlaps_adds_what_is_new(bench: Bench) -> None:
    """A retry may carry more than the lost call did."""
    await bench.begin("t1")
    await bench.append("t1", 0, chunks(0, 3))
    result = await bench.append("t1", 1, chunks(1, 6))
    assert isinstance(result, Appended)
    assert result.count == 6
    assert await bench.payloads() == ["start t1", *(f"c{n}" for n in range(6))]


async def test_an_append_that_skips_is_asked_from_where_to_go_on(bench: Bench) -> None:
    """After a lossy failover the producer writes again what the journal has not."""
    await bench.begin("t1", epoch="ab")
    await bench.append("t1", 0, chunks(0, 2))
    assert await bench.append("t1", 3, chunks(3, 5)) == Behind("ab", 3, 2)
    assert await bench.append("t1", 3, ()) == Behind("ab", 3, 2)
    assert await bench.end("t1", 5) == Behind("ab", 3, 2)
    assert await bench.payloads() == ["start t1", "c0", "c1"]


async def test_only_the_holder_of_the_fence_writes(bench: Bench) -> None:
    """G6: neither an older number nor, since a failover may give a number out twice, another token."""
    await bench.begin("t1")
    fence = bench.fences[TurnId("t1")]
    for wrong in (
        Fence(fence.number - 1, fence.token),
        Fence(fence.number + 1, fence.token),
        Fence(fence.number, "another"),
        Fence(fence.number, ""),
    ):
        assert await bench.append("t1", 0, chunks(0, 1), fence=wrong) == Fenced()
        if wrong.token:
            assert await bench.end("t1", 0, fence=wrong) == Fenced()
    assert await bench.payloads() == ["start t1"]
    assert isinstance(await bench.append("t1", 0, chunks(0, 1)), Appended)


async def test_nothing_follows_the_end(bench: Bench) -> None:
    """G7: one turn-end, and no chunk behind it."""
    await bench.begin("t1")
    await bench.append("t1", 0, chunks(0, 1))
    ended = await bench.end("t1", 1)
    assert isinstance(ended, Appended)
    assert ended.state == "complete"
    assert await bench.append("t1", 2, chunks(2, 3)) == Ended("complete")
    assert await bench.append("t1", 0, chunks(0, 1)) == Ended("complete")
    assert await bench.end("t1", 1) == Ended("complete")
    assert await bench.end("t1", 1, "error") == Ended("complete")
    assert await bench.payloads() == ["start t1", "c0", "complete"]


@pytest.mark.parametrize("missing", ["everything", "meta", "journal", "turn"])
async def test_a_journal_that_lost_a_key_takes_no_more(bench: Bench, missing: str) -> None:
    """Flushed or evicted: the producer hears that it is lost; no half of a history grows on."""
    await bench.begin("t1", epoch="aa")
    await bench.append("t1", 0, chunks(0, 2))
    if missing == "everything":
        bench.admin.flushall()
    elif missing == "turn":
        bench.admin.delete(bench.journal._keys(SESSION).turn(TurnId("t1")))
    else:
        bench.admin.delete(bench.key(missing))
    lost = Lost("aa", 3) if missing == "turn" else Lost("", 0)
    assert await bench.append("t1", 2, chunks(2, 3)) == lost
    assert await bench.append("t1", 2, ()) == lost
    assert await bench.end("t1", 2) == lost


@pytest.mark.parametrize("missing", ["meta", "journal"])
async def test_a_journal_that_lost_a_key_begins_again_in_a_new_epoch(bench: Bench, missing: str) -> None:
    """Clients with an old cursor are told `resync`, and are not stopped by what is left of the old one."""
    await bench.begin("t1", epoch="aa")
    await bench.append("t1", 0, chunks(0, 2))
    bench.admin.delete(bench.key(missing))
    look = await bench.journal.look(SESSION, offset=2)
    assert (look.epoch, look.last, look.turns) == ("", 0, ())
    assert (await bench.journal.read(SESSION, after=0)).epoch == ""
    begun = await bench.begin("t2", epoch="bb", overlap=Overlap.REJECT)
    assert isinstance(begun, Begun)
    [check] = chained([("t2", Draft(RecordKind.TURN_START, b"start t2"))])
    assert begun.start == Cursor("bb", 1, turn_tag(TurnId("t2")), check)
    assert await bench.append("t1", 2, chunks(2, 3)) == Lost("bb", 1)
    assert await bench.payloads() == ["start t2"]
    assert [turn.turn for turn in (await bench.journal.look(SESSION)).turns] == ["t2"]


async def test_a_journal_that_lost_its_tail_is_lost(bench: Bench) -> None:
    """What cannot be read must not be claimed: a hole would otherwise stand before the next record."""
    await bench.begin("t1")
    await bench.append("t1", 0, chunks(0, 3))
    bench.admin.xdel(bench.key("journal"), "4-0")
    assert await bench.append("t1", 3, chunks(3, 4)) == Lost("", 0)
    assert (await bench.journal.look(SESSION)).epoch == ""


async def test_a_lost_list_of_turns_is_written_again(bench: Bench) -> None:
    """It holds nothing that the turns do not know; a turn that runs must be found and ended."""
    await bench.begin("t1")
    await bench.append("t1", 0, chunks(0, 1))
    bench.admin.delete(bench.key("turns"))
    assert isinstance(await bench.append("t1", 1, chunks(1, 2)), Appended)
    assert bench.admin.pttl(bench.key("turns")) > 0
    assert [turn.turn for turn in (await bench.journal.look(SESSION)).turns] == ["t1"]
    assert await bench.begin("t2", overlap=Overlap.REJECT) == Busy()


async def test_a_turn_whose_hash_is_gone_does_not_block_the_session(bench: Bench) -> None:
    """It can never end; `reject` and `interrupt` would wait for it for ever."""
    await bench.begin("t1")
    turn_key = bench.journal._keys(SESSION).turn(TurnId("t1"))
    bench.admin.delete(turn_key)
    begun = await bench.begin("t2", overlap=Overlap.REJECT)
    assert isinstance(begun, Begun)
    begun = await bench.begin("t3", overlap=Overlap.INTERRUPT)
    assert isinstance(begun, Begun)
    assert begun.waits_for == ("t2",)
    assert not bench.admin.exists(turn_key)


async def test_a_journal_that_was_cut_says_so_to_every_verb_of_who_saw_more(bench: Bench) -> None:
    """After a lossy failover nothing is written at an offset that somebody has seen with other contents."""
    await bench.begin("t1", epoch="aa")
    await bench.append("t1", 0, chunks(0, 1))
    before = bench.snapshot()
    await bench.append("t1", 1, chunks(1, 3))
    seen = bench.journal.seen(SESSION)
    before.restore()
    await _is_rewound(bench, Rewound("aa", 2, 1))
    assert bench.journal.seen(SESSION) == seen
    assert await bench.append("t1", 0, chunks(0, 1)) == Rewound("aa", 2, 1)
    assert await bench.begin("t2") == Rewound("aa", 2, 0)
    stranger = bench.of(OTHER_NODE)
    assert isinstance(await bench.begin("t3", node=OTHER_NODE), Begun)
    assert not (await stranger.look(SESSION)).rewound
    assert (await stranger.read(SESSION, after=0)).joins


async def test_a_journal_that_was_cut_and_written_over_says_so_too(bench: Bench) -> None:
    """Its length does not tell then; the check of the newest record seen does."""
    await bench.begin("t1", epoch="aa")
    await bench.append("t1", 0, chunks(0, 1))
    before = bench.snapshot()
    await bench.append("t1", 1, chunks(1, 3))
    seen = bench.journal.seen(SESSION)
    before.restore()
    fence = bench.fences[TurnId("t1")]
    for texts in (chunks(7, 9), chunks(9, 12)):  # as long as it was, then longer
        told = await bench.of(OTHER_NODE).append(SESSION, TurnId("t1"), fence, index=1, drafts=texts)
        assert isinstance(told, Appended)
        fence_of_other = await bench.begin(f"t{told.last}", node=OTHER_NODE)
        assert isinstance(fence_of_other, Begun)
        look = await bench.of(OTHER_NODE).look(SESSION)
        await _is_rewound(bench, Rewound("aa", look.last, told.count))
        assert bench.journal.seen(SESSION) == seen


async def _is_rewound(bench: Bench, rewound: Rewound) -> None:
    """Each verb of the node that has seen more refuses, and none of them writes."""
    assert await bench.append("t1", rewound.count, chunks(5, 6)) == rewound
    assert await bench.append("t1", rewound.count, ()) == rewound
    assert await bench.end("t1", rewound.count) == rewound
    assert await bench.seal("t1") == rewound
    assert await bench.begin("t9") == Rewound(rewound.epoch, rewound.last, 0)
    look = await bench.journal.look(SESSION)
    assert (look.epoch, look.last, look.rewound) == (rewound.epoch, rewound.last, True)
    for check in ("", bench.journal.seen(SESSION).check):
        page = await bench.journal.read(SESSION, after=2, check=check)
        assert (page.epoch, page.last, page.records, page.joins) == (rewound.epoch, rewound.last, (), False)
    assert bench.admin.hget(bench.key("meta"), "last") == b"%d" % rewound.last
    assert await bench.journal.turn(SESSION, TurnId("t9")) is None


async def test_an_ended_turn_whose_journal_was_cut_behind_it_says_so(bench: Bench) -> None:
    """Its producer, which holds it, is not to believe that all is well."""
    await bench.begin("t1", epoch="aa")
    await bench.begin("t2")
    await bench.end("t1", 0)
    before = bench.snapshot()
    await bench.append("t2", 0, chunks(0, 1))
    before.restore()
    assert await bench.end("t1", 0) == Rewound("aa", 3, 1)


@pytest.mark.parametrize("verb", ["append", "ask", "end"])
async def test_a_lost_turn_is_told_from_a_journal_written_over(bench: Bench, verb: str) -> None:
    """Long enough again, it looks as if only the turn's own key were gone, while all of the turn is."""
    await bench.begin("t1", epoch="aa")
    before = bench.snapshot()
    await bench.begin("t2")
    await bench.append("t2", 0, chunks(0, 2))

    async def ask() -> AppendResult:
        if verb == "end":
            return await bench.end("t2", 2)
        return await bench.append("t2", 2, chunks(2, 3) if verb == "append" else ())

    own_key = bench.journal._keys(SESSION).turn(TurnId("t2"))
    bench.admin.delete(own_key)
    assert await ask() == Lost("aa", 4, rewound=False)
    before.restore()
    assert await ask() == Lost("aa", 1, rewound=True)
    fence = bench.fences[TurnId("t1")]
    await bench.of(OTHER_NODE).append(SESSION, TurnId("t1"), fence, index=0, drafts=chunks(0, 5))
    assert await ask() == Lost("aa", 6, rewound=True)
    bench.admin.delete(bench.key("meta"))
    assert await ask() == Lost("", 0, rewound=False)


async def test_a_journal_trimmed_to_nothing_still_knows_its_history(bench: Bench) -> None:
    """No record is left there to compare; what stood last is known nevertheless."""
    await bench.begin("t1", epoch="aa")
    await bench.end("t1", 0)
    before = bench.snapshot()
    await bench.begin("t2")
    await bench.end("t2", 0)
    seen = bench.journal.seen(SESSION)
    before.restore()
    stranger = bench.of(OTHER_NODE)
    assert isinstance(await bench.begin("t3", node=OTHER_NODE), Begun)
    await stranger.end(
        SESSION, TurnId("t3"), bench.fences[TurnId("t3")], index=0, reason="x", drafts=[turn_end("x")]
    )
    await bench.passed(2)
    assert await bench.trim(1) == [b"TRIMMED", 5]
    assert (await bench.journal.look(SESSION)).rewound
    assert not (await bench.journal.read(SESSION, after=4)).joins
    look = await stranger.look(SESSION, offset=4)
    assert (look.tag, look.check) == ("", look.last_check)
    assert look.last_check not in {"", seen.check}
    assert not (await bench.of(NodeId("node-c")).read(SESSION, after=4, check=seen.check)).joins


async def test_a_place_that_has_a_check_is_told_from_one_in_another_history(bench: Bench) -> None:
    """The same offset of the same turn, and nobody on this node has seen what was there before."""
    await bench.begin("t1", epoch="aa")
    await bench.append("t1", 0, chunks(0, 3))
    first = [record.cursor for record in (await bench.journal.read(SESSION, after=0)).records]
    read = bench.of(OTHER_NODE).read
    for cursor in first:
        page = await read(SESSION, after=cursor.offset, check=cursor.check)
        assert (page.joins, len(page.records)) == (True, 4 - cursor.offset)
        page = await read(SESSION, after=cursor.offset, check="00000000")
        assert (page.joins, page.records) == (False, ())
        assert (await bench.journal.look(SESSION, offset=cursor.offset)).check == cursor.check
        assert (await bench.journal.look(SESSION, offset=cursor.offset)).last_check == first[-1].check
    assert not (await read(SESSION, after=5)).joins
    assert not (await read(SESSION, after=5, check=first[-1].check)).joins
    assert (await read(SESSION, after=0)).joins
    assert (await bench.journal.look(SESSION, offset=journal.NEWEST)).check == first[-1].check


async def test_records_from_before_there_were_checks_are_no_other_history(bench: Bench) -> None:
    """A gateway that is upgraded finds journals without them; nobody is told resync for that."""
    await bench.begin("t1", epoch="aa")
    await bench.append("t1", 0, chunks(0, 2))
    stored: Any = bench.admin.xrange(bench.key("journal"))
    bench.admin.delete(bench.key("journal"))
    for name, fields in stored:
        del fields[b"c"]
        bench.admin.xadd(bench.key("journal"), fields, id=name)
    bench.admin.hdel(bench.key("meta"), "check")
    page = await bench.journal.read(SESSION, after=0)
    assert [(record.offset, record.cursor.check) for record in page.records] == [(1, ""), (2, ""), (3, "")]
    assert (await bench.journal.read(SESSION, after=2, check="01234567")).joins
    assert not (await bench.journal.look(SESSION, offset=2)).rewound
    stranger, before = bench.of(OTHER_NODE), bench.snapshot()
    assert (await stranger.look(SESSION)).last_check == ""
    appended = await bench.append("t1", 2, chunks(2, 3))
    assert isinstance(appended, Appended)
    assert [appended.check] == chained([("t1", chunk("c2"))])
    assert (await bench.journal.read(SESSION, after=3, check="")).joins
    assert (await stranger.look(SESSION)).last_check == appended.check
    before.restore()  # whose length tells, where no check does
    assert (await stranger.look(SESSION)).rewound


# -- what this node has seen


async def test_what_was_seen_only_goes_on_within_an_epoch(bench: Bench) -> None:
    """Replies overtake each other; and an epoch that is told is the journal's, wherever it stands."""
    assert bench.journal.seen(SESSION) == Seen()
    await bench.begin("t1", epoch="aa")
    assert bench.journal.seen(SESSION).offset == 1
    first = await bench.append("t1", 0, chunks(0, 3))
    assert isinstance(first, Appended)
    seen = Seen("aa", 4, first.check)
    assert bench.journal.seen(SESSION) == seen
    bench.journal._seen.note(SESSION, "aa", 3, "00000000")
    bench.journal._seen.note(SESSION, "aa", 4, "00000000")
    assert bench.journal.seen(SESSION) == seen
    other = bench.of(OTHER_NODE)
    await other.look(SESSION)
    assert other.seen(SESSION) == seen
    await bench.append("t1", 3, chunks(3, 4))
    page = await other.read(SESSION, after=4)
    assert other.seen(SESSION) == Seen("aa", 5, page.records[0].cursor.check) == bench.journal.seen(SESSION)
    ended = await bench.end("t1", 4)
    assert isinstance(ended, Appended)
    assert bench.journal.seen(SESSION) == Seen("aa", 6, ended.check)
    bench.journal._seen.note(SESSION, "bb", 2, "00000000")
    assert bench.journal.seen(SESSION) == Seen("bb", 2, "00000000")
    bench.admin.delete(bench.key("meta"))
    await bench.journal.look(SESSION)
    assert bench.journal.seen(SESSION) == Seen()


async def test_what_was_seen_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """G10: the sessions used last are remembered."""
    monkeypatch.setattr(seen_module, "MAX_SESSIONS", 2)
    offsets = seen_module.SeenOffsets()
    for name in ("a", "b", "a", "c"):
        offsets.note(SessionId(name), "e", offsets.get(SessionId(name)).offset + 1, "")
    assert [offsets.get(SessionId(name)).offset for name in "abc"] == [2, 0, 1]


# -- a new epoch


async def test_a_renewal_keeps_what_survived_under_another_name(bench: Bench) -> None:
    """Nobody mistakes it for what it was, and every turn goes on in it."""
    await bench.begin("t1", epoch="aa")
    await bench.begin("t2")
    await bench.append("t1", 0, chunks(0, 1))
    await bench.end("t2", 0)
    survived = await bench.payloads()
    before = bench.snapshot()
    await bench.append("t1", 1, chunks(1, 2))
    before.restore()
    await bench.of(OTHER_NODE).renew(SESSION, "cc")  # who has seen nothing renews nothing
    assert (await bench.of(OTHER_NODE).look(SESSION)).epoch == "aa"
    assert await bench.journal.renew(SESSION, "bb")
    assert not await bench.journal.renew(SESSION, "dd")  # nor does who comes later
    assert (await bench.journal.look(SESSION)).epoch == "bb"
    assert await bench.payloads() == survived
    assert bench.journal.seen(SESSION).epoch == "bb"
    assert told(await bench.append("t1", 1, chunks(1, 3))) == ("bb", 6, 3, "running")
    assert await bench.append("t2", 0, ()) == Ended("complete")
    assert {turn.turn: turn.state for turn in (await bench.journal.look(SESSION)).turns} == {
        "t1": "running", "t2": "complete",
    }  # fmt: skip
    assert not await bench.journal.renew(SESSION, "ee")
    assert await bench.begin("t2") == Duplicate(Cursor("bb", 2, turn_tag(TurnId("t2"))), "complete")


# -- bells


@asynccontextmanager
async def listening(bench: Bench, url: str) -> AsyncIterator[Callable[[], Awaitable[list[str]]]]:
    """What was rung since it was last asked."""
    channel = session_keys(bench.prefix, SESSION).bell.encode()
    redis_bells = redis.Redis.from_url(url)
    bells = redis_bells.pubsub()  # type: ignore[no-untyped-call]
    bells.ssubscribe(channel)
    assert bells.get_message(timeout=5) is not None

    async def rung() -> list[str]:
        found: list[str] = []
        bench.admin.execute_command("SPUBLISH", channel, "the end")  # type: ignore[no-untyped-call]
        while True:
            said = await asyncio.to_thread(bells.get_message, timeout=5)
            assert said is not None
            if said["data"] == b"the end":
                return found
            found.append(said["data"].decode())

    try:
        yield rung
    finally:
        bells.close()
        redis_bells.close()


async def test_whatever_is_journalled_rings(bench: Bench, url: str) -> None:
    """The other nodes' readers wait for nothing else; refused calls and questions are silent."""
    async with listening(bench, url) as rung:
        await bench.begin("t1", epoch="aa")
        assert await rung() == ["r node-a"]
        await bench.append("t1", 0, chunks(0, 2))
        assert await rung() == ["r node-a"]
        await bench.append("t1", 0, chunks(0, 2))
        await bench.append("t1", 5, chunks(0, 2))
        await bench.append("t1", 2, ())
        await bench.journal.look(SESSION)
        await bench.journal.read(SESSION, after=0)
        assert await rung() == []
        await bench.begin("t2", node=OTHER_NODE)
        assert await rung() == ["r node-b"]
        await bench.end("t1", 2)
        assert await rung() == ["r node-a"]
        await bench.seal("t2", OTHER_NODE)
        assert await rung() == ["r node-a"]
        await bench.cancel("t3")
        assert isinstance(await bench.begin("t3"), BegunCancelled)
        assert await rung() == ["r node-a"]
        before = bench.snapshot()
        await bench.begin("t4")
        before.restore()
        await rung()
        await bench.journal.renew(SESSION, "bb")
        await bench.journal.renew(SESSION, "cc")
        assert await rung() == ["r node-a"]


async def test_who_produces_is_told_of_what_happened_to_its_turn(bench: Bench, url: str) -> None:
    """It may have nothing to append for minutes, and would not hear that it is to stop."""
    await bench.begin("t1")
    turn = TurnId("t1")
    async with listening(bench, url) as rung:
        await bench.journal.abort(SESSION, turn, by=By(), seconds=60)
        assert await rung() == ["c t1"]
        await bench.journal.abort(SESSION, turn, by=By(), seconds=None)
        await bench.journal.cancel(SESSION, turn, by=By(), only_due=True)
        await bench.cancel("t9")
        assert await rung() == []
        await bench.cancel("t1")
        assert await rung() == ["c t1"]
        await bench.begin("t2", overlap=Overlap.INTERRUPT)
        assert await rung() == ["c t1", "r node-a"]
        await bench.end("t1", 0)
        await bench.end("t2", 0)
        await rung()
        await bench.cancel("t1")
        await bench.journal.abort(SESSION, turn, by=By(), seconds=60)
        assert await rung() == []


async def test_a_store_that_refuses_the_bell_still_journals(bench: Bench, url: str) -> None:
    """A bell is a hint; a user without rights on channels loses latency, not records."""
    user = f"u{secrets.token_hex(4)}"
    bench.admin.acl_setuser(
        user, enabled=True, nopass=True, keys=["*"], commands=["+@all"], reset_channels=True
    )
    restricted = url.replace("redis://", f"redis://{user}:x@").replace("unix://", f"unix://{user}:x@")
    async with bench_on(restricted) as muted:
        assert isinstance(await muted.begin("t1"), Begun)
        with pytest.raises(redis.exceptions.NoPermissionError):
            muted.admin.execute_command("SPUBLISH", muted.key("bell"), "x")  # type: ignore[no-untyped-call]
        assert isinstance(await muted.append("t1", 0, chunks(0, 2)), Appended)
        assert isinstance(await muted.cancel("t1"), Cancelling)
        assert isinstance(await muted.end("t1", 2), Appended)
        assert await muted.payloads() == ["start t1", "c0", "c1", "complete"]


# -- a full store, a due abort


async def test_a_full_store_takes_no_records_and_still_tells_of_a_cancel(bench: Bench) -> None:
    """Who waits for room must hear that nobody wants the turn any more."""
    await bench.begin("t1")
    await bench.append("t1", 0, chunks(0, 1))
    bench.admin.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(StoreUnavailable):
            await bench.append("t1", 1, chunks(1, 2))
        with pytest.raises(StoreUnavailable):
            await bench.begin("t2")
        assert isinstance(await bench.cancel("t1"), Cancelling)
        asked = await bench.append("t1", 1, ())
        assert isinstance(asked, Appended)
        assert (asked.state, asked.count) == ("cancelling", 1)
        before = bench.snapshot()
        assert isinstance(await bench.end("t1", 1, "cancelled"), Appended)
        bench.admin.config_set("maxmemory", "0")
        before.restore()
        bench.admin.config_set("maxmemory", "1mb")
        assert await bench.journal.renew(SESSION, "bb")
    finally:
        bench.admin.config_set("maxmemory", "0")


@pytest.mark.parametrize("drafts", [0, 1])
async def test_an_abort_that_is_due_is_told_to_who_produces(bench: Bench, drafts: int) -> None:
    """Nobody else need be alive to carry it out; before its time it says nothing."""
    await bench.begin("t1")
    turn = TurnId("t1")
    await bench.journal.abort(SESSION, turn, by=By(), seconds=60)
    first = await bench.append("t1", 0, chunks(0, drafts))
    assert isinstance(first, Appended)
    assert first.state == "running"
    [look] = (await bench.journal.look(SESSION)).turns
    assert look.abort_pending
    await bench.journal.abort(SESSION, turn, by=By(), seconds=0.001)
    await bench.passed(2)
    for _ in range(2):
        due = await bench.append("t1", drafts, chunks(drafts, 2 * drafts))
        assert isinstance(due, Appended)
        assert due.state == "cancelling"
        [look] = (await bench.journal.look(SESSION)).turns
        assert (look.state, look.abort_pending) == ("cancelling", False)


# -- end, cancel, seal


async def test_a_cancel_marks_and_the_next_append_tells(bench: Bench) -> None:
    """The producer hears of it with its next batch, wherever it runs."""
    await bench.begin("t1")
    assert await bench.cancel("t1", user="bob") == Cancelling(NODE)
    assert await bench.cancel("t1") == Cancelling(NODE)
    appended = await bench.append("t1", 0, chunks(0, 1))
    assert isinstance(appended, Appended)
    assert appended.state == "cancelling"
    assert isinstance(await bench.end("t1", 1, "cancelled"), Appended)
    assert await bench.cancel("t1") == Ended("cancelled")


async def test_a_cancel_of_one_turn_leaves_the_other(bench: Bench) -> None:
    """G4: cancelling one turn never touches another."""
    await bench.begin("t1")
    await bench.begin("t2")
    await bench.cancel("t1")
    appended = await bench.append("t2", 0, chunks(0, 1))
    assert isinstance(appended, Appended)
    assert appended.state == "running"


@pytest.mark.parametrize("cancel_first", [True, False])
async def test_a_cancel_and_an_end_at_once_leave_one_end(bench: Bench, *, cancel_first: bool) -> None:
    """Either order is fine, but the cancel must not say that it stops what has ended."""
    await bench.begin("t1")
    if cancel_first:
        mark, ended = await asyncio.gather(bench.cancel("t1"), bench.end("t1", 0))
        assert mark == Cancelling(NODE)
    else:
        ended, mark = await asyncio.gather(bench.end("t1", 0), bench.cancel("t1"))
        assert mark == Ended("complete")
    assert isinstance(ended, Appended)
    assert await bench.payloads() == ["start t1", "complete"]


async def test_an_abort_is_due_at_its_deadline_and_can_be_taken_back(bench: Bench) -> None:
    """G5's exception: the SDK's ambiguous frame cancels only if nobody resumed meanwhile."""
    await bench.begin("t1")
    turn = TurnId("t1")

    async def due() -> CancelMark:
        return await bench.journal.cancel(SESSION, turn, by=By(), only_due=True)

    assert await due() == NotYet()
    await bench.journal.abort(SESSION, turn, by=By(), seconds=60)
    assert await due() == NotYet()
    await bench.journal.abort(SESSION, turn, by=By(), seconds=0.001)
    await bench.journal.abort(SESSION, turn, by=By(), seconds=None)
    await bench.passed(2)
    assert await due() == NotYet()
    await bench.journal.abort(SESSION, turn, by=By(), seconds=0.001)
    await bench.passed(2)
    assert await due() == Cancelling(NODE)
    await bench.end("t1", 0, "cancelled")
    await bench.journal.abort(SESSION, turn, by=By(), seconds=0.001)
    await bench.passed(2)
    assert await due() == Ended("cancelled")
    assert await bench.journal.cancel(SESSION, TurnId("t9"), by=By(), only_due=True) == NotYet()
    assert not [key for key in bench.stored_keys() if "tombstone" in key]


async def test_a_seal_ends_the_turn_of_the_named_node_only(bench: Bench) -> None:
    """Another took it over meanwhile, or it was begun again elsewhere: then nothing is sealed."""
    await bench.begin("t1", node=NODE)
    await bench.append("t1", 0, chunks(0, 1))
    assert await bench.seal("t1", OTHER_NODE) == Fenced()
    assert await bench.payloads() == ["start t1", "c0"]
    sealed = await bench.seal("t1", NODE)
    assert isinstance(sealed, Appended)
    assert sealed.state == "interrupted"
    assert await bench.seal("t1", NODE) == Ended("interrupted")
    assert await bench.payloads() == ["start t1", "c0", "interrupted"]


async def test_a_node_that_was_frozen_cannot_go_on_with_a_sealed_turn(bench: Bench) -> None:
    """G6: it wakes with its old fence and is refused by the journal."""
    await bench.begin("t1")
    await bench.seal("t1")
    assert await bench.append("t1", 0, chunks(0, 1)) == Fenced()
    assert await bench.end("t1", 0) == Ended("interrupted")
    assert await bench.payloads() == ["start t1", "interrupted"]


async def test_a_refusal_is_kept_with_its_turn(bench: Bench) -> None:
    """A repeated send gets the same refusal without asking the backend again."""
    await bench.begin("t1")
    await bench.journal.end(
        SESSION, TurnId("t1"), bench.fences[TurnId("t1")],
        index=0, reason="error", drafts=[chunk("closer"), turn_end("error")], refusal=b'{"status":429}',
    )  # fmt: skip
    known = await bench.journal.turn(SESSION, TurnId("t1"))
    assert known is not None
    assert (known.state, known.first, known.refusal) == ("error", 1, b'{"status":429}')
    assert await bench.journal.turn(SESSION, TurnId("t9")) is None


# -- look and read


async def test_a_session_that_does_not_exist_is_empty_and_not_made(bench: Bench) -> None:
    """Looking at any name costs nothing that is kept."""
    look = await bench.journal.look(SESSION, offset=7)
    assert (look.epoch, look.last, look.base, look.tag, look.turns) == ("", 0, 1, "", ())
    page = await bench.journal.read(SESSION, after=0)
    assert (page.epoch, page.last, page.base, page.records) == ("", 0, 1, ())
    await bench.journal.mark_read(SESSION, TurnId("t1"))
    await bench.journal.abort(SESSION, TurnId("t1"), by=By(), seconds=1)
    assert await bench.journal.start(SESSION, TurnId("t1"), Fence(1, ""))  # lost: its producer brings it back
    assert bench.stored_keys() == []


async def test_a_look_tells_the_running_turns_and_the_newest_ended(bench: Bench) -> None:
    """In the order they began; a resume takes the last that runs, else the newest ended one."""
    for number in range(1, 13):
        await bench.begin(f"t{number}", node=NodeId(f"n{number}"))
    await bench.end("t1", 0)
    await bench.passed(2)
    await bench.end("t3", 0, "error")
    await bench.passed(2)
    await bench.end("t2", 0, "cancelled")
    look = await bench.journal.look(SESSION)
    assert [(turn.turn, turn.first) for turn in look.turns if turn.is_running] == [
        (f"t{number}", number) for number in range(4, 13)
    ]
    assert [(turn.turn, turn.state, turn.node) for turn in look.turns if not turn.is_running] == [
        ("t2", "cancelled", "n2")
    ]
    assert (look.last, look.base) == (15, 1)


async def test_a_look_names_the_turn_at_an_offset(bench: Bench) -> None:
    """So that an offset used again after a loss does not pass for the old one."""
    await bench.begin("t1")
    await bench.begin("t2")
    await bench.append("t1", 0, chunks(0, 1))
    tags = [(await bench.journal.look(SESSION, offset=offset)).tag for offset in range(5)]
    assert tags == ["", *(turn_tag(TurnId(turn)) for turn in ("t1", "t2", "t1")), ""]
    assert (await bench.journal.look(SESSION, offset=999_999_999_999_999)).tag == ""
    assert (await bench.journal.look(SESSION, offset=journal.NEWEST)).tag == tags[3]


async def test_a_look_knows_what_was_read_to_its_end(bench: Bench) -> None:
    """An answer that ended during a reload is shown once more, and then not again."""
    await bench.begin("t1")
    await bench.end("t1", 0)
    assert [turn.was_read for turn in (await bench.journal.look(SESSION)).turns] == [False]
    await bench.journal.mark_read(SESSION, TurnId("t1"))
    assert [turn.was_read for turn in (await bench.journal.look(SESSION)).turns] == [True]


async def test_records_come_back_as_they_were_written(bench: Bench) -> None:
    """Bytes, kinds and flags: every client must see what the first one saw."""
    payload = bytes(range(256)) * 300
    drafts = [
        Draft(RecordKind.CHUNK, payload),
        Draft(RecordKind.CHUNK, b"", plain=True),
        Draft(RecordKind.CHUNK, b'{"x":"\\u0000"}'),
    ]
    ending = Draft(RecordKind.TURN_END, b"\r\n$5\r\n", ai_sdk=True)
    await bench.begin("t1", epoch="ab")
    await bench.append("t1", 0, drafts)
    await bench.journal.end(
        SESSION, TurnId("t1"), bench.fences[TurnId("t1")], index=3, reason="complete", drafts=[ending]
    )
    page = await bench.journal.read(SESSION, after=1)
    assert [record.draft for record in page.records] == [*drafts, ending]
    start = Draft(RecordKind.TURN_START, b"start t1")
    checks = chained([("t1", draft) for draft in (start, *drafts, ending)])
    assert [record.cursor for record in page.records] == [
        Cursor("ab", offset, turn_tag(TurnId("t1")), checks[offset - 1]) for offset in range(2, 6)
    ]
    assert page.last_check == checks[-1]


@pytest.mark.parametrize("size", [1, 1000, 300_000])
async def test_a_page_is_bounded_by_bytes(bench: Bench, size: int) -> None:
    """G10: a reader asks for what it can hold; at least one record comes, so that it gets on."""
    await bench.begin("t1")
    count = 400 if size < 300_000 else 12
    await bench.append("t1", 0, [Draft(RecordKind.CHUNK, b"x" * size)] * count)
    after, limit = 1, 4000
    while after < 1 + count:
        page = await bench.journal.read(SESSION, after=after, limit_bytes=limit)
        assert page.records
        assert [record.offset for record in page.records] == list(
            range(after + 1, after + 1 + len(page.records))
        )
        assert sum(len(record.draft.payload) for record in page.records[:-1]) < limit
        assert page.last == 1 + count
        after += len(page.records)
    assert (await bench.journal.read(SESSION, after=after)).records == ()


async def test_a_page_is_bounded_where_its_records_grow(bench: Bench) -> None:
    """The small ones say nothing of those behind them: an answer's deltas, then its images."""
    await bench.begin("t1")
    sizes = [10] * 30 + [3000] * 30
    await bench.append("t1", 0, [Draft(RecordKind.CHUNK, b"x" * size) for size in sizes])
    page = await bench.journal.read(SESSION, after=1, limit_bytes=6000)
    read = [len(record.draft.payload) for record in page.records]
    assert read == sizes[: len(read)]
    assert sum(read[:-1]) < 6000 <= sum(read) + 64 * len(read)


async def test_a_read_stops_before_a_hole(bench: Bench) -> None:
    """A gap is never passed on as if nothing were missing."""
    await bench.begin("t1")
    await bench.append("t1", 0, chunks(0, 9))
    bench.admin.xdel(bench.key("journal"), "5-0")
    bench.admin.hset(bench.key("meta"), "last", 9)  # so that the length alone does not tell
    stranger = bench.of(OTHER_NODE)  # who has seen the whole of it is told that it is another journal
    page = await stranger.read(SESSION, after=0)
    assert [record.offset for record in page.records] == [1, 2, 3, 4]
    assert (await stranger.read(SESSION, after=4)).records == ()


# -- retention


async def test_a_trim_cuts_up_to_the_oldest_turn_kept(bench: Bench) -> None:
    """Prefixes only: what is left is dense, and its base is told."""
    await bench.begin("t1")
    await bench.append("t1", 0, chunks(0, 2))
    await bench.end("t1", 2)
    await bench.begin("t2")
    await bench.append("t2", 0, chunks(2, 4))
    await bench.passed(2)
    assert await bench.trim(1) == [b"TRIMMED", 5]
    page = await bench.journal.read(SESSION, after=4)
    assert [record.offset for record in page.records] == [5, 6, 7]
    assert (page.base, page.last) == (5, 7)
    page = await bench.journal.read(SESSION, after=0)
    assert (page.base, page.records) == (5, ())
    assert isinstance(await bench.append("t2", 2, chunks(4, 5)), Appended)
    assert (await bench.journal.look(SESSION)).base == 5


async def test_a_trim_does_not_pass_a_turn_that_runs(bench: Bench) -> None:
    """A turn begun before others that ended keeps their records too, until it ends."""
    await bench.begin("t1")
    await bench.begin("t2")
    await bench.end("t2", 0)
    await bench.passed(2)
    assert await bench.trim(1) == [b"TRIMMED", 1]
    assert await bench.payloads() == ["start t1", "start t2", "complete"]


async def test_a_trim_keeps_turns_within_the_window(bench: Bench) -> None:
    """Retention is counted from a turn's end."""
    await bench.begin("t1")
    await bench.end("t1", 0)
    assert await bench.trim(60_000) == [b"TRIMMED", 1]
    assert len(await bench.payloads()) == 2


async def test_a_journal_trimmed_to_nothing_goes_on(bench: Bench) -> None:
    """Offsets are never used again, also when no record is left."""
    await bench.begin("t1", epoch="aa")
    await bench.end("t1", 0)
    await bench.passed(2)
    assert await bench.trim(1) == [b"TRIMMED", 3]
    look = await bench.journal.look(SESSION)
    assert (look.epoch, look.last, look.base, look.turns) == ("aa", 2, 3, ())
    begun = await bench.begin("t2", epoch="bb")
    assert isinstance(begun, Begun)
    assert unchecked(begun.start) == Cursor("aa", 3, turn_tag(TurnId("t2")))
    assert await bench.begin("t1") == Duplicate(Cursor("aa", 1, turn_tag(TurnId("t1"))), "complete")


async def test_an_end_trims_with_the_window_of_the_settings(url: str) -> None:
    """Nobody has to call it: ending a turn forgets the older ones."""
    async with bench_on(url, window=0.0) as bench:
        await bench.begin("t1")
        await bench.end("t1", 0)
        await bench.passed(3)
        await bench.begin("t2")
        await bench.end("t2", 0)
        await bench.begin("t3")  # the same lane: behind the trim
        base = (await bench.journal.look(SESSION)).base
        assert base >= 3
        page = await bench.journal.read(SESSION, after=base - 1)
        assert page.records[-1].draft.payload == b"start t3"


async def test_every_key_expires(bench: Bench) -> None:
    """A session goes when it was not used for GATEWAY_SESSION_TTL; none of its keys is forgotten."""
    await bench.begin("t1")
    await bench.append("t1", 0, chunks(0, 2))
    await bench.begin("t2", overlap=Overlap.INTERRUPT)
    await bench.end("t1", 2)
    await bench.cancel("t3")
    await bench.begin("t3")
    await bench.cancel("t4")
    await bench.journal.mark_read(SESSION, TurnId("t1"))
    await bench.journal.abort(SESSION, TurnId("t2"), by=By(), seconds=1)
    await bench.seal("t2")
    await bench.trim(1)
    place = lease.Lease(bench.store, node=NODE, prefix=bench.prefix, lease_seconds=1)
    await place.claim(SESSION, TurnId("t5"))
    await place.check()
    keys = bench.stored_keys()
    assert len(keys) == 3 + 3 + 1 + 2
    assert {key: bench.admin.pttl(key) for key in keys if bench.admin.pttl(key) <= 0} == {}


async def test_a_long_turn_does_not_expire_while_it_is_written(url: str) -> None:
    """The last use is the last append, not the send."""
    async with bench_on(url, ttl=2.0) as bench:
        await bench.begin("t1")
        names = (bench.key("meta"), bench.key("journal"), bench.key("turns"))
        keys = [*names, bench.journal._keys(SESSION).turn(TurnId("t1"))]
        for key in keys:
            bench.admin.pexpire(key, 1000)
        await bench.passed(550)
        await bench.append("t1", 0, chunks(0, 1))
        assert min(bench.admin.pttl(key) for key in keys) > 1500
        for key in keys:
            bench.admin.pexpire(key, 1000)
        await bench.append("t1", 1, chunks(1, 2))  # within a quarter of the TTL: nothing is refreshed
        assert max(bench.admin.pttl(key) for key in keys) <= 1000
        await bench.end("t1", 2)
        assert min(bench.admin.pttl(key) for key in keys) > 1500


async def test_reading_is_a_use(bench: Bench) -> None:
    """A chat that is read every day is not forgotten because nobody writes; what is not there stays so."""
    await bench.begin("t1")
    names = [bench.key(name) for name in ("meta", "journal", "turns")]
    for key in names:
        bench.admin.pexpire(key, 1000)
    bench.journal.touch(SESSION)
    bench.journal.touch(SessionId("nobody's"))
    await bench.journal.look(SESSION)
    await bench.journal.mark_read(SESSION, TurnId("t1"))  # behind the touch, on the same lane
    assert min(bench.admin.pttl(key) for key in names) > 1000
    assert len(bench.stored_keys()) == 4


async def test_no_name_of_a_client_reaches_a_key(bench: Bench) -> None:
    """A name with braces would choose its slot, and operators would read users' ids."""
    for number, name in enumerate(HOSTILE):
        session = SessionId(name)
        turn = name.replace(" ", "").replace("\0", "")
        await bench.cancel(f"other{number}", user=name)
        assert isinstance(await bench.begin(turn, session=session, user=name), Begun)
        assert await bench.payloads(session) == [f"start {turn}"]
        look = await bench.journal.look(session)
        assert [told.turn for told in look.turns] == [turn]
    keys = bench.stored_keys()
    assert len(keys) == 5 * len(HOSTILE)
    for key in keys:
        assert key.isascii()
        assert key.count("{") == key.count("}") == 1
        rest = key.removeprefix(f"{bench.prefix}:{{")
        tag, _, name = rest.partition("}:")
        assert len(tag) == 22
        assert set(tag) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
        kind, _, digest = name.partition(":")
        assert kind in {"meta", "journal", "turns", "turn", "tombstone"}
        assert set(digest) <= set("0123456789abcdef")


async def test_sessions_do_not_share(bench: Bench) -> None:
    """The same turn id in another session is another turn."""
    await bench.begin("t1")
    other = SessionId("chat-2")
    assert isinstance(await bench.begin("t1", session=other, digest="else"), Begun)
    await bench.cancel("t1")
    known = await bench.journal.turn(other, TurnId("t1"))
    assert known is not None
    assert known.state == "running"


# -- the whole, against a model


@dataclass
class ModelTurn:
    state: str = "none"
    count: int = 0
    wanted: int = 0
    fenced: bool = False


class Model:
    """What the journal must be: a list, and two turns."""

    def __init__(self) -> None:
        self.records: list[str] = []
        self.turns = {"a": ModelTurn(), "b": ModelTurn()}
        self.remembered: set[str] = set()

    @property
    def running(self) -> set[str]:
        return {name for name, turn in self.turns.items() if turn.state in outcomes.RUNNING_STATES}

    def begin(self, name: str, overlap: Overlap) -> str:
        turn = self.turns[name]
        if turn.state != "none":
            return "duplicate"
        others = self.running
        if name in self.remembered:
            self.remembered.discard(name)
            self.records += [f"start {name}", "cancelled"]
            turn.state = "cancelled"
            return "cancelled"
        if others and overlap is Overlap.REJECT:
            return "busy"
        waits = others if overlap is Overlap.INTERRUPT else set()
        for other in waits:
            self.turns[other].state = "cancelling"
        self.records.append(f"start {name}")
        turn.state = "queued" if waits else "running"
        return "begun"

    def append(self, name: str, index: int, texts: list[str]) -> str:
        turn = self.turns[name]
        if turn.fenced:
            return "Fenced"
        if name not in self.running:
            return "Ended"
        if index > turn.count:
            return "Behind"
        new = texts[turn.count - index :]
        self.records += new
        turn.count += len(new)
        return "Appended"

    def end(self, name: str, index: int, reason: str) -> str:
        turn = self.turns[name]
        if name not in self.running:
            return "Ended"
        if index > turn.count:
            return "Behind"
        self.records.append(reason)
        turn.state = reason
        turn.count += 1
        return "Appended"

    def seal(self, name: str) -> str:
        if self.turns[name].state == "none":
            return "Lost"
        if name not in self.running:
            return "Ended"
        self.records.append("interrupted")
        self.turns[name].state = "interrupted"
        self.turns[name].fenced = True
        return "Appended"

    def cancel(self, name: str) -> str:
        turn = self.turns[name]
        if turn.state == "none":
            self.remembered.add(name)
            return "NotYet"
        if name not in self.running:
            return "Ended"
        turn.state = "cancelling"
        return "Cancelling"


_NAMES = st.sampled_from("ab")
_STEPS = st.one_of(
    st.tuples(st.just("begin"), _NAMES, st.sampled_from(list(Overlap))),
    st.tuples(st.just("append"), _NAMES, st.integers(-3, 1), st.integers(0, 4), st.booleans()),
    st.tuples(st.just("append"), _NAMES, st.integers(-3, 1), st.integers(0, 4), st.booleans()),
    st.tuples(st.just("cancel"), _NAMES),
    st.tuples(st.just("end"), _NAMES, st.integers(-1, 1)),
    st.tuples(st.just("seal"), _NAMES),
)


async def _follow(bench: Bench, steps: list[tuple[Any, ...]]) -> None:
    model = Model()
    for step in steps:
        match step:
            case ("begin", str(name), Overlap() as overlap):
                result = await bench.begin(name, overlap=overlap)
                expected = model.begin(name, overlap)
                kinds = {Begun: "begun", BegunCancelled: "cancelled", Duplicate: "duplicate", Busy: "busy"}
                assert kinds[type(result)] == expected
            case ("append", str(name), int(back), int(count), bool(twice)) if TurnId(name) in bench.fences:
                index = max(0, model.turns[name].count + back)
                texts = [f"{name}{number}" for number in range(index, index + count)]
                for _ in range(2 if twice else 1):
                    answer = await bench.append(name, index, [chunk(text) for text in texts])
                    assert type(answer).__name__ == model.append(name, index, texts)
            case ("cancel", str(name)):
                assert type(await bench.cancel(name)).__name__ == model.cancel(name)
            case ("end", str(name), int(back)) if TurnId(name) in bench.fences:
                index = max(0, model.turns[name].count + back)
                answer = await bench.end(name, index, "complete")
                assert type(answer).__name__ == model.end(name, index, "complete")
            case ("seal", str(name)):
                assert type(await bench.seal(name)).__name__ == model.seal(name)
            case _:  # a write to a turn that was never begun: nobody has its fence
                pass
        await _compare(bench, model)


async def _compare(bench: Bench, model: Model) -> None:
    assert await bench.payloads() == model.records
    look = await bench.journal.look(SESSION)
    assert {turn.turn for turn in look.turns if turn.is_running} == model.running
    for name, turn in model.turns.items():
        known = await bench.journal.turn(SESSION, TurnId(name))
        assert (known.state if known else "none") == turn.state
    page = await bench.journal.read(SESSION, after=0)
    checks = chained([(record.turn, record.draft) for record in page.records])
    assert [record.cursor.check for record in page.records] == checks
    newest = checks[-1] if checks else ""
    assert page.last_check == look.last_check == bench.journal.seen(SESSION).check == newest
    for name in model.turns:
        kinds = [record.kind for record in page.records if record.turn == name]
        assert kinds.count(RecordKind.TURN_END) == (bool(kinds) and name not in model.running)
        assert RecordKind.TURN_END not in kinds[:-1]
    assert look.last == len(model.records) or (look.epoch == "" and not model.records)


_TURNS = st.text([chr(code) for code in range(33, 127)], min_size=1, max_size=128)
_PAYLOADS = st.binary(max_size=300) | st.sampled_from([b"", b"\0", b"c\0", b"\r\n", "ü🙂".encode()])
_DRAFTS = st.builds(Draft, st.just(RecordKind.CHUNK), _PAYLOADS, st.booleans())
_ENDS = st.builds(Draft, st.just(RecordKind.TURN_END), _PAYLOADS, ai_sdk=st.booleans(), done=st.booleans())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(_TURNS, min_size=4, max_size=4, unique=True),
    batches=st.lists(st.lists(_DRAFTS, max_size=4), max_size=4),
    closing=st.lists(_DRAFTS, max_size=3),
    ends=st.tuples(_ENDS, _ENDS, _ENDS),
)
@example(
    names=["a", "b", "c", "d"],
    batches=[[chunk("one"), Draft(RecordKind.CHUNK, bytes(range(256)), plain=True)], [], [chunk("")]],
    closing=[chunk("closer")],
    ends=(turn_end("end"), turn_end("sealed"), turn_end("cancelled")),
)
def test_the_script_and_python_make_the_same_checks(
    url: str, names: list[str], batches: list[list[Draft]], closing: list[Draft], ends: tuple[Draft, ...]
) -> None:
    """A node shows what it wrote before anybody reads it back: a cursor must not depend on which it was."""

    async def run() -> None:
        async with bench_on(url) as bench:
            await _every_way_to_write(bench, names, batches, closing, ends)

    uvloop.run(run())


async def _every_way_to_write(
    bench: Bench, names: list[str], batches: list[list[Draft]], closing: list[Draft], ends: tuple[Draft, ...]
) -> None:
    first, sealed, cancelled, last = names
    expected: list[tuple[str, Draft]] = []
    count, check = 0, ""

    def wrote(turn: str, drafts: Sequence[Draft]) -> str:
        nonlocal check
        expected.extend((turn, draft) for draft in drafts)
        before, check = check, [check, *chained([(turn, draft) for draft in drafts], check)][-1]
        return before

    async def begin(turn: str) -> None:
        wrote(turn, [Draft(RecordKind.TURN_START, f"start {turn}".encode())])
        result = await bench.begin(turn)
        assert not isinstance(result, Begun) or result.start.check == check

    await begin(first)
    await begin(sealed)
    for batch in batches:
        before = wrote(first, batch)
        for _ in range(2):  # the second adds nothing
            result = await bench.append(first, count, batch)
            assert isinstance(result, Appended)
            assert (result.before, result.check) == (before, check)
            before = check
        count += len(batch)
    name, fence = TurnId(first), bench.fences[TurnId(first)]
    before = wrote(first, [*closing, ends[0]])
    result = await bench.journal.end(
        SESSION, name, fence, index=count, reason="x", drafts=[*closing, ends[0]]
    )
    assert isinstance(result, Appended)
    assert (result.before, result.check) == (before, check)
    before = wrote(sealed, [ends[1]])
    result = await bench.journal.seal(SESSION, TurnId(sealed), node=NODE, reason="x", end=ends[1])
    assert isinstance(result, Appended)
    assert (result.before, result.check) == (before, check)
    await bench.cancel(cancelled)
    await begin(cancelled)
    wrote(cancelled, [turn_end("cancelled")])
    await begin(last)
    page = await bench.journal.read(SESSION, after=0, limit_bytes=10**9)
    assert [(record.turn, record.draft) for record in page.records] == expected
    assert [record.cursor.check for record in page.records] == chained(expected)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(_STEPS, min_size=4, max_size=20))
@example(
    steps=[
        ("begin", "a", Overlap.PARALLEL), ("append", "a", 0, 3, True), ("append", "a", -2, 4, False),
        ("begin", "b", Overlap.INTERRUPT), ("append", "a", 1, 1, False), ("end", "a", 0), ("end", "a", -1),
        ("append", "b", 0, 2, True), ("seal", "b"), ("append", "b", 0, 1, False), ("end", "b", 0),
    ]
)  # fmt: skip
@example(steps=[("cancel", "a"), ("begin", "b", Overlap.PARALLEL), ("begin", "a", Overlap.REJECT)])
def test_the_journal_is_what_the_model_says(url: str, steps: list[tuple[Any, ...]]) -> None:
    """Begins, appends with retries and overlaps, cancels, ends, seals in any order: dense, one end each."""

    async def run() -> None:
        async with bench_on(url) as bench:
            await _follow(bench, steps)

    uvloop.run(run())
