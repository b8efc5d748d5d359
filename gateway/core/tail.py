"""The newest records of one session, in memory: what subscribers on this node take from.

Rule 1: what is here is dense, and one history. Records that do not join it are refused; only the journal
knows then which is right.
Rule 2: what is not here is told from nothing new.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from gateway.core.model import RecordKind

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from gateway.core.model import Record, SessionId, TurnId

TAIL_BYTES = 256 * 1024
"""What a tail holds: some seconds of an answer; who is further behind reads the journal."""


class Waiting(Protocol):
    """Somebody to be woken."""

    carrier: str
    """What it is attached by."""

    def wake(self) -> None:
        """There may be something new. Must not block."""


class Tail:
    """The newest records of one session."""

    __slots__ = (
        "before",
        "behind",
        "check",
        "epoch",
        "in_doubt",
        "last",
        "looked_at",
        "lost",
        "patience",
        "records",
        "running",
        "session",
        "size",
        "subscribers",
        "total_bytes",
    )

    def __init__(self, session: SessionId) -> None:
        self.session = session
        self.epoch: str | None = None
        """Empty: there is no session yet; ``None``: nobody has looked. Once it has a name it keeps it."""
        self.last: int | None = None
        """Newest offset known to be in the journal; ``None`` until somebody looked."""
        self.check = ""
        """Of the record there; empty where that is not known."""
        self.before = ""
        """The check of the record before the first that is here; likewise."""
        self.records: list[Record] = []
        self.running: set[TurnId] = set()
        """Turns that have begun and not ended, as far as was seen here."""
        self.size = 0
        self.total_bytes = 0
        """All that was ever added: the difference of two readings is a lag."""
        self.looked_at = 0.0
        """When the journal was last known to be no further than this; by the owner's clock."""
        self.patience = 1.0
        """Part of the polling interval after which the journal is looked at; so that not all are at once."""
        self.lost = False
        self.behind = False
        """Something was journalled that only the journal knows, and nobody has looked since."""
        self.in_doubt = False
        """The journal may have lost what is here: nobody is shown more until that is known."""
        self.subscribers: set[Waiting] = set()

    def add(self, records: Sequence[Record]) -> bool:
        """Take what was just journalled, dense; False: it does not follow on what is here."""
        first = records[0]
        if self.last is not None:
            if first.offset > self.last + 1 or self.epoch not in {"", first.cursor.epoch}:
                return False
            if first.offset <= self.last:
                if self.contradicts(records):
                    return False
                records = records[self.last + 1 - first.offset :]
        if not records:
            return True
        newest = records[-1].cursor
        self.epoch, self.last, self.check = newest.epoch, newest.offset, newest.check
        self.records += records
        self.running.add(records[-1].turn)  # who came in the middle of a turn has not seen its start
        added = 0
        for record in records:
            added += record.size
            if record.draft.kind is not RecordKind.CHUNK:
                self._note(record)
        self.size += added
        self.total_bytes += added
        if self.size > TAIL_BYTES:
            self._forget_oldest()
        return True

    def _note(self, record: Record) -> None:
        if record.kind is RecordKind.TURN_START:
            self.running.add(record.turn)
        else:
            self.running.discard(record.turn)

    def after(self, offset: int) -> Sequence[Record] | None:
        """The records after an offset; ``None`` if the next one is not here any more."""
        if not self.records or self.records[0].offset > offset + 1:
            return None
        return self.records[offset + 1 - self.records[0].offset :]

    def disagrees(self, offset: int, check: str) -> bool:
        """Whether another record than the one of ``check`` stands at an offset, as far as is known."""
        if not check or self.last is None or offset > self.last:
            return False
        known = self.check
        if offset < self.last:
            index = offset - self.records[0].offset if self.records else -2
            if index < -1:
                return False
            known = self.before if index < 0 else self.records[index].cursor.check
        return known not in ("", check)

    def contradicts(self, records: Sequence[Record]) -> bool:
        """Whether records, dense, are of another history: one offset tells of all before it."""
        offset = min(records[-1].offset, self.last or 0)
        if offset < records[0].offset:
            return False
        return self.disagrees(offset, records[offset - records[0].offset].cursor.check)

    def skip_to(self, last: int, epoch: str, check: str = "", running: Collection[TurnId] = ()) -> None:
        """The journal went on without this tail; what is here no longer joins its end."""
        self.records, self.size = [], 0
        self.last, self.epoch, self.check, self.before = last, epoch, check, check
        self.running = set(running)

    def wake(self) -> None:
        """There is something new, or the end."""
        for subscriber in self.subscribers:
            subscriber.wake()

    def _forget_oldest(self) -> None:
        """Drop the older half at once, so that dropping costs little per record."""
        index = 0
        while self.size > TAIL_BYTES // 2 and index < len(self.records) - 1:
            self.size -= self.records[index].size
            index += 1
        if index:
            self.before = self.records[index - 1].cursor.check
        del self.records[:index]
