"""One ordered connection to one server: a pipelined write per loop turn.

Group commit: whatever is asked of a lane within one turn of the event loop leaves in one write, in the order
it was asked, and the next write waits for the replies of the last. So all turns of a node share one round
trip, and a lane under load makes bigger batches instead of more of them.

redis-py connects and authenticates. It does not retry (it would repeat writes, FAULTS R1) and its timeouts
are off: one deadline stands around each batch. A batch whose replies did not all come fails, with an unknown
outcome, and its connection is dropped, so that no late reply is taken for another call's. Every script of
ours may be repeated.

A server that refuses at once is not asked again at once: connecting waits, longer each time, while the
callers' own retries fill the next batch.

All of a lane runs in callbacks of the event loop, one after the other; only connecting is a task.
"""

from __future__ import annotations

import asyncio
import contextvars
from typing import TYPE_CHECKING, Any

import structlog
from redis.exceptions import RedisError

from gateway.store import refusals
from gateway.store.calls import Argument, Call, CallQueue
from gateway.store.exchange import Exchange, forgotten
from gateway.store.pause import Pause
from gateway.store.pipeline import Pipeline
from gateway.store.refusals import StoreError, UnusableConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.core.model import GatewayError
    from gateway.store.pipeline import Connector
    from gateway.store.scripts import Script

log = structlog.get_logger(__name__)

OPERATION_TIMEOUT_SECONDS = 2.0
"""A batch takes well below 10 ms; Redis frozen for longer is an outage, and callers have their own policy."""

