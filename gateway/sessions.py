"""The verbs of a session, whatever the carrier: send, attach, resume, cancel, abort.

Nothing here knows a socket. A connection that ends is not told to this module at all; only what a client
says can end a turn. A send or cancel that has begun runs to its end, also when its client is gone.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import structlog

from gateway import telemetry
from gateway.core import wire
from gateway.core.attachment import Place, place
from gateway.core.model import (
    By,
    CancelResult,
    Cursor,
    EndReason,
    ErrorCode,
    NodeId,
    Overlap,
    RecordKind,
    Refusal,
    SessionId,
    TurnId,
    turn_tag,
)
from gateway.endings import Endings
from gateway.journal import NEWEST
from gateway.outcomes import Cancelling, Ended, Look, TurnLook
from gateway.sends import RETRY_AFTER_SECONDS, Accepted, SendRequest, Sends, store_refusal
from gateway.store import StoreError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from gateway.config import Config
    from gateway.core.model import ResyncReason
    from gateway.hub import Hub, Subscriber
    from gateway.journal import SessionJournal
    from gateway.lease import Lease
    from gateway.repairs import Repairs
    from gateway.turns import RunningTurns
    from gateway.upstream import UpstreamClient

log = structlog.get_logger(__name__)

T = TypeVar("T")

CANCEL_SECONDS = 5.0
"""How long a cancel waits for the turn's end before it is refused as retryable."""


_CANCEL_RESULTS: dict[str, CancelResult] = {
    EndReason.CANCELLED: CancelResult.CANCELLED,
    EndReason.INTERRUPTED: CancelResult.INTERRUPTED,
}
"""What a cancel is told of a turn that ended on another node; of any other end, that it came first."""


@dataclass(frozen=True, slots=True)
class Attached:
    """A subscriber, placed.

    Attributes:
        subscriber: Pull from it; close it.
        standing: Where its records follow from, and what the client is told of the session.
    """

    subscriber: Subscriber
    standing: wire.Standing

    @property
    def resync(self) -> ResyncReason | None:
        """Why it does not continue where the client wanted, if it does not."""
        return self.standing.resync


