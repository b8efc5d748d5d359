from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.model import Draft, EndCode, EndReason, RecordKind, TurnError, TurnId
from gateway.core.sse import ServerSentEvent, SSEDecoder
from gateway.core.uistream import (
    DONE,
    Chunk,
    ChunkType,
    OpenParts,
    derived_message_id,
    read_chunk,
    told_as_chunk,
)

STREAMS = Path(__file__).parents[1] / "streams"


def read(data: bytes, event: str = "") -> Chunk:
    return read_chunk(ServerSentEvent(data, event), message_id="m1")


@pytest.mark.parametrize("path", sorted(STREAMS.glob("*.sse")), ids=lambda path: path.stem)
def test_a_recorded_chunk_is_passed_on_byte_for_byte(path: Path) -> None:
    """What an unmodified backend wrote is what every client must get."""
    events = [event for event in SSEDecoder(1 << 20).feed(path.read_bytes()) if event.data != DONE]
    assert events
    for event in events:
        chunk = read_chunk(event, message_id="m1")
        assert chunk.draft.kind is RecordKind.CHUNK
        assert not chunk.draft.plain
        head = json.loads(event.data)
        if head["type"] == "start" and "messageId" not in head:
            assert chunk.draft.payload == event.data[:-1] + b',"messageId":"m1"}'
        else:
            assert chunk.draft.payload == event.data
        assert chunk.type == (head["type"] if head["type"] in set(ChunkType) else ChunkType.OTHER)


@pytest.mark.parametrize(
    ("start", "written"),
    [
        (b'{"type":"start"}', b'{"type":"start","messageId":"m1"}'),
        (b' { "type" : "start" } ', b' { "type" : "start","messageId":"m1"}'),
        (b'{"type":"start","messageId":null}', b'{"type":"start","messageId":null,"messageId":"m1"}'),
        (
            b'{"type":"start","messageMetadata":{"messageId":"x"}}',
            b'{"type":"start","messageMetadata":{"messageId":"x"},"messageId":"m1"}',
        ),
        (b'{"type":"start","messageId":"own"}', b'{"type":"start","messageId":"own"}'),
        (b'{"type":"start","messageId":""}', b'{"type":"start","messageId":""}'),
        (b'{"type":"start-step"}', b'{"type":"start-step"}'),
        (b'{"type":"start",\n"x":"}"\n}', b'{"type":"start", "x":"}","messageId":"m1"}'),
        (b'{"\\u0074ype":"start"}', b'{"\\u0074ype":"start","messageId":"m1"}'),
    ],
)
def test_a_start_gets_an_id_only_where_it_has_none(start: bytes, written: bytes) -> None:
    """Without one, each device invents its own, and each reload adds another answer."""
    chunk = read(start)
    assert chunk.draft == Draft(RecordKind.CHUNK, written)
    if chunk.type is ChunkType.START:
        assert json.loads(written)["messageId"] is not None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(
    members=st.dictionaries(
        st.sampled_from(["type", "id", "messageId", "errorText", "delta"]) | st.text(max_size=4), json_values
    ),
    kind=st.sampled_from([*ChunkType, "data-x", "text-delta"]),
    name=st.sampled_from(["", "note"]),
)
def test_no_chunk_is_changed_but_a_start(members: dict[str, object], kind: str, name: str) -> None:
    """Later versions of the SDK have chunks that this gateway has never seen."""
    members = {**members, "type": kind} if kind else members
    data = json.dumps(members, ensure_ascii=False).encode()
    chunk = read(data, name)
    payload = chunk.draft.payload
    assert chunk.draft.plain is bool(name)
    if name:
        payload = payload.removeprefix(b'"data":').removesuffix(b',"event":"note"')
    if members.get("type") == "start" and not isinstance(members.get("messageId"), str):
        assert payload == data[:-1] + b',"messageId":"m1"}'
        assert json.loads(payload) == {**members, "messageId": "m1"}
    else:
        assert payload == data


def test_a_start_whose_other_members_are_odd_keeps_its_message_id() -> None:
    """A second one would win in every parser, and the devices would disagree with the backend."""
    for data in (b'{"id":[],"messageId":"","type":"start"}', b'{"type":"start","id":7,"messageId":"a"}'):
        assert read(data).draft.payload == data


