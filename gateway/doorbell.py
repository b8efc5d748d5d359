"""Hears, from the store, that another node has journalled something, or wants something of a turn.

A bell is a hint and may be lost, silently: whoever listens looks at the journal whenever a subscription is
confirmed (``on_missed``), and now and then all the same (the hub's GATEWAY_POLL).

One pub/sub connection for each shard, subscribed only for sessions that somebody here waits for.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from gateway import telemetry
from gateway.bellwire import BellWire
from gateway.core.model import NodeId, SessionId, TurnId
from gateway.keys import session_keys
from gateway.store import load_script

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.store import Store
    from gateway.store.topology import Shard

_RING = load_script("ring")

SCRIPTS = (_RING,)

PROBE_SECONDS = 5.0
"""A connection that has gone silent is replaced within twice that."""

MAX_PROBE_NAMES = 4096
"""Names tried for a probe's channel: of three shards about every third fits."""


class Doorbell:
    """The bells of the sessions that are watched.

    Args:
        store: Open.
        prefix: Starts every channel.
        node: This one; it does not hear its own bells.
        probe_seconds: As :data:`PROBE_SECONDS`.

    Attributes:
        on_records: Another node has journalled something in a session.
        on_turn: A turn was changed otherwise: cancelled, say. Its producer looks.
        on_missed: Bells of a session may have been lost until now.
    """

    def __init__(
        self, store: Store, *, prefix: str, node: NodeId, probe_seconds: float = PROBE_SECONDS
    ) -> None:
        self.on_records: Callable[[SessionId], None] = lambda _: None
        self.on_turn: Callable[[SessionId, TurnId], None] = lambda _, __: None
        self.on_missed: Callable[[SessionId], None] = lambda _: None
        self.own_bell = f"r {node}".encode()
        self._store = store
        self._prefix = prefix
        self._node = node
        self._probe_seconds = probe_seconds
        self._watches: dict[SessionId, int] = {}
        self._sessions: dict[bytes, SessionId] = {}
        self._homes: dict[bytes, BellWire | None] = {}
        """Where a channel is subscribed; ``None`` while its shard is not known."""
        self._wires: dict[Shard, BellWire] = {}
        self._tasks: dict[Shard, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None
        store.on_topology.append(self._rearrange)

    async def run(self) -> None:
        """Listen; its owner cancels it."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            for wire in self._wires.values():
                self._start(wire)
            await asyncio.get_running_loop().create_future()

    def watch(self, session: SessionId) -> None:
        """Listen for a session's bells. Counted; returns at once."""
        count = self._watches.get(session, 0)
        self._watches[session] = count + 1
        if not count:
            name = session_keys(self._prefix, session).bell
            channel = name.encode()
            self._sessions[channel] = session
            self._homes[channel] = wire = self._wire_of(name)
            if wire is not None:
                wire.want(channel)

    def unwatch(self, session: SessionId) -> None:
        """Take one :meth:`watch` back."""
        count = self._watches.pop(session) - 1
        if count:
            self._watches[session] = count
            return
        channel = session_keys(self._prefix, session).bell.encode()
        del self._sessions[channel]
        wire = self._homes.pop(channel)
        if wire is not None:
            wire.forget(channel)

    # -- for the wires

    def heard(self, channel: bytes, payload: bytes) -> None:
        """A bell that is not this node's own."""
        session = self._sessions.get(channel)
        if session is None:
            return
        telemetry.bells.inc()
        if payload.startswith(b"c "):
            self.on_turn(session, TurnId(payload[2:].decode(errors="replace")))
        else:
            self.on_records(session)

    def confirmed(self, channel: bytes) -> None:
        """A subscription has begun."""
        session = self._sessions.get(channel)
        if session is not None:
            self.on_missed(session)

    def misplaced(self) -> None:
        """The store is not where it was."""
        self._store.refresh_soon()

    # -- the shards

    def _wire_of(self, channel: str) -> BellWire | None:
        shard = self._store.shard_of(channel)
        if shard is None:
            self._store.refresh_soon()
            return None
        wire = self._wires.get(shard)
        if wire is None:
            probe = self._probe_channel(shard)
            wire = self._wires[shard] = BellWire(
                shard, self, probe=probe, ring=self._ring, probe_seconds=self._probe_seconds
            )
            self._start(wire)
        return wire

    def _start(self, wire: BellWire) -> None:
        if self._group is not None and wire.shard not in self._tasks:
            task = self._group.create_task(wire.run(), name=f"doorbell-{wire.shard.name}")
            self._tasks[wire.shard] = task

    def _rearrange(self) -> None:
        """The shards are others, or have other slots."""
        for channel, old in list(self._homes.items()):
            new = self._wire_of(channel.decode())
            if new is not old:
                self._homes[channel] = new
                if old is not None:
                    old.forget(channel)
                if new is not None:
                    new.want(channel)
        there = set(self._store.shards())
        for shard in [shard for shard in self._wires if shard not in there]:
            del self._wires[shard]
            task = self._tasks.pop(shard, None)
            if task is not None:
                task.cancel()
        for shard, wire in self._wires.items():
            if not wire.probe or self._store.shard_of(wire.probe.decode()) != shard:
                # None may have been found while the shard had but a few slots.
                wire.probe_by(self._probe_channel(shard))

    def _probe_channel(self, shard: Shard) -> bytes:
        """A channel whose slot is the shard's, and which no other node hears; empty if none is found."""
        for number in range(MAX_PROBE_NAMES):
            name = f"{self._prefix}:{{probe-{self._node}-{number}}}:bell"
            if self._store.shard_of(name) == shard:
                return name.encode()
        return b""

    def _ring(self, channel: bytes, payload: bytes) -> asyncio.Future[Any]:
        return self._store.writes.call(_RING, (channel.decode(),), (payload,))
