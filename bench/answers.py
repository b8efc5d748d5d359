"""What makes a run a figure: every chunk once and in order, and the latencies of those that count."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field

DELTA = re.compile(rb'"delta":"(\d{8})\.(\d{20})"')


class BenchError(Exception):
    """A run that is no figure: something was lost, doubled, out of order, refused or late."""


@dataclass(slots=True)
class Meter:
    """What all clients of a run measure together, while it is open."""

    is_open: bool = False
    count: int = 0
    latencies: list[int] = field(default_factory=list)
    last_at: int = 0


class Answer:
    """One turn's deltas as one client gets them: each once and in order, or the run is an error.

    Args:
        chunks: How many are to come; ``None``: whoever asked compares :attr:`received` with what was written.
        meter: Where to count.
        endless: Whether the last delta, not the wire's own end, is the end.
    """

    def __init__(self, chunks: int | None, meter: Meter, *, endless: bool = False) -> None:
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Resolves with the first delta, or the failure."""
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """Resolves with the moment of the end."""
        self._chunks = chunks
        self._next = 0
        self._meter = meter
        self._endless = endless

    @property
    def received(self) -> int:
        """How many came so far."""
        return self._next

    def take(self, text: bytes, now: int) -> None:
        """Look at whole events or frames."""
        meter = self._meter
        found = DELTA.findall(text)
        expected = self._next
        for index, stamp in found:
            if int(index) != expected:
                self.fail(f"chunk {int(index)} came where {expected} was due")
                return
            expected += 1
            if meter.is_open:
                meter.latencies.append(now - int(stamp))
        if found and not self._next:
            self._begin()
        self._next = expected
        if meter.is_open:
            meter.count += len(found)
            meter.last_at = now
        if self._endless and expected == self._chunks:
            self._end(now)

    def finish(self, now: int) -> None:
        """The wire said that this was all."""
        if self._endless:
            return
        if self._chunks is not None and self._next != self._chunks:
            self.fail(f"{self._next} of {self._chunks} chunks came")
        else:
            self._end(now)

    def fail(self, why: str) -> None:
        """Make the run an error."""
        if not self.ended.done():
            self.ended.set_exception(BenchError(f"unable to measure; {why}"))
            self._begin()
            self.ended.exception()  # of many that fail together, the first is told

    def _begin(self) -> None:
        if not self.begun.done():
            self.begun.set_result(None)

    def _end(self, now: int) -> None:
        if not self.ended.done():
            self.ended.set_result(now)
