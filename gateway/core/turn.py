"""The life of one turn, from the POST to its one ``turn-end``.

::

              opened            cancel
    WAITING ─────────▶ READING ────────▶ CANCELLING
       │  │ failed        │ [DONE], body ended,   │ upstream closed
       │  └──────────┐    │ failed, too large     │
       │ cancel      ▼    ▼                       ▼
       └──────────▶  ... ENDED ◀──────────────────┘

Rule 1: exactly one :class:`End` comes out, and nothing after it.
Rule 2: a chunk goes out before the end that follows it.
Rule 3: there is no ``disconnected()``. Who is or is not attached cannot matter to a turn.
Rule 4: a cancel aborts first and ends second: :meth:`Turn.aborted` is the caller's word that the backend's
connection is closed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum, auto
from typing import TYPE_CHECKING

import msgspec

from gateway.core.model import By, Draft, EndCode, EndReason, TurnError
from gateway.core.uistream import DONE, Chunk, ChunkType, OpenParts, read_chunk, start_chunk

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gateway.core.sse import ServerSentEvent


class TurnState(StrEnum):
    """Where a turn is in its life."""

    WAITING = auto()
    READING = auto()
    CANCELLING = auto()
    ENDED = auto()


class Append(msgspec.Struct, frozen=True):
    """Journal these, in this order."""

    drafts: tuple[Draft, ...]


@dataclass(frozen=True, slots=True)
class AbortUpstream:
    """Close the backend's connection, then say :meth:`Turn.aborted`."""


@dataclass(frozen=True, slots=True)
class End:
    """Journal the end, after ``closers``; let go of the backend.

    Attributes:
        reason: How it ended.
        closers: Chunks that close what a cancel left open.
        error: What went wrong, for ``ERROR`` and ``INTERRUPTED``.
        by: Who cancelled, for ``CANCELLED``.
        ai_sdk: It was an AI SDK stream.
        done: The backend wrote ``[DONE]``.
    """

    reason: EndReason
    closers: tuple[Draft, ...] = ()
    error: TurnError | None = None
    by: By | None = None
    ai_sdk: bool = False
    done: bool = False


Effect = Append | AbortUpstream | End

BACKEND = By(backend=True)
_NOBODY = By()


