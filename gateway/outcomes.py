"""What the journal answers: one noun per answer, so that a caller has to look at each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from gateway.core.model import Cursor, NodeId, Record, TurnId

RUNNING_STATES = frozenset({"queued", "running", "cancelling"})


@dataclass(frozen=True, slots=True)
class Fence:
    """The right to write one turn: compared on every append.

    Attributes:
        number: Outdates an older holder.
        token: Random, because a failover may give a number out twice.
    """

    number: int
    token: str


@dataclass(frozen=True, slots=True)
class Begun:
    """The turn is journalled and ours to produce."""

    start: Cursor
    fence: Fence
    waits_for: tuple[TurnId, ...]


@dataclass(frozen=True, slots=True)
class BegunCancelled:
    """A cancel came before the send: its start and its end are journalled, and the backend never hears."""

    start: Cursor


@dataclass(frozen=True, slots=True)
class Duplicate:
    """The turn was begun before."""

    start: Cursor
    state: str


@dataclass(frozen=True, slots=True)
class Conflict:
    """The turn id was used with another body."""


@dataclass(frozen=True, slots=True)
class Busy:
    """Another turn runs, and the send asked to be refused then."""


BeginResult = Begun | BegunCancelled | Duplicate | Conflict | Busy


class Appended(msgspec.Struct, frozen=True):
    """Journalled.

    Attributes:
        epoch: Of the journal.
        last: Offset of the newest record of the call.
        count: How many of the turn's records are journalled now.
        state: The turn's: ``cancelling`` when a cancel is asked for.
    """

    epoch: str
    last: int
    count: int
    state: str


@dataclass(frozen=True, slots=True)
class Behind:
    """The journal has fewer of the turn's records than the caller believed; ask again from ``count``."""

    count: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The turn has ended already."""

    reason: str


@dataclass(frozen=True, slots=True)
class Fenced:
    """Another may write this turn now; write nothing more."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The journal that the turn was begun in is gone, or older than what the caller has seen of it."""


AppendResult = Appended | Behind | Ended | Fenced | Lost


@dataclass(frozen=True, slots=True)
class Cancelling:
    """The turn is marked; ``node`` closes its upstream and ends it."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class NotYet:
    """No such turn. Remembered, unless only a due abort was asked for."""


CancelMark = Cancelling | Ended | NotYet


@dataclass(frozen=True, slots=True)
class TurnLook:
    """One turn of a session.

    Attributes:
        turn: Which.
        state: ``queued``, ``running``, ``cancelling`` or the end reason.
        first: Offset of its ``turn-start``.
        node: Who produces or produced it.
        was_read: A client has read it to its end.
        refusal: What the backend answered instead of a stream, as JSON; only from :meth:`turn`.
    """

    turn: TurnId
    state: str
    first: int
    node: NodeId
    was_read: bool = False
    refusal: bytes = b""

    @property
    def is_running(self) -> bool:
        """It has no ``turn-end`` yet."""
        return self.state in RUNNING_STATES


@dataclass(frozen=True, slots=True)
class Look:
    """Where a session stands.

    Attributes:
        epoch: Empty: the session does not exist.
        last: Newest offset.
        base: Oldest offset kept.
        tag: Of the turn at the offset asked for; empty where there is no record.
        turns: The running ones, oldest first, then the newest that ended.
    """

    epoch: str
    last: int
    base: int
    tag: str
    turns: tuple[TurnLook, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """Records read back, dense."""

    epoch: str
    last: int
    base: int
    records: tuple[Record, ...]
