"""The whole of it: a world, its faults, its calm, and the last reading."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp

from tests.faults.torture_world import plans
from tests.faults.torture_world.backend import TortureBackend
from tests.faults.torture_world.carriers import BROKEN
from tests.faults.torture_world.checker import RUNS
from tests.faults.torture_world.client import TortureClient, World, session_name
from tests.faults.torture_world.fleet import Fleet
from tests.faults.torture_world.history import Befallen, History, offset_of
from tests.faults.torture_world.http_carriers import Polls, note_poll
from tests.faults.torture_world.recorder import Recorder, Running
from tests.faults.torture_world.store import TortureStore

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from tests.faults.torture_world.history import Reading
    from tests.faults.torture_world.plans import Fault, Scale

SETTLE_SECONDS = 25.0
"""What the last turns may take to end, beside what the longest answer takes."""

CATCH_UP_SECONDS = 10.0
"""What who stayed may need for the last records: a lost bell costs as much as a look at the journal."""

LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be run.

    Attributes:
        seconds: How long faults and visits go on.
        kinds: Of faults.
        plant: A bug of the nodes; empty: none.
    """

    seed: int
    seconds: float
    scale: Scale
    kinds: tuple[str, ...] = plans.FAULTS
    plant: str = ""

    def settings(self, store: TortureStore, backend: TortureBackend) -> dict[str, object]:
        """Of every node: what is long by default is short."""
        return {
            "upstream": backend.server.url,
            "redis_url": store.url,
            "lease": self.scale.lease_seconds,
            "drain": self.scale.drain_seconds,
            "goaway_spread": 1,
            "heartbeat": 2,
            "poll": 1,
            "upstream_header_timeout": self.scale.patience_seconds,
            "upstream_idle_timeout": self.scale.patience_seconds,
        }


async def torture(order: Order) -> tuple[World, list[str]]:
    """Run it; returns what happened, and what nodes logged as errors."""
    history = History(order.seed, order.scale.lease_seconds, order.scale.drain_seconds)
    async with AsyncExitStack() as stack:
        backend = TortureBackend(history)
        await stack.enter_async_context(backend.server)
        replicated = "failover" in order.kinds
        store = await stack.enter_async_context(TortureStore(replicated=replicated))
        fleet = Fleet(order.scale.nodes, order.plant, order.settings(store, backend), history)
        await stack.enter_async_context(fleet)
        world = World(order.seed, order.scale, history, backend, fleet)
        history.began_at = time.monotonic()
        clients = [TortureClient(number, world) for number in range(order.scale.clients)]
        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(client.run())
            await _befall_all(order, world, store)
            history.calm_at = time.monotonic()
            world.calm.set()
            await fleet.drained()
            try:
                await _settle(world)
                await _read_all(world)
                await _caught_up(world)
            finally:
                history.ended_at = time.monotonic()
                world.over.set()
    history.sealed = fleet.sealed()
    return world, fleet.logged_errors()


async def _befall_all(order: Order, world: World, store: TortureStore) -> None:
    if "weather" in order.kinds:
        for slot in world.fleet.slots:
            slot.network.weather(
                order.seed * 100 + slot.number,
                pauses=(2.0, 8.0),
                lengths=(0.05, 1.0),
                longest_delay_seconds=0.1,
            )
    until = time.monotonic() + order.seconds
    await asyncio.gather(
        _befall_nodes(plans.node_faults(order.seed, order.kinds, order.scale), world, until),
        _befall_store(plans.store_faults(order.seed, order.kinds, order.scale), world, store, until),
        asyncio.sleep(order.seconds),
    )
    for slot in world.fleet.slots:
        await slot.network.calm()


async def _befall_nodes(faults: Iterator[Fault], world: World, until: float) -> None:
    for fault in faults:
        if time.monotonic() + fault.pause_seconds > until:
            return
        await asyncio.sleep(fault.pause_seconds)
        slots = [slot for slot in world.fleet.slots if slot.is_up]
        await world.fleet.befall(fault.kind, slots[int(fault.dice * len(slots))], fault.seconds)


