"""The HTTP wire of ``DefaultChatTransport``: POST a send, GET the stream, POST the stop.

A client that goes away detaches; only the stop URL (or GATEWAY_HTTP_DISCONNECT=grace) ends a turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec
import structlog
from aiohttp import web

from gateway.config import Config, HttpDisconnect
from gateway.core.model import (
    By,
    Cursor,
    Refusal,
    SessionId,
    TurnId,
    session_id,
    turn_id,
)
from gateway.core.rawjson import encode
from gateway.core.sendbody import SendBody, read_body
from gateway.core.uistream import STREAM_HEADER
from gateway.edge.admission import UntilItsEnd
from gateway.edge.chatpaths import ChatEndpoint, ChatTarget, named_client
from gateway.edge.headers import downstream_headers, upstream_request_headers
from gateway.edge.replies import failed_response, refusal_response
from gateway.edge.turnstream import CARRIER, TurnStream
from gateway.opening import Answered, NotOpened, Opening, Streaming
from gateway.sends import Accepted, SendRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.edge.admission import OpenConnections
    from gateway.edge.proxy import Proxy
    from gateway.edge.requests import BodyReader
    from gateway.sessions import Sessions

log = structlog.get_logger(__name__)

CLIENT_IS_GONE = 499
"""nginx's number, seen in logs only."""

TURN_HEADER = "Session-Gateway-Turn"

_STREAM_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
    STREAM_HEADER: "v1",
}


class _Refusal(msgspec.Struct):
    status: int
    contentType: str  # noqa: N815 - as kept
    body: str
    retryAfter: str | None = None  # noqa: N815 - as kept


_kept_refusal = msgspec.json.Decoder(_Refusal)


