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
import contextlib
import os
import random
import socket
import struct
from collections import deque
from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Self, TypeVar, get_args, overload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT_SECONDS = 15.0

READ_BYTES = 64 * 1024

HEAD_BYTES = 64 * 1024
"""A head, or another line of HTTP, that is longer is none: its connection is passed through unseen."""

HELD_BYTES = 16 * 1024 * 1024
"""Most that is held back of one response; one that is longer passes from there on, as nginx does it."""

DRAIN_READS = 64
"""A socket closed with bytes unread would send a reset instead of what was written."""

TORN_BYTES = 400
"""A torn connection of the weather still passes this many bytes at most."""

REFUSAL = (
    b"HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\n"
    b"Content-Length: 8\r\nConnection: close\r\n\r\nblocked\n"
)

T = TypeVar("T")

BlockedUpgrades = Literal["refuse", "swallow"]

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


class Frost(Enum):
    """What a connection does."""

    NONE = auto()
    HOLD = auto()
    DISCARD = auto()


class Mark(Flag):
    """What a piece of HTTP ends."""

    NOTHING = 0
    HEAD = auto()
    MESSAGE = auto()


class Part(Enum):
    """Where in the HTTP of one direction we are; the first three are made of lines."""

    HEAD = auto()
    CHUNK_SIZE = auto()
    TRAILERS = auto()
    CHUNK = auto()
    BODY = auto()
    REST = auto()


class Head:
    """A head of a request or a response."""

    def __init__(self, lines: list[bytes]) -> None:
        self.first, *_ = first, *rest = [line.decode("latin-1") for line in lines]
        self.words = [*first.split(" ", 2), "", ""]
        self._fields: dict[str, str] = {}
        for line in rest:
            name, _, value = line.partition(":")
            self._fields[name.strip().lower()] = value.strip().lower()

    @property
    def is_upgrade(self) -> bool:
        """Whether a request asks for a WebSocket."""
        return "websocket" in self._fields.get("upgrade", "")

    @property
    def is_stream(self) -> bool:
        """Whether a response is made of Server-Sent Events."""
        return self._fields.get("content-type", "").startswith("text/event-stream")

    def body(self, *, unsaid: int | None) -> int | None:
        """How many bytes follow; -1 for chunks, ``None`` for all that come.

        Raises:
            ValueError: It is no head of HTTP.
        """
        if not any(word.startswith("HTTP/1.") for word in self.words):
            raise ValueError(self.first)
        if "chunked" in self._fields.get("transfer-encoding", ""):
            return -1
        length = self._fields.get("content-length")
        return unsaid if length is None else _number(length, 10)


def _number(text: str, base: int) -> int:
    if not text.isalnum():  # Python would take signs and underscores
        raise ValueError(text)
    return int(text, base)


