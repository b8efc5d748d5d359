"""Reads the backend's answer to one turn, and feeds what it says to the turn."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from gateway import telemetry
from gateway.core.model import By, Cursor, Draft, EndCode, SessionId, TurnError, TurnId
from gateway.core.rawjson import encode
from gateway.core.sse import EventTooLarge, SSEDecoder
from gateway.core.turn import Turn, TurnState
from gateway.opening import Answered, Opening, Streaming
from gateway.store import StoreUnavailable
from gateway.upstream import UpstreamCall, UpstreamFailed, UpstreamResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    from gateway.config import Config
    from gateway.core.turn import Effect
    from gateway.outcomes import Fence

log = structlog.get_logger(__name__)

SETTLE_SECONDS = 5.0
"""How long ``[DONE]`` and the end of the body may take after ``finish``."""

REFUSAL_BYTES = 4096
"""What is kept of a refusal's body (docs/protocol.md)."""

REFUSAL_SECONDS = 5.0
"""How long these may take to come."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """How a turn was begun.

    Attributes:
        cursor: Where its ``turn-start`` stands.
        start: That.
        digest: Of the send.
        path: The chat path.
        user: Who sent.
    """

    cursor: Cursor
    start: Draft
    digest: str
    path: str
    user: str


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a producer is to do.

    Attributes:
        session: Whose turn.
        turn: Which.
        fence: The right to write it.
        beginning: What it takes to begin it once more, should the store lose that.
        answer_id: The message id for an answer that has none.
        call: The request to the backend, not sent yet.
        gate: Resolves when the turn may go to the backend; False: not at all.
        released: Of a wire that can pass on an answer that is no stream: set when it has, or will not.
    """

    session: SessionId
    turn: TurnId
    fence: Fence
    beginning: Beginning
    answer_id: str
    call: UpstreamCall
    gate: Callable[[], Coroutine[object, object, bool] | None]
    released: asyncio.Event | None

    @property
    def takes_answer(self) -> bool:
        """Whether the sender's wire can pass on an answer that is no stream."""
        return self.released is not None


