"""What the journal answers: one noun per answer, so that a caller has to look at each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from gateway.core.model import By  # noqa: TC001 - msgspec reads the annotation

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


class Seen(msgspec.Struct, frozen=True):
    """The newest record of a session that this node has seen.

    Attributes:
        epoch: Of the journal.
        offset: Where it stands; 0: none.
        check: Of it.
    """

    epoch: str = ""
    offset: int = 0
    check: str = ""


@dataclass(frozen=True, slots=True)
class Rewound:
    """The journal has lost what this node has seen of it: a failover that lost the newest records.

    Attributes:
        epoch: Of the journal.
        last: Its newest offset.
        count: How many of the turn's records it has.
    """

    epoch: str
    last: int
    count: int


BeginResult = Begun | BegunCancelled | Duplicate | Conflict | Busy | Rewound


class Appended(msgspec.Struct, frozen=True):
    """Journalled.

    Attributes:
        epoch: Of the journal.
        last: Offset of its newest record.
        count: How many of the turn's records are journalled now.
        state: The turn's: ``cancelling`` when a cancel is asked for.
        before: The check before the first record that was new.
        check: Of the newest record.
        by: Who asked for a cancel, or will have at the end of an abort's grace.
    """

    epoch: str
    last: int
    count: int
    state: str
    before: str = ""
    check: str = ""
    by: By | None = None


@dataclass(frozen=True, slots=True)
class Behind:
    """The journal has fewer of the turn's records than the caller believed; ask again from ``count``."""

    epoch: str
    last: int
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
    """The journal does not know the turn, or is another one than it was begun in.

    Attributes:
        epoch: Of the journal; empty: there is none.
        last: Its newest offset.
        rewound: It is of the epoch that was seen, and has lost what was seen of it.
    """

    epoch: str
    last: int
    rewound: bool = False


AppendResult = Appended | Behind | Ended | Fenced | Lost | Rewound


@dataclass(frozen=True, slots=True)
class Loss:
    """What a producer found of its turn, and what it is to be.

    Attributes:
        epoch: Of the journal found; empty: there is none.
        last: Its newest offset.
        count: How many of the turn's records it has; -1: it does not know the turn.
        new_epoch: The journal's from now on: ``epoch``, or a new one.
        first: Offset of the ``turn-start``; 0: it is lost too.
        index: Of the first record to be written.
        digest: Of the send.
        path: The chat path.
        user: Who sent.
    """

    epoch: str
    last: int
    count: int
    new_epoch: str
    first: int
    index: int
    digest: str
    path: str
    user: str


@dataclass(frozen=True, slots=True)
class Moved:
    """The journal is not as it was found any more: look again."""


RepairResult = Appended | Moved | Rewound | Ended | Fenced


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
        abort_pending: An ambiguous abort is about to cancel it.
        by: Who cancels it; only from :meth:`turn`.
    """

    turn: TurnId
    state: str
    first: int
    node: NodeId
    was_read: bool = False
    refusal: bytes = b""
    abort_pending: bool = False
    by: By | None = None

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
        check: Of the record at the offset asked for; empty where there is none.
        last_check: Of the newest record.
        rewound: The journal has lost what this node has seen of it.
    """

    epoch: str
    last: int
    base: int
    tag: str
    turns: tuple[TurnLook, ...]
    check: str = ""
    last_check: str = ""
    rewound: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """Records read back, dense.

    Attributes:
        epoch: Of the journal; empty: there is none.
        last: Its newest offset.
        base: The oldest kept.
        records: After the offset asked for.
        joins: False: the record there is not the one that the caller has seen, or the journal ends before it.
        last_check: Of the newest record.
    """

    epoch: str
    last: int
    base: int
    records: tuple[Record, ...]
    joins: bool = True
    last_check: str = ""
