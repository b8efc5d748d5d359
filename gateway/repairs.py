"""What a node does about a journal that has lost what was seen of it: a failover lost the newest records.

Producers write back what they hold of their own turns, on whichever node. Who notices a loss that is not its
own (a reader, a send, a seal) comes here: this node's producers are asked to look, the others are given time,
and what nobody has written back by then is gone: the journal gets a new epoch, and every client is told.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING

import structlog

from gateway import telemetry
from gateway.store import StoreError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.core.model import Cursor, SessionId
    from gateway.journal import SessionJournal
    from gateway.outcomes import Look, Seen

log = structlog.get_logger(__name__)

LOOK_SECONDS = 0.1
RETRY_SECONDS = 0.5
CLOSE_SECONDS = 2.0


class Repairs:
    """The sessions of a node whose journal lost something.

    Args:
        journal: Whose.
        wait_seconds: How long others have to write back what they hold.

    Attributes:
        verify: Has this node's producers of a session look at the journal.
        renewed: Told of a session that this node has given a new epoch.
    """

    def __init__(self, journal: SessionJournal, *, wait_seconds: float) -> None:
        self.verify: Callable[[SessionId], None] = lambda _: None
        self.renewed: Callable[[SessionId], None] = lambda _: None
        self._journal = journal
        self._wait_seconds = wait_seconds
        self._tasks: dict[SessionId, asyncio.Task[None]] = {}

    def suspect(self, session: SessionId) -> None:
        """A journal was found shorter than what was seen of it, or with another history."""
        if session not in self._tasks:
            task = asyncio.create_task(self._repair(session), name=f"repair-{session}")
            self._tasks[session] = task
            task.add_done_callback(lambda done: self._done(session, done))

    async def settled(self, session: SessionId, *, until: Cursor | Seen | None = None) -> None:
        """Wait until a session's journal can be used again; not longer than others have to repair it.

        Args:
            session: Whose.
            until: A place that is to be there again; one that a client says it has had, this node may never
                have seen.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + 2 * self._wait_seconds
        task = self._tasks.get(session)
        if task is not None:
            await asyncio.wait({task}, timeout=2 * self._wait_seconds)
        if until is None:
            return
        give_up_at = min(give_up_at, loop.time() + self._wait_seconds)
        while loop.time() < give_up_at:
            look = await self._journal.look(session)
            if look.epoch != until.epoch or look.last >= until.offset:
                return
            await asyncio.sleep(LOOK_SECONDS)

    async def close(self) -> None:
        """End what runs."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)

    async def _repair(self, session: SessionId) -> None:
        seen = self._journal.seen(session)
        log.warning("journal.rewound", session=session, epoch=seen.epoch, seen=seen.offset)
        self.verify(session)
        loop = asyncio.get_running_loop()
        renew_at = loop.time() + self._wait_seconds
        while True:
            try:
                look = await self._journal.look(session)
                if look.epoch != seen.epoch or not look.rewound:
                    return
                if loop.time() >= renew_at:
                    if await self._journal.renew(session, secrets.token_hex(8)):
                        self._tell(session, seen, look)
                    return
            except (StoreUnavailable, StoreError):
                await asyncio.sleep(RETRY_SECONDS)
                renew_at = loop.time() + self._wait_seconds  # nobody could write anything back meanwhile
            await asyncio.sleep(LOOK_SECONDS)

    def _tell(self, session: SessionId, seen: Seen, look: Look) -> None:
        telemetry.renewed_epochs.inc()
        log.error("journal.renewed", session=session, epoch=seen.epoch, seen=seen.offset, found=look.last)
        self.renewed(session)

    def _done(self, session: SessionId, task: asyncio.Task[None]) -> None:
        del self._tasks[session]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("repair.failed", session=session, exc_info=error)
