from __future__ import annotations

import json
import re
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.sse import EventTooLarge, ServerSentEvent, SSEDecoder, encode_comment, encode_event

STREAMS = Path(__file__).parents[1] / "streams"
BOUND = 1 << 20
REPLACED = "\ufffd".encode()

E = ServerSentEvent

VECTORS: list[tuple[str, bytes, list[ServerSentEvent], int]] = [
    ("one line", b"data: a\n\n", [E(b"a")], 0),
    ("two events", b"data: a\n\ndata: b\n\n", [E(b"a"), E(b"b")], 0),
    ("several lines", b"data: a\ndata: b\ndata\n\n", [E(b"a\nb\n")], 0),
    ("CRLF", b"data: a\r\n\r\ndata: b\r\n\r\n", [E(b"a"), E(b"b")], 0),
    ("CR", b"data: a\r\rdata: b\r\r", [E(b"a"), E(b"b")], 0),
    ("mixed line ends", b"data: a\r\n\ndata: b\r\r\ndata: c\n\r", [E(b"a"), E(b"b"), E(b"c")], 0),
    ("LF CR is two line ends", b"data: a\n\rdata: b\n\r", [E(b"a"), E(b"b")], 0),
    ("CR CRLF", b"data: a\r\r\n\r\ndata: b\r\r\n", [E(b"a"), E(b"b")], 0),
    ("other line ends of Unicode are data", "data: a\u2028b\x85c\x0bd\x0ce\x1cf\n\n".encode(),
     [E("a\u2028b\x85c\x0bd\x0ce\x1cf".encode())], 0),
    ("one space is syntax", b"data:a\n\ndata:  a \n\ndata:\ta\n\n", [E(b"a"), E(b" a "), E(b"\ta")], 0),
    ("no colon", b"data\n\n", [E(b"")], 0),
    ("empty data", b"data:\n\ndata: \n\n", [E(b""), E(b"")], 0),
    ("standard's example of empty data", b"data\n\ndata\ndata\n\ndata:", [E(b""), E(b"\n")], 0),
    ("colons in data", b"data: a: b:c\n\n", [E(b"a: b:c")], 0),
    ("name", b"event: add\ndata: 1\n\ndata: 2\n\n", [E(b"1", "add"), E(b"2")], 0),
    ("name after data", b"data: 1\nevent:add\n\n", [E(b"1", "add")], 0),
    ("last name wins", b"event: a\nevent: b\ndata: 1\n\n", [E(b"1", "b")], 0),
    ("named message", b"event: message\ndata: 1\n\n", [E(b"1")], 0),
    ("name without data is dropped", b"event: add\n\ndata: 1\n\n", [E(b"1")], 0),
    ("empty name", b"event: a\nevent\ndata: 1\n\n", [E(b"1")], 0),
    ("name of invalid UTF-8", b"event: \xff\ndata: 1\n\n", [E(b"1", "\ufffd")], 0),
    ("id and retry", b"id: 7\nretry: 10\ndata: 1\n\nid: 8\n\nretry: x\n\n", [E(b"1")], 0),
    ("unknown fields", b"dat: 1\n data: 2\nData: 3\ndatas: 4\ndata : 5\ndata: 6\n\n", [E(b"6")], 0),
    ("comments", b": a\n\n:\ndata: 1\n:data: 2\ndata: 3\n\n:", [E(b"1\n3")], 3),
    ("comments before an event", b": ping\n\n: ping\n\ndata: 1\n\n", [E(b"1")], 2),
    ("byte order mark", b"\xef\xbb\xbfdata: 1\n\n", [E(b"1")], 0),
    ("byte order mark before a comment", b"\xef\xbb\xbf: a\ndata: 1\n\n", [E(b"1")], 1),
    ("byte order mark alone on its line", b"\xef\xbb\xbf\ndata: 1\n\n", [E(b"1")], 0),
    ("two byte order marks", b"\xef\xbb\xbf\xef\xbb\xbfdata: 1\n\ndata: 2\n\n", [E(b"2")], 0),
    ("late byte order mark", b"data: 1\n\n\xef\xbb\xbfdata: 2\n\ndata: \xef\xbb\xbf3\n\n",
     [E(b"1"), E(b"\xef\xbb\xbf3")], 0),
    ("half a byte order mark", b"\xef\xbbdata: 1\n\ndata: 2\n\n", [E(b"2")], 0),
    ("last event without a blank line is dropped", b"data: 1\n\ndata: 2\n", [E(b"1")], 0),
    ("last line without an end is dropped", b"data: 1\n\ndata: 2", [E(b"1")], 0),
    ("many blank lines", b"\n\n\n\ndata: 1\n\n\n\n\ndata: 2\n\n\n", [E(b"1"), E(b"2")], 0),
    ("nothing", b"", [], 0),
    ("NUL is data", b"data: a\0b\n\n", [E(b"a\0b")], 0),
    ("UTF-8", "data: ö😀\n\n".encode(), [E("ö😀".encode())], 0),
    ("invalid bytes", b"data: \xff\xfea\n\n", [E(REPLACED * 2 + b"a")], 0),
    ("a sequence cut short is one U+FFFD", b"data: \xf0\x9f\x98a\n\n", [E(REPLACED + b"a")], 0),
    ("a line end ends a sequence", b"data: \xf0\x9f\ndata: \x98\x80\n\n",
     [E(REPLACED + b"\n" + REPLACED * 2)], 0),
    ("half a surrogate pair", b"data: \xed\xa0\xbd\n\n", [E(REPLACED * 3)], 0),
    ("[DONE]", b"data: {}\n\ndata: [DONE]\n\n", [E(b"{}"), E(b"[DONE]")], 0),
]  # fmt: skip


