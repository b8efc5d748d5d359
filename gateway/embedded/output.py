"""What the server says, kept short and never waited for."""

from __future__ import annotations

import asyncio
import os
from collections import deque

import structlog

_LOG_END_SECONDS = 1.0
_LOG_LINES = 10
_LOG_LINE_BYTES = 1024

_logger = structlog.get_logger(__name__)


class ServerLog:
    """What the server says, through a pipe that never makes it wait: lines that do not fit are lost.

    Attributes:
        is_quiet: Warnings are logged as debug too; what a server says while it starts and ends is no news.
    """

    def __init__(self) -> None:
        self.is_quiet = True
        self._last: deque[str] = deque(maxlen=_LOG_LINES)
        self._task: asyncio.Task[None] | None = None
        self._transport: asyncio.ReadTransport | None = None

    async def open(self) -> int:
        """Start to read; return the end to write to, which the caller closes."""
        reading, writing = os.pipe()
        # Of the pipe's end, not of this descriptor: the server's writes do not block either.
        os.set_blocking(writing, False)
        reader = asyncio.StreamReader()
        self._transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb", buffering=0)
        )
        self._task = asyncio.create_task(self._read(reader), name="embedded-valkey-log")
        return writing

    async def close(self) -> None:
        """Read to the end, or for a moment where a fork of the server keeps it open."""
        if self._task is None or self._transport is None:
            return
        await asyncio.wait({self._task}, timeout=_LOG_END_SECONDS)
        self._task.cancel()
        self._transport.close()

    def text(self) -> str:
        """The last lines, or that there were none."""
        return " / ".join(self._last) or "nothing"

    async def _read(self, reader: asyncio.StreamReader) -> None:
        partial = b""
        while data := await reader.read(_LOG_LINE_BYTES):
            *lines, partial = (partial + data).split(b"\n")
            partial = partial[:_LOG_LINE_BYTES]
            for line in lines:
                self._hear(line[:_LOG_LINE_BYTES].decode(errors="replace").strip())

    def _hear(self, line: str) -> None:
        # "7974:M 20 Nov 2026 09:20:58.311 # WARNING ...": who, when, how grave, what.
        _, mark, said = line.partition(" # ")
        text = said or line.partition(" * ")[2] or line
        if text:
            self._last.append(text)
            (_logger.warning if mark and not self.is_quiet else _logger.debug)("valkey.said", text=text)