@pytest.mark.parametrize(
    ("data", "kind", "part", "error_text"),
    [
        (b'{"type":"text-start","id":"t1"}', ChunkType.TEXT_START, "t1", ""),
        (b'{"id":"t1","type":"text-end"}', ChunkType.TEXT_END, "t1", ""),
        (b'{"type":"reasoning-start","id":"r"}', ChunkType.REASONING_START, "r", ""),
        (b'{"type":"reasoning-end","id":"r"}', ChunkType.REASONING_END, "r", ""),
        (b'{"type":"text-delta","id":"t1","delta":"x"}', ChunkType.OTHER, "t1", ""),
        (b'{"type":"finish"}', ChunkType.FINISH, "", ""),
        (b'{"type":"start","type":"finish"}', ChunkType.FINISH, "", ""),
        (b'{"type":"finish","id":5}', ChunkType.FINISH, "", ""),
        (b'{"type":"text-end","id":"t1","errorText":5}', ChunkType.TEXT_END, "t1", ""),
        (b'{"type":"error","id":5,"errorText":"no"}', ChunkType.ERROR, "", "no"),
        (b'{"type":"error","errorText":"no"}', ChunkType.ERROR, "", "no"),
        (b'{"type":"error","errorText":"\\ud83d"}', ChunkType.ERROR, "", "\ufffd"),
        (b'{"type":"error","errorText":{"code":1}}', ChunkType.ERROR, "", ""),
        (b'{"type":"error"}', ChunkType.ERROR, "", ""),
        (b'{"type":"abort","reason":"user stop"}', ChunkType.ABORT, "", ""),
        (b'{"type":"data-weather","id":"d"}', ChunkType.DATA, "d", ""),
        (b'{"type":"data-weather","id":7}', ChunkType.DATA, "", ""),
        (b'{"type":"data"}', ChunkType.OTHER, "", ""),
        (b'{"type":"data-*"}', ChunkType.DATA, "", ""),
        (b'{"type":""}', ChunkType.OTHER, "", ""),
        (b'{"type":"FINISH"}', ChunkType.OTHER, "", ""),
        (b'{"type":5}', ChunkType.OTHER, "", ""),
        (b'{"a":{"type":"finish"}}', ChunkType.OTHER, "", ""),
    ],
)
def test_what_matters_to_a_turn_is_seen(data: bytes, kind: ChunkType, part: str, error_text: str) -> None:
    """A turn's end is told by its chunks, whatever else stands in them."""
    chunk = read(data)
    assert chunk.draft == Draft(RecordKind.CHUNK, data)
    assert (chunk.type, chunk.part, chunk.error_text) == (kind, part, error_text)


@pytest.mark.parametrize(
    ("data", "makes"),
    [
        (b'{"type":"text-start","id":"t"}', True),
        (b'{"type":"start-step"}', True),
        (b'{"type":"data-weather","data":1}', True),
        (b'{"type":"data-weather","data":1,"transient":false}', True),
        (b'{"type":"data-weather","data":1,"transient":true}', False),
        (b'{"type":"data-weather","id":7,"transient":true}', False),
        (b'{"type":"data-weather","transient":1}', True),
        (b'{"type":"start"}', False),
        (b'{"type":"finish"}', False),
        (b'{"type":"error","errorText":"x"}', False),
        (b'{"type":"abort"}', False),
        (b'{"choices":[]}', False),
        (b"hello", False),
    ],
)
def test_what_begins_a_message_is_seen(data: bytes, *, makes: bool) -> None:
    """`useChat` makes one for everything it shows; a message that is only an error is none."""
    assert read(data).makes_message is makes


