"""The clients' connections that last: how many a node may have, and how each of them comes to end.

A socket, an event stream, a waiting poll and a turn told over plain HTTP are one kind of thing here: let in,
counted for as long as it is open, and told when the node stops.
"""

from __future__ import annotations

import abc
import asyncio
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gateway import telemetry
from gateway.core.model import ErrorCode, Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

RETRY_SECONDS = (1.0, 5.0)
"""Where somebody who was refused for want of room draws from: what one client is refused, thousands are."""


class NoRoom(Refusal):
    """The node has as many connections as it may; told with 503: a load balancer may try another node."""

    def __init__(self, most: int) -> None:
        message = f"unable to take one more connection; {most} are open (GATEWAY_MAX_CONNECTIONS)"
        super().__init__(ErrorCode.RATE_LIMITED, message, retry_after_seconds=_soon())


class Connection(abc.ABC):
    """One client's connection.

    Args:
        carrier: One of ``telemetry.CARRIERS``.
    """

    def __init__(self, carrier: str) -> None:
        self.carrier = carrier

    @abc.abstractmethod
    def leave(self, seconds: float) -> None:
        """The node stops, and others live: end in so many seconds, or when no harm is done by it."""

    @abc.abstractmethod
    async def close(self) -> None:
        """The node stops now: write what is due, and end."""


class UntilItsEnd(Connection):
    """What nobody could go on with elsewhere: a turn told over plain HTTP."""

    def leave(self, seconds: float) -> None:
        """See the base class."""

    async def close(self) -> None:
        """See the base class; the server ends it."""


class OpenConnections:
    """Those of one node.

    Args:
        most: GATEWAY_MAX_CONNECTIONS.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: set[Connection] = set()
        self._emptied = asyncio.Event()
        self._are_leaving = False

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def hold(self, connection: Connection) -> Iterator[None]:
        """Count a connection for as long as it is open. Enter it before anything is promised to its client.

        Raises:
            Refusal: There is no room, or clients are being sent elsewhere.
        """
        refusal = self._refusal()
        if refusal is not None:
            telemetry.refused_connections.labels(reason=refusal.code).inc()
            raise refusal
        opened = telemetry.open_connections.labels(carrier=connection.carrier)
        self._open.add(connection)
        opened.inc()
        try:
            yield
        finally:
            opened.dec()
            self._open.discard(connection)
            if not self._open:
                self._emptied.set()

    def _refusal(self) -> Refusal | None:
        if self._are_leaving:
            message = "unable to connect here; this node is stopping, another takes it"
            return Refusal(ErrorCode.DRAINING, message, retry_after_seconds=_soon())
        return NoRoom(self._most) if len(self._open) >= self._most else None

    def leave(self, spread_seconds: float) -> int:
        """Let nobody in, and have each connection end at a random moment of its own; returns how many."""
        self._are_leaving = True
        for connection in list(self._open):
            connection.leave(random.uniform(0, spread_seconds))  # noqa: S311 - dice, no secret
        return len(self._open)

    async def gone(self) -> None:
        """Wait until none is open."""
        while self._open:
            self._emptied.clear()
            await self._emptied.wait()

    async def close(self) -> None:
        """The node is stopping: end all of them, at the same time."""
        await asyncio.gather(*(connection.close() for connection in self._open))


def _soon() -> float:
    return round(random.uniform(*RETRY_SECONDS), 1)  # noqa: S311 - dice, no secret