class Answer:
    """The backend's answer, from the request to its last byte.

    Args:
        assignment: What to ask.
        turn: Decides what it means.
        config: For bounds and timeouts.
        perform: Does what the turn decided; called once per input, in order.
    """

    def __init__(
        self,
        assignment: Assignment,
        *,
        turn: Turn,
        config: Config,
        perform: Callable[[Sequence[Effect]], None],
    ) -> None:
        self.opening: asyncio.Future[Opening] = asyncio.get_running_loop().create_future()
        self.refusal = b""
        """What is kept of a refusal, as JSON."""
        self._assignment = assignment
        self._turn = turn
        self._max_event_bytes = config.max_event_bytes
        self._idle_seconds = config.upstream_idle_timeout_seconds
        self._perform = perform
        self._asked_at = time.monotonic()

    def resolve(self, opening: Opening) -> None:
        """Tell the sender's wire; the first word counts."""
        if not self.opening.done():
            self.opening.set_result(opening)

    async def read(self) -> None:
        """Read it all. Whatever happens, the turn hears of it."""
        try:
            gate = self._assignment.gate()
            if gate is not None and not await gate:
                # Cancelled while it was queued; who asked says so too, or is another node.
                self._perform(self._turn.cancel(By()))
                return
            response = await self._assignment.call.open()
            try:
                if response.is_event_stream:
                    await self._read_stream(response)
                else:
                    await self._read_other(response)
            finally:
                response.close()
        except UpstreamFailed as failure:
            self._perform(self._turn.failed(failure.error))
        except TimeoutError:
            self._fell_silent()
        except StoreUnavailable:
            error = TurnError(EndCode.STORE_LOST, "the store was away for too long")
            self._perform(self._turn.failed(error))
        except Exception:
            # A fault of ours; every turn ends all the same (G7).
            log.exception("turn.failed", session=self._assignment.session, turn=self._assignment.turn)
            error = TurnError(EndCode.UPSTREAM_CUT_OFF, "the gateway was unable to read the answer")
            self._perform(self._turn.failed(error))

    def _fell_silent(self) -> None:
        if self._turn.finished:
            self._perform(self._turn.body_ended())
            return
        message = f"the backend sent nothing for {self._idle_seconds:g} s"
        self._perform(self._turn.failed(TurnError(EndCode.UPSTREAM_TIMEOUT, message)))

    async def _read_stream(self, response: UpstreamResponse) -> None:
        unpack = response.unpacker()
        self._turn.opened(ai_sdk=response.is_ai_sdk)
        self.resolve(Streaming(response.status, response.headers))
        decoder = SSEDecoder(self._max_event_bytes)
        async with asyncio.timeout(None) as deadline:
            silence = _Silence(deadline, self._idle_seconds)
            try:
                while data := await response.read():
                    for plain in unpack(data):
                        self._take(decoder, plain, silence)
                    if self._turn.state is TurnState.ENDED:
                        return
            finally:
                silence.close()
        response.check_whole()
        self._perform(self._turn.body_ended())

    def _take(self, decoder: SSEDecoder, data: bytes, silence: _Silence) -> None:
        comments = decoder.comments
        try:
            events = decoder.feed(data)
        except EventTooLarge as error:
            self._perform(self._turn.events(error.events))
            self._perform(self._turn.failed(TurnError(EndCode.EVENT_TOO_LARGE, str(error))))
            return
        if not events and decoder.comments == comments:
            return  # a part of an event is no sign of life
        silence.heard()
        if events and self._asked_at:
            telemetry.first_chunk_seconds.observe(time.monotonic() - self._asked_at)
            self._asked_at = 0.0
        was_finished = self._turn.finished
        self._perform(self._turn.events(events))
        if self._turn.finished and not was_finished:
            silence.allow(SETTLE_SECONDS)

    async def _read_other(self, response: UpstreamResponse) -> None:
        """An answer that is no event stream: a refusal, or something for the sender alone."""
        head = b""
        is_refusal = response.status >= 300  # noqa: PLR2004 - not a success
        if is_refusal or not self._assignment.takes_answer:
            # A body that hangs does not keep its status from the sender.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._idle_seconds, REFUSAL_SECONDS)):
                    while len(head) < REFUSAL_BYTES and (data := await response.read()):
                        head += data
        text = response.readable(head)[:REFUSAL_BYTES].decode("utf-8", "replace")
        if is_refusal:
            self.refusal = _kept(response, text)
        answered = Answered(
            response.status,
            response.reason,
            response.headers,
            _rest(head, response, self._idle_seconds),
            kept=self.refusal,
        )
        self.resolve(answered)
        self._perform(self._turn.failed(_refusal(response, text.strip())))
        if self._assignment.released is not None:
            await self._assignment.released.wait()


class _Silence:
    """Ends a wait when nothing was heard for too long; to be heard costs no more than a clock reading."""

    def __init__(self, deadline: asyncio.Timeout, seconds: float) -> None:
        self._deadline = deadline
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._look)

    def heard(self) -> None:
        """A sign of life."""
        self._heard_at = self._loop.time()

    def allow(self, seconds: float) -> None:
        """Only so much longer, whatever is heard."""
        self._timer.cancel()
        self._deadline.reschedule(self._loop.time() + min(seconds, self._seconds))

    def close(self) -> None:
        """Stop looking."""
        self._timer.cancel()

    def _look(self) -> None:
        due = self._heard_at + self._seconds
        if due <= self._loop.time():
            self._deadline.reschedule(due)
        else:
            self._timer = self._loop.call_at(due, self._look)


async def _rest(head: bytes, response: UpstreamResponse, idle_seconds: float) -> AsyncIterator[bytes]:
    if head:
        yield head
    while True:
        try:
            async with asyncio.timeout(idle_seconds):
                data = await response.read()
        except TimeoutError as error:
            message = f"the backend sent nothing for {idle_seconds:g} s"
            raise UpstreamFailed(EndCode.UPSTREAM_TIMEOUT, message) from error
        if not data:
            return
        yield data


def _kept(response: UpstreamResponse, text: str) -> bytes:
    return encode(
        {
            "status": response.status,
            "contentType": response.headers.get("Content-Type", "text/plain"),
            "body": text,
            "retryAfter": response.headers.get("Retry-After"),
        }
    )


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
