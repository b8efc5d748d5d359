from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import wire
from gateway.core.model import (
    By,
    CancelResult,
    Cursor,
    Draft,
    EndCode,
    EndReason,
    ErrorCode,
    Record,
    RecordKind,
    Refusal,
    ResyncReason,
    SessionId,
    TurnError,
    TurnId,
)
from gateway.core.sse import ServerSentEvent
from gateway.core.turn import End
from gateway.core.uistream import read_chunk
from gateway.core.wire import Attach, AttachFrom, BadCommand, Cancel, Command, Detach, Ping, parse_command

S = SessionId("s{1}/ö")
T = TurnId("t1")
CURSOR = Cursor("9f", 7, "abc123")


@pytest.mark.parametrize(
    ("frame", "command"),
    [
        ('{"type":"attach","id":"1","session":"s"}', Attach("1", "s")),
        ('{"type":"attach","id":1,"session":"s","after":"e.1.t"}', Attach(1, "s", "e.1.t")),
        ('{"type":"attach","id":1,"session":"s","after":null}', Attach(1, "s")),
        ('{"type":"attach","id":1,"session":"s","from":null}', Attach(1, "s")),
        ('{"type":"attach","id":1,"session":"s","from":"start"}', Attach(1, "s", None, AttachFrom.START)),
        ('{"type":"attach","id":1,"session":"s","from":"running"}', Attach(1, "s", None, AttachFrom.RUNNING)),
        ('{"session":"s","id":-3,"type":"detach"}', Detach(-3, "s")),
        ('{"type":"cancel","id":"1","session":"s"}', Cancel("1", "s")),
        ('{"type":"cancel","id":"1","session":"s","turn":"t"}', Cancel("1", "s", "t")),
        ('{"type":"ping","id":0}', Ping(0)),
        ('{"type":"ping","id":""}', Ping("")),
        (' {\n"type" : "ping", "id":"a\\u00f6" , "later": [{}] }\n', Ping("aö")),
        ('{"type":"ping","id":"' + "x" * 128 + '"}', Ping("x" * 128)),
        ('{"type":"ping","id":' + str(2**80) + "}", Ping(2**80)),
        (b'{"type":"ping","id":1}', Ping(1)),
    ],
)
def test_a_command_is_read(frame: str | bytes, command: Command) -> None:
    """Members that a later version adds are read past."""
    assert parse_command(frame) == command


def test_a_sends_body_is_kept_as_it_came() -> None:
    """The backend gets the client's bytes, not ours."""
    frame = (
        '{"type":"send","id":1,"session":"s","turn":"t","path":"/p","overlap":"reject","headers":{"X":"y"},'
        '"body":{ "a" : 1.00, "b":12345678901234567890123 }}'
    )
    command = parse_command(frame)
    assert isinstance(command, wire.Send)
    assert (command.id, command.session, command.turn) == (1, "s", "t")
    assert (command.path, command.overlap, command.headers) == ("/p", "reject", {"X": "y"})
    assert bytes(command.body) == b'{ "a" : 1.00, "b":12345678901234567890123 }'
    bare = parse_command('{"type":"send","id":1,"session":"s","turn":"t","body":[]}')
    assert isinstance(bare, wire.Send)
    assert (bare.path, bare.overlap, bare.headers, bytes(bare.body)) == (None, None, None, b"[]")


