"""One tail per session, and subscribers that pull.

A tail holds the newest records of a session that somebody on this node is attached to, each encoded once.
A subscriber is a place in it. It is woken when there is something new, takes all of it when its socket has
room, and is woken again. So a slow client costs its place and nothing else: it gets bigger batches, and when
it has fallen off the tail it reads from the journal.

What this node journals goes straight to the tail. What others journal is read into it once for all: when the
doorbell rings, and when nothing has been heard for GATEWAY_POLL, for a bell may be lost.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from gateway import telemetry
from gateway.core.tail import Tail
from gateway.pages import Pages
from gateway.subscriber import Resync, Subscriber
from gateway.tailreader import TailReader

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.core.model import Record, SessionId
    from gateway.doorbell import Doorbell
    from gateway.journal import SessionJournal
    from gateway.outcomes import Page
    from gateway.repairs import Repairs

__all__ = ["Hub", "Resync", "Subscriber"]

IDLE_POLLS = 10
"""A session in which no turn runs is looked at that much more seldom."""

LOOKS_PER_POLL = 6
"""How often the tails are gone through in GATEWAY_POLL, for those that are due."""

EARLIEST, LATEST = 0.6, 0.8
"""Part of the interval after which a tail is due: another one for each, so that they spread; and early, so
that with going through them, which takes a sixth, the interval is kept."""


class Hub:
    """The tails of a node.

    Args:
        journal: Where who is far behind reads.
        doorbell: Rings for the sessions that are watched; its callbacks are set by whoever wires it.
        repairs: Told of a journal that has lost what was shown.
        max_lag_bytes: Bytes written since a subscriber was placed that it may not have had yet.
        poll_seconds: Silence after which the journal of a running turn is looked at.
    """

    def __init__(
        self,
        journal: SessionJournal,
        *,
        doorbell: Doorbell,
        repairs: Repairs,
        max_lag_bytes: int,
        poll_seconds: float,
    ) -> None:
        self.journal = journal
        self.max_lag_bytes = max_lag_bytes
        self._doorbell = doorbell
        self._poll_seconds = poll_seconds
        self._tails: dict[SessionId, Tail] = {}
        self._reader = TailReader(journal, repairs, self._lose)
        self._pages = Pages(journal)
        self._now = asyncio.get_running_loop().time

    # -- subscribers

    def subscribe(self, session: SessionId, wake: Callable[[], None], *, carrier: str) -> Subscriber:
        """Register for a session's records; look at the journal next, then :meth:`Subscriber.place_at`."""
        tail = self._tail_of(session)
        subscriber = Subscriber(self, tail, wake, carrier)
        tail.subscribers.add(subscriber)
        telemetry.attached_subscribers.labels(carrier=carrier).inc()
        return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Forget a subscriber, and its tail with the last of them."""
        tail = subscriber.tail
        if subscriber not in tail.subscribers:
            return
        telemetry.attached_subscribers.labels(carrier=subscriber.carrier).dec()
        self._part(tail, subscriber)

    def renew(self, subscriber: Subscriber) -> None:
        """Move a subscriber that has just looked from a tail whose journal is gone to a new one."""
        old = subscriber.tail
        if subscriber not in old.subscribers:
            return  # closed while it looked
        self._lose(old)
        subscriber.tail = tail = self._tail_of(old.session)
        tail.subscribers.add(subscriber)
        self._part(old, subscriber)
        # What was published since the look went to the old one.
        self._reader.look_soon(tail)

    def _tail_of(self, session: SessionId) -> Tail:
        tail = self._tails.get(session)
        if tail is None:
            tail = self._tails[session] = Tail(session)
            tail.looked_at = self._now()
            tail.patience = random.uniform(EARLIEST, LATEST)  # noqa: S311 - no secret
            self._doorbell.watch(session)
        return tail

    def _part(self, tail: Tail, subscriber: Subscriber) -> None:
        tail.subscribers.discard(subscriber)
        if tail.subscribers:
            return
        self._doorbell.unwatch(tail.session)  # each tail is watched once, also one that is lost
        if self._tails.get(tail.session) is tail:
            del self._tails[tail.session]

    async def page(self, session: SessionId, *, after: int, check: str) -> Page:
        """Read the journal for who is not on the tail.

        Raises:
            StoreUnavailable: It is away.
            StoreError: It refused.
        """
        return await self._pages.read(session, after=after, check=check)

    # -- what is new

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
            tail.looked_at = self._now()
            tail.wake()
        else:
            self._reader.look_soon(tail)

    def rung(self, session: SessionId) -> None:
        """Another node has journalled something."""
        tail = self._tails.get(session)
        if tail is not None:
            self._reader.look_soon(tail)

    def missed(self, session: SessionId) -> None:
        """Bells of the session may have been lost."""
        self.rung(session)

    def missed_all(self) -> None:
        """The store may be another one than before, or have lost something."""
        for tail in self._tails.values():
            self._reader.look_soon(tail)

    async def run(self) -> None:
        """Look at what nobody has told of for long; its owner cancels it."""
        while True:
            await asyncio.sleep(self._poll_seconds / LOOKS_PER_POLL)
            now = self._now()
            for tail in self._tails.values():
                if now >= self._due_at(tail) and not self._reader.is_reading(tail):
                    self._reader.look_soon(tail)

    def _due_at(self, tail: Tail) -> float:
        interval = self._poll_seconds * (1 if tail.running else IDLE_POLLS)
        return tail.looked_at + interval * tail.patience

    # -- what is gone

    def doubt(self, tail: Tail) -> None:
        """The journal seems to have lost something: nobody is shown more before that is known."""
        tail.in_doubt = bool(tail.epoch)
        self._reader.look_soon(tail)

    def _lose(self, tail: Tail) -> None:
        if self._tails.get(tail.session) is tail:
            del self._tails[tail.session]
        tail.lost = True
        tail.wake()

    async def close(self) -> None:
        """End what runs."""
        await self._reader.close()
        await self._pages.close()
