"""The commands of the session protocol, carried out the same way whatever the carrier."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from aiohttp import web

from gateway.core import wire
from gateway.core.model import (
    By,
    ClientId,
    Cursor,
    Overlap,
    RecordKind,
    bad_request,
    client_id,
    session_id,
    turn_id,
)
from gateway.core.sendbody import read_body, with_session
from gateway.edge.headers import SOCKET_HEADERS, socket_headers, upstream_request_headers
from gateway.edge.replies import refusal_response
from gateway.sends import Accepted, SendRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from multidict import CIMultiDict

    from gateway.config import Config
    from gateway.core.model import Record, Refusal, TurnId
    from gateway.edge.chatpaths import ChatPaths
    from gateway.sessions import Sessions

PIECE_BYTES = 64 * 1024
"""About the most that is written at once. Who takes one in two heartbeats is served, also on 2G."""

CLIENT_IS_GONE = 499
"""nginx's number, seen in logs only."""


class Commands:
    """Carries out what has one reply and no pushes.

    Args:
        config: For policies.
        sessions: The verbs.
        paths: Which chat paths a send may name.
    """

    def __init__(self, config: Config, *, sessions: Sessions, paths: ChatPaths) -> None:
        self._config = config
        self._sessions = sessions
        self._paths = paths

    async def send(
        self, request: web.Request, command: wire.Send, by: By, reply: Callable[[bytes], None]
    ) -> Accepted:
        """Ask for a turn.

        Args:
            request: What brought the command, or the socket that did: its headers are handed on.
            command: As it was read.
            by: Who.
            reply: Given the ``accepted`` before anybody is shown a record of the turn.

        Raises:
            Refusal: Nothing was sent to the backend.
        """
        session = session_id(command.session)
        config = self._config
        raw = with_session(bytes(command.body), session=session, session_field=config.session_field)
        asked = SendRequest(
            session=session,
            turn=turn_id(command.turn),
            body=read_body(raw, session_field=config.session_field),
            path=self._paths.chosen(command.path),
            headers=handed_on(request, command.headers or {}, config),
            by=by,
            overlap=config.overlap if command.overlap is None else _overlap(command.overlap),
        )
        return await self._sessions.send(asked, accepted=lambda done: reply(_accepted(command, done)))

    async def cancel(self, command: wire.Cancel, by: By) -> bytes:
        """End a turn, or all that run; returns the reply.

        Raises:
            Refusal: A turn could not be ended yet.
        """
        turn = None if command.turn is None else turn_id(command.turn)
        results = await self._sessions.cancel(session_id(command.session), turn, by)
        return wire.cancelled(command.id, results)


def client_of(request: web.Request) -> ClientId:
    """The client that a request names with ``?client=``, or a new one.

    Raises:
        Refusal: What it names can be no client.
    """
    named = request.query.get("client")
    return ClientId(f"c-{secrets.token_hex(8)}") if named is None else client_id(named)


def wanted_place(after: str | None, start: wire.AttachFrom | None) -> Cursor | wire.AttachFrom:
    """Where a client wants to attach.

    Args:
        after: The cursor that it hands back, if it has one.
        start: Where to begin, which is for those who have none.

    Raises:
        Refusal: It is no cursor, or both are given.
    """
    if after is None:
        return wire.AttachFrom.START if start is None else start
    if start is not None:
        raise bad_request("unable to attach after a cursor and from a start; leave one of them out")
    return Cursor.parse(after)


def read_to_their_end(turns: Iterable[wire.TurnStatus], records: Iterable[Record]) -> list[TurnId]:
    """The turns that a client has had to their end once these records are written.

    Args:
        turns: As it was told of them when it attached; what is older is old news.
        records: What is written.
    """
    first_news = min((turn.offset for turn in turns), default=0)
    return [
        record.turn
        for record in records
        if record.kind is RecordKind.TURN_END and record.offset >= first_news
    ]


def in_pieces(parts: Iterable[bytes], separator: bytes = b"") -> Iterator[bytes]:
    """Join what is written, in pieces of about ``PIECE_BYTES``; a larger part is a piece of its own."""
    piece: list[bytes] = []
    size = 0
    for part in parts:
        if piece and size + len(part) > PIECE_BYTES:
            yield separator.join(piece)
            piece, size = [], 0
        piece.append(part)
        size += len(part)
    if piece:
        yield separator.join(piece)


def handed_on(request: web.Request, frame: dict[str, str], config: Config) -> CIMultiDict[str]:
    """The headers of a command's send, as the backend gets them."""
    allowed = SOCKET_HEADERS | frozenset(config.forward_headers)
    headers = upstream_request_headers(
        socket_headers(request.headers, frame, allowed),
        peer=request.remote or "",
        scheme=request.scheme,
        host=request.headers.get("Host", ""),
        ask_identity=True,
    )
    headers["Content-Type"] = "application/json"
    headers["Accept"] = "*/*"
    return headers


def answered(reply: bytes) -> web.Response:
    """A reply of the protocol as the answer to a request."""
    return web.Response(
        body=reply,
        content_type="application/json",
        headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"},
    )


def refused(identifier: wire.CommandId | None, refusal: Refusal) -> web.Response:
    """The same for a refusal, with the status and the headers that every wire gives it."""
    response = refusal_response(refusal)
    response.body = wire.refused(identifier, refusal)
    return response


def _overlap(named: str) -> Overlap:
    try:
        return Overlap(named)
    except ValueError:
        known = ", ".join(Overlap)
        raise bad_request(f"unable to send with overlap {named!r:.60}; known are {known}") from None


def _accepted(command: wire.Send, accepted: Accepted) -> bytes:
    return wire.accepted(
        command.id, accepted.session, accepted.turn, accepted.before, duplicate=accepted.duplicate
    )