@pytest.mark.parametrize(
    ("data", "event", "payload", "plain"),
    [
        (b"null", "", b"null", False),
        (b"5", "", b"5", False),
        (b'"text"', "", b'"text"', False),
        (b"[1,\n2]", "", b"[1, 2]", False),
        (b'{"choices":[]}', "", b'{"choices":[]}', False),
        (b'{"delta":"\\ud83d"}', "", b'{"delta":"\\ud83d"}', False),
        (b'{"a":1}', "note", b'"data":{"a":1},"event":"note"', True),
        (b"null", "note", b'"data":null,"event":"note"', True),
        (b'{"type":"text-end"}', 'a"b', b'"data":{"type":"text-end"},"event":"a\\"b"', True),
        (b"hello", "", b'"text":"hello"', True),
        (b"hello", "note", b'"text":"hello","event":"note"', True),
        (b"", "", b'"text":""', True),
        (b"two\nlines", "", b'"text":"two\\nlines"', True),
        (b'{"a":', "", b'"text":"{\\"a\\":"', True),
        (b'{"type":5,"a":NaN}', "", b'"text":"{\\"type\\":5,\\"a\\":NaN}"', True),
        (b'{"b":"raw\nbreak"}', "", b'"text":"{\\"b\\":\\"raw\\nbreak\\"}"', True),
        (b"[" * 100_000, "", b'"text":"' + b"[" * 100_000 + b'"', True),
        ("ö\u2028".encode(), "", '"text":"ö\u2028"'.encode(), True),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_a_plain_backends_events_are_kept_too(
    data: bytes, event: str, payload: bytes, *, plain: bool
) -> None:
    """Not every backend speaks the SDK's chunks; its text, JSON and names all reach the client."""
    draft = read(data, event).draft
    assert draft == Draft(RecordKind.CHUNK, payload, plain=plain)
    json.loads(b"{" + payload + b"}" if plain else payload)


@given(data=st.binary(max_size=30), event=st.text(max_size=5))
def test_any_event_becomes_one_line_of_json(data: bytes, event: str) -> None:
    """A payload stands inside a line of the session protocol, and nothing in it may end that line."""
    data = data.decode(errors="replace").encode()
    draft = read(data, event).draft
    assert b"\n" not in draft.payload
    assert b"\r" not in draft.payload
    members = json.loads(b"{" + draft.payload + b"}" if draft.plain else b'{"data":' + draft.payload + b"}")
    assert members.get("event", "") == event
    assert ("text" in members) != ("data" in members)
    assert members["text"] == data.decode() if "text" in members else members["data"] == json.loads(data)


def closers(*written: tuple[str, str]) -> list[tuple[str, str]]:
    parts = OpenParts()
    for kind, part in written:
        parts.saw(read(json.dumps({"type": kind, "id": part}).encode()))
    closed = [json.loads(draft.payload) for draft in parts.closers()]
    assert all(set(chunk) == {"type", "id"} for chunk in closed)
    return [(chunk["type"], chunk["id"]) for chunk in closed]


TS, TE, RS, RE = "text-start", "text-end", "reasoning-start", "reasoning-end"


@pytest.mark.parametrize(
    ("written", "closed"),
    [
        ([], []),
        ([(TS, "a")], [(TE, "a")]),
        ([(TS, "a"), (TE, "a")], []),
        ([(RS, "a"), (TS, "b"), (TS, "c")], [(RE, "a"), (TE, "b"), (TE, "c")]),
        ([(TS, "b"), (RS, "a"), (TE, "b")], [(RE, "a")]),
        ([(TS, "a"), (RS, "a"), (RE, "a")], [(TE, "a")]),
        ([(TS, "a"), (TE, "a"), ("finish-step", ""), ("start-step", ""), (TS, "a")], [(TE, "a")]),
        ([(TS, "a"), (TE, "a"), (TS, "a"), (TE, "a")], []),
        ([(TS, "b"), (TE, "b"), (TS, "a"), (TS, "b")], [(TE, "a"), (TE, "b")]),
        ([(TE, "a")], []),
        ([(TS, "a"), (TS, "a")], [(TE, "a")]),
        ([(TS, "a"), ("tool-input-start", "x"), ("data-x", "d"), ("text-delta", "a")], [(TE, "a")]),
        ([(TS, "a"), ("finish-step", "")], []),
        ([(TS, "a"), (RS, "b"), ("reset-step", ""), (TS, "c")], [(TE, "c")]),
        ([(TS, 'q"\n')], [(TE, 'q"\n')]),
    ],
)
def test_what_a_cancel_left_open_is_closed_and_nothing_else(
    written: list[tuple[str, str]], closed: list[tuple[str, str]]
) -> None:
    """An open part stays `streaming` on every screen; the end of a part that is not open throws there."""
    assert closers(*written) == closed


ERROR = TurnError(EndCode.UPSTREAM_TIMEOUT, 'too "late"\n')


@pytest.mark.parametrize(
    ("reason", "error", "by_backend", "chunk"),
    [
        (EndReason.COMPLETE, None, False, None),
        (EndReason.CANCELLED, None, False, {"type": "abort"}),
        (EndReason.CANCELLED, None, True, None),
        (EndReason.ERROR, ERROR, False, {"type": "error", "errorText": 'too "late"\n'}),
        (EndReason.ERROR, ERROR, True, None),
        (EndReason.ERROR, None, False, None),
        (EndReason.INTERRUPTED, ERROR, False, {"type": "error", "errorText": 'too "late"\n'}),
    ],
)
def test_an_end_is_told_once_as_the_sdk_understands_it(
    reason: EndReason, error: TurnError | None, chunk: object, *, by_backend: bool
) -> None:
    """A chunk with a key that it does not know is refused by ai 5, and a second end is noise."""
    told = told_as_chunk(reason, error, by_backend=by_backend)
    assert (None if told is None else json.loads(told)) == chunk


def test_a_derived_id_is_the_same_everywhere() -> None:
    """Two devices that disagree about an answer's id show it twice."""
    assert derived_message_id(TurnId("a")) == derived_message_id(TurnId("a"))
    assert derived_message_id(TurnId("a")) != derived_message_id(TurnId("b"))
    assert derived_message_id(TurnId("a")).startswith("msg-")
