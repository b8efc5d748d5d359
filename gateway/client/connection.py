"""One connection at a time, made again for as long as somebody waits for something.

Rule 1: a lost connection is never an error by itself; the next one is tried after a random part of a
growing delay, so that a thousand clients of the same node do not come back in the same moment.
Rule 2: close codes 4500-4999 are final, and so is a handshake that was refused as this client's fault.
Rule 3: a gateway that is silent for two heartbeats is gone, whatever the operating system believes.
Rule 4: a node that stops is left when it says (``goaway``), and at once when it refuses something because of
that (``draining``): another one takes it. Where there is none, one is looked for now and then only.
"""

from __future__ import annotations

import abc
import asyncio
import json
import logging
import math
from collections import deque
from typing import TYPE_CHECKING, Any

import aiohttp

from gateway.client.errors import GatewayClientError, ProtocolError
from gateway.client.websocket import WebSocket, receive

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gateway.client.timing import Timing

log = logging.getLogger(__name__)

PROTOCOL = 1


class Owner(abc.ABC):
    """Whose connection it is."""

    @abc.abstractmethod
    def is_waiting(self) -> bool:
        """Whether a command is unanswered; without one, a lost connection is not made again."""

    @abc.abstractmethod
    def opened(self) -> Iterable[str]:
        """The gateway has said hello; returns what to write first."""

    @abc.abstractmethod
    def received(self, line: dict[str, Any], size: int) -> None:
        """The gateway has said something else, in so many characters."""

    @abc.abstractmethod
    def lost(self) -> None:
        """Nobody is attached any more."""

    @abc.abstractmethod
    def failed(self, error: GatewayClientError) -> None:
        """There will be no connection until it is started once more."""


class Connection:
    """Keeps a socket open, and reads and writes it.

    Args:
        url: Of the gateway's end.
        headers: For the handshake.
        timing: How patient.
        owner: Who is told.

    Attributes:
        failure: Why the last socket, or the last attempt to make one, ended.
    """

    def __init__(self, url: str, *, headers: Mapping[str, str], timing: Timing, owner: Owner) -> None:
        self.failure: Exception | None = None
        self._url = url
        self._headers = headers
        self._timing = timing
        self._owner = owner
        self._attempt = 0
        self._patience = timing.open_seconds
        self._leave_at: float | None = None
        self._stay_until = -math.inf
        self._outbox: deque[str] | None = None
        self._filled = asyncio.Event()
        self._socket: WebSocket | None = None
        self._running: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Be ready to connect."""
        self._socket = WebSocket(self._url, headers=self._headers, close_seconds=self._timing.close_seconds)

    async def close(self) -> None:
        """Say goodbye, and end what runs."""
        socket, self._socket = self._socket, None
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})
        if socket is not None:
            await socket.close()

    def start(self) -> None:
        """Connect, if that is not what it does already."""
        if self._socket is None:
            raise RuntimeError("unable to use a GatewayClient that is not open; enter it by `async with`")
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run(self._socket), name="gateway-client")
            self._running.add_done_callback(self._ended)

    @property
    def is_leaving(self) -> bool:
        """Whether the next connection is about to be made: what is asked now is written there."""
        return self._leave_at is not None and self._leave_at <= asyncio.get_running_loop().time()

    def write(self, frame: str) -> None:
        """Queue a frame for the connection there is; without one it is not written."""
        if self._outbox is not None:
            self._outbox.append(frame)
            self._filled.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, GatewayClientError):
            log.error("the client failed", exc_info=error)
            error = ProtocolError(f"unable to go on; {error!r}")
        self._owner.failed(error)

    async def _run(self, socket: WebSocket) -> None:
        while self._owner.is_waiting():
            try:
                async with asyncio.timeout(self._timing.open_seconds):
                    opened = await socket.open()
                await self._serve(socket, opened)
            except (aiohttp.ClientError, OSError) as error:  # TimeoutError is one of the latter
                self.failure = error
                log.info("the connection to the gateway ended: %r", error)
            finally:
                self._owner.lost()
            # Another node may be asked at once, but not one after the other that says nothing but goaway.
            is_asked_to = self.is_leaving and self._attempt == 0
            self._leave_at = None
            await asyncio.sleep(0 if is_asked_to else self._timing.backoff(self._attempt))
            self._attempt += 1

    async def _serve(self, socket: WebSocket, opened: aiohttp.ClientWebSocketResponse) -> None:
        writing = asyncio.create_task(self._write(opened), name="gateway-client-writer")
        try:
            await self._read(opened)
        except Exception:
            socket.abort()  # nobody is there to say goodbye to
            raise
        finally:
            self._outbox = None
            writing.cancel()
            [failure] = await asyncio.gather(writing, return_exceptions=True)
            await socket.leave(opened)
            if isinstance(failure, Exception):
                raise failure

    async def _write(self, opened: aiohttp.ClientWebSocketResponse) -> None:
        try:
            while True:
                self._filled.clear()
                while self._outbox:
                    await opened.send_str(self._outbox.popleft())
                await self._filled.wait()
        except (aiohttp.ClientError, OSError) as error:
            self.failure = error  # who reads is told as well, and knows more

    async def _read(self, opened: aiohttp.ClientWebSocketResponse) -> None:
        """Read until the connection is to be left.

        Raises:
            ConnectionError, TimeoutError: It is lost.
            ClosedError, ProtocolError: For good.
        """
        loop = asyncio.get_running_loop()
        self._patience, self._leave_at = self._timing.open_seconds, None
        try:
            async with asyncio.timeout(self._patience) as silence:
                while True:
                    for line in (await receive(opened)).split("\n"):
                        self._take(line)
                        if self.is_leaving:
                            return  # what this one may still say is had again from the next
                    silence.reschedule(self._next_look(loop.time()))
        except TimeoutError:
            if self._next_look(loop.time()) > loop.time():
                raise TimeoutError(f"nothing was heard for {self._patience} s") from None

    def _next_look(self, now: float) -> float:
        """When to leave, or to call it lost, if nothing more is heard."""
        patient_until = now + self._patience
        return patient_until if self._leave_at is None else min(patient_until, self._leave_at)

    def _take(self, text: str) -> None:
        try:
            line = json.loads(text)
            kind = line["type"]
        except (ValueError, TypeError, KeyError) as error:
            raise ProtocolError(f"unable to read what the gateway said; {error!r}") from error
        if self._outbox is None:
            self._begin(line)
        elif kind == "goaway":
            self._leave_at = asyncio.get_running_loop().time() + line["after"] / 1000
        elif kind != "heartbeat":
            if (kind, line.get("code")) == ("error", "draining"):
                self._look_elsewhere()
            self._attempt = 0  # not by a hello alone: a node may say that and die, again and again
            self._owner.received(line, len(text))

    def _look_elsewhere(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._stay_until:
            self._stay_until = now + self._timing.backoff_max_seconds
            self._leave_at = now

    def _begin(self, hello: dict[str, Any]) -> None:
        if (hello["type"], hello.get("protocol")) != ("hello", PROTOCOL):
            raise ProtocolError(f"unable to speak to this gateway; it said {hello!s:.200}")
        self._patience = 2 * hello["heartbeat"]
        self._outbox = deque(self._owner.opened())
        self._filled.set()