class Framing:
    """Finds the heads and the ends of the messages in one direction of a connection, cut anywhere.

    Args:
        body_of: Says what follows a head, as :meth:`Head.body`.
    """

    def __init__(self, body_of: Callable[[Head], int | None]) -> None:
        self.part = Part.HEAD
        self.head = Head([b""])
        self._body_of = body_of
        self._line = b""
        self._lines: list[bytes] = []
        self._left = 0

    @property
    def within_head(self) -> bool:
        """Whether a head has begun and not ended."""
        return self.part is Part.HEAD and bool(self._line or self._lines)

    def feed(self, data: bytes) -> Iterator[tuple[bytes, Mark]]:
        """Cut bytes into pieces, each with what ends with it."""
        start = 0
        while start < len(data):
            end = self._end_of_piece(data, start)
            piece, start = data[start:end], end
            try:
                mark = self._take(piece)
            except ValueError:
                self.part, mark = Part.REST, Mark.NOTHING
            yield piece, mark

    def _end_of_piece(self, data: bytes, start: int) -> int:
        if self.part is Part.REST:
            return len(data)
        if self.part in {Part.BODY, Part.CHUNK}:
            return min(start + self._left, len(data))
        return data.find(b"\n", start) + 1 or len(data)

    def _take(self, piece: bytes) -> Mark:
        match self.part:
            case Part.REST:
                return Mark.NOTHING
            case Part.BODY | Part.CHUNK:
                return self._take_bytes(len(piece))
            case _:
                self._line += piece
                if len(self._line) + sum(map(len, self._lines)) > HEAD_BYTES:
                    raise ValueError(self.part)
                if not piece.endswith(b"\n"):
                    return Mark.NOTHING
                line, self._line = self._line.strip(), b""
                return self._take_line(line)

    def _take_bytes(self, count: int) -> Mark:
        self._left -= count
        if self._left:
            return Mark.NOTHING
        if self.part is Part.CHUNK:
            self.part = Part.CHUNK_SIZE
            return Mark.NOTHING
        self.part = Part.HEAD
        return Mark.MESSAGE

    def _take_line(self, line: bytes) -> Mark:
        match self.part:
            case Part.HEAD if line:
                self._lines.append(line)
            case Part.HEAD if self._lines:
                return self._end_head()
            case Part.CHUNK_SIZE:
                size = _number(line.split(b";")[0].decode("latin-1").strip(), 16)
                self._left = size + len(b"\r\n")
                self.part = Part.CHUNK if size else Part.TRAILERS
            case Part.TRAILERS if not line:
                self.part = Part.HEAD
                return Mark.MESSAGE
            case _:
                pass
        return Mark.NOTHING

    def _end_head(self) -> Mark:
        self.head, self._lines = Head(self._lines), []
        match self._body_of(self.head):
            case None:
                self.part = Part.REST
            case 0:
                return Mark.HEAD | Mark.MESSAGE
            case -1:
                self.part = Part.CHUNK_SIZE
            case length:
                self.part, self._left = Part.BODY, length
        return Mark.HEAD


class _UpgradeBlockedError(Exception):
    """A request for a WebSocket has come, and is not to pass."""