MAX_BATCH_BYTES = 4 * 1024 * 1024
"""A write on one connection, and the replies expected to it; what is over it waits for the next."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.01, 0.25
"""Between two connections of which the first was of no use."""


def _nothing(*_: object) -> None:
    """Of a lane that nobody listens to."""


class Lane:
    """One connection whose calls keep their order.

    Args:
        connector: Makes connections; the lane holds one.
        name: For logs and the task.
        scripts: Loaded on every new connection, so that NOSCRIPT stays an exception.

    Attributes:
        on_contact: Called when the first batch of a new connection was answered. Settable, as the others.
        on_lost: Called when a connection was lost, or could not be made.
        on_redirected: Given the calls that a cluster wants elsewhere, each with what it said; set before
            :meth:`start`.
    """

    def __init__(self, connector: Connector, name: str, scripts: Sequence[Script]) -> None:
        self.on_contact: Callable[[], None] = _nothing
        self.on_lost: Callable[[], None] = _nothing
        self.on_redirected: Callable[[Lane, list[tuple[Call, str]]], None] | None = None
        self.name = name
        self._connector = connector
        self._exchange = Exchange(scripts)
        self._pipeline: Pipeline | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._pause = Pause(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
        self._is_new = False  # of the connection: no batch was answered yet
        self._is_stale = False
        self._calls = CallQueue()
        self._is_busy = True  # a batch is away, or about to leave; and before start()
        self._batch: list[Call] = []
        self._may_load_again = False
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        # A connection keeps the context that it was made in; that must not be the first caller's.
        self._context = contextvars.copy_context()

    def start(self) -> None:
        """Begin to serve calls; :meth:`close` ends it."""
        self._exchange.follows = self.on_redirected is not None
        self._next()

    async def close(self) -> None:
        """End the lane; calls that wait fail, and so do later ones."""
        connecting = self.stop(refusals.stopping())
        if connecting is not None:
            await asyncio.wait([connecting], timeout=OPERATION_TIMEOUT_SECONDS)

    def stop(self, error: GatewayError) -> asyncio.Task[None] | None:
        """As :meth:`close`, at once; returns what was connecting, which is cancelled."""
        self._is_closed = True
        connecting = self._connecting
        if connecting is not None:
            connecting.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self._drop()
        waiting = [*self._batch, *self._calls]
        self._batch = []
        self._calls.clear()
        self._fail(waiting, error)
        return connecting

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
        call = Call.of(script, keys, arguments, reply_bytes)
        self.put(call)
        return call.reply

    def tell(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> None:
        """As :meth:`call`, for what may be lost: nobody waits for the reply."""
        self.put(Call.of(script, keys, arguments, 0).forget())

    def put(self, call: Call) -> None:
        """As :meth:`call`, for a call that was made already."""
        if self._is_closed:
            self._fail([call], refusals.stopping())
            return
        self._calls.append(call)
        if not self._is_busy:
            self._next()

    def take_back(self, is_meant: Callable[[Call], bool]) -> list[Call]:
        """Give up the calls meant that have not left yet, in their order."""
        return self._calls.take_meant(is_meant)

    def retire(self, error: GatewayError) -> list[Call]:
        """Give up all calls that have not left yet, and end, if no batch is away.

        Returns:
            The calls, in their order. A batch that is away ends by its deadline; ask again then.
        """
        unsent = [*self._calls]
        self._calls.clear()
        if self._connecting is not None:
            unsent = self._batch + unsent
            self._batch = []
        if not self._batch:
            self.stop(error)
        return unsent

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more calls."""
        return self._is_closed

    def renew(self, name: str = "") -> None:
        """Use a new connection from the next batch on: the server may not be the right one any more.

        Args:
            name: For :meth:`gateway.store.routes.Routes.renew`, which has several.
        """
        del name
        self._is_stale = True

    def _next(self) -> None:
        """Send what waits; but only after all who run in this turn of the loop have asked too."""
        self._is_busy = bool(self._calls)
        if self._is_busy:
            asyncio.get_running_loop().call_soon(self._perform, context=self._context)

    def _perform(self) -> None:
        if self._is_closed:
            return
        loop = asyncio.get_running_loop()
        self._batch = self._calls.take(MAX_BATCH_BYTES)
        if not self._batch:  # all were taken back
            self._is_busy = False
            return
        self._deadline = loop.time() + OPERATION_TIMEOUT_SECONDS
        self._may_load_again = True
        if self._pipeline is not None and (self._is_stale or self._pipeline.is_closing):
            # The server closed it while nothing was asked. A new one costs no caller an error.
            self._drop()
        if self._pipeline is None:
            self._connecting = loop.create_task(self._connect(), name=f"store-{self.name}")
            return
        try:
            self._send(self._pipeline, self._batch)
        except Exception as error:  # noqa: BLE001 - a bug; to the event loop it would be a line in the log
            self._break(error)

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._pause.take()
                self._is_stale = False
                self._pipeline = await Pipeline.connect(self._connector, self._answered, self._lose)
            self._is_new = True
            self._send(self._pipeline, self._batch, load=True)
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            self._lose(error)
        except Exception as error:  # noqa: BLE001 - as above
            self._break(error)
        finally:
            self._connecting = None

    def _send(self, pipeline: Pipeline, calls: Sequence[Call], *, load: bool = False) -> None:
        pipeline.write(self._exchange.begin(calls, load=load))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_at(self._deadline, self._look_at_deadline)

    def _look_at_deadline(self) -> None:
        """One timer for many batches: most end long before it fires, and it is set anew for the one away."""
        self._timer = None
        if self._exchange.is_over:  # nothing is away, or its connection is being made, which has the deadline
            return
        loop = asyncio.get_running_loop()
        if loop.time() < self._deadline:
            self._timer = loop.call_at(self._deadline, self._look_at_deadline)
        else:
            self._lose(TimeoutError("the deadline passed"))

    def _answered(self, replies: list[Any]) -> None:
        try:
            for reply in replies:
                self._exchange.take(reply)
            if self._exchange.is_over:
                self._finish()
        except UnusableConnection as error:
            self._lose(error)
        except Exception as error:  # noqa: BLE001 - as above
            self._break(error)

    def _finish(self) -> None:
        missing = self._exchange.take_missing()
        if missing and self._may_load_again and self._pipeline is not None:
            self._may_load_again = False
            self._send(self._pipeline, missing, load=True)
            return
        for call in missing:
            call.resolve(forgotten(call))
        self._batch = []
        redirected = self._exchange.take_redirected()
        if redirected and self.on_redirected is not None:
            self.on_redirected(self, redirected)
        if self._is_new:
            self._is_new = False
            self._pause.reset()
            self.on_contact()
        self._next()

    def _lose(self, error: Exception) -> None:
        """Give the batch up, and the connection with it."""
        self._drop()
        reason = str(error) or type(error).__name__
        if not self._batch:  # the next call gets a new one, and no error
            log.info("store.disconnected", lane=self.name, error=reason)
        else:
            log.warning("store.unavailable", lane=self.name, error=reason)
            # What waited behind it and is itself past the deadline goes with it: no call waits for many.
            limit = asyncio.get_running_loop().time() - OPERATION_TIMEOUT_SECONDS
            self._give_up(self._calls.take_older(limit), refusals.lost(reason))
        self.on_lost()

    def _break(self, error: Exception) -> None:
        """End a batch that met a bug of ours: its callers, and all later ones, would wait for ever."""
        log.error("store.failed", lane=self.name, exc_info=error)
        self._drop()
        self._give_up([], StoreError("unable to use the store; the gateway has a bug"))

    def _give_up(self, more: list[Call], error: GatewayError) -> None:
        failed, self._batch = self._batch + more, []
        self._fail(failed, error)
        if failed:  # otherwise no batch was away, and whoever asked next has seen to it
            self._next()

    def _drop(self) -> None:
        self._exchange.clear()
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline.close()

    @staticmethod
    def _fail(calls: list[Call], error: GatewayError) -> None:
        for call in calls:
            call.resolve(error)