LONG = "x" * 129
BAD: list[tuple[str, object, str]] = [
    ("", None, "no JSON"),
    ("hello", None, "no JSON"),
    ('{"type":"ping","id":1', None, "no JSON"),
    ('{"type":"ping","id":1}{"type":"ping","id":2}', None, "no JSON"),
    ('{"type":"ping","id":1}\n{"type":"ping","id":2}', None, "no JSON"),
    ('{"type":"ping","id":NaN}', None, "no JSON"),
    ('{"type":"ping","id":"a\nb"}', None, "no JSON"),
    ('{"type":"ping","id":1,"x":' + "[" * 100_000 + "]" * 100_000 + "}", None, "no JSON"),
    ("null", None, "must be a JSON object"),
    ("5", None, "must be a JSON object"),
    ('"ping"', None, "must be a JSON object"),
    ("[]", None, "must be a JSON object"),
    ('[{"type":"ping","id":1}]', None, "must be a JSON object"),
    ("[" * 100_000, None, "must be a JSON object"),
    ("{}", None, "of type None"),
    ('{"id":1}', 1, "of type None"),
    ('{"type":null,"id":1}', 1, "of type None"),
    ('{"type":5,"id":"a"}', "a", "of type None"),
    ('{"type":["ping"],"id":"a"}', "a", "of type None"),
    ('{"type":"PING","id":"a"}', "a", "of type 'PING'; known are attach, detach, send, cancel, ping"),
    ('{"type":"signal","id":"a","session":"s","name":"n","data":1}', "a", "of type 'signal'"),
    ('{"type":"auth","id":"a","token":"x"}', "a", "of type 'auth'"),
    ('{"type":"hello","id":' + str(2**80) + "}", 2**80, "of type 'hello'"),
    ('{"type":"' + "x" * 5000 + '","id":"a"}', "a", "of type 'xxx"),
    ('{"type":"x\\ud83d","id":"a\\ud83d"}', "a\ufffd", "of type 'x\ufffd'"),
    ('{"type":"nope","id":[1]}', None, "of type 'nope'"),
    ('{"type":"nope","id":"' + LONG + '"}', None, "of type 'nope'"),
    ('{"type":"ping"}', None, "the ping command; .*`id`"),
    ('{"type":"ping","id":null}', None, "the ping command"),
    ('{"type":"ping","id":true}', None, "the ping command"),
    ('{"type":"ping","id":1.5}', None, "the ping command"),
    ('{"type":"ping","id":1e400}', None, "the ping command"),
    ('{"type":"ping","id":{}}', None, "the ping command"),
    ('{"type":"ping","id":' + "9" * 5000 + "}", None, "the ping command"),
    ('{"type":"ping","id":"' + LONG + '"}', None, "128 characters are the most"),
    ('{"type":"attach","id":"a"}', "a", "the attach command; .*`session`"),
    ('{"type":"attach","id":"a","session":5}', "a", r"the attach command; .*\$.session"),
    ('{"type":"attach","id":"a","session":null}', "a", r"the attach command; .*\$.session"),
    ('{"type":"attach","id":"a","session":"s","after":7}', "a", r"the attach command; .*\$.after"),
    ('{"type":"attach","id":"a","session":"s","from":"end"}', "a", r"the attach command; .*'end'.*\$.from"),
    ('{"type":"attach","id":"a","session":"s","from":1}', "a", r"the attach command; .*\$.from"),
    ('{"type":"detach","id":"a"}', "a", "the detach command; .*`session`"),
    ('{"type":"cancel","id":"a","session":"s","turn":["t"]}', "a", r"the cancel command; .*\$.turn"),
    ('{"type":"send","id":"a","session":"s","turn":"t"}', "a", "the send command; .*`body`"),
    ('{"type":"send","id":"a","session":"s","body":{}}', "a", "the send command; .*`turn`"),
    ('{"type":"send","id":"a","session":"s","turn":5,"body":{}}', "a", r"the send command; .*\$.turn"),
    ('{"type":"send","id":"a","session":"s","turn":"t","body":{},"path":1}', "a", r"\$.path"),
    ('{"type":"send","id":"a","session":"s","turn":"t","body":{},"overlap":{}}', "a", r"\$.overlap"),
    ('{"type":"send","id":"a","session":"s","turn":"t","body":{},"headers":[]}', "a", r"\$.headers"),
    ('{"type":"send","id":"a","session":"s","turn":"t","body":{},"headers":{"a":1}}', "a", r"\$.headers"),
]


@pytest.mark.parametrize(("frame", "identifier", "why"), BAD, ids=[row[0][:60] for row in BAD])
def test_what_is_no_command_is_refused_with_its_id_and_reason(
    frame: str, identifier: object, why: str
) -> None:
    """A client waits for the one reply to its id; the next command must find the connection unharmed."""
    for form in (frame, frame.encode()):
        with pytest.raises(BadCommand, match=f"(?s)^unable to .*{why}") as caught:
            parse_command(form)
        assert caught.value.id == identifier
        assert caught.value.code is ErrorCode.BAD_REQUEST
        assert len(caught.value.message) < 300
        reply = json.loads(wire.refused(caught.value.id, caught.value))
        assert reply.get("id") == identifier
        assert ("id" in reply) is (identifier is not None)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
member_names = st.sampled_from(
    ["type", "id", "session", "turn", "body", "after", "from", "path", "overlap", "headers"]
)


