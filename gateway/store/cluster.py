"""A cluster's map: which server has which slot, as far as we know.

The map is read from any server that answers, when somebody says that it is wrong: a redirection, a lost
connection, a slot that nobody has. Between two readings there is a pause, longer each time, so that a cluster
that is failing over is not asked without end.
"""

from __future__ import annotations

import asyncio
import functools
import random
from typing import TYPE_CHECKING, Any, cast

import structlog
from redis.crc import key_slot
from redis.exceptions import RedisError

from gateway.address import Host, StoreAddress
from gateway.store import pools
from gateway.store.pause import Pause
from gateway.store.pipeline import abandon
from gateway.store.topology import Shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from redis.asyncio.connection import AbstractConnection

__all__ = ["SLOTS", "Cluster", "slot_of"]

log = structlog.get_logger(__name__)

SLOTS = 16_384

ASK_SECONDS = 0.5
"""For one server to tell its map; the next one is asked then."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.05, 0.5
"""Between two readings of the map."""

_Range = tuple[int, int, Host]
_UNKNOWN = frozenset(("", "?"))


@functools.lru_cache(maxsize=8192)
def slot_of(key: str) -> int:
    """Of its hash tag, if it has one; kept, for a turn's calls all have the same key."""
    return key_slot(key.encode())


class Cluster:
    """Which server has which slot.

    Args:
        address: With some of the servers, of which one must answer.

    Attributes:
        on_change: Called when a server came, went, or has other slots than before.
        problem: Why the map could not be read, the last time; empty if it could.
    """

    def __init__(self, address: StoreAddress) -> None:
        self.on_change: list[Callable[[], None]] = []
        self.problem = ""
        self._address = address
        self._owners: list[Shard | None] = [None] * SLOTS
        self._nodes: dict[Host, Shard] = {}
        self._others: set[Host] = set()  # replicas, who can tell the map too
        self._wanted = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to read the map; :meth:`close` ends it."""
        self._wanted.set()
        self._reading = asyncio.create_task(self._read_when_wanted(), name="store-map")

    async def close(self) -> None:
        """End reading."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading], timeout=ASK_SECONDS)

    def shards(self) -> Sequence[Shard]:
        """Those that have a slot; none before the map was read."""
        return tuple(self._nodes.values())

    def shard_of(self, key: str) -> Shard | None:
        """Who has the slot of a key, as far as is known."""
        return self._owners[slot_of(key)]

    def refresh_soon(self) -> None:
        """The map is wrong, or may be. Returns at once."""
        self._wanted.set()

    def shard_at(self, text: str, beside: str) -> Shard | None:
        """Whom a redirection names; ``None`` if it does not say.

        Args:
            text: ``host:port``; without a host it is a port of who redirected.
            beside: The name of that shard.
        """
        host, _, port = text.rpartition(":")
        host = host.strip("[]") or beside.rpartition(":")[0]
        if host in _UNKNOWN or not port.isdigit():
            return None
        return self._node(Host(host, int(port)))

    def moved(self, slot: int, shard: Shard) -> None:
        """A server says that a slot is another's; the rest of the map may be wrong as well."""
        self.refresh_soon()
        if self._owners[slot] != shard:
            self._owners[slot] = shard
            self._nodes.setdefault(
                _host_of(shard), shard
            )  # one that lost its last slot goes with the reading
            self._tell()

    async def _read_when_wanted(self) -> None:
        pause = Pause(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
        while True:
            await self._wanted.wait()
            await pause.take()
            self._wanted.clear()
            if not await self._read():
                self._wanted.set()

    async def _read(self) -> bool:
        """Ask one server after the other, in any order, until one tells; whether one did."""
        hosts = list({*self._nodes, *self._others, *self._address.hosts})
        random.shuffle(hosts)
        for host in hosts:
            try:
                async with asyncio.timeout(ASK_SECONDS):
                    told = await _ask_for_slots(self._node(host))
                ranges = list(_parsed(told, host))
            except (RedisError, OSError) as error:  # TimeoutError is an OSError
                self.problem = f"{host.host}:{host.port}: {str(error) or type(error).__name__}"
                continue
            except Exception as error:  # noqa: BLE001 - whatever it said: the next one may tell a map
                self.problem = f"{host.host}:{host.port}: what it tells is no map: {error!r}"
                continue
            if ranges:
                self.problem = ""
                self._wanted.clear()  # whoever asked while we did has the answer
                self._take(ranges)
                self._others = set(_replicas(told, host))
                return True
            self.problem = f"{host.host}:{host.port}: no slot is anybody's"
        log.warning("store.map_unread", error=self.problem, servers=len(hosts))
        return False

    def _take(self, ranges: Sequence[_Range]) -> None:
        owners: list[Shard | None] = [None] * SLOTS
        nodes: dict[Host, Shard] = {}
        for first, last, host in ranges:
            shard = nodes[host] = self._node(host)
            owners[first : last + 1] = [shard] * (last + 1 - first)
        has_changed = owners != self._owners
        self._owners, self._nodes = owners, nodes
        if has_changed:
            log.info("store.map_changed", servers=sorted(shard.name for shard in nodes.values()))
            self._tell()

    def _tell(self) -> None:
        for callback in self.on_change:
            callback()

    def _node(self, host: Host) -> Shard:
        known = self._nodes.get(host)
        return known or Shard(f"{host.host}:{host.port}", pools.server_pool(self._address, host))


def _host_of(shard: Shard) -> Host:
    host, _, port = shard.name.rpartition(":")
    return Host(host, int(port))


async def _ask_for_slots(shard: Shard) -> Any:
    connection = cast("AbstractConnection", shard.pool.make_connection())
    try:
        await connection.connect()  # type: ignore[no-untyped-call]
        await connection.send_command("CLUSTER", "SLOTS")
        return await connection.read_response()
    finally:
        abandon(connection)


def _parsed(told: Any, asked: Host) -> Iterator[_Range]:
    """``CLUSTER SLOTS``: lists of first slot, last slot, the primary, its replicas.

    Raises:
        Exception: It is something else.
    """
    for entry in told:
        first, last = int(entry[0]), int(entry[1])
        if not 0 <= first <= last < SLOTS:
            raise ValueError("a slot that is none")
        host = _host(entry[2], asked)
        if host is not None:
            yield first, last, host


def _replicas(told: Any, asked: Host) -> Iterator[Host]:
    for entry in told:
        for node in entry[3:]:
            host = _host(node, asked)
            if host is not None:
                yield host


def _host(node: Any, asked: Host) -> Host | None:
    """A server that does not know its own address leaves it out: it is where we asked."""
    name = node[0].decode() if isinstance(node[0], bytes) else node[0]
    if name == "?":
        return None
    return Host(name or asked.host, int(node[1]))
