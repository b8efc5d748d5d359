"""What this node has seen of each session; each script is told, so a journal that lost some of it says so."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from gateway.outcomes import Seen

if TYPE_CHECKING:
    from gateway.core.model import SessionId

MAX_SESSIONS = 16_384
"""Some 300 bytes each. One that is forgotten is not checked for a loss until it is seen again."""

_NOTHING = Seen()


class SeenOffsets:
    """The newest record seen of each session, for the sessions used last."""

    def __init__(self) -> None:
        self._seen: OrderedDict[SessionId, Seen] = OrderedDict()

    def get(self, session: SessionId) -> Seen:
        """The newest seen; of no epoch if none was."""
        return self._seen.get(session, _NOTHING)

    def note(self, session: SessionId, epoch: str, offset: int, check: str) -> None:
        """A reply told of a record. Within an epoch only a newer one counts: replies overtake each other."""
        known = self._seen.get(session)
        if known is not None and known.epoch == epoch and known.offset >= offset:
            return
        if epoch:
            self._seen[session] = Seen(epoch, offset, check)
            self._seen.move_to_end(session)
            if len(self._seen) > MAX_SESSIONS:
                self._seen.popitem(last=False)
        else:
            self._seen.pop(session, None)
