"""The session protocol on a WebSocket, raw."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import aiohttp

from tests.faults.torture_world.carriers import BROKEN, CONNECT_SECONDS, REPLY_SECONDS, Carried, place_of
from tests.faults.torture_world.recorder import decode

if TYPE_CHECKING:
    from tests.faults.torture_world.history import Ask, Reading

RECORDS = frozenset({"turn-start", "chunk", "turn-end"})


class Socket(Carried):
    """A WebSocket."""

    carrier = "websocket"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._ids = itertools.count(1)
        self._asked: dict[int, tuple[Ask, str, asyncio.Future[dict[str, Any] | None]]] = {}
        self._reading: Reading | None = None
        self._detached_by = 0

    async def open(self, where: str) -> None:
        url = f"http://{self._address}/gateway/v1/ws?{urlencode({'client': self._recorder.name})}"
        async with asyncio.timeout(CONNECT_SECONDS):
            self._socket = await self._http.ws_connect(url, max_msg_size=0)
        self._task = asyncio.create_task(self._read(self._socket), name=f"socket-{self._recorder.name}")
        reply = await self.attach(where)
        if reply is None or reply["type"] != "attached":
            raise aiohttp.ClientPayloadError(f"unable to attach; the gateway answered {reply}")

    async def attach(self, where: str) -> dict[str, Any] | None:
        """Attach, also again."""
        return await self.ask({"type": "attach", "session": self.session, **place_of(where)}, where)

    async def ask(self, command: dict[str, Any], where: str = "") -> dict[str, Any] | None:
        """Give a command; None: no reply came."""
        if self._socket is None or self.ended.is_set():
            return None
        identifier = next(self._ids)
        numbered = {**command, "id": identifier}
        ask = self._recorder.asked(
            numbered, connection=self._connection, carrier=self.carrier, node=self._node
        )
        future: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()
        self._asked[identifier] = ask, where, future
        try:
            await self._socket.send_str(json.dumps(numbered))
            async with asyncio.timeout(REPLY_SECONDS):
                return await future
        except BROKEN:
            return None

    async def close(self, *, drop: bool) -> None:
        if self._reading is not None:
            self._recorder.end(self._reading, "left")
        if self._socket is None:
            return
        if drop:
            connection = self._socket._response.connection
            if connection is not None and connection.transport is not None:
                connection.transport.abort()
            self._socket._response.close()
        else:
            with contextlib.suppress(*BROKEN):
                async with asyncio.timeout(2.0):
                    await self._socket.close()
        await super().close(drop=drop)

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        try:
            async for message in socket:
                if message.type is aiohttp.WSMsgType.TEXT:
                    for raw in message.data.split("\n"):
                        self._take(raw, decode(raw))
        finally:
            self.ended.set()
            if self._reading is not None:
                self._recorder.end(self._reading, "lost")
            for _, _, future in self._asked.values():
                if not future.done():
                    future.set_result(None)

    def _take(self, raw: str, line: dict[str, Any]) -> None:
        if line["type"] in RECORDS:
            if self._reading is None or line["session"] != self.session:
                self._recorder.stray(raw)
            else:
                self._recorder.got(self._reading, raw, line)
        elif "id" in line:
            self._take_reply(line)
        elif line["type"] == "resync":
            if self._reading is not None:
                self._recorder.resync(self._reading, line["reason"])
                self._reading = None
            self.told_to_go.set()
        elif line["type"] == "goaway":
            self.told_to_go.set()

    def _take_reply(self, reply: dict[str, Any]) -> None:
        identifier = reply["id"]
        ask, where, future = self._asked.pop(identifier)
        self._recorder.replied(ask, reply)
        match reply["type"]:
            case "attached":
                self._begin_anew(reply, where)
            case "ok" if ask.command["type"] == "detach":
                if self._reading is not None:
                    self._recorder.end(self._reading, "left")
                    self._reading = None
                self._detached_by = identifier
            case "accepted" if self._reading is None and identifier > self._detached_by:
                self._begin_anew({**reply, "offset": int(reply["cursor"].split(".")[1])}, "send")
            case _:
                pass
        if not future.done():
            future.set_result(reply)

    def _begin_anew(self, told: dict[str, Any], asked: str) -> None:
        if self._reading is not None:
            self._recorder.end(self._reading, "moved")
        self._reading = self._begin(told, asked)
