"""Network: a TCP proxy between clients and the gateway, which does what networks do, when a test says so.

It passes bytes through unchanged, in order and with backpressure, until it is told otherwise::

    async with Network(node.address) as network:
        network.address                      # for the clients
        network.cut()                        # every connection, now
        network.block_upgrades = "swallow"   # from the next request on
        await network.until(lambda: network.upgrades_blocked == 1)
        network.weather(seed=7)              # faults at random, until:
        await network.calm()

Rule 1: a pump holds at most one chunk, and reads the next when that is written: backpressure is the kernel's.
Rule 2: a control holds from the moment it is set. No read is under way in which bytes could still pass:
pumps wait until a socket is ready, look at the controls, and only then read or write without waiting.
Rule 3: the HTTP in a connection is looked at, never changed. Where it is none, or none that we know, and
after a `101`, bytes pass unseen.

What is in the kernel's buffers has passed: a frozen connection's peer may read what came before the frost,
and its writes are acknowledged until the buffers are full. Its keep-alive probes are answered.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections import deque
from typing import TYPE_CHECKING, Self

from tests.support.http_framing import HEAD_BYTES, Framing, Head, Mark, Part
from tests.support.network_connection import Connection
from tests.support.network_controls import BlockedUpgrades, Control, Frost
from tests.support.network_http import HELD_BYTES, REFUSAL
from tests.support.network_sockets import DRAIN_READS, READ_BYTES, close_socket, take_each
from tests.support.weather import KINDS, TORN_BYTES, Fault, Kind, Weather, forecast

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "DRAIN_READS",
    "HEAD_BYTES",
    "HELD_BYTES",
    "KINDS",
    "READ_BYTES",
    "REFUSAL",
    "TORN_BYTES",
    "WAIT_SECONDS",
    "BlockedUpgrades",
    "Connection",
    "Fault",
    "Framing",
    "Frost",
    "Head",
    "Kind",
    "Mark",
    "Network",
    "Part",
]

WAIT_SECONDS = 15.0


class Network:
    """The way to a gateway.

    Args:
        target: Its ``host:port``; may be changed for the connections to come.

    Attributes:
        accepted: Connections ever taken; those refused are not.
        refused: Connections reset as they came.
        cuts: Connections cut by :meth:`cut`, :meth:`cut_after`, :meth:`tear`, the weather or a thaw.
        idle_cuts: Connections cut because of ``idle_seconds``.
        upgrades_blocked: Requests for a WebSocket refused or swallowed.
        streams_held: Responses held back.
        bytes_up: Read from clients, and not lost.
        bytes_down: Read from the gateway, and not lost.
        faults: What the weather has done and does, in order.
    """

    delay_seconds = Control(0.0)
    """Each chunk takes so much longer in each direction; a chunk is what can be read at once."""

    split = Control[int | None](None)
    """Most bytes of one write."""

    block_upgrades = Control[BlockedUpgrades | None](None)
    """What happens to requests for a WebSocket whose head comes from now on: a `403`, or nothing ever."""

    buffer_streams = Control(False)  # noqa: FBT003 - a default
    """Hold responses of Server-Sent Events that begin from now on back until they end; unset, they pass."""

    idle_seconds = Control[float | None](None)
    """A connection that carries nothing for that long is closed; a frozen one is not."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.accepted = self.refused = self.cuts = self.idle_cuts = 0
        self.upgrades_blocked = self.streams_held = 0
        self.bytes_up = self.bytes_down = 0
        self.faults: list[Fault] = []
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._weather: asyncio.Task[None] | None = None
        self._armed: deque[tuple[int, bool]] = deque()
        self._frost = Frost.NONE
        self._refuses = False
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self._listener.setblocking(False)  # noqa: FBT003 - positional only
        self._accepting = asyncio.create_task(take_each(self._listener, self._take), name="network-accept")
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.calm()
        finally:
            self._accepting.cancel()
            await asyncio.wait({self._accepting})
            self._listener.close()
            for connection in list(self._connections):
                connection.close(reset=True)
            ended = await asyncio.gather(self._accepting, *self._tasks, return_exceptions=True)
        if failures := [failure for failure in ended if isinstance(failure, Exception)]:
            raise ExceptionGroup("unable to be the network; a connection failed by itself", failures)

    @property
    def address(self) -> str:
        """``host:port`` for clients."""
        host, port = self._listener.getsockname()
        return f"{host}:{port}"

    @property
    def open(self) -> int:
        """How many connections there are."""
        return len(self._connections)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds of what is counted here."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    async def connections(self, count: int) -> None:
        """Wait until so many are open."""
        await self.until(lambda: self.open == count)

    def cut(self, *, reset: bool = True) -> int:
        """End every connection, both sides of it, now; returns how many.

        Args:
            reset: With a reset, and what is under way is lost; otherwise in good order (FIN).
        """
        connections = list(self._connections)
        for connection in connections:
            connection.cut(reset=reset)
        return len(connections)

    def cut_after(self, *, bytes_down: int, reset: bool = True) -> None:
        """Cut the next connection when so many bytes went to its client; each call arms one more."""
        self._armed.append((bytes_down, reset))

    def tear(self, *, bytes_down: int) -> None:
        """Cut each connection that is open when so many bytes more went to its client."""
        for connection in self._connections:
            connection.cut_at = bytes_down

    def freeze(self, *, discard: bool = False, newcomers: bool = True) -> None:
        """Keep every connection open and let nothing pass, not even that a side closed.

        Args:
            discard: Read and forget what is sent meanwhile, so that no sender is held up; a connection that
                lost something so is reset as it thaws. Otherwise nothing is read, and all of it passes then.
            newcomers: Whether it befalls connections to come as well: they are accepted and hear nothing.
                If not, those open now are as dead as for a client that moved to another network.
        """
        frost = Frost.DISCARD if discard else Frost.HOLD
        self._frost = Frost.HOLD if newcomers else Frost.NONE
        for connection in self._connections:
            connection.frost = frost

    def thaw(self) -> None:
        """End the frost; what piled up passes, in order."""
        self._frost = Frost.NONE
        for connection in list(self._connections):
            connection.thaw()

    def refuse(self) -> None:
        """Reset connections as they come."""
        self._refuses = True

    def accept(self) -> None:
        """Take them again."""
        self._refuses = False

    def weather(
        self,
        seed: int,
        *,
        pauses: tuple[float, float] = (0.05, 0.4),
        lengths: tuple[float, float] = (0.02, 0.3),
        longest_delay_seconds: float = 0.05,
        kinds: tuple[Kind, ...] = KINDS,
    ) -> None:
        """Faults, one after the other, until :meth:`calm`: the same ones for the same arguments.

        Those that only befall new connections cut all others as they begin.

        Args:
            seed: Of the dice.
            pauses: Shortest and longest calm between faults, in seconds.
            lengths: Shortest and longest fault.
            longest_delay_seconds: Of the fault ``delay``.
            kinds: Those to choose from.
        """
        assert self._weather is None, "unable to have two weathers; be calm first"
        faults = forecast(random.Random(seed), pauses, lengths, kinds)
        self._weather = asyncio.create_task(
            Weather(self, longest_delay_seconds).befall(faults), name="network-weather"
        )

    async def calm(self) -> None:
        """End the weather; all is then as it was set before.

        Raises:
            Exception: The weather failed by itself.
        """
        weather, self._weather = self._weather, None
        if weather is not None:
            weather.cancel()
            (failure,) = await asyncio.gather(weather, return_exceptions=True)
            if isinstance(failure, Exception):
                raise failure

    def count(self, **more: int) -> None:
        """For connections: something happened."""
        for name, number in more.items():
            setattr(self, name, getattr(self, name) + number)
        self._changed.set()

    def forget(self, connection: Connection) -> bool:
        """For a connection: it ends; returns whether it was open."""
        was_open = connection in self._connections
        self._connections.discard(connection)
        self._changed.set()
        return was_open

    def look_again(self) -> None:
        """A control was changed."""
        for connection in list(self._connections):
            connection.look_again()

    def _take(self, client: socket.socket) -> None:
        client.setblocking(False)  # noqa: FBT003 - positional only
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._refuses:
            close_socket(client, reset=True)
            self.count(refused=1)
            return
        connection = Connection(self, client, self._frost)
        self._connections.add(connection)
        self._tasks.add(connection.task)
        connection.task.add_done_callback(self._ended)
        if self._armed:
            connection.cut_at, connection.cut_resets = self._armed.popleft()
        self.count(accepted=1)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            self._tasks.discard(task)  # one that failed is told of at the end
