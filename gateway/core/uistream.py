"""What must be known of an AI SDK chunk, and no more (``ai`` 5, 6 and 7).

A chunk is passed on byte for byte. Strict additions are made here: a ``start`` without ``messageId`` gets
one, a message that begins before any ``start`` gets a ``start``, parts that a cancel left open are closed,
and an end is told as the chunk the SDK understands.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from gateway.core.model import Draft, EndReason, RecordKind, TurnError, TurnId
from gateway.core.rawjson import NotJSON, WrongShape, decode, encode, one_line

if TYPE_CHECKING:
    from gateway.core.sse import ServerSentEvent

DONE = b"[DONE]"
"""What the SDK's server writes last. No JSON, no record."""

STREAM_HEADER = "x-vercel-ai-ui-message-stream"
"""The response header that says: this is an AI SDK stream."""


class ChunkType(StrEnum):
    """The chunk types that matter to a turn; all others are ``OTHER``."""

    START = "start"
    FINISH = "finish"
    ERROR = "error"
    ABORT = "abort"
    TEXT_START = "text-start"
    TEXT_END = "text-end"
    REASONING_START = "reasoning-start"
    REASONING_END = "reasoning-end"
    FINISH_STEP = "finish-step"
    RESET_STEP = "reset-step"
    DATA = "data-*"
    OTHER = ""


class _Head(msgspec.Struct):
    type: str
    id: str | None = None
    messageId: str | None = None  # noqa: N815 - the SDK's own key
    errorText: str | None = None  # noqa: N815 - the SDK's own key
    transient: bool = False


class _Typed(msgspec.Struct):
    """As :class:`_Head`, where one of its members is of another type than the SDK's."""

    type: str
    id: msgspec.Raw = msgspec.Raw()
    messageId: msgspec.Raw = msgspec.Raw()  # noqa: N815 - the SDK's own key
    errorText: msgspec.Raw = msgspec.Raw()  # noqa: N815 - the SDK's own key
    transient: msgspec.Raw = msgspec.Raw()


_head = msgspec.json.Decoder(_Head)
_typed = msgspec.json.Decoder(_Typed)
_text = msgspec.json.Decoder(str)
_anything = msgspec.json.Decoder(msgspec.Raw)
_types = {member.value: member for member in ChunkType if member is not ChunkType.OTHER}


class Chunk(msgspec.Struct, frozen=True):
    """One upstream event, looked at.

    Attributes:
        draft: What the journal will hold.
        type: What it means to the turn; ``OTHER`` for most, and for what is no JSON.
        part: The id of the part that it opens or closes.
        error_text: What an ``error`` chunk says.
        makes_message: ``useChat`` shows a message from here on, named at random if no ``start`` named it.
    """

    draft: Draft
    type: ChunkType = ChunkType.OTHER
    part: str = ""
    error_text: str = ""
    makes_message: bool = False


_NO_MESSAGE = frozenset({ChunkType.START, ChunkType.FINISH, ChunkType.ERROR, ChunkType.ABORT})


def read_chunk(event: ServerSentEvent, *, message_id: str | None) -> Chunk:
    """Look at one event of the backend.

    Args:
        event: Any event but ``[DONE]``.
        message_id: Given to a ``start`` that has none; ``None``: it stays as it is.
    """
    try:
        head = _read_head(event.data)
    except NotJSON:
        return Chunk(_plain_draft(event, b'"text":' + encode(event.data.decode("utf-8", "replace"))))
    payload = one_line(event.data)
    kind = _types.get(head.type) or (ChunkType.DATA if head.type.startswith("data-") else ChunkType.OTHER)
    if kind is ChunkType.START and head.messageId is None and message_id is not None:
        payload = _with_message_id(payload, message_id)
    draft = _plain_draft(event, b'"data":' + payload) if event.event else Draft(RecordKind.CHUNK, payload)
    return Chunk(
        draft,
        type=kind,
        part=head.id or "",
        error_text=head.errorText or "",
        makes_message=bool(head.type) and kind not in _NO_MESSAGE and not head.transient,
    )


def start_chunk(message_id: str) -> Draft:
    """The ``start`` that a backend leaves out, or sends too late to name the message."""
    return Draft(RecordKind.CHUNK, encode({"type": "start", "messageId": message_id}))


def _read_head(data: bytes) -> _Head:
    """What a JSON document says of itself: nothing, where it is a number, an array, another vocabulary.

    Raises:
        NotJSON: It is no JSON.
    """
    try:
        return decode(_head, data)
    except WrongShape:
        # What stands behind the wrong type has not been looked at.
        decode(_anything, data)
    try:
        head = decode(_typed, data)
    except WrongShape:
        return _Head("")
    # An `error` whose text is an object is an error all the same.
    transient = bytes(head.transient) == b"true"
    return _Head(head.type, _string(head.id), _string(head.messageId), _string(head.errorText), transient)


def _string(value: msgspec.Raw) -> str | None:
    try:
        return decode(_text, bytes(value)) if value else None
    except WrongShape:
        return None


def _plain_draft(event: ServerSentEvent, members: bytes) -> Draft:
    if event.event:
        members += b',"event":' + encode(event.event)
    return Draft(RecordKind.CHUNK, members, plain=True)


def _with_message_id(payload: bytes, message_id: str) -> bytes:
    """Add the id as the last member of an object that has at least ``type``."""
    return payload.rstrip()[:-1].rstrip() + b',"messageId":' + encode(message_id) + b"}"


def derived_message_id(turn: TurnId) -> str:
    """The id of a turn's answer where the backend names none: the same on every device and every resume."""
    return "msg-" + hashlib.sha256(turn.encode()).hexdigest()[:24]


@dataclass(slots=True)
class OpenParts:
    """The text and reasoning parts that began and did not end.

    An id may come again in a later step once its part was closed, so this holds what is open now.
    """

    _open: dict[tuple[str, str], None] = field(default_factory=dict)

    def saw(self, chunk: Chunk) -> None:
        """Take note of one journalled chunk."""
        match chunk.type:
            case ChunkType.TEXT_START | ChunkType.REASONING_START:
                self._open[chunk.type.value.removesuffix("-start"), chunk.part] = None
            case ChunkType.TEXT_END | ChunkType.REASONING_END:
                self._open.pop((chunk.type.value.removesuffix("-end"), chunk.part), None)
            case ChunkType.FINISH_STEP | ChunkType.RESET_STEP:
                # Here ai 5 and 6 (the first), and ai 7 (the second) forget what was open: an end would throw.
                self._open.clear()
            case _:
                pass

    def closers(self) -> list[Draft]:
        """The chunks that close what is open, in the order it was opened."""
        return [
            Draft(RecordKind.CHUNK, encode({"type": f"{kind}-end", "id": part})) for kind, part in self._open
        ]


def told_as_chunk(reason: EndReason, error: TurnError | None, *, by_backend: bool) -> bytes | None:
    """A turn's end as the chunk that an AI SDK client understands; ``None`` if it has been told already."""
    match reason:
        case EndReason.COMPLETE:
            return None
        case EndReason.CANCELLED:
            # Without `reason`: ai 5 refuses unknown keys.
            return None if by_backend else b'{"type":"abort"}'
        case EndReason.ERROR | EndReason.INTERRUPTED:
            if by_backend or error is None:
                return None
            return encode({"type": "error", "errorText": error.message})
