"""The connection to Redis: two ordered lanes, each one connection, each a pipelined write per loop turn.

Group commit: whatever is asked of a lane within one turn of the event loop leaves in one write, in the order
it was asked, and the next write waits for the replies of the last. So all turns of a node share one round
trip, and a lane under load makes bigger batches instead of more of them.

redis-py connects, authenticates and parses. It does not retry (it would repeat writes, FAULTS R1) and its
timeouts are off: one deadline stands around each batch. A batch whose replies did not all come fails whole,
with an unknown outcome; every script of ours may be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import deque
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Self, cast

import structlog
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from gateway.core.model import GatewayError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis.asyncio.connection import AbstractConnection

log = structlog.get_logger(__name__)

Argument = bytes | str | int

OPERATION_TIMEOUT_SECONDS = 2.0
"""A batch takes well below 10 ms; Redis frozen for longer is an outage, and callers have their own policy."""

MAX_BATCH_BYTES = 4 * 1024 * 1024
"""A write on one connection; what is over it waits for the next."""


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
        self._calls: deque[_Call] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to serve calls; :meth:`close` ends it."""
        self._task = asyncio.create_task(self._run(), name=f"store-{self._name}")

    async def close(self) -> None:
        """End the lane; calls that wait fail."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._fail(list(self._calls), StoreUnavailable("unable to use the store; the gateway is stopping"))
        self._calls.clear()
        await self._disconnect()

    def call(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> asyncio.Future[Any]:
        """Ask for a script to be run, after all that was asked before.

        Returns:
            A future of the reply: nested lists of ``bytes`` and ``int``. It fails with
            :class:`StoreUnavailable` or :class:`StoreError`. Cancelling it does not take the call back.
        """
        packed = _pack("EVALSHA", script.sha, len(keys), *keys, *arguments)
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls.append(_Call(script, packed, sum(map(len, packed)), reply))
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
                    await self._disconnect()
                    log.warning(
                        "store.unavailable", lane=self._name, error=str(error) or type(error).__name__
                    )
                    self._fail(batch, StoreUnavailable("unable to use the store; it does not answer"))
                except asyncio.CancelledError:
                    self._fail(batch, StoreUnavailable("unable to use the store; the gateway is stopping"))
                    raise

    def _take(self) -> list[_Call]:
        batch: list[_Call] = []
        size = 0
        while self._calls and (not batch or size + self._calls[0].size <= MAX_BATCH_BYTES):
            batch.append(self._calls.popleft())
            size += batch[-1].size
        return batch

    async def _perform(self, batch: list[_Call]) -> None:
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
        await connection.connect()  # type: ignore[no-untyped-call]
        self._connection = connection
        await self._load(connection)
        return connection

    async def _load(self, connection: AbstractConnection) -> None:
        for script in self._scripts:
            await connection.send_packed_command(_pack("SCRIPT", "LOAD", script.source), check_health=False)
            await connection.read_response()

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
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


_CANNOT_WRITE_NOW = (
    "OOM", "LOADING", "READONLY", "MISCONF", "NOREPLICAS", "BUSY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN",
)  # fmt: skip


def _explained(script: Script, error: ResponseError) -> GatewayError:
    text = str(error)
    log.error("store.refused", script=script.name, error=text)
    if text.startswith(_CANNOT_WRITE_NOW) or "OOM" in text or "READONLY" in text:
        return StoreUnavailable("unable to use the store; it cannot write now")
    return StoreError(f"unable to run {script.name}; the store refused it")


def _pack(*arguments: Argument) -> list[bytes]:
    """A command as the protocol writes it; large arguments are not copied."""
    head: list[bytes] = []
    parts: list[bytes] = []
    head.append(b"*%d\r\n" % len(arguments))
    for argument in arguments:
        data = argument if isinstance(argument, bytes) else str(argument).encode()
        head.append(b"$%d\r\n" % len(data))
        if len(data) > 16_384:  # noqa: PLR2004 - below it a copy is cheaper than a part
            parts += (b"".join(head), data)
            head = [b"\r\n"]
        else:
            head += (data, b"\r\n")
    parts.append(b"".join(head))
    return parts


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
