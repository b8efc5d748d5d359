"""Reads into a tail what was journalled elsewhere, once for all who are attached.

One task for each tail that is behind; what it is told of meanwhile is one more round of it. A journal that
does not join what the tail has may have lost something: nobody is shown more until it is repaired, or is
found to be another one.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING

import structlog

from gateway.outcomes import Seen
from gateway.store import StoreError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.core.tail import Tail
    from gateway.journal import SessionJournal
    from gateway.outcomes import Page
    from gateway.repairs import Repairs
    from gateway.store import Shard

log = structlog.get_logger(__name__)

RETRY_SECONDS = 0.5

MAX_LOOKS = 64
"""Looks at the journal of one shard on their way at once, beside the pages of those who catch up."""

PAGE_BYTES = 64 * 1024
"""What a tail reads at once: less than half of what it holds, so that who follows finds it there."""

MAX_DOUBTS = 2
"""How often a repair is waited for before everybody attached is told to begin anew."""


class TailReader:
    """Keeps tails at the end of their journals.

    Args:
        journal: Where.
        repairs: Told of a journal that has lost what was shown.
        lose: Told of a tail whose journal is gone.
    """

    def __init__(self, journal: SessionJournal, repairs: Repairs, lose: Callable[[Tail], None]) -> None:
        self._journal = journal
        self._repairs = repairs
        self._lose = lose
        self._tasks: dict[Tail, asyncio.Task[None]] = {}
        self._looks: defaultdict[Shard | None, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(MAX_LOOKS)
        )
        self._now = asyncio.get_running_loop().time

    def look_soon(self, tail: Tail) -> None:
        """Something was journalled, or may have been; returns at once."""
        tail.behind = True
        if tail not in self._tasks:
            name = f"tail-{tail.session}"
            self._tasks[tail] = asyncio.create_task(self._catch_up(tail), name=name)

    def is_reading(self, tail: Tail) -> bool:
        """Whether it is looked at already."""
        return tail in self._tasks

    async def close(self) -> None:
        """End what runs."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    async def _catch_up(self, tail: Tail) -> None:
        """Read what is new into the tail, until nothing has been told of since."""
        doubts = 0
        try:
            while tail.behind and tail.subscribers and not tail.lost:
                tail.behind = False  # what is journalled from here on, and told, is looked for again
                try:
                    if tail.in_doubt:
                        await self._wait_for_repair(tail)
                    async with self._looks[self._journal.shard_of(tail.session)]:
                        try:
                            await self._look_once(tail, is_last_try=doubts >= MAX_DOUBTS)
                        except (StoreUnavailable, StoreError):
                            tail.behind = True
                            # In its slot: a server that refuses at once is asked MAX_LOOKS times in so long.
                            await asyncio.sleep(RETRY_SECONDS)
                            continue
                except (StoreUnavailable, StoreError):
                    tail.behind = True
                    await asyncio.sleep(RETRY_SECONDS)
                else:
                    doubts += tail.in_doubt
        except Exception:
            # Whoever is attached would wait for ever.
            log.exception("tail.failed", session=tail.session)
            self._lose(tail)
        finally:
            self._tasks.pop(tail, None)

    async def _wait_for_repair(self, tail: Tail) -> None:
        self._repairs.suspect(tail.session)
        seen = Seen(tail.epoch or "", tail.last or 0, tail.check)
        await self._repairs.settled(tail.session, until=seen)

    async def _look_once(self, tail: Tail, *, is_last_try: bool) -> None:
        after = tail.last
        if after is None or not tail.epoch:
            await self._find_end(tail)
            return
        page = await self._journal.read(tail.session, after=after, check=tail.check, limit_bytes=PAGE_BYTES)
        tail.looked_at = self._now()
        if page.epoch not in {"", tail.epoch}:
            self._lose(tail)
        elif page.epoch and page.joins and self._take(tail, page):
            self._end_doubt(tail)
        elif is_last_try or (not page.epoch and tail.in_doubt):
            self._lose(tail)
        else:
            log.warning("tail.doubt", session=tail.session, after=after, last=page.last)
            tail.in_doubt = tail.behind = True

    def _take(self, tail: Tail, page: Page) -> bool:
        """False: the tail has had other records meanwhile than the journal has."""
        if page.records:
            if not tail.add(page.records):
                return False
            tail.wake()
        if page.last > (tail.last or 0):
            if page.records:
                tail.behind = True
            else:  # trimmed beyond the tail's end: who reads back is told
                tail.skip_to(page.last, page.epoch, page.last_check, tail.running)
                tail.wake()
        return True

    def _end_doubt(self, tail: Tail) -> None:
        if tail.in_doubt:
            log.info("tail.repaired", session=tail.session, last=tail.last)
            tail.in_doubt = False
            tail.wake()

    async def _find_end(self, tail: Tail) -> None:
        """Of a journal that the tail does not know yet; subscribers read what is before."""
        look = await self._journal.look(tail.session)
        tail.looked_at = self._now()
        if tail.epoch:
            tail.behind = True  # it began, and was published, during the look
        elif tail.last is None or look.last > tail.last:
            running = [turn.turn for turn in look.turns if turn.is_running]
            tail.skip_to(look.last, look.epoch, look.last_check, running)
            tail.wake()
