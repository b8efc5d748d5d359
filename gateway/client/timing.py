"""How patient a client is."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds, all of them."""

    open_seconds: float = 10.0
    """For a connection and its ``hello``, each."""
    close_seconds: float = 2.0
    """For the gateway's answer to our close."""
    backoff_base_seconds: float = 0.5
    """The longest delay before the first new attempt; doubled for each that follows."""
    backoff_max_seconds: float = 10.0
    """The longest delay of all."""
    give_up_seconds: float = 300.0
    """After which a command that was not answered is an error."""

    def backoff(self, attempt: int) -> float:
        """The delay before attempt 0, 1, 2 ..., with full jitter."""
        longest = min(self.backoff_max_seconds, self.backoff_base_seconds * 2 ** min(attempt, 32))
        return random.uniform(0, longest)  # noqa: S311 - dice, no secret
