"""What aiohttp's server does not say or do about a client's connection.

It tells that a client is gone only to who writes, and it waits for ever for one that does not read.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiohttp import web

STALL_SECONDS = 60.0
"""A client that takes or gives nothing for this long is cut; nginx has 60 s, for either."""

_LOOK_SECONDS = 1.0
"""How often to look whether a client is still there; a write finds out by itself."""


@contextmanager
def ended_with_client(request: web.Request, scope: asyncio.Timeout) -> Iterator[None]:
    """Let ``scope`` time out when the client is gone, so that what waits for others ends.

    The server's ``handler_cancellation`` would do it for all handlers, and those that carry turns must not
    hear of a disconnect.
    """
    loop = asyncio.get_running_loop()
    handle: asyncio.TimerHandle

    def look() -> None:
        nonlocal handle
        if request.transport is None or request.transport.is_closing():
            scope.reschedule(loop.time())
        else:
            handle = loop.call_later(_LOOK_SECONDS, look)

    handle = loop.call_later(_LOOK_SECONDS, look)
    try:
        yield
    finally:
        handle.cancel()


@contextmanager
def cut_when_stalled(transport: asyncio.WriteTransport | None) -> Iterator[None]:
    """Round one write: abort the connection when its peer takes nothing for ``STALL_SECONDS``.

    Not by cancelling the write: aiohttp shares one future among all who wait for a connection to drain, so
    the next of them would be cancelled too.
    """
    if transport is None:
        yield
        return
    handle = asyncio.get_running_loop().call_later(STALL_SECONDS, transport.abort)
    try:
        yield
    finally:
        handle.cancel()
