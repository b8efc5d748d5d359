"""Runs one turn: reads the backend as fast as it writes, journals, ends.

Two loops share the turn's drafts. One reads the backend and feeds :class:`~gateway.core.turn.Turn`; the
other journals whatever there is, a batch a call, and shows it when the journal has it. Neither waits for any
client, and the reader does not wait for the journal. The drafts are kept to the turn's end, so that a batch
whose fate is unknown can be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from gateway import telemetry
from gateway.core.model import (
    By,
    Cursor,
    Draft,
    EndCode,
    EndReason,
    Record,
    SessionId,
    TurnError,
    TurnId,
    turn_tag,
)
from gateway.core.rawjson import encode
from gateway.core.sse import EventTooLarge, SSEDecoder
from gateway.core.turn import AbortUpstream, Append, Effect, End, Turn
from gateway.core.wire import turn_end
from gateway.journal import Appended, Behind, Ended, Fence, SessionJournal
from gateway.opening import Answered, NotOpened, Opening, Streaming
from gateway.store import StoreError, StoreUnavailable
from gateway.upstream import UpstreamCall, UpstreamFailed, UpstreamResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    from gateway.config import Config

log = structlog.get_logger(__name__)

HANG_UP_SECONDS = 0.25
"""How long a backend has to close its side after we closed ours. Node's http and uvicorn take below 6 ms."""

SETTLE_SECONDS = 5.0
"""How long ``[DONE]`` and the end of the body may take after ``finish``."""

