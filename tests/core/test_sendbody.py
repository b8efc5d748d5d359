from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.model import By, ErrorCode, Refusal, SessionId, TurnId
from gateway.core.sendbody import SendBody, read_body, told_by, turn_start, with_session
from gateway.core.uistream import derived_message_id

ANNA = By(client="anna")
TURN = TurnId("t1")


def read(raw: bytes, field: str = "id") -> SendBody:
    return read_body(raw, session_field=field)


def start_of(body: SendBody, *, by: By = ANNA, max_bytes: int = 10_000) -> dict[str, Any]:
    members = turn_start(body, path="/api/chat", by=by, at_milliseconds=1_700, max_bytes=max_bytes)
    assert b"\n" not in members
    assert b"\r" not in members
    parsed = json.loads(b"{" + members + b"}")
    assert isinstance(parsed, dict)
    return parsed


@pytest.mark.parametrize(
    ("raw", "field", "session"),
    [
        (b'{"id":"s1"}', "id", "s1"),
        (b' {\n "id" : "s1"\n} ', "id", "s1"),
        (b'{"id":"a","id":"b"}', "id", "b"),
        (b'{"\\u0069d":"s1"}', "id", "s1"),
        (b'{"id":"\\u00f6\\ud83d\\ude00"}', "id", "ö😀"),
        (b'{"id":"\\ud83d"}', "id", "\ufffd"),
        (b'{"id":""}', "id", ""),
        (b'{"id":null}', "id", None),
        (b'{"id": null }', "id", None),
        (b"{}", "id", None),
        (b'{"chatId":"s1","id":"other"}', "chatId", "s1"),
        (b'{"chat":{"id":"s1"},"id":"other"}', "chat.id", "s1"),
        (b'{"a":{"b":{"c":"s1"}}}', "a.b.c", "s1"),
        (b'{"chat":{}}', "chat.id", None),
        (b'{"chat":null}', "chat.id", None),
        (b'{"id":"s1"}', "chat.id", None),
        (b'{"chat.id":"s1"}', "chat.id", None),
        (b'{"id":"s1","x":"\xff"}', "id", "s1"),
    ],
)
def test_a_session_is_found_where_the_setting_says(raw: bytes, field: str, session: str | None) -> None:
    """The SDK puts it in `id`; apps that prepare their own body put it anywhere."""
    body = read(raw, field)
    assert body.session == session
    assert body.raw is raw


