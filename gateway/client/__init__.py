"""A client of the session protocol for services, written from docs/protocol.md alone; needs only aiohttp.

::

    async with GatewayClient("http://127.0.0.1:8080", client="reporter") as gateway:
        turn = await gateway.send("session-1", {"messages": [message], "trigger": "submit-message"})
        async for chunk in gateway.answer(turn):
            print(chunk.data)

        async with gateway.attach("session-1", after=cursor) as records:
            async for record in records:
                cursor = record.cursor
"""

from __future__ import annotations

from gateway.client.client import GatewayClient, Turn
from gateway.client.errors import (
    ClosedError,
    DetachedError,
    GatewayClientError,
    GaveUpError,
    ProtocolError,
    RefusedError,
    ResyncError,
    TurnEndedError,
)
from gateway.client.records import Record, Records
from gateway.client.timing import Timing

__all__ = [
    "ClosedError",
    "DetachedError",
    "GatewayClient",
    "GatewayClientError",
    "GaveUpError",
    "ProtocolError",
    "Record",
    "Records",
    "RefusedError",
    "ResyncError",
    "Timing",
    "Turn",
    "TurnEndedError",
]
