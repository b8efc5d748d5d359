"""A turn as ``DefaultChatTransport`` reads it: Server-Sent Events, each with its cursor as ``id``."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from gateway.core.model import EndCode, EndReason, Record, RecordKind, TurnError
from gateway.core.rawjson import decode, encode
from gateway.core.sse import encode_event
from gateway.core.uistream import DONE, told_as_chunk


class _By(msgspec.Struct):
    backend: bool = False


class _Error(msgspec.Struct):
    code: str = ""
    message: str = ""
    status: int | None = None


class _EndMembers(msgspec.Struct):
    reason: str
    by: _By = msgspec.field(default_factory=_By)
    error: _Error | None = None


class _PlainMembers(msgspec.Struct):
    text: str | None = None
    event: str = ""


_end_members = msgspec.json.Decoder(_EndMembers)
_plain_members = msgspec.json.Decoder(_PlainMembers)


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """A ``turn-end``, read back.

    Attributes:
        reason: How it ended.
        error: What went wrong, if something did.
        chunk: The chunk that tells an AI SDK client, if none has told it yet.
    """

    reason: EndReason
    error: TurnError | None
    chunk: bytes | None


def read_turn_end(record: Record) -> TurnEnd:
    """What a journalled ``turn-end`` says."""
    members = _end_members.decode(b"{" + record.draft.payload + b"}")
    reason = EndReason(members.reason)
    error = None
    if members.error is not None:
        error = TurnError(EndCode(members.error.code), members.error.message, status=members.error.status)
    told = members.by.backend or (error is not None and error.code is EndCode.UPSTREAM_ERROR)
    return TurnEnd(reason, error, told_as_chunk(reason, error, by_backend=told))


def encode_record(record: Record) -> bytes:
    """A record as its event; made once for all clients of the session. Empty for a ``turn-start``."""
    encoded = record.event
    if encoded is None:
        encoded = record.event = _encode(record)
    return encoded


def chunk_json(record: Record) -> bytes | None:
    """A chunk's payload as JSON; ``None`` if it is none."""
    if not record.draft.plain:
        return record.draft.payload
    members = _plain(record)
    return _data(record, members) if members.text is None else None


def _plain(record: Record) -> _PlainMembers:
    return decode(_plain_members, b"{" + record.draft.payload + b"}")


def _data(record: Record, members: _PlainMembers) -> bytes:
    """The JSON of a named event, byte for byte: what stands between ``"data":`` and the name."""
    name = b',"event":' + encode(members.event)
    return record.draft.payload.removeprefix(b'"data":').removesuffix(name)


def _encode(record: Record) -> bytes:
    cursor = str(record.cursor)
    draft = record.draft
    match draft.kind:
        case RecordKind.TURN_START:
            return b""
        case RecordKind.CHUNK if not draft.plain:
            return b"id: %b\ndata: %b\n\n" % (cursor.encode(), draft.payload)
        case RecordKind.CHUNK:
            members = _plain(record)
            data = _data(record, members) if members.text is None else members.text.encode()
            return encode_event(data, event=members.event, identifier=cursor)
        case RecordKind.TURN_END:
            events = []
            chunk = read_turn_end(record).chunk
            if draft.ai_sdk and chunk is not None:
                events.append(encode_event(chunk, identifier=cursor))
            if draft.ai_sdk or draft.done:
                events.append(encode_event(DONE, identifier=cursor))
            return b"".join(events)
