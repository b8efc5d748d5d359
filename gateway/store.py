"""The connection to Redis: two ordered lanes, each one connection, each a pipelined write per loop turn.

Group commit: whatever is asked of a lane within one turn of the event loop leaves in one write, in the order
it was asked, and the next write waits for the replies of the last. So all turns of a node share one round
trip, and a lane under load makes bigger batches instead of more of them.

redis-py connects, authenticates and parses. It does not retry (it would repeat writes, FAULTS R1) and its
timeouts are off: one deadline stands around each batch. A batch whose replies did not all come fails, with an
unknown outcome, and its connection is dropped, so that no late reply is taken for another call's. Every
script of ours may be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
from collections import deque
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Self, cast

import structlog
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    MasterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from gateway.core.model import GatewayError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis.asyncio.connection import AbstractConnection

log = structlog.get_logger(__name__)

Argument = bytes | str | int

OPERATION_TIMEOUT_SECONDS = 2.0
"""A batch takes well below 10 ms; Redis frozen for longer is an outage, and callers have their own policy."""

MAX_BATCH_BYTES = 4 * 1024 * 1024
"""A write on one connection, and the replies expected to it; what is over it waits for the next."""


class StoreUnavailable(GatewayError):
    """The store did not answer, or cannot write now. Whether it acted is unknown: repeat the same call."""


class StoreError(GatewayError):
    """The store answered that the call itself is wrong: a bug of ours, or a server that is too old."""


@dataclass(frozen=True, slots=True)
class Script:
    """One Lua script.

    Attributes:
        name: Its file.
        source: With what all scripts share in front.
        sha: What EVALSHA calls it.
    """

    name: str
    source: bytes
    sha: str


def load_script(name: str) -> Script:
    """Read ``gateway/lua/<name>.lua``, with ``common.lua`` pasted below its ``#!lua`` line."""
    folder = files("gateway") / "lua"
    shebang, _, body = (folder / f"{name}.lua").read_text().partition("\n")
    source = "\n".join((shebang, (folder / "common.lua").read_text(), body)).encode()
    return Script(name, source, hashlib.sha1(source, usedforsecurity=False).hexdigest())


@dataclass(slots=True)
class _Call:
    script: Script
    packed: list[bytes]
    size: int
    asked_at: float
    reply: asyncio.Future[Any]


class Lane:
    """One connection whose calls keep their order.

    Args:
        pool: Makes connections; the lane holds one.
        name: For logs and the task.
        scripts: Loaded on every new connection, so that NOSCRIPT stays an exception.
    """

    def __init__(self, pool: ConnectionPool, name: str, scripts: Sequence[Script]) -> None:
        self._pool = pool
        self._name = name
        self._scripts = scripts
        self._connection: AbstractConnection | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._calls: deque[_Call] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def start(self) -> None:
        """Begin to serve calls; :meth:`close` ends it."""
        self._task = asyncio.create_task(self._run(), name=f"store-{self._name}")

    async def close(self) -> None:
        """End the lane; calls that wait fail, and so do later ones."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._fail(list(self._calls), _stopping())
        self._calls.clear()
        await self._drop()

    def call(
        self, script: Script, keys: Sequence[str], arguments: Sequence[Argument], *, reply_bytes: int = 0
    ) -> asyncio.Future[Any]:
        """Ask for a script to be run, after all that was asked before.

        Args:
            script: One of those that the lane loads.
            keys: All in one slot.
            arguments: What it takes.
            reply_bytes: What the reply may hold, where that is much; it counts towards the batch.

        Returns:
            A future of the reply: nested lists of ``bytes`` and ``int``. It fails with
            :class:`StoreUnavailable` or :class:`StoreError`. Cancelling it does not take the call back.
        """
        packed = _pack(2 + len(keys) + len(arguments), _called(script.sha, tuple(keys)), arguments)
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Any] = loop.create_future()
        call = _Call(script, packed, sum(map(len, packed)) + reply_bytes, loop.time(), reply)
        if self._closed:
            self._fail([call], _stopping())
        else:
            self._calls.append(call)
            self._wake.set()
        return reply

    def tell(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> None:
        """As :meth:`call`, for what may be lost: nobody waits for the reply."""
        self.call(script, keys, arguments).add_done_callback(_look_away)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._calls:
                batch = self._take()
                try:
                    async with asyncio.timeout(OPERATION_TIMEOUT_SECONDS):
                        await self._perform(batch)
                except (RedisError, OSError, TimeoutError) as error:
                    await self._drop()
                    log.warning(
                        "store.unavailable", lane=self._name, error=str(error) or type(error).__name__
                    )
                    self._fail(
                        batch + self._take_overdue(),
                        StoreUnavailable("unable to use the store; it does not answer"),
                    )
                except asyncio.CancelledError:
                    self._fail(batch, _stopping())
                    raise
                except Exception:
                    # A bug; but a lane that died of it would leave all later callers waiting for ever.
                    await self._drop()
                    log.exception("store.failed", lane=self._name)
                    self._fail(batch, StoreError("unable to use the store; the gateway has a bug"))

    def _take(self) -> list[_Call]:
        batch: list[_Call] = []
        size = 0
        while self._calls and (not batch or size + self._calls[0].size <= MAX_BATCH_BYTES):
            batch.append(self._calls.popleft())
            size += batch[-1].size
        return batch

    def _take_overdue(self) -> list[_Call]:
        """What waited behind a batch that failed and is itself past the deadline: no call waits for many."""
        limit = asyncio.get_running_loop().time() - OPERATION_TIMEOUT_SECONDS
        overdue: list[_Call] = []
        while self._calls and self._calls[0].asked_at <= limit:
            overdue.append(self._calls.popleft())
        return overdue

    async def _perform(self, batch: list[_Call]) -> None:
        if self._connection is not None and await self._connection.can_read():
            # Nothing was asked: the server closed it while it was idle. A new one costs no caller an error.
            await self._drop()
        connection = self._connection or await self._connect()
        missing = await self._exchange(connection, batch)
        if missing:
            # SCRIPT FLUSH, or a server that was replaced: load, and send again from there.
            await self._load(connection)
            for call in await self._exchange(connection, missing):
                _resolve(call, StoreError(f"unable to run {call.script.name}; the store forgets its scripts"))

    async def _exchange(self, connection: AbstractConnection, batch: list[_Call]) -> list[_Call]:
        await connection.send_packed_command(
            [part for call in batch for part in call.packed], check_health=False
        )
        missing = []
        for call in batch:
            try:
                _resolve(call, await connection.read_response(disable_decoding=True))
            except NoScriptError:
                missing.append(call)
            except ResponseError as error:
                _resolve(call, _explained(call.script, error))
        return missing

    async def _connect(self) -> AbstractConnection:
        connection = cast("AbstractConnection", self._pool.make_connection())  # type: ignore[no-untyped-call]
        self._connection = connection  # first, so that it is dropped if the deadline comes while it connects
        await connection.connect()  # type: ignore[no-untyped-call]
        writer = connection._writer  # noqa: SLF001 - redis-py can only close it in a way that waits for the peer
        self._transport = None if writer is None else writer.transport
        await self._load(connection)
        return connection

    async def _load(self, connection: AbstractConnection) -> None:
        await connection.send_packed_command(
            [part for script in self._scripts for part in _pack(2, _LOAD, (script.source,))],
            check_health=False,
        )
        for _ in self._scripts:
            await connection.read_response()

    async def _drop(self) -> None:
        """Close the connection without a word: what is still unwritten must not be kept, or written later.

        redis-py has closed it already when an operation was broken off, but would write the rest first.
        """
        connection, self._connection = self._connection, None
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
        if connection is not None:
            await connection.disconnect(nowait=True)

    @staticmethod
    def _fail(calls: list[_Call], error: GatewayError) -> None:
        for call in calls:
            _resolve(call, error)


def _look_away(reply: asyncio.Future[Any]) -> None:
    if not reply.cancelled():
        reply.exception()  # retrieved, and logged by the lane


def _resolve(call: _Call, outcome: object) -> None:
    if call.reply.done():  # its caller went away; the call was carried out all the same
        return
    if isinstance(outcome, GatewayError):
        call.reply.set_exception(outcome)
    else:
        call.reply.set_result(outcome)


_CANNOT_WRITE_NOW = (OutOfMemoryError, ReadOnlyError, MasterDownError, ClusterDownError, TryAgainError)
"""redis-py takes the code off these errors' text; those below have no class of their own."""

