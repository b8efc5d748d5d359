"""One tail per session, and subscribers that pull.

A tail holds the newest records of a session that somebody on this node is attached to, each encoded once.
A subscriber is a place in it. It is woken when there is something new, takes all of it when its socket has
room, and is woken again. So a slow client costs its place and nothing else: it gets bigger batches, and when
it has fallen off the tail it reads from the journal.

A subscriber is registered first and placed second, so nothing that is journalled in between is missed.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from gateway import telemetry
from gateway.core.attachment import Attachment, GapError
from gateway.core.model import Cursor, ResyncReason
from gateway.core.tail import Tail
from gateway.store import StoreError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.core.model import Record, SessionId
    from gateway.journal import SessionJournal
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


class Subscriber:
    """One client's attachment to one session. Made by :meth:`Hub.subscribe`; close it when done."""

    __slots__ = (
        "_attachment", "_caught_up_at", "_hub", "_known_epoch", "_looked_at", "_retry", "_seen_bytes",
        "_tail", "_wake", "carrier",
    )  # fmt: skip

    def __init__(self, hub: Hub, tail: Tail, wake: Callable[[], None], carrier: str) -> None:
        self.carrier = carrier
        self._wake = wake
        self._hub = hub
        self._tail = tail
        self._attachment: Attachment | None = None
        self._caught_up_at = 0
        self._seen_bytes = 0
        self._known_epoch = tail.epoch
        self._looked_at = 0
        self._retry: asyncio.TimerHandle | None = None

    @property
    def session(self) -> SessionId:
        """Whose records it gets."""
        return self._tail.session

    def wake(self) -> None:
        """There may be something to pull."""
        self._wake()

    @property
    def offset(self) -> int:
        """The last record had."""
        return 0 if self._attachment is None else self._attachment.offset

    def place_at(self, cursor: Cursor, *, last: int) -> None:
        """Begin, or begin again, after a cursor.

        Args:
            cursor: Where.
            last: The journal's newest offset when it was looked at, after this subscriber was registered.
        """
        if self._is_stale(cursor.epoch):
            self._hub.renew(self)
        tail = self._tail
        if tail.last is None or (tail.epoch == "" and cursor.epoch):
            tail.skip_to(last, cursor.epoch)
            tail.wake()  # who came before the session did
        self._attachment = Attachment(cursor)
        self._known_epoch = tail.epoch
        self._looked_at = last
        self._caught_up_at = tail.last or 0
        self._seen_bytes = tail.total_bytes
        self.wake()

    def _is_stale(self, epoch: str) -> bool:
        """Whether the tail is of a journal that was lost before somebody looked and saw ``epoch``."""
        tail = self._tail
        if tail.lost:
            return True
        if tail.epoch in {None, "", epoch}:
            return False
        # A session that was not there may have begun since the look.
        return epoch != "" or self._known_epoch not in {None, ""}

    @property
    def has_more(self) -> bool:
        """Whether a pull would bring something, or the news that it cannot continue."""
        tail, attachment = self._tail, self._attachment
        if attachment is None or self._retry is not None:
            return False
        # A look may know of records that are not published yet, or not on this node.
        return tail.lost or (tail.last or 0) > attachment.offset or self._looked_at > attachment.offset

    async def pull(self) -> Sequence[Record]:
        """Take what is new: all that the tail has, or a page of the journal. Empty if nothing is.

        Raises:
            Resync: It cannot continue. Close it.
        """
        tail, attachment = self._tail, self._attachment
        if attachment is None or not self.has_more:
            return ()
        if attachment.epoch == "" and attachment.offset == 0:
            attachment.epoch = tail.epoch or ""  # it came before the session did
        if tail.lost or attachment.epoch != tail.epoch:
            raise self._resync(ResyncReason.EPOCH_CHANGED)
        if tail.total_bytes - self._seen_bytes > self._hub.max_lag_bytes:
            raise self._resync(ResyncReason.TOO_FAR_BEHIND)
        records = tail.after(attachment.offset)
        if not records:
            records = await self._read_back(attachment)
            if self._attachment is not attachment:
                return ()  # it was placed elsewhere meanwhile
        try:
            new = attachment.take(records)
        except GapError:
            log.exception("hub.gap", session=tail.session)
            raise self._resync(ResyncReason.EPOCH_CHANGED) from None
        self._count(new)
        return new

    def close(self) -> None:
        """Receive no more. Idempotent."""
        if self._retry is not None:
            self._retry.cancel()
        self._hub.unsubscribe(self)

    def _count(self, records: Sequence[Record]) -> None:
        if self._tail.last == self.offset:
            self._seen_bytes = self._tail.total_bytes
        else:
            since = self._caught_up_at
            self._seen_bytes += sum(record.size for record in records if record.offset > since)

    async def _read_back(self, attachment: Attachment) -> Sequence[Record]:
        try:
            page = await self._hub.page(self.session, after=attachment.offset)
        except (StoreUnavailable, StoreError):
            # Readers wait (DESIGN §8). Until then there is nothing to pull: a carrier must not spin.
            self._retry = asyncio.get_running_loop().call_later(READ_RETRY_SECONDS, self._ask_again)
            return ()
        if page.epoch != attachment.epoch:
            raise self._resync(ResyncReason.EPOCH_CHANGED)
        if attachment.offset < page.base - 1:
            raise self._resync(ResyncReason.TRIMMED)
        if not page.records:  # it was asked because the journal had more
            raise self._resync(ResyncReason.EPOCH_CHANGED)
        return page.records

    def _ask_again(self) -> None:
        self._retry = None
        self.wake()

    @staticmethod
    def _resync(reason: ResyncReason) -> Resync:
        telemetry.resyncs.labels(reason=reason).inc()
        return Resync(reason)


