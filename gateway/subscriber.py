"""One client's attachment to one session: a place in its tail, that pulls.

Rule 1: it is registered first and placed second, so nothing that is journalled in between is missed.
Rule 2: it is handed what joins what it has had, or nothing, or a resync: never another history.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

import structlog

from gateway import telemetry
from gateway.core.attachment import Attachment, GapError
from gateway.core.model import Cursor, ResyncReason
from gateway.store import StoreError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from gateway.core.model import Record, SessionId, TurnId
    from gateway.core.tail import Tail
    from gateway.outcomes import Page

log = structlog.get_logger(__name__)

READ_RETRY_SECONDS = 0.5


class Resync(Exception):
    """The subscriber cannot continue; it is detached and must attach from a complete state.

    Attributes:
        reason: Why.
    """

    def __init__(self, reason: ResyncReason) -> None:
        super().__init__(reason)
        self.reason = reason


class Tails(Protocol):
    """What a subscriber asks of the hub."""

    max_lag_bytes: int

    async def page(self, session: SessionId, *, after: int, check: str) -> Page:
        """Read the journal."""
        ...

    def renew(self, subscriber: Subscriber) -> None:
        """Give it another tail, for the journal of its own is gone."""

    def doubt(self, tail: Tail) -> None:
        """What is in the tail does not agree with the journal."""

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Forget it."""