class Turn:
    """Decides; performs nothing.

    Args:
        message_id: Given to a ``start`` chunk that has none.
        max_bytes: Most payload bytes of the whole answer; more is ``turn-too-large``.
    """

    def __init__(self, *, message_id: str, max_bytes: int) -> None:
        self.state = TurnState.WAITING
        self.finished = False
        """``finish`` was seen: whatever happens to the body from now on, the answer is whole."""
        self._message_id = message_id
        self._message_has_begun = False
        self._leave_unnamed = False
        self._bytes_left = max_bytes
        self._ai_sdk = False
        self._only_data_so_far = True
        self._done = False
        self._aborted_by_backend = False
        self._error: TurnError | None = None
        self._open_parts = OpenParts()
        self._cancelled_by = _NOBODY

    def opened(self, *, ai_sdk: bool) -> None:
        """The backend answers with an event stream.

        Args:
            ai_sdk: Its headers say that it is an AI SDK stream.
        """
        if self.state is TurnState.WAITING:
            self.state = TurnState.READING
            self._ai_sdk = ai_sdk

    def events(self, events: Iterable[ServerSentEvent]) -> list[Effect]:
        """The backend wrote; all that was read together."""
        if self.state is not TurnState.READING:
            return []
        drafts: list[Draft] = []
        for event in events:
            if event.data == DONE:
                self._done = True
                break
            chunk = read_chunk(event, message_id=None if self._leave_unnamed else self._message_id)
            if not self._message_has_begun:
                drafts += self._name_message(chunk)
            self._bytes_left -= len(chunk.draft.payload)
            if self._bytes_left < 0:
                message = "the answer is larger than GATEWAY_MAX_TURN"
                return [*_append(drafts), *self._break_off(TurnError(EndCode.TURN_TOO_LARGE, message))]
            # Only what is journalled counts: an end that a chunk told is not told again.
            self._saw(chunk)
            drafts.append(chunk.draft)
        effects = _append(drafts)
        return [*effects, self._classified()] if self._done else effects

    def _name_message(self, chunk: Chunk) -> list[Draft]:
        """The message must have its name when its first part comes: named later, it would be a second one."""
        if chunk.type is ChunkType.START:
            self._message_has_begun = True
        elif chunk.makes_message:
            self._message_has_begun = True
            if self._ai_sdk:
                return [start_chunk(self._message_id)]
            # Data of who knows what; should a `start` follow, it is too late for a name.
            self._leave_unnamed = True
        return []

    def body_ended(self) -> list[Effect]:
        """The backend's answer ended as HTTP says it should."""
        if self.state is not TurnState.READING:
            return []
        return [self._classified()]

    def failed(self, error: TurnError) -> list[Effect]:
        """The backend could not be reached, refused, broke off, fell silent or wrote too much."""
        match self.state:
            case TurnState.WAITING:
                return [self._end(EndReason.ERROR, error=error)]
            case TurnState.READING if self.finished or self._aborted_by_backend:
                return [self._classified()]
            case TurnState.READING:
                return self._break_off(error)
            case TurnState.CANCELLING | TurnState.ENDED:
                return []

    def cancel(self, by: By) -> list[Effect]:
        """A client asked for the turn to end. Idempotent."""
        match self.state:
            case TurnState.WAITING | TurnState.READING:
                self.state = TurnState.CANCELLING
                self._cancelled_by = by
                # The backend spends money until it hears; the end waits for `aborted`.
                return [AbortUpstream()]
            case TurnState.CANCELLING | TurnState.ENDED:
                return []

    def aborted(self) -> list[Effect]:
        """The backend's connection is closed."""
        if self.state is not TurnState.CANCELLING:
            return []
        closers = tuple(self._open_parts.closers()) if self._ai_sdk else ()
        return [self._end(EndReason.CANCELLED, by=self._cancelled_by, closers=closers)]

    def interrupted(self, error: TurnError) -> list[Effect]:
        """The node gives the turn up."""
        match self.state:
            case TurnState.READING if self.finished:
                return [self._classified()]
            case TurnState.WAITING | TurnState.READING | TurnState.CANCELLING:
                return [self._end(EndReason.INTERRUPTED, error=error)]
            case TurnState.ENDED:
                return []

    def _saw(self, chunk: Chunk) -> None:
        if chunk.type is ChunkType.OTHER:
            # Nearly every chunk is a delta.
            self._only_data_so_far = False
            return
        if chunk.type is ChunkType.START and self._only_data_so_far:
            self._ai_sdk = True
        self._only_data_so_far = self._only_data_so_far and chunk.type is ChunkType.DATA
        self._open_parts.saw(chunk)
        match chunk.type:
            case ChunkType.FINISH:
                self.finished = self._ai_sdk
            case ChunkType.ERROR if self._ai_sdk and self._error is None:
                # The first one is where the SDK's client stops reading.
                text = chunk.error_text or "the backend reported an error"
                self._error = TurnError(EndCode.UPSTREAM_ERROR, text)
            case ChunkType.ABORT if self._ai_sdk:
                self._aborted_by_backend = True
            case _:
                pass

    def _classified(self) -> End:
        if self._error is not None:
            return self._end(EndReason.ERROR, error=self._error)
        if self._aborted_by_backend:
            return self._end(EndReason.CANCELLED, by=BACKEND)
        if self._done or self.finished or not self._ai_sdk:
            return self._end(EndReason.COMPLETE)
        message = "the backend's answer ended before it was finished"
        return self._end(EndReason.ERROR, error=TurnError(EndCode.UPSTREAM_CUT_OFF, message))

    def _break_off(self, error: TurnError) -> list[Effect]:
        return [self._end(EndReason.ERROR, error=self._error or error)]

    def _end(
        self,
        reason: EndReason,
        *,
        error: TurnError | None = None,
        by: By | None = None,
        closers: tuple[Draft, ...] = (),
    ) -> End:
        self.state = TurnState.ENDED
        return End(reason, closers=closers, error=error, by=by, ai_sdk=self._ai_sdk, done=self._done)


def _append(drafts: list[Draft]) -> list[Effect]:
    return [Append(tuple(drafts))] if drafts else []
