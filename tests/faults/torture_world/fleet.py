"""The nodes: processes in slots, each slot with a network of its own in front, and what befalls them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import AsyncExitStack
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self

from tests.faults.torture_world.history import Befallen
from tests.support.network import Network
from tests.support.process import GatewayProcess

if TYPE_CHECKING:
    from tests.faults.torture_world.history import History

DRAIN_SLACK_SECONDS = 10.0
START_SECONDS = 60.0
RESTART_SECONDS = 0.5
LOSSES = frozenset({"journal.renewed"})
"""Logged as an error, and right after a failover; without one the judge sees the epochs."""


class TortureProcess(GatewayProcess):
    """A gateway, as it is or with a bug planted.

    Args:
        plant: Of :mod:`tests.faults.planted`; empty: none.
    """

    def __init__(self, plant: str, **settings: object) -> None:
        super().__init__(**settings)
        self._plant = plant

    async def __aenter__(self) -> Self:
        if not self._plant:
            return await super().__aenter__()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.faults.planted", self._plant,
            env={**kept, **self._settings, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._reading = asyncio.gather(self._read_log(), self._read_output())
        return self


class Slot:
    """Where one node runs after the other.

    Attributes:
        number: Of the slot.
        network: In front of it.
    """

    def __init__(self, number: int, plant: str, settings: dict[str, Any]) -> None:
        self.number = number
        self.network = Network("127.0.0.1:9")
        self.process: TortureProcess | None = None
        self.all_processes: list[TortureProcess] = []
        self._plant = plant
        self._settings = settings

    @property
    def label(self) -> str:
        """The slot, and which process there."""
        return f"{self.number}.{len(self.all_processes)}"

    @property
    def is_up(self) -> bool:
        """Whether a process runs there that is not being drained."""
        return self.process is not None

    async def start(self) -> None:
        """Start a node, as whoever supervises it would: again, until it is up. Connections are to it then.

        A node that finds no store gives up.
        """
        async with asyncio.timeout(START_SECONDS):
            while self.process is None:
                process = TortureProcess(self._plant, **self._settings)
                self.all_processes.append(process)
                await process.__aenter__()
                if await _has_started(process):
                    self.network.target = process.address
                    self.process = process
                else:
                    await asyncio.sleep(RESTART_SECONDS)


async def _has_started(process: TortureProcess) -> bool:
    """Wait until it listens, or has ended."""
    starting = asyncio.create_task(process.started(), name="starting")
    ending = asyncio.create_task(process.process.wait(), name="ending")
    try:
        await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
        return starting.done()
    finally:
        for task in (starting, ending):
            task.cancel()
        await asyncio.gather(starting, ending, return_exceptions=True)


class Fleet:
    """All nodes.

    Args:
        count: How many slots.
        plant: A bug of theirs.
        settings: Of every node.
        history: Gets each fault of a node.
    """

    def __init__(self, count: int, plant: str, settings: dict[str, Any], history: History) -> None:
        self.slots = [Slot(number, plant, settings) for number in range(count)]
        self._history = history
        self._stack = AsyncExitStack()
        self._draining: set[asyncio.Task[None]] = set()
        self._drain_seconds = float(settings["drain"])

    async def __aenter__(self) -> Self:
        for slot in self.slots:
            await self._stack.enter_async_context(slot.network)
        await asyncio.gather(*(slot.start() for slot in self.slots))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._draining:
            task.cancel()
        await asyncio.gather(*self._draining, return_exceptions=True)
        every = [process for slot in self.slots for process in slot.all_processes]
        await asyncio.gather(*(process.__aexit__() for process in every))
        await self._stack.aclose()

    def slot(self, number: int) -> Slot:
        """The slot, or the next that is up."""
        after = self.slots[number:] + self.slots[:number]
        return next((slot for slot in after if slot.is_up), self.slots[number])

    async def befall(self, kind: str, slot: Slot, seconds: float) -> None:
        """Do one fault and see its end; a drain goes on beside what comes next."""
        process = slot.process
        assert process is not None
        began_at = time.monotonic()
        fault = Befallen(kind, slot.number, began_at, began_at)
        self._history.faults.append(fault)
        match kind:
            case "kill":
                slot.process = None
                await process.kill()
                await asyncio.sleep(seconds)
                await slot.start()
            case "stop-short" | "stop-long":
                process.process.send_signal(signal.SIGSTOP)
                try:
                    await asyncio.sleep(seconds)
                finally:
                    process.process.send_signal(signal.SIGCONT)
            case "drain":
                slot.process = None
                process.terminate()
                self._draining.add(asyncio.create_task(self._see_drained(process, fault), name="drained"))
                await slot.start()
                return  # it is over when the old one has gone
            case _:
                raise ValueError(f"unable to do {kind!r} to a node")
        fault.until = time.monotonic()

    async def drained(self) -> None:
        """Wait until every node that was told to stop has gone."""
        if self._draining:
            await asyncio.wait(self._draining)

    async def _see_drained(self, process: TortureProcess, fault: Befallen) -> None:
        try:
            async with asyncio.timeout(self._drain_seconds + DRAIN_SLACK_SECONDS):
                status = await process.process.wait()
        except TimeoutError:
            fault.note = "never ended"
            await process.kill()
        else:
            fault.note = f"ended with status {status}"
        fault.until = time.monotonic()
        fault.note += f" after {fault.until - fault.at:.1f} s"

    def sealed(self) -> dict[str, float]:
        """The turns that nodes logged as sealed, and when."""
        ahead = time.time() - time.monotonic()
        return {
            line["turn"]: datetime.fromisoformat(line["timestamp"]).timestamp() - ahead
            for slot in self.slots
            for process in slot.all_processes
            for line in process.log
            if line.get("event") == "turn.sealed"
        }

    def logged_errors(self) -> list[str]:
        """What the nodes logged as errors, and what is no log at all."""
        every = [(slot, process) for slot in self.slots for process in slot.all_processes]
        return [
            f"node {slot.number}: {line}"
            for slot, process in every
            for line in process.log
            if (line.get("level") in {"error", "critical"} and line["event"] not in LOSSES)
            # Of a traceback; a node that starts while the store is away says so in a sentence, and ends.
            or ("Error" in line.get("text", "") and not line["text"].startswith("unable to "))
        ]
