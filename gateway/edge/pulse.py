"""The heartbeat of one open stream: waits for work, notices silence, and drops a peer that is stuck.

One timer per connection, armed once per interval whatever the traffic. A write that a peer does not take is
ended by dropping the connection from here: waiting for the write itself with a timeout would leave aiohttp's
writer in a state that fails later.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Pulse:
    """Wakes a stream's writer.

    Args:
        interval_seconds: Silence after which the writer is woken to give a sign of life.
        drop: Drops the connection at once, when a write has been stuck for two intervals.
    """

    def __init__(self, interval_seconds: float, drop: Callable[[], None]) -> None:
        self._interval = interval_seconds
        self._drop = drop
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._wrote_at = self._loop.time()
        self._stuck_since: float | None = None
        self._timer = self._loop.call_later(interval_seconds, self._tick)

    def wake(self) -> None:
        """There may be something to write."""
        self._event.set()

    async def wait(self) -> bool:
        """Wait for work or for silence; False when it is silence and a sign of life is due."""
        await self._event.wait()
        self._event.clear()
        # The same sum as in `_tick`: a difference rounds otherwise, and a heartbeat would be left out.
        return self._loop.time() < self._wrote_at + self._interval

    def writing(self) -> None:
        """A write begins."""
        self._stuck_since = self._loop.time()

    def wrote(self) -> None:
        """The write ended: the peer, or at least a buffer with a bound, took it."""
        self._wrote_at = self._loop.time()
        self._stuck_since = None

    def close(self) -> None:
        """Stop the timer."""
        self._timer.cancel()

    def _tick(self) -> None:
        now = self._loop.time()
        if self._stuck_since is not None and now - self._stuck_since >= 2 * self._interval:
            self._drop()
            return
        due = self._wrote_at + self._interval
        if now >= due:
            self.wake()
            due = now + self._interval
        self._timer = self._loop.call_at(due, self._tick)
