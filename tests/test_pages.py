"""Pages for those who catch up: however many they are, little is asked for at once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from gateway import journal, pages
from gateway.core.model import By, Draft, NodeId, Overlap, RecordKind, SessionId, TurnId
from gateway.journal import SessionJournal
from gateway.pages import Pages
from gateway.store import Shard, Store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway.outcomes import Page

SESSION = SessionId("chat")


class GatedJournal(SessionJournal):
    """The real one; its pages can be held back."""

    def __init__(self, store: Store, prefix: str) -> None:
        super().__init__(store, node=NodeId("n"), prefix=prefix, ttl_seconds=60, window_seconds=60)
        self.asked: list[int] = []
        self.limits: list[int] = []
        self.under_way = 0
        self.most = 0
        self.gate = asyncio.Event()

    async def read(
        self, session: SessionId, *, after: int, check: str = "", limit_bytes: int = journal.PAGE_BYTES
    ) -> Page:
        """As the base class."""
        self.asked.append(after)
        self.limits.append(limit_bytes)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await self.gate.wait()
            return await super().read(session, after=after, check=check, limit_bytes=limit_bytes)
        finally:
            self.under_way -= 1


@pytest.fixture
async def gated(valkey_url: str, request: pytest.FixtureRequest) -> AsyncIterator[GatedJournal]:
    async with Store(valkey_url, journal.SCRIPTS) as store:
        found = GatedJournal(store, f"pages-{request.node.name[:40]}".replace("[", "-"))
        start = Draft(RecordKind.TURN_START, b"start")
        await found.begin(
            SESSION, TurnId("turn"), token="token", new_epoch="aa", digest="d", overlap=Overlap.PARALLEL,
            path="/", by=By(), start=start, cancelled=start,
        )  # fmt: skip
        yield found


def ask(wanted: Pages, after: int, check: str = "") -> asyncio.Task[Page]:
    return asyncio.create_task(wanted.read(SESSION, after=after, check=check), name=f"ask-{after}")


async def turn_over(times: int = 5) -> None:
    """Let the loop run, so that what can happen has happened."""
    for _ in range(times):
        await asyncio.sleep(0)


async def test_few_are_under_way_and_all_are_served_in_order(gated: GatedJournal) -> None:
    """Five thousand clients come back at once (G10)."""
    wanted = Pages(gated)
    tasks = [ask(wanted, after) for after in range(1000)]
    await turn_over()
    assert gated.under_way == pages.MAX_READS
    gated.gate.set()
    async with asyncio.timeout(10):
        await asyncio.gather(*tasks)
    assert gated.most == pages.MAX_READS
    assert gated.asked == list(range(1000))
    assert not wanted._readings


class TwoShards(GatedJournal):
    """What is gated is on one of them."""

    def shard_of(self, session: SessionId) -> Shard | None:
        """As the base class."""
        shard = super().shard_of(session)
        assert shard is not None
        return shard if session == SESSION else Shard("other", shard.pool)

    async def read(
        self, session: SessionId, *, after: int, check: str = "", limit_bytes: int = journal.PAGE_BYTES
    ) -> Page:
        """As the base class."""
        read = super().read if session == SESSION else super(GatedJournal, self).read
        return await read(session, after=after, check=check, limit_bytes=limit_bytes)


async def test_a_shard_that_does_not_answer_keeps_no_other_waiting(valkey_url: str) -> None:
    """One of three is frozen; two thirds of the users must not see it (FAULTS R17)."""
    async with Store(valkey_url, journal.SCRIPTS) as store:
        gated = TwoShards(store, "pages-shards")
        wanted = Pages(gated)
        stuck = [ask(wanted, after) for after in range(2 * pages.MAX_READS)]
        await turn_over()
        assert gated.under_way == pages.MAX_READS
        async with asyncio.timeout(10):
            page = await wanted.read(SessionId("elsewhere"), after=0, check="")
        assert (page.last, gated.under_way) == (0, pages.MAX_READS)
        await wanted.close()
        await asyncio.wait(stuck)


async def test_pages_shrink_when_many_are_wanted(gated: GatedJournal) -> None:
    """All together some 8 MiB; alone as much as a page holds; never so little that it is not worth asking."""
    gated.gate.set()
    wanted = Pages(gated)
    async with asyncio.timeout(10):
        await ask(wanted, 0)
        await asyncio.gather(*(ask(wanted, after) for after in range(96)))
        await asyncio.gather(*(ask(wanted, after) for after in range(1000)))
    assert gated.limits[0] == journal.PAGE_BYTES
    assert gated.limits[1] == pages.ALL_PAGES_BYTES // 96
    assert gated.limits[97] == pages.LEAST_PAGE_BYTES
    assert gated.limits[-1] > pages.LEAST_PAGE_BYTES  # only those under way are left


async def test_who_is_gone_is_not_read_for(gated: GatedJournal) -> None:
    """Clients that give up while they wait must not keep those behind them waiting."""
    wanted = Pages(gated)
    tasks = [ask(wanted, after) for after in range(200)]
    second = ask(wanted, 100)
    await turn_over()
    for task in tasks[pages.MAX_READS : 199]:
        task.cancel()
    await turn_over()
    gated.gate.set()
    async with asyncio.timeout(10):
        await asyncio.gather(tasks[199], second)
    assert gated.asked == [*range(pages.MAX_READS), 100, 199]
    async with asyncio.timeout(10):
        await asyncio.gather(*tasks[: pages.MAX_READS])
    assert not wanted._readings


async def test_who_asks_again_for_what_another_gave_up_gets_it(gated: GatedJournal) -> None:
    """The reading that was taken back is not the one that the next is given."""
    wanted = Pages(gated)
    others = [ask(wanted, after) for after in range(pages.MAX_READS)]
    await turn_over()
    given_up = ask(wanted, 100)
    await turn_over()
    given_up.cancel()
    await turn_over(1)
    again = ask(wanted, 100)
    gated.gate.set()
    async with asyncio.timeout(10):
        page = await again
        await asyncio.gather(*others)
    assert not page.joins  # the journal ends before
    assert gated.asked.count(100) == 1


async def test_the_same_place_in_two_histories_is_two_pages(gated: GatedJournal) -> None:
    """What joins one client's last record need not join another's."""
    gated.gate.set()
    wanted = Pages(gated)
    async with asyncio.timeout(10):
        right, wrong, same = await asyncio.gather(
            ask(wanted, 1), ask(wanted, 1, "00000000"), ask(wanted, 1, "00000000")
        )
    assert (right.joins, wrong.joins) == (True, False)
    assert wrong is same
    assert len(gated.asked) == 2


async def test_closing_ends_what_is_under_way(gated: GatedJournal) -> None:
    """A page that hangs must not outlive the node."""
    wanted = Pages(gated)
    task = ask(wanted, 0)
    await turn_over()
    await wanted.close()
    async with asyncio.timeout(10):
        await asyncio.wait({task})
    assert task.cancelled()
    assert gated.under_way == 0