async def _befall_store(faults: Iterator[Fault], world: World, store: TortureStore, until: float) -> None:
    for fault in faults:
        if time.monotonic() + fault.pause_seconds > until:
            return
        await asyncio.sleep(fault.pause_seconds)
        befallen = Befallen(fault.kind, None, time.monotonic(), time.monotonic())
        world.history.faults.append(befallen)
        befallen.note = await store.befall(fault.kind, fault.seconds)
        befallen.until = time.monotonic()


# -- the end


async def _settle(world: World) -> None:
    """Wait until no turn runs, as each node tells it, or the time for it is over."""
    with contextlib.suppress(TimeoutError):
        async with (
            asyncio.timeout(SETTLE_SECONDS + world.scale.patience_seconds),
            aiohttp.ClientSession() as http,
        ):
            for number in range(world.scale.sessions):
                await _until_not(_runs_still, http, world, session_name(world.seed, number))


async def _until_not(holds: Callable[..., Awaitable[bool]], *arguments: Any) -> None:
    while await holds(*arguments):  # noqa: ASYNC110 - nobody announces it
        await asyncio.sleep(LOOK_SECONDS)


async def _runs_still(http: aiohttp.ClientSession, world: World, session: str) -> bool:
    """Whether a turn runs; those whose backend was told to hang are cancelled, it would be a long wait."""
    scratch = Recorder("settling", History(0, 0, 0), world.backend, Running())
    slot = world.fleet.slots[0]
    try:
        reading = await _read_page(http, scratch, slot.network.address, session, "start")
    except BROKEN:
        return True
    running = [turn["turn"] for turn in reading.turns if turn["state"] in RUNS]
    recorder = Recorder("settling", world.history, world.backend, Running())
    canceller = Polls(http, slot, recorder, session, 0)
    for turn in running:
        if plans.answer(world.seed, turn, world.scale)["end"] == "hang":
            await canceller.post({"type": "cancel", "session": session, "turn": turn}, slot)
    return bool(running)


async def _read_all(world: World) -> None:
    """Each session, whole, from each node, by somebody who was never there."""
    async with aiohttp.ClientSession() as http:
        for slot in world.fleet.slots:
            reader = Recorder(f"last-{slot.number}", History(0, 0, 0), world.backend, Running())
            for number in range(world.scale.sessions):
                session = session_name(world.seed, number)
                try:
                    async with asyncio.timeout(SETTLE_SECONDS):
                        world.history.finals.append(
                            await _read_whole(http, reader, slot.label, slot.network.address, session)
                        )
                except BROKEN as error:
                    world.history.unreadable.append(f"{session} on node {slot.label}: {error!r}")


async def _read_whole(
    http: aiohttp.ClientSession, reader: Recorder, node: str, address: str, session: str
) -> Reading:
    whole = await _read_page(http, reader, address, session, "start")
    whole.node = node
    place = whole
    while offset_of(reader.cursors[session]) < (place.last or 0):
        place = await _read_page(http, reader, address, session, reader.cursors[session])
        whole.lines += place.lines
        whole.resync = whole.resync or place.resync
        whole.last = place.last
    return whole


async def _read_page(
    http: aiohttp.ClientSession, recorder: Recorder, address: str, session: str, where: str
) -> Reading:
    asked = {} if where == "start" else {"after": where}
    url = f"http://{address}/gateway/v1/sessions/{session}/events"
    async with http.get(url, params=asked, headers={"Accept": "application/json"}) as response:
        raw = await response.read()
        if response.status != 200:
            raise aiohttp.ClientPayloadError(f"unable to read; the gateway answered {response.status}")

    def begin(told: dict[str, object], asked: str) -> Reading:
        return recorder.begin(told, connection=0, carrier="long-poll", node="", session=session, asked=asked)

    return note_poll(begin, recorder, raw, where)


async def _caught_up(world: World) -> None:
    """Give those who stayed the time to have what the last readers had."""
    last = {final.session: final.offset + len(final.lines) for final in world.history.finals}

    async def is_behind() -> bool:
        stayed = [reading for reading in world.history.readings if reading.ending == "open"]
        return any(reading.offset + len(reading.lines) < last.get(reading.session, 0) for reading in stayed)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CATCH_UP_SECONDS):
            await _until_not(is_behind)
