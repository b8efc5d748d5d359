"""The session protocol, version 1: commands in, replies and pushes out (docs/protocol.md).

A command is one JSON object. What goes out is lines: one JSON object each, any number in one frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar, get_args

import msgspec

from gateway.core.model import (
    CancelResult,
    Cursor,
    Draft,
    ErrorCode,
    Record,
    RecordKind,
    Refusal,
    ResyncReason,
    SessionId,
    TurnId,
)
from gateway.core.rawjson import NotJSON, WrongShape, decode, encode
from gateway.core.sendbody import told_by

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gateway.core.turn import End

T = TypeVar("T")

PROTOCOL = 1
SUBPROTOCOL = "session-gateway.v1"

CommandId = str | int
MAX_COMMAND_ID_LENGTH = 128


class AttachFrom(StrEnum):
    """Where an attach without a cursor begins."""

    START = "start"
    """With the first record kept."""
    RUNNING = "running"
    """With what runs, or ended unread; else with what comes. A reload need not cost the whole journal."""


class Attach(msgspec.Struct, tag="attach", frozen=True):
    """Receive a session's records: after a cursor, or from a complete state, or what runs."""

    id: CommandId
    session: str
    after: str | None = None
    start: AttachFrom | None = msgspec.field(default=None, name="from")


class Detach(msgspec.Struct, tag="detach", frozen=True):
    """Receive no more of a session."""

    id: CommandId
    session: str


class Send(msgspec.Struct, tag="send", frozen=True):
    """Ask for a turn."""

    id: CommandId
    session: str
    turn: str
    body: msgspec.Raw
    path: str | None = None
    overlap: str | None = None
    headers: dict[str, str] | None = None


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """Ask that a turn end; without ``turn``: all that run."""

    id: CommandId
    session: str
    turn: str | None = None


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """Ask for a ``pong``."""

    id: CommandId


Command = Attach | Detach | Send | Cancel | Ping

_commands: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)


_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_text = msgspec.json.Decoder(str)
_command_id: msgspec.json.Decoder[CommandId] = msgspec.json.Decoder(CommandId)
KNOWN_COMMANDS = tuple(str(command.__struct_config__.tag) for command in get_args(Command))


class BadCommand(Refusal):
    """What came is no command.

    Attributes:
        id: The id that it had, if it had one.
    """

    def __init__(self, message: str, identifier: CommandId | None) -> None:
        super().__init__(ErrorCode.BAD_REQUEST, message)
        self.id = identifier


def parse_command(frame: str | bytes) -> Command:
    """Read one command.

    Raises:
        BadCommand: It is no JSON object with a known ``type`` and members of the right types.
    """
    try:
        command = decode(_commands, frame)
    except NotJSON as error:
        raise BadCommand(f"unable to read the command; it is no JSON ({error})", None) from None
    except WrongShape as error:
        raise _explained(frame, error) from None
    if _is_too_long(command.id):
        raise BadCommand(
            f"unable to use the command's id; {MAX_COMMAND_ID_LENGTH} characters are the most", None
        )
    return command


def _explained(frame: str | bytes, error: WrongShape) -> BadCommand:
    try:
        members = decode(_members, frame)
    except (NotJSON, WrongShape):
        message = "unable to read the command; it must be a JSON object with a type and an id"
        return BadCommand(message, None)
    identifier = _read(_command_id, members.get("id"))
    if identifier is not None and _is_too_long(identifier):
        identifier = None
    kind = _read(_text, members.get("type"))
    if kind not in KNOWN_COMMANDS:
        known = ", ".join(KNOWN_COMMANDS)
        message = f"unable to carry out a command of type {kind!r:.60}; known are {known}"
        return BadCommand(message, identifier)
    return BadCommand(f"unable to read the {kind} command; {error}", identifier)


def _read(decoder: msgspec.json.Decoder[T], value: msgspec.Raw | None) -> T | None:
    try:
        return None if value is None else decode(decoder, bytes(value))
    except WrongShape:
        return None


def _is_too_long(identifier: CommandId) -> bool:
    return isinstance(identifier, str) and len(identifier) > MAX_COMMAND_ID_LENGTH


@dataclass(frozen=True, slots=True)
class TurnStatus:
    """What a client is told of a turn when it attaches.

    Attributes:
        turn: Which.
        state: ``queued``, ``running``, ``cancelling`` or the end reason.
        offset: Of its ``turn-start``.
    """

    turn: TurnId
    state: str
    offset: int


