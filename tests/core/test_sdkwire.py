from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.model import (
    By,
    Cursor,
    Draft,
    EndCode,
    EndReason,
    ErrorCode,
    Record,
    RecordKind,
    Refusal,
    TurnError,
    TurnId,
)
from gateway.core.sdkwire import (
    NO_CHUNK,
    Abort,
    Frame,
    Rendering,
    Resume,
    Send,
    end,
    error,
    no_active,
    parse_frame,
    request_id_of,
    send_body,
    start,
)
from gateway.core.sse import ServerSentEvent
from gateway.core.turn import End
from gateway.core.uistream import read_chunk
from gateway.core.wire import turn_end


def sent(**members: object) -> Send:
    frame = parse_frame(json.dumps({"type": "send", "requestId": "r", "id": "s", **members}))
    assert isinstance(frame, Send)
    return frame


def test_a_send_of_the_sdk_is_read() -> None:
    """As `WebSocketChatTransport` of ai 7 writes it, metadata and all."""
    frame = parse_frame(
        '{"type":"send","requestId":"r1","id":"s1","trigger":"submit-message","messageId":"m1",'
        '"messages":[{"id":"u1","role":"user","parts":[{"type":"text","text":"hi"}]}],'
        '"headers":{"authorization":"Bearer x"},"body":{"model":"large"},"metadata":{"a":1}}'
    )
    assert isinstance(frame, Send)
    assert (frame.requestId, frame.id) == ("r1", "s1")
    assert frame.headers == {"authorization": "Bearer x"}
    assert send_body(frame) == (
        b'{"model":"large","id":"s1",'
        b'"messages":[{"id":"u1","role":"user","parts":[{"type":"text","text":"hi"}]}],'
        b'"trigger":"submit-message","messageId":"m1"}'
    )


@pytest.mark.parametrize(
    ("text", "frame"),
    [
        ('{"type":"resume","requestId":"r","id":"s"}', Resume("r", "s")),
        ('{"type":"resume","requestId":"r","id":"s","headers":{},"body":{}}', Resume("r", "s")),
        ('{"type":"resume","requestId":"r","id":"s","lastSequence":0}', Resume("r", "s", 0)),
        ('{"type":"resume","requestId":"r","id":"s","lastSequence":null}', Resume("r", "s")),
        ('{"requestId":"r","type":"abort"}', Abort("r")),
        ('{"type":"abort","requestId":"' + "x" * 256 + '"}', Abort("x" * 256)),
    ],
)
def test_the_other_frames_are_read(text: str, frame: Frame) -> None:
    """Members that a later SDK adds are read past."""
    assert parse_frame(text) == frame


@pytest.mark.parametrize(
    ("text", "request_id"),
    [
        ("", None),
        ("hello", None),
        ("[]", None),
        ("5", None),
        ('{"requestId":"r"', None),
        ('{"type":"abort"}', None),
        ('{"type":"abort","requestId":7}', None),
        ('{"type":"abort","requestId":""}', ""),
        ('{"type":"abort","requestId":"' + "x" * 257 + '"}', "x" * 257),
        ('{"type":"nope","requestId":"r"}', "r"),
        ('{"requestId":"r"}', "r"),
        ('{"type":"send","requestId":"r"}', "r"),
        ('{"type":"send","requestId":"r","id":5}', "r"),
        ('{"type":"send","requestId":"r","id":"s","body":[]}', "r"),
        ('{"type":"send","requestId":"r","id":"s","body":null}', "r"),
        ('{"type":"send","requestId":"r","id":"s","headers":{"a":1}}', "r"),
        ('{"type":"resume","requestId":"r","id":"s","lastSequence":1.5}', "r"),
        ('{"type":"resume","requestId":"r","id":"s","lastSequence":"1"}', "r"),
    ],
)
def test_what_is_no_frame_is_refused_and_its_request_is_told(text: str, request_id: str | None) -> None:
    """A `useChat` that waits for a request which was dropped in silence waits for ever."""
    with pytest.raises(Refusal, match=r"^unable to (read the frame|use the requestId); ") as caught:
        parse_frame(text)
    assert caught.value.code is ErrorCode.BAD_REQUEST
    assert request_id_of(text) == request_id


