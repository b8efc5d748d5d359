"""Runs one turn: has the backend read as fast as it writes, journals, ends.

Two tasks share the turn's drafts. :class:`~gateway.answer.Answer` reads the backend and feeds the turn;
:class:`~gateway.turnwriter.TurnWriter` journals whatever there is, and shows it when the journal has it.
Neither waits for any client, and the reader does not wait for the journal.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from gateway import telemetry
from gateway.answer import Answer, Assignment
from gateway.core.model import (
    RECORD_OVERHEAD_BYTES,
    By,
    Cursor,
    EndCode,
    EndReason,
    Record,
    SessionId,
    TurnError,
)
from gateway.core.turn import AbortUpstream, Append, Effect, End, Turn
from gateway.opening import Answered, NotOpened, Opening
from gateway.turnwriter import NotOurs, TurnWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.config import Config
    from gateway.journal import SessionJournal

log = structlog.get_logger(__name__)

HANG_UP_SECONDS = 0.25
"""How long a backend has to close its side after we closed ours. Node's http and uvicorn take below 6 ms."""


@dataclass(slots=True)
class Budget:
    """Bytes of running turns that a node holds.

    Attributes:
        limit: GATEWAY_MAX_BUFFER.
        used: Now. When it reaches the limit, sends are refused; running turns go on.
    """

    limit: int
    used: int = 0

    @property
    def is_full(self) -> bool:
        """Whether the node holds as much as it may."""
        return self.used >= self.limit


