"""Which requests are for a durable chat path, and for which session."""

from __future__ import annotations

import contextlib
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from gateway.core.model import ClientId, Refusal, bad_request, client_id
from gateway.edge.requests import session_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp import web

    from gateway.core.model import SessionId


_SEGMENT = r"(?!(?:\.|%2[eE]){1,2}(?:/|$))[!-\"$-.0->@-~]+"
"""What a ``*`` stands for: printable ASCII without ``/``, ``?``, ``#``; no dot segment in any spelling."""


class ChatEndpoint(StrEnum):
    """What hangs below a chat path."""

    CHAT = ""
    STREAM = "stream"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class ChatTarget:
    """A request's target.

    Attributes:
        endpoint: Which.
        path: The chat path as it was asked for, percent-encoded.
        segment: The session as the path names it, percent-encoded; empty for ``CHAT``.
    """

    endpoint: ChatEndpoint
    path: str
    segment: str = ""

    @property
    def session(self) -> SessionId:
        """The session of a ``STREAM`` or ``STOP``.

        Raises:
            Refusal: The path names none that can be.
        """
        return session_of(self.segment)


class ChatPaths:
    """The configured chat paths.

    Args:
        patterns: Paths; ``*`` stands for one segment.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        chat = "|".join(_SEGMENT.join(map(re.escape, pattern.split("*"))) for pattern in patterns)
        self._target = re.compile(rf"(?P<path>{chat})(?:/(?P<segment>[^/]+)/(?P<endpoint>stream|stop))?")
        self._first = patterns[0]

    def match(self, raw_path: str) -> ChatTarget | None:
        """Find the target of a path, percent-encoded and without its query; ``None``: it is not ours."""
        found = self._target.fullmatch(raw_path)
        if found is None:
            return None
        return ChatTarget(ChatEndpoint(found["endpoint"] or ""), found["path"], found["segment"] or "")

    def chosen(self, path: str | None) -> str:
        """The chat path that a command names; without one, the first that is configured.

        Raises:
            Refusal: It is none of the configured ones, or the first has a ``*``.
        """
        if path is None:
            if "*" in self._first:
                raise bad_request("unable to send; name the path, GATEWAY_CHAT_PATH has a '*'")
            return self._first
        target = self.match(path)
        if target is None or target.endpoint is not ChatEndpoint.CHAT:
            raise bad_request(f"unable to send to {path!r:.200}; GATEWAY_CHAT_PATH does not name it")
        return path


def named_client(request: web.Request, kind: str) -> ClientId:
    """The client of a request for a chat path: ``?client=``, or one of our own.

    The query is the app's, and so may be a ``client`` in it: only what can be an id is taken for one.

    Args:
        request: The request, or the handshake.
        kind: What our own begins with.
    """
    with contextlib.suppress(Refusal):
        return client_id(request.query.get("client", ""))
    return ClientId(f"{kind}-{secrets.token_hex(6)}")
