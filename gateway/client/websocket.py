"""One WebSocket of aiohttp, with final ends told apart from others, and an end that does not wait."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import aiohttp

from gateway.client.errors import ClosedError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp.client_reqrep import ClientRequest
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace

SUBPROTOCOL = "session-gateway.v1"

MAX_FRAME_BYTES = 64 * 1024 * 1024
"""A gateway's frames hold about 256 KiB, or one record; that is as large as GATEWAY_MAX_EVENT at most."""

FINAL_CLOSE_CODES = frozenset({1002, 1007, *range(4500, 5000)})
FINAL_STATUSES = frozenset({*range(400, 500)} - {408, 425, 429})
"""Refusals of a handshake; these three say "later"."""


class WebSocket:
    """Opens one socket after the other.

    Args:
        url: Of the gateway's end.
        headers: For the handshake.
        close_seconds: For the gateway's answer to a close.
    """

    def __init__(self, url: str, *, headers: Mapping[str, str], close_seconds: float) -> None:
        self._url = url
        self._headers = headers
        self._close_seconds = close_seconds
        self._connector = _Connector(force_close=True)
        self._http = aiohttp.ClientSession(connector=self._connector, timeout=aiohttp.ClientTimeout())

    async def open(self) -> aiohttp.ClientWebSocketResponse:
        """Connect; the caller waits no longer than it likes.

        Raises:
            ClosedError: It was refused, and would be again.
            aiohttp.ClientError, OSError: It could not be made.
        """
        try:
            return await self._http.ws_connect(
                self._url,
                protocols=[SUBPROTOCOL],
                headers=self._headers,
                max_msg_size=MAX_FRAME_BYTES,
            )
        except aiohttp.WSServerHandshakeError as error:
            if error.status in FINAL_STATUSES:
                raise ClosedError(error.status, "the handshake was refused") from error
            raise

    def abort(self) -> None:
        """Drop the connection that was made last, at once."""
        self._connector.abort()

    async def leave(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Close a socket, in good order if its other end takes part."""
        try:
            async with asyncio.timeout(self._close_seconds):  # sooner than the library's own
                await socket.close()
        except TimeoutError:
            self.abort()

    async def close(self) -> None:
        """No more sockets."""
        await self._http.close()


class _Connector(aiohttp.TCPConnector):
    """Remembers the transport it made last: the library has no way to abort a WebSocket."""

    _last: asyncio.Transport | None = None

    async def connect(
        self,
        req: ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - the base class has it
    ) -> Connection:
        """See the base class."""
        connection = await super().connect(req, traces, timeout)
        self._last = connection.transport
        return connection

    def abort(self) -> None:
        if self._last is not None:
            self._last.abort()


async def receive(socket: aiohttp.ClientWebSocketResponse) -> str:
    """The next frame.

    Raises:
        ConnectionError: The connection is lost, or closed with a code that means: again.
        ClosedError: It was closed with one that does not.
        ProtocolError: What came is no text of ours.
    """
    message = await socket.receive()
    match message.type:
        case aiohttp.WSMsgType.TEXT:
            return str(message.data)
        case aiohttp.WSMsgType.CLOSE:
            why = message.extra or "without a reason"
            if message.data in FINAL_CLOSE_CODES:
                raise ClosedError(message.data, why)
            raise ConnectionError(f"the gateway closed the connection: {message.data} {why}")
        case aiohttp.WSMsgType.BINARY:
            raise ProtocolError("unable to read a binary frame; the gateway writes text")
        case aiohttp.WSMsgType.ERROR if isinstance(message.data, aiohttp.WebSocketError):
            raise ProtocolError(f"unable to read a frame of the gateway; {message.data}")
        case _:
            raise ConnectionError("the connection was lost")
