"""Journals one turn: what its producer has, in order; and writes back what a failover lost of it.

The drafts are kept until some time past the turn's end, so that a batch whose fate is unknown can be
repeated, and records that the journal forgot are written where they stood (:mod:`gateway.core.placement`).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import structlog

from gateway import telemetry
from gateway.core.model import RECORD_OVERHEAD_BYTES, By, Cursor, EndReason, Record, next_check, turn_tag
from gateway.core.placement import NOT_KNOWN_THERE, Found, GoOn, Placement, Restore, Wait
from gateway.core.wire import turn_end
from gateway.journal import stored_kind
from gateway.outcomes import Appended, Behind, Ended, Fenced, Loss, Lost, Rewound
from gateway.store import StoreError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from gateway.answer import Assignment
    from gateway.core.model import Draft, SessionId
    from gateway.core.turn import End
    from gateway.journal import SessionJournal
    from gateway.outcomes import AppendResult

log = structlog.get_logger(__name__)

T = TypeVar("T")

BATCH_BYTES = 1024 * 1024
"""What one append carries at the most, give or take a record."""

RETRY_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Between attempts to reach the store; the last one again and again."""

OTHERS_SECONDS = 0.1
"""Between looks, while others write back what they hold."""


class NotOurs(Exception):
    """Another ended the turn, or may write it now: write nothing more.

    Attributes:
        why: For the log.
    """

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class TurnWriter:
    """One turn's records on their way to the journal.

    Args:
        assignment: Which turn, and the right to write it.
        journal: Where to.
        publish: Shows records to this node's subscribers; called in journal order.
        suspect: Told of a loss that is not this turn's.
        cancelled: Told when the journal says that the turn is to be ended, and by whom.
        away: Told each time the store did not answer, with the seconds since it last did.
    """

    def __init__(
        self,
        assignment: Assignment,
        *,
        journal: SessionJournal,
        publish: Callable[[SessionId, Sequence[Record]], None],
        suspect: Callable[[SessionId], None],
        cancelled: Callable[[By], None],
        away: Callable[[float], None],
    ) -> None:
        self.end: End | None = None
        self.refusal = b""
        """What is kept of the backend's refusal, as JSON; journalled with the end."""
        self._turn = assignment
        self._journal = journal
        self._publish = publish
        self._suspect = suspect
        self._cancelled = cancelled
        self._away = away
        self._drafts: list[Draft] = []
        self._closing: list[Draft] = []
        start = assignment.beginning.cursor
        self._placement = Placement(start.epoch, start.offset)
        self._next = 0
        """Index of the first draft that is not known to be journalled."""
        self._tag = turn_tag(assignment.turn)
        self._dirty = asyncio.Event()
        self._must_ask = False
        self._is_wanted = asyncio.Event()
        self._was_quiet = False

    @property
    def start(self) -> Cursor:
        """Where the ``turn-start`` stands, as far as is known."""
        return Cursor(self._placement.epoch, self._placement.start, self._tag)

    @property
    def chunks(self) -> int:
        """How many records are journalled, but for those of the end."""
        return min(self._next, len(self._drafts))

    def add(self, drafts: Sequence[Draft]) -> None:
        """There is more to journal."""
        self._drafts += drafts
        self._dirty.set()

    def finish(self, end: End) -> None:
        """There is no more."""
        self.end = end
        self._closing = [*end.closers, turn_end(end)]
        self._dirty.set()

    def verify(self) -> None:
        """Look soon how the turn stands in the journal: cancelled, sealed, with something lost, or well."""
        self._must_ask = True
        self._dirty.set()
        self._is_wanted.set()

    def was_quiet(self) -> bool:
        """Whether nothing was asked of the journal since the last time that this was called."""
        was_quiet, self._was_quiet = self._was_quiet, True
        return was_quiet

    def forget(self) -> None:
        """The turn is over and not to be kept: what it held is free at once, whoever still knows this."""
        self._drafts, self._closing = [], []

    async def write(self) -> EndReason:
        """Journal until the ``turn-end`` is; once more after that, make sure that it still is.

        Raises:
            NotOurs: Write nothing more.
        """
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            while self._next < len(self._drafts) or (self._must_ask and self.end is None):
                await self._append()
            if self.end is not None:
                self._must_ask = False
                if await self._append_end(self.end):
                    if not self._must_ask:
                        self._dirty.clear()
                    return self.end.reason
                self._dirty.set()

    async def hold(self, until: asyncio.Event) -> None:
        """Keep the ended turn, and write back what is lost of it, until it is no longer to be kept."""
        asked = asyncio.create_task(self._keep(), name=f"held-{self._turn.turn}")
        released = asyncio.create_task(until.wait(), name=f"release-{self._turn.turn}")
        try:
            await asyncio.wait({asked, released}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
            released.cancel()
            await asyncio.wait({asked, released})
        if not asked.cancelled():
            asked.result()

    async def _keep(self) -> None:
        try:
            while True:
                await self.write()
        except NotOurs as error:
            log.info("turn.let-go", session=self._turn.session, turn=self._turn.turn, why=error.why)

    # -- the calls

    async def _append(self) -> None:
        """One batch, or none: then it only asks."""
        index = self._next
        # What is to be made sure of is asked for alone: all of a batch has to be new.
        batch = [] if self._must_ask else self._batch(index)
        self._must_ask = False
        turn = self._turn
        asked_at = time.monotonic()
        result, certain = await self._ask(
            lambda: self._journal.append(turn.session, turn.turn, turn.fence, index=index, drafts=batch)
        )
        if batch:
            telemetry.append_seconds.observe(time.monotonic() - asked_at)
        if not isinstance(result, Appended):
            await self._mend(result)
            return
        self._wrote(result, len(batch) if certain else 0)
        if batch:
            self._show(result, batch, certain=certain)
        if result.state == "cancelling":
            self._cancelled(result.by or By())

    async def _append_end(self, end: End) -> bool:
        """Journal the end; False: something before it was lost."""
        turn = self._turn
        result, certain = await self._ask(
            lambda: self._journal.end(
                turn.session,
                turn.turn,
                turn.fence,
                index=len(self._drafts),
                reason=end.reason,
                drafts=self._closing,
                refusal=self.refusal,
                after=self._placement.before(len(self._drafts)),
            )
        )
        match result:
            case Appended():
                self._wrote(result, len(self._closing) if certain else 0)
                self._show(result, self._closing, certain=certain)
                return True
            case Ended(reason) if reason == end.reason:
                self._placement.ended(len(self._drafts) + len(self._closing))
                self._publish(turn.session, ())  # by an attempt whose reply was lost
                return True
            case Lost() if self._placement.holds_all(_found(result), len(self._drafts) + len(self._closing)):
                return True  # only the turn's own key is gone
            case _:
                await self._mend(result)
                return False

    async def _mend(self, result: AppendResult) -> None:
        """The journal does not hold what it did."""
        if not isinstance(result, Behind | Rewound | Lost):
            raise NotOurs(type(result).__name__.lower())
        found = _found(result)
        seen = self._journal.seen(self._turn.session)
        match self._placement.remedy(found, seen.offset if seen.epoch == found.epoch else 0):
            case GoOn(index):
                self._placement.forget(index)
                self._next = index
            case Restore() as restore:
                await self._restore(found, restore)
            case Wait():
                self._suspect(self._turn.session)
                self._must_ask = True
                self._dirty.set()
                await asyncio.sleep(OTHERS_SECONDS)

    async def _restore(self, found: Found, restore: Restore) -> None:
        turn, beginning = self._turn, self._turn.beginning
        batch = self._batch(restore.index)
        drafts = batch if restore.first else [beginning.start, *batch]
        loss = Loss(
            epoch=found.epoch,
            last=found.last,
            count=found.count,
            new_epoch=secrets.token_hex(8) if restore.renews else found.epoch,
            first=restore.first,
            index=restore.index,
            digest=beginning.digest,
            path=beginning.path,
            user=beginning.user,
        )
        log.warning(
            "turn.restored",
            session=turn.session,
            turn=turn.turn,
            epoch=loss.new_epoch,
            renewed=restore.renews,
            after=found.last,
            records=len(drafts),
        )
        result, certain = await self._ask(
            lambda: self._journal.repair(turn.session, turn.turn, turn.fence, loss=loss, drafts=drafts)
        )
        if isinstance(result, Appended):
            telemetry.repaired_records.inc(len(drafts))
            if restore.renews:
                telemetry.renewed_epochs.inc()
            self._placement.restored(
                result.epoch, result.last, result.count, written=len(batch), start=restore.first
            )
            self._next = result.count
            self._publish(turn.session, ())
            if result.state == "cancelling":
                self._cancelled(result.by or By())
        elif isinstance(result, Rewound):
            # Below what is lost here others have written too: this is another history by now.
            is_known = found.count != NOT_KNOWN_THERE
            await self._restore(
                found, replace(restore, renews=True) if is_known else Restore(0, 0, renews=True)
            )
        elif isinstance(result, Fenced) and certain:
            raise NotOurs("fenced")
        else:  # it is not as it was found: look again
            self._must_ask = True
            self._dirty.set()

    async def _ask(self, call: Callable[[], Awaitable[T]]) -> tuple[T, bool]:
        """Repeat a call until it is answered; False with it: an earlier attempt may have been carried out."""
        attempt = 0
        away_since = time.monotonic()
        self._was_quiet = False
        while True:
            try:
                return await call(), attempt == 0
            except StoreUnavailable:
                self._away(time.monotonic() - away_since)
                await self._pause(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
                attempt += 1
            except StoreError:
                raise NotOurs("refused") from None

    async def _pause(self, seconds: float) -> None:
        """Before the next attempt; shorter when somebody knows that the store is back."""
        self._is_wanted.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._is_wanted.wait()

    # -- what is known of it

    def _batch(self, index: int) -> list[Draft]:
        batch: list[Draft] = []
        size = 0
        while index + len(batch) < len(self._drafts) and size < BATCH_BYTES:
            batch.append(self._drafts[index + len(batch)])
            size += len(batch[-1].payload) + RECORD_OVERHEAD_BYTES
        return batch

    def _wrote(self, result: Appended, new: int) -> None:
        self._placement.wrote(result.epoch, result.last, result.count, new=new)
        self._next = result.count

    def _show(self, result: Appended, drafts: Sequence[Draft], *, certain: bool) -> None:
        """Give this node's subscribers what the journal has now."""
        turn = self._turn
        if not certain:
            # An earlier attempt may have written some of it at other offsets: let them read it back.
            self._publish(turn.session, ())
            return
        offset, check = result.last - len(drafts), result.before
        records = []
        for draft in drafts:
            offset += 1
            check = next_check(check, turn.turn, stored_kind(draft), draft.payload)
            records.append(Record(Cursor(result.epoch, offset, self._tag, check), turn.turn, draft))
        self._publish(turn.session, records)


def _found(result: Behind | Rewound | Lost) -> Found:
    if isinstance(result, Lost):
        return Found(result.epoch, result.last, NOT_KNOWN_THERE, result.rewound)
    return Found(result.epoch, result.last, result.count, isinstance(result, Rewound))