@pytest.mark.parametrize(
    ("raw", "field", "why"),
    [
        (b"", "id", "no JSON"),
        (b'{"id":"a"', "id", "no JSON"),
        (b'{"id":"a"} x', "id", "no JSON"),
        (b'{"id":NaN}', "id", "no JSON"),
        (b'{"id":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "id", "no JSON"),
        (b"[]", "id", "JSON object"),
        (b'"id"', "id", "JSON object"),
        (b"null", "id", "JSON object"),
        (b'{"id":5}', "id", "'id' has the wrong type"),
        (b'{"id":["a"]}', "id", "'id' has the wrong type"),
        (b'{"id":false}', "id", "'id' has the wrong type"),
        (b'{"chat":"s1"}', "chat.id", "'chat' has the wrong type"),
        (b'{"chat":{"id":{}}}', "chat.id", "'id' has the wrong type"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_body_that_cannot_be_read_is_refused_with_its_reason(raw: bytes, field: str, why: str) -> None:
    """The person who wrote the client is told what is wrong with it."""
    with pytest.raises(Refusal, match=f"^unable to read the body; .*{why}") as caught:
        read(raw, field)
    assert caught.value.code is ErrorCode.BAD_REQUEST


@pytest.mark.parametrize(
    ("raw", "field", "expected"),
    [
        (b'{"a": 1.00 , "id":"s"}', "id", b'{"a": 1.00 , "id":"s"}'),
        (b'{"id":"\\u0073"}', "id", b'{"id":"\\u0073"}'),
        (b'{"chat":{ "id":"s" }}', "chat.id", b'{"chat":{ "id":"s" }}'),
        (b"{}", "id", b'{"id":"s"}'),
        (b'{"a":1.00,"b":{ "c":12345678901234567890123 }}', "id",
         b'{"a":1.00,"b":{ "c":12345678901234567890123 },"id":"s"}'),
        (b'{"id":null,"a":1}', "id", b'{"id":"s","a":1}'),
        (b'{"a":1}', "chat.id", b'{"a":1,"chat":{"id":"s"}}'),
        (b'{"chat":null,"a":1}', "chat.id", b'{"chat":{"id":"s"},"a":1}'),
        (b'{"chat":{"x":1.0},"a":1}', "chat.id", b'{"chat":{"x":1.0,"id":"s"},"a":1}'),
        (b"{}", "a.b.c", b'{"a":{"b":{"c":"s"}}}'),
    ],
)  # fmt: skip
def test_a_session_is_put_in_only_where_there_is_none(raw: bytes, field: str, expected: bytes) -> None:
    """The backend must get the client's own bytes, and know whose chat it is."""
    sent = with_session(raw, session=SessionId("s"), session_field=field)
    assert sent == expected
    assert read(sent, field).session == "s"
    if expected == raw:
        assert sent is raw


@pytest.mark.parametrize("raw", [b'{"id":"other"}', b'{"id":""}', b'{"id":"S"}'])
def test_a_body_of_another_session_is_refused(raw: bytes) -> None:
    """Whoever may send to one session must not reach another through it."""
    with pytest.raises(Refusal, match="unable to send; the body's 'id' names another session"):
        with_session(raw, session=SessionId("s"), session_field="id")


USER = b'{"id":"u1","role":"user","parts":[{"type":"text","text":"hi"}]}'
ANSWER = b'{"id":"a1","role":"assistant","parts":[]}'


@pytest.mark.parametrize(
    ("raw", "message", "answers_to"),
    [
        (b'{"messages":[' + USER + b"]}", USER, None),
        (b'{"messages":[' + ANSWER + b"," + USER + b"]}", USER, None),
        (b'{"messages":[' + USER + b", " + ANSWER + b" ]}", ANSWER, "a1"),
        (b'{"message":' + USER + b"}", USER, None),
        (b'{"message":' + ANSWER + b"}", ANSWER, "a1"),
        (b'{"messages":[' + ANSWER + b'],"message":' + USER + b"}", ANSWER, "a1"),
        (b'{"messages":null,"message":' + USER + b"}", USER, None),
        (b'{"messages":[],"message":' + USER + b"}", None, None),
        (b'{"messages":[]}', None, None),
        (b'{"message":null}', None, None),
        (b"{}", None, None),
        (b'{"messages":"hi"}', None, None),
        (b'{"messages":{"a":1}}', None, None),
        (b'{"messages":["hi"]}', b'"hi"', None),
        (b'{"message":"hi"}', b'"hi"', None),
        (b'{"messages":[5]}', b"5", None),
        (b'{"messages":[{"id":7,"role":"assistant"}]}', b'{"id":7,"role":"assistant"}', None),
        (b'{"messages":[{"role":"assistant"}]}', b'{"role":"assistant"}', None),
        (b'{"messages":[{"role":"user",\r\n"id":"x"}]}', b'{"role":"user",  "id":"x"}', None),
        (b'{"messages":["\\ud83d\\\\ud83d"]}', b'"\\ufffd\\\\ud83d"', None),
        (b'{"messages":["\xff"]}', '"\ufffd"'.encode(), None),
    ],
)
def test_the_new_message_is_the_last_one(raw: bytes, message: bytes | None, answers_to: str | None) -> None:
    """Other devices see the question from the turn's start, without waiting for the answer."""
    body = read(raw)
    assert body.message == message
    assert body.answers_to == answers_to
    assert body.answer_id(TURN) == (answers_to or derived_message_id(TURN))


def test_a_continuation_keeps_the_answers_id() -> None:
    """A tool result is sent with the assistant's message last; a new id would show the answer twice."""
    body = read(b'{"messages":[' + ANSWER + b'],"trigger":"submit-message","messageId":"a1"}')
    assert body.answer_id(TURN) == "a1"
    assert body.answer_id(TurnId("another")) == "a1"


def test_a_regeneration_says_so() -> None:
    """A reader of the journal knows which answer was replaced."""
    raw = b'{"id":"s","messages":[' + USER + b'],"trigger":"regenerate-message","messageId":"a1"}'
    body = read(raw)
    assert (body.trigger, body.message_id) == ("regenerate-message", "a1")
    assert body.answer_id(TURN) == derived_message_id(TURN)
    assert start_of(body) == {
        "path": "/api/chat",
        "trigger": "regenerate-message",
        "messages": [json.loads(USER)],
        "messageId": "a1",
        "by": {"client": "anna"},
        "at": 1_700,
    }


@pytest.mark.parametrize(
    "raw", [b"{}", b'{"trigger":5,"messageId":[]}', b'{"trigger":null,"messageId":null}']
)
def test_what_a_body_does_not_say_is_left_out(raw: bytes) -> None:
    """Not every client is the SDK's."""
    assert start_of(read(raw)) == {
        "path": "/api/chat",
        "messages": [],
        "by": {"client": "anna"},
        "at": 1_700,
    }


@pytest.mark.parametrize(
    ("by", "told"),
    [
        (By(client="c"), {"client": "c"}),
        (By(client="c", user="u"), {"user": "u", "client": "c"}),
        (By(backend=True), {"backend": True}),
    ],
)
def test_who_it_was_is_told(by: By, told: dict[str, object]) -> None:
    """Several people may sit in one session."""
    assert told_by(by) == told
    assert start_of(read(b"{}"), by=by)["by"] == told


def message_with(*parts: dict[str, object]) -> bytes:
    message = {"id": "u1", "role": "user", "parts": list(parts)}
    return json.dumps({"id": "s", "messages": [message]}, separators=(",", ":")).encode()


TEXT: dict[str, object] = {"type": "text", "text": "what is this?"}
IMAGE: dict[str, object] = {
    "type": "file",
    "mediaType": "image/png",
    "url": "data:image/png;base64," + "A" * 3000,
}


def test_a_large_image_is_left_out_and_says_so() -> None:
    """A journal is no photo album: the backend got the image, and other devices are told of it."""
    raw = message_with(TEXT, IMAGE)
    told = start_of(read(raw), max_bytes=500)
    (message,) = told["messages"]
    assert (message["id"], message["role"]) == ("u1", "user")
    size = len(json.dumps(IMAGE, separators=(",", ":")))
    assert message["parts"] == [
        TEXT,
        {"type": "data-omitted", "data": {"type": "file", "bytes": size, "mediaType": "image/png"}},
    ]
    assert read(raw).raw == raw
    assert start_of(read(raw), max_bytes=len(raw))["messages"][0]["parts"] == [TEXT, IMAGE]


def test_the_largest_parts_go_first() -> None:
    """What is said in words should be the last to go."""
    small: dict[str, object] = {**IMAGE, "url": "A" * 1000}
    told = start_of(read(message_with(small, IMAGE, TEXT)), max_bytes=1500)
    kinds = [part["type"] for part in told["messages"][0]["parts"]]
    assert kinds == ["file", "data-omitted", "text"]


@pytest.mark.parametrize(
    "message",
    [
        {"id": "u1", "role": "user", "content": "x" * 1000},
        {"id": "u1", "role": "user", "parts": "x" * 1000},
        ["x" * 1000],
        "x" * 1000,
        {"id": "u" * 1000, "parts": []},
        {"id": "u1", "parts": [{"type": "x"}] * 100},
    ],
)
def test_a_large_message_of_any_kind_is_left_out_whole(message: object) -> None:
    """The bound holds for every vocabulary."""
    size = len(json.dumps(message, separators=(",", ":")))
    raw = json.dumps({"message": message}, separators=(",", ":")).encode()
    assert start_of(read(raw), max_bytes=200)["messages"] == [{"omitted": {"bytes": size}}]


parts = st.lists(
    st.one_of(
        st.builds(lambda size: {"type": "text", "text": "x" * size}, st.integers(0, 400)),
        st.builds(
            lambda kind, media, size: {"type": kind, "mediaType": media, "url": "A" * size},
            st.text(max_size=120),
            st.text(max_size=120),
            st.integers(0, 400),
        ),
        st.sampled_from([5, None, "text", {"type": 5}]),
    ),
    max_size=5,
)


@given(parts=parts, max_bytes=st.integers(60, 800), indent=st.sampled_from([None, 2]))
def test_a_message_never_exceeds_its_bound(parts: list[object], max_bytes: int, indent: int | None) -> None:
    """A record that outgrew an event's bound could not be read back by anybody."""
    message = {"id": "u1", "role": "user", "parts": parts}
    body = read(json.dumps({"message": message}, indent=indent).encode())
    pieces = turn_start(body, path="/", by=ANNA, at_milliseconds=0, max_bytes=max_bytes)
    told = json.loads(b"{" + pieces + b"}")["messages"]
    overhead = len(turn_start(read(b"{}"), path="/", by=ANNA, at_milliseconds=0, max_bytes=max_bytes))
    assert len(pieces) - overhead <= max_bytes
    assert body.message is not None
    if len(body.message) <= max_bytes:
        assert told == [message]
    elif "omitted" not in told[0]:
        assert len(told[0]["parts"]) == len(parts)
        for there, sent in zip(told[0]["parts"], parts, strict=True):
            assert there == sent or there["type"] == "data-omitted"
