r"""Server-Sent Events, bytes to values and back.

The standard: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream

Read by its rules: a byte order mark at the start is skipped, a line ends in CR, LF or CRLF (and in nothing
else: U+2028, U+0085, VT and FF are data), one space after the colon belongs to the syntax, an event without
``data`` is dropped, and so is a last one that no blank line completed. ``id`` and ``retry`` are read past:
the gateway names its own cursors, and it never calls the backend again on its own. Written with LF only,
since ``eventsource-parser``, which the AI SDK uses, can miss events that end in CR.
"""

from __future__ import annotations

import re

import msgspec

from gateway.core.model import GatewayError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LINE_END = re.compile(rb"\r\n|\r|\n")
# Numbers, because `in` finds a number in bytes about ten times as fast as it finds bytes in bytes.
_CR, _LF = b"\r\n"


class ServerSentEvent(msgspec.Struct, frozen=True):
    r"""One event of a stream.

    Attributes:
        data: UTF-8, its invalid bytes replaced by U+FFFD as the WHATWG decoder does; lines joined by ``\n``.
        event: Its name; empty when it has none or is named ``message``, which mean the same.
    """

    data: bytes
    event: str = ""


class EventTooLarge(GatewayError):
    """An event outgrew its bound.

    Attributes:
        events: Those that the same ``feed`` had completed before it. They count.
    """

    def __init__(self, max_event_bytes: int, events: list[ServerSentEvent]) -> None:
        super().__init__(f"unable to read the event; it is larger than {max_event_bytes} bytes")
        self.events = events


class SSEDecoder:
    r"""Turns a byte stream, cut anywhere, into events.

    The result does not depend on where the network cut the stream: feeding ``b"data: a\r"`` then
    ``b"\ndata: b\n\n"`` gives what feeding the two joined gives. Time and memory are linear in what is fed.

    Args:
        max_event_bytes: Most bytes that the lines of one event may hold, finished or not. Comments are not
            kept and do not add up, but a single one may not be longer either.

    Attributes:
        comments: How many comment lines were completed so far; they are signs of life.
    """

    __slots__ = (
        "_at_start",
        "_data",
        "_event",
        "_line",
        "_max_event_bytes",
        "_size",
        "_skip_lf",
        "_spent",
        "comments",
    )

    def __init__(self, max_event_bytes: int) -> None:
        self.comments = 0
        self._max_event_bytes = max_event_bytes
        self._at_start = True
        self._skip_lf = False
        self._spent = False
        # The line that has not ended yet.
        self._line = bytearray()
        # The event that has not ended yet: the standard's two buffers, and the bytes of its lines.
        self._data = bytearray()
        self._event = ""
        self._size = 0

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """Take bytes from the network; return the events they completed.

        Raises:
            EventTooLarge: An event outgrew ``max_event_bytes``. The decoder is spent and raises from now on;
                abort the response that it was reading.
        """
        events: list[ServerSentEvent] = []
        if self._spent:
            raise EventTooLarge(self._max_event_bytes, events)
        if self._skip_lf or _CR in data:
            data = self._with_line_feeds(data)
        # Each block is what stands before one blank line; the last one is not complete.
        blocks = data.split(b"\n\n")
        rest = blocks.pop()
        between_events = not (self._size or self._line or self._at_start)
        for block in blocks:
            # Nearly every event of a chat is one line of data; the other way gives the same, slower.
            if (
                between_events
                and block.startswith(b"data:")
                and _LF not in block
                and len(block) <= self._max_event_bytes
            ):
                value = block[6:] if block.startswith(b"data: ") else block[5:]
                events.append(ServerSentEvent(value if value.isascii() else _valid_utf8(value)))
            else:
                self._take(block + b"\n\n", events)
                between_events = True
        if rest:
            self._take(rest, events)
        return events

    def _with_line_feeds(self, data: bytes) -> bytes:
        if self._skip_lf and data:
            # The CRLF was cut in two, and its CR has ended the line already.
            data = data.removeprefix(b"\n")
            self._skip_lf = False
        if data.endswith(b"\r"):
            self._skip_lf = True
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _take(self, text: bytes, events: list[ServerSentEvent]) -> None:
        first, *others = text.split(b"\n")
        self._line += first
        for other in others:
            self._refuse_above_bound(events)
            line = bytes(self._line)
            self._line = bytearray(other)
            self._end_line(line, events)
        self._refuse_above_bound(events)

    def _refuse_above_bound(self, events: list[ServerSentEvent]) -> None:
        if self._size + len(self._line) > self._max_event_bytes:
            self._spent = True
            self._line, self._data = bytearray(), bytearray()
            raise EventTooLarge(self._max_event_bytes, events)

    def _end_line(self, line: bytes, events: list[ServerSentEvent]) -> None:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line:
            self._end_event(events)
        elif line.startswith(b":"):
            self.comments += 1
        else:
            self._size += len(line)
            name, _, value = line.partition(b":")
            self._set_field(name, value.removeprefix(b" "))

    def _set_field(self, name: bytes, value: bytes) -> None:
        if name == b"data":
            self._data += value
            self._data += b"\n"
        elif name == b"event":
            self._event = value.decode(errors="replace")

    def _end_event(self, events: list[ServerSentEvent]) -> None:
        if self._data:
            # No line end is part of a longer UTF-8 sequence, so the lines can be decoded together.
            data = _valid_utf8(bytes(self._data[:-1]))
            events.append(ServerSentEvent(data, "" if self._event == "message" else self._event))
            self._data = bytearray()
        self._event = ""
        self._size = 0


def _valid_utf8(data: bytes) -> bytes:
    return data.decode(errors="replace").encode()


def encode_event(data: bytes, *, event: str = "", identifier: str = "") -> bytes:
    """Write one event, with the blank line that ends it.

    Args:
        data: UTF-8. A line end of any kind in it arrives as LF: the format has no other.
        event: Its name, if it has one.
        identifier: What the reader hands back as ``Last-Event-ID``, if anything.

    Raises:
        ValueError: A name or identifier holds a line end or NUL, which would end it.
    """
    prefix = _field("id", identifier) + _field("event", event)
    if _LF in data or _CR in data:
        data = _LINE_END.sub(b"\ndata: ", data)
    return b"%bdata: %b\n\n" % (prefix, data)


def _field(name: str, value: str) -> bytes:
    if not value:
        return b""
    if any(character in value for character in "\r\n\0"):
        raise ValueError(f"unable to write the {name} of an event; it holds a line end or NUL")
    return f"{name}: {value}\n".encode()


def encode_comment(text: str) -> bytes:
    """Write a comment: a sign of life that no reader sees as an event."""
    return b": %b\n\n" % _LINE_END.sub(b"\n: ", text.encode())
