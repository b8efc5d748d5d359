"""Clients of the two stock wires, byte by byte: ``DefaultChatTransport``'s HTTP and the SDK's own socket."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import aiohttp
from yarl import URL

from tests.support.client import WAIT_SECONDS, send_body

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping


async def eventually(holds: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait for a condition that nobody announces."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            found = holds()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.005)


@dataclass(frozen=True)
class Event:
    """One Server-Sent Event, as ``EventSource`` would see it."""

    id: str
    event: str
    data: str

    @property
    def json(self) -> Any:
        """The data, decoded."""
        return json.loads(self.data)


def read_events(raw: bytes) -> list[Event]:
    """The whole events of a stream; comments are left out."""
    events = []
    for block in raw.decode().split("\n\n")[:-1]:
        fields: dict[str, str] = {}
        for line in block.split("\n"):
            name, _, value = line.partition(": ")
            fields[name] = f"{fields[name]}\n{value}" if name in fields and name == "data" else value
        if "data" in fields:
            events.append(Event(fields.get("id", ""), fields.get("event", ""), fields["data"]))
    return events


class Answer:
    """A response that is read as it comes.

    Attributes:
        raw: What came of the body so far.
        whole: Whether it ended as HTTP says it should; ``None`` while it goes on.
    """

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.status = response.status
        self.headers = response.headers
        self.raw = b""
        self.whole: bool | None = None
        self._changed = asyncio.Condition()
        self._reading = asyncio.create_task(self._read())

    @property
    def events(self) -> list[Event]:
        """The events so far."""
        return read_events(self.raw)

    @property
    def chunks(self) -> list[Any]:
        """Their JSON, without ``[DONE]``."""
        return [event.json for event in self.events if event.data != "[DONE]"]

    @property
    def text(self) -> str:
        """What the text deltas add up to."""
        return "".join(chunk["delta"] for chunk in self.chunks if chunk["type"] == "text-delta")

    @property
    def turn(self) -> str:
        """The turn that it tells."""
        return self.headers["Session-Gateway-Turn"]

    async def has(self, count: int) -> list[Event]:
        """Wait until that many events have come."""
        await self.wait(lambda: len(self.events) >= count)
        return self.events

    async def has_or_ends(self, count: int) -> None:
        """Wait until that many events have come, or nothing comes any more."""
        await self.wait(lambda: len(self.events) >= count or self.whole is not None)

    async def came(self, data: bytes) -> None:
        """Wait until these bytes have come."""
        await self.wait(lambda: data in self.raw)

    async def wait(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds of what has come."""
        async with asyncio.timeout(WAIT_SECONDS), self._changed:
            await self._changed.wait_for(holds)

    async def end(self) -> bytes:
        """Wait for the end of the body; returns all of it."""
        async with asyncio.timeout(WAIT_SECONDS):
            await asyncio.shield(self._reading)
        return self.raw

    async def cut(self) -> None:
        """Lose the connection without a word."""
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        connection = self.response.connection
        if connection is not None and connection.transport is not None:
            connection.transport.abort()
        self.response.close()

    async def _read(self) -> None:
        try:
            async for data in self.response.content.iter_any():
                await self._note(data, whole=None)
            await self._note(b"", whole=True)
        except (aiohttp.ClientError, OSError):
            await self._note(b"", whole=False)

    async def _note(self, data: bytes, *, whole: bool | None) -> None:
        async with self._changed:
            self.raw += data
            self.whole = whole
            self._changed.notify_all()


