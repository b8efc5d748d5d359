"""One of a crowd: a client of the session protocol on one session, which counts instead of keeping."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

from bench.answers import BenchError
from bench.frames import SESSION_PATH, FrameClient

_RECORD = re.compile(rb'"offset":(\d+),"cursor":"([^"]+)"')
_ATTACHED = b'{"type":"attached"'


class RetryError(BenchError):
    """The node refused for now; its words."""


class LostError(BenchError):
    """The connection was lost."""


class Member(FrameClient):
    """Attaches to a session from a place, and checks that each offset comes once and in order.

    Args:
        session: Which.
        after: A cursor; ``None``: from the first record.

    Attributes:
        caught_up: Resolves when it is attached and has had all that was journalled at that moment, or fails.
        attached_at: When it was attached; 0 until then.
        gone: Resolves when the connection is.
        records: How many came.
    """

    def __init__(self, session: str, after: str | None) -> None:
        super().__init__(SESSION_PATH, is_session=True)
        loop = asyncio.get_running_loop()
        self.caught_up: asyncio.Future[int] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self.attached_at = 0
        self.records = 0
        self._next = 0
        self._last = 0
        self._session = session
        self._after = after

    def attach(self) -> None:
        """Ask; the connection must be open."""
        self.say(
            {"type": "attach", "id": 1, "session": self._session}
            | ({"after": self._after} if self._after else {})
        )

    def frame(self, payload: bytes, now: int) -> None:
        """See the base class."""
        if not self.attached_at:
            self._begin(payload, now)
        for due, found in enumerate(_RECORD.findall(payload), start=self._next):
            if int(found[0]) != due:
                self._fail(BenchError(f"unable to measure; offset {int(found[0])} came where {due} was due"))
                return
            self._next = due + 1
            self.records += 1
        if self.attached_at and self._next > self._last and not self.caught_up.done():
            self.caught_up.set_result(now)

    def lost(self, why: str) -> None:
        """See the base class."""
        self._fail(LostError(why))
        if not self.gone.done():
            self.gone.set_result(None)

    def _begin(self, payload: bytes, now: int) -> None:
        for line in payload.split(b"\n"):
            if line.startswith(_ATTACHED):
                told: dict[str, Any] = json.loads(line)
                if "resync" in told:
                    self._fail(BenchError(f"unable to measure; a place was gone ({told['resync']})"))
                self.attached_at = now
                self._next, self._last = told["offset"] + 1, told["last"]
            elif line.startswith(b'{"type":"error"'):
                refused = json.loads(line)
                kind = RetryError if refused["retryable"] else BenchError
                self._fail(kind(f"unable to attach; {refused}"))

    def _fail(self, error: BenchError) -> None:
        if not self.caught_up.done():
            self.caught_up.set_exception(error)
            self.caught_up.exception()  # whoever waits is told


class Filler(FrameClient):
    """Asks for one turn, and keeps the cursors of its records."""

    def __init__(self) -> None:
        super().__init__(SESSION_PATH, is_session=True)
        self.cursors: list[str] = []
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def frame(self, payload: bytes, now: int) -> None:
        """See the base class."""
        del now
        self.cursors += [cursor.decode() for _, cursor in _RECORD.findall(payload)]
        if b'{"type":"turn-end"' in payload and not self.ended.done():
            self.ended.set_result(time.monotonic_ns())
        elif b'{"type":"error"' in payload:
            self.lost(f"an error came: {payload[:200]!r}")

    def lost(self, why: str) -> None:
        """See the base class."""
        if not self.ended.done():
            self.ended.set_exception(BenchError(f"unable to measure; {why}"))
            self.ended.exception()  # whoever waits is told
