"""Where the servers of the store are, when there is one at a time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
from redis.exceptions import RedisError

from gateway.address import Host, Kind, StoreAddress
from gateway.store import pools

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.store.pipeline import Connector

__all__ = ["OneServer", "Shard"]

log = structlog.get_logger(__name__)

WATCH_SECONDS = 0.5
"""Between two questions to a sentinel, of one small command each."""


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One primary, and the part of the keys that it has; equal if the name is.

    Attributes:
        name: Stays the same as long as the same server has it; for logs as well.
        pool: Makes connections to it, for :meth:`gateway.store.pipeline.Pipeline.connect`. Behind Sentinel
            each goes to whoever is the primary then.
    """

    name: str
    pool: Connector

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shard) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


class OneServer:
    """One server that has every key: always the same one, or whoever the sentinels name.

    A primary that was replaced while it lives goes on taking writes, which are lost, until the sentinels come
    round to telling it (10 s and more): so they are asked all the time, not only when a connection is made.

    Args:
        address: Of it, or of its sentinels.

    Attributes:
        shard: The one; another after each change.
        on_change: Called when the sentinels name another primary than before.
    """

    def __init__(self, address: StoreAddress) -> None:
        self.on_change: list[Callable[[], None]] = []
        self._primaries = pools.PrimaryPool(address) if address.kind is Kind.SENTINEL else None
        self._pool: Connector = self._primaries or pools.server_pool(address)
        self._changes = 0
        self._watching: asyncio.Task[None] | None = None
        self.shard = Shard("store", self._pool)

    def start(self) -> None:
        """Begin to ask the sentinels, if there are any; :meth:`close` ends it."""
        if self._primaries is not None:
            self._watching = asyncio.create_task(self._watch(self._primaries), name="store-sentinels")

    async def close(self) -> None:
        """End asking."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching], timeout=WATCH_SECONDS)
        if self._primaries is not None:
            await self._primaries.aclose()

    def shards(self) -> Sequence[Shard]:
        """The one."""
        return (self.shard,)

    def shard_of(self, key: str) -> Shard:
        """The one."""
        del key
        return self.shard

    def refresh_soon(self) -> None:
        """Each new connection looks the primary up by itself."""

    async def _watch(self, primaries: pools.PrimaryPool) -> None:
        known: Host | None = None
        while True:
            try:
                async with asyncio.timeout(pools.CONNECT_SECONDS):
                    primary = await primaries.primary()
            except (RedisError, OSError) as error:  # whoever connects now is told the same, and louder
                log.debug("store.primary_unknown", error=str(error) or type(error).__name__)
            except Exception as error:  # noqa: BLE001 - whatever was said: the next answer may be one
                log.warning("store.primary_unknown", error=repr(error))
            else:
                if known not in {None, primary}:
                    self._change(primary)
                known = primary
            await asyncio.sleep(WATCH_SECONDS)

    def _change(self, primary: Host) -> None:
        log.info("store.primary_changed", server=f"{primary.host}:{primary.port}")
        self._changes += 1
        self.shard = Shard(f"store-{self._changes}", self._pool)
        for callback in self.on_change:
            callback()
