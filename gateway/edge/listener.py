"""One address that is listened on, and how that ends without cutting off whoever is being served."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from aiohttp import web

from gateway.core.model import GatewayError

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler, Middleware

    from gateway.config import ListenAddress

BACKLOG = 2048
"""Connections that may wait to be accepted; aiohttp's 128 is too few when a node's clients come at once."""

KEEPALIVE_SECONDS = 15.0
"""Also ends a connection whose request head does not come; aiohttp's default is an hour."""

MAX_HEADER_BYTES = 32 * 1024
"""One header or the request line; nginx allows 4 of 8 KiB, and cookies outgrow aiohttp's 8,190."""

SHUTDOWN_SECONDS = 5.0


class ListenError(GatewayError):
    """An address cannot be listened on."""


class Listener:
    """Serves an application at an address. Open it, close it.

    Args:
        app: Not frozen yet; a middleware of ours is put in front of its own.
    """

    def __init__(self, app: web.Application) -> None:
        self._busy: set[web.RequestHandler] = set()
        """Connections that a request of is being answered."""
        self._is_stopping = False
        app.middlewares.insert(0, self._counting())
        app.on_response_prepare.append(self._say_close)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,
            keepalive_timeout=KEEPALIVE_SECONDS,
            auto_decompress=False,
            max_field_size=MAX_HEADER_BYTES,
            max_line_size=MAX_HEADER_BYTES,
            shutdown_timeout=SHUTDOWN_SECONDS,
        )

    async def open(self, address: ListenAddress, setting: str) -> str:
        """Listen; returns ``host:port``.

        Args:
            address: Where.
            setting: What to change if that does not work.

        Raises:
            ListenError: It does not.
        """
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, address.host, address.port, backlog=BACKLOG).start()
        except OSError as error:
            why = os.strerror(error.errno).lower() if error.errno else str(error)
            raise ListenError(
                f"unable to listen on {address}; {why}; set {setting} to another address"
            ) from error
        host, port, *_ = self._runner.addresses[0]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def stop(self) -> None:
        """Take no new connection. Idle ones are closed now, the others after the request that they carry."""
        self._is_stopping = True
        for site in self._runner.sites:
            await site.stop()
        await asyncio.sleep(0)  # a request that has been read is being answered from here on
        server = self._runner.server
        for connection in [] if server is None else server.connections:
            # Not one that carries a request: aiohttp would not read on, neither a body nor a socket's frames.
            if connection not in self._busy:
                connection.force_close()

    async def close(self) -> None:
        """End everything."""
        await self._runner.cleanup()

    def _counting(self) -> Middleware:
        @web.middleware
        async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
            connection = request.protocol
            self._busy.add(connection)
            try:
                return await handler(request)
            finally:
                self._busy.discard(connection)
                if self._is_stopping:
                    connection.close()  # when this answer is written

        return count

    async def _say_close(self, request: web.Request, response: web.StreamResponse) -> None:
        """Whoever keeps connections (a load balancer) must not send the next request on this one."""
        del request
        if self._is_stopping and "Upgrade" not in response.headers:
            response.headers["Connection"] = "close"
            response.force_close()
