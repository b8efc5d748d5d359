"""Waiting between attempts."""

from __future__ import annotations

import asyncio
import random


class Pause:
    """Keeps attempts that come to nothing apart, farther each time; the first one does not wait.

    Whoever tries seldom anyway does not wait either: what counts is the time since the last attempt began.
    After a while without any, the next ones count anew.

    Args:
        first_seconds: Between the first two attempts; doubled each time.
        longest_seconds: To that.
    """

    def __init__(self, first_seconds: float, longest_seconds: float) -> None:
        self._first = first_seconds
        self._longest = longest_seconds
        self.reset()

    def reset(self) -> None:
        """The attempt was of use."""
        self._seconds = self._first
        self._not_before = 0.0

    async def take(self) -> None:
        """Wait until the next attempt may begin, which is now."""
        loop = asyncio.get_running_loop()
        missing = self._not_before - loop.time()
        if missing < -self._longest:
            self.reset()
        if missing > 0:
            await asyncio.sleep(missing)
        # Many nodes that lost the same server must not come back in step.
        self._not_before = loop.time() + self._seconds * random.uniform(0.7, 1.0)  # noqa: S311 - no secret
        self._seconds = min(2 * self._seconds, self._longest)
