"""Turns that ended a moment ago, and are kept: a failover may yet lose what they wrote."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.core.model import SessionId, TurnId
    from gateway.producer import Budget, TurnProducer

HOLD_SECONDS = 10.0
"""How long a turn is kept past its end (DESIGN §5): what a failover loses is what was newest."""


class KeptTurns:
    """Producers whose turns have ended, oldest first.

    Bounded by GATEWAY_MAX_BUFFER: when running turns need the room, the oldest go.

    Args:
        budget: Counts what they hold, and what running turns do.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._producers: dict[TurnProducer, asyncio.TimerHandle] = {}
        self._by_turn: dict[tuple[SessionId, TurnId], TurnProducer] = {}

    def __iter__(self) -> Iterator[TurnProducer]:
        return iter(self._producers)

    def get(self, session: SessionId, turn: TurnId) -> TurnProducer | None:
        """The producer of a turn that ended a moment ago."""
        return self._by_turn.get((session, turn))

    def add(self, producer: TurnProducer) -> None:
        """Its turn has ended; to be removed when it has let go of it."""
        loop = asyncio.get_running_loop()
        self._producers[producer] = loop.call_later(HOLD_SECONDS, producer.release)
        self._by_turn[producer.assignment.session, producer.assignment.turn] = producer

    def remove(self, producer: TurnProducer) -> None:
        """It is not kept any more. Idempotent."""
        timer = self._producers.pop(producer, None)
        if timer is not None:
            timer.cancel()
            self._by_turn.pop((producer.assignment.session, producer.assignment.turn), None)

    def release(self) -> None:
        """Let all of them go."""
        for producer in self._producers:
            producer.release()

    def make_room(self) -> None:
        """Let some go if the budget is used up."""
        too_many = self._budget.used - self._budget.limit
        for producer in self._producers:
            if too_many < 0:
                break
            producer.release()
            too_many -= producer.held_bytes

    @property
    def held_bytes(self) -> int:
        """What can be had back."""
        return sum(producer.held_bytes for producer in self._producers)