def decode(*pieces: bytes) -> tuple[list[ServerSentEvent], int]:
    decoder = SSEDecoder(BOUND)
    events = [event for piece in pieces for event in decoder.feed(piece)]
    return events, decoder.comments


vectors = pytest.mark.parametrize(
    ("stream", "events", "comments"), [pytest.param(*row[1:], id=row[0]) for row in VECTORS]
)


@vectors
def test_a_stream_is_read_by_the_standard(
    stream: bytes, events: list[ServerSentEvent], comments: int
) -> None:
    """Backends differ in how they write the format, and browsers read all of it."""
    assert decode(stream) == (events, comments)


@vectors
def test_an_event_is_read_alike_wherever_it_stands(
    stream: bytes, events: list[ServerSentEvent], comments: int
) -> None:
    """The way for the common event is another one than that for the first of a stream."""
    if not stream.startswith(b"\xef\xbb\xbf"):
        assert decode(b"data: 0\n\n", stream) == ([E(b"0"), *events], comments)
        assert decode(b"data: 0\n\n" + stream) == ([E(b"0"), *events], comments)


@vectors
def test_where_the_network_cut_does_not_matter(
    stream: bytes, events: list[ServerSentEvent], comments: int
) -> None:
    """A proxy or a slow link may cut anywhere, in the middle of CRLF and of a letter too."""
    size = len(stream)
    assert decode(*(stream[at : at + 1] for at in range(size))) == (events, comments)
    for first in range(size + 1):
        for second in range(first, size + 1):
            assert decode(stream[:first], stream[first:second], stream[second:]) == (events, comments)


def test_a_cut_crlf_is_one_line_end_even_across_an_empty_read() -> None:
    """An empty read must not make the LF a second line end, which would end the event early."""
    assert decode(b"data: a\r", b"", b"\ndata: b\r", b"", b"\n\r", b"\n")[0] == [E(b"a\nb")]