REFUSAL_BYTES = 4096
"""What is kept of a refusal's body (DESIGN §8)."""

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


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a producer is to do.

    Attributes:
        session: Whose turn.
        turn: Which.
        fence: The right to write it.
        answer_id: The message id for an answer that has none.
        call: The request to the backend, not sent yet.
        gate: Resolves when the turn may go to the backend; False: not at all.
        takes_answer: Whether the sender's wire can pass on an answer that is no stream.
    """

    session: SessionId
    turn: TurnId
    fence: Fence
    answer_id: str
    call: UpstreamCall
    gate: Callable[[], Coroutine[object, object, bool] | None]
    takes_answer: bool


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
        self.opening: asyncio.Future[Opening] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[EndReason | None] = asyncio.get_running_loop().create_future()
        """Resolves when the ``turn-end`` is journalled; ``None``: another ended it, or nobody could."""
        self._journal = journal
        self._config = config
        self._budget = budget
        self._publish = publish
        self._lost = lost
        self._turn = Turn(message_id=assignment.answer_id, max_bytes=config.max_turn_bytes)
        self._drafts: list[Draft] = []
        self._stored = 0
        self._bytes = 0
        self._end: End | None = None
        self._refusal = b""
        self._dirty = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self._aborting: asyncio.Task[None] | None = None
        self._begun_at = time.monotonic()
        self._tag = turn_tag(assignment.turn)

    async def run(self) -> None:
        """Do it all; returns when the turn has ended. Never raises for what a backend or Redis does."""
        self._reading = asyncio.create_task(self._read(), name=f"read-{self.assignment.turn}")
        telemetry.running_turns.inc()
        reason: EndReason | None = None
        try:
            reason = await self._write()
        finally:
            self._let_go()
            telemetry.running_turns.dec()
            self._budget.used -= self._bytes
            telemetry.buffered_bytes.dec(self._bytes)
            await self._stop_tasks()
            self.ended.set_result(reason)
            self._log_end(reason)

    def cancel(self, by: By) -> None:
        """A client asked for the end. Idempotent; :attr:`ended` tells when it is done."""
        self._perform(self._turn.cancel(by))

    def interrupt(self, error: TurnError) -> None:
        """The node gives the turn up."""
        self._perform(self._turn.interrupted(error))

    # -- reading the backend

    async def _read(self) -> None:
        call = self.assignment.call
        try:
            gate = self.assignment.gate()
            if gate is not None and not await gate:
                # Cancelled while it was queued; who asked says so too, or is another node.
                self._perform(self._turn.cancel(By()))
                return
            response = await call.open()
            try:
                if response.is_event_stream:
                    await self._read_stream(response)
                else:
                    await self._read_answer(response)
            finally:
                response.close()
        except UpstreamFailed as failure:
            self._perform(self._turn.failed(failure.error))
        except TimeoutError:
            self._perform(self._turn.body_ended() if self._turn.finished else self._fell_silent())
        except StoreUnavailable:
            error = TurnError(EndCode.STORE_LOST, "the store was away for too long")
            self._perform(self._turn.failed(error))
        except Exception:
            # A fault of ours; every turn ends all the same (G7).
            log.exception("turn.failed", session=self.assignment.session, turn=self.assignment.turn)
            error = TurnError(EndCode.UPSTREAM_CUT_OFF, "the gateway was unable to read the answer")
            self._perform(self._turn.failed(error))

    def _fell_silent(self) -> list[Effect]:
        seconds = self._config.upstream_idle_timeout_seconds
        message = f"the backend sent nothing for {seconds:g} s"
        return self._turn.failed(TurnError(EndCode.UPSTREAM_TIMEOUT, message))

    async def _read_stream(self, response: UpstreamResponse) -> None:
        response.check_encoding()
        self._turn.opened(ai_sdk=response.is_ai_sdk)
        self._resolve_opening(Streaming(response.status, response.headers))
        decoder = SSEDecoder(self._config.max_event_bytes)
        idle = self._config.upstream_idle_timeout_seconds
        loop = asyncio.get_running_loop()
        first = True
        comments = 0
        async with asyncio.timeout(idle) as deadline, contextlib.aclosing(response.plain_body()) as body:
            async for data in body:
                try:
                    events = decoder.feed(data)
                except EventTooLarge as error:
                    self._perform(self._turn.events(error.events))
                    self._perform(self._turn.failed(TurnError(EndCode.EVENT_TOO_LARGE, str(error))))
                    return
                if not events and decoder.comments == comments:
                    continue
                comments = decoder.comments
                if events and first:
                    first = False
                    telemetry.first_chunk_seconds.observe(time.monotonic() - self._begun_at)
                was_finished = self._turn.finished
                self._perform(self._turn.events(events))
                if self._end is not None:
                    return
                if not self._turn.finished:
                    deadline.reschedule(loop.time() + idle)
                elif not was_finished:
                    deadline.reschedule(loop.time() + min(idle, SETTLE_SECONDS))
        self._perform(self._turn.body_ended())

    async def _read_answer(self, response: UpstreamResponse) -> None:
        head = b""
        async with asyncio.timeout(self._config.upstream_idle_timeout_seconds):
            body = response.body()
            if not self.assignment.takes_answer or response.status >= 300:  # noqa: PLR2004 - not a success
                async for data in body:
                    head += data
                    if len(head) >= REFUSAL_BYTES:
                        break
        text = response.readable(head)[:REFUSAL_BYTES].decode("utf-8", "replace")
        if response.status >= 300:  # noqa: PLR2004 - a success that is no stream was for its sender alone
            kept = {
                "status": response.status,
                "contentType": response.headers.get("Content-Type", "text/plain"),
                "body": text,
                "retryAfter": response.headers.get("Retry-After"),
            }
            self._refusal = encode(kept)
        rest = _chained(head, body, self._config.upstream_idle_timeout_seconds)
        headers = response.headers
        answered = Answered(response.status, response.reason, headers, rest, kept=self._refusal)
        self._resolve_opening(answered)
        self._perform(self._turn.failed(_refusal(response, text.strip())))
        if self.assignment.takes_answer:
            await answered.released.wait()

    # -- performing what the core decided

    def _perform(self, effects: Sequence[Effect]) -> None:
        """One input's effects, in order. No await: what is decided together is done together."""
        for effect in effects:
            match effect:
                case Append(drafts):
                    self._drafts += drafts
                    size = sum(len(draft.payload) for draft in drafts)
                    self._bytes += size
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
                if not self.opening.done():
                    self._resolve_opening(NotOpened(self._end))
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
                    refusal=self._refusal,
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
        self._resolve_opening(NotOpened(self._end))
        opening = self.opening.result()
        if self._reading is not None and not (isinstance(opening, Answered) and self.assignment.takes_answer):
            self._reading.cancel()

    def _resolve_opening(self, opening: Opening) -> None:
        if not self.opening.done():
            self.opening.set_result(opening)

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


async def _chained(head: bytes, body: AsyncIterator[bytes], idle_seconds: float) -> AsyncIterator[bytes]:
    if head:
        yield head
    while True:
        try:
            async with asyncio.timeout(idle_seconds):
                data = await anext(body)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            message = f"the backend sent nothing for {idle_seconds:g} s"
            raise UpstreamFailed(EndCode.UPSTREAM_TIMEOUT, message) from error
        yield data


def _refusal(response: UpstreamResponse, text: str) -> TurnError:
    if response.status < 300:  # noqa: PLR2004 - success, but no stream
        kind = response.headers.get("Content-Type", "no content type")
        message = f"the backend answered with {kind}, not with text/event-stream"
        return TurnError(EndCode.UPSTREAM_NOT_SSE, message, status=response.status)
    return TurnError(
        EndCode.UPSTREAM_REFUSED,
        text or f"the backend answered {response.status} {response.reason}",
        status=response.status,
        retry_after_seconds=_seconds(response.headers.get("Retry-After")),
    )


def _seconds(retry_after: str | None) -> float | None:
    """A ``Retry-After`` in seconds; the form of a date is left to the header that the sender sees."""
    if retry_after is None or not retry_after.strip().isdigit():
        return None
    return min(float(retry_after), 86_400.0)
