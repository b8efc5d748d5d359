"""WebSocket as a raw asyncio protocol, for what these servers write: unmasked, unfragmented frames."""

from __future__ import annotations

import abc
import asyncio
import json
import time
from typing import Any, cast

from bench.answers import BenchError

SESSION_PATH = "/gateway/v1/ws"

_HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{protocol}\r\n"
)

TEXT = 0x81
_CLOSE = 0x88
_PING = 0x89


class RefusedError(BenchError):
    """The handshake got another status than 101, or none."""

    def __init__(self, status: int) -> None:
        super().__init__(
            f"unable to measure; the handshake was refused ({status or 'the connection was lost'})"
        )
        self.status = status


class FrameClient(asyncio.Protocol, abc.ABC):
    """Opens a WebSocket, answers its pings, and hands on its frames.

    Args:
        path: Where to.
        is_session: The session protocol's, by its subprotocol.

    Attributes:
        opened: Resolves with the handshake, or fails with :class:`RefusedError`.
    """

    transport: asyncio.Transport

    def __init__(self, path: str, *, is_session: bool) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._path = path
        self._protocol = "Sec-WebSocket-Protocol: session-gateway.v1\r\n" if is_session else ""
        self._rest = b""

    @abc.abstractmethod
    def frame(self, payload: bytes, now: int) -> None:
        """A text frame came."""

    @abc.abstractmethod
    def lost(self, why: str) -> None:
        """The connection is gone, or is to be given up."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self.transport = cast("asyncio.Transport", transport)  # what uvloop gives is none by inheritance
        self.transport.write(_HANDSHAKE.format(path=self._path, protocol=self._protocol).encode())

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        if not self.opened.done():
            self._refuse(0)
        self.lost(f"the connection was lost ({exc or 'closed'})")

    def close(self) -> None:
        """Leave, whatever is under way."""
        self.transport.abort()

    def say(self, frame: dict[str, Any]) -> None:
        """Write a text frame. The mask is zero, so masking changes nothing."""
        payload = json.dumps(frame).encode()
        size = len(payload)
        length = bytes((0x80 | size,)) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
        self.transport.write(b"\x81" + length + b"\0\0\0\0" + payload)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        now = time.monotonic_ns()
        data = self._rest + data if self._rest else data
        if not self.opened.done():
            head, found, rest = data.partition(b"\r\n\r\n")
            if not found:
                self._rest = data
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self._refuse(int(head.split(b" ", 2)[1]))
                self.close()
                return
            self.opened.set_result(None)
            data = rest
        self._rest = self._unframe(data, now)

    def _refuse(self, status: int) -> None:
        self.opened.set_exception(RefusedError(status))
        self.opened.exception()  # whoever waits is told

    def _unframe(self, data: bytes, now: int) -> bytes:
        position, available = 0, len(data)
        while available - position >= 2:
            size, start = data[position + 1], position + 2
            if size >= 126:
                width = 2 if size == 126 else 8
                if available - start < width:
                    break
                size = int.from_bytes(data[start : start + width], "big")
                start += width
            if available - start < size:
                break
            self._any_frame(data[position], data[start : start + size], now)
            position = start + size
        return data[position:]

    def _any_frame(self, head: int, payload: bytes, now: int) -> None:
        if head == TEXT:
            self.frame(payload, now)
        elif head == _PING:
            self.transport.write(b"\x8a" + bytes((0x80 | len(payload),)) + b"\0\0\0\0" + payload)
        elif head == _CLOSE:
            self.lost(f"the gateway closed: {payload!r}")
        else:
            self.lost(f"a frame of kind {head:#x} came: {payload[:200]!r}")