def test_an_event_is_there_as_soon_as_its_blank_line_is() -> None:
    """A chunk must not wait for the byte after the CR that ended it."""
    decoder = SSEDecoder(BOUND)
    assert decoder.feed(b"data: a\r\n\r") == [E(b"a")]
    assert decoder.feed(b"\ndata: b\n\n") == [E(b"b")]


line_ends = st.sampled_from([b"\n", b"\r", b"\r\n"])
single_line = st.text(st.characters(exclude_characters="\r\n\0", codec="utf-8"), max_size=12)
events_strategy = st.lists(
    st.builds(
        ServerSentEvent,
        data=st.lists(single_line, min_size=1, max_size=3).map(lambda lines: "\n".join(lines).encode()),
        event=single_line.map(lambda name: "" if name == "message" else name),
    ),
    max_size=6,
)


@given(events=events_strategy, draw=st.data())
def test_what_was_encoded_is_decoded_whatever_happens_on_the_way(
    events: list[ServerSentEvent], draw: st.DataObject
) -> None:
    """Line ends, comments and cuts are the freedom that the format gives to what stands between."""
    stream = b""
    comments = 0

    def write(line: bytes) -> None:
        nonlocal stream
        end = draw.draw(line_ends)
        if not line and stream.endswith(b"\r") and end == b"\n":
            end = b"\r\n"  # A lone LF would complete a CRLF instead of being a blank line.
        stream += line + end

    for event in events:
        for line in encode_event(event.data, event=event.event, identifier="7").split(b"\n")[:-1]:
            if draw.draw(st.booleans()):
                write(b":" + draw.draw(single_line).encode())
                comments += 1
            write(line)
    cuts = sorted(draw.draw(st.sets(st.integers(0, len(stream)), max_size=8)) | {0, len(stream)})
    assert decode(*(stream[a:b] for a, b in pairwise(cuts))) == (events, comments)


@given(events=events_strategy, line_end=line_ends, size=st.integers(1, 40))
def test_encoding_and_decoding_undo_each_other(
    events: list[ServerSentEvent], line_end: bytes, size: int
) -> None:
    """What we write to one client, another gateway in front of it must read as the same events."""
    stream = b"".join(
        encode_comment("ping") + encode_event(event.data, event=event.event) for event in events
    ).replace(b"\n", line_end)
    assert decode(*(stream[at : at + size] for at in range(0, len(stream), size))) == (events, len(events))


@pytest.mark.parametrize(
    ("data", "event", "identifier", "written"),
    [
        (b"a", "", "", b"data: a\n\n"),
        (b"", "", "", b"data: \n\n"),
        (b" a", "", "", b"data:  a\n\n"),
        (b"a\nb\r\nc\rd\n", "", "", b"data: a\ndata: b\ndata: c\ndata: d\ndata: \n\n"),
        (b"a", "add", "e.7.t", b"id: e.7.t\nevent: add\ndata: a\n\n"),
    ],
)
def test_an_event_is_written_with_lf_only(data: bytes, event: str, identifier: str, written: bytes) -> None:
    """The parser of the AI SDK can miss events whose lines end in CR."""
    assert encode_event(data, event=event, identifier=identifier) == written


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\0b"])
def test_a_name_cannot_write_fields_of_its_own(bad: str) -> None:
    """A line end in a name would let whoever chose it write events."""
    with pytest.raises(ValueError, match="unable to write the event"):
        encode_event(b"a", event=bad)
    with pytest.raises(ValueError, match="unable to write the id"):
        encode_event(b"a", identifier=bad)


@pytest.mark.parametrize("text", ["", "ping", "two\nlines", "two\r\nlines\rand one"])
def test_a_comment_is_no_event(text: str) -> None:
    """Signs of life must not show up in a chat, whatever is written in them."""
    events, comments = decode(encode_comment(text), encode_event(b"a"))
    assert events == [E(b"a")]
    assert comments >= 1