@pytest.mark.parametrize(
    ("members", "body"),
    [
        ("", b'{"id":"s"}'),
        (',"body":{}', b'{"id":"s"}'),
        (',"messages":[ 1.00 ],"body":{"b" : 2.0}', b'{"b":2.0,"id":"s","messages":[ 1.00 ]}'),
        (',"body":{"x":{ "y" : 12345678901234567890123 }}',
         b'{"x":{ "y" : 12345678901234567890123 },"id":"s"}'),
        (',"body":{"id":7,"a":1}', b'{"id":"s","a":1}'),
        (',"body":{"trigger":"mine","messages":"mine"},"messages":[],"trigger":"t"',
         b'{"trigger":"t","messages":[],"id":"s"}'),
        (',"body":{"messageId":"mine"}', b'{"messageId":"mine","id":"s"}'),
        (',"messageId":null', b'{"id":"s","messageId":null}'),
    ],
)  # fmt: skip
def test_a_send_becomes_the_post_of_the_other_transport(members: str, body: bytes) -> None:
    """A backend must not see over which transport it was asked."""
    frame = parse_frame('{"type":"send","requestId":"r","id":"s"' + members + "}")
    assert isinstance(frame, Send)
    assert send_body(frame) == body


names = st.sampled_from(["id", "messages", "trigger", "messageId", "model", "0", "12"]) | st.text(max_size=4)
values = st.none() | st.integers() | st.text(max_size=4) | st.lists(st.integers(), max_size=2)


def spread(body: dict[str, Any], **named: object) -> list[tuple[str, object]]:
    """`Object.entries({...body, ...named})`: an earlier place is kept, array indexes come first."""
    entries = {**body, **named}
    indexes = [name for name in entries if name.isascii() and name.isdigit() and str(int(name)) == name]
    order = [*sorted(indexes, key=int), *(name for name in entries if name not in indexes)]
    return [(name, entries[name]) for name in order]


@given(
    body=st.dictionaries(names, values, max_size=6),
    named=st.fixed_dictionaries(
        {"messages": st.lists(values, max_size=2)},
        optional={"trigger": st.text(max_size=4), "messageId": st.text(max_size=4)},
    ),
)
def test_a_body_is_put_together_as_javascript_would(body: dict[str, Any], named: dict[str, Any]) -> None:
    """`{...body, id, messages, trigger, messageId}`: the order of its keys too."""
    from_browser = dict(spread(body))
    made = json.loads(send_body(sent(body=from_browser, **named)))
    given_names = [name for name in ("messages", "trigger", "messageId") if name in named]
    in_order = {name: named[name] for name in given_names}
    assert list(made.items()) == spread(from_browser, id="s", **in_order)


@pytest.mark.parametrize(
    ("line", "frame"),
    [
        (start('r"1'), {"type": "start", "requestId": 'r"1'}),
        (end("r"), {"type": "end", "requestId": "r"}),
        (no_active("r"), {"type": "no-active", "requestId": "r"}),
        (error("r", "no\n"), {"type": "error", "requestId": "r", "errorText": "no\n"}),
    ],
)
def test_frames_are_as_the_sdk_reads_them(line: bytes, frame: object) -> None:
    """An unknown member or type makes the SDK close the whole socket."""
    assert json.loads(line) == frame


CUT = TurnError(EndCode.UPSTREAM_CUT_OFF, "it broke off")
OWN = TurnError(EndCode.UPSTREAM_ERROR, "no model")
CHUNKS = [b'{"type":"start","messageId":"m"}', b'{"type":"text-delta","delta":1.00}', b'{"type":"finish"}']


def records(chunks: list[tuple[bytes, str]], ending: End | None) -> list[Record]:
    drafts = [Draft(RecordKind.TURN_START, b'"path":"/","messages":[]')]
    drafts += [read_chunk(ServerSentEvent(*chunk), message_id="m").draft for chunk in chunks]
    drafts += [] if ending is None else [turn_end(ending)]
    return [
        Record(Cursor("e", number, "aa"), TurnId("t"), draft) for number, draft in enumerate(drafts, start=1)
    ]


def rendered(told: list[Record], *, after: int = -1) -> list[bytes]:
    rendering = Rendering("r", after=after)
    frames: list[bytes] = []
    for record in told:
        assert not rendering.ended
        frames += rendering.frames(record)
        if rendering.ended:
            break
    assert rendering.ended is any(
        b'"type":"end"' in frame or b'"type":"error","req' in frame for frame in frames
    )
    return frames


