"""The frames of the AI SDK's own ``WebSocketChatTransport`` (``ai`` >= 7.0.135).

Source: ``src/ui/websocket-chat-transport.ts`` of the package. ``sequence`` counts from 0 without gaps per
request; a gap, an unknown chunk or a payload that is no JSON would make the client drop the whole socket.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from gateway.core.httpwire import chunk_json, read_turn_end
from gateway.core.model import Record, RecordKind, bad_request
from gateway.core.rawjson import NotJSON, WrongShape, decode, encode

MAX_REQUEST_ID_LENGTH = 256

NO_CHUNK = "the backend wrote an event that is no AI SDK chunk; this transport cannot carry it"


class Send(msgspec.Struct, tag="send", frozen=True):
    """Ask for a turn."""

    requestId: str  # noqa: N815 - the SDK's own key
    id: str
    body: dict[str, msgspec.Raw] = msgspec.field(default_factory=dict)
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    # Empty where the frame has none: msgspec reads nothing but null into `Raw | None`.
    messages: msgspec.Raw = msgspec.Raw()
    trigger: msgspec.Raw = msgspec.Raw()
    messageId: msgspec.Raw = msgspec.Raw()  # noqa: N815 - the SDK's own key


class Resume(msgspec.Struct, tag="resume", frozen=True):
    """Ask for the newest turn, from its first chunk or after a sequence number."""

    requestId: str  # noqa: N815 - the SDK's own key
    id: str
    lastSequence: int | None = None  # noqa: N815 - the SDK's own key


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """A stop, or an unmounted component: the frame is the same."""

    requestId: str  # noqa: N815 - the SDK's own key


Frame = Send | Resume | Abort

_frames: msgspec.json.Decoder[Frame] = msgspec.json.Decoder(Frame)


def parse_frame(text: str) -> Frame:
    """Read one frame of a client.

    Raises:
        Refusal: It is none.
    """
    try:
        frame = decode(_frames, text)
    except NotJSON as error:
        raise bad_request(f"unable to read the frame; it is no JSON ({error})") from None
    except WrongShape as error:
        raise bad_request(f"unable to read the frame; {error}") from None
    if not 0 < len(frame.requestId) <= MAX_REQUEST_ID_LENGTH:
        raise bad_request(
            f"unable to use the requestId; it must have 1 to {MAX_REQUEST_ID_LENGTH} characters"
        )
    return frame


def send_body(frame: Send) -> bytes:
    """What ``DefaultChatTransport`` would have posted: ``{...body, id, messages, trigger, messageId}``."""
    members: dict[str, object] = {**frame.body, "id": frame.id}
    named = {"messages": frame.messages, "trigger": frame.trigger, "messageId": frame.messageId}
    members |= {name: value for name, value in named.items() if bytes(value)}
    return encode(members)


def request_id_of(text: str) -> str | None:
    """The request that a frame which could not be read was about, if that much can be read."""
    try:
        return decode(_about, text).requestId
    except (NotJSON, WrongShape):
        return None


class _About(msgspec.Struct):
    requestId: str  # noqa: N815 - the SDK's own key


_about = msgspec.json.Decoder(_About)


def start(request_id: str) -> bytes:
    """A resume found its turn."""
    return _told("start", request_id)


def end(request_id: str) -> bytes:
    """The turn's chunks are all there."""
    return _told("end", request_id)


def no_active(request_id: str) -> bytes:
    """A resume found nothing."""
    return _told("no-active", request_id)


def error(request_id: str, text: str) -> bytes:
    """The request ends with an error."""
    return encode({"type": "error", "requestId": request_id, "errorText": text})


def _told(kind: Literal["start", "end", "no-active"], request_id: str) -> bytes:
    return encode({"type": kind, "requestId": request_id})


@dataclass(slots=True)
class Rendering:
    """One turn as the frames of one request.

    Attributes:
        request_id: Of the request.
        after: The last sequence number that the client has; -1: none.
        ended: The last frame was made.
    """

    request_id: str
    after: int = -1
    ended: bool = False
    _sequence: int = -1
    _quoted: bytes = field(init=False)

    def __post_init__(self) -> None:
        self._quoted = encode(self.request_id)

    def frames(self, record: Record) -> list[bytes]:
        """The frames that tell a record of the turn; records come in order, from the turn's first."""
        match record.kind:
            case RecordKind.TURN_START:
                return []
            case RecordKind.CHUNK:
                chunk = chunk_json(record)
                return self._chunk(chunk) if chunk is not None and _is_typed(chunk) else self._broken()
            case RecordKind.TURN_END:
                return self._end(record)

    def _chunk(self, chunk: bytes) -> list[bytes]:
        self._sequence += 1
        if self._sequence <= self.after:
            return []
        return [
            b'{"type":"chunk","requestId":%b,"sequence":%d,"chunk":%b}'
            % (self._quoted, self._sequence, chunk)
        ]

    def _broken(self) -> list[bytes]:
        self.ended = True
        return [error(self.request_id, NO_CHUNK)]

    def _end(self, record: Record) -> list[bytes]:
        self.ended = True
        chunk = read_turn_end(record).chunk
        return [*([] if chunk is None else self._chunk(chunk)), end(self.request_id)]


class _Typed(msgspec.Struct):
    type: str


_typed = msgspec.json.Decoder(_Typed)


def _is_typed(chunk: bytes) -> bool:
    """Whether it is an object with a ``type``: the least that the SDK's client asks of a chunk."""
    if chunk.startswith(b'{"type":"'):
        return True
    try:
        decode(_typed, chunk)
    except WrongShape:
        return False
    return True
