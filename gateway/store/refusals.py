"""What the store says instead of a reply, and what each of it means to a caller."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

import structlog

from gateway.core.model import GatewayError

if TYPE_CHECKING:
    from gateway.store.pipeline import ReplyError

log = structlog.get_logger(__name__)

SAID_AGAIN_SECONDS = 1.0
"""Thousands of calls are refused together, and again and again: one line tells of all."""

MAX_REASON_CHARACTERS = 300
"""What a server says of an error may be long."""


class StoreFailure(GatewayError):
    """A call of the store came to nothing.

    Args:
        message: For whoever asked; holds nothing of where the store is, or of what it says.

    Attributes:
        reason: What the server said, or what became of the connection; for operators. Holds no secret.
    """

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = " ".join(reason.split())[:MAX_REASON_CHARACTERS]


class StoreUnavailable(StoreFailure):
    """The store did not answer, or cannot write now. Whether it acted is unknown: repeat the same call."""


class StoreError(StoreFailure):
    """The store answered that the call itself is wrong: a bug of ours, or a server that is too old."""


class UnusableConnection(Exception):
    """What came means that replies and calls no longer match, or that none will be useful."""


_CANNOT_ACT_NOW = frozenset(
    (
        "OOM",
        "NOPERM",  # an ACL that was taken away is an outage, and comes back as one does
        "CLUSTERDOWN",
        "TRYAGAIN",
        "MISCONF",
        "NOREPLICAS",
        "BUSY",
        "UNKILLABLE",
        # A cluster's redirections, where nobody follows them: more of them than a call has time for.
        "MOVED",
        "ASK",
    )
)
"""The first words of errors that go away without our doing; the call itself is right."""

_ENDS_THE_CONNECTION = frozenset(("LOADING", "MASTERDOWN", "NOAUTH", "READONLY", "WRONGPASS"))
"""All calls on this connection would get the same answer; a new one may lead to another server."""

_CANNOT_ACT_NOW_IN_WORDS = (
    # A script whose slot is being moved: it met a key that is with the other server already.
    "access a non local key",
    # What is NOPERM outside of a script: Valkey, and Redis 7.
    "ACL failure in script",
    "The user executing the script can't",
)
"""The same, of errors whose first word says nothing."""

_TOO_MANY_CLIENTS = "max number of clients"

MOVED_AWAY = frozenset(("MOVED", "ASK"))
"""The first words of a cluster's redirections."""

ONE_OF_A_CLUSTER = "this server is one of a cluster; say redis+cluster:// in GATEWAY_REDIS_URL"


class _Refusals:
    """Says what was refused, at most one line of a kind in so long; each counts those left out before it."""

    def __init__(self) -> None:
        self._said_at: dict[tuple[str, bool], float] = {}
        self._left_out: Counter[tuple[str, bool]] = Counter()

    def say(self, script: str, text: str, code: str, *, is_ours: bool) -> None:
        """Log one.

        Args:
            script: What was called.
            text: What the server said.
            code: Its first word; lines of one code stand for each other.
            is_ours: Whether the call itself was wrong.
        """
        kind = (code if code.isupper() else "", is_ours)  # a script's own words are no code
        now = time.monotonic()
        said_at = self._said_at.get(kind)
        if said_at is not None and now - said_at < SAID_AGAIN_SECONDS:
            self._left_out[kind] += 1
            return
        self._said_at[kind] = now
        left_out = self._left_out.pop(kind, 0)
        more = {"left_out": left_out} if left_out else {}
        say = log.error if is_ours else log.warning
        say("store.refused", script=script, error=text, **more)


_refusals = _Refusals()


def first_word(error: ReplyError) -> str:
    """An error's kind, such as ``NOSCRIPT``."""
    return str(error).partition(" ")[0]


def ends_the_connection(error: ReplyError, code: str) -> bool:
    """Whether no call on the connection that said so can succeed."""
    return code in _ENDS_THE_CONNECTION or _TOO_MANY_CLIENTS in str(error)


def explained(script: str, error: ReplyError, code: str) -> GatewayError:
    """What a caller gets for an error, which is logged."""
    text = str(error)
    if code in _CANNOT_ACT_NOW or any(words in text for words in _CANNOT_ACT_NOW_IN_WORDS):
        _refusals.say(script, text, code, is_ours=False)
        if code in MOVED_AWAY:  # who follows them does not come by here
            return StoreUnavailable(f"unable to use the store; {ONE_OF_A_CLUSTER}", reason=ONE_OF_A_CLUSTER)
        return StoreUnavailable("unable to use the store; it cannot write now", reason=text)
    _refusals.say(script, text, code, is_ours=True)
    return StoreError(f"unable to run {script}; the store refused it", reason=text)


def lost(reason: str = "") -> StoreUnavailable:
    """For calls whose replies did not come.

    Args:
        reason: As :attr:`StoreFailure.reason`.
    """
    return StoreUnavailable("unable to use the store; it does not answer", reason=reason)


def stopping() -> StoreUnavailable:
    """For calls to a store that is closed."""
    return StoreUnavailable("unable to use the store; the gateway is stopping")
