"""Fast clients: each wire as a raw asyncio protocol that checks every chunk and keeps every latency.

They parse what these servers write and no more, such as answers of HTTP/1.1 that are chunked.
"""

from __future__ import annotations

import asyncio
import json
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Any, cast

from bench.answers import BenchError
from bench.frames import SESSION_PATH, FrameClient

if TYPE_CHECKING:
    from bench.answers import Answer

SECONDS = 60.0
"""Longest wait for anything."""

CHAT_PATH = "/api/chat"
COMMANDS_PATH = "/gateway/v1/commands"


class Wire(StrEnum):
    """How a client speaks."""

    HTTP = "http"
    SDK = "sdk"
    SESSION = "session"


class HttpClient(asyncio.Protocol):
    """Reads an event stream."""

    transport: asyncio.Transport

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self._rest = b""
        self._in_body = False
        self._text = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self.transport = cast("asyncio.Transport", transport)  # what uvloop gives is none by inheritance

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self.answer.fail(f"the connection was lost ({exc or 'closed'})")

    def close(self) -> None:
        """Leave, whatever is under way."""
        self.transport.abort()

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


class SocketClient(FrameClient):
    """Speaks either WebSocket wire."""

    def __init__(self, answer: Answer, wire: Wire) -> None:
        is_session = wire is Wire.SESSION
        super().__init__(SESSION_PATH if is_session else CHAT_PATH, is_session=is_session)
        self.answer = answer
        self.reply: asyncio.Future[tuple[int, bytes]] | None = None
        """Set to be told of the reply to a cancel or an attach, and when it came."""
        self._end = b'{"type":"end"' if wire is Wire.SDK else b'{"type":"turn-end"'
        self._error = b'{"type":"error"'

    def lost(self, why: str) -> None:
        """See the base class."""
        self.answer.fail(why)

    def frame(self, payload: bytes, now: int) -> None:
        """See the base class."""
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
    body = _body(order)
    if isinstance(client, HttpClient):
        client.request("POST", CHAT_PATH, json.dumps({"id": session, **body}).encode())
    elif wire is Wire.SDK:
        told = {"messages": body["messages"], "trigger": body["trigger"], "body": {"bench": order}}
        client.say({"type": "send", "requestId": f"r-{session}", "id": session, **told})
    else:
        client.say(send_command(session, order))


def send_command(session: str, order: dict[str, Any]) -> dict[str, Any]:
    """What asks for a turn in the session protocol, on whichever carrier."""
    return {"type": "send", "id": 1, "session": session, "turn": f"t-{session}", "body": _body(order)}


def _body(order: dict[str, Any]) -> dict[str, Any]:
    message = {"id": "m1", "role": "user", "parts": [{"type": "text", "text": "hello"}]}
    return {"messages": [message], "trigger": "submit-message", "bench": order}


async def attach(client: SocketClient, session: str) -> None:
    """Attach to a session from its start, and wait until that is so."""
    client.reply = asyncio.get_running_loop().create_future()
    client.say({"type": "attach", "id": 1, "session": session})
    async with asyncio.timeout(SECONDS):
        await client.reply


async def post_send(port: int, session: str, order: dict[str, Any]) -> None:
    """Ask for a turn by POST, so that whoever asks is not attached.

    Raises:
        BenchError: It was not accepted.
    """
    answer = await post(port, COMMANDS_PATH, send_command(session, order))
    if b'"type":"accepted"' not in answer:
        raise BenchError(f"unable to measure; a send was answered {answer[-300:]!r}")


def resume(client: HttpClient | SocketClient, wire: Wire, session: str) -> None:
    """Ask for a running turn from its first chunk."""
    if isinstance(client, HttpClient):
        client.request("GET", f"{CHAT_PATH}/{session}/stream")
    elif wire is Wire.SDK:
        client.say({"type": "resume", "requestId": "again", "id": session})
    else:
        client.say({"type": "attach", "id": 1, "session": session})


async def post(port: int, path: str, body: dict[str, Any] | None = None) -> bytes:
    """POST on a connection of its own; returns the answer, head and all."""
    payload = json.dumps(body or {}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    async with asyncio.timeout(SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + payload)
        answer = await reader.read()
        writer.close()
    return answer


async def get(port: int, path: str, headers: str = "") -> bytes:
    """GET on a connection of its own; returns the answer, head and all."""
    async with asyncio.timeout(SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}Connection: close\r\n\r\n"
        writer.write(request.encode())
        answer = await reader.read()
        writer.close()
    return answer


async def ask(port: int, path: str) -> dict[str, Any]:
    """Ask the backend about itself."""
    told: dict[str, Any] = json.loads((await get(port, path)).partition(b"\r\n\r\n")[2])
    return told
