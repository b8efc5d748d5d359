"""Ring: a doorbell that is listened to, and a hand on the bells of a server or a cluster."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import redis

from gateway import doorbell, telemetry
from gateway.core.model import NodeId
from gateway.doorbell import Doorbell
from gateway.keys import session_keys
from gateway.store import Store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gateway.core.model import SessionId

WAIT_SECONDS = 10.0


class Ring:
    """A doorbell that is listened to, and what it told."""

    def __init__(self, store: Store, url: str, *, probe_seconds: float) -> None:
        self.prefix = f"t{secrets.token_hex(4)}"
        self.store = store
        self.admin = redis.Redis.from_url(url, protocol=2)
        self._others = self._connections()
        self.told: list[tuple[str, ...]] = []
        self._changed = asyncio.Event()
        self.bell = Doorbell(store, prefix=self.prefix, node=NodeId("me"), probe_seconds=probe_seconds)
        self.bell.on_records = lambda session: self._tell("records", session)
        self.bell.on_turn = lambda session, turn: self._tell("turn", session, turn)
        self.bell.on_missed = lambda session: self._tell("missed", session)

    def _tell(self, *what: str) -> None:
        self.told.append(what)
        self._changed.set()

    async def until(self, *what: str, times: int = 1) -> None:
        """Wait until something was told that often since the last :meth:`forget`."""
        async with asyncio.timeout(WAIT_SECONDS):
            while self.told.count(what) < times:
                self._changed.clear()
                await self._changed.wait()

    def channel(self, session: SessionId) -> str:
        return session_keys(self.prefix, session).bell

    def command(self, *words: str | int) -> Any:
        """Ask the server something by another connection."""
        return self.admin.execute_command(*words)  # type: ignore[no-untyped-call]

    def ring(self, session: SessionId, payload: str) -> None:
        self.command("SPUBLISH", self.channel(session), payload)

    def subscribed(self) -> set[str]:
        """The channels of sessions; those of probes left out."""
        names = self.command("PUBSUB", "SHARDCHANNELS", f"{self.prefix}:*")
        return {name.decode() for name in names if b"probe-" not in name}

    def connections(self) -> list[str]:
        """Those for bells, made since the test began."""
        return [found for found in self._connections() if found not in self._others]

    def _connections(self) -> list[str]:
        return [client["id"] for client in self.admin.client_list(_type="pubsub")]


@asynccontextmanager
async def listening(url: str, admin_url: str = "", *, probe_seconds: float = 30.0) -> AsyncIterator[Ring]:
    async with Store(url, doorbell.SCRIPTS) as store:
        ring = Ring(store, admin_url or url, probe_seconds=probe_seconds)
        task = asyncio.create_task(ring.bell.run(), name="doorbell")
        try:
            yield ring
        finally:
            task.cancel()
            await asyncio.wait({task})
            ring.admin.close()
        assert task.cancelled()


async def eventually(true: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not true():  # noqa: ASYNC110 - the server tells nobody of it
            await asyncio.sleep(0.005)


def metric(name: str) -> float:
    return telemetry.registry.get_sample_value(f"gateway_{name}_total") or 0.0