class Hub:
    """The tails of a node.

    Args:
        journal: Where who is far behind reads.
        max_lag_bytes: Bytes written since a subscriber was placed that it may not have had yet.
    """

    def __init__(self, journal: SessionJournal, *, max_lag_bytes: int) -> None:
        self.journal = journal
        self.max_lag_bytes = max_lag_bytes
        self._tails: dict[SessionId, Tail] = {}
        self._catching_up: dict[Tail, asyncio.Task[None]] = {}
        self._pages: dict[tuple[SessionId, int], asyncio.Task[Page]] = {}

    def subscribe(self, session: SessionId, wake: Callable[[], None], *, carrier: str) -> Subscriber:
        """Register for a session's records; look at the journal next, then :meth:`Subscriber.place_at`."""
        tail = self._tails.get(session)
        if tail is None:
            tail = self._tails[session] = Tail(session)
        subscriber = Subscriber(self, tail, wake, carrier)
        tail.subscribers.add(subscriber)
        telemetry.attached_subscribers.labels(carrier=carrier).inc()
        return subscriber

    async def page(self, session: SessionId, *, after: int) -> Page:
        """Read the journal: once for all who ask for the same page while it is on its way.

        Raises:
            StoreUnavailable: It is away.
        """
        key = (session, after)
        reading = self._pages.get(key)
        if reading is None:
            reading = asyncio.create_task(self.journal.read(session, after=after), name=f"page-{session}")
            self._pages[key] = reading
            reading.add_done_callback(lambda done: self._page_read(key, done))
        # One of those who wait may be cancelled; the others still want it.
        return await asyncio.shield(reading)

    def _page_read(self, key: tuple[SessionId, int], done: asyncio.Task[Page]) -> None:
        del self._pages[key]
        if not done.cancelled():
            done.exception()  # retrieved, also when everybody who asked is gone

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Forget a subscriber, and its tail with the last of them."""
        tail = subscriber._tail  # noqa: SLF001 - a subscriber is the hub's own
        if subscriber not in tail.subscribers:
            return
        tail.subscribers.discard(subscriber)
        telemetry.attached_subscribers.labels(carrier=subscriber.carrier).dec()
        if not tail.subscribers and self._tails.get(tail.session) is tail:
            del self._tails[tail.session]

    def publish(self, session: SessionId, records: Sequence[Record]) -> None:
        """Show what was just journalled.

        Args:
            session: Whose.
            records: Dense; empty: something was journalled, and only the journal knows what.
        """
        tail = self._tails.get(session)
        if tail is None:
            return
        if records and tail.add(records):
            tail.wake()
        else:
            self._look_soon(tail)

    def renew(self, subscriber: Subscriber) -> None:
        """Move a subscriber that has just looked from a tail whose journal is gone to a new one."""
        old = subscriber._tail  # noqa: SLF001 - a subscriber is the hub's own
        if subscriber not in old.subscribers:
            return  # closed while it looked
        old.subscribers.discard(subscriber)
        self._lose(old)
        tail = self._tails.setdefault(old.session, Tail(old.session))
        tail.subscribers.add(subscriber)
        subscriber._tail = tail  # noqa: SLF001 - see above
        # What was published since the look went to the old one.
        self._look_soon(tail)

    def lose(self, session: SessionId) -> None:
        """The session's journal is gone: everybody attached is told."""
        tail = self._tails.get(session)
        if tail is not None:
            self._lose(tail)

    def _lose(self, tail: Tail) -> None:
        if self._tails.get(tail.session) is tail:
            del self._tails[tail.session]
        tail.lost = True
        tail.wake()

    async def close(self) -> None:
        """End what runs."""
        tasks = [*self._catching_up.values(), *self._pages.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._catching_up.clear()

    def _look_soon(self, tail: Tail) -> None:
        tail.behind = True
        if tail not in self._catching_up:
            name = f"catch-up-{tail.session}"
            self._catching_up[tail] = asyncio.create_task(self._catch_up(tail), name=name)

    async def _catch_up(self, tail: Tail) -> None:
        """Look where the journal ends; subscribers read what the tail does not have."""
        try:
            while tail.behind and tail.subscribers and not tail.lost:
                tail.behind = False  # what is journalled from here on, and told, is looked for again
                await self._look_once(tail)
        finally:
            self._catching_up.pop(tail, None)

    async def _look_once(self, tail: Tail) -> None:
        epoch = tail.epoch  # as it is before: a session may begin, and be published, during the look
        try:
            look = await self.journal.look(tail.session)
        except (StoreUnavailable, StoreError):
            tail.behind = True
            await asyncio.sleep(READ_RETRY_SECONDS)
        else:
            if epoch not in {None, "", look.epoch}:
                self._lose(tail)
            elif tail.last is None or look.last > tail.last:
                tail.skip_to(look.last, look.epoch)
                tail.wake()
