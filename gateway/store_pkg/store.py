"""The connection to Redis: two ordered lanes, each one connection, each a pipelined write per loop turn.

Group commit: whatever is asked of a lane within one turn of the event loop leaves in one write, in the order
it was asked, and the next write waits for the replies of the last. So all turns of a node share one round
trip, and a lane under load makes bigger batches instead of more of them.

redis-py connects and authenticates. It does not retry (it would repeat writes, FAULTS R1) and its timeouts
are off: one deadline stands around each batch. A batch whose replies did not all come fails, with an unknown
outcome, and its connection is dropped, so that no late reply is taken for another call's. Every script of
ours may be repeated.

All of a lane runs in callbacks of the event loop, one after the other; only connecting is a task.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import hashlib
from collections import deque
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Self

import structlog
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from gateway.core.model import GatewayError
from gateway.pipeline import Argument, Pipeline, ReplyError, pack, packed

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Argument", "Lane", "Script", "Store", "StoreError", "StoreUnavailable", "load_script"]

log = structlog.get_logger(__name__)

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
    parts: list[bytes]
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
        self._loading = [part for script in scripts for part in pack(2, _LOAD, (script.source,))]
        self._loads: list[None] = [None] * len(scripts)
        self._pipeline: Pipeline | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._calls: deque[_Call] = deque()
        self._is_busy = True  # a batch is away, or about to leave; and before start()
        self._batch: list[_Call] = []
        self._unanswered: deque[_Call | None] = deque()  # None: a script that is loaded
        self._missing: list[_Call] = []
        self._may_load_again = False
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        # A connection keeps the context that it was made in; that must not be the first caller's.
        self._context = contextvars.copy_context()

    def start(self) -> None:
        """Begin to serve calls; :meth:`close` ends it."""
        self._next()

    async def close(self) -> None:
        """End the lane; calls that wait fail, and so do later ones."""
        self._is_closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting], timeout=OPERATION_TIMEOUT_SECONDS)
        if self._timer is not None:
            self._timer.cancel()
        self._drop()
        waiting = [*self._batch, *self._calls]
        self._batch = []
        self._calls.clear()
        self._fail(waiting, _stopping())

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
        parts = pack(2 + len(keys) + len(arguments), _called(script.sha, tuple(keys)), arguments)
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Any] = loop.create_future()
        call = _Call(script, parts, sum(map(len, parts)) + reply_bytes, loop.time(), reply)
        if self._is_closed:
            self._fail([call], _stopping())
            return reply
        self._calls.append(call)
        if not self._is_busy:
            self._next()
        return reply

    def tell(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> None:
        """As :meth:`call`, for what may be lost: nobody waits for the reply."""
        self.call(script, keys, arguments).add_done_callback(_look_away)

    def _next(self) -> None:
        """Send what waits; but only after all who run in this turn of the loop have asked too."""
        self._is_busy = bool(self._calls)
        if self._is_busy:
            asyncio.get_running_loop().call_soon(self._perform, context=self._context)

    def _perform(self) -> None:
        if self._is_closed:
            return
        loop = asyncio.get_running_loop()
        self._batch = self._take()
        self._deadline = loop.time() + OPERATION_TIMEOUT_SECONDS
        self._may_load_again = True
        if self._pipeline is not None and self._pipeline.is_closing:
            # The server closed it while nothing was asked. A new one costs no caller an error.
            self._drop()
        if self._pipeline is None:
            self._connecting = loop.create_task(self._connect(), name=f"store-{self._name}")
            return
        try:
            self._exchange(self._pipeline, self._batch)
        except Exception as error:  # noqa: BLE001 - a bug; to the event loop it would be a line in the log
            self._break(error)

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                self._pipeline = await Pipeline.connect(self._pool, self._answered, self._lose)
            self._exchange(self._pipeline, self._batch, load=True)
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            self._lose(error)
        except Exception as error:  # noqa: BLE001 - as above
            self._break(error)
        finally:
            self._connecting = None

    def _exchange(self, pipeline: Pipeline, calls: Sequence[_Call], *, load: bool = False) -> None:
        self._unanswered.extend(self._loads if load else ())
        self._unanswered.extend(calls)
        parts = [part for call in calls for part in call.parts]
        pipeline.write([*self._loading, *parts] if load else parts)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_at(self._deadline, self._look_at_deadline)

    def _look_at_deadline(self) -> None:
        """One timer for many batches: most end long before it fires, and it is set anew for the one away."""
        self._timer = None
        if not self._unanswered:  # nothing is away, or its connection is being made, which has the deadline
            return
        loop = asyncio.get_running_loop()
        if loop.time() < self._deadline:
            self._timer = loop.call_at(self._deadline, self._look_at_deadline)
        else:
            self._lose(TimeoutError("the deadline passed"))

    def _answered(self, replies: list[Any]) -> None:
        try:
            for reply in replies:
                self._take_reply(reply)
            if not self._unanswered:
                self._finish()
        except _UnusableConnection as error:
            self._lose(error)
        except Exception as error:  # noqa: BLE001 - as above
            self._break(error)

    def _take_reply(self, reply: object) -> None:
        if not self._unanswered:
            raise _UnusableConnection("the store said what nobody asked for")
        call = self._unanswered.popleft()
        if not isinstance(reply, ReplyError):
            if call is not None:
                _resolve(call, reply)
            return
        code = str(reply).partition(" ")[0]
        if call is None or code in _REFUSES_THE_CONNECTION:
            raise _UnusableConnection(str(reply))
        if code == "NOSCRIPT":
            self._missing.append(call)
        else:
            _resolve(call, _explained(call.script, reply, code))

    def _finish(self) -> None:
        missing, self._missing = self._missing, []
        if missing and self._may_load_again and self._pipeline is not None:
            # SCRIPT FLUSH, or a server that was replaced: load, and send again from there.
            self._may_load_again = False
            self._exchange(self._pipeline, missing, load=True)
            return
        for call in missing:
            _resolve(call, StoreError(f"unable to run {call.script.name}; the store forgets its scripts"))
        self._batch = []
        self._next()

    def _lose(self, error: Exception) -> None:
        """Give the batch up, and the connection with it."""
        self._drop()
        reason = str(error) or type(error).__name__
        if not self._batch:  # the next call gets a new one, and no error
            log.info("store.disconnected", lane=self._name, error=reason)
            return
        log.warning("store.unavailable", lane=self._name, error=reason)
        self._give_up(self._take_overdue(), StoreUnavailable("unable to use the store; it does not answer"))

    def _break(self, error: Exception) -> None:
        """End a batch that met a bug of ours: its callers, and all later ones, would wait for ever."""
        log.error("store.failed", lane=self._name, exc_info=error)
        self._drop()
        self._give_up([], StoreError("unable to use the store; the gateway has a bug"))

    def _give_up(self, more: list[_Call], error: GatewayError) -> None:
        failed, self._batch = self._batch + more, []
        self._fail(failed, error)
        if failed:  # otherwise no batch was away, and whoever asked next has seen to it
            self._next()

    def _drop(self) -> None:
        self._unanswered.clear()
        self._missing.clear()
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline.close()

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


_CANNOT_WRITE_NOW = frozenset(
    (
        "OOM",
        "READONLY",
        "MASTERDOWN",
        "CLUSTERDOWN",
        "TRYAGAIN",
        "MISCONF",
        "NOREPLICAS",
        "BUSY",
        "UNKILLABLE",
    )
)
"""The first words of errors that go away without our doing; the call itself is right."""

_REFUSES_THE_CONNECTION = frozenset(("LOADING", "NOAUTH", "WRONGPASS"))
"""All calls on this connection would get the same answer; a new one may be better."""


class _UnusableConnection(Exception):
    """What came means that replies and calls no longer match, or that none will be useful."""


def _explained(script: Script, error: ReplyError, code: str) -> GatewayError:
    log.error("store.refused", script=script.name, error=str(error))
    if code in _CANNOT_WRITE_NOW:
        return StoreUnavailable("unable to use the store; it cannot write now")
    return StoreError(f"unable to run {script.name}; the store refused it")


def _stopping() -> StoreUnavailable:
    return StoreUnavailable("unable to use the store; the gateway is stopping")


_LOAD = packed("SCRIPT") + packed("LOAD")


@functools.lru_cache(maxsize=4096)
def _called(sha: str, keys: tuple[str, ...]) -> bytes:
    """The head of an EVALSHA; a turn's appends all have the same one."""
    return b"".join(map(packed, ("EVALSHA", sha, len(keys), *keys)))


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
