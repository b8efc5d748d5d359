"""Runs one turn: has the backend read as fast as it writes, journals, ends.

Two tasks share the turn's drafts. :class:`~gateway.answer.Answer` reads the backend and feeds the turn; the
producer journals whatever there is, a batch a call, and shows it when the journal has it. Neither waits for
any client, and the reader does not wait for the journal. The drafts are kept to the turn's end, so that a
batch whose fate is unknown can be repeated.
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
    By,
    Cursor,
    Draft,
    EndCode,
    EndReason,
    Record,
    SessionId,
    TurnError,
    turn_tag,
)
from gateway.core.turn import AbortUpstream, Append, Effect, End, Turn
from gateway.core.wire import turn_end
from gateway.opening import Answered, NotOpened, Opening
from gateway.outcomes import Appended, Behind, Ended
from gateway.store import StoreError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.config import Config
    from gateway.journal import SessionJournal

log = structlog.get_logger(__name__)

HANG_UP_SECONDS = 0.25
"""How long a backend has to close its side after we closed ours. Node's http and uvicorn take below 6 ms."""

BATCH_BYTES = 1024 * 1024
"""What one append carries at the most, give or take a record."""

RETRY_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Between attempts to reach the store; the last one again and again."""


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
        lost: Tells that the session's journal is gone.
    """

    def __init__(
        self,
        assignment: Assignment,
        *,
        journal: SessionJournal,
        config: Config,
        budget: Budget,
        publish: Callable[[SessionId, Sequence[Record]], None],
        lost: Callable[[SessionId], None],
    ) -> None:
        self.assignment = assignment
        self.ended: asyncio.Future[EndReason | None] = asyncio.get_running_loop().create_future()
        """Resolves when the ``turn-end`` is journalled; ``None``: another ended it, or nobody could."""
        self._journal = journal
        self._config = config
        self._budget = budget
        self._publish = publish
        self._lost = lost
        self._turn = Turn(message_id=assignment.answer_id, max_bytes=config.max_turn_bytes)
        self._answer = Answer(assignment, turn=self._turn, config=config, perform=self._perform)
        self._drafts: list[Draft] = []
        self._stored = 0
        self._bytes = 0
        self._held_bytes = len(assignment.call.body)
        self._end: End | None = None
        self._dirty = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self._aborting: asyncio.Task[None] | None = None
        self._begun_at = time.monotonic()
        self._tag = turn_tag(assignment.turn)

    @property
    def opening(self) -> asyncio.Future[Opening]:
        """What the backend answers with."""
        return self._answer.opening

    async def run(self) -> None:
        """Do it all; returns when the turn has ended. Never raises for what a backend or Redis does."""
        self._reading = asyncio.create_task(self._answer.read(), name=f"read-{self.assignment.turn}")
        telemetry.running_turns.inc()
        self._budget.used += self._held_bytes
        telemetry.buffered_bytes.inc(self._held_bytes)
        reason: EndReason | None = None
        try:
            reason = await self._write()
        finally:
            self._let_go()
            telemetry.running_turns.dec()
            self._budget.used -= self._held_bytes
            telemetry.buffered_bytes.dec(self._held_bytes)
            self.ended.set_result(reason)
            self._log_end(reason)
            await self._stop_tasks()

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
                    self._drafts += drafts
                    size = sum(len(draft.payload) for draft in drafts)
                    self._bytes += size
                    self._held_bytes += size
                    self._budget.used += size
                    telemetry.buffered_bytes.inc(size)
                case AbortUpstream():
                    self._aborting = asyncio.create_task(self._abort(), name=f"abort-{self.assignment.turn}")
                case End():
                    self._end = effect
        if effects:
            self._dirty.set()

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

    # -- journalling

    async def _write(self) -> EndReason | None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            while self._stored < len(self._drafts):
                if not await self._append():
                    return None
            if self._end is not None and self._stored == len(self._drafts):
                self._answer.resolve(NotOpened(self._end))
                return await self._append_end(self._end)

    async def _append(self) -> bool:
        """One batch; False when this turn is no longer ours to write."""
        index = self._stored
        batch: list[Draft] = []
        size = 0
        while index + len(batch) < len(self._drafts) and size < BATCH_BYTES:
            batch.append(self._drafts[index + len(batch)])
            size += len(batch[-1].payload)
        turn = self.assignment
        attempt = 0
        while True:
            asked_at = time.monotonic()
            try:
                result = await self._journal.append(
                    turn.session, turn.turn, turn.fence, index=index, drafts=batch
                )
            except StoreUnavailable:
                attempt += 1
                await self._wait_for_store(attempt)
                continue
            except StoreError:
                return self._give_up("refused")
            break
        telemetry.append_seconds.observe(time.monotonic() - asked_at)
        match result:
            case Appended():
                self._stored = index + len(batch)
                self._show(result, batch, certain=attempt == 0)
                if result.state == "cancelling":
                    self._perform(self._turn.cancel(By()))
                return True
            case Behind(count):
                self._stored = count
                return True
            case _:
                return self._give_up(type(result).__name__.lower())

    async def _append_end(self, end: End) -> EndReason | None:
        drafts = [*end.closers, turn_end(end)]
        turn = self.assignment
        attempt = 0
        while True:
            try:
                result = await self._journal.end(
                    turn.session,
                    turn.turn,
                    turn.fence,
                    index=self._stored,
                    reason=end.reason,
                    drafts=drafts,
                    refusal=self._answer.refusal,
                )
            except StoreUnavailable:
                attempt += 1
                await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS)) - 1])
                continue
            except StoreError:
                self._give_up("refused")
                return None
            break
        match result:
            case Appended():
                self._show(result, drafts, certain=attempt == 0)
                return end.reason
            case Ended(reason) if attempt and reason == end.reason:
                self._publish(turn.session, ())
                return end.reason
            case Behind(count):
                self._stored = count
                self._dirty.set()
                return await self._write()
            case _:
                self._give_up(type(result).__name__.lower())
                return None

    async def _wait_for_store(self, attempt: int) -> None:
        """Back off; past GATEWAY_OUTAGE the backend is not made to talk to nobody."""
        if sum(RETRY_SECONDS[:attempt]) + max(0, attempt - len(RETRY_SECONDS)) > self._config.outage_seconds:
            error = TurnError(EndCode.STORE_LOST, "the store was away for too long")
            self._perform(self._turn.interrupted(error))
            self._let_go()
        await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS)) - 1])

    def _show(self, result: Appended, drafts: Sequence[Draft], *, certain: bool) -> None:
        """Give this node's subscribers what the journal has now."""
        turn = self.assignment
        if not certain:
            # An earlier attempt may have written some of it at other offsets: let them read it back.
            self._publish(turn.session, ())
            return
        first = result.last - len(drafts) + 1
        records = [
            Record(Cursor(result.epoch, first + number, self._tag), turn.turn, draft)
            for number, draft in enumerate(drafts)
        ]
        self._publish(turn.session, records)

    def _give_up(self, why: str) -> bool:
        """The journal says that this turn is not ours any more: stop the backend, write nothing."""
        log.warning("turn.given-up", session=self.assignment.session, turn=self.assignment.turn, why=why)
        if why == "lost":
            self._lost(self.assignment.session)
        self._let_go()
        return False

    def _let_go(self) -> None:
        self._answer.resolve(NotOpened(self._end))
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
        end = self._end
        telemetry.turns_ended.labels(reason=reason or "given-up").inc()
        log.info(
            "turn.ended",
            session=self.assignment.session,
            turn=self.assignment.turn,
            reason=reason,
            code=end.error.code if end is not None and end.error is not None else None,
            chunks=self._stored,
            bytes=self._bytes,
            seconds=round(time.monotonic() - self._begun_at, 3),
        )