class ChatWire:
    """Handles what is asked of a chat path over plain HTTP.

    Args:
        config: For policies and bounds.
        sessions: The verbs.
        proxy: For a POST that names no session.
        bodies: Reads them; one reader for the whole node, which bounds what all of them hold.
        connections: Those that are open.
    """

    def __init__(
        self,
        config: Config,
        *,
        sessions: Sessions,
        proxy: Proxy,
        bodies: BodyReader,
        connections: OpenConnections,
    ) -> None:
        self._config = config
        self._sessions = sessions
        self._proxy = proxy
        self._stream = TurnStream(config, sessions)
        self._bodies = bodies
        self._connections = connections

    async def handle(self, request: web.Request, target: ChatTarget) -> web.StreamResponse:
        """Answer one request for a chat path."""
        try:
            match target.endpoint, request.method:
                case ChatEndpoint.CHAT, "POST":
                    return await self._post(request)
                case ChatEndpoint.STREAM, "GET":
                    return await self._get_stream(request, target.session)
                case ChatEndpoint.STOP, "POST":
                    return await self._post_stop(request, target.session)
                case _:
                    return await self._proxy.handle(request)
        except Refusal as refusal:
            return refusal_response(refusal)
        except ConnectionError:
            # The client is gone, which is its right; nobody reads what is returned.
            return web.Response(status=CLIENT_IS_GONE)

    # -- the stop URL

    async def _post_stop(self, request: web.Request, session: SessionId) -> web.Response:
        results = await self._sessions.cancel(session, None, By(client=named_client(request, "http")))
        told = [{"turn": turn, "result": result} for turn, result in results]
        return web.Response(body=encode({"success": True, "turns": told}), content_type="application/json")

    # -- resuming

    async def _get_stream(self, request: web.Request, session: SessionId) -> web.StreamResponse:
        found = await self._sessions.newest_turn(session, after=_last_event_id(request))
        if found is None:
            return web.Response(status=HTTPStatus.NO_CONTENT)
        turn, before = found
        response = web.StreamResponse(headers={**_STREAM_HEADERS, TURN_HEADER: turn})
        with self._connections.hold(UntilItsEnd(CARRIER)):
            return await self._stream.write(request, response, session, turn, before)

    # -- sending

    async def _post(self, request: web.Request) -> web.StreamResponse:
        raw = await self._bodies.read(request)
        body = _chat_body(raw, self._config.session_field)
        if body is None or body.session is None:
            return await self._proxy.handle(request, body=raw)
        key = request.headers.get("Idempotency-Key")
        released = asyncio.Event()
        send = SendRequest(
            session=session_id(body.session),
            turn=TurnId(str(uuid.uuid4())) if key is None else turn_id(key),
            body=body,
            path=request.rel_url.raw_path_qs,
            headers=upstream_request_headers(
                request.headers,
                peer=request.remote or "",
                scheme=request.scheme,
                host=request.headers.get("Host", ""),
                ask_identity=True,
            ),
            by=By(client=named_client(request, "http")),
            overlap=self._config.overlap,
            released=released,
        )
        try:
            with self._connections.hold(UntilItsEnd(CARRIER)):
                accepted = await self._sessions.send(send)
                return await self._answer(request, accepted)
        except (asyncio.CancelledError, ConnectionError):
            if self._config.http_disconnect is HttpDisconnect.GRACE:
                self._sessions.abort_soon(send.session, send.turn, send.by)
            raise
        finally:
            # Whatever became of the sender, the producer need not keep the backend's answer for it.
            released.set()

    async def _answer(self, request: web.Request, accepted: Accepted) -> web.StreamResponse:
        """The turn as the backend's answer to this very request."""
        told = {TURN_HEADER: accepted.turn}
        opening = accepted.opening
        if opening is None:
            return await self._replay(request, accepted)
        await asyncio.wait({opening}, timeout=self._config.early_open_seconds)
        found: Opening | None = opening.result() if opening.done() else None
        match found:
            case Answered(kept=kept) if accepted.duplicate and kept:
                return _refused_again(kept, told)
            case Answered() if not accepted.duplicate:
                passed = downstream_headers(found.headers, reframed=False)
                passed.update(told)
                response = web.StreamResponse(status=found.status, reason=found.reason, headers=passed)
                return await self._stream.pass_on(request, response, found, accepted.session, accepted.turn)
            case NotOpened(end) if end is not None and end.error is not None:
                # Whoever is told now must not be told again after a reload.
                await self._sessions.was_read(accepted.session, accepted.turn)
                return failed_response(end.error, told)
            case Streaming(status, headers) if not accepted.duplicate:
                passed = downstream_headers(headers, reframed=True)
                passed.popall("Content-Encoding", None)
                passed.update(told)
                response = web.StreamResponse(status=status, headers=passed)
            case Answered():
                return await self._replay(request, accepted)
            case _:
                response = web.StreamResponse(headers={**_STREAM_HEADERS, **told})
        return await self._stream.write(
            request, response, accepted.session, accepted.turn, accepted.before, resumes=accepted.duplicate
        )

    async def _replay(self, request: web.Request, accepted: Accepted) -> web.StreamResponse:
        """A send that was repeated: the ended turn, or the same refusal."""
        told = {TURN_HEADER: accepted.turn}
        known = await self._sessions.turn(accepted.session, accepted.turn)
        if known is not None and known.refusal:
            return _refused_again(known.refusal, told)
        response = web.StreamResponse(headers={**_STREAM_HEADERS, **told})
        return await self._stream.write(request, response, accepted.session, accepted.turn, accepted.before)


def _chat_body(raw: bytes, session_field: str) -> SendBody | None:
    """The body of a send; ``None`` for one of another kind, which is not ours to judge."""
    with contextlib.suppress(Refusal):
        return read_body(raw, session_field=session_field)
    return None


def _last_event_id(request: web.Request) -> Cursor | None:
    """The place asked for; ``None`` for what is no cursor, such as an id that the backend once wrote."""
    text = request.headers.get("Last-Event-ID")
    with contextlib.suppress(Refusal):
        return None if not text else Cursor.parse(text)
    return None


def _refused_again(kept: bytes, told: Mapping[str, str]) -> web.Response:
    refusal = _kept_refusal.decode(kept)
    headers = {**told, "Content-Type": refusal.contentType}
    if refusal.retryAfter is not None:
        headers["Retry-After"] = refusal.retryAfter
    return web.Response(status=refusal.status, body=refusal.body.encode(), headers=headers)
