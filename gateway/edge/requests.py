"""What endpoints read of a request: the session and the place that it names, its patience, its body."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING
from urllib.parse import unquote

from aiohttp import web

from gateway.core import wire
from gateway.core.model import Cursor, ErrorCode, Refusal, bad_request, session_id
from gateway.edge.commands import wanted_place
from gateway.sends import RETRY_AFTER_SECONDS

if TYPE_CHECKING:
    from gateway.config import Config
    from gateway.core.model import SessionId

EVENT_STREAM = "text/event-stream"

MAX_WAIT_SECONDS = 30
"""What a poll may ask to wait: half of what proxies allow a silent request."""

BODY_SECONDS = 60.0
"""How long a body may take; nginx's client_body_timeout is 60 s between two reads."""

_WAIT = re.compile(r"\d{1,2}(?:\.\d{1,6})?", re.ASCII)


def session_of(segment: str) -> SessionId:
    """The session that a segment of a path names, percent-encoded.

    Raises:
        Refusal: It names none that can be.
    """
    try:
        return session_id(unquote(segment, errors="strict"))
    except UnicodeDecodeError:
        raise bad_request("unable to use the session id; the path is no UTF-8") from None


def wants_stream(request: web.Request) -> bool:
    """Whether ``Accept`` names an event stream, and not as what is not wanted (RFC 9110, 12.4.2: ``q=0``)."""
    for asked in ",".join(request.headers.getall("Accept", ())).lower().split(","):
        kind, *parameters = (part.strip() for part in asked.split(";"))
        if kind == EVENT_STREAM:
            return not any(re.fullmatch(r"q=0(?:\.0{0,3})?", parameter) for parameter in parameters)
    return False


def place_asked(request: web.Request, last_event_id: str = "") -> Cursor | wire.AttachFrom:
    """Where a request wants to attach.

    Raises:
        Refusal: There is no such place.
    """
    if last_event_id:
        # An EventSource asks for the same URL again; what it has had since counts.
        return Cursor.parse(last_event_id)
    named = request.query.get("from")
    try:
        start = None if named is None else wire.AttachFrom(named)
    except ValueError:
        known = ", ".join(wire.AttachFrom)
        raise bad_request(f"unable to attach from {named!r:.60}; known are {known}") from None
    return wanted_place(request.query.get("after"), start)


def wait_asked(request: web.Request) -> float:
    """How many seconds a poll may wait for a record.

    Raises:
        Refusal: It asks for too many, or for something else.
    """
    asked = request.query.get("wait", "0")
    if not _WAIT.fullmatch(asked) or float(asked) > MAX_WAIT_SECONDS:
        raise bad_request(f"unable to wait for {asked!r:.60}; say seconds, from 0 to {MAX_WAIT_SECONDS}")
    return float(asked)


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
