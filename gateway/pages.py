"""Reading the journal back for those who catch up: once for all at the same place, and bounded.

However many catch up at once, each shard is asked for :data:`MAX_READS` pages at a time, and the store for
some 8 MiB altogether; who waits is served in the order of asking, and who is gone is not read for.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway import telemetry
from gateway.journal import PAGE_BYTES

if TYPE_CHECKING:
    from gateway.core.model import SessionId
    from gateway.journal import SessionJournal
    from gateway.outcomes import Page
    from gateway.store import Shard

MAX_READS = 64
"""Pages of one shard that may be on their way at once: what waits for a server must not wait for another."""

ALL_PAGES_BYTES = 8 * 1024 * 1024
"""What the pages of all who wait may hold together, as long as each gets the least."""

LEAST_PAGE_BYTES = 64 * 1024
"""Below it a page is not worth its round trip."""


@dataclass(slots=True, eq=False)
class _Reading:
    """One page that is wanted.

    Attributes:
        waiting: How many wait for it.
        has_begun: It is no use to take it back: the store has been asked.
        page: Comes with it.
    """

    page: asyncio.Future[Page]
    waiting: int = 0
    has_begun: bool = False


class Pages:
    """The pages that a node reads for those who catch up.

    Args:
        journal: Where they are.
    """

    def __init__(self, journal: SessionJournal) -> None:
        self._journal = journal
        # FIFO, and a waiter that is cancelled leaves it.
        self._slots: defaultdict[Shard | None, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(MAX_READS)
        )
        self._readings: dict[tuple[SessionId, int, str], _Reading] = {}

    async def read(self, session: SessionId, *, after: int, check: str) -> Page:
        """Records after an offset, if the record there is the one of ``check``.

        Raises:
            StoreUnavailable: The store is away.
            StoreError: It refused.
        """
        key = (session, after, check)
        reading = self._readings.get(key)
        if reading is None:
            task = asyncio.create_task(self._read(*key), name=f"page-{session}")
            task.add_done_callback(lambda done: self._was_read(key, done))
            reading = self._readings[key] = _Reading(task)
        reading.waiting += 1
        try:
            # One of those who wait may be cancelled; the others still want it.
            return await asyncio.shield(reading.page)
        finally:
            reading.waiting -= 1
            if not reading.waiting and not reading.has_begun and self._readings.get(key) is reading:
                del self._readings[key]  # whoever asks for the same from here on gets one of its own
                reading.page.cancel()

    async def _read(self, session: SessionId, after: int, check: str) -> Page:
        async with self._slots[self._journal.shard_of(session)]:
            self._readings[session, after, check].has_begun = True
            telemetry.pages_read.inc()
            return await self._journal.read(session, after=after, check=check, limit_bytes=self._limit_bytes)

    @property
    def _limit_bytes(self) -> int:
        """Of one page, now: the more are wanted, the smaller."""
        return min(PAGE_BYTES, max(LEAST_PAGE_BYTES, ALL_PAGES_BYTES // len(self._readings)))

    def _was_read(self, key: tuple[SessionId, int, str], done: asyncio.Task[Page]) -> None:
        reading = self._readings.get(key)
        if reading is not None and reading.page is done:
            del self._readings[key]
        if not done.cancelled():
            done.exception()  # retrieved, also when everybody who asked is gone

    async def close(self) -> None:
        """End what runs."""
        tasks = [reading.page for reading in self._readings.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
