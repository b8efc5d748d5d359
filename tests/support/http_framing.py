"""Where the heads and messages of HTTP/1 begin and end: bytes in, pieces out, and nothing else."""

from __future__ import annotations

from enum import Enum, Flag, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEAD_BYTES = 64 * 1024
"""A head, or another line of HTTP, that is longer is none: its connection is passed through unseen."""


class Mark(Flag):
    """What a piece of HTTP ends."""

    NOTHING = 0
    HEAD = auto()
    MESSAGE = auto()


class Part(Enum):
    """Where in the HTTP of one direction we are; the first three are made of lines."""

    HEAD = auto()
    CHUNK_SIZE = auto()
    TRAILERS = auto()
    CHUNK = auto()
    BODY = auto()
    REST = auto()


class Head:
    """A head of a request or a response."""

    def __init__(self, lines: list[bytes]) -> None:
        self.first, *_ = first, *rest = [line.decode("latin-1") for line in lines]
        self.words = [*first.split(" ", 2), "", ""]
        self._fields: dict[str, str] = {}
        for line in rest:
            name, _, value = line.partition(":")
            self._fields[name.strip().lower()] = value.strip().lower()

    @property
    def is_upgrade(self) -> bool:
        """Whether a request asks for a WebSocket."""
        return "websocket" in self._fields.get("upgrade", "")

    @property
    def is_stream(self) -> bool:
        """Whether a response is made of Server-Sent Events."""
        return self._fields.get("content-type", "").startswith("text/event-stream")

    def body(self, *, unsaid: int | None) -> int | None:
        """How many bytes follow; -1 for chunks, ``None`` for all that come.

        Raises:
            ValueError: It is no head of HTTP.
        """
        if not any(word.startswith("HTTP/1.") for word in self.words):
            raise ValueError(self.first)
        if "chunked" in self._fields.get("transfer-encoding", ""):
            return -1
        length = self._fields.get("content-length")
        return unsaid if length is None else _number(length, 10)


def _number(text: str, base: int) -> int:
    if not text.isalnum():  # Python would take signs and underscores
        raise ValueError(text)
    return int(text, base)


class Framing:
    """Finds the heads and the ends of the messages in one direction of a connection, cut anywhere.

    Args:
        body_of: Says what follows a head, as :meth:`Head.body`.
    """

    def __init__(self, body_of: Callable[[Head], int | None]) -> None:
        self.part = Part.HEAD
        self.head = Head([b""])
        self._body_of = body_of
        self._line = b""
        self._lines: list[bytes] = []
        self._left = 0

    @property
    def within_head(self) -> bool:
        """Whether a head has begun and not ended."""
        return self.part is Part.HEAD and bool(self._line or self._lines)

    def feed(self, data: bytes) -> Iterator[tuple[bytes, Mark]]:
        """Cut bytes into pieces, each with what ends with it."""
        start = 0
        while start < len(data):
            end = self._end_of_piece(data, start)
            piece, start = data[start:end], end
            try:
                mark = self._take(piece)
            except ValueError:
                self.part, mark = Part.REST, Mark.NOTHING
            yield piece, mark

    def _end_of_piece(self, data: bytes, start: int) -> int:
        if self.part is Part.REST:
            return len(data)
        if self.part in {Part.BODY, Part.CHUNK}:
            return min(start + self._left, len(data))
        return data.find(b"\n", start) + 1 or len(data)

    def _take(self, piece: bytes) -> Mark:
        match self.part:
            case Part.REST:
                return Mark.NOTHING
            case Part.BODY | Part.CHUNK:
                return self._take_bytes(len(piece))
            case _:
                self._line += piece
                if len(self._line) + sum(map(len, self._lines)) > HEAD_BYTES:
                    raise ValueError(self.part)
                if not piece.endswith(b"\n"):
                    return Mark.NOTHING
                line, self._line = self._line.strip(), b""
                return self._take_line(line)

    def _take_bytes(self, count: int) -> Mark:
        self._left -= count
        if self._left:
            return Mark.NOTHING
        if self.part is Part.CHUNK:
            self.part = Part.CHUNK_SIZE
            return Mark.NOTHING
        self.part = Part.HEAD
        return Mark.MESSAGE

    def _take_line(self, line: bytes) -> Mark:
        match self.part:
            case Part.HEAD if line:
                self._lines.append(line)
            case Part.HEAD if self._lines:
                return self._end_head()
            case Part.CHUNK_SIZE:
                size = _number(line.split(b";")[0].decode("latin-1").strip(), 16)
                self._left = size + len(b"\r\n")
                self.part = Part.CHUNK if size else Part.TRAILERS
            case Part.TRAILERS if not line:
                self.part = Part.HEAD
                return Mark.MESSAGE
            case _:
                pass
        return Mark.NOTHING

    def _end_head(self) -> Mark:
        self.head, self._lines = Head(self._lines), []
        match self._body_of(self.head):
            case None:
                self.part = Part.REST
            case 0:
                return Mark.HEAD | Mark.MESSAGE
            case -1:
                self.part = Part.CHUNK_SIZE
            case length:
                self.part, self._left = Part.BODY, length
        return Mark.HEAD
