"""Fast clients: each wire as a raw asyncio protocol that checks every chunk and keeps every latency.

They parse what these servers write and no more: chunked HTTP/1.1 answers, unmasked unfragmented text frames.
"""

from __future__ import annotations

import asyncio
import json
import time
from enum import StrEnum
from typing import Any, cast

from bench.answers import Answer, BenchError

SECONDS = 60.0
"""Longest wait for anything."""

_HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{protocol}\r\n"
)

CHAT_PATH = "/api/chat"


class Wire(StrEnum):
    """How a client speaks."""

    HTTP = "http"
    SDK = "sdk"
    SESSION = "session"


class Client(asyncio.Protocol):
    """A connection that reads one answer."""

    transport: asyncio.Transport

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self.transport = cast("asyncio.Transport", transport)  # what uvloop gives is none by inheritance

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self.answer.fail(f"the connection was lost ({exc or 'closed'})")

    def close(self) -> None:
        """Leave, whatever is under way."""
        self.transport.abort()


class HttpClient(Client):
    """Reads an event stream."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self._in_body = False
        self._text = b""

    def request(self, method: str, path: str, body: bytes = b"") -> None:
        """Ask."""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        now = time.monotonic_ns()
        data = self._rest + data if self._rest else data
        if not self._in_body:
            head, found, rest = data.partition(b"\r\n\r\n")
            if not found:
                self._rest = data
                return
            if not head.startswith(b"HTTP/1.1 200") or b"chunked" not in head:
                self.answer.fail(f"the answer was {head[:80]!r} {rest[:200]!r}")
            self._in_body, data = True, rest
        ended = self._unchunk(data)
        whole, _, self._text = self._text.rpartition(b"\n\n")
        self.answer.take(whole + b"\n\n", now)
        if ended:
            self.answer.finish(now)

    def _unchunk(self, data: bytes) -> bool:
        """Add to the text what ``data`` holds; whether this was all."""
        position, pieces, ended = 0, [self._text], False
        while (line_end := data.find(b"\r\n", position)) >= 0:
            size = int(data[position:line_end], 16)
            start = line_end + 2
            if len(data) < start + size + 2:
                break
            ended = size == 0
            pieces.append(data[start : start + size])
            position = start + size + 2
        self._rest = data[position:]
        self._text = b"".join(pieces)
        return ended


class SocketClient(Client):
    """Speaks either WebSocket wire."""

    def __init__(self, answer: Answer, wire: Wire) -> None:
        super().__init__(answer)
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.reply: asyncio.Future[tuple[int, bytes]] | None = None
        """Set to be told of the reply to a cancel or an attach, and when it came."""
        self._wire = wire
        self._end = b'{"type":"end"' if wire is Wire.SDK else b'{"type":"turn-end"'
        self._error = b'{"type":"error"'

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        super().connection_made(transport)
        session = self._wire is Wire.SESSION
        path = "/gateway/v1/ws" if session else CHAT_PATH
        protocol = "Sec-WebSocket-Protocol: session-gateway.v1\r\n" if session else ""
        self.transport.write(_HANDSHAKE.format(path=path, protocol=protocol).encode())

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        super().connection_lost(exc)
        if not self.opened.done():
            self.opened.set_exception(BenchError("unable to measure; the handshake was refused"))

    def say(self, frame: dict[str, Any]) -> None:
        """Write a text frame. The mask is zero, so masking changes nothing."""
        payload = json.dumps(frame).encode()
        size = len(payload)
        length = bytes((0x80 | size,)) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
        self.transport.write(b"\x81" + length + b"\0\0\0\0" + payload)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        now = time.monotonic_ns()
        data = self._rest + data if self._rest else data
        if not self.opened.done():
            head, found, rest = data.partition(b"\r\n\r\n")
            if not found:
                self._rest = data
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self.opened.set_exception(BenchError(f"unable to measure; the handshake got {head[:80]!r}"))
                return
            self.opened.set_result(None)
            data = rest
        self._rest = self._unframe(data, now)

    def _unframe(self, data: bytes, now: int) -> bytes:
        position, available = 0, len(data)
        while available - position >= 2:
            size, start = data[position + 1], position + 2
            if size >= 126:
                width = 2 if size == 126 else 8
                if available - start < width:
                    break
                size = int.from_bytes(data[start : start + width], "big")
                start += width
            if available - start < size:
                break
            self._frame(data[position], data[start : start + size], now)
            position = start + size
        return data[position:]

    def _frame(self, head: int, payload: bytes, now: int) -> None:
        if head == 0x89:
            self.transport.write(b"\x8a" + bytes((0x80 | len(payload),)) + b"\0\0\0\0" + payload)
            return
        if head != 0x81:
            self.answer.fail(f"a frame of kind {head:#x} came: {payload[:200]!r}")
            return
        if self.reply is not None and not self.reply.done():
            for line in payload.split(b"\n"):
                if line.startswith((b'{"type":"cancelled"', b'{"type":"attached"')):
                    self.reply.set_result((now, line))
        self.answer.take(payload, now)
        if self._end in payload:
            self.answer.finish(now)
        elif self._error in payload:
            self.answer.fail(f"an error came: {payload[:200]!r}")


async def connect(port: int, wire: Wire, answer: Answer) -> HttpClient | SocketClient:
    """Open a connection, up to and with its handshake."""
    loop = asyncio.get_running_loop()

    def make() -> HttpClient | SocketClient:
        return HttpClient(answer) if wire is Wire.HTTP else SocketClient(answer, wire)

    async with asyncio.timeout(SECONDS):
        _, client = await loop.create_connection(make, "127.0.0.1", port)
        if isinstance(client, SocketClient):
            await client.opened
    return client


def send(client: HttpClient | SocketClient, wire: Wire, session: str, order: dict[str, Any]) -> None:
    """Ask for a turn."""
    message = {"id": "m1", "role": "user", "parts": [{"type": "text", "text": "hello"}]}
    body: dict[str, Any] = {"messages": [message], "trigger": "submit-message", "bench": order}
    if isinstance(client, HttpClient):
        client.request("POST", CHAT_PATH, json.dumps({"id": session, **body}).encode())
    elif wire is Wire.SDK:
        told = {"messages": body["messages"], "trigger": body["trigger"], "body": {"bench": order}}
        client.say({"type": "send", "requestId": f"r-{session}", "id": session, **told})
    else:
        client.say({"type": "send", "id": 1, "session": session, "turn": f"t-{session}", "body": body})


def resume(client: HttpClient | SocketClient, wire: Wire, session: str) -> None:
    """Ask for a running turn from its first chunk."""
    if isinstance(client, HttpClient):
        client.request("GET", f"{CHAT_PATH}/{session}/stream")
    elif wire is Wire.SDK:
        client.say({"type": "resume", "requestId": "again", "id": session})
    else:
        client.say({"type": "attach", "id": 1, "session": session})


async def ask(port: int, path: str) -> dict[str, Any]:
    """Ask the backend about itself."""
    async with asyncio.timeout(SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: backend\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    told: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return told