class _Http:
    """What is known of the HTTP in one connection, and what of it is held back."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._methods: deque[str] = deque()
        self._requests = Framing(lambda head: head.body(unsaid=0))
        self._responses = Framing(self._body_of_response)
        self._held_up = bytearray()
        self._held_down = bytearray()
        self._holds_stream = False

    def up(self, data: bytes) -> bytes:
        """Take bytes of the client; returns those that may pass.

        Raises:
            _UpgradeBlockedError: And nothing of this may.
        """
        for piece, mark in self._requests.feed(data):
            self._held_up += piece
            if Mark.HEAD in mark:
                self._methods.append(self._requests.head.words[0])
                if self._requests.head.is_upgrade and self._network.block_upgrades:
                    raise _UpgradeBlockedError
        if data and self._network.block_upgrades and self._requests.within_head:
            return b""
        passing, self._held_up = bytes(self._held_up), bytearray()
        return passing

    def down(self, data: bytes) -> bytes:
        """Take bytes of the gateway; returns those that may pass, all there are at its end (``b""``)."""
        passing = bytearray()
        for piece, mark in self._responses.feed(data):
            self._held_down += piece
            if Mark.HEAD in mark and self._network.buffer_streams and self._responses.head.is_stream:
                self._holds_stream = True
                self._network.count(streams_held=1)
            if Mark.MESSAGE in mark or len(self._held_down) > HELD_BYTES:
                self._holds_stream = False
            passing += self._free()
        if not data:
            self._holds_stream = False
            passing += self._held_down
            self._held_down.clear()
        return bytes(passing)

    def freed(self) -> bytes:
        """What is held back of a response although nothing says so any more."""
        self._holds_stream &= self._network.buffer_streams
        return bytes(self._free())

    def freed_up(self) -> bytes:
        """The same of a request."""
        return b"" if self._network.block_upgrades else self.up(b"")

    def _free(self) -> bytearray:
        if self._holds_stream or (self._network.buffer_streams and self._responses.within_head):
            return bytearray()
        passing, self._held_down = self._held_down, bytearray()
        return passing

    def _body_of_response(self, head: Head) -> int | None:
        status = head.words[1]
        if status == "101":
            self._requests.part = Part.REST
            return None
        if status.startswith("1"):
            return 0
        method = self._methods.popleft() if self._methods else ""
        return 0 if method == "HEAD" or status in {"204", "304"} else head.body(unsaid=None)


@dataclass
class _Way:
    """One direction of a connection."""

    name: Literal["up", "down"]
    source: socket.socket
    sink: socket.socket
    look: Callable[[bytes], bytes]
    freed: Callable[[], bytes]


class Connection:
    """One connection of a client, and the one made for it.

    Attributes:
        frost: What it does; ``thaw`` ends it.
        cut_at: After how many more bytes to the client it is cut; ``None`` for never.
        cut_resets: How.
        swallowed: Whether its request was read and is never answered.
    """

    def __init__(self, network: Network, client: socket.socket, frost: Frost) -> None:
        self.frost = frost
        self.cut_at: int | None = None
        self.cut_resets = True
        self.swallowed = False
        self.lost = False
        self._network = network
        self._loop = asyncio.get_running_loop()
        self._client = client
        self._target = _socket()
        self._waiting: set[asyncio.Future[None]] = set()
        self._carried_at = self._loop.time()
        self._idle_timer: asyncio.TimerHandle | None = None
        self.task = asyncio.create_task(self._run(), name="network-connection")

    def look_again(self) -> None:
        """A control was changed."""
        for waiting in self._waiting:
            _resolve(waiting)
        self._watch_idle()

    def thaw(self) -> None:
        """Pass what has piled up; a connection of which something was lost cannot go on."""
        if self.frost is Frost.NONE:
            return
        self.frost = Frost.NONE
        self._carried_at = self._loop.time()
        if self.lost:
            self.cut(reset=True)
        else:
            self.look_again()

    def cut(self, *, reset: bool) -> None:
        """End it, as a fault."""
        if self.close(reset=reset):
            self._network.count(cuts=1)

    def close(self, *, reset: bool) -> bool:
        """End it at once, both sides of it; returns whether it was open."""
        if not self._network.forget(self):
            return False
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        for end in (self._client, self._target):
            self._close(end, reset=reset)
        self.task.cancel()
        return True

    async def _run(self) -> None:
        http = _Http(self._network)
        up = _Way("up", self._client, self._target, http.up, http.freed_up)
        down = _Way("down", self._target, self._client, http.down, http.freed)
        try:
            self._watch_idle()
            await self._connect()
            async with asyncio.TaskGroup() as ways:
                self._downwards = ways.create_task(self._pump(down), name="network-down")
                ways.create_task(self._pump(up), name="network-up")
        except* OSError:  # a peer reset its side: the other one learns it
            self.close(reset=True)
        finally:
            self.close(reset=False)

    async def _connect(self) -> None:
        """Raises OSError, when nobody listens."""
        await self._thawed()
        host, _, port = self._network.target.rpartition(":")
        with contextlib.suppress(BlockingIOError):
            self._target.connect((host, int(port)))
        while True:
            await self._wait(self._target, writing=True)
            await self._thawed()
            if error := self._target.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, os.strerror(error))
            with contextlib.suppress(OSError):  # not yet: a control was changed
                self._target.getpeername()
                return

    async def _pump(self, way: _Way) -> None:
        ended = False
        while not ended:
            await self._write(way, way.freed())
            data = await self._read(way)
            if data is None:
                continue
            ended = not data
            try:
                passing = way.look(data)
            except _UpgradeBlockedError:
                await self._block_upgrade()
                return
            await self._delay()
            await self._write(way, passing)
        await self._thawed()
        with contextlib.suppress(OSError):  # the sink may have gone by itself
            way.sink.shutdown(socket.SHUT_WR)

    async def _read(self, way: _Way) -> bytes | None:
        """What has come, ``b""`` at its end; ``None``: look again."""
        await self._wait(None if self.frost is Frost.HOLD else way.source)
        if self.frost is Frost.HOLD:
            return None
        try:
            data = way.source.recv(READ_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            if self.frost is Frost.NONE:
                raise
            self.lost, data = True, b""
        if self.frost is Frost.DISCARD and data:
            self.lost = True
            return None
        self._note(way, len(data))
        return data

    async def _write(self, way: _Way, data: bytes) -> None:
        while data:
            await self._thawed()
            piece = data[: self._network.split or len(data)]
            if way.name == "down" and self.cut_at is not None:
                piece = piece[: self.cut_at]
            try:
                sent = way.sink.send(piece)
            except BlockingIOError:
                await self._wait(way.sink, writing=True)
                continue
            data = data[sent:]
            if way.name == "down" and self.cut_at is not None:
                self.cut_at -= sent
                if not self.cut_at:
                    self.cut(reset=self.cut_resets)
                    return
            if self._network.split:
                await asyncio.sleep(0)  # whoever reads on this loop gets the pieces one by one

    async def _delay(self) -> None:
        came = self._loop.time()
        while (left := came + self._network.delay_seconds - self._loop.time()) > 0:
            await self._wait(None, seconds=left)

    async def _block_upgrade(self) -> None:
        self._downwards.cancel()
        await asyncio.wait({self._downwards})
        swallows = self._network.block_upgrades == "swallow"
        self._network.count(upgrades_blocked=1)
        self._close(self._target, reset=False)
        if not swallows:
            await self._write(_Way("up", self._client, self._client, bytes, bytes), REFUSAL)
            return
        self.swallowed = True
        while True:
            await self._wait(None if self.frost is Frost.HOLD else self._client)
            with contextlib.suppress(BlockingIOError):
                if self.frost is not Frost.HOLD and not self._client.recv(READ_BYTES):
                    return

    async def _thawed(self) -> None:
        while self.frost is not Frost.NONE:
            await self._wait(None)

    async def _wait(
        self, ready: socket.socket | None, *, writing: bool = False, seconds: float | None = None
    ) -> None:
        """Until the socket is ready, or that time has passed, or a control was changed."""
        if ready is not None and ready.fileno() < 0:
            raise ConnectionAbortedError
        waiting = self._loop.create_future()
        self._waiting.add(waiting)
        timer = None if seconds is None else self._loop.call_later(seconds, _resolve, waiting)
        if ready is not None:
            watch = self._loop.add_writer if writing else self._loop.add_reader
            watch(ready.fileno(), _resolve, waiting)
        try:
            await waiting
        finally:
            self._waiting.discard(waiting)
            if timer is not None:
                timer.cancel()
            if ready is not None and ready.fileno() >= 0:
                unwatch = self._loop.remove_writer if writing else self._loop.remove_reader
                unwatch(ready.fileno())

    def _note(self, way: _Way, count: int) -> None:
        self._carried_at = self._loop.time()
        if way.name == "up":
            self._network.count(bytes_up=count)
        else:
            self._network.count(bytes_down=count)

    def _watch_idle(self) -> None:
        """Cut it if it has been silent for too long; else look again when it would be."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._network.idle_seconds is None or self.frost is not Frost.NONE:
            return
        due = self._carried_at + self._network.idle_seconds
        if self._loop.time() < due:
            self._idle_timer = self._loop.call_at(due, self._watch_idle)
        elif self.close(reset=False):
            self._network.count(idle_cuts=1)

    def _close(self, end: socket.socket, *, reset: bool) -> None:
        if end.fileno() >= 0:
            self._loop.remove_reader(end.fileno())
            self._loop.remove_writer(end.fileno())
            _close(end, reset=reset)


