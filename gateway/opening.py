"""What the backend's answer turned out to be, as the sender's own wire is told it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from multidict import CIMultiDictProxy

    from gateway.core.turn import End


@dataclass(frozen=True, slots=True)
class Streaming:
    """The backend answers with an event stream."""

    status: int
    headers: CIMultiDictProxy[str]


@dataclass(frozen=True, slots=True)
class Answered:
    """The backend answers with something else, which only the sender gets.

    Attributes:
        status: Of HTTP.
        reason: The status in words.
        headers: As they came.
        body: The body; may be read once. Raises :class:`~gateway.core.model.GatewayError` when it breaks off.
        kept: What is kept of a refusal, for a send that is repeated; empty for a success.
    """

    status: int
    reason: str
    headers: CIMultiDictProxy[str]
    body: AsyncIterator[bytes]
    kept: bytes = b""


@dataclass(frozen=True, slots=True)
class NotOpened:
    """There is no answer: the turn ended first, as its ``turn-end`` says."""

    end: End | None


Opening = Streaming | Answered | NotOpened
