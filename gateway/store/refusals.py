"""What the store says instead of a reply, and what each of it means to a caller."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from gateway.core.model import GatewayError

if TYPE_CHECKING:
    from gateway.store.pipeline import ReplyError

log = structlog.get_logger(__name__)


class StoreUnavailable(GatewayError):
    """The store did not answer, or cannot write now. Whether it acted is unknown: repeat the same call."""


class StoreError(GatewayError):
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
        log.warning("store.refused", script=script, error=text)
        return StoreUnavailable("unable to use the store; it cannot write now")
    log.error("store.refused", script=script, error=text)
    return StoreError(f"unable to run {script}; the store refused it")


def lost() -> StoreUnavailable:
    """For calls whose replies did not come."""
    return StoreUnavailable("unable to use the store; it does not answer")


def stopping() -> StoreUnavailable:
    """For calls to a store that is closed."""
    return StoreUnavailable("unable to use the store; the gateway is stopping")
