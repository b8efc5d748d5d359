"""The turns that this node produces: started, cancelled, drained; and the tasks that outlive a command."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from weakref import WeakSet

import structlog

from gateway.aborts import Aborts
from gateway.core.model import By, EndCode, SessionId, TurnError, TurnId
from gateway.kept import KeptTurns
from gateway.producer import Budget, TurnProducer
from gateway.store import StoreError, StoreUnavailable
from gateway.upstream import UpstreamFailed

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from multidict import CIMultiDict

    from gateway.answer import Assignment
    from gateway.config import Config
    from gateway.doorbell import Doorbell
    from gateway.hub import Hub
    from gateway.journal import SessionJournal
    from gateway.lease import Lease
    from gateway.repairs import Repairs
    from gateway.upstream import UpstreamClient

log = structlog.get_logger(__name__)

CLOSE_SECONDS = 5.0
"""How long the last ends may take to be journalled when the node stops."""

STOP_SECONDS = 10.0
"""How long the backend's own stop endpoint may take; nobody waits for it."""


class RunningTurns:
    """The producers of a node, and who owns their tasks.

    Args:
        config: For bounds and policies.
        journal: Where turns are written.
        hub: Who is shown them.
        lease: Who is told which turns are ours.
        doorbell: Rings when somebody wants something of them.
        repairs: Told when the journal lost what others wrote.
        upstream: The backend.
    """

    def __init__(
        self,
        config: Config,
        *,
        journal: SessionJournal,
        hub: Hub,
        lease: Lease,
        doorbell: Doorbell,
        repairs: Repairs,
        upstream: UpstreamClient,
    ) -> None:
        self.budget = Budget(config.max_buffer_bytes)
        self._config = config
        self._journal = journal
        self._hub = hub
        self._lease = lease
        self._doorbell = doorbell
        self._repairs = repairs
        self._upstream = upstream
        self._producers: dict[tuple[SessionId, TurnId], TurnProducer] = {}
        """Of the turns that run."""
        self._kept = KeptTurns(self.budget)
        self._rung_early: set[tuple[SessionId, TurnId]] = set()
        self._cancelled: WeakSet[TurnProducer] = WeakSet()
        self._aborts = Aborts(
            journal,
            grace_seconds=config.abort_grace_seconds,
            get=self.get,
            cancel=self.cancel,
            spawn=self.spawn,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._holding: set[asyncio.Future[Any]] = set()
        """The ends of turns, and of sends that may become one: the node does not stop before them."""
        self._may_keep = True

    def get(self, session: SessionId, turn: TurnId) -> TurnProducer | None:
        """The producer of a turn, while it runs here."""
        producer = self._producers.get((session, turn))
        return None if producer is None or producer.ended.done() else producer

    def running_in(self, session: SessionId) -> list[TurnId]:
        """The turns of a session that run here."""
        return [turn for other, turn in self._producers if other == session and self.get(other, turn)]

    def known(self, session: SessionId, turn: TurnId) -> TurnProducer | None:
        """The producer of a turn that runs here, or ended a moment ago: the store may have lost it since."""
        return self._producers.get((session, turn)) or self._kept.get(session, turn)

    @property
    def is_full(self) -> bool:
        """Whether running turns take as much memory as they may. What is kept of ended ones gives way."""
        if not self.budget.is_full:
            return False
        self._kept.make_room()
        return self.budget.used - self._kept.held_bytes >= self.budget.limit

    def start(self, assignment: Assignment) -> TurnProducer:
        """Produce a turn that was just begun."""
        producer = TurnProducer(
            assignment,
            journal=self._journal,
            config=self._config,
            budget=self.budget,
            publish=self._hub.publish,
            suspect=self._repairs.suspect,
            cancelled=lambda by: self._cancelled_elsewhere(assignment, by),
        )
        key = assignment.session, assignment.turn
        self._producers[key] = producer
        producer.ended.add_done_callback(lambda _: self._ended(producer))
        producer.ended.add_done_callback(self._holding.discard)
        log.info("turn.started", session=assignment.session, turn=assignment.turn)
        self._holding.add(producer.ended)
        self.spawn(self._run(producer), f"turn-{assignment.turn}")
        if key in self._rung_early:
            self._rung_early.discard(key)
            self.rung(*key)
        return producer

    async def _run(self, producer: TurnProducer) -> None:
        session, turn = producer.assignment.session, producer.assignment.turn
        self._doorbell.watch(session)
        try:
            await producer.run()
        finally:
            self._doorbell.unwatch(session)
            if self._producers.get((session, turn)) is producer:
                del self._producers[session, turn]
            self._kept.remove(producer)

    def _ended(self, producer: TurnProducer) -> None:
        session, turn = producer.assignment.session, producer.assignment.turn
        if producer.ended.result() is None:
            self._lease.abandon(session, turn)
        else:
            self._lease.release(session, turn)
        if self._producers.get((session, turn)) is not producer:
            return  # there was nothing to keep
        del self._producers[session, turn]
        self._kept.add(producer)
        if not self._may_keep:
            producer.release()

    # -- what the store may know of them

    def verify(self, session: SessionId | None = None) -> None:
        """Have the producers, of a session or of all, look at the journal: it may have lost something."""
        for producer in self._all():
            if session in {None, producer.assignment.session}:
                producer.verify()

    def beat(self) -> None:
        """Have those look at the journal that have had nothing to write for a while: at a cancel, a seal."""
        self._rung_early.clear()
        for producer in self._all():
            if producer.was_quiet():
                producer.verify()
        self._kept.make_room()

    def rung(self, session: SessionId, turn: TurnId) -> None:
        """Somebody changed a turn: cancelled it, say. Its producer looks at once."""
        producer = self.get(session, turn)
        if producer is not None:
            producer.verify()
            self._aborts.look(session, turn)
        elif self._lease.has_claimed(session, turn):
            self._rung_early.add((session, turn))

    def _all(self) -> list[TurnProducer]:
        # The older first: in a new epoch they stand in the order in which they write themselves back.
        return sorted([*self._kept, *self._producers.values()], key=lambda producer: producer.start.offset)

    # -- cancel and abort

    def cancel(self, session: SessionId, turn: TurnId, by: By) -> TurnProducer | None:
        """Close a turn's upstream and end it, if it runs here; its ``ended`` tells when that is done."""
        producer = self.get(session, turn)
        if producer is not None:
            producer.cancel(by)
            if producer not in self._cancelled:
                self._cancelled.add(producer)
                self._tell_cancelled(producer, by)
        return producer

    def _cancelled_elsewhere(self, assignment: Assignment, by: By) -> None:
        self.cancel(assignment.session, assignment.turn, by)

    def _tell_cancelled(self, producer: TurnProducer, by: By) -> None:
        session, turn = producer.assignment.session, producer.assignment.turn
        log.info("turn.cancelled", session=session, turn=turn, client=by.client)
        if self._config.upstream_stop is not None:
            headers = producer.assignment.call.headers
            self.spawn(self._stop_upstream(self._config.upstream_stop, session, headers), f"stop-{turn}")

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
        """Cancel a turn after GATEWAY_ABORT_GRACE, if it runs here, unless the abort is taken back."""
        self._aborts.wait(session, turn, by)

    def take_back_abort(self, session: SessionId, turn: TurnId) -> None:
        """The session was resumed: the abort was no Stop, wherever the turn runs."""
        self._aborts.take_back(session, turn)

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
        self._may_keep = False
        self._kept.release()
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
        for task in list(self._tasks):
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