def chunk_frame(sequence: int, chunk: bytes) -> bytes:
    return b'{"type":"chunk","requestId":"r","sequence":%d,"chunk":%b}' % (sequence, chunk)


END = b'{"type":"end","requestId":"r"}'
ABORT = b'{"type":"abort"}'
FAILED = b'{"type":"error","errorText":"it broke off"}'


@pytest.mark.parametrize(
    ("ending", "told"),
    [
        (End(EndReason.COMPLETE, ai_sdk=True), []),
        (End(EndReason.CANCELLED, by=By(client="c"), ai_sdk=True), [ABORT]),
        (End(EndReason.CANCELLED, by=By(backend=True), ai_sdk=True), []),
        (End(EndReason.ERROR, error=CUT, ai_sdk=True), [FAILED]),
        (End(EndReason.ERROR, error=CUT), [FAILED]),
        (End(EndReason.ERROR, error=OWN, ai_sdk=True), []),
        (End(EndReason.INTERRUPTED, error=CUT, ai_sdk=True), [FAILED]),
    ],
)
def test_a_turn_is_its_chunks_then_how_it_ended_then_end(ending: End, told: list[bytes]) -> None:
    """A gap in the sequence, or no `end`, and the SDK drops the socket or waits for ever."""
    frames = rendered(records([(chunk, "") for chunk in CHUNKS], ending))
    assert frames == [*(chunk_frame(at, chunk) for at, chunk in enumerate([*CHUNKS, *told])), END]


def test_a_running_turn_has_no_end_yet() -> None:
    """Its next chunk continues the count."""
    rendering = Rendering('r"')
    running = records([(chunk, "") for chunk in CHUNKS], None)
    frames = [frame for record in running for frame in rendering.frames(record)]
    assert [json.loads(frame)["sequence"] for frame in frames] == [0, 1, 2]
    assert {json.loads(frame)["requestId"] for frame in frames} == {'r"'}
    assert not rendering.ended


@pytest.mark.parametrize("payload", [b"hello", b"5", b"[1]", b"null", b'{"choices":[]}', b'{"type":1}'])
def test_a_payload_that_is_no_chunk_ends_the_request(payload: bytes) -> None:
    """The SDK would close the socket with all its chats; this way the one request fails, and says why."""
    told = records([(CHUNKS[0], ""), (payload, ""), (CHUNKS[1], "")], End(EndReason.COMPLETE))
    failed = {"type": "error", "requestId": "r", "errorText": NO_CHUNK}
    assert [json.loads(frame) for frame in rendered(told)] == [json.loads(chunk_frame(0, CHUNKS[0])), failed]
    assert [json.loads(frame) for frame in rendered(told, after=5)] == [failed]


@pytest.mark.parametrize("data", [b'{"type":"finish"}', b'{"a":"\\ud83d", "type": "data-x"}'])
def test_the_json_of_a_named_event_is_carried(data: bytes) -> None:
    """The SDK knows no event names, its HTTP transport reads past them too."""
    assert rendered(records([(data, "note")], None)) == [chunk_frame(0, data)]


payloads = st.sampled_from(
    [*[(chunk, "") for chunk in CHUNKS], (b'{"type":"start"}', ""), (b'{"type":"data-1"}', "note")]
)
endings = st.sampled_from(
    [
        End(EndReason.COMPLETE, ai_sdk=True),
        End(EndReason.CANCELLED, by=By(client="c"), ai_sdk=True),
        End(EndReason.ERROR, error=CUT, ai_sdk=True),
    ]
)


@given(chunks=st.lists(payloads, max_size=8), ending=endings, after=st.integers(-3, 12))
def test_a_resume_gets_exactly_the_rest(chunks: list[tuple[bytes, str]], ending: End, after: int) -> None:
    """The sequence is the same for everyone, so a number means the same after a reconnect."""
    told = records(chunks, ending)
    whole = rendered(told)
    assert [json.loads(frame)["sequence"] for frame in whole[:-1]] == list(range(len(whole) - 1))
    assert whole[-1] == END
    had = min(max(after, -1) + 1, len(whole) - 1)
    assert rendered(told, after=after) == whole[had:]