class Subscriber:
    """One client's attachment to one session. Made by :meth:`Hub.subscribe`; close it when done."""

    __slots__ = (
        "_attachment", "_caught_up_at", "_has_doubted", "_hub", "_known_epoch", "_looked_at", "_retry",
        "_seen_bytes", "_wake", "carrier", "tail",
    )  # fmt: skip

    def __init__(self, hub: Tails, tail: Tail, wake: Callable[[], None], carrier: str) -> None:
        self.carrier = carrier
        self.tail = tail
        """What it takes from; only the hub gives it another."""
        self._wake = wake
        self._hub = hub
        self._attachment: Attachment | None = None
        self._caught_up_at = 0
        self._seen_bytes = 0
        self._known_epoch = tail.epoch
        self._looked_at = 0
        self._has_doubted = False
        self._retry: asyncio.TimerHandle | None = None

    @property
    def session(self) -> SessionId:
        """Whose records it gets."""
        return self.tail.session

    def wake(self) -> None:
        """There may be something to pull."""
        self._wake()

    @property
    def offset(self) -> int:
        """The last record had."""
        return 0 if self._attachment is None else self._attachment.offset

    def place_at(
        self, cursor: Cursor, *, last: int, last_check: str = "", running: Collection[TurnId] = ()
    ) -> None:
        """Begin, or begin again, after a cursor.

        Args:
            cursor: Where.
            last: The journal's newest offset when it was looked at, after this subscriber was registered.
            last_check: Of the record there.
            running: The turns that had not ended then.
        """
        if self._is_stale(cursor.epoch):
            self._hub.renew(self)
        tail = self.tail
        if tail.last is None or (tail.epoch == "" and cursor.epoch):
            tail.skip_to(last, cursor.epoch, last_check, running)
            tail.wake()  # who came before the session did
        self._attachment = Attachment(cursor)
        self._has_doubted = False
        self._looked_at = last
        self._settle_in()
        if not cursor.epoch and tail.epoch and self._known_epoch not in {None, ""}:
            self._hub.doubt(tail)  # the journal was here, and is not
        self._known_epoch = tail.epoch
        self.wake()

    def _settle_in(self) -> None:
        self._caught_up_at = self.tail.last or 0
        self._seen_bytes = self.tail.total_bytes

    def _is_stale(self, epoch: str) -> bool:
        """Whether the tail is of a journal that was lost before somebody looked and saw ``epoch``."""
        return self.tail.lost or (epoch != "" and self.tail.epoch not in {None, "", epoch})

    @property
    def has_more(self) -> bool:
        """Whether a pull would bring something, or the news that it cannot continue."""
        tail, attachment = self.tail, self._attachment
        if attachment is None or self._retry is not None:
            return False
        if tail.lost:
            return True
        # A look may know of records that are not published yet, or not on this node.
        is_behind = (tail.last or 0) > attachment.offset or self._looked_at > attachment.offset
        return is_behind and not tail.in_doubt

    async def pull(self) -> Sequence[Record]:
        """Take what is new: all that the tail has, or a page of the journal. Empty if nothing is.

        Raises:
            Resync: It cannot continue. Close it.
        """
        attachment = self._attachment
        if attachment is None or not self.has_more or self._begins_anew(attachment):
            return ()
        tail = self.tail
        if tail.lost or attachment.epoch != tail.epoch:
            raise self._resync(ResyncReason.EPOCH_CHANGED)
        if tail.total_bytes - self._seen_bytes > self._hub.max_lag_bytes:
            raise self._resync(ResyncReason.TOO_FAR_BEHIND)
        if tail.disagrees(attachment.offset, attachment.check):
            return self._doubt()
        records = tail.after(attachment.offset)
        if not records:
            records = await self._read_back(attachment)
            if self._attachment is not attachment or self.tail is not tail or not records:
                return ()  # it was placed elsewhere meanwhile, or has to wait
        try:
            new = attachment.take(records)
        except GapError:
            log.exception("hub.gap", session=tail.session)
            raise self._resync(ResyncReason.EPOCH_CHANGED) from None
        self._has_doubted = False
        self._count(new)
        return new

    def _begins_anew(self, attachment: Attachment) -> bool:
        """Who came before the session did takes its first journal, or the next if that was lost unread."""
        if attachment.epoch == "" and attachment.offset == 0:
            if self.tail.lost:
                self._hub.renew(self)
                self._looked_at = 0
                self._settle_in()
                return True
            attachment.epoch = self.tail.epoch or ""
        return False

    def close(self) -> None:
        """Receive no more. Idempotent."""
        if self._retry is not None:
            self._retry.cancel()
        self._hub.unsubscribe(self)

    def _count(self, records: Sequence[Record]) -> None:
        if self.tail.last == self.offset:
            self._seen_bytes = self.tail.total_bytes
        else:
            since = self._caught_up_at
            self._seen_bytes += sum(record.size for record in records if record.offset > since)

    async def _read_back(self, attachment: Attachment) -> Sequence[Record]:
        """A page of the journal; empty: it has to wait, and is woken."""
        try:
            page = await self._hub.page(self.session, after=attachment.offset, check=attachment.check)
        except (StoreUnavailable, StoreError):
            # Readers wait (DESIGN §8). Until then there is nothing to pull: a carrier must not spin.
            self._retry = asyncio.get_running_loop().call_later(READ_RETRY_SECONDS, self._ask_again)
            return ()
        if self._attachment is not attachment or self.tail.in_doubt or self.tail.lost:
            return ()
        return self._examine(page, attachment)

    def _examine(self, page: Page, attachment: Attachment) -> Sequence[Record]:
        if page.epoch not in {"", attachment.epoch}:
            raise self._resync(ResyncReason.EPOCH_CHANGED)
        if not page.epoch or not page.joins:
            return self._doubt()
        if attachment.offset < page.base - 1:
            raise self._resync(ResyncReason.TRIMMED)
        # It was asked because the journal had more.
        if not page.records or self.tail.contradicts(page.records):
            return self._doubt()
        return page.records

    def _doubt(self) -> Sequence[Record]:
        """What it has had is not in the journal, which may be repaired; it waits for that, once."""
        if self._has_doubted:
            raise self._resync(ResyncReason.EPOCH_CHANGED)
        self._has_doubted = True
        self._hub.doubt(self.tail)
        return ()

    def _ask_again(self) -> None:
        self._retry = None
        self.wake()

    @staticmethod
    def _resync(reason: ResyncReason) -> Resync:
        telemetry.resyncs.labels(reason=reason).inc()
        return Resync(reason)
