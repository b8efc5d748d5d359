"""What must be known of a send's body, and no more: its session, and what to tell other devices of it.

The body itself is handed to the backend as it came. What is put into it (the session, on the session
protocol) is put between raw slices.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import msgspec

from gateway.core.model import By, SessionId, TurnId, bad_request
from gateway.core.rawjson import NotJSON, WrongShape, decode, encode, one_line, whole_characters
from gateway.core.uistream import derived_message_id

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_array = msgspec.json.Decoder(list[msgspec.Raw])
_text = msgspec.json.Decoder(str)


class _Message(msgspec.Struct):
    id: str | None = None
    role: str | None = None


_message = msgspec.json.Decoder(_Message)


@dataclass(frozen=True, slots=True)
class SendBody:
    """A body, looked at.

    Attributes:
        raw: As it goes to the backend.
        session: As the body names it; ``None`` if it names none.
        message: The last message, raw JSON on one line; ``None`` if there is none.
        trigger: ``submit-message`` or ``regenerate-message``, where the client says.
        message_id: Which message is edited, continued or generated again, where the client says.
        answers_to: The id of the last message when that is an assistant's: this send continues it.
    """

    raw: bytes
    session: str | None = None
    message: bytes | None = None
    trigger: str | None = None
    message_id: str | None = None
    answers_to: str | None = None

    def answer_id(self, turn: TurnId) -> str:
        """The message id of the answer, where the backend gives none.

        The rule of the SDK's ``getResponseUIMessageId``: a continuation keeps the id of the message that
        it continues; anything else gets a new one, here one that every device derives alike.
        """
        return self.answers_to or derived_message_id(turn)


def read_body(raw: bytes, *, session_field: str) -> SendBody:
    """Look at the body of a send.

    Args:
        raw: The body as it came.
        session_field: Dotted path of the member that names the session.

    Raises:
        Refusal: It is no JSON object.
    """
    members = _members(raw)
    message = _last_message(members)
    head = _Message()
    if message is not None:
        with contextlib.suppress(WrongShape):  # a message of another vocabulary: nothing to know of it
            head = decode(_message, message)
    return SendBody(
        raw=raw,
        session=_session(members, session_field.split(".")),
        message=None if message is None else one_line(whole_characters(message)),
        trigger=_optional_text(members.get("trigger")),
        message_id=_optional_text(members.get("messageId")),
        answers_to=head.id if head.role == "assistant" else None,
    )


def with_session(raw: bytes, *, session: SessionId, session_field: str) -> bytes:
    """The body with its session put in where it names none.

    Raises:
        Refusal: It is no JSON object, or names another session.
    """
    path = session_field.split(".")
    named = _session(_members(raw), path)
    if named is None:
        return _put(raw, path, encode(session))
    if named != session:
        raise bad_request(f"unable to send; the body's {session_field!r} names another session")
    return raw


def turn_start(body: SendBody, *, path: str, by: By, at_milliseconds: int, max_bytes: int) -> bytes:
    """The members of a ``turn-start`` that are its own.

    Args:
        body: The send's body.
        path: The chat path asked for.
        by: Who sent.
        at_milliseconds: When, since the Unix epoch.
        max_bytes: Parts of the message are left out, the largest first, until it is no larger.
    """
    pieces = [b'"path":' + encode(path)]
    if body.trigger is not None:
        pieces.append(b'"trigger":' + encode(body.trigger))
    message = b"" if body.message is None else _bounded(body.message, max_bytes)
    pieces.append(b'"messages":[' + message + b"]")
    if body.message_id is not None:
        pieces.append(b'"messageId":' + encode(body.message_id))
    pieces.append(b'"by":' + encode(told_by(by)))
    pieces.append(b'"at":%d' % at_milliseconds)
    return b",".join(pieces)


def told_by(by: By) -> dict[str, object]:
    """Who it was, as the wire says it."""
    if by.backend:
        return {"backend": True}
    return {"user": by.user, "client": by.client} if by.user else {"client": by.client}


def _members(raw: bytes) -> dict[str, msgspec.Raw]:
    try:
        return decode(_object, raw)
    except NotJSON as error:
        raise bad_request(f"unable to read the body; it is no JSON ({error})") from None
    except WrongShape:
        raise bad_request("unable to read the body; it must be a JSON object") from None


def _session(members: dict[str, msgspec.Raw], path: list[str]) -> str | None:
    value = members.get(path[0])
    if value is None or bytes(value) == b"null":
        return None
    try:
        if len(path) > 1:
            return _session(decode(_object, bytes(value)), path[1:])
        return decode(_text, bytes(value))
    except WrongShape:
        raise bad_request(
            f"unable to read the body; {path[0]!r} has the wrong type for a session's name"
        ) from None


def _put(raw: bytes, path: list[str], value: bytes) -> bytes:
    members = _members(raw)
    inner = members.get(path[0])
    if len(path) > 1:
        value = _put(b"{}" if inner is None or bytes(inner) == b"null" else bytes(inner), path[1:], value)
    return encode({**members, path[0]: msgspec.Raw(value)})


def _optional_text(value: msgspec.Raw | None) -> str | None:
    if value is None:
        return None
    try:
        return decode(_text, bytes(value))
    except WrongShape:
        return None


def _last_message(members: dict[str, msgspec.Raw]) -> bytes | None:
    messages = members.get("messages")
    if messages is not None and bytes(messages) != b"null":
        try:
            items = decode(_array, bytes(messages))
        except WrongShape:
            return None
        return bytes(items[-1]) if items else None
    message = members.get("message")
    return None if message is None or bytes(message) == b"null" else bytes(message)


def _bounded(message: bytes, max_bytes: int) -> bytes:
    if len(message) <= max_bytes:
        return message
    try:
        members = decode(_object, message)
        parts = decode(_array, bytes(members["parts"]))
    except (WrongShape, KeyError):
        return encode({"omitted": {"bytes": len(message)}})
    too_much = len(message) - max_bytes
    for index in sorted(range(len(parts)), key=lambda index: -len(bytes(parts[index]))):
        if too_much <= 0:
            break
        placeholder = _placeholder(bytes(parts[index]))
        too_much -= len(bytes(parts[index])) - len(placeholder)
        parts[index] = msgspec.Raw(placeholder)
    if too_much > 0:
        return encode({"omitted": {"bytes": len(message)}})
    return encode({**members, "parts": msgspec.Raw(encode(parts))})


class _Part(msgspec.Struct):
    type: str = ""
    mediaType: str | None = None  # noqa: N815 - the SDK's own key


_part = msgspec.json.Decoder(_Part)


def _placeholder(part: bytes) -> bytes:
    """A part that says what was left out; `data-*` is what every SDK lets pass."""
    try:
        head = decode(_part, part)
    except WrongShape:
        head = _Part()
    left_out: dict[str, object] = {"type": head.type[:100], "bytes": len(part)}
    if head.mediaType is not None:
        left_out["mediaType"] = head.mediaType[:100]
    return encode({"type": "data-omitted", "data": left_out})
