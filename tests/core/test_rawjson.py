from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.rawjson import NotJSON, WrongShape, decode, encode, one_line, whole_characters

anything = msgspec.json.Decoder(msgspec.Raw)
members_of = msgspec.json.Decoder(dict[str, msgspec.Raw])
untyped: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Any)

DEPTH = 100_000

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def by_python(document: str) -> Any:
    """Python's own parser without its extensions: another reading of the same standard."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(document, parse_constant=refuse)


@pytest.mark.parametrize(
    "document",
    [
        b"null",
        b" \t\r\n[ ] \n",
        b'""',
        b"-0.0e+7",
        b'{"":{}}',
        b"1" * 400,
        b'{"a":1e999}',
        b'{"a":[' + b"9" * 400 + b"]}",
        b'"\\u0000\\/\\b"',
        b'"\x7f"',
        '"\u2028ö😀"'.encode(),
    ],
)
def test_json_is_taken_as_it_stands(document: bytes) -> None:
    """Numbers of any size and precision go on as they were written, since nothing computes with them."""
    assert bytes(decode(anything, document)) == document.strip(b" \t\r\n")


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b" ",
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b'{"a":NaN}',
        b"{} x",
        b"{}{}",
        b"1 2",
        b"[1,]",
        b'{"a":1,}',
        b"{'a':1}",
        b"{a:1}",
        b'{"a"}',
        b"[1",
        b'"a',
        b"tru",
        b"True",
        b"undefined",
        b"01",
        b"+1",
        b".5",
        b"1.",
        b"1e",
        b"-",
        b"0x1",
        b'"\\x"',
        b'"\\u12"',
        b'"a\nb"',
        b'"\t"',
        b'"\x00"',
        b'{"a":"\x1f"}',
        b"// a\n1",
        b"\xef\xbb\xbf{}",
        b"\xff",
        b"[DONE]",
        b"[" * DEPTH,
        b"[" * DEPTH + b"]" * DEPTH,
        b'{"a":' * DEPTH + b"1" + b"}" * DEPTH,
        b'["\\ud83d",' + b"[" * DEPTH + b"]" * DEPTH + b"]",
        b'"\\ud83d',
        b'"\\ud83d" x',
        b'"\\ud83d\n"',
    ],
    ids=lambda document: repr(document[:20]),
)
def test_what_is_no_json_is_told_so(document: bytes) -> None:
    """It would stand in the middle of a line of the session protocol, and break all of it."""
    with pytest.raises(NotJSON):
        decode(anything, document)


def test_text_is_read_like_its_bytes() -> None:
    """Commands come as text frames, bodies as bytes."""
    assert decode(untyped, '{"a":"ö\\ud83d"}') == {"a": "ö\ufffd"}
    with pytest.raises(NotJSON):
        decode(untyped, '{"a":')


@pytest.mark.parametrize(
    ("document", "place"), [(b"[]", "object"), (b"5", "object"), (b'["\\ud83d"]', "object")]
)
def test_json_of_another_shape_is_not_called_broken(document: bytes, place: str) -> None:
    """A number is a fine payload of a plain backend, and a bad body of a send."""
    with pytest.raises(WrongShape, match=place):
        decode(members_of, document)


def test_a_document_that_must_be_mended_is_checked_for_its_shape_too() -> None:
    """The second reading must not let pass what the first one would not."""
    with pytest.raises(WrongShape, match="Expected `int`"):
        decode(msgspec.json.Decoder(dict[str, int]), b'{"\\ud83d":1,"a":"b"}')


@given(value=values, cut=st.integers(0, 200), put=st.sampled_from('"\\{}[],:0.-+eEtn \n\x00ud8ö'))
def test_the_same_is_json_here_as_elsewhere(value: Any, cut: int, put: str) -> None:
    """What we call JSON is read by browsers; what they read we must not refuse."""
    document = json.dumps(value)
    at = cut % (len(document) + 1)
    for text in (document, document[:at] + put + document[at:], document[:at] + document[at + 1 :]):
        try:
            by_python(text)
        except ValueError:
            with pytest.raises(NotJSON):
                decode(anything, text.encode())
        else:
            written = bytes(decode(anything, text.encode()))
            assert written == text.strip(" \t\r\n").encode() or written in whole_characters(text.encode())


@pytest.mark.parametrize(
    ("document", "text"),
    [
        (rb'"\ud83d"', "\ufffd"),
        (rb'"\ude00"', "\ufffd"),
        (rb'"\uD83D\uDE00"', "😀"),
        (rb'"\ud83d\ud83d\ude00"', "\ufffd😀"),
        (rb'"\ud83d\ude00\ude00"', "😀\ufffd"),
        (rb'"\ude00\ud83d"', "\ufffd\ufffd"),
        (rb'"\ud83dx"', "\ufffdx"),
        (rb'"\ud83d\n\ude00"', "\ufffd\n\ufffd"),
        (rb'"\\ud83d"', r"\ud83d"),
        (rb'"\\\ud83d"', "\\\ufffd"),
        (rb'"\\\\ud83d\ud83d"', "\\\\ud83d\ufffd"),
        (rb'"\\ud83d\ude00"', "\\ud83d\ufffd"),
        (rb'"\uDBFF\uDFFF\uDBFF"', "\U0010ffff\ufffd"),
        (rb'"\ud7ff\ue000"', "\ud7ff\ue000"),
        (b'"\xff"', "\ufffd"),
        (b'"\xf0\x9f\x98"', "\ufffd"),
        (b'"\xff\\ud83d"', "\ufffd\ufffd"),
    ],
)
def test_half_a_surrogate_pair_is_forgiven(document: bytes, text: str) -> None:
    """A model's token may end inside an emoji, and JavaScript writes that as JSON."""
    assert decode(untyped, document) == text
    assert json.loads(whole_characters(document)) == text