@given(
    members=st.dictionaries(member_names, json_values),
    kind=st.sampled_from(["attach", "detach", "send", "cancel", "ping", "signal", None]),
    cut=st.integers(0, 5),
)
def test_any_frame_is_a_command_or_a_bad_one(members: dict[str, Any], kind: str | None, cut: int) -> None:
    """No client's input may raise anything that the socket does not know how to answer."""
    frame = json.dumps(members if kind is None else {**members, "type": kind})
    try:
        command = parse_command(frame[: len(frame) - cut])
    except BadCommand as refusal:
        json.loads(wire.refused(refusal.id, refusal))
        found = refusal.id
    else:
        found = command.id
    identifier = members.get("id")
    if not cut:
        has_id = isinstance(identifier, (str, int)) and not isinstance(identifier, bool)
        assert found == (identifier if has_id else None)


RECORDS: list[tuple[Record, bytes]] = [
    (
        Record(CURSOR, T, Draft(RecordKind.CHUNK, b'{"type":"text-delta","delta":1.00}')),
        b'"data":{"type":"text-delta","delta":1.00}',
    ),
    (
        Record(CURSOR, T, Draft(RecordKind.CHUNK, b'"text":"hi","event":"note"', plain=True)),
        b'"text":"hi","event":"note"',
    ),
    (Record(CURSOR, T, Draft(RecordKind.TURN_START, b'"messages":[]')), b'"messages":[]'),
    (Record(CURSOR, T, Draft(RecordKind.TURN_END, b'"reason":"complete"')), b'"reason":"complete"'),
]  # fmt: skip
KINDS = [b"chunk", b"chunk", b"turn-start", b"turn-end"]


@pytest.mark.parametrize(
    ("kind", "record", "members"), [(kind, *row) for kind, row in zip(KINDS, RECORDS, strict=True)]
)
def test_a_record_is_one_line(kind: bytes, record: Record, members: bytes) -> None:
    """The envelope is ours, what stands in it is the backend's, byte for byte."""
    envelope = b'{"type":"%b","session":%b,"offset":7,"cursor":"9f.7.abc123","turn":"t1",%b}'
    record = Record(record.cursor, record.turn, record.draft)
    line = wire.encode_push(S, record)
    assert line == envelope % (kind, '"s{1}/ö"'.encode(), members)
    assert json.loads(line)["offset"] == 7
    assert wire.encode_push(S, record) is line, "every client gets the same bytes, made once"


def test_a_poll_brings_the_very_lines_of_the_socket() -> None:
    """Byte for byte: numbers and odd spacing of the backend's are not read and written again."""
    records = [Record(record.cursor, record.turn, record.draft) for record, _ in RECORDS]
    lines = b",".join(wire.encode_push(S, record) for record in records)
    assert b'"records":[' + lines + b"]" in wire.polled(S, wire.Standing(CURSOR, 7), records)


@given(
    session=st.text(min_size=1, max_size=20),
    value=json_values,
    indent=st.sampled_from([None, 1]),
    name=st.sampled_from(["", "note"]),
)
def test_a_push_is_one_line_of_json_with_the_backends_bytes(
    session: str, value: Any, indent: int | None, name: str
) -> None:
    """A line break in a name or a payload would cut the frame in two."""
    data = json.dumps(value, indent=indent, ensure_ascii=False).encode()
    draft = read_chunk(ServerSentEvent(data, name), message_id="m").draft
    line = wire.encode_push(SessionId(session), Record(CURSOR, T, draft))
    assert b"\n" not in line
    assert b"\r" not in line
    push = json.loads(line)
    assert (push["session"], push["data"], push.get("event", "")) == (session, value, name)
    if indent is None:
        assert b'"data":' + data + (b',"event":"note"}' if name else b"}") in line


