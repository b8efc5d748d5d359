"""One turn's way to the journal: what its writer asks, shows, gives up, and holds."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from gateway import turnwriter
from gateway.core.model import By, Draft, NodeId, RecordKind
from gateway.journal import SCRIPTS
from gateway.outcomes import Appended, Ended
from gateway.store import Store, lane
from tests.support.link import Link, script
from tests.support.valkey import running_valkey
from tests.support.writers import SESSION, Writers, eventually, writers_on

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from tests.support.writers import WrittenTurn


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """One server; each test has its own keys."""
    with running_valkey() as url:
        yield url


@pytest.fixture
async def rig(url: str) -> AsyncIterator[Writers]:
    async with writers_on(url) as rig:
        yield rig


def verbs(turn: WrittenTurn) -> list[str]:
    return [verb for verb, _ in turn.node.journal.answers]


async def answered(turn: WrittenTurn, count: int) -> None:
    async def is_answered() -> bool:
        return len(turn.node.journal.answers) >= count

    await eventually(is_answered)


async def sealed(rig: Writers, turn: WrittenTurn) -> None:
    other = rig.node("sealer").journal
    result = await other.seal(
        SESSION, turn.name, node=NodeId(turn.node.name), reason="interrupted", end=turn.start
    )
    assert isinstance(result, Appended)


async def test_what_is_shown_is_what_the_journal_has(rig: Writers) -> None:
    """Subscribers of this node get it before anybody reads it back: the same cursors, the same records."""
    turn, other = await rig.node("n1").begin("t1"), await rig.node("n1").begin("t2")
    for writes in (turn, other, turn):
        writes.say(3)
        await writes.journalled()
    turn.finish(closers=2)
    other.finish()
    await rig.settled()
    records = await rig.records()
    assert rig.node("n1").published == records[2:]


async def test_a_turn_asks_no_more_than_it_must(rig: Writers) -> None:
    """Each batch one call, the end one call, and nothing while nobody asks."""
    turn = await rig.node("n1").begin("t1")
    turn.say(3)
    await turn.journalled()
    turn.say(1)
    turn.finish()
    await turn.journalled()
    turn.writer.verify()
    await answered(turn, 4)
    assert verbs(turn) == ["append", "append", "end", "end"]
    assert turn.node.journal.answers[-1] == ("end", Ended("complete"))


async def test_a_writer_that_was_quiet_says_so(rig: Writers) -> None:
    """A beat asks those of whom nothing was heard since the last one."""
    turn = await rig.node("n1").begin("t1")
    assert not turn.writer.was_quiet()
    assert turn.writer.was_quiet()
    turn.say(1)
    await turn.journalled()
    assert not turn.writer.was_quiet()
    assert turn.writer.was_quiet()
    turn.writer.verify()
    await answered(turn, 2)
    assert not turn.writer.was_quiet()
    assert verbs(turn) == ["append", "ask"]


@pytest.mark.parametrize("says", [0, 2])
async def test_a_sealed_turn_is_given_up(rig: Writers, says: int) -> None:
    """G6: another ended it; neither a batch nor an end follows."""
    turn = await rig.node("n1").begin("t1")
    await sealed(rig, turn)
    before = await rig.records()
    turn.say(says)
    turn.writer.verify()
    await asyncio.wait({turn.task}, timeout=10)
    assert turn.given_up == "fenced"
    turn.say(1)
    turn.finish()
    assert await rig.records() == before


async def test_an_end_that_another_wrote_is_not_ours(rig: Writers) -> None:
    """The journal says how the turn ended, whatever its producer believes."""
    turn = await rig.node("n1").begin("t1")
    await sealed(rig, turn)
    before = await rig.records()
    turn.finish()
    await asyncio.wait({turn.task}, timeout=10)
    assert (turn.given_up, turn.reason) == ("ended", None)
    assert await rig.records() == before


async def test_a_held_turn_that_another_ended_is_let_go(rig: Writers) -> None:
    """Its end was lost and the turn sealed meanwhile: there is one end, and it is not ours."""
    turn = await rig.node("n1").begin("t1")
    snapshot = rig.snapshot()
    turn.finish()
    await turn.journalled()
    snapshot.restore()
    await sealed(rig, turn)
    before = await rig.records()
    turn.writer.verify()
    await asyncio.wait({turn.task}, timeout=10)
    assert turn.task.done()
    assert turn.reason == "complete"
    # Another end was seen at that place, so that it is in a new epoch now.
    assert [record.draft for record in await rig.records()] == [record.draft for record in before]
    assert await rig.epoch() != before[0].cursor.epoch


async def test_a_store_that_calls_it_wrong_is_not_asked_again(rig: Writers) -> None:
    """A bug of ours, or a key of another's: repeating it helps nobody."""
    turn = await rig.node("n1").begin("t1")
    rig.admin.set(rig.keys.turn(turn.name), "no hash")
    turn.say(1)
    await asyncio.wait({turn.task}, timeout=10)
    assert turn.given_up == "refused"


async def test_a_cancel_is_found_with_the_next_batch_or_question(rig: Writers) -> None:
    """Also by a turn that has nothing to say."""
    turn = await rig.node("n1").begin("t1")
    turn.writer.verify()
    await answered(turn, 1)
    assert not turn.cancelled
    await turn.node.journal.cancel(SESSION, turn.name, by=By())
    turn.writer.verify()
    await answered(turn, 2)
    told = [turn.cancelled]
    turn.say(1)
    await answered(turn, 3)
    told.append(turn.cancelled)
    assert told == [1, 2]