class HttpChat:
    """A page on the HTTP wire; keeps no connection and no cookie."""

    def __init__(self, address: str, path: str = "/api/chat") -> None:
        self.base = f"http://{address}"
        self.url = self.base + path
        self._answers: list[Answer] = []

    async def __aenter__(self) -> Self:
        self.http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True, limit=0), cookie_jar=aiohttp.DummyCookieJar()
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        for answer in self._answers:
            await answer.cut()
        await self.http.close()

    async def request(self, method: str, url: str, **more: Any) -> Answer:
        """Ask; returns when the head has come."""
        async with asyncio.timeout(WAIT_SECONDS):
            answer = Answer(
                await self.http.request(method, URL(url, encoded=True), allow_redirects=False, **more)
            )
        self._answers.append(answer)
        return answer

    async def post(
        self, session: str, text: str = "hello", *, headers: Mapping[str, str] | None = None, **more: Any
    ) -> Answer:
        """Send as ``DefaultChatTransport`` does."""
        body = {"id": session, **send_body(text, **more)}
        return await self.request("POST", self.url, json=body, headers=headers)

    async def stream(self, session: str, after: str | None = None) -> Answer:
        """Resume as ``DefaultChatTransport`` does; its ids are encoded by the caller."""
        headers = {} if after is None else {"Last-Event-ID": after}
        return await self.request("GET", f"{self.url}/{session}/stream", headers=headers)

    async def stop(self, session: str) -> Any:
        """Call the stop URL; returns what it says."""
        answer = await self.request("POST", f"{self.url}/{session}/stop", json={})
        assert answer.status == 200
        return json.loads(await answer.end())


class SdkClient:
    """A page on the wire of ``WebSocketChatTransport``.

    Attributes:
        told: Every frame, in order.
    """

    def __init__(self, address: str, path: str = "/api/chat", **options: Any) -> None:
        self.told: list[dict[str, Any]] = []
        self.close_code: int | None = None
        self.pings = 0
        self._url = f"http://{address}{path}"
        self._options = options
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession()
        self.socket = await self._http.ws_connect(self._url, max_msg_size=0, autoping=False, **self._options)
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.socket.close()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        await self._http.close()

    async def say(self, **frame: Any) -> None:
        """Write a frame."""
        await self.socket.send_str(json.dumps(frame))

    async def send(self, request: str, session: str, text: str = "hello", **more: Any) -> None:
        """Send as the transport does."""
        frame = {"headers": {}, "body": {}, **send_body(text), **more}
        await self.say(type="send", requestId=request, id=session, **frame)

    async def resume(self, request: str, session: str, **more: Any) -> None:
        """Resume as the transport does."""
        await self.say(type="resume", requestId=request, id=session, headers={}, body={}, **more)

    async def abort(self, request: str) -> None:
        """What a Stop says, and an unmounted component."""
        await self.say(type="abort", requestId=request)

    def of(self, request: str) -> list[dict[str, Any]]:
        """The frames of one request."""
        return [frame for frame in self.told if frame.get("requestId") == request]

    def chunks(self, request: str) -> list[Any]:
        """The chunks of one request; they count from 0 (or go on after what it has) without gaps."""
        frames = [frame for frame in self.of(request) if frame["type"] == "chunk"]
        numbers = [frame["sequence"] for frame in frames]
        assert not numbers or numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        return [frame["chunk"] for frame in frames]

    def text(self, request: str) -> str:
        """What the text deltas add up to."""
        return "".join(c["delta"] for c in self.chunks(request) if c["type"] == "text-delta")

    async def has(self, request: str, count: int) -> None:
        """Wait until a request has that many chunks."""
        await self.wait(lambda: len(self.chunks(request)) >= count)

    async def ended(self, request: str) -> dict[str, Any]:
        """Wait for the last frame of a request; returns it."""
        await self.wait(lambda: any(f["type"] in {"end", "error", "no-active"} for f in self.of(request)))
        return self.of(request)[-1]

    async def wait(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds of what was told."""
        async with asyncio.timeout(WAIT_SECONDS), self._changed:
            await self._changed.wait_for(holds)

    async def closed(self) -> int | None:
        """Wait until the gateway closes the socket; returns the close code."""
        async with asyncio.timeout(WAIT_SECONDS):
            await self._reading
        return self.close_code

    def cut(self) -> None:
        """Lose the connection without a word."""
        connection = self.socket._response.connection
        assert connection is not None
        assert connection.transport is not None
        connection.transport.abort()

    async def _read(self) -> None:
        async for message in self.socket:
            async with self._changed:
                if message.type is aiohttp.WSMsgType.TEXT:
                    self.told.append(json.loads(message.data))
                elif message.type is aiohttp.WSMsgType.PING:
                    self.pings += 1
                    await self.socket.pong(message.data)
                self._changed.notify_all()
        self.close_code = self.socket.close_code
