"""The turns that this node produces: started, cancelled, drained; and the tasks that outlive a command."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING
from urllib.parse import quote

import structlog

from gateway.core.model import By, EndCode, SessionId, TurnError, TurnId
from gateway.outcomes import Cancelling
from gateway.producer import Budget, TurnProducer
from gateway.store import StoreError, StoreUnavailable
from gateway.upstream import UpstreamFailed

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from multidict import CIMultiDict

    from gateway.answer import Assignment
    from gateway.config import Config
    from gateway.hub import Hub
    from gateway.journal import SessionJournal
    from gateway.lease import Lease
    from gateway.upstream import UpstreamClient

log = structlog.get_logger(__name__)

CLOSE_SECONDS = 5.0
"""How long the last ends may take to be journalled when the node stops."""

RETRY_SECONDS = 1.0
ABORT_MARGIN_SECONDS = 0.01
"""The loop's timers may be a millisecond early, and the store's clock is the judge."""

ABORT_LOOK_SECONDS = 0.25
"""How often an abort is looked at that was not due when its grace was over here."""

STOP_SECONDS = 10.0
"""How long the backend's own stop endpoint may take; nobody waits for it."""


class RunningTurns:
    """The producers of a node, and who owns their tasks.

    Args:
        config: For bounds and policies.
        journal: Where turns are written.
        hub: Who is shown them.
        lease: Who is told which turns are ours.
        upstream: The backend.
    """

    def __init__(
        self, config: Config, *, journal: SessionJournal, hub: Hub, lease: Lease, upstream: UpstreamClient
    ) -> None:
        self.budget = Budget(config.max_buffer_bytes)
        self._config = config
        self._journal = journal
        self._hub = hub
        self._lease = lease
        self._upstream = upstream
        self._producers: dict[tuple[SessionId, TurnId], TurnProducer] = {}
        self._pending_aborts: dict[tuple[SessionId, TurnId], asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._holding: set[asyncio.Task[None]] = set()
        """Turns, and sends that may become one: the node does not stop before they end."""

    def get(self, session: SessionId, turn: TurnId) -> TurnProducer | None:
        """The producer of a turn, while it runs here."""
        return self._producers.get((session, turn))

    def start(self, assignment: Assignment) -> TurnProducer:
        """Produce a turn that was just begun."""
        producer = TurnProducer(
            assignment,
            journal=self._journal,
            config=self._config,
            budget=self.budget,
            publish=self._hub.publish,
            lost=self._hub.lose,
        )
        self._producers[assignment.session, assignment.turn] = producer
        log.info("turn.started", session=assignment.session, turn=assignment.turn)
        self.spawn(self._run(producer), f"turn-{assignment.turn}", holds=True)
        return producer

    async def _run(self, producer: TurnProducer) -> None:
        key = (producer.assignment.session, producer.assignment.turn)
        try:
            await producer.run()
        finally:
            del self._producers[key]
        self._lease.release(*key)

    # -- cancel and abort

    def cancel(self, session: SessionId, turn: TurnId, by: By) -> TurnProducer | None:
        """Close a turn's upstream and end it, if it runs here; its ``ended`` tells when that is done."""
        producer = self.get(session, turn)
        if producer is not None and not producer.ended.done():
            log.info("turn.cancelled", session=session, turn=turn, client=by.client)
            producer.cancel(by)
            if self._config.upstream_stop is not None:
                headers = producer.assignment.call.headers
                self.spawn(self._stop_upstream(self._config.upstream_stop, session, headers), f"stop-{turn}")
        return producer

    async def _stop_upstream(self, request: str, session: SessionId, headers: CIMultiDict[str]) -> None:
        """GATEWAY_UPSTREAM_STOP, with the credentials of the send, for backends that must be told."""
        method, _, path = request.partition(" ")
        call = self._upstream.call(
            path.replace("{id}", quote(session, safe="")), body=b"{}", headers=headers, method=method
        )
        try:
            async with asyncio.timeout(STOP_SECONDS):
                response = await call.open()
        except (UpstreamFailed, TimeoutError) as error:
            log.warning("upstream.stop-failed", session=session, error=str(error) or "it took too long")
            return
        log.info("upstream.stop-told", session=session, status=response.status)
        response.close()

    def abort_after_grace(self, session: SessionId, turn: TurnId, by: By) -> None:
        """Cancel a turn after GATEWAY_ABORT_GRACE, unless :meth:`take_back_abort` comes first."""
        key = (session, turn)
        if key not in self._pending_aborts:
            taken_back = self._pending_aborts[key] = asyncio.Event()
            self.spawn(self._abort_later(session, turn, by, taken_back), f"abort-later-{turn}")

    async def _abort_later(self, session: SessionId, turn: TurnId, by: By, taken_back: asyncio.Event) -> None:
        """The deadline stands in the turn's hash; this wakes up to look at it."""
        key = (session, turn)
        seconds = self._config.abort_grace_seconds + ABORT_MARGIN_SECONDS
        try:
            while key in self._producers:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await taken_back.wait()
                if taken_back.is_set():
                    return
                # Too early by the store's clock, put off by a second abort, taken back elsewhere: look again.
                seconds = min(self._config.abort_grace_seconds, ABORT_LOOK_SECONDS)
                try:
                    # Once it is asked for, its answer counts: the turn may be marked.
                    mark = await self._journal.cancel(session, turn, user=by.user, only_due=True)
                except (StoreUnavailable, StoreError):
                    seconds = RETRY_SECONDS
                    continue
                if isinstance(mark, Cancelling):
                    self.cancel(session, turn, by)
                    return
        finally:
            if self._pending_aborts.get(key) is taken_back:
                del self._pending_aborts[key]

    def take_back_abort(self, session: SessionId, turn: TurnId) -> None:
        """The session was resumed: the abort was no Stop."""
        taken_back = self._pending_aborts.pop((session, turn), None)
        if taken_back is not None:
            taken_back.set()
            self.spawn(self._forget_abort(session, turn), f"keep-{turn}")

    async def _forget_abort(self, session: SessionId, turn: TurnId) -> None:
        with contextlib.suppress(StoreUnavailable, StoreError):  # no timer of ours is left to act on it
            await self._journal.abort(session, turn, seconds=None)

    # -- the end

    async def drain(self, hurry: asyncio.Event) -> None:
        """Let the turns end: all of them, or as long as GATEWAY_DRAIN; the rest is interrupted.

        Args:
            hurry: Set when there is no time.
        """
        if self._holding:
            log.info(
                "node.draining",
                turns=len(self._producers),
                seconds=self._config.drain_seconds,
                hint="a second signal ends them at once",
            )
            everything = asyncio.create_task(self._all_ended(), name="drain")
            hurried = asyncio.create_task(_set(hurry), name="hurry")
            await asyncio.wait(
                {everything, hurried},
                timeout=self._config.drain_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            everything.cancel()
            hurried.cancel()
        message = "the gateway was stopped before the answer was whole; send again"
        give_up_at = time.monotonic() + CLOSE_SECONDS
        while self._holding and time.monotonic() < give_up_at:
            for producer in list(self._producers.values()):
                producer.interrupt(TurnError(EndCode.NODE_LOST, message))
            await asyncio.wait(self._holding, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)

    async def _all_ended(self) -> None:
        while self._holding:  # a send that ends may have begun a turn
            await asyncio.wait(self._holding)

    async def close(self) -> None:
        """End every task; after :meth:`drain`."""
        is_whole = not self._holding
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if is_whole:
            with contextlib.suppress(StoreUnavailable, StoreError):  # then it is found silent later
                await self._lease.leave()

    def spawn(self, work: Coroutine[object, object, None], name: str, *, holds: bool = False) -> None:
        """Run something that outlives the command that asked for it; its failure is logged.

        Args:
            work: What.
            name: Of the task.
            holds: A drain waits for it.
        """
        task = self._spawn(work, name)
        if holds:
            self._holding.add(task)
            task.add_done_callback(self._holding.discard)

    def _spawn(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task.failed", task=task.get_name(), exc_info=error)


async def _set(event: asyncio.Event) -> None:
    await event.wait()
