from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.httpwire import chunk_json, encode_record, read_turn_end
from gateway.core.model import By, Cursor, Draft, EndCode, EndReason, Record, RecordKind, TurnError, TurnId
from gateway.core.sse import ServerSentEvent, SSEDecoder
from gateway.core.turn import End
from gateway.core.uistream import read_chunk
from gateway.core.wire import turn_end

if TYPE_CHECKING:
    from collections.abc import Sequence

E = ServerSentEvent
CUT = TurnError(EndCode.UPSTREAM_CUT_OFF, "it broke\noff")
OWN = TurnError(EndCode.UPSTREAM_ERROR, "no model")


def record(draft: Draft, offset: int = 7) -> Record:
    return Record(Cursor("9f", offset, "abc123"), TurnId("t1"), draft)


def chunk(data: bytes, event: str = "") -> Record:
    return record(read_chunk(E(data, event), message_id="m1").draft)


def decoded(records: Sequence[Record]) -> list[ServerSentEvent]:
    return SSEDecoder(1 << 20).feed(b"".join(encode_record(one) for one in records))


@pytest.mark.parametrize(
    ("data", "event", "written"),
    [
        (b'{"type":"finish"}', "", b'id: 9f.7.abc123\ndata: {"type":"finish"}\n\n'),
        (b"hello", "", b"id: 9f.7.abc123\ndata: hello\n\n"),
        (b"two\nlines", "", b"id: 9f.7.abc123\ndata: two\ndata: lines\n\n"),
        (b"\n", "", b"id: 9f.7.abc123\ndata: \ndata: \n\n"),
        (b"", "", b"id: 9f.7.abc123\ndata: \n\n"),
        (b"", "note", b"id: 9f.7.abc123\nevent: note\ndata: \n\n"),
        (b"hello", "note", b"id: 9f.7.abc123\nevent: note\ndata: hello\n\n"),
        (b'{"a":1.00}', "note", b'id: 9f.7.abc123\nevent: note\ndata: {"a":1.00}\n\n'),
        (b"null", "note", b"id: 9f.7.abc123\nevent: note\ndata: null\n\n"),
        (b"5", "note", b"id: 9f.7.abc123\nevent: note\ndata: 5\n\n"),
        (b'"text"', "note", b'id: 9f.7.abc123\nevent: note\ndata: "text"\n\n'),
        (b'{"text":"x"}', 'no,te"', b'id: 9f.7.abc123\nevent: no,te"\ndata: {"text":"x"}\n\n'),
        (b'"\\ud83d"', "note", b'id: 9f.7.abc123\nevent: note\ndata: "\\ud83d"\n\n'),
        (b'{"a":"\\ud83d"}', "", b'id: 9f.7.abc123\ndata: {"a":"\\ud83d"}\n\n'),
        ("ö\u2028😀".encode(), "ü", "id: 9f.7.abc123\nevent: ü\ndata: ö\u2028😀\n\n".encode()),
    ],
)  # fmt: skip
def test_a_chunk_is_written_as_the_backend_wrote_it_with_its_cursor(
    data: bytes, event: str, written: bytes
) -> None:
    """`Last-Event-ID` is how a stock client says where it was; the data is not ours to change."""
    one = chunk(data, event)
    encoded = encode_record(one)
    assert encoded == written
    assert encode_record(one) is encoded, "every client gets the same bytes, made once"
    assert SSEDecoder(1 << 20).feed(encoded) == [E(data, event)]


names = st.text(st.characters(exclude_characters="\r\n\0", codec="utf-8"), max_size=8)
texts = st.text(st.characters(exclude_characters="\r", codec="utf-8"), max_size=20).map(str.encode)
jsons = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
).map(lambda value: json.dumps(value).encode())


def refuse_constant(name: str) -> None:
    """Python reads ``Infinity`` and ``NaN``, which no JSON knows."""
    raise ValueError(name)


