"""The session protocol, raw: what all carriers share. The checker trusts no client library.

Each connects to one node, follows one session, and writes down all that it is told.
"""

from __future__ import annotations

import abc
import asyncio
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import aiohttp

if TYPE_CHECKING:
    from tests.faults.torture_world.fleet import Slot
    from tests.faults.torture_world.history import Carrier, Reading
    from tests.faults.torture_world.recorder import Recorder

CONNECT_SECONDS = 5.0
REPLY_SECONDS = 15.0
"""Above what a cancel waits for its turn's end, and a node for its store."""

BROKEN = (aiohttp.ClientError, OSError, TimeoutError)
"""What a network that breaks looks like."""


class Carried(abc.ABC):
    """One connection of a client to a node.

    Attributes:
        carrier: Its kind.
        ended: Set when nothing will come any more: lost, or told to start anew.
        told_to_go: Set when the node said `goaway`, or `resync`.
        session: What it follows.
    """

    carrier: Carrier

    def __init__(
        self, http: aiohttp.ClientSession, slot: Slot, recorder: Recorder, session: str, connection: int
    ) -> None:
        self.ended = asyncio.Event()
        self.told_to_go = asyncio.Event()
        self._http = http
        self._slot = slot
        self._node = slot.label
        self._address = slot.network.address
        self._recorder = recorder
        self.session = session
        self._connection = connection
        self._task: asyncio.Task[None] | None = None

    @abc.abstractmethod
    async def open(self, where: str) -> None:
        """Connect and attach.

        Args:
            where: A cursor, or `start` or `running`.
        """

    async def close(self, *, drop: bool) -> None:
        """Leave; returns when nothing more is written down."""
        del drop  # an HTTP request that is left is a connection that ends, one way or the other
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def post(self, command: dict[str, Any], slot: Slot) -> dict[str, Any] | None:
        """Give a command by POST; None: no reply came."""
        ask = self._recorder.asked(command, connection=0, carrier=self.carrier, node=slot.label)
        url = (
            f"http://{slot.network.address}/gateway/v1/commands?{urlencode({'client': self._recorder.name})}"
        )
        timeout = aiohttp.ClientTimeout(total=REPLY_SECONDS)
        try:
            async with self._http.post(url, json={**command, "id": 1}, timeout=timeout) as response:
                reply: dict[str, Any] = json.loads(await response.read())
        except (*BROKEN, ValueError):  # a torn or plain body is no reply
            return None
        self._recorder.replied(ask, reply)
        return reply

    def _begin(self, told: dict[str, Any], asked: str) -> Reading:
        return self._recorder.begin(
            told, connection=self._connection, carrier=self.carrier, node=self._node,
            session=self.session, asked=asked,
        )  # fmt: skip

    def _url(self, query: dict[str, str]) -> str:
        named = urlencode({"client": self._recorder.name, **query})
        return f"http://{self._address}/gateway/v1/sessions/{self.session}/events?{named}"


def place_of(where: str) -> dict[str, str]:
    """How a place is asked for."""
    match where:
        case "start":
            return {}
        case "running":
            return {"from": "running"}
        case _:
            return {"after": where}