def test_an_endless_line_is_refused_as_soon_as_it_crosses_the_bound() -> None:
    """A backend that never ends its line must cost the bound and not the memory of the node."""
    decoder = SSEDecoder(BOUND)
    piece = b"x" * 65_536
    tracemalloc.start()
    try:
        for _ in range(BOUND // len(piece)):
            assert decoder.feed(piece) == []
        with pytest.raises(EventTooLarge, match="unable to read the event; it is larger than 1048576 bytes"):
            decoder.feed(piece)
        assert tracemalloc.get_traced_memory()[1] < 3 * BOUND
        assert tracemalloc.get_traced_memory()[0] < BOUND / 2
    finally:
        tracemalloc.stop()


def test_a_spent_decoder_reads_nothing_more() -> None:
    """What follows an event that was cut out would be read from its middle."""
    decoder = SSEDecoder(10)
    for data in (b"data: 123456789", b"\n\ndata: 1\n\n", b""):
        with pytest.raises(EventTooLarge):
            decoder.feed(data)


@pytest.mark.parametrize(
    ("stream", "fits"),
    [
        (b"data: 123456\n\n", True),
        (b"data: 1234567\n\n", False),
        (b"data:1\ndata:\n\n", True),
        (b"data:1\ndata:2\n\n", True),
        (b"data:1\ndata:23\n\n", False),
        (b"event:12\nid:1\n\n", True),
        (b"event:12\nid:12\n\n", False),
        (b": 34567890ab\n\n", True),
        (b": 34567890abc\n\n", False),
        (b":1234567\n:1234567\ndata:1\n:2\n\n", True),
        (b"data:1\n:2345678\n\n", False),
        (b"x: 34567890abc", False),
    ],
)
def test_the_bound_counts_the_lines_of_one_event(stream: bytes, *, fits: bool) -> None:
    """The bound must not depend on the cuts, or a turn would end by the network's mood."""
    for size in (1, 3, len(stream)):
        decoder = SSEDecoder(12)
        try:
            first = b"data: 000000\n\n"
            assert decoder.feed(first) == [E(b"000000")]
            for at in range(0, len(stream), size):
                decoder.feed(stream[at : at + size])
            assert fits
        except EventTooLarge:
            assert not fits


def test_what_came_before_a_large_event_is_kept() -> None:
    """Chunks that arrived in the same read were sent, and people must see them."""
    with pytest.raises(EventTooLarge) as caught:
        SSEDecoder(10).feed(b"data: 1\n\ndata: 2\n\ndata: 345678\n\n")
    assert caught.value.events == [E(b"1"), E(b"2")]


def test_a_long_line_in_small_pieces_takes_linear_time() -> None:
    """Were each piece to copy what came before, these 8 MB would run into the suite's timeout."""
    decoder = SSEDecoder(16 << 20)
    line = b"data: " + b"x" * (8 << 20) + b"\n\n"
    events = [event for at in range(0, len(line), 64) for event in decoder.feed(line[at : at + 64])]
    assert events == [E(line[6:-2])]


@pytest.mark.parametrize("path", sorted(STREAMS.glob("*.sse")), ids=lambda path: path.stem)
def test_a_recorded_stream_is_read_whole(path: Path) -> None:
    """What real AI SDK backends write: JSON objects with a type, and [DONE] unless they broke off."""
    stream = path.read_bytes()
    events, comments = decode(stream)
    written = [
        line.removeprefix("data: ") for line in stream.decode().split("\n") if line.startswith("data: ")
    ]
    assert [event.data.decode() for event in events] == written
    assert comments == len(re.findall(rb"^:", stream, re.MULTILINE))
    assert all(event.data == b"[DONE]" or json.loads(event.data)["type"] for event in events)
    assert decode(*(stream[at : at + 7] for at in range(0, len(stream), 7))) == (events, comments)
    assert b"".join(encode_event(event.data) for event in events) == re.sub(rb"(?m)^:.*\n\n", b"", stream)
