"""SessionClient: the session protocol on a real WebSocket, keeping everything it was told."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import TYPE_CHECKING, Any, Self

import aiohttp

if TYPE_CHECKING:
    from collections.abc import Callable

WAIT_SECONDS = 15.0

RECORDS = ("turn-start", "chunk", "turn-end")


def user_message(text: str, identifier: str = "u1") -> dict[str, Any]:
    """A message as ``useChat`` makes it."""
    return {"id": identifier, "role": "user", "parts": [{"type": "text", "text": text}]}


def send_body(text: str, **more: Any) -> dict[str, Any]:
    """A body as ``DefaultChatTransport`` posts it, without its session."""
    return {"messages": [user_message(text)], "trigger": "submit-message", **more}


class SessionClient:
    """One socket.

    Attributes:
        told: Every line, in order.
        records: Those that are records.
    """

    def __init__(self, address: str, *, client: str | None = None, heartbeat: bool = True) -> None:
        self.told: list[dict[str, Any]] = []
        self.frames: list[str] = []
        self.close_code: int | None = None
        self._url = f"http://{address}/gateway/v1/ws" + (f"?client={client}" if client else "")
        self._ids = itertools.count(1)
        self._changed = asyncio.Condition()
        self._autoping = heartbeat

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession()
        self.socket = await self._http.ws_connect(
            self._url, protocols=["session-gateway.v1"], max_msg_size=0, autoping=self._autoping
        )
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.socket.close()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        await self._http.close()

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records told, in order."""
        return [line for line in self.told if line["type"] in RECORDS]

    @property
    def offsets(self) -> list[int]:
        """Their offsets."""
        return [record["offset"] for record in self.records]

    @property
    def text(self) -> str:
        """What the text deltas add up to."""
        chunks = [record.get("data", {}) for record in self.records if record["type"] == "chunk"]
        return "".join(chunk["delta"] for chunk in chunks if chunk.get("type") == "text-delta")

    async def ask(self, **command: Any) -> dict[str, Any]:
        """Give a command; returns its reply."""
        identifier = command.setdefault("id", next(self._ids))
        await self.socket.send_str(json.dumps(command))
        return await self.wait(lambda line: line.get("id") == identifier)

    async def attach(self, session: str, after: str | None = None) -> dict[str, Any]:
        """Attach; returns the reply."""
        return await self.ask(type="attach", session=session, **({} if after is None else {"after": after}))

    async def send(self, session: str, turn: str, text: str = "hello", **more: Any) -> dict[str, Any]:
        """Send; returns the reply."""
        return await self.ask(type="send", session=session, turn=turn, body=send_body(text), **more)

    async def cancel(self, session: str, turn: str | None = None) -> dict[str, Any]:
        """Cancel; returns the reply."""
        return await self.ask(type="cancel", session=session, **({} if turn is None else {"turn": turn}))

    async def ended(self, turn: str) -> dict[str, Any]:
        """Wait for a turn's end."""
        return await self.wait(lambda line: line["type"] == "turn-end" and line["turn"] == turn)

    async def wait(self, found: Callable[[dict[str, Any]], bool], count: int = 1) -> dict[str, Any]:
        """Wait until that many lines are as wanted; returns the last of them."""

        def matching() -> list[dict[str, Any]]:
            return [line for line in self.told if found(line)]

        async with asyncio.timeout(WAIT_SECONDS), self._changed:
            await self._changed.wait_for(lambda: len(matching()) >= count)
        return matching()[count - 1]

    async def closed(self) -> int | None:
        """Wait until the gateway closes the socket; returns the close code."""
        async with asyncio.timeout(WAIT_SECONDS):
            await self._reading
        return self.close_code

    def cut(self) -> None:
        """Lose the connection without a word."""
        transport = self.socket.get_extra_info("socket")
        assert transport is not None
        connection = self.socket._response.connection
        assert connection is not None
        assert connection.transport is not None
        connection.transport.abort()

    async def _read(self) -> None:
        async for message in self.socket:
            if message.type is aiohttp.WSMsgType.TEXT:
                async with self._changed:
                    self.frames.append(message.data)
                    self.told += [json.loads(line) for line in message.data.split("\n")]
                    self._changed.notify_all()
        self.close_code = self.socket.close_code