@given(
    events=st.lists(
        st.builds(E, texts | jsons, names.map(lambda name: "" if name == "message" else name)), max_size=6
    )
)
def test_what_the_backend_said_is_what_the_client_hears(events: list[ServerSentEvent]) -> None:
    """A plain backend's names, lines and JSON come out as they went in, through a journal of JSON."""
    records = [chunk(event.data, event.event) for event in events]
    heard = decoded(records)
    assert [event.event for event in heard] == [event.event for event in events]
    for event, told in zip(events, heard, strict=True):
        assert told.data in {event.data, event.data.replace(b"\n", b" ")}
        if told.data != event.data:  # JSON between whose tokens a line ended
            assert json.loads(told.data) == json.loads(event.data)
    for one, event in zip(records, events, strict=True):
        try:
            value = json.loads(event.data, parse_constant=refuse_constant)
        except ValueError:
            assert chunk_json(one) is None
        else:
            found = chunk_json(one)
            assert found is not None
            assert json.loads(found) == value


def test_the_question_is_not_part_of_the_answer() -> None:
    """The sender's stream is what the backend would have written."""
    assert encode_record(record(Draft(RecordKind.TURN_START, b'"path":"/","messages":[]'))) == b""


ABORT = b'{"type":"abort"}'
FAILED = b'{"type":"error","errorText":"it broke\\noff"}'
DONE = b"[DONE]"
ENDS: list[tuple[str, End, list[bytes]]] = [
    ("complete", End(EndReason.COMPLETE, ai_sdk=True, done=True), [DONE]),
    ("complete without DONE", End(EndReason.COMPLETE, ai_sdk=True), [DONE]),
    ("plain", End(EndReason.COMPLETE), []),
    ("plain with DONE", End(EndReason.COMPLETE, done=True), [DONE]),
    ("cancelled", End(EndReason.CANCELLED, by=By(client="c"), ai_sdk=True), [ABORT, DONE]),
    ("by the backend", End(EndReason.CANCELLED, by=By(backend=True), ai_sdk=True, done=True), [DONE]),
    ("plain, cancelled", End(EndReason.CANCELLED, by=By(client="c")), []),
    ("cut off", End(EndReason.ERROR, error=CUT, ai_sdk=True), [FAILED, DONE]),
    ("the backend's own error", End(EndReason.ERROR, error=OWN, ai_sdk=True, done=True), [DONE]),
    ("plain, cut off", End(EndReason.ERROR, error=CUT), []),
    ("interrupted", End(EndReason.INTERRUPTED, error=CUT, ai_sdk=True), [FAILED, DONE]),
]


@pytest.mark.parametrize(("end", "told"), [pytest.param(*row[1:], id=row[0]) for row in ENDS])
def test_an_end_is_told_as_the_sdk_understands_it_and_then_done(end: End, told: list[bytes]) -> None:
    """A clean end of the response alone would look like a finished answer to every SDK."""
    last = record(turn_end(end), offset=9)
    assert decoded([chunk(b'{"type":"start","messageId":"x"}'), last])[1:] == [E(data) for data in told]
    assert encode_record(last).count(b"id: 9f.9.abc123\n") == len(told)


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (End(EndReason.COMPLETE), None),
        (End(EndReason.CANCELLED, by=By(client="c", user="u")), ABORT),
        (End(EndReason.CANCELLED, by=By(backend=True)), None),
        (End(EndReason.ERROR, error=CUT), FAILED),
        (End(EndReason.ERROR, error=OWN), None),
        (
            End(EndReason.ERROR, error=TurnError(EndCode.UPSTREAM_REFUSED, "no", 429, 1.5)),
            b'{"type":"error","errorText":"no"}',
        ),
        (End(EndReason.INTERRUPTED, error=CUT), FAILED),
    ],
)
def test_an_end_is_read_back_from_the_journal(end: End, told: bytes | None) -> None:
    """Whoever comes late, on any wire and any node, learns the same end."""
    read = read_turn_end(record(turn_end(end)))
    assert (read.reason, read.chunk) == (end.reason, told)
    if end.error is None:
        assert read.error is None
    else:
        assert read.error is not None
        assert (read.error.code, read.error.message) == (end.error.code, end.error.message)
        assert read.error.status == end.error.status
