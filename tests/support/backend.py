"""ScriptedBackend: a backend that says, waits, hangs and drops exactly what a test wants, byte by byte.

It is a raw TCP server, so that what no framework would send can be sent. A test scripts it as a coroutine::

    async def script(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.say({"type": "start"})
        await exchange.closed()          # until the gateway hangs up

    async with ScriptedBackend(script) as backend:
        backend.url, backend.exchanges
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

WAIT_SECONDS = 15.0

AI_HEADERS = {"Content-Type": "text/event-stream", "x-vercel-ai-ui-message-stream": "v1"}
SSE_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8"}


class Exchange:
    """One request and its answer.

    Attributes:
        method: Of the request.
        target: Path and query as they came.
        headers: Lower-cased names.
        body: As it came.
        was_closed: Set when the gateway's side of the connection ended.
        release: For scripts to wait on, and for tests to set.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.method = ""
        self.target = ""
        self.headers: dict[str, str] = {}
        self.body = b""
        self.was_closed = asyncio.Event()
        self.release = asyncio.Event()

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)

    async def read_request(self) -> None:
        """Read head and body."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        self.method, self.target, _ = head[0].split(" ", 2)
        self.headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:] if line)
        }
        if "content-length" in self.headers:
            self.body = await self.reader.readexactly(int(self.headers["content-length"]))

    async def head(
        self, status: str = "200 OK", headers: dict[str, str] | None = None, *, chunked: bool = True
    ) -> None:
        """Write the head; a chunked body is what :meth:`raw` and :meth:`say` write from then on."""
        self._chunked = chunked
        lines = [f"HTTP/1.1 {status}"]
        lines += [f"{name}: {value}" for name, value in (headers or AI_HEADERS).items()]
        if chunked:
            lines.append("Transfer-Encoding: chunked")
        self.writer.write("\r\n".join([*lines, "", ""]).encode())
        await self.writer.drain()

    async def raw(self, data: bytes) -> None:
        """Write bytes of the body."""
        if self._chunked and data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self.writer.write(data)
        await self.writer.drain()

    async def say(self, *chunks: object) -> None:
        """Write chunks as events, all in one write."""
        await self.raw(b"".join(b"data: " + _payload(chunk) + b"\n\n" for chunk in chunks))

    async def text(self, *deltas: str, start: bool = True, finish: bool = True) -> None:
        """A whole AI SDK answer of one text part, a write per chunk."""
        if start:
            await self.say({"type": "start"})
            await self.say({"type": "start-step"})
            await self.say({"type": "text-start", "id": "t1"})
        for delta in deltas:
            await self.say({"type": "text-delta", "id": "t1", "delta": delta})
        if finish:
            await self.say({"type": "text-end", "id": "t1"})
            await self.say({"type": "finish-step"})
            await self.say({"type": "finish"})
            await self.say("[DONE]")
            await self.end()

    async def end(self) -> None:
        """End the body as HTTP says."""
        if self._chunked:
            self.writer.write(b"0\r\n\r\n")
            await self.writer.drain()

    async def closed(self) -> None:
        """Wait until the gateway ends its side."""
        async with asyncio.timeout(WAIT_SECONDS):
            await self.was_closed.wait()

    def drop(self) -> None:
        """Reset the connection."""
        self.writer.transport.abort()

    async def watch(self) -> None:
        """Notice the end of the gateway's side."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65_536):
                pass
        self.was_closed.set()


def _payload(chunk: object) -> bytes:
    return chunk.encode() if isinstance(chunk, str) else json.dumps(chunk, ensure_ascii=False).encode()


class ScriptedBackend:
    """Serves every request by a script, on a port of its own.

    Attributes:
        url: ``http://127.0.0.1:<port>``.
        exchanges: Every request, in the order they came.
    """

    def __init__(self, script: Callable[[Exchange], Awaitable[None]]) -> None:
        self.script = script
        self.url = ""
        self.exchanges: list[Exchange] = []
        self._arrived = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for exchange in self.exchanges:
            exchange.drop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def exchange(self, number: int = 0) -> Exchange:
        """The request with this number, once it has come whole."""
        async with asyncio.timeout(WAIT_SECONDS), self._arrived:
            await self._arrived.wait_for(lambda: len(self.exchanges) > number)
        return self.exchanges[number]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        exchange = Exchange(reader, writer)
        watching = None
        try:
            await exchange.read_request()
            watching = asyncio.create_task(exchange.watch())
            async with self._arrived:
                self.exchanges.append(exchange)
                self._arrived.notify_all()
            await self.script(exchange)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            if watching is not None:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
            self._tasks.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def answers(exchange: Exchange) -> None:
    """A script: a short answer, whole."""
    await exchange.head()
    await exchange.text("one", "two")


async def never_ends(exchange: Exchange) -> None:
    """A script: an answer that goes on until the gateway hangs up."""
    await exchange.head()
    await exchange.text("one", finish=False)
    await exchange.closed()


async def until_released(exchange: Exchange) -> None:
    """A script: an answer that stands still in the middle until it is released."""
    await exchange.head()
    await exchange.text("one", finish=False)
    await exchange.release.wait()
    await exchange.text("two", start=False)