def _resolve(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setblocking(False)  # noqa: FBT003 - positional only
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _close(end: socket.socket, *, reset: bool) -> None:
    with contextlib.suppress(OSError):  # its peer may have gone first
        if reset:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            end.shutdown(socket.SHUT_WR)
            for _ in range(DRAIN_READS):
                if not end.recv(READ_BYTES):
                    break
    end.close()


class _Control(Generic[T]):
    """A setting that every open connection looks at when it is set."""

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type[Network], name: str) -> None:
        self._name = f"_{name}"

    @overload
    def __get__(self, network: None, owner: type[Network]) -> Self: ...
    @overload
    def __get__(self, network: Network, owner: type[Network]) -> T: ...
    def __get__(self, network: Network | None, owner: type[Network]) -> T | Self:
        return self if network is None else getattr(network, self._name, self._default)

    def __set__(self, network: Network, value: T) -> None:
        setattr(network, self._name, value)
        network.look_again()


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

    delay_seconds = _Control(0.0)
    """Each chunk takes so much longer in each direction; a chunk is what can be read at once."""

    split = _Control[int | None](None)
    """Most bytes of one write."""

    block_upgrades = _Control[BlockedUpgrades | None](None)
    """What happens to requests for a WebSocket whose head comes from now on: a `403`, or nothing ever."""

    buffer_streams = _Control(False)  # noqa: FBT003 - a default
    """Hold responses of Server-Sent Events that begin from now on back until they end; unset, they pass."""

    idle_seconds = _Control[float | None](None)
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
        self._accepting = asyncio.create_task(self._accept(), name="network-accept")
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
        faults = _forecast(random.Random(seed), pauses, lengths, kinds)
        self._weather = asyncio.create_task(
            self._befall(faults, longest_delay_seconds), name="network-weather"
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

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            waiting = loop.create_future()
            loop.add_reader(self._listener.fileno(), _resolve, waiting)
            try:
                await waiting
            finally:
                loop.remove_reader(self._listener.fileno())
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                continue  # it has gone again
            # In the same step: a task that is ended in between would lose it.
            self._take(client)

    def _take(self, client: socket.socket) -> None:
        client.setblocking(False)  # noqa: FBT003 - positional only
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._refuses:
            _close(client, reset=True)
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

    async def _befall(self, faults: Iterator[Fault], longest_delay_seconds: float) -> None:
        for fault in faults:
            await asyncio.sleep(fault.pause_seconds)
            self.faults.append(fault)
            self._changed.set()
            with contextlib.ExitStack() as ends:
                self._begin(fault, longest_delay_seconds, ends)
                await asyncio.sleep(fault.seconds)

    def _begin(self, fault: Fault, longest_delay_seconds: float, ends: contextlib.ExitStack) -> None:
        match fault.kind:
            case "reset" | "close":
                self.cut(reset=fault.kind == "reset")
            case "tear":
                self._tear(1 + int(fault.strength * TORN_BYTES), ends)
            case "freeze" | "sleep":
                ends.callback(self.thaw)
                self.freeze(discard=fault.kind == "sleep")
            case "delay":
                self._set(ends, delay_seconds=fault.strength * longest_delay_seconds)
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
        self.cut()

    def _set(self, ends: contextlib.ExitStack, **controls: Any) -> None:
        for name, value in controls.items():
            ends.callback(setattr, self, name, getattr(self, name))
            setattr(self, name, value)

    def _tear(self, bytes_down: int, ends: contextlib.ExitStack) -> None:
        torn = set(self._connections)
        self.tear(bytes_down=bytes_down)
        ends.callback(self._cut_those, torn.__contains__)

    def _cut_those(self, which: Callable[[Connection], bool]) -> None:
        for connection in [each for each in self._connections if which(each)]:
            connection.cut(reset=True)


def _forecast(
    dice: random.Random, pauses: tuple[float, float], lengths: tuple[float, float], kinds: tuple[Kind, ...]
) -> Iterator[Fault]:
    while True:
        yield Fault(
            kind=dice.choice(kinds),
            pause_seconds=dice.uniform(*pauses),
            seconds=dice.uniform(*lengths),
            strength=dice.random(),
        )
