"""One connection through a network, and its two ways."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tests.support.network_controls import Frost
from tests.support.network_http import REFUSAL, Http, UpgradeBlockedError
from tests.support.network_sockets import READ_BYTES, close_socket, new_socket, resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.network import Network


@dataclass
class _Way:
    """One direction of a connection."""

    name: Literal["up", "down"]
    source: socket.socket
    sink: socket.socket
    look: Callable[[bytes], bytes]
    freed: Callable[[], bytes]


class Connection:
    """One connection of a client, and the one made for it.

    Attributes:
        frost: What it does; ``thaw`` ends it.
        cut_at: After how many more bytes to the client it is cut; ``None`` for never.
        cut_resets: How.
        swallowed: Whether its request was read and is never answered.
    """

    def __init__(self, network: Network, client: socket.socket, frost: Frost) -> None:
        self.frost = frost
        self.cut_at: int | None = None
        self.cut_resets = True
        self.swallowed = False
        self.lost = False
        self._network = network
        self._loop = asyncio.get_running_loop()
        self._client = client
        self._target = new_socket()
        self._waiting: set[asyncio.Future[None]] = set()
        self._carried_at = self._loop.time()
        self._idle_timer: asyncio.TimerHandle | None = None
        self.task = asyncio.create_task(self._run(), name="network-connection")

    def look_again(self) -> None:
        """A control was changed."""
        for waiting in self._waiting:
            resolve(waiting)
        self._watch_idle()

    def thaw(self) -> None:
        """Pass what has piled up; a connection of which something was lost cannot go on."""
        if self.frost is Frost.NONE:
            return
        self.frost = Frost.NONE
        self._carried_at = self._loop.time()
        if self.lost:
            self.cut(reset=True)
        else:
            self.look_again()

    def cut(self, *, reset: bool) -> None:
        """End it, as a fault."""
        if self.close(reset=reset):
            self._network.count(cuts=1)

    def close(self, *, reset: bool) -> bool:
        """End it at once, both sides of it; returns whether it was open."""
        if not self._network.forget(self):
            return False
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        for end in (self._client, self._target):
            self._close(end, reset=reset)
        self.task.cancel()
        return True

    async def _run(self) -> None:
        http = Http(self._network)
        up = _Way("up", self._client, self._target, http.up, http.freed_up)
        down = _Way("down", self._target, self._client, http.down, http.freed)
        try:
            self._watch_idle()
            await self._connect()
            async with asyncio.TaskGroup() as ways:
                self._downwards = ways.create_task(self._pump(down), name="network-down")
                ways.create_task(self._pump(up), name="network-up")
        except* OSError:  # a peer reset its side: the other one learns it
            self.close(reset=True)
        finally:
            self.close(reset=False)

    async def _connect(self) -> None:
        """Raises OSError, when nobody listens."""
        await self._thawed()
        host, _, port = self._network.target.rpartition(":")
        with contextlib.suppress(BlockingIOError):
            self._target.connect((host, int(port)))
        while True:
            await self._wait(self._target, writing=True)
            await self._thawed()
            if error := self._target.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, os.strerror(error))
            with contextlib.suppress(OSError):  # not yet: a control was changed
                self._target.getpeername()
                return

    async def _pump(self, way: _Way) -> None:
        ended = False
        while not ended:
            await self._write(way, way.freed())
            data = await self._read(way)
            if data is None:
                continue
            ended = not data
            try:
                passing = way.look(data)
            except UpgradeBlockedError:
                await self._block_upgrade()
                return
            await self._delay()
            await self._write(way, passing)
        await self._thawed()
        with contextlib.suppress(OSError):  # the sink may have gone by itself
            way.sink.shutdown(socket.SHUT_WR)

    async def _read(self, way: _Way) -> bytes | None:
        """What has come, ``b""`` at its end; ``None``: look again."""
        await self._wait(None if self.frost is Frost.HOLD else way.source)
        if self.frost is Frost.HOLD:
            return None
        try:
            data = way.source.recv(READ_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            if self.frost is Frost.NONE:
                raise
            self.lost, data = True, b""
        if self.frost is Frost.DISCARD and data:
            self.lost = True
            return None
        self._note(way, len(data))
        return data

    async def _write(self, way: _Way, data: bytes) -> None:
        while data:
            await self._thawed()
            piece = data[: self._network.split or len(data)]
            if way.name == "down" and self.cut_at is not None:
                piece = piece[: self.cut_at]
            try:
                sent = way.sink.send(piece)
            except BlockingIOError:
                await self._wait(way.sink, writing=True)
                continue
            data = data[sent:]
            if way.name == "down" and self.cut_at is not None:
                self.cut_at -= sent
                if not self.cut_at:
                    self.cut(reset=self.cut_resets)
                    return
            if self._network.split:
                await asyncio.sleep(0)  # whoever reads on this loop gets the pieces one by one

    async def _delay(self) -> None:
        came = self._loop.time()
        while (left := came + self._network.delay_seconds - self._loop.time()) > 0:
            await self._wait(None, seconds=left)

    async def _block_upgrade(self) -> None:
        self._downwards.cancel()
        await asyncio.wait({self._downwards})
        swallows = self._network.block_upgrades == "swallow"
        self._network.count(upgrades_blocked=1)
        self._close(self._target, reset=False)
        if not swallows:
            await self._write(_Way("up", self._client, self._client, bytes, bytes), REFUSAL)
            return
        self.swallowed = True
        while True:
            await self._wait(None if self.frost is Frost.HOLD else self._client)
            with contextlib.suppress(BlockingIOError):
                if self.frost is not Frost.HOLD and not self._client.recv(READ_BYTES):
                    return

    async def _thawed(self) -> None:
        while self.frost is not Frost.NONE:
            await self._wait(None)

    async def _wait(
        self, ready: socket.socket | None, *, writing: bool = False, seconds: float | None = None
    ) -> None:
        """Until the socket is ready, or that time has passed, or a control was changed."""
        if ready is not None and ready.fileno() < 0:
            raise ConnectionAbortedError
        waiting = self._loop.create_future()
        self._waiting.add(waiting)
        timer = None if seconds is None else self._loop.call_later(seconds, resolve, waiting)
        if ready is not None:
            watch = self._loop.add_writer if writing else self._loop.add_reader
            watch(ready.fileno(), resolve, waiting)
        try:
            await waiting
        finally:
            self._waiting.discard(waiting)
            if timer is not None:
                timer.cancel()
            if ready is not None and ready.fileno() >= 0:
                unwatch = self._loop.remove_writer if writing else self._loop.remove_reader
                unwatch(ready.fileno())

    def _note(self, way: _Way, count: int) -> None:
        self._carried_at = self._loop.time()
        if way.name == "up":
            self._network.count(bytes_up=count)
        else:
            self._network.count(bytes_down=count)

    def _watch_idle(self) -> None:
        """Cut it if it has been silent for too long; else look again when it would be."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._network.idle_seconds is None or self.frost is not Frost.NONE:
            return
        due = self._carried_at + self._network.idle_seconds
        if self._loop.time() < due:
            self._idle_timer = self._loop.call_at(due, self._watch_idle)
        elif self.close(reset=False):
            self._network.count(idle_cuts=1)

    def _close(self, end: socket.socket, *, reset: bool) -> None:
        if end.fileno() >= 0:
            self._loop.remove_reader(end.fileno())
            self._loop.remove_writer(end.fileno())
            close_socket(end, reset=reset)
