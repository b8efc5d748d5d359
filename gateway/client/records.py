"""What a session's reader gets: each record once, in order, whatever the connection does meanwhile.

Rule 1: the cursor of the last record handed out is all that it takes to go on.
Rule 2: a reader attaches when it is asked for a record, has none left, and is not attached. So a lost
connection and a reader that was too slow are the same case, and nobody reads for a reader that does not.
Rule 3: an offset that is not the last one plus one is a bug, and told.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from gateway.client.errors import GatewayClientError, ProtocolError, ResyncError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

Kind = Literal["turn-start", "chunk", "turn-end"]


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a session's journal.

    Attributes:
        members: All that the gateway said, as in docs/protocol.md.
    """

    members: dict[str, Any]

    @property
    def kind(self) -> Kind:
        """What it is."""
        kind: Kind = self.members["type"]
        return kind

    @property
    def session(self) -> str:
        """Whose journal."""
        return str(self.members["session"])

    @property
    def turn(self) -> str:
        """Of which turn."""
        return str(self.members["turn"])

    @property
    def offset(self) -> int:
        """1, 2, 3 ... without holes."""
        return int(self.members["offset"])

    @property
    def cursor(self) -> str:
        """To be handed to :meth:`GatewayClient.attach`, which then continues after this record."""
        return str(self.members["cursor"])

    @property
    def data(self) -> Any:
        """Of a chunk: the backend's JSON, decoded; ``None`` if it was no JSON."""
        return self.members.get("data")

    @property
    def text(self) -> str | None:
        """Of a chunk whose payload was no JSON: the payload."""
        return self.members.get("text")

    @property
    def event(self) -> str | None:
        """Of a chunk: the name of the backend's event, if it had one."""
        return self.members.get("event")

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Of a turn's start: the last message that was sent, or none."""
        messages: list[dict[str, Any]] = self.members.get("messages", [])
        return messages

    @property
    def reason(self) -> str | None:
        """Of a turn's end: ``complete``, ``cancelled``, ``error`` or ``interrupted``."""
        return self.members.get("reason")

    @property
    def error(self) -> dict[str, Any] | None:
        """Of a turn's end: what went wrong."""
        return self.members.get("error")

    @property
    def by(self) -> dict[str, Any] | None:
        """Of a turn's start: who sent it; of its end: who cancelled it."""
        return self.members.get("by")


class Records:
    """The records of one session, to be iterated by one task. Made by :meth:`GatewayClient.attach`.

    Args:
        session: Whose.
        after: The cursor to continue after.
        ask: Attaches with these members, and calls :meth:`placed` with the reply before any record comes.
        max_bytes: Most JSON that may wait to be taken. A reader that lets more come is detached, and
            attached again where it is once it has taken all of that.

    Attributes:
        cursor: Of the last record handed out, else where this began; continue after it.
        turns: When it attached last: the running ones, and the newest that ended, as
            ``{"turn", "state", "offset"}``.
        last: The newest offset when it attached last; who has had it has caught up.
    """

    def __init__(
        self,
        session: str,
        after: str | None,
        *,
        ask: Callable[[Records], Awaitable[None]],
        max_bytes: int,
    ) -> None:
        self.session = session
        self.cursor = after
        self.turns: list[dict[str, Any]] = []
        self.last = 0
        self._ask = ask
        self._max_bytes = max_bytes
        self._waiting: deque[tuple[Record, int]] = deque()
        self._bytes = 0
        self._taken: int | None = None
        self._attached = False
        self._error: GatewayClientError | None = None
        self._changed = asyncio.Event()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Record:
        """The next record, whenever it comes.

        Raises:
            ResyncError: It cannot continue.
            RefusedError: It cannot attach again.
            GaveUpError: It could not for too long. Iterate on to try again.
            ClosedError, DetachedError, ProtocolError: Nothing more comes.
        """
        while not self._waiting:
            self.check()
            if not self._attached:
                await self._ask(self)
            else:
                self._changed.clear()
                await self._changed.wait()  # for as long as the session is quiet; a lost connection wakes it
        record, size = self._waiting.popleft()
        self._bytes -= size
        self.cursor = record.cursor
        return record

    # -- for the client that owns it

    async def begin(self) -> None:
        """Attach for the first time.

        Raises:
            ResyncError, RefusedError, GaveUpError, ClosedError: It is not attached.
        """
        await self._ask(self)
        self.check()

    def check(self) -> None:
        """Raise what it failed with, once everything that came before has been taken."""
        if self._error is not None and not self._waiting:
            raise self._error

    def placed(self, reply: dict[str, Any]) -> None:
        """It is attached; records follow."""
        if "resync" in reply:
            self.fail(ResyncError(self.session, reply["resync"]))
            return
        self.cursor = reply["cursor"]
        self.turns, self.last = reply["turns"], reply["last"]
        if self._taken is None:
            self._taken = reply["offset"]
        self._attached = True

    def take(self, record: Record, size: int) -> bool:
        """A record came; returns whether the gateway is to be told to detach."""
        if not self._attached:
            return False
        if self._taken is not None and record.offset != self._taken + 1:
            came = f"offset {record.offset} came where {self._taken + 1} was due"
            self.fail(ProtocolError(f"unable to read {self.session!r} on; {came}"))
            return True
        self._taken = record.offset
        self._waiting.append((record, size))
        self._bytes += size
        self._changed.set()
        self._attached = self._bytes <= self._max_bytes
        return not self._attached

    def lost(self) -> None:
        """The connection is gone."""
        self._attached = False
        self._changed.set()

    def fail(self, error: GatewayClientError) -> None:
        """Nothing more comes; what waits is handed out before the error."""
        self._attached = False
        self._error = error
        self._changed.set()
