"""What clients ask of a running turn by way of the store, on any node: performed by who produces the turn.

A cancel marks the turn's hash. An abort, which may be a Stop or not, leaves its deadline there: whoever is on
any wire of any node takes it back by resuming the session, and who takes it need not live until then. Both
ring; a bell that was lost costs no more than the time to the producer's next look at the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from gateway.core.model import By, EndReason, SessionId, TurnId
from gateway.outcomes import Cancelling
from gateway.store import StoreError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from gateway.journal import SessionJournal
    from gateway.producer import TurnProducer

log = structlog.get_logger(__name__)

RETRY_SECONDS = 1.0

MARGIN_SECONDS = 0.01
"""The loop's timers may be a millisecond early, and the store's clock is the judge."""

LOOK_SECONDS = 0.25
"""How often an abort is looked at that was not due when its grace was over here."""

NOBODY = By()


@dataclass(slots=True)
class PendingAbort:
    """An abort of a turn that runs here.

    Attributes:
        by: Who, as far as this node knows.
        taken_back: Set when the session was resumed here.
    """

    by: By
    taken_back: asyncio.Event = field(default_factory=asyncio.Event)


class Aborts:
    """The aborts and cancels of the turns that a node produces.

    Args:
        journal: Where they stand.
        grace_seconds: GATEWAY_ABORT_GRACE.
        get: The producer of a turn that runs here.
        cancel: Performs a cancel of a turn that runs here.
        spawn: Runs something that outlives whoever asked for it.

    Attributes:
        pending: Those whose grace runs.
    """

    def __init__(
        self,
        journal: SessionJournal,
        *,
        grace_seconds: float,
        get: Callable[[SessionId, TurnId], TurnProducer | None],
        cancel: Callable[[SessionId, TurnId, By], object],
        spawn: Callable[[Coroutine[object, object, None], str], None],
    ) -> None:
        self.pending: dict[tuple[SessionId, TurnId], PendingAbort] = {}
        self._journal = journal
        self._grace_seconds = grace_seconds
        self._get = get
        self._cancel = cancel
        self._spawn = spawn

    def look(self, session: SessionId, turn: TurnId) -> None:
        """Something of a turn was changed: see what. Returns at once."""
        if self._get(session, turn) is not None:
            self._spawn(self._look(session, turn), f"look-{turn}")

    async def _look(self, session: SessionId, turn: TurnId) -> None:
        try:
            known = await self._journal.turn(session, turn)
        except (StoreUnavailable, StoreError):
            return  # its producer finds out as soon as the store is back
        if known is None:
            return
        if known.state in {"cancelling", EndReason.CANCELLED}:
            self._cancel(session, turn, known.by or NOBODY)
        elif known.abort_pending:
            self.wait(session, turn, known.by or NOBODY)

    def wait(self, session: SessionId, turn: TurnId, by: By) -> None:
        """Cancel a turn after the grace, if it runs here, unless :meth:`take_back` comes first."""
        pending = self.pending.get((session, turn))
        if pending is None:
            pending = self.pending[session, turn] = PendingAbort(by)
            self._spawn(self._wait(session, turn, pending), f"abort-later-{turn}")
        elif pending.by == NOBODY:
            pending.by = by

    async def _wait(self, session: SessionId, turn: TurnId, pending: PendingAbort) -> None:
        """The deadline stands in the turn's hash; this wakes up to look at it."""
        seconds = self._grace_seconds + MARGIN_SECONDS
        try:
            while self._get(session, turn) is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await pending.taken_back.wait()
                if pending.taken_back.is_set():
                    return
                # Too early by the store's clock, put off by a second abort, taken back elsewhere: look again.
                seconds = min(self._grace_seconds, LOOK_SECONDS)
                try:
                    # Once it is asked for, its answer counts: the turn may be marked.
                    mark = await self._journal.cancel(session, turn, by=pending.by, only_due=True)
                    if isinstance(mark, Cancelling):
                        self._cancel(session, turn, pending.by)
                        return
                    known = await self._journal.turn(session, turn)
                except (StoreUnavailable, StoreError):
                    seconds = RETRY_SECONDS
                    continue
                if known is None or not known.abort_pending:
                    return
        finally:
            if self.pending.get((session, turn)) is pending:
                del self.pending[session, turn]

    def take_back(self, session: SessionId, turn: TurnId) -> None:
        """The session was resumed: the abort was no Stop. Returns at once."""
        self._dismiss(session, turn)
        self._spawn(self._forget(session, turn), f"keep-{turn}")

    async def _forget(self, session: SessionId, turn: TurnId) -> None:
        """Until it is due; then it is too late."""
        give_up_at = time.monotonic() + self._grace_seconds
        while True:
            try:
                await self._journal.abort(session, turn, by=NOBODY, seconds=None)
            except StoreUnavailable as error:
                if time.monotonic() > give_up_at:
                    log.warning("turn.abort-not-taken-back", session=session, turn=turn, error=str(error))
                    return
                await asyncio.sleep(min(RETRY_SECONDS, self._grace_seconds / 4))
            except StoreError as error:
                log.warning("turn.abort-not-taken-back", session=session, turn=turn, error=str(error))
                return
            else:
                self._dismiss(session, turn)  # a bell that came late may have told of it once more
                return

    def _dismiss(self, session: SessionId, turn: TurnId) -> None:
        pending = self.pending.pop((session, turn), None)
        if pending is not None:
            pending.taken_back.set()
