"""The weather of a network: faults at random, each with its end."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    from tests.support.network import Network
    from tests.support.network_connection import Connection

TORN_BYTES = 400
"""A torn connection of the weather still passes this many bytes at most."""

Kind = Literal[
    "reset",  # every connection
    "close",  # every connection, in good order
    "tear",  # every connection, in the midst of what comes next
    "freeze",
    "sleep",  # freeze, and what was said meanwhile is lost
    "delay",
    "refuse-upgrades",
    "swallow-upgrades",
    "buffer-streams",
    "long-poll-only",  # refuse-upgrades and buffer-streams
    "refuse",  # every new connection
]

KINDS: tuple[Kind, ...] = get_args(Kind)


class Fault(NamedTuple):
    """One fault of the weather.

    Attributes:
        kind: What it is.
        pause_seconds: Calm before it.
        seconds: How long it lasts.
        strength: In [0, 1): of the longest delay, or of ``TORN_BYTES``.
    """

    kind: Kind
    pause_seconds: float
    seconds: float
    strength: float


def forecast(
    dice: random.Random, pauses: tuple[float, float], lengths: tuple[float, float], kinds: tuple[Kind, ...]
) -> Iterator[Fault]:
    while True:
        yield Fault(
            kind=dice.choice(kinds),
            pause_seconds=dice.uniform(*pauses),
            seconds=dice.uniform(*lengths),
            strength=dice.random(),
        )


class Weather:
    """What befalls a network, into which it may look.

    Args:
        network: It ends as it was set before, however it is left.
        longest_delay_seconds: Of the fault ``delay``.
    """

    def __init__(self, network: Network, longest_delay_seconds: float) -> None:
        self._network = network
        self._longest_delay_seconds = longest_delay_seconds

    async def befall(self, faults: Iterator[Fault]) -> None:
        for fault in faults:
            await asyncio.sleep(fault.pause_seconds)
            self._network.faults.append(fault)
            self._network.count()
            with contextlib.ExitStack() as ends:
                self._begin(fault, ends)
                await asyncio.sleep(fault.seconds)

    def _begin(self, fault: Fault, ends: contextlib.ExitStack) -> None:
        match fault.kind:
            case "reset" | "close":
                self._network.cut(reset=fault.kind == "reset")
            case "tear":
                self._tear(1 + int(fault.strength * TORN_BYTES), ends)
            case "freeze" | "sleep":
                ends.callback(self._network.thaw)
                self._network.freeze(discard=fault.kind == "sleep")
            case "delay":
                self._set(ends, delay_seconds=fault.strength * self._longest_delay_seconds)
            case "refuse-upgrades" | "swallow-upgrades":
                self._cut_and_set(ends, block_upgrades=fault.kind.removesuffix("-upgrades"))
            case "buffer-streams":
                self._cut_and_set(ends, buffer_streams=True)
            case "long-poll-only":
                self._cut_and_set(ends, buffer_streams=True, block_upgrades="refuse")
            case "refuse":
                self._cut_and_set(ends, _refuses=True)

    def _cut_and_set(self, ends: contextlib.ExitStack, **controls: Any) -> None:
        self._set(ends, **controls)
        ends.callback(self._cut_those, lambda connection: connection.swallowed)
        self._network.cut()

    def _set(self, ends: contextlib.ExitStack, **controls: Any) -> None:
        for name, value in controls.items():
            ends.callback(setattr, self._network, name, getattr(self._network, name))
            setattr(self._network, name, value)

    def _tear(self, bytes_down: int, ends: contextlib.ExitStack) -> None:
        torn = set(self._network._connections)
        self._network.tear(bytes_down=bytes_down)
        ends.callback(self._cut_those, torn.__contains__)

    def _cut_those(self, which: Callable[[Connection], bool]) -> None:
        for connection in [each for each in self._network._connections if which(each)]:
            connection.cut(reset=True)
