"""Thousands of clients in a process of their own, told by lines of JSON on stdin what to do.

They yield to whoever else is on their core: of a real crowd, none would be there.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import random
import sys
import uuid
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import uvloop

from bench.answers import BenchError
from bench.clients import SECONDS, send_command
from bench.frames import FrameClient, RefusedError
from bench.member import Filler, LostError, Member, RetryError
from bench.starting import allow_descriptors
from bench.streaming import gather

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

DESCRIPTORS = 16_000
FILLED_TOGETHER = 10
"""Turns without a pause: more of them would only have the store's queue as a whole wait."""

_NICE = 5
_BACKOFF_BASE_SECONDS = 0.5
_BACKOFF_MAX_SECONDS = 10.0
"""Both as the clients that we ship have them."""

Place = tuple[str, str | None]
"""A session, and a cursor of it, or ``None``: its beginning."""


class Crowd:
    """All of them."""

    def __init__(self) -> None:
        self._filled: list[Place] = []
        self._members: list[Member] = []
        self._places: list[Place] = []
        self._tally: Counter[str] = Counter()
        self._attached_at: list[int] = []
        self._caught_up_at: list[int] = []

    async def fill(self, *, port: int, sessions: int, chunks: int, back: int) -> dict[str, Any]:
        """Make sessions of one whole turn each; whoever comes to one is so many records back."""
        order = {"chunks": chunks, "rate": 0, "gated": False, "endless": False}
        self._filled = await gather([partial(_filled, port, order, back)] * sessions, FILLED_TOGETHER)
        return {}

    async def come(self, *, port: int, count: int, together: int) -> dict[str, Any]:
        """So many more connect and attach, of whom so many are under way at once."""
        self._begin()
        places = [self._place(index) for index in range(count)]
        slots = asyncio.Semaphore(together)
        self._members += await self._all(partial(self._connected, port, place, slots) for place in places)
        self._places += places
        return self._told()

    async def move(self, *, port: int, jitter: bool) -> dict[str, Any]:
        """All wait until their connection is lost, and come to another node from the place they came from."""
        self._begin()
        pairs = zip(self._members, self._places, strict=True)
        self._members = await self._all(
            partial(self._moved, member, port, place, jitter=jitter) for member, place in pairs
        )
        return self._told()

    async def leave(self) -> dict[str, Any]:
        """All are gone at once."""
        for member in self._members:
            member.close()
        self._members, self._places = [], []
        return {}

    def _begin(self) -> None:
        self._tally, self._attached_at, self._caught_up_at = Counter(), [], []

    def _told(self) -> dict[str, Any]:
        return {
            "attached_at": self._attached_at,
            "caught_up_at": self._caught_up_at,
            "refused": self._tally["refused"],
            "lost": self._tally["lost"],
            "records": self._tally["records"],
        }

    def _place(self, index: int) -> Place:
        return self._filled[index % len(self._filled)] if self._filled else (f"s-{uuid.uuid4()}", None)

    async def _all(self, work: Any) -> list[Member]:
        async with asyncio.timeout(SECONDS):
            return list(await asyncio.gather(*[one() for one in work]))

    async def _connected(self, port: int, place: Place, slots: asyncio.Semaphore) -> Member:
        async with slots:
            return await self._until_caught_up(port, place, jitter=True)

    async def _moved(self, member: Member, port: int, place: Place, *, jitter: bool) -> Member:
        await member.gone
        if jitter:
            await asyncio.sleep(random.uniform(0, _BACKOFF_BASE_SECONDS))
        return await self._until_caught_up(port, place, jitter=jitter)

    async def _until_caught_up(self, port: int, place: Place, *, jitter: bool) -> Member:
        for attempt in itertools.count(1):
            try:
                return await self._attempt(port, place)
            except (RefusedError, RetryError):
                self._tally["refused"] += 1
            except (LostError, OSError):
                self._tally["lost"] += 1
            longest = min(_BACKOFF_MAX_SECONDS, _BACKOFF_BASE_SECONDS * 2**attempt)
            await asyncio.sleep(random.uniform(0, longest) if jitter else longest)
        raise AssertionError

    async def _attempt(self, port: int, place: Place) -> Member:
        member: Member = await opened(port, partial(Member, *place))
        member.attach()
        self._caught_up_at.append(await member.caught_up)
        self._attached_at.append(member.attached_at)
        self._tally["records"] += member.records
        return member


async def opened(port: int, make: Callable[[], Any]) -> Any:
    """Connect, up to and with the handshake."""
    _, client = await asyncio.get_running_loop().create_connection(make, "127.0.0.1", port)
    assert isinstance(client, FrameClient)
    await client.opened
    return client


async def _filled(port: int, order: dict[str, Any], back: int) -> Place:
    client = await opened(port, Filler)
    session = f"s-{uuid.uuid4()}"
    client.say(send_command(session, order))
    async with asyncio.timeout(SECONDS):
        await client.ended
    cursors = client.cursors
    client.close()
    return session, cursors[-1 - min(back, len(cursors) - 1)]


async def _serve() -> None:
    crowd = Crowd()
    commands: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
        "fill": crowd.fill,
        "come": crowd.come,
        "move": crowd.move,
        "leave": crowd.leave,
    }
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        asked = json.loads(line)
        try:
            told = await commands[asked.pop("do")](**asked)
        except (BenchError, OSError, TimeoutError) as error:
            told = {"error": str(error) or type(error).__name__}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    allow_descriptors(DESCRIPTORS)
    os.nice(_NICE)
    gc.disable()
    uvloop.run(_serve())