_CANNOT_WRITE_NOW_CODES = ("MISCONF", "NOREPLICAS", "BUSY", "UNKILLABLE")


def _explained(script: Script, error: ResponseError) -> GatewayError:
    text = str(error)
    log.error("store.refused", script=script.name, error=text)
    if isinstance(error, _CANNOT_WRITE_NOW) or text.startswith(_CANNOT_WRITE_NOW_CODES):
        return StoreUnavailable("unable to use the store; it cannot write now")
    return StoreError(f"unable to run {script.name}; the store refused it")


def _stopping() -> StoreUnavailable:
    return StoreUnavailable("unable to use the store; the gateway is stopping")


def _pack(count: int, command: bytes, arguments: Sequence[Argument]) -> list[bytes]:
    """A command as the protocol writes it; large arguments are not copied.

    Args:
        count: Of the arguments, and of what stands in ``command`` behind its name.
        command: Its name and its first arguments, packed.
        arguments: The rest.
    """
    head: list[bytes] = [b"*%d\r\n" % (1 + count), command]
    parts: list[bytes] = []
    for argument in arguments:
        if not isinstance(argument, bytes):
            head.append(_packed(argument))
        elif len(argument) <= 16_384:  # noqa: PLR2004 - below it a copy is cheaper than a part
            head.append(b"$%d\r\n%b\r\n" % (len(argument), argument))
        else:
            head.append(b"$%d\r\n" % len(argument))
            parts += (b"".join(head), argument)
            head = [b"\r\n"]
    parts.append(b"".join(head))
    return parts


@functools.lru_cache(maxsize=8192)
def _packed(argument: str | int) -> bytes:
    """Kept: a turn sends the same ids and words with each append. What may be long comes as bytes."""
    data = str(argument).encode()
    return b"$%d\r\n%b\r\n" % (len(data), data)


_LOAD = _packed("SCRIPT") + _packed("LOAD")


@functools.lru_cache(maxsize=4096)
def _called(sha: str, keys: tuple[str, ...]) -> bytes:
    """The head of an EVALSHA; a turn's appends all have the same one."""
    return b"".join(map(_packed, ("EVALSHA", sha, len(keys), *keys)))


class Store:
    """Redis or Valkey, as the journal uses it.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``.
        scripts: All that will be called.

    Attributes:
        writes: The one ordered writer.
        reads: Its own connection, so that catching up does not stand in the way of appending.
    """

    def __init__(self, url: str, scripts: Sequence[Script]) -> None:
        self._pool = ConnectionPool.from_url(
            url,
            socket_timeout=None,
            socket_connect_timeout=OPERATION_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
            health_check_interval=0,
            protocol=2,
            client_name="session-gateway",
        )
        self.writes = Lane(self._pool, "writes", scripts)
        self.reads = Lane(self._pool, "reads", scripts)

    async def __aenter__(self) -> Self:
        self.writes.start()
        self.reads.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.writes.close()
        await self.reads.close()
        await self._pool.aclose()
