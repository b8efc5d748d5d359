"""Where a client stands in a session: catch-up and live joined, gapless and once.

Rule 1: a record is handed out once, and only when it is the next one.
Rule 2: a place that cannot be continued is told as a resync with its reason, never as "nothing new".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.core.model import Cursor, GatewayError, ResyncReason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.core.model import Record


class GapError(GatewayError):
    """Records were offered that do not follow on those had."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an attach begins.

    Attributes:
        cursor: Records follow from here.
        resync: Why it is not where the client wanted to continue, if it is not.
    """

    cursor: Cursor
    resync: ResyncReason | None = None


def place(after: Cursor | None, *, epoch: str, last: int, base: int, tag: str, check: str = "") -> Place:
    """Find where an attach begins.

    Args:
        after: What the client handed back; ``None``: from the first record kept.
        epoch: Of the journal; empty if there is none.
        last: Newest offset.
        base: Oldest offset kept.
        tag: Of the turn whose record stands at ``after``; empty if none stands there.
        check: Of that record; empty if none stands there.
    """
    first = Place(Cursor(epoch, base - 1))
    if after is None:
        return first
    if after.epoch not in ("", epoch) or after.offset > last:
        return Place(first.cursor, ResyncReason.EPOCH_CHANGED)
    if after.offset < base - 1:
        return Place(first.cursor, ResyncReason.TRIMMED)
    if (after.tag and tag and after.tag != tag) or (after.check and check and after.check != check):
        # The offset was used again after a loss that nobody saw.
        return Place(first.cursor, ResyncReason.EPOCH_CHANGED)
    return Place(Cursor(epoch, after.offset, after.tag, after.check or check))


class Attachment:
    """One client's progress through a session.

    Args:
        cursor: Where it begins.
    """

    __slots__ = ("check", "epoch", "offset")

    def __init__(self, cursor: Cursor) -> None:
        self.epoch = cursor.epoch
        self.offset = cursor.offset
        """The last record had."""
        self.check = cursor.check
        """Its check, where that is known."""

    def take(self, records: Sequence[Record]) -> Sequence[Record]:
        """Hand out what is new of ``records``, which are dense and in order.

        Raises:
            GapError: The first new one is not the next one; nothing was taken.
        """
        if not records:
            return records
        skip = self.offset + 1 - records[0].offset
        if skip < 0:
            raise GapError(f"unable to continue after {self.offset}; {records[0].offset} came next")
        new = records[skip:] if skip else records
        if new:
            self.offset, self.check = new[-1].offset, new[-1].cursor.check
        return new
