"""What both WebSocket wires share: one reader, one writer, one heartbeat, and bounds.

The reader takes frames and answers nothing itself. The writer alone writes: it asks the wire for what is due
(:meth:`SocketLoop.gather`), writes it, waits until the socket has taken it, and asks again. So a client that
does not read stops its own writer and nobody else's.

What one socket holds at most, however slow its client and however far behind: the records of one pull (a page
of the journal, ``journal.PAGE_BYTES`` at most and less where many catch up, or what the tail has, which all
share), one encoded piece of them (``PIECE_BYTES`` and a record), ``MAX_REPLY_BYTES`` of replies, and what the
transport buffers (64 KiB and a frame).
"""

from __future__ import annotations

import abc
import asyncio
from typing import TYPE_CHECKING

import structlog
from aiohttp import WSMsgType, web

from gateway.core.model import CloseCode
from gateway.edge.admission import Connection
from gateway.edge.pulse import Pulse

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from gateway.config import Config

log = structlog.get_logger(__name__)

MAX_COMMANDS = 32
"""Commands of one socket that may be under way at once; the next frame is read when one is done."""

MAX_REPLY_BYTES = 1024 * 1024
"""Replies that may wait to be written; above it no frame is read."""

MAX_BAD_FRAMES = 20
"""In a row; a client that sends nothing but nonsense is told so and closed."""

MISSED_PINGS = 2
FRAME_BYTES = 256 * 1024
"""About the most that a poll is answered with, and that one turn of a socket's writer takes up."""

CLOSE_SECONDS = 5.0

_TOO_BIG = 1009


class _Socket(web.WebSocketResponse):
    """Closes with our final codes where the library would close with its own."""

    async def close(self, *, code: int = 1000, message: bytes = b"", drain: bool = True) -> bool:
        """See the base class."""
        if code == _TOO_BIG:
            code, message = CloseCode.LIMIT, b"frame larger than GATEWAY_MAX_BODY"
        return await super().close(code=code, message=message, drain=drain)


