"""Calls of scripts, from when they are asked to their replies."""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gateway.core.model import GatewayError
from gateway.store.pipeline import Argument, pack, packed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.store.scripts import Script

__all__ = ["Argument", "Call", "CallQueue"]


@dataclass(slots=True)
class Detour:
    """Of a call that waits for the map, or was redirected.

    Attributes:
        asking: Whether the server must be told to let it in, where its slot is not yet.
        redirections: How many there were.
    """

    asking: bool = False
    redirections: int = 0


@dataclass(slots=True, eq=False)
class Call:
    """One call of a script.

    Attributes:
        script: What is called.
        key: The first of its keys: they are all in one slot.
        parts: The command, packed.
        size: Of it and of the reply that is expected, in bytes.
        asked_at: By the loop's clock.
        reply: Resolved once; its caller may have gone away.
        detour: How it got where it is, if a cluster did not let it take the straight way.
    """

    script: Script
    key: str
    parts: list[bytes]
    size: int
    asked_at: float
    reply: asyncio.Future[Any]
    detour: Detour | None = None

    @classmethod
    def of(cls, script: Script, keys: Sequence[str], arguments: Sequence[Argument], reply_bytes: int) -> Call:
        """A call that is asked now."""
        parts = pack(2 + len(keys) + len(arguments), _called(script.sha, tuple(keys)), arguments)
        loop = asyncio.get_running_loop()
        size = sum(map(len, parts)) + reply_bytes
        return cls(script, keys[0], parts, size, loop.time(), loop.create_future())

    def resolve(self, outcome: object) -> None:
        """Give the caller its reply, or the error in its place."""
        if self.reply.done():  # its caller went away; the call was carried out all the same
            return
        if isinstance(outcome, GatewayError):
            self.reply.set_exception(outcome)
        else:
            self.reply.set_result(outcome)

    def forget(self) -> Call:
        """Nobody waits for the reply, nor for the error, which is logged."""
        self.reply.add_done_callback(_look_away)
        return self


def _look_away(reply: asyncio.Future[Any]) -> None:
    if not reply.cancelled():
        reply.exception()


class CallQueue(deque[Call]):
    """Calls that have not left yet, in the order they were asked."""

    def take(self, size: int) -> list[Call]:
        """The first ones, up to so many bytes; one, if there is any, however large."""
        taken: list[Call] = []
        while self and (not taken or self[0].size <= size):
            taken.append(self.popleft())
            size -= taken[-1].size
        return taken

    def take_older(self, asked_at: float) -> list[Call]:
        """The first ones that were asked by then."""
        taken: list[Call] = []
        while self and self[0].asked_at <= asked_at:
            taken.append(self.popleft())
        return taken

    def take_meant(self, is_meant: Callable[[Call], bool]) -> list[Call]:
        """Some, wherever they stand."""
        taken = [call for call in self if is_meant(call)]
        rest = [call for call in self if not is_meant(call)]
        self.clear()
        self.extend(rest)
        return taken


@functools.lru_cache(maxsize=4096)
def _called(sha: str, keys: tuple[str, ...]) -> bytes:
    """The head of an EVALSHA; a turn's appends all have the same one."""
    return b"".join(map(packed, ("EVALSHA", sha, len(keys), *keys)))
