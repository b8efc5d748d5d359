"""Lanes to every server of a cluster: each call goes to who has the slot of its first key.

Calls of one slot keep their order, also when it moves: those that a server redirects are handed over
together, and behind them those that still waited for the same server. Between two slots there is no order.

A redirected call has the deadline that it was asked with. A call whose slot nobody has waits for the map
until then.
"""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any

from gateway.store import lane as lanes
from gateway.store import refusals
from gateway.store.calls import Argument, Call, Detour
from gateway.store.cluster import Cluster, slot_of
from gateway.store.lane import Lane

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.store.scripts import Script
    from gateway.store.topology import Shard

MAX_REDIRECTIONS = 8
"""Of one call; two servers may each say that a slot is the other's."""


class Routes:
    """What a :class:`gateway.store.lane.Lane` is to one server, to a cluster.

    Args:
        cluster: Knows who has which slot.
        name: For logs and tasks.
        scripts: Loaded on every new connection.

    Attributes:
        on_contact: Given the name of the shard that a new connection leads to, when it was of use.
    """

    def __init__(self, cluster: Cluster, name: str, scripts: Sequence[Script]) -> None:
        self.on_contact: Callable[[str], None] = lambda _: None
        self._cluster = cluster
        self._name = name
        self._scripts = scripts
        self._lanes: dict[str, Lane] = {}
        self._waiting: dict[Call, None] = {}
        self._is_closed = False
        cluster.on_change.append(self._look_again)

    def start(self) -> None:
        """Lanes start as they are needed."""

    async def close(self) -> None:
        """End all lanes; calls that wait fail, and so do later ones."""
        self._is_closed = True
        for call in self._waiting:
            call.resolve(refusals.stopping())
        self._waiting.clear()
        async with asyncio.TaskGroup() as closing:
            for name, lane in self._lanes.items():
                closing.create_task(lane.close(), name=f"store-close-{name}")

    def call(
        self, script: Script, keys: Sequence[str], arguments: Sequence[Argument], *, reply_bytes: int = 0
    ) -> asyncio.Future[Any]:
        """As :meth:`gateway.store.lane.Lane.call`; in order with all calls of the same slot."""
        call = Call.of(script, keys, arguments, reply_bytes)
        self._put(call)
        return call.reply

    def tell(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> None:
        """As :meth:`call`, for what may be lost: nobody waits for the reply."""
        self._put(Call.of(script, keys, arguments, 0).forget())

    def renew(self, name: str) -> None:
        """Use a new connection to a shard from the next batch on."""
        if name in self._lanes:
            self._lanes[name].renew()

    def _put(self, call: Call) -> None:
        if self._is_closed:
            call.resolve(refusals.stopping())
            return
        shard = self._cluster.shard_of(call.key)
        if shard is not None:
            self._lane(shard).put(call)
            return
        self._waiting[call] = None
        self._detour(call)
        self._cluster.refresh_soon()

    def _lane(self, shard: Shard) -> Lane:
        lane = self._lanes.get(shard.name)
        if lane is None:
            lane = self._lanes[shard.name] = Lane(shard.pool, f"{self._name}-{shard.name}", self._scripts)
            lane.on_contact = functools.partial(self._met, shard.name)
            lane.on_lost = self._cluster.refresh_soon
            lane.on_redirected = functools.partial(self._redirect, shard.name)
            lane.start()
        return lane

    def _met(self, name: str) -> None:
        self.on_contact(name)

    def _redirect(self, name: str, lane: Lane, redirected: list[tuple[Call, str]]) -> None:
        moved: set[int] = set()
        for call, said in redirected:
            shard = self._followed(name, call, said, moved)
            if shard is None or self._is_over(call):
                self._cluster.refresh_soon()
                call.resolve(refusals.lost())
            else:
                self._lane(shard).put(call)
        for call in lane.take_back(lambda call: slot_of(call.key) in moved):
            self._put(call)

    def _followed(self, name: str, call: Call, said: str, moved: set[int]) -> Shard | None:
        """Whom the server means: ``MOVED <slot> <host:port>``, or ``ASK`` for this one call."""
        kind, _, rest = said.partition(" ")
        shard = self._cluster.shard_at(rest.partition(" ")[2].strip(), name)
        detour = self._detour(call)
        detour.asking = kind == "ASK"
        detour.redirections += 1
        if shard is not None and not detour.asking:
            slot = slot_of(call.key)
            moved.add(slot)
            self._cluster.moved(slot, shard)
        return shard

    @staticmethod
    def _is_over(call: Call) -> bool:
        now = asyncio.get_running_loop().time()
        is_late = now >= call.asked_at + lanes.OPERATION_TIMEOUT_SECONDS
        return is_late or (call.detour is not None and call.detour.redirections > MAX_REDIRECTIONS)

    def _detour(self, call: Call) -> Detour:
        """Begin one: its caller waits for no second deadline. What was sent may be carried out yet."""
        if call.detour is None:
            call.detour = Detour()
            deadline = call.asked_at + lanes.OPERATION_TIMEOUT_SECONDS
            timer = asyncio.get_running_loop().call_at(deadline, self._expire, call)
            call.reply.add_done_callback(lambda _: timer.cancel())
        return call.detour

    def _expire(self, call: Call) -> None:
        self._waiting.pop(call, None)
        call.resolve(refusals.lost(self._cluster.problem))

    def _look_again(self) -> None:
        """The map changed: what waited may leave, and no more calls wait for a server that has no slot."""
        names = {shard.name for shard in self._cluster.shards()}
        for name, lane in list(self._lanes.items()):
            if name in names:
                continue
            astray = lane.retire(refusals.lost())
            if lane.is_closed:
                del self._lanes[name]
            for call in astray:
                self._put(call)
        waiting, self._waiting = self._waiting, {}
        for call in waiting:
            self._put(call)
