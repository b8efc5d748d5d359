"""Which request under ``/gateway/`` is for whom."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from gateway.edge.clientmodule import ClientModule
    from gateway.edge.commandpost import CommandPost
    from gateway.edge.fallback import Fallback
    from gateway.edge.socket import SessionWire

PREFIX = "/gateway/"
SOCKET_PATH = "/gateway/v1/ws"
COMMANDS_PATH = "/gateway/v1/commands"
CLIENT_PATH = "/gateway/v1/client.js"

_EVENTS_PATH = re.compile(r"/gateway/v1/sessions/(?P<segment>[^/]+)/events")


class Endpoints:
    """The gateway's own.

    Args:
        socket: The session protocol on a WebSocket.
        fallback: Its records without one.
        commands: Its commands without one.
        client: The built client.
    """

    def __init__(
        self, *, socket: SessionWire, fallback: Fallback, commands: CommandPost, client: ClientModule
    ) -> None:
        self._socket = socket
        self._fallback = fallback
        self._commands = commands
        self._client = client

    async def handle(self, request: web.Request) -> web.StreamResponse | None:
        """Answer a request; ``None`` when it is for none of these."""
        raw_path, method = request.rel_url.raw_path, request.method
        if raw_path == SOCKET_PATH:
            return await self._socket.handle(request)
        if raw_path == COMMANDS_PATH:
            return await self._commands.handle(request) if method == "POST" else _only("POST")
        if raw_path == CLIENT_PATH:
            return self._client.handle(request) if method in {"GET", "HEAD"} else _only("GET, HEAD")
        events = _EVENTS_PATH.fullmatch(raw_path)
        if events is not None:
            segment = events["segment"]
            return await self._fallback.handle(request, segment) if method == "GET" else _only("GET")
        return None


def not_found() -> web.Response:
    """Nothing is here."""
    return web.Response(status=HTTPStatus.NOT_FOUND, text="unable to find this; no such endpoint\n")


def _only(methods: str) -> web.Response:
    text = f"unable to do this here; the methods are {methods}\n"
    return web.Response(status=HTTPStatus.METHOD_NOT_ALLOWED, text=text, headers={"Allow": methods})