def hello(*, node: str, client: str, heartbeat_seconds: float) -> bytes:
    """The first line of a connection."""
    return encode(
        {
            "type": "hello",
            "protocol": PROTOCOL,
            "node": node,
            "client": client,
            "heartbeat": heartbeat_seconds,
        }
    )


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a client stands in a session.

    Attributes:
        cursor: The last record had; what follows follows from here.
        last: Newest offset journalled when it was looked at.
        turns: The running ones, and the newest that ended.
        resync: Why it is not where the client wanted to continue, if it is not.
    """

    cursor: Cursor
    last: int
    turns: tuple[TurnStatus, ...] = ()
    resync: ResyncReason | None = None

    def members(self) -> dict[str, object]:
        """As a client is told of it."""
        told: dict[str, object] = {
            "cursor": str(self.cursor),
            "offset": self.cursor.offset,
            "last": self.last,
            "turns": [{"turn": turn.turn, "state": turn.state, "offset": turn.offset} for turn in self.turns],
        }
        if self.resync is not None:
            told["resync"] = self.resync
        return told


def attached(identifier: CommandId, session: SessionId, standing: Standing) -> bytes:
    """The reply to ``attach``; pushes follow from its cursor."""
    return encode({"type": "attached", "id": identifier, "session": session, **standing.members()})


def opened(session: SessionId, standing: Standing, *, heartbeat_seconds: float) -> bytes:
    """The same as the first event of an event stream, which nobody asked for by an id."""
    members = standing.members()
    return encode({"type": "attached", "session": session, **members, "heartbeat": heartbeat_seconds})


def polled(session: SessionId, standing: Standing, records: Iterable[Record]) -> bytes:
    """The answer to a poll; the records are their lines, byte for byte."""
    lines = [msgspec.Raw(encode_push(session, record)) for record in records]
    return encode({**standing.members(), "records": lines})


def ok(identifier: CommandId) -> bytes:
    """The reply to a command that has nothing to say."""
    return encode({"type": "ok", "id": identifier})


def pong(identifier: CommandId) -> bytes:
    """The reply to ``ping``."""
    return encode({"type": "pong", "id": identifier})


def accepted(
    identifier: CommandId, session: SessionId, turn: TurnId, cursor: Cursor, *, duplicate: bool
) -> bytes:
    """The reply to ``send``; ``cursor`` is just before the turn's ``turn-start``."""
    reply: dict[str, object] = {
        "type": "accepted",
        "id": identifier,
        "session": session,
        "turn": turn,
        "cursor": str(cursor),
    }
    if duplicate:
        reply["duplicate"] = True
    return encode(reply)


def cancelled(identifier: CommandId, turns: Iterable[tuple[TurnId, CancelResult]]) -> bytes:
    """The reply to ``cancel``."""
    told = [{"turn": turn, "result": result} for turn, result in turns]
    return encode({"type": "cancelled", "id": identifier, "turns": told})


def refused(identifier: CommandId | None, refusal: Refusal) -> bytes:
    """The reply to a command that was not carried out."""
    reply: dict[str, object] = {"type": "error"}
    if identifier is not None:
        reply["id"] = identifier
    reply |= {"code": refusal.code, "message": refusal.message, "retryable": refusal.retryable}
    if refusal.retry_after_seconds is not None:
        reply["retryAfter"] = refusal.retry_after_seconds
    return encode(reply)


HEARTBEAT = b'{"type":"heartbeat"}'


def resync(session: SessionId, reason: ResyncReason) -> bytes:
    """The push that says: you are detached; attach without ``after``."""
    return encode({"type": "resync", "session": session, "reason": reason})


def goaway(after_seconds: float) -> bytes:
    """The push that says: the node is stopping; read on until then, and connect again."""
    return encode({"type": "goaway", "after": round(after_seconds * 1000)})


_TYPES = {
    RecordKind.TURN_START: b"turn-start",
    RecordKind.CHUNK: b"chunk",
    RecordKind.TURN_END: b"turn-end",
}


def encode_push(session: SessionId, record: Record) -> bytes:
    """A record as its line; made once for all clients of the session."""
    line = record.line
    if line is None:
        draft = record.draft
        bare_chunk = draft.kind is RecordKind.CHUNK and not draft.plain
        line = record.line = b'{"type":"%b","session":%b,"offset":%d,"cursor":"%b","turn":%b,%b%b}' % (
            _TYPES[draft.kind],
            encode(session),
            record.offset,
            str(record.cursor).encode(),
            encode(record.turn),
            b'"data":' if bare_chunk else b"",
            draft.payload,
        )
    return line


def turn_end(end: End) -> Draft:
    """A turn's end as the record that the journal keeps."""
    members: dict[str, object] = {"reason": end.reason}
    if end.by is not None:
        members["by"] = told_by(end.by)
    if end.error is not None:
        error: dict[str, object] = {"code": end.error.code, "message": end.error.message}
        if end.error.status is not None:
            error["status"] = end.error.status
        if end.error.retry_after_seconds is not None:
            error["retryAfter"] = end.error.retry_after_seconds
        members["error"] = error
    return Draft(RecordKind.TURN_END, encode(members)[1:-1], ai_sdk=end.ai_sdk, done=end.done)
