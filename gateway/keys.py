"""What the store's keys are called: one hash tag for all of a session, and no name that a client chose."""

from __future__ import annotations

import base64
import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.core.model import SessionId, TurnId


@dataclass(frozen=True, slots=True)
class SessionKeys:
    """The keys of one session.

    Attributes:
        meta: Hash: where the journal stands.
        journal: Stream: the records.
        turns: Sorted set: the turns.
        bell: The channel that the scripts ring: ``r <node>`` (that node has journalled something) or
            ``c <turn>`` (that turn is to be looked at).
        prefix: Starts all of them.
    """

    meta: str
    journal: str
    turns: str
    bell: str
    prefix: str

    def turn(self, turn: TurnId) -> str:
        """A turn's hash."""
        # The same name as in lua/common.lua, where SHA-1 is the digest at hand.
        return f"{self.prefix}turn:{hashlib.sha1(turn.encode(), usedforsecurity=False).hexdigest()}"

    def tombstone(self, turn: TurnId, user: str) -> str:
        """A cancel that came before its send."""
        digest = hashlib.sha256(f"{user}\0{turn}".encode()).hexdigest()[:32]
        return f"{self.prefix}tombstone:{digest}"


@functools.lru_cache(maxsize=4096)
def session_keys(prefix: str, session: SessionId) -> SessionKeys:
    """The keys of a session, for GATEWAY_KEY_PREFIX."""
    digest = hashlib.sha256(session.encode()).digest()[:16]
    start = f"{prefix}:{{{base64.urlsafe_b64encode(digest).decode().rstrip('=')}}}:"
    return SessionKeys(f"{start}meta", f"{start}journal", f"{start}turns", f"{start}bell", start)


@functools.lru_cache(maxsize=4096)
def turn_keys(prefix: str, session: SessionId, turn: TurnId) -> tuple[str, ...]:
    """What every append of a turn names."""
    keys = session_keys(prefix, session)
    return keys.meta, keys.journal, keys.turns, keys.turn(turn)