@given(text=st.text(st.sampled_from('\\ud83dn"/\ud83d\ude00\ud800\udfffö😀\n')))
def test_halves_are_replaced_and_nothing_else(text: str) -> None:
    """An escaped backslash before a `u` must not be taken for an escape, wherever it stands."""
    document = json.dumps(text)
    expected = re.sub("[\ud800-\udfff]", "\ufffd", json.loads(document))
    assert decode(untyped, document.encode()) == expected
    assert json.loads(whole_characters(document.encode())) == expected


@pytest.mark.parametrize(
    ("document", "written"),
    [
        (b"{}", b"{}"),
        (b'{\n  "a": 1\n}\n', b'{   "a": 1 } '),
        (b"[\r\n1,\r2]", b"[  1, 2]"),
        (b'"\\n\\r"', b'"\\n\\r"'),
        ('["\u2028\u0085"]'.encode(), '["\u2028\u0085"]'.encode()),
    ],
)
def test_a_document_fits_a_line(document: bytes, written: bytes) -> None:
    """Lines are what the session protocol and Server-Sent Events are made of."""
    assert one_line(document) == written


@given(value=values, indent=st.integers(0, 3), line_end=st.sampled_from(["\n", "\r\n", "\r"]))
def test_one_line_says_the_same(value: Any, indent: int, line_end: str) -> None:
    """A pretty-printing backend's chunks must reach clients with their values."""
    pretty = json.dumps(value, indent=indent, ensure_ascii=False).replace("\n", line_end).encode()
    line = one_line(pretty)
    assert json.loads(line) == value
    assert b"\n" not in line
    assert b"\r" not in line


@given(value=values)
def test_what_we_write_is_one_line_of_json(value: Any) -> None:
    """Several replies may share a frame, one per line."""
    written = encode(value)
    assert json.loads(written) == value
    assert b"\n" not in written


def test_raw_parts_are_written_as_they_came() -> None:
    """What is passed on is never encoded again: 1.0 stays 1.0, and a big number stays exact."""
    body = decode(members_of, b'{"a": 1.00, "b" : {"c" : 12345678901234567890123} }')
    assert encode(body) == b'{"a":1.00,"b":{"c" : 12345678901234567890123}}'
