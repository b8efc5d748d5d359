"""Where a turn's records stand in the journal, as its producer knows it; and what to do when some are lost.

A failover may lose the newest records, of whichever turn. What a producer may write back at its old place
is decided here: only what is exactly the end of the journal that anybody has seen, so that no offset is ever
used for two things. Everything else goes on in a new epoch.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

UNKNOWN = 0
"""An offset that was never told: the record was journalled, but not by a call whose answer came."""

NOT_KNOWN_THERE = -1
"""For :attr:`Found.count`: the journal does not know the turn."""


@dataclass(frozen=True, slots=True)
class Found:
    """How a journal stands that does not hold what it should.

    Attributes:
        epoch: Of it; empty: there is none.
        last: Its newest offset.
        count: How many of the turn's records it has, without the ``turn-start``; or :data:`NOT_KNOWN_THERE`.
        rewound: What was seen of it is lost, however long it is: others have written there since.
    """

    epoch: str
    last: int
    count: int
    rewound: bool = False


@dataclass(frozen=True, slots=True)
class GoOn:
    """Nothing that anybody has seen in this epoch is lost: append from ``index`` on."""

    index: int


@dataclass(frozen=True, slots=True)
class Restore:
    """Write back.

    Attributes:
        index: Of the first record to write.
        first: Offset of the ``turn-start``; 0: it is to be written too.
        renews: The journal gets a new epoch with it.
    """

    index: int
    first: int
    renews: bool


@dataclass(frozen=True, slots=True)
class Wait:
    """What is lost is another's."""


Remedy = GoOn | Restore | Wait


class Placement:
    """Where a turn's records stand.

    Args:
        epoch: Of the journal it was begun in.
        start: Offset of its ``turn-start``.
    """

    def __init__(self, epoch: str, start: int) -> None:
        self.epoch = epoch
        self.start = start
        self._offsets = array("q")

    @property
    def count(self) -> int:
        """How many records are journalled, as far as it was told; the ``turn-start`` is not counted."""
        return len(self._offsets)

    def wrote(self, epoch: str, last: int, count: int, *, new: int) -> None:
        """A call was answered.

        Args:
            epoch: Of the journal.
            last: Its newest offset.
            count: How many of the turn's records it has.
            new: How many of these the call wrote for certain, at its end; where others stand is not known.
        """
        self.epoch = epoch  # what survived kept its offset
        del self._offsets[count:]
        missing = count - len(self._offsets)
        if last == self.start + count:
            new = missing  # nobody else has written since its start
        self._offsets.extend([UNKNOWN] * (missing - new))
        self._offsets.extend(range(last - min(new, missing) + 1, last + 1))

    def forget(self, index: int) -> None:
        """The records from an index on are not where they stood, and are written elsewhere."""
        del self._offsets[index:]

    def ended(self, count: int) -> None:
        """The turn's end is journalled, by a call whose answer did not come."""
        self._offsets.extend([UNKNOWN] * (count - len(self._offsets)))

    def restored(self, epoch: str, last: int, count: int, *, written: int, start: int) -> None:
        """Records were written back.

        Args:
            epoch: Of the journal now.
            last: Its newest offset.
            count: How many of the turn's records it has.
            written: How many of them were written now, at its end.
            start: Offset of the ``turn-start``; 0: it was written in front of them.
        """
        begins = start or last - written
        is_as_it_was = (epoch, begins) == (self.epoch, self.start) and (
            not written or self._offsets[count - 1 : count] == array("q", [last])
        )
        if not is_as_it_was:
            del self._offsets[count - written :]
            self._offsets.extend(range(last - written + 1, last + 1))
        self.epoch, self.start = epoch, begins

    def before(self, index: int) -> int | None:
        """The offset that a record stood behind, where it was journalled; it may be written there again."""
        stood = self._offsets[index] if index < len(self._offsets) else UNKNOWN
        return None if stood == UNKNOWN else stood - 1

    def holds_all(self, found: Found, count: int) -> bool:
        """Whether a journal that does not know the turn has all of its ``count`` records nevertheless."""
        if found.rewound or found.epoch != self.epoch:
            return False
        return len(self._offsets) == count and self._offsets[-1] <= found.last

    def remedy(self, found: Found, seen: int) -> Remedy:
        """What to do.

        Args:
            found: How the journal stands.
            seen: The newest offset that this node has seen in the epoch found.
        """
        if found.epoch != self.epoch:
            if found.count == NOT_KNOWN_THERE:
                return Restore(0, 0, renews=not found.epoch)
            # What is lost of an epoch in which nothing of this turn was written is another's.
            return Wait() if found.rewound else GoOn(found.count)
        if found.count == NOT_KNOWN_THERE:
            newest = max(seen, self.start, *self._offsets[-1:])
            if found.last >= newest and not found.rewound:
                return Restore(self.count, self.start, renews=False)  # only the turn's own key is gone
            lost = array("q", [self.start]) + self._offsets
            return Restore(0, 0, renews=not _is_the_end(lost, found.last, seen))
        lost = self._offsets[found.count :]
        if lost:
            return Restore(found.count, self.start, renews=not _is_the_end(lost, found.last, seen))
        return Wait()


def _is_the_end(lost: array[int], last: int, seen: int) -> bool:
    """Whether the lost records are all that came behind ``last``: dense, and nothing else was seen there."""
    return lost[0] == last + 1 and lost[-1] == last + len(lost) == seen and UNKNOWN not in lost
