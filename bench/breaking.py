"""A node is killed, or the store is frozen, while many turns run."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from typing import Any

from bench.answers import DELTA, Answer, BenchError, Meter
from bench.clients import SECONDS, Wire, get
from bench.streaming import ENDLESS, all_ended, percentile, started, stop, until

LATE_NANOSECONDS = 100_000_000
"""A chunk that takes longer is part of a disturbance."""

_SEALED = re.compile(rb'gateway_turns_ended_total\{reason="interrupted"\} ([0-9.]+)')


class TimedAnswer(Answer):
    """An answer of which each silence and each late chunk is noted.

    Attributes:
        longest_gap: Nanoseconds between two arrivals.
        late_until: When the last chunk came that took longer than :data:`LATE_NANOSECONDS`; 0: none did.
    """

    longest_gap = 0
    late_until = 0
    _came_at = 0

    def take(self, text: bytes, now: int) -> None:
        """See the base class."""
        super().take(text, now)
        found = DELTA.findall(text)
        if not found:
            return
        if self._came_at:
            self.longest_gap = max(self.longest_gap, now - self._came_at)
        self._came_at = now
        if now - int(found[0][1]) > LATE_NANOSECONDS:
            self.late_until = now


async def kill_node(
    *, ports: list[int], admin_port: int, pid: int, turns: int, rate: int, settle: float
) -> dict[str, Any]:
    """The first of two nodes dies with so many turns, each of them read by a client of the second.

    Args:
        ports: Of both.
        admin_port: Of the second.
        pid: Of the first.
        turns: How many.
        rate: Chunks a second of each.
        settle: Seconds for which they run before.

    Raises:
        BenchError: A turn ended otherwise, or a chunk came twice, or one was lost in between.
    """
    order = {"chunks": ENDLESS, "rate": rate, "gated": False, "endless": False}
    answers, readers, _ = await started(
        Wire.SESSION, ports[0], turns, order, Meter(), read_port=ports[1], make=TimedAnswer
    )
    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*[answer.begun for answer in answers])
    await asyncio.sleep(settle)
    killed_at = time.monotonic_ns()
    os.kill(pid, signal.SIGKILL)
    sealed_at = await _all_sealed(admin_port, turns)
    await all_ended(answers)
    told = [answer.ended.result() - killed_at for answer in answers]
    for reader in readers:
        reader.close()
    return {
        "sealed_ns": sealed_at - killed_at,
        "told_p50_ns": percentile(told, 0.5),
        "told_max_ns": max(told),
    }


async def _all_sealed(admin_port: int, turns: int) -> int:
    async with asyncio.timeout(SECONDS):
        while True:
            found = _SEALED.search(await get(admin_port, "/metrics"))
            if found is not None and float(found[1]) >= turns:
                return time.monotonic_ns()
            await asyncio.sleep(0.02)


async def freeze_store(
    *,
    ports: list[int],
    backend_port: int,
    pid: int,
    turns: int,
    rate: int,
    frozen_seconds: float,
    after_seconds: float,
    settle: float,
) -> dict[str, Any]:
    """The store stands still for a while in the middle of turns of the first node.

    Args:
        ports: Of both nodes; half of the clients are at each.
        backend_port: Of the backend.
        pid: Of the store.
        turns: How many.
        rate: Chunks a second of each.
        frozen_seconds: For how long.
        after_seconds: For how long they go on.
        settle: Seconds for which they run before.

    Raises:
        BenchError: A chunk was lost or came twice.
    """
    order = {"chunks": ENDLESS, "rate": rate, "gated": False, "endless": False}
    answers: list[Answer] = []
    readers = []
    for port in ports:
        more = await started(
            Wire.SESSION, ports[0], turns // 2, order, Meter(), read_port=port, make=TimedAnswer
        )
        answers += more[0]
        readers += more[1]
    await until(backend_port, answers, lambda state: bool(state["talking"] == len(answers)))
    await asyncio.sleep(settle)
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(frozen_seconds)
    finally:
        thawed_at = time.monotonic_ns()
        os.kill(pid, signal.SIGCONT)
    await asyncio.sleep(after_seconds)
    timed = [answer for answer in answers if isinstance(answer, TimedAnswer)]
    settled = max(answer.late_until for answer in timed)
    if not settled:
        raise BenchError("unable to measure; the store was frozen, and no chunk was late")
    chunks = await stop(backend_port, answers)
    for reader in readers:
        reader.close()
    return {
        "chunks": chunks,
        "longest_gap_ns": max(answer.longest_gap for answer in timed),
        "settled_ns": settled - thawed_at,
    }
