"""How a node's clients come to leave it when it stops and others live.

Each connection goes at a moment of its own, spread over GATEWAY_GOAWAY_SPREAD, so that the other nodes do not
get a thousand clients at once; what would be lost by going (a turn told over plain HTTP or on the SDK's own
socket) goes on to its end. No turn ends by any of this: producers know no connection.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from gateway import telemetry

if TYPE_CHECKING:
    from gateway.config import Config
    from gateway.edge.admission import OpenConnections
    from gateway.edge.listener import Listener

log = structlog.get_logger(__name__)


class Departure:
    """Of all clients of one node.

    Args:
        config: For the spread, and for how long it may take.
        connections: Whose.
        listener: Where they would come in again.
    """

    def __init__(self, config: Config, connections: OpenConnections, listener: Listener) -> None:
        self._spread_seconds = config.goaway_spread_seconds
        self._drain_seconds = config.drain_seconds
        self._connections = connections
        self._listener = listener

    async def run(self, hurry: asyncio.Event) -> None:
        """Send everybody away; returns when nobody is left, and after GATEWAY_DRAIN.

        Args:
            hurry: Set when there is no time.
        """
        # Before anybody is told: who comes back must not come back here.
        await self._listener.stop()
        told = self._connections.leave(self._spread_seconds)
        telemetry.goaways.inc(told)
        log.info("node.departing", connections=told, seconds=self._spread_seconds)
        gone = asyncio.create_task(self._connections.gone(), name="connections-gone")
        hurried = asyncio.create_task(hurry.wait(), name="departure-hurried")
        await asyncio.wait({gone, hurried}, timeout=self._drain_seconds, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        hurried.cancel()
        log.info("node.departed", connections=len(self._connections))
