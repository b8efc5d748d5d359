"""The demo's backend: what an AI SDK backend says on the wire, at the speed of a model.

It knows nothing of the gateway. It stops producing when its client goes away, as a backend does that
hands its request's signal to the model, and it counts that: ``GET /demo/status`` is how the page knows
that a cancel has reached the model, and that a lost connection has not.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from gateway.demo.answers import Answer, choose_answer, reasoning

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

Chunk = dict[str, Any]
"""One chunk of an AI SDK UI message stream, before it is encoded."""

STREAM_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
    "X-Vercel-AI-UI-Message-Stream": "v1",
}
"""What the AI SDK's own helpers send (``ui-message-stream-headers.ts``)."""

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    # The chat's name is in the page's address, and whoever has it has the chat.
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

_FOLDER = Path(__file__).parent
_FILES = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "pane.js": "text/javascript; charset=utf-8",
    "network.js": "text/javascript; charset=utf-8",
    "proof.js": "text/javascript; charset=utf-8",
    "transcript.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}

MAX_BODY_BYTES = 16 * 1024 * 1024
"""What the gateway lets through by default (``GATEWAY_MAX_BODY``)."""

MAX_ANSWER_SECONDS = 300.0
"""A client that stops reading holds its answer no longer than this; the longest answer takes 20 s."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast the model speaks.

    Attributes:
        chunk_seconds: Mean wait before each chunk; each one is between half and one and a half times this.
        tool_seconds: How long its tool takes.
    """

    chunk_seconds: float = 1 / 30
    tool_seconds: float = 1.2


HUMAN = Pace()
"""About 30 chunks per second: the middle of what hosted models do."""


