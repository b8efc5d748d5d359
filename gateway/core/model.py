"""The nouns: ids, positions in a journal, records, how a turn ends, and the errors people are told.

One word per thing, the same in code, on the wire, in logs, metrics and docs (docs/architecture.md).

A frozen value that is made for every chunk is a msgspec struct, made some five times as fast as a frozen
dataclass; all others are dataclasses.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NewType

import msgspec

SessionId = NewType("SessionId", str)
"""One conversation: the AI SDK's ``chatId``. Checked by :func:`session_id`."""

TurnId = NewType("TurnId", str)
"""One request to the backend and the one stream it answers with. Checked by :func:`turn_id`."""

ClientId = NewType("ClientId", str)
"""One client, the same after it reconnects. Checked by :func:`client_id`."""

NodeId = NewType("NodeId", str)
"""One gateway process."""

MAX_SESSION_ID_BYTES = 512
"""Database ids, UUIDs and slugs are below 100; a path of a URL that carries one stays below 2 KiB."""

MAX_SMALL_ID_LENGTH = 128
"""For ids that clients mint: a UUID has 36 characters."""

_SMALL_ID = re.compile(r"[!-~]{1,128}")
_TAG_LENGTH = 6
_CHECK_LENGTH = 8


class Overlap(StrEnum):
    """What a send does when a turn of its session is running."""

    PARALLEL = "parallel"
    """What the backend would see without us."""
    REJECT = "reject"
    """Refused with ``busy``."""
    INTERRUPT = "interrupt"
    """The running turns are cancelled first; no other send can come between."""


class EndReason(StrEnum):
    """How a turn ended; the ``reason`` of its ``turn-end``."""

    COMPLETE = "complete"
    CANCELLED = "cancelled"
    ERROR = "error"
    INTERRUPTED = "interrupted"


class EndCode(StrEnum):
    """What went wrong; the ``error.code`` of a ``turn-end``."""

    UPSTREAM_REFUSED = "upstream-refused"
    UPSTREAM_UNREACHABLE = "upstream-unreachable"
    UPSTREAM_TIMEOUT = "upstream-timeout"
    UPSTREAM_CUT_OFF = "upstream-cut-off"
    UPSTREAM_NOT_SSE = "upstream-not-sse"
    UPSTREAM_ERROR = "upstream-error"
    EVENT_TOO_LARGE = "event-too-large"
    TURN_TOO_LARGE = "turn-too-large"
    NODE_LOST = "node-lost"
    STORE_LOST = "store-lost"


class CancelResult(StrEnum):
    """What a cancel did to one turn."""

    CANCELLED = "cancelled"
    ALREADY_ENDED = "already-ended"
    INTERRUPTED = "interrupted"
    """Its node was gone, and the turn was sealed."""
    UNKNOWN = "unknown"
    """No such turn yet; remembered for a while, so that its send is answered as cancelled."""


class ResyncReason(StrEnum):
    """Why a client cannot continue from its cursor and starts from a complete state."""

    EPOCH_CHANGED = "epoch-changed"
    TRIMMED = "trimmed"
    TOO_FAR_BEHIND = "too-far-behind"


class CloseCode(IntEnum):
    """WebSocket close codes of the session protocol: 4000-4499 try again, 4500-4999 final."""

    GOING_AWAY = 4000
    HEARTBEAT_MISSED = 4001
    PROTOCOL = 4500
    LIMIT = 4509


class ErrorCode(StrEnum):
    """Why a command was refused."""

    BAD_REQUEST = "bad-request"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    CONFLICT = "conflict"
    BUSY = "busy"
    TOO_LARGE = "too-large"
    RATE_LIMITED = "rate-limited"
    STORE_UNAVAILABLE = "store-unavailable"
    DRAINING = "draining"


RETRYABLE = frozenset(
    {ErrorCode.BUSY, ErrorCode.RATE_LIMITED, ErrorCode.STORE_UNAVAILABLE, ErrorCode.DRAINING}
)
"""The refusals after which the same command may succeed later."""


class GatewayError(Exception):
    """Something that a person is told. Message: ``unable to X; Y``."""


