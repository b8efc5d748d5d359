"""What endpoints read of a request beside its headers: the session that its path names, and its body."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from urllib.parse import unquote

from aiohttp import web

from gateway.core.model import ErrorCode, Refusal, bad_request, session_id
from gateway.sends import RETRY_AFTER_SECONDS

if TYPE_CHECKING:
    from gateway.config import Config
    from gateway.core.model import SessionId

BODY_SECONDS = 60.0
"""How long a body may take; nginx's client_body_timeout is 60 s between two reads."""


def session_of(segment: str) -> SessionId:
    """The session that a segment of a path names, percent-encoded.

    Raises:
        Refusal: It names none that can be.
    """
    try:
        return session_id(unquote(segment, errors="strict"))
    except UnicodeDecodeError:
        raise bad_request("unable to use the session id; the path is no UTF-8") from None


class BodyReader:
    """Reads bodies whole, within the bounds of the settings.

    Args:
        config: For ``GATEWAY_MAX_BODY``, and ``GATEWAY_MAX_BUFFER`` for all that are being read.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._unread_bytes = 0
        """Of bodies that are being read, on all connections."""

    async def read(self, request: web.Request) -> bytes:
        """Read a body.

        Raises:
            Refusal: It is too large, or too many come at once.
            web.HTTPRequestTimeout: It came too slowly.
        """
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.content.iter_any():
                    pieces.append(piece)
                    size += len(piece)
                    self._unread_bytes += len(piece)
                    self._check_room(size)
        except TimeoutError:
            raise web.HTTPRequestTimeout(text="unable to read the body; it came too slowly\n") from None
        finally:
            self._unread_bytes -= size
        return b"".join(pieces)

    def _check_room(self, size: int) -> None:
        if size > self._config.max_body_bytes:
            message = (
                f"unable to read a body of more than {self._config.max_body_bytes} bytes (GATEWAY_MAX_BODY)"
            )
            raise Refusal(ErrorCode.TOO_LARGE, message)
        if self._unread_bytes > self._config.max_buffer_bytes:
            message = "unable to read the body; all that arrive now are more than GATEWAY_MAX_BUFFER"
            raise Refusal(ErrorCode.RATE_LIMITED, message, retry_after_seconds=RETRY_AFTER_SECONDS)