@dataclass(slots=True)
class Meter:
    """What the model did so far, and does now. Counts only; every change is made by :meth:`answering`."""

    running: int = 0
    started: int = 0
    finished: int = 0
    stopped_by_close: int = 0
    chunks: int = 0
    last: str | None = None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count one answer from its start to its end, whichever end it is."""
        self.started += 1
        self.running += 1
        try:
            yield
        except (asyncio.CancelledError, ConnectionResetError):
            self.stopped_by_close += 1
            self.last = "stoppedByClose"
            raise
        else:
            self.finished += 1
            self.last = "finished"
        finally:
            self.running -= 1

    def status(self) -> dict[str, int | str | None]:
        """The counts, as ``GET /demo/status`` tells them."""
        return {
            "running": self.running,
            "started": self.started,
            "finished": self.finished,
            "stoppedByClose": self.stopped_by_close,
            "chunks": self.chunks,
            "last": self.last,
        }


_METER = web.AppKey("meter", Meter)
_PACE = web.AppKey("pace", Pace)


def question_of(body: object) -> str:
    """The text of the last message of a ``DefaultChatTransport`` body; empty where there is none.

    It can be encoded: JSON may hold half a surrogate pair, and UTF-8 may not.
    """
    messages = body.get("messages") if isinstance(body, dict) else None
    last = messages[-1] if isinstance(messages, list) and messages else None
    parts = last.get("parts") if isinstance(last, dict) else None
    if not isinstance(parts, list):
        return ""
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    question = " ".join(text for text in texts if isinstance(text, str))
    return question.encode(errors="replace").decode()


def answer_chunks(answer: Answer, question: str, look: Callable[[], object]) -> Iterator[Chunk]:
    """The whole answer: reasoning and a tool call in one step, text in the next.

    Args:
        answer: What to say.
        question: What was asked; the reasoning repeats it.
        look: The tool. Called between its input and its output, by whoever takes the chunks.
    """
    yield {"type": "start"}  # Without messageId, as the AI SDK's own examples leave it out.
    yield {"type": "start-step"}
    yield from _spoken("reasoning", "reasoning-1", reasoning(answer, question))
    tool = {"toolCallId": "call-1"}
    tool_input = {"at": "my own server", "topic": answer.topic}
    yield {"type": "tool-input-start", **tool, "toolName": "lookAround", "dynamic": False}
    for piece in _pieces(json.dumps(tool_input)):
        yield {"type": "tool-input-delta", **tool, "inputTextDelta": piece}
    yield {"type": "tool-input-available", **tool, "toolName": "lookAround", "input": tool_input}
    yield {"type": "tool-output-available", **tool, "output": look(), "dynamic": False}
    yield {"type": "finish-step"}
    yield {"type": "start-step"}
    yield from _spoken("text", "text-1", answer.text)
    yield {"type": "finish-step"}
    yield {"type": "finish", "finishReason": "stop"}


def _spoken(kind: str, part: str, text: str) -> Iterator[Chunk]:
    yield {"type": f"{kind}-start", "id": part}
    for piece in _pieces(text):
        yield {"type": f"{kind}-delta", "id": part, "delta": piece}
    yield {"type": f"{kind}-end", "id": part}


def _pieces(text: str) -> list[str]:
    """Cut a text about where a tokenizer would; joined they are the text."""
    return re.findall(r"\s*\S{1,6}|\s+", text)


async def _chat(request: web.Request) -> web.StreamResponse:
    try:
        question = question_of(await request.json())
    except (ValueError, LookupError):  # LookupError: a charset that nobody knows.
        return web.Response(status=HTTPStatus.BAD_REQUEST, text="unable to read the body; send JSON")
    response = web.StreamResponse(headers=STREAM_HEADERS)
    try:
        with request.app[_METER].answering():
            async with asyncio.timeout(MAX_ANSWER_SECONDS):
                await response.prepare(request)
                await _speak(request, response, question)
                await response.write_eof()
    except ConnectionResetError:
        return response  # The client has left; there is nobody to tell.
    return response


async def _speak(request: web.Request, response: web.StreamResponse, question: str) -> None:
    """Write an answer at the model's pace. Raises ConnectionResetError once the client is gone."""
    meter, pace = request.app[_METER], request.app[_PACE]
    transport = request.transport
    host, port = transport.get_extra_info("peername", ("nobody", 0))[:2] if transport else ("nobody", 0)

    def look() -> object:
        return {
            "requestsOpenToMe": meter.running,
            "connectedTo": f"{host}:{port}",
            "chunksSoFar": meter.chunks,
        }

    for chunk in answer_chunks(choose_answer(question), question, look):
        slow = pace.tool_seconds if chunk["type"] == "tool-output-available" else 0.0
        # Half to one and a half: steady enough to read, uneven enough to look alive.
        await asyncio.sleep(slow + pace.chunk_seconds * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
        await response.write(b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n")
        meter.chunks += 1
    await response.write(b"data: [DONE]\n\n")


async def _status(request: web.Request) -> web.Response:
    return web.json_response(request.app[_METER].status(), headers={"Cache-Control": "no-store"})


async def _page(_request: web.Request) -> web.FileResponse:
    headers = PAGE_HEADERS | {"Content-Type": "text/html; charset=utf-8"}
    return web.FileResponse(_FOLDER / "page.html", headers=headers)


async def _file(request: web.Request) -> web.FileResponse:
    name = request.match_info["name"]
    if name not in _FILES:
        raise web.HTTPNotFound
    return web.FileResponse(_FOLDER / name, headers=PAGE_HEADERS | {"Content-Type": _FILES[name]})


def make_backend(*, pace: Pace = HUMAN) -> web.Application:
    """The backend as an application. Run it with ``handler_cancellation=True``, so that it stops at once."""
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app[_METER] = Meter()
    app[_PACE] = pace
    app.router.add_post("/api/chat", _chat)
    app.router.add_get("/demo/status", _status)
    app.router.add_get("/demo/{name}", _file)
    app.router.add_get("/", _page)
    return app


@asynccontextmanager
async def serve_backend(host: str = "127.0.0.1", port: int = 0, *, pace: Pace = HUMAN) -> AsyncIterator[int]:
    """Serve the backend inside the block; gives the port it is bound to.

    Raises:
        OSError: The address is taken or not ours.
    """
    app = make_backend(pace=pace)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