R = ResyncReason.TRIMMED
REPLIES: list[tuple[bytes, object]] = [
    (wire.hello(node="n", client="c", heartbeat_seconds=25),
     {"type": "hello", "protocol": 1, "node": "n", "client": "c", "heartbeat": 25}),
    (wire.attached("1", S, wire.Standing(CURSOR, 9)),
     {"type": "attached", "id": "1", "session": S, "cursor": "9f.7.abc123", "offset": 7, "last": 9,
      "turns": []}),
    (wire.attached(2, S, wire.Standing(CURSOR, 7, (wire.TurnStatus(T, "running", 5),), R)),
     {"type": "attached", "id": 2, "session": S, "cursor": "9f.7.abc123", "offset": 7, "last": 7,
      "resync": "trimmed", "turns": [{"turn": "t1", "state": "running", "offset": 5}]}),
    (wire.opened(S, wire.Standing(CURSOR, 9), heartbeat_seconds=25),
     {"type": "attached", "session": S, "cursor": "9f.7.abc123", "offset": 7, "last": 9, "turns": [],
      "heartbeat": 25}),
    (wire.polled(S, wire.Standing(CURSOR, 9, (), R), []),
     {"cursor": "9f.7.abc123", "offset": 7, "last": 9, "turns": [], "resync": "trimmed", "records": []}),
    (wire.ok("1"), {"type": "ok", "id": "1"}),
    (wire.pong(2**80), {"type": "pong", "id": 2**80}),
    (wire.accepted(0, S, T, CURSOR, duplicate=False),
     {"type": "accepted", "id": 0, "session": S, "turn": "t1", "cursor": "9f.7.abc123"}),
    (wire.accepted("", S, T, CURSOR, duplicate=True),
     {"type": "accepted", "id": "", "session": S, "turn": "t1", "cursor": "9f.7.abc123", "duplicate": True}),
    (wire.cancelled(1, [(T, CancelResult.CANCELLED), (TurnId("t2"), CancelResult.ALREADY_ENDED)]),
     {"type": "cancelled", "id": 1, "turns": [{"turn": "t1", "result": "cancelled"},
                                              {"turn": "t2", "result": "already-ended"}]}),
    (wire.refused(0, Refusal(ErrorCode.BUSY, "unable to x; y", retry_after_seconds=2.5)),
     {"type": "error", "id": 0, "code": "busy", "message": "unable to x; y", "retryable": True,
      "retryAfter": 2.5}),
    (wire.refused(1, Refusal(ErrorCode.DRAINING, "unable", retry_after_seconds=0.0)),
     {"type": "error", "id": 1, "code": "draining", "message": "unable", "retryable": True, "retryAfter": 0}),
    (wire.refused(None, Refusal(ErrorCode.CONFLICT, 'a "b"\n')),
     {"type": "error", "code": "conflict", "message": 'a "b"\n', "retryable": False}),
    (wire.HEARTBEAT, {"type": "heartbeat"}),
    (wire.goaway(1.2345), {"type": "goaway", "after": 1234}),
    (wire.resync(S, ResyncReason.EPOCH_CHANGED),
     {"type": "resync", "session": S, "reason": "epoch-changed"}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "reply"), REPLIES)
def test_replies_are_as_the_protocol_page_has_them(line: bytes, reply: object) -> None:
    """Clients in other languages are written from that page."""
    assert json.loads(line) == reply
    assert b"\n" not in line


@pytest.mark.parametrize(
    ("end", "members"),
    [
        (End(EndReason.COMPLETE, ai_sdk=True, done=True), {"reason": "complete"}),
        (End(EndReason.CANCELLED, by=By(client="c")), {"reason": "cancelled", "by": {"client": "c"}}),
        (
            End(EndReason.CANCELLED, by=By(backend=True), ai_sdk=True),
            {"reason": "cancelled", "by": {"backend": True}},
        ),
        (
            End(EndReason.ERROR, error=TurnError(EndCode.UPSTREAM_REFUSED, "no\n", 429, 2.0)),
            {
                "reason": "error",
                "error": {"code": "upstream-refused", "message": "no\n", "status": 429, "retryAfter": 2.0},
            },
        ),
        (
            End(EndReason.ERROR, error=TurnError(EndCode.UPSTREAM_REFUSED, "no", 0, 0.0)),
            {
                "reason": "error",
                "error": {"code": "upstream-refused", "message": "no", "status": 0, "retryAfter": 0},
            },
        ),
        (
            End(EndReason.INTERRUPTED, error=TurnError(EndCode.NODE_LOST, "gone"), done=True),
            {"reason": "interrupted", "error": {"code": "node-lost", "message": "gone"}},
        ),
    ],
)
def test_a_turns_end_is_journalled_with_all_that_is_told(end: End, members: dict[str, object]) -> None:
    """Those who come late read the end from the journal alone."""
    draft = wire.turn_end(end)
    assert draft.kind is RecordKind.TURN_END
    assert (draft.ai_sdk, draft.done) == (end.ai_sdk, end.done)
    assert json.loads(b"{" + draft.payload + b"}") == members
    assert json.loads(wire.encode_push(S, Record(CURSOR, T, draft)))["reason"] == end.reason
