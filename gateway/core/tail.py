"""The newest records of one session, in memory: what subscribers on this node take from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.core.model import Record, SessionId

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
        "behind",
        "epoch",
        "last",
        "lost",
        "records",
        "session",
        "size",
        "subscribers",
        "total_bytes",
    )

    def __init__(self, session: SessionId) -> None:
        self.session = session
        self.epoch: str | None = None
        self.last: int | None = None
        """Newest offset known to be in the journal; ``None`` until somebody looked."""
        self.records: list[Record] = []
        self.size = 0
        self.total_bytes = 0
        """All that was ever added: the difference of two readings is a lag."""
        self.lost = False
        self.behind = False
        """Something was journalled that only the journal knows, and nobody has looked since."""
        self.subscribers: set[Waiting] = set()

    def add(self, records: Sequence[Record]) -> bool:
        """Take what was just journalled; False: it does not follow on what is here."""
        first = records[0]
        if self.last is not None:
            if first.offset > self.last + 1 or self.epoch not in {"", first.cursor.epoch}:
                return False
            if first.offset <= self.last:
                records = records[self.last + 1 - first.offset :]
        if not records:
            return True
        self.epoch, self.last = first.cursor.epoch, records[-1].offset
        self.records += records
        added = sum(record.size for record in records)
        self.size += added
        self.total_bytes += added
        if self.size > TAIL_BYTES:
            self._forget_oldest()
        return True

    def after(self, offset: int) -> Sequence[Record] | None:
        """The records after an offset; ``None`` if the next one is not here any more."""
        if not self.records or self.records[0].offset > offset + 1:
            return None
        return self.records[offset + 1 - self.records[0].offset :]

    def skip_to(self, last: int, epoch: str) -> None:
        """The journal went on without this tail; what is here no longer joins its end."""
        self.records, self.size = [], 0
        self.last, self.epoch = last, epoch

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
        del self.records[:index]