class TurnProducer:
    """One turn's task.

    Args:
        assignment: What to do.
        journal: Where to.
        config: For bounds and timeouts.
        budget: Shared by the node's producers.
        publish: Shows records to this node's subscribers; called in journal order.
        suspect: Told when the session's journal lost what others wrote.
        cancelled: Told when the journal says that the turn is to be ended, and by whom.
    """

    def __init__(
        self,
        assignment: Assignment,
        *,
        journal: SessionJournal,
        config: Config,
        budget: Budget,
        publish: Callable[[SessionId, Sequence[Record]], None],
        suspect: Callable[[SessionId], None],
        cancelled: Callable[[By], None],
    ) -> None:
        self.assignment = assignment
        self.ended: asyncio.Future[EndReason | None] = asyncio.get_running_loop().create_future()
        """Resolves when the ``turn-end`` is journalled; ``None``: another ended it, or nobody could."""
        self._config = config
        self._budget = budget
        self._turn = Turn(message_id=assignment.answer_id, max_bytes=config.max_turn_bytes)
        self._answer = Answer(assignment, turn=self._turn, config=config, perform=self._perform)
        self._writer = TurnWriter(
            assignment,
            journal=journal,
            publish=publish,
            suspect=suspect,
            cancelled=cancelled,
            away=self._store_is_away,
        )
        self._released = asyncio.Event()
        self._bytes = 0
        self._held_bytes = len(assignment.call.body)
        self._reading: asyncio.Task[None] | None = None
        self._aborting: asyncio.Task[None] | None = None
        self._begun_at = time.monotonic()

    @property
    def opening(self) -> asyncio.Future[Opening]:
        """What the backend answers with."""
        return self._answer.opening

    @property
    def start(self) -> Cursor:
        """Where the ``turn-start`` stands, as far as is known."""
        return self._writer.start

    @property
    def held_bytes(self) -> int:
        """What the turn takes in memory: its body and its records."""
        return self._held_bytes

    async def run(self) -> None:
        """Do it all; returns when the turn has ended and is not held any more.

        Never raises for what a backend or the store does.
        """
        self._reading = asyncio.create_task(self._answer.read(), name=f"read-{self.assignment.turn}")
        telemetry.running_turns.inc()
        self._budget.used += self._held_bytes
        telemetry.buffered_bytes.inc(self._held_bytes)
        reason: EndReason | None = None
        try:
            try:
                reason = await self._writer.write()
            except NotOurs as error:
                log.warning(
                    "turn.given-up", session=self.assignment.session, turn=self.assignment.turn, why=error.why
                )
            finally:
                self._let_go()
                telemetry.running_turns.dec()
                self.ended.set_result(reason)
                self._log_end(reason)
                await self._stop_tasks()
            if reason is not None:
                await self._writer.hold(self._released)
        finally:
            self._writer.forget()
            self._budget.used -= self._held_bytes
            telemetry.buffered_bytes.dec(self._held_bytes)

    def release(self) -> None:
        """Do not keep the turn beyond its end."""
        self._released.set()

    def verify(self) -> None:
        """Look soon how the turn stands in the journal."""
        self._writer.verify()

    def was_quiet(self) -> bool:
        """Whether nothing was asked of the journal since the last time that this was called."""
        return self._writer.was_quiet()

    def cancel(self, by: By) -> None:
        """A client asked for the end. Idempotent; :attr:`ended` tells when it is done."""
        self._perform(self._turn.cancel(by))

    def interrupt(self, error: TurnError) -> None:
        """The node gives the turn up."""
        self._perform(self._turn.interrupted(error))

    # -- performing what the core decided

    def _perform(self, effects: Sequence[Effect]) -> None:
        """One input's effects, in order. No await: what is decided together is done together."""
        for effect in effects:
            match effect:
                case Append(drafts):
                    self._writer.add(drafts)
                    size = sum(len(draft.payload) for draft in drafts)
                    held = size + RECORD_OVERHEAD_BYTES * len(drafts)
                    self._bytes += size
                    self._held_bytes += held
                    self._budget.used += held
                    telemetry.buffered_bytes.inc(held)
                case AbortUpstream():
                    self._aborting = asyncio.create_task(self._abort(), name=f"abort-{self.assignment.turn}")
                case End():
                    self._writer.refusal = self._answer.refusal
                    self._writer.finish(effect)
                    self._answer.resolve(NotOpened(effect))

    async def _abort(self) -> None:
        """Close the backend's connection: ours first, then wait a moment for its word that it knows."""
        asked_at = time.monotonic()
        reading = self._reading
        if reading is not None and not reading.done():
            if self.assignment.call.hang_up():
                await asyncio.wait({reading}, timeout=HANG_UP_SECONDS)
            if not reading.done():
                reading.cancel()
                await asyncio.wait({reading}, timeout=1.0)
        telemetry.cancel_seconds.observe(time.monotonic() - asked_at)
        log.info("upstream.closed", session=self.assignment.session, turn=self.assignment.turn)
        self._perform(self._turn.aborted())

    def _store_is_away(self, seconds: float) -> None:
        """Past GATEWAY_OUTAGE the backend is not made to talk to nobody."""
        if seconds > self._config.outage_seconds and not self.ended.done():
            self.interrupt(TurnError(EndCode.STORE_LOST, "the store was away for too long"))
            self._let_go()

    def _let_go(self) -> None:
        self._answer.resolve(NotOpened(self._writer.end))
        opening = self.opening.result()
        if self._reading is not None and not (isinstance(opening, Answered) and self.assignment.takes_answer):
            self._reading.cancel()

    async def _stop_tasks(self) -> None:
        tasks = {task for task in (self._reading, self._aborting) if task is not None}
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("turn.failed", session=self.assignment.session, exc_info=error)

    def _log_end(self, reason: EndReason | None) -> None:
        end = self._writer.end
        telemetry.turns_ended.labels(reason=reason or "given-up").inc()
        log.info(
            "turn.ended",
            session=self.assignment.session,
            turn=self.assignment.turn,
            reason=reason,
            code=end.error.code if end is not None and end.error is not None else None,
            chunks=self._writer.chunks,
            bytes=self._bytes,
            seconds=round(time.monotonic() - self._begun_at, 3),
        )