async def test_a_batch_whose_reply_was_lost_is_read_back(rig: Writers) -> None:
    """It was carried out, where nobody was told; it is neither written twice nor shown at a wrong place."""
    turn, other = await rig.node("n1").begin("t1"), await rig.node("n2").begin("t2")

    async def meanwhile() -> None:
        other.say(1)
        await other.journalled()

    turn.node.journal.lose, turn.node.journal.meanwhile = 2, meanwhile
    turn.say(3)

    async def is_answered() -> bool:
        return turn.writer.chunks == 3

    await eventually(is_answered)
    assert len(turn.away) == 2
    assert turn.node.published == []
    turn.node.journal.lose, turn.node.journal.meanwhile = 1, None
    turn.finish()
    other.finish()
    await rig.settled()
    assert turn.reason == "complete"


async def test_replies_that_are_lost_on_the_way_change_nothing(
    rig: Writers, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same on a real connection that falls silent: of a batch, of a repair, of the end."""
    monkeypatch.setattr(lane, "OPERATION_TIMEOUT_SECONDS", 0.3)
    async with Link(url, tmp_path) as link, Store(link.url, SCRIPTS) as store:
        turn = await rig.node("n1", store).begin("t1")
        link.lose(script("append"))
        turn.say(3)
        await turn.journalled()
        epoch = await rig.epoch()
        snapshot = rig.snapshot()
        turn.say(3)
        await turn.journalled()
        await eventually(_is_shown(turn, 6))
        before = await rig.records()
        snapshot.restore()
        link.lose(script("repair"))
        link.lose(script("end"))
        turn.say(1)
        turn.finish()
        await rig.settled()
        assert await rig.epoch() == epoch
        assert (await rig.records())[: len(before)] == before
        assert turn.away
        await rig.close()


def _is_shown(turn: WrittenTurn, count: int) -> Callable[[], Awaitable[bool]]:
    async def is_shown() -> bool:
        return turn.writer.chunks == count

    return is_shown


async def test_while_the_loss_is_anothers_it_asks_now_and_then(
    rig: Writers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn with a megabyte to say must not send it again and again to a journal that cannot take it."""
    monkeypatch.setattr(turnwriter, "OTHERS_SECONDS", 0.02)
    turn, gone = await rig.node("n1").begin("t1"), await rig.node("n2").begin("t2")
    snapshot = rig.snapshot()
    gone.say(2)
    await gone.journalled()
    await turn.node.journal.see()
    snapshot.restore()
    began_at = time.monotonic()
    turn.say(2)
    turn.finish()
    await turn.journalled()
    passed = time.monotonic() - began_at
    assert verbs(turn)[0] == "append"
    assert verbs(turn).count("append") == 2  # refused, and then in the new epoch
    assert verbs(turn).count("end") == 1
    assert 1 < verbs(turn).count("ask") <= passed / 0.02 + 2
    assert turn.node.suspected == verbs(turn).count("ask")


async def test_a_held_turn_is_let_go_at_once_and_leaves_no_task(rig: Writers) -> None:
    """A node that stops, or wants the room, does not wait for a store that does not answer."""
    released, cancelled = await rig.node("n1").begin("t1"), await rig.node("n1").begin("t2")
    for turn in (released, cancelled):
        turn.finish()
        await turn.journalled()
    await eventually(_is_held(released))
    await eventually(_is_held(cancelled))
    for turn in (released, cancelled):
        turn.node.journal.lose = 1_000_000
        turn.writer.verify()
    await eventually(_asks_in_vain(released))
    released.released.set()
    cancelled.task.cancel()
    await asyncio.wait({released.task, cancelled.task}, timeout=10)
    assert released.task.done()
    assert cancelled.task.cancelled()
    names = {task.get_name() for task in asyncio.all_tasks()}
    assert not {name for name in names if name.startswith(("held-", "release-", "verify-"))}


def _is_held(turn: WrittenTurn) -> Callable[[], Awaitable[bool]]:
    async def is_held() -> bool:
        return turn.reason is not None

    return is_held


def _asks_in_vain(turn: WrittenTurn) -> Callable[[], Awaitable[bool]]:
    async def asks_in_vain() -> bool:
        return len(turn.away) > 1

    return asks_in_vain


async def test_what_is_lost_in_a_hold_is_shown_where_it_stands(rig: Writers) -> None:
    """The loss of an end: the node's own subscribers have it already, and nothing contradicts them."""
    turn = await rig.node("n1").begin("t1")
    turn.say(1)
    await turn.journalled()
    snapshot = rig.snapshot()
    turn.finish(closers=1)
    await turn.journalled()
    before = await rig.records()
    snapshot.restore()
    turn.writer.verify()
    await turn.journalled()
    assert await rig.records() == before
    await answered(turn, 3)
    assert [record for record in turn.node.published if record not in before] == []


async def test_records_that_are_small_go_in_many_batches(rig: Writers) -> None:
    """G10: a record costs more than its payload; one call with all of them would hold up the whole store."""
    turn = await rig.node("n1").begin("t1")
    drafts = [Draft(RecordKind.CHUNK, b"x")] * 200_000
    turn.drafts += drafts
    turn.writer.add(drafts)
    await eventually(_is_shown(turn, len(drafts)))
    assert set(verbs(turn)) == {"append"}
    counts = [answer.count for _, answer in turn.node.journal.answers if isinstance(answer, Appended)]
    sizes = [after - before for before, after in zip([0, *counts], counts, strict=False)]
    assert sum(sizes) == len(drafts)
    assert max(sizes) <= 10_000