class Sessions:
    """All sessions, as this node serves them.

    Args:
        config: For policies and bounds.
        journal: Where records are.
        hub: Who is attached.
        lease: Who is gone.
        repairs: Where a journal that lost something is made whole.
        turns: What runs here.
        upstream: The backend.
    """

    def __init__(
        self,
        config: Config,
        *,
        journal: SessionJournal,
        hub: Hub,
        lease: Lease,
        repairs: Repairs,
        turns: RunningTurns,
        upstream: UpstreamClient,
    ) -> None:
        self._config = config
        self._journal = journal
        self._hub = hub
        self._lease = lease
        self._repairs = repairs
        self._turns = turns
        self._endings = Endings(journal, hub=hub, lease=lease, repairs=repairs)
        self._sends = Sends(
            config,
            journal=journal,
            repairs=repairs,
            endings=self._endings,
            hub=hub,
            lease=lease,
            turns=turns,
            upstream=upstream,
        )

    @property
    def draining(self) -> bool:
        """Whether the node stops, and refuses sends."""
        return self._sends.draining

    def drain(self) -> None:
        """Refuse sends from now on, and let the other nodes know."""
        self._sends.draining = True
        self._lease.leaving = True

    # -- send

    async def send(
        self, request: SendRequest, *, accepted: Callable[[Accepted], None] = lambda _: None
    ) -> Accepted:
        """Ask for a turn.

        Args:
            request: What for.
            accepted: Called as soon as the turn is journalled, before anybody is shown a record of it.

        Raises:
            Refusal: Nothing was sent to the backend by this call.
        """
        try:
            self._sends.refuse_when_full()
            if request.overlap is not Overlap.PARALLEL:
                await self._look(request.session)  # the turns of a node that is gone do not count as running
            outcome = await self._to_its_end(
                self._sends.send(request, accepted), f"send-{request.turn}", holds=True
            )
        except Refusal as refusal:
            telemetry.sends.labels(result=refusal.code).inc()
            raise
        telemetry.sends.labels(result="duplicate" if outcome.duplicate else "accepted").inc()
        return outcome

    # -- attach and resume

    async def attach(
        self,
        session: SessionId,
        after: Cursor | wire.AttachFrom,
        wake: Callable[[], None],
        *,
        carrier: str,
        resumes: bool = True,
    ) -> Attached:
        """Receive a session's records.

        Args:
            session: Need not exist; nothing is created.
            after: Where to continue, or to begin.
            wake: Called when there may be something to pull.
            carrier: For the metrics.
            resumes: False: to follow a turn that it has just sent, which takes no abort back.

        Raises:
            Refusal: The store is away.
        """
        subscriber = self._hub.subscribe(session, wake, carrier=carrier)
        try:
            return await self.place(subscriber, after, resumes=resumes)
        except BaseException:
            subscriber.close()
            raise

    async def place(
        self, subscriber: Subscriber, after: Cursor | wire.AttachFrom, *, resumes: bool = True
    ) -> Attached:
        """Put a registered subscriber where its client wants to continue.

        Raises:
            Refusal: The store is away.
        """
        session = subscriber.session
        look = await self._look(session, offset=after.offset if isinstance(after, Cursor) else NEWEST)
        if isinstance(after, Cursor) and after.epoch == look.epoch and after.offset > look.last:
            look = await self._look_again(session, after)
        where = _find(after, look)
        if where.resync is not None:
            telemetry.resyncs.labels(reason=where.resync).inc()
        elif resumes and _continues(after, look):
            telemetry.resumes.labels(carrier=subscriber.carrier).inc()
        running = [turn.turn for turn in look.turns if turn.is_running]
        subscriber.place_at(where.cursor, last=look.last, last_check=look.last_check, running=running)
        if look.epoch:
            self._journal.touch(session)
        if resumes:
            self._take_back_aborts(session, look.turns)
        turns = tuple(wire.TurnStatus(turn.turn, turn.state, turn.first) for turn in look.turns)
        return Attached(subscriber, wire.Standing(where.cursor, look.last, turns, where.resync))

    async def newest_turn(
        self, session: SessionId, *, after: Cursor | None = None, had_some: bool = False
    ) -> tuple[TurnId, Cursor] | None:
        """The turn that a client of the SDK's own wires resumes, and the place where it continues.

        The newest running one; else the newest that ended, if no client has read it to its end: a reload
        while an answer ended must not lose it. What was written to a client that was cut off counts as
        read, so a client that says what it has of a turn gets the rest of it all the same.

        Args:
            session: Whose.
            after: The last record that the client had, of whichever turn.
            had_some: It has a part of the newest turn.

        Raises:
            Refusal: The store is away.
        """
        look = await self._look(session)
        self._take_back_aborts(session, look.turns)
        had_whole = None
        if after is not None and after.epoch == look.epoch:
            for turn in look.turns:
                if after.tag == turn_tag(turn.turn) and turn.first <= after.offset:
                    if turn.is_running or not await self._is_end(session, after):
                        return turn.turn, after
                    had_whole = turn.turn
        running = [turn for turn in look.turns if turn.is_running]
        unread = [turn for turn in look.turns if not turn.is_running and (had_some or not turn.was_read)]
        for turn in (*running[-1:], *unread):
            if turn.first >= look.base and turn.turn != had_whole:
                return turn.turn, Cursor(look.epoch, turn.first - 1)
        return None

    async def _is_end(self, session: SessionId, cursor: Cursor) -> bool:
        """Whether a ``turn-end`` stands at a place; nothing of its turn comes after it."""
        try:
            page = await self._journal.read(session, after=cursor.offset - 1, limit_bytes=1)
        except (StoreUnavailable, StoreError) as error:
            raise store_refusal(error) from error
        return bool(page.records) and page.records[0].kind is RecordKind.TURN_END

    async def turn(self, session: SessionId, turn: TurnId) -> TurnLook | None:
        """What is known of one turn.

        Raises:
            Refusal: The store is away.
        """
        try:
            return await self._journal.turn(session, turn)
        except (StoreUnavailable, StoreError) as error:
            raise store_refusal(error) from error

    async def was_read(self, session: SessionId, turn: TurnId) -> None:
        """A client has been written the turn's end; unnoted, a reload shows the answer once more."""
        try:
            await self._journal.mark_read(session, turn)
        except (StoreUnavailable, StoreError) as error:
            log.warning("turn.read-not-noted", session=session, turn=turn, error=str(error))

    def was_read_soon(self, session: SessionId, turn: TurnId) -> None:
        """As :meth:`was_read`, without waiting."""
        self._turns.spawn(self.was_read(session, turn), f"was-read-{turn}")

    async def _look(self, session: SessionId, *, offset: int = 0) -> Look:
        """Where a session stands, after the turns of nodes that are gone were ended."""
        try:
            look = await self._journal.look(session, offset=offset)
            if look.rewound:
                look = await self._look_when_whole(session, offset)
            orphans = [
                turn for turn in look.turns if turn.is_running and await self._is_orphan(session, turn)
            ]
            for turn in orphans:
                await self.seal(session, turn.turn, turn.node)
            return await self._journal.look(session, offset=offset) if orphans else look
        except (StoreUnavailable, StoreError) as error:
            raise store_refusal(error) from error

    async def _is_orphan(self, session: SessionId, turn: TurnLook) -> bool:
        """Whether nobody will end a turn: its node is gone, or is this one and knows nothing of it."""
        if turn.node == self._lease.node:
            return not self._lease.has_claimed(session, turn.turn) and not self._turns.get(session, turn.turn)
        return await self._lease.is_gone(turn.node)

    async def _look_when_whole(self, session: SessionId, offset: int) -> Look:
        """Nobody is placed in a journal that has lost what this node has shown of it."""
        self._repairs.suspect(session)
        await self._repairs.settled(session)
        look = await self._journal.look(session, offset=offset)
        if look.rewound:
            raise StoreUnavailable("unable to read the journal yet; what it lost is being written again")
        return look

    async def _look_again(self, session: SessionId, after: Cursor) -> Look:
        """A client says that it has had more than there is: it may be on its way back into the journal."""
        try:
            await self._repairs.settled(session, until=after)
        except (StoreUnavailable, StoreError) as error:
            raise store_refusal(error) from error
        return await self._look(session, offset=after.offset)

    # -- cancel and abort

    async def cancel(
        self, session: SessionId, turn: TurnId | None, by: By
    ) -> list[tuple[TurnId, CancelResult]]:
        """End one turn, or all that run: the backend's connection is closed before this returns.

        Raises:
            Refusal: A turn's end could not be journalled yet; repeat it.
        """
        named = str(turn or session)
        results = await self._to_its_end(self._cancel_named(session, turn, by), f"cancel-{named}")
        for _, result in results:
            telemetry.cancels.labels(result=result).inc()
        return results

    async def _cancel_named(
        self, session: SessionId, turn: TurnId | None, by: By
    ) -> list[tuple[TurnId, CancelResult]]:
        if turn is None:
            look = await self._look(session)
            told = [other.turn for other in look.turns if other.is_running]
            # What a failover lost, and its producer is about to write back, is not told of.
            named = [*told, *(other for other in self._turns.running_in(session) if other not in told)]
        else:
            named = [turn]
        results = await asyncio.gather(*(self._cancel(session, name, by) for name in named))
        return list(zip(named, results, strict=True))

    async def _cancel(self, session: SessionId, turn: TurnId, by: By) -> CancelResult:
        try:
            mark = await self._journal.cancel(session, turn, by=by)
        except (StoreUnavailable, StoreError) as error:
            # The model need not wait for the store; the client's answer does.
            self._turns.cancel(session, turn, by)
            raise store_refusal(error) from error
        match mark:
            case Cancelling():
                return await self._cancel_marked(session, turn, by)
            case Ended():
                return CancelResult.ALREADY_ENDED
            case _ if self._turns.get(session, turn) is not None:
                # A failover lost it, and its producer, who is here, is about to write it back.
                return await self._cancel_marked(session, turn, by)
            case _:
                return CancelResult.UNKNOWN

    async def _cancel_marked(self, session: SessionId, turn: TurnId, by: By) -> CancelResult:
        give_up_at = asyncio.get_running_loop().time() + CANCEL_SECONDS
        producer = self._turns.cancel(session, turn, by)
        if producer is not None:
            await asyncio.wait({producer.ended}, timeout=CANCEL_SECONDS)
            if producer.ended.done() and (reason := producer.ended.result()) is not None:
                cancelled = reason is EndReason.CANCELLED
                return CancelResult.CANCELLED if cancelled else CancelResult.ALREADY_ENDED
        seconds = give_up_at - asyncio.get_running_loop().time()
        try:
            ended = await self._endings.wait(session, turn, seconds=seconds)
        except (StoreUnavailable, StoreError) as error:
            raise store_refusal(error) from error
        if not ended:  # it runs, or its mark was lost with it
            message = "unable to cancel yet; the turn's node has not ended it, ask again"
            raise Refusal(ErrorCode.STORE_UNAVAILABLE, message, retry_after_seconds=RETRY_AFTER_SECONDS)
        return _CANCEL_RESULTS.get(ended, CancelResult.ALREADY_ENDED)

    async def abort(self, session: SessionId, turn: TurnId, by: By) -> None:
        """An ambiguous abort: cancel after the grace, unless the session is resumed meanwhile."""
        try:
            await self._journal.abort(session, turn, by=by, seconds=self._config.abort_grace_seconds)
        except (StoreUnavailable, StoreError) as error:
            raise store_refusal(error) from error
        self._turns.abort_after_grace(session, turn, by)

    def abort_soon(self, session: SessionId, turn: TurnId, by: By) -> None:
        """As :meth:`abort`, for a client that is gone already."""

        async def abort() -> None:
            try:
                await self.abort(session, turn, by)
            except Refusal as refusal:
                log.warning("turn.abort-lost", session=session, turn=turn, error=refusal.message)

        self._turns.spawn(abort(), f"abort-{turn}")

    def _take_back_aborts(self, session: SessionId, turns: tuple[TurnLook, ...]) -> None:
        for turn in turns:
            if turn.is_running and turn.abort_pending:
                self._turns.take_back_abort(session, turn.turn)

    async def seal(self, session: SessionId, turn: TurnId, node: NodeId) -> bool:
        """End a turn whose node is gone, if it has not ended; see :meth:`gateway.endings.Endings.seal`."""
        return await self._endings.seal(session, turn, node)

    async def _to_its_end(self, work: Coroutine[object, object, T], name: str, *, holds: bool = False) -> T:
        """Wait for something that goes on when whoever waits is gone."""
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        async def run() -> None:
            try:
                value = await work
            except BaseException as error:
                # Whatever it was: who waits must hear of it, and must not wait for ever.
                if not result.cancelled():
                    result.set_exception(error)
                if not isinstance(error, Refusal):
                    raise
            else:
                if not result.cancelled():
                    result.set_result(value)

        self._turns.spawn(run(), name, holds=holds)
        return await result


def _find(after: Cursor | wire.AttachFrom, look: Look) -> Place:
    """Where an attach begins."""
    if after is wire.AttachFrom.RUNNING:
        running = [turn.first for turn in look.turns if turn.is_running]
        unread = [turn.first for turn in look.turns if not (turn.is_running or turn.was_read)]
        first = min(running or unread, default=0)
        at_end = first < look.base
        return Place(
            Cursor(look.epoch, look.last, look.tag, look.check) if at_end else Cursor(look.epoch, first - 1)
        )
    cursor = after if isinstance(after, Cursor) else None
    return place(cursor, epoch=look.epoch, last=look.last, base=look.base, tag=look.tag, check=look.check)


def _continues(after: Cursor | wire.AttachFrom, look: Look) -> bool:
    """Whether an attach continues from a cursor, or joins a turn that had begun."""
    if isinstance(after, Cursor):
        return after.offset > 0
    return after is wire.AttachFrom.RUNNING and any(turn.is_running for turn in look.turns)
