"""Clients of the session protocol on each of its carriers, told apart by nothing but how they ask."""

from __future__ import annotations

import asyncio
import itertools
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import msgspec

from tests.support.client import RECORDS, SessionClient, send_body
from tests.support.wires import Answer, HttpChat, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

CARRIERS = ("websocket", "sse", "long-poll")

_raw_answer = msgspec.json.Decoder(dict[str, msgspec.Raw])
_raw_records = msgspec.json.Decoder(list[msgspec.Raw])


def lines_of_socket(client: SessionClient) -> list[str]:
    """The records of a socket, byte for byte."""
    lines = [line for frame in client.frames for line in frame.split("\n")]
    return [line for line in lines if json.loads(line)["type"] in RECORDS]


def lines_of_stream(answer: Answer) -> list[str]:
    """The records of an event stream, byte for byte; the ids are their cursors."""
    events = [event for event in answer.events if not event.event]
    assert [event.id for event in events] == [event.json["cursor"] for event in events]
    return [event.data for event in events]


def lines_of_poll(raw: bytes) -> list[str]:
    """The records of a poll's answer, byte for byte."""
    return [bytes(record).decode() for record in _raw_records.decode(_raw_answer.decode(raw)["records"])]


class FallbackClient(HttpChat):
    """A client that has no WebSocket."""

    def __init__(self, address: str, *, client: str | None = None) -> None:
        super().__init__(address)
        self._client = {} if client is None else {"client": client}
        self._ids = itertools.count(1)

    def events_url(self, session: str, query: Mapping[str, str] | None = None) -> str:
        """Where a session's records are."""
        asked = urlencode({**self._client, **(query or {})})
        return f"{self.base}/gateway/v1/sessions/{quote(session, safe='')}/events?{asked}"

    async def events(
        self,
        session: str,
        query: Mapping[str, str] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Ask for an event stream."""
        accept = {"Accept": "text/event-stream", **(headers or {})}
        return await self.request("GET", self.events_url(session, query), headers=accept)

    async def asked(self, session: str, query: Mapping[str, str] | None = None) -> Answer:
        """Poll; returns whatever is answered."""
        headers = {"Accept": "application/json"}
        return await self.request("GET", self.events_url(session, query), headers=headers)

    async def poll(self, session: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Poll; returns the answer."""
        answer = await self.asked(session, query)
        body: dict[str, Any] = json.loads(await answer.end())
        assert answer.status == 200, body
        return body

    async def command(self, **command: Any) -> Answer:
        """Post a command."""
        command.setdefault("id", next(self._ids))
        url = f"{self.base}/gateway/v1/commands?{urlencode(self._client)}"
        answer = await self.request("POST", url, json=command)
        await answer.end()
        return answer

    async def ask(self, **command: Any) -> dict[str, Any]:
        """Post a command; returns its reply."""
        reply: dict[str, Any] = json.loads((await self.command(**command)).raw)
        return reply

    async def send(self, session: str, turn: str, text: str = "hello", **more: Any) -> dict[str, Any]:
        """Send; returns the reply."""
        return await self.ask(type="send", session=session, turn=turn, body=send_body(text), **more)


class Follower:
    """Follows a session on one carrier from one place, keeping what it was told.

    Attributes:
        attached: The first that it was told: `attached`, or what stands for it in a poll's answer.
        lines: The records since, byte for byte.
    """

    def __init__(self, address: str, session: str, where: dict[str, str]) -> None:
        self.attached: dict[str, Any] = {}
        self.lines: list[str] = []
        self._address = address
        self._session = session
        self._where = where
        self._ready = asyncio.Event()
        self._done = asyncio.Event()

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records, decoded."""
        return [json.loads(line) for line in self.lines]

    @property
    def offsets(self) -> list[int]:
        """Their offsets."""
        return [record["offset"] for record in self.records]

    async def has(self, count: int) -> None:
        """Wait until that many records have come, or the last that came is an end."""

        def enough() -> bool:
            return len(self.lines) >= count or bool(self.lines and '"type":"turn-end"' in self.lines[-1][:30])

        await eventually(enough)

    @asynccontextmanager
    async def follow(self, carrier: str) -> AsyncIterator[None]:
        """Attach, and be cut off at the end."""
        by = {"websocket": self._by_socket, "sse": self._by_stream, "long-poll": self._by_poll}[carrier]
        task = asyncio.create_task(by())
        try:
            await eventually(lambda: self._ready.is_set() or task.done())
            if task.done():
                task.result()
            yield
        finally:
            self._done.set()
            await task

    async def _by_socket(self) -> None:
        async with SessionClient(self._address) as client:
            self.attached = await client.ask(type="attach", session=self._session, **self._where)
            self._ready.set()
            while not self._done.is_set():
                self.lines = lines_of_socket(client)
                await asyncio.sleep(0.002)
            client.cut()

    async def _by_stream(self) -> None:
        async with FallbackClient(self._address) as client:
            answer = await client.events(self._session, self._where)
            first = (await answer.has(1))[0]
            assert first.event == "attached"
            assert first.id == first.json["cursor"]
            self.attached = first.json
            self._ready.set()
            while not self._done.is_set():
                self.lines = lines_of_stream(answer)
                await asyncio.sleep(0.002)

    async def _by_poll(self) -> None:
        async with FallbackClient(self._address) as client:
            over = asyncio.create_task(self._done.wait())
            query = self._where
            while not self._done.is_set():
                polling = asyncio.create_task(self._poll(client, query))
                await asyncio.wait({over, polling}, return_when=asyncio.FIRST_COMPLETED)
                if not polling.done():  # it waits at the gateway; leave
                    polling.cancel()
                    await asyncio.gather(polling, return_exceptions=True)
                    break
                query = {"after": polling.result(), "wait": "30"}
            over.cancel()

    async def _poll(self, client: FallbackClient, query: dict[str, str]) -> str:
        answer = await client.asked(self._session, query)
        raw = await answer.end()
        body = json.loads(raw)
        assert answer.status == 200, body
        assert body["offset"] <= body["last"]
        lines = lines_of_poll(raw)
        if lines:
            assert json.loads(lines[-1])["cursor"] == body["cursor"]
        self.lines += lines
        self.attached = self.attached or body
        self._ready.set()
        cursor: str = body["cursor"]
        return cursor


@asynccontextmanager
async def following(carrier: str, address: str, session: str, **where: str) -> AsyncIterator[Follower]:
    """Attach by a carrier, after a cursor (``after=``) or from a start (``from=``); cut at the end."""
    follower = Follower(address, session, where)
    async with follower.follow(carrier):
        yield follower