class SocketLoop(Connection):
    """One WebSocket, served.

    Args:
        config: For the heartbeat and the bounds.
        request: The handshake.
        carrier: What it is called in the metrics.
        protocols: Subprotocols that may be agreed on.
    """

    def __init__(
        self, config: Config, request: web.Request, carrier: str, protocols: Sequence[str] = ()
    ) -> None:
        super().__init__(carrier)
        self.request = request
        self._socket = _Socket(
            protocols=protocols, max_msg_size=config.max_body_bytes, compress=False, autoping=False,
            timeout=CLOSE_SECONDS,
        )  # fmt: skip
        self.pulse = Pulse(config.heartbeat_seconds, self._drop)
        self._group = asyncio.TaskGroup()
        self._replies: list[bytes] = []
        self._reply_bytes = 0
        self._replies_taken = asyncio.Event()
        self._slots = asyncio.Semaphore(MAX_COMMANDS)
        self._bad_frames = 0
        self._pings_unanswered = 0
        self._going_away = False
        self._leaving_at: asyncio.TimerHandle | None = None
        self._has_left = False
        """Its client goes on elsewhere: what is due is not waited for."""
        self._under_way = 0
        self._finished = asyncio.Event()
        self._when_written: list[Callable[[], None]] = []

    # -- for the wire

    @abc.abstractmethod
    async def received(self, text: str) -> None:
        """Carry out a frame; quickly, or with :meth:`start`.

        Raises:
            Refusal: Never; a wire answers what it refuses.
        """

    @abc.abstractmethod
    async def gather(self) -> list[bytes]:
        """The frames that are due; :meth:`take_replies` at the last moment, so that replies come first."""

    @abc.abstractmethod
    def heartbeat(self) -> bytes | None:
        """What to write after a silence, beside a ping."""

    @abc.abstractmethod
    def closed(self) -> None:
        """The socket is gone: detach. Nothing ends by it."""

    def reply(self, frame: bytes) -> None:
        """Queue a frame."""
        self._replies.append(frame)
        self._reply_bytes += len(frame)
        self.pulse.wake()

    def when_written(self, callback: Callable[[], None]) -> None:
        """Call back once what was gathered is with the socket; never, if the socket is gone before."""
        self._when_written.append(callback)

    def take_replies(self) -> list[bytes]:
        """What is queued, once."""
        replies, self._replies, self._reply_bytes = self._replies, [], 0
        self._replies_taken.set()
        return replies

    async def start(self, work: Coroutine[object, object, None], name: str) -> None:
        """Carry out a command beside others; waits while too many are under way."""
        await self._slots.acquire()
        task = self._group.create_task(work, name=name)
        self._under_way += 1
        task.add_done_callback(self._carried_out)

    def _carried_out(self, _: asyncio.Task[None]) -> None:
        self._under_way -= 1
        self._slots.release()
        self.pulse.wake()

    def bad_frame(self) -> None:
        """A frame was no command."""
        self._bad_frames += 1

    def good_frame(self) -> None:
        """A frame was one."""
        self._bad_frames = 0

    # -- the loop

    async def run(self) -> web.WebSocketResponse:
        """Serve until the socket is gone."""
        await self._socket.prepare(self.request)
        try:
            async with self._group:
                writer = self._group.create_task(self._write(), name="socket-writer")
                code, why = await self._read()
                writer.cancel()
                if code is not None:
                    await asyncio.wait({writer})
                    await self._say_why()
                    await self._close(code, why)
        except* (ConnectionError, OSError):
            pass  # the peer is gone: a detach, and the expected end of a socket
        finally:
            if self._leaving_at is not None:
                self._leaving_at.cancel()
            self.pulse.close()
            self.closed()
            self._finished.set()
        return self._socket

    def leave_in(self, seconds: float) -> None:
        """Say goodbye then, whatever is due: its client continues elsewhere after its last cursor."""
        if self._leaving_at is None:
            self._leaving_at = asyncio.get_running_loop().call_later(seconds, self._go)

    def _go(self) -> None:
        self._going_away = self._has_left = True
        self._leaving_at = asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._drop)
        self.pulse.wake()

    async def close(self) -> None:
        """The node is stopping: write what is due, and say goodbye."""
        self._going_away = True
        self.pulse.wake()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._finished.wait()
        except TimeoutError:
            self._drop()

    async def _read(self) -> tuple[CloseCode | None, bytes]:
        while True:
            message = await self._socket.receive()
            match message.type:
                case WSMsgType.TEXT:
                    await self.received(message.data)
                    if self._bad_frames >= MAX_BAD_FRAMES:
                        return CloseCode.PROTOCOL, b"too many bad frames in a row"
                case WSMsgType.BINARY:
                    return CloseCode.PROTOCOL, b"binary frames are not spoken here"
                case WSMsgType.PING:
                    await self._socket.pong(message.data)
                case WSMsgType.PONG:
                    self._pings_unanswered = 0
                case _:
                    return None, b""
            while self._reply_bytes > MAX_REPLY_BYTES:
                self._replies_taken.clear()
                await self._replies_taken.wait()

    async def _write(self) -> None:
        while True:
            frames = await self.gather()
            if frames:
                await self._write_frames(frames)
            if self._going_away and not self._under_way and (self._has_left or not frames):
                await self._close(CloseCode.GOING_AWAY, b"the gateway is stopping; connect again")
                return
            if not frames and not await self.pulse.wait():
                if self._pings_unanswered >= MISSED_PINGS:
                    await self._close(CloseCode.HEARTBEAT_MISSED, b"no answer to a ping")
                    return
                self._pings_unanswered += 1
                sign = self.heartbeat()
                self.pulse.writing()
                await self._socket.ping()
                if sign is not None:
                    await self._socket.send_frame(sign, WSMsgType.TEXT)
                self.pulse.wrote()

    async def _write_frames(self, frames: list[bytes]) -> None:
        for frame in frames:
            self.pulse.writing()
            await self._socket.send_frame(frame, WSMsgType.TEXT)
            self.pulse.wrote()
        callbacks, self._when_written = self._when_written, []
        for callback in callbacks:
            callback()

    async def _say_why(self) -> None:
        """The errors that led to a close are told before it."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                for frame in self.take_replies():
                    await self._socket.send_frame(frame, WSMsgType.TEXT)
        except TimeoutError:
            self._drop()

    async def _close(self, code: CloseCode, why: bytes) -> None:
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._socket.close(code=code, message=why)
        except TimeoutError:
            self._drop()

    def _drop(self) -> None:
        """The peer takes nothing: end the connection at once (close code 4002 would not arrive)."""
        log.info("socket.dropped", reason="too-slow")
        if self.request.transport is not None:
            self.request.transport.abort()
