"""Who produces a turn, and who is gone.

A node gives a sign of life by the store's clock. The turns of a node that has been silent for a lease may be
ended by any other (sealed), but by nobody before it has itself had a lease's worth of uninterrupted contact
with the store: an outage of the store seals nothing.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from gateway.core.model import NodeId, SessionId, TurnId
from gateway.journal import milliseconds
from gateway.store import Store, StoreError, StoreUnavailable, load_script

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = structlog.get_logger(__name__)

_BEAT = load_script("beat")
_CLAIM = load_script("claim")
_ORPHANS = load_script("orphans")
_FORGET = load_script("forget")

SCRIPTS = (_BEAT, _CLAIM, _ORPHANS, _FORGET)

BEATS_PER_LEASE = 3
"""Two may be lost."""

CLAIMS_SECONDS = 86_400.0
"""How long a node's claims outlive its last beat, if no node is there to end its turns for so long."""

_KEPT = milliseconds(CLAIMS_SECONDS)


class Lease:
    """A node's place among the nodes.

    Args:
        store: Open.
        node: This one; a new name at every start.
        prefix: Starts every key.
        lease_seconds: Silence after which a node is gone.
    """

    def __init__(self, store: Store, *, node: NodeId, prefix: str, lease_seconds: float) -> None:
        self.node = node
        self._store = store
        self._nodes = f"{prefix}:{{nodes}}"
        self._lease_seconds = lease_seconds
        self._contact_since: float | None = None

    async def run(self, seal: Callable[[SessionId, TurnId, NodeId], Awaitable[None]]) -> None:
        """Beat, and have the turns of silent nodes ended. Its owner cancels it.

        Args:
            seal: Ends one turn of a node, if it has not ended.
        """
        while True:
            next_beat = time.monotonic() + self._lease_seconds / BEATS_PER_LEASE
            try:
                silent = await self._beat()
                if self.may_seal:
                    for node in silent:
                        await self._bury(node, seal, next_beat)
            except StoreUnavailable:
                self._contact_since = None
            except StoreError:
                log.exception("lease.failed")
            await asyncio.sleep(max(0.0, next_beat - time.monotonic()))

    @property
    def may_seal(self) -> bool:
        """Whether this node has been in contact with the store for long enough to judge another."""
        since = self._contact_since
        return since is not None and time.monotonic() - since >= self._lease_seconds

    async def is_gone(self, node: NodeId) -> bool:
        """Whether a node's turns may be ended by this one."""
        if node == self.node or not self.may_seal:
            return False
        live, _ = await self._nodes_now()
        return node not in live

    def claim(self, session: SessionId, turn: TurnId) -> None:
        """Say that this node is about to produce a turn; before ``begin``, so that no turn is forgotten."""
        self._store.writes.tell(_CLAIM, (self._turns_of(self.node),), (f"{turn} {session}", "add", _KEPT))

    def release(self, session: SessionId, turn: TurnId) -> None:
        """The turn has ended."""
        self._unclaim(self.node, f"{turn} {session}")

    async def leave(self) -> None:
        """Say goodbye: all of this node's turns have ended."""
        await self._store.writes.call(_FORGET, (self._nodes, self._turns_of(self.node)), (self.node,))

    async def check(self) -> None:
        """Ask the store for a sign of life.

        Raises:
            StoreUnavailable: It gives none.
        """
        await self._nodes_now()

    async def _beat(self) -> list[NodeId]:
        _, silent = await self._nodes_now()
        if self._contact_since is None:
            self._contact_since = time.monotonic()
        return silent

    async def _nodes_now(self) -> tuple[set[NodeId], list[NodeId]]:
        live, silent = await self._store.writes.call(
            _BEAT,
            (self._nodes, self._turns_of(self.node)),
            (self.node, milliseconds(self._lease_seconds), _KEPT),
        )
        return {NodeId(node.decode()) for node in live}, [NodeId(node.decode()) for node in silent]

    async def _bury(
        self, node: NodeId, seal: Callable[[SessionId, TurnId, NodeId], Awaitable[None]], until: float
    ) -> None:
        """End a node's turns, as many as there is time for: who buries must not fall silent itself."""
        for member in await self._store.reads.call(_ORPHANS, (self._turns_of(node),), ()):
            if time.monotonic() >= until:
                return
            turn, _, session = member.decode().partition(" ")
            try:
                await seal(SessionId(session), TurnId(turn), node)
            except StoreError:
                # One session's broken key must not keep the others from their end.
                log.exception("turn.seal-failed", session=session, turn=turn, node=node)
            self._unclaim(node, member)
        await self._store.writes.call(_FORGET, (self._nodes, self._turns_of(node)), (node,))

    def _unclaim(self, node: NodeId, member: str | bytes) -> None:
        self._store.writes.tell(_CLAIM, (self._turns_of(node),), (member, "remove", _KEPT))

    def _turns_of(self, node: NodeId) -> str:
        return f"{self._nodes}:{node}"