class Refusal(GatewayError):
    """A command that was not carried out; nothing changed.

    Attributes:
        code: The refusal on the wire.
        retry_after_seconds: When the same command may succeed, if that is known.
    """

    def __init__(self, code: ErrorCode, message: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_seconds = retry_after_seconds

    @property
    def retryable(self) -> bool:
        """Whether the same command may succeed later."""
        return self.code in RETRYABLE


def bad_request(message: str) -> Refusal:
    """A command that no retry makes right."""
    return Refusal(ErrorCode.BAD_REQUEST, message)


def session_id(text: str) -> SessionId:
    """Check a session's name as a client gave it.

    Braces, slashes and any script's letters are welcome: no name reaches a key of the store or an
    unescaped path.

    Raises:
        Refusal: It is empty, too long, a dot segment, or holds control characters or half a surrogate pair.
    """
    if not text:
        raise bad_request("unable to use an empty session id; name the chat")
    if text in {".", ".."}:
        raise bad_request(f"unable to use {text!r} as a session id; it means a folder in a URL")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise bad_request("unable to use the session id; it holds half a surrogate pair") from None
    if size > MAX_SESSION_ID_BYTES:
        raise bad_request(f"unable to use a session id of {size} bytes; {MAX_SESSION_ID_BYTES} is the most")
    if any(unicodedata.category(character) == "Cc" for character in text):
        raise bad_request("unable to use the session id; it holds control characters")
    return SessionId(text)


def turn_id(text: str) -> TurnId:
    """Check a turn id as a client minted it.

    Raises:
        Refusal: It is not 1 to 128 printable ASCII characters without space.
    """
    return TurnId(_small_id(text, "turn id"))


def client_id(text: str) -> ClientId:
    """Check a client id as a client brought it.

    Raises:
        Refusal: It is not 1 to 128 printable ASCII characters without space.
    """
    return ClientId(_small_id(text, "client id"))


def _small_id(text: str, what: str) -> str:
    if not _SMALL_ID.fullmatch(text):
        raise bad_request(
            f"unable to use the {what}; it must be 1 to {MAX_SMALL_ID_LENGTH} printable ASCII "
            "characters without space, such as a UUID"
        )
    return text


def turn_tag(turn: TurnId) -> str:
    """The short name of a turn inside a cursor: enough to notice an offset that was used again."""
    return hashlib.sha256(turn.encode()).hexdigest()[:_TAG_LENGTH]


def next_check(check: str, turn: TurnId, stored_kind: str, payload: bytes) -> str:
    """The check of a record: whoever knows it knows that the journal before it is the same one.

    The same as in lua/common.lua, where SHA-1 is the digest at hand.

    Args:
        check: Of the record before; empty before the first.
        turn: Whose record it is.
        stored_kind: Kind and flags as the journal keeps them.
        payload: What it says.
    """
    head = f"{check}{turn}\0{stored_kind}\0".encode()
    return hashlib.sha1(head + payload, usedforsecurity=False).hexdigest()[:_CHECK_LENGTH]


class Cursor(msgspec.Struct, frozen=True):
    """A place in a session, opaque to clients, handed back to continue after it.

    Attributes:
        epoch: Which incarnation of the journal; empty where the session had none yet.
        offset: The last record had; 0 before the first.
        tag: :func:`turn_tag` of that record's turn; empty where that is not known.
        check: :func:`next_check` of that record: it stands for all before it; empty where that is not known.
    """

    epoch: str
    offset: int
    tag: str = ""
    check: str = ""

    def __str__(self) -> str:
        place = f"{self.epoch}.{self.offset}.{self.tag}"
        return f"{place}.{self.check}" if self.check else place

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Read what a client handed back.

        Raises:
            Refusal: It is no cursor of this gateway.
        """
        match = _CURSOR.fullmatch(text)
        if match is None:
            raise bad_request("unable to use the cursor; hand back a record's cursor unchanged, or none")
        offset, check = int(match["offset"]), match["check"] or ""
        return cls(epoch=match["epoch"], offset=offset, tag=match["tag"], check=check)


_CURSOR = re.compile(
    r"(?P<epoch>[0-9a-f]{0,32})\.(?P<offset>\d{1,15})\.(?P<tag>[0-9a-f]{0,6})(\.(?P<check>[0-9a-f]{8}))?",
    re.ASCII,
)

RECORD_OVERHEAD_BYTES = 160
"""What an envelope adds to a payload: type, session, offset, cursor and turn."""


class RecordKind(StrEnum):
    """What a record is; one letter in the journal."""

    TURN_START = "s"
    CHUNK = "c"
    TURN_END = "e"


class Draft(msgspec.Struct, frozen=True):
    """A record before the journal gave it an offset.

    Attributes:
        kind: What it is.
        payload: ``CHUNK`` with ``plain`` unset: the upstream JSON, on one line. Otherwise the members of
            the wire's JSON object, without braces, such as ``"text":"hi","event":"note"``.
        plain: For a chunk: its payload was no JSON or its event had a name, so ``payload`` holds members.
        ai_sdk: For a turn's end: the turn was an AI SDK stream.
        done: For a turn's end: the backend wrote ``[DONE]``.
    """

    kind: RecordKind
    payload: bytes
    plain: bool = False
    ai_sdk: bool = False
    done: bool = False


@dataclass(slots=True)
class Record:
    """One entry of a journal: what every client sees at the same offset.

    Attributes:
        cursor: Where it stands.
        turn: Whose it is.
        draft: What it says.
        line: As a line of the session protocol, once it was made; every client gets the same bytes.
        event: As an event of the HTTP wire, once it was made.
    """

    cursor: Cursor
    turn: TurnId
    draft: Draft
    line: bytes | None = field(default=None, compare=False, repr=False)
    event: bytes | None = field(default=None, compare=False, repr=False)

    @property
    def offset(self) -> int:
        """Its place in the journal."""
        return self.cursor.offset

    @property
    def kind(self) -> RecordKind:
        """What it is."""
        return self.draft.kind

    @property
    def size(self) -> int:
        """About the bytes that it takes on a wire."""
        return len(self.draft.payload) + RECORD_OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class By:
    """Who sent or cancelled.

    Attributes:
        client: The client.
        user: The user, where the gateway knows one.
        backend: The backend itself, with an ``abort`` chunk of its own.
    """

    client: str = ""
    user: str = ""
    backend: bool = False


@dataclass(frozen=True, slots=True)
class TurnError:
    """What a ``turn-end`` says went wrong.

    Attributes:
        code: From a closed set.
        message: For people. For a refusal of the backend: the first 4 KB of its body.
        status: The backend's status, when it answered with one.
        retry_after_seconds: The backend's ``Retry-After``.
    """

    code: EndCode
    message: str
    status: int | None = None
    retry_after_seconds: float | None = None
