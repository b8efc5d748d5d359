"""HTTP is found wherever it is cut, and what is none is let be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.http_framing import HEAD_BYTES, Framing, Head, Mark

MESSAGES = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST / HTTP/1.1\r\ncontent-length:  5 \r\n\r\nab\r\n\n",
    b"PUT / HTTP/1.1\nTransfer-Encoding: chunked\n\n5;x\n0\r\n\r\n\r\nA\r\n0123456789\r\n0\r\nb:\r\n\r\n",
    b"\r\nPOST / HTTP/1.1\nContent-Length: 0\n\n",
]


@given(
    messages=st.lists(st.sampled_from(MESSAGES), min_size=1, max_size=5),
    cuts=st.lists(st.integers(1, 40), max_size=20),
)
def test_messages_are_found_wherever_they_are_cut(messages: list[bytes], cuts: list[int]) -> None:
    """Each ends where it ends, and no byte is lost or changed."""
    framing = Framing(lambda head: head.body(unsaid=0))
    said, ends, heads = b"".join(messages), [], 0
    seen = b""
    left = said
    while left:
        size = cuts.pop() if cuts else len(left)
        for piece, mark in framing.feed(left[:size]):
            seen += piece
            heads += Mark.HEAD in mark
            if Mark.MESSAGE in mark:
                ends.append(len(seen))
        left = left[size:]
    assert seen == said
    assert ends == [len(b"".join(messages[: count + 1])) for count in range(len(messages))]
    assert heads == len(messages)


@pytest.mark.parametrize(
    "odd",
    [
        b"\x16\x03\x01 no HTTP\n\n",
        b"SSH-2.0-x\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"y" * HEAD_BYTES,
    ],
)
def test_what_is_no_http_is_let_be(odd: bytes) -> None:
    """From there on no head is seen."""
    framing = Framing(lambda head: head.body(unsaid=0))
    list(framing.feed(odd))
    assert list(framing.feed(MESSAGES[0])) == [(MESSAGES[0], Mark.NOTHING)]


def test_a_head_is_read_without_regard_to_case() -> None:
    """Browsers, proxies and servers differ."""
    head = Head([b"GET / HTTP/1.1", b"UPGRADE: WebSocket"])
    assert head.is_upgrade
    assert Head([b"HTTP/1.1 200 OK", b"content-TYPE: Text/Event-Stream;charset=utf-8"]).is_stream
