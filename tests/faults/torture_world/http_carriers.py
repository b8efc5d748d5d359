"""The session protocol where no WebSocket passes: an event stream, and polls; raw."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiohttp

from tests.faults.torture_world.carriers import BROKEN, CONNECT_SECONDS, REPLY_SECONDS, Carried, place_of
from tests.faults.torture_world.recorder import decode
from tests.support.fallback import lines_of_poll

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.torture_world.history import Reading
    from tests.faults.torture_world.recorder import Recorder

POLL_SECONDS = 5


class EventStream(Carried):
    """An SSE response."""

    carrier = "sse"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._response: aiohttp.ClientResponse | None = None

    async def open(self, where: str) -> None:
        headers = {"Accept": "text/event-stream"}
        async with asyncio.timeout(CONNECT_SECONDS):
            response = await self._http.get(self._url(place_of(where)), headers=headers)
        if response.status != 200:
            response.close()
            raise aiohttp.ClientPayloadError(f"unable to follow; the gateway answered {response.status}")
        self._response = response
        self._task = asyncio.create_task(self._read(response, where), name=f"sse-{self._recorder.name}")

    async def close(self, *, drop: bool) -> None:
        await super().close(drop=drop)
        if self._response is not None:  # a task that is cancelled before it began closes nothing
            self._response.close()

    async def _read(self, response: aiohttp.ClientResponse, where: str) -> None:
        reading: Reading | None = None
        rest = b""
        try:
            async for piece in response.content.iter_any():
                *blocks, rest = (rest + piece).split(b"\n\n")
                for block in blocks:
                    reading = self._take(block.decode(), reading, where)
        except BROKEN:
            pass  # recorded below
        finally:
            response.close()
            self.ended.set()
            if reading is not None:
                self._recorder.end(reading, "lost")

    def _take(self, block: str, reading: Reading | None, where: str) -> Reading | None:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if "data" not in fields:
            return reading
        line = decode(fields["data"])
        match fields.get("event"):
            case "attached":
                return self._begin(line, where)
            case None if reading is not None:
                if fields["id"] != line["cursor"]:
                    self._recorder.stray(f"event {fields['id']} holds {fields['data']}")
                self._recorder.got(reading, fields["data"], line)
            case "resync" if reading is not None:
                self._recorder.resync(reading, line["reason"])
            case _:
                pass
        return reading


class Polls(Carried):
    """One poll after the other."""

    carrier = "long-poll"

    async def open(self, where: str) -> None:
        await self._poll(where, 0)
        self._task = asyncio.create_task(self._read(), name=f"polls-{self._recorder.name}")

    async def _read(self) -> None:
        try:
            while (cursor := self._recorder.cursors.get(self.session)) is not None:
                await self._poll(cursor, POLL_SECONDS)
        except BROKEN:
            pass  # the next visit polls again
        finally:
            self.ended.set()

    async def _poll(self, where: str, seconds: int) -> None:
        url = self._url({**place_of(where), "wait": str(seconds)})
        timeout = aiohttp.ClientTimeout(total=POLL_SECONDS + REPLY_SECONDS)
        async with self._http.get(url, headers={"Accept": "application/json"}, timeout=timeout) as response:
            raw = await response.read()
            if response.status != 200:
                raise aiohttp.ClientPayloadError(f"unable to poll; the gateway answered {response.status}")
        note_poll(self._begin, self._recorder, raw, where)


def note_poll(
    begin: Callable[[dict[str, Any], str], Reading], recorder: Recorder, raw: bytes, where: str
) -> Reading:
    """Write an answer down: where it began is the first record's offset less one."""
    told = decode(raw.decode())
    lines = lines_of_poll(raw)
    end = told["cursor"], told["offset"]
    if lines:
        told = {**told, "offset": told["records"][0]["offset"] - 1, "cursor": told["records"][0]["cursor"]}
    reading = begin(told, where)
    for line in lines:
        recorder.got(reading, line, decode(line))
    if lines and (decode(lines[-1])["cursor"], decode(lines[-1])["offset"]) != end:
        recorder.stray(f"a poll ends with {lines[-1][:300]} and says {end}")
    recorder.end(reading, "moved")
    return reading
