"""A proxy that blocks as real ones do, and cuts when it is told to: the networks between client and gateway.

It understands just enough HTTP: the head of a request and the head of a response, since it makes of each
connection one that carries a single request. The bodies pass as they come.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter

READ_BYTES = 64 * 1024

HELD_BYTES = 1024 * 1024
"""Most that is held back of one stream; what is longer passes from there on, as nginx does it."""

_UPGRADE = re.compile(rb"\r\nupgrade: *websocket", re.IGNORECASE)
_CONNECTION = re.compile(rb"\r\nconnection:[^\r]*", re.IGNORECASE)
_STREAM = re.compile(rb"\r\ncontent-type: *text/event-stream", re.IGNORECASE)
_REFUSAL = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_RESET = struct.pack("ii", 1, 0)


class Block(StrEnum):
    """What does not pass."""

    NOTHING = "nothing"
    SWALLOWED = "WebSocket swallowed"
    REFUSED = "WebSocket refused (403)"
    HELD = "WebSocket swallowed, event streams held back"


class Proxy:
    """Stands before a server on this machine; use as an async context manager.

    Args:
        target: Port of that server.
        block: What does not pass.
    """

    def __init__(self, target: int, block: Block = Block.NOTHING) -> None:
        self._target = target
        self._block = block
        self._open: set[StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def port(self) -> int:
        """Where clients connect."""
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def cut(self) -> int:
        """Reset every connection, on both sides; returns when, by CLOCK_MONOTONIC."""
        now = time.monotonic_ns()
        for writer in self._open:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
        self._open.clear()
        return now

    def _accept(self, reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer), name="proxy-connection")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """One connection; whoever leaves or is cut ends it."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError), contextlib.closing(writer):
            self._open.add(writer)
            try:
                head = await reader.readuntil(b"\r\n\r\n")
                if not _UPGRADE.search(head):
                    head = _CONNECTION.sub(b"", head)[:-2] + b"Connection: close\r\n\r\n"
                elif self._block is Block.REFUSED:
                    writer.write(_REFUSAL)
                    return
                elif self._block is not Block.NOTHING:
                    await reader.read()  # until the client has had enough
                    return
                await self._pass(head, reader, writer)
            finally:
                self._open.discard(writer)

    async def _pass(self, head: bytes, reader: StreamReader, writer: StreamWriter) -> None:
        from_target, to_target = await asyncio.open_connection("127.0.0.1", self._target)
        self._open.add(to_target)
        try:
            to_target.write(head)
            ways = [
                asyncio.create_task(self._up(reader, to_target), name="proxy-up"),
                asyncio.create_task(self._down(from_target, writer), name="proxy-down"),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)  # a cut way has nothing to say
        finally:
            self._open.discard(to_target)
            to_target.close()

    async def _up(self, reader: StreamReader, writer: StreamWriter) -> None:
        while data := await reader.read(READ_BYTES):
            writer.write(data)
            await writer.drain()

    async def _down(self, reader: StreamReader, writer: StreamWriter) -> None:
        held = await reader.readuntil(b"\r\n\r\n")
        holds = self._block is Block.HELD and _STREAM.search(held)
        while holds and len(held) < HELD_BYTES and (data := await reader.read(READ_BYTES)):
            held += data
        writer.write(held)
        while data := await reader.read(READ_BYTES):
            writer.write(data)
            await writer.drain()
        await writer.drain()
