"""What can go wrong for a client: whose fault, and what now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateway.client.records import Record


class GatewayClientError(Exception):
    """Any of these. Message: ``unable to X; Y``."""


class RefusedError(GatewayClientError):
    """The gateway refused a command, and nothing changed.

    Attributes:
        code: One of the codes of docs/protocol.md, such as ``conflict`` or ``busy``.
        retryable: Whether the same command may succeed later.
        retry_after_seconds: When, if that is known.
    """

    def __init__(self, reply: dict[str, Any]) -> None:
        super().__init__(reply["message"])
        self.code: str = reply["code"]
        self.retryable: bool = reply["retryable"]
        self.retry_after_seconds: float | None = reply.get("retryAfter")


class ResyncError(GatewayClientError):
    """A session cannot be read on from where its reader was.

    Drop what you have of the session, and attach without ``after``.

    Attributes:
        session: Which.
        reason: ``epoch-changed``, ``trimmed`` or ``too-far-behind``.
    """

    def __init__(self, session: str, reason: str) -> None:
        super().__init__(f"unable to read {session!r} on; {reason}, attach again without a cursor")
        self.session = session
        self.reason = reason


class TurnEndedError(GatewayClientError):
    """A turn did not complete.

    Attributes:
        turn: Which.
        reason: ``cancelled``, ``error`` or ``interrupted``.
        by: ``{"client", "user"?}`` of who cancelled, or ``{"backend": True}``.
        error: ``{"code", "message", "status"?, "retryAfter"?}`` of what went wrong.
    """

    def __init__(self, end: Record) -> None:
        why = f" ({end.error['code']}: {end.error['message']})" if end.error else ""
        super().__init__(f"unable to read turn {end.turn!r} to its end; it ended as {end.reason}{why}")
        self.turn = end.turn
        self.reason = end.reason
        self.by = end.by
        self.error = end.error


class GaveUpError(GatewayClientError):
    """``give_up_seconds`` went by without an answer; a send or cancel may have been carried out all the same.

    Its cause is what went wrong last.
    """


class ClosedError(GatewayClientError):
    """The gateway does not want this client, and trying again would not help.

    Attributes:
        code: A WebSocket close code, or the HTTP status that the handshake was refused with.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"unable to stay connected; the gateway answered {code} ({reason})")
        self.code = code


class ProtocolError(GatewayClientError):
    """The gateway, or something on the way, said what the protocol does not allow: a bug."""


class DetachedError(GatewayClientError):
    """Nothing more comes: this client was closed, or attached to the session once more."""
