"""Redis or Valkey as the journal uses it: one server, behind Sentinel, or a cluster."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Self

from gateway.address import Kind, parse_address
from gateway.store.cluster import Cluster
from gateway.store.lane import Lane
from gateway.store.routes import Routes
from gateway.store.topology import OneServer, Shard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.store.scripts import Script


class Store:
    """Redis or Valkey, as the journal uses it.

    Args:
        url: As :mod:`gateway.address` reads it.
        scripts: All that will be called.

    Attributes:
        writes: The one ordered writer; to a cluster, one for each shard.
        reads: Its own connection, so that catching up does not stand in the way of appending.
        is_sharded: Whether calls for two sessions may be carried out in another order than they were asked.
        on_reconnect: Called when a connection for writing was made again, and was of use: the store may be
            another one now, or an older one. Not called for the first.
        on_topology: Called, some time later, when a shard came, went, or has other keys than before.
        contact: How often ``on_reconnect`` was called.

    Raises:
        ValueError: The URL is none of a store.
    """

    def __init__(self, url: str, scripts: Sequence[Script]) -> None:
        address = parse_address(url)
        self.contact = 0
        self.on_reconnect: list[Callable[[], None]] = []
        self.on_topology: list[Callable[[], None]] = []
        self.is_sharded = address.kind is Kind.CLUSTER
        self.writes: Lane | Routes
        self.reads: Lane | Routes
        self._servers: OneServer | Cluster
        self._unmet: set[str] | None = None  # of the shards that there were at first
        self._is_told_soon = False
        if self.is_sharded:
            self._servers = cluster = Cluster(address)
            self.writes = Routes(cluster, "writes", scripts)
            self.reads = Routes(cluster, "reads", scripts)
            self.writes.on_contact = self._met
        else:
            self._servers = one = OneServer(address)
            self.writes = Lane(one.shard.pool, "writes", scripts)
            self.reads = Lane(one.shard.pool, "reads", scripts)
            self.writes.on_contact = functools.partial(self._met, one.shard.name)
            self._unmet = {one.shard.name}
            one.on_change += (self.writes.renew, self.reads.renew)
        self._servers.on_change.append(self._change)

    async def __aenter__(self) -> Self:
        self._servers.start()
        self.writes.start()
        self.reads.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.writes.close()
        await self.reads.close()
        await self._servers.close()

    def shards(self) -> Sequence[Shard]:
        """All that are known; of a cluster none before its map was read."""
        return self._servers.shards()

    def shard_of(self, key: str) -> Shard | None:
        """Who has a key, as far as is known; of a cluster, nobody may be known to have it."""
        return self._servers.shard_of(key)

    def refresh_soon(self) -> None:
        """Something is not where it was: have the servers looked up again. Returns at once."""
        self._servers.refresh_soon()

    def _met(self, name: str) -> None:
        """A connection for writing is of use."""
        if self._unmet is not None and name in self._unmet:
            self._unmet.remove(name)
            return
        self.contact += 1
        # Who takes the writes now may not be who answers the reads.
        self.reads.renew(name)
        for callback in self.on_reconnect:
            callback()

    def _change(self) -> None:
        if self._unmet is None:
            self._unmet = {shard.name for shard in self.shards()}
        if not self._is_told_soon:  # a cluster that moves a thousand slots changes a thousand times
            self._is_told_soon = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._is_told_soon = False
        for callback in self.on_topology:
            callback()
