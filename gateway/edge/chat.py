"""The HTTP wire of ``DefaultChatTransport``: POST a send, GET the stream, POST the stop.

A client that goes away detaches; only the stop URL (or GATEWAY_HTTP_DISCONNECT=grace) ends a turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import uuid
from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec
import structlog
from aiohttp import web

from gateway.config import Config, HttpDisconnect
from gateway.core.httpwire import encode_record, read_turn_end
from gateway.core.model import (
    By,
    ClientId,
    Cursor,
    ErrorCode,
    GatewayError,
    Record,
    RecordKind,
    Refusal,
    SessionId,
    TurnId,
    client_id,
    session_id,
    turn_id,
)
from gateway.core.rawjson import encode
from gateway.core.sendbody import SendBody, read_body
from gateway.core.sse import encode_comment, encode_event
from gateway.core.uistream import DONE, STREAM_HEADER
from gateway.edge.chatpaths import ChatEndpoint, ChatPaths, ChatTarget
from gateway.edge.connection import cut_when_stalled
from gateway.edge.headers import downstream_headers, upstream_request_headers
from gateway.edge.pulse import Pulse
from gateway.edge.replies import failed_response, refusal_response
from gateway.hub import Resync, Subscriber
from gateway.opening import Answered, NotOpened, Opening, Streaming
from gateway.sessions import Accepted, SendRequest, Sessions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.edge.proxy import Proxy

log = structlog.get_logger(__name__)

CARRIER = "http"
BODY_SECONDS = 60.0
"""How long a body may take; nginx's client_body_timeout is 60 s between two reads."""

CLIENT_IS_GONE = 499
"""nginx's number, seen in logs only."""

TURN_HEADER = "Session-Gateway-Turn"

_STREAM_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
    STREAM_HEADER: "v1",
}

_HEARTBEAT = encode_comment("heartbeat")


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
        paths: Which paths are durable.
        proxy: For a POST that names no session.
    """

    def __init__(self, config: Config, *, sessions: Sessions, paths: ChatPaths, proxy: Proxy) -> None:
        self._config = config
        self._sessions = sessions
        self._paths = paths
        self._proxy = proxy

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
        results = await self._sessions.cancel(session, None, self._by(request))
        told = [{"turn": turn, "result": result} for turn, result in results]
        return web.Response(body=encode({"success": True, "turns": told}), content_type="application/json")

    # -- resuming

    async def _get_stream(self, request: web.Request, session: SessionId) -> web.StreamResponse:
        found = await self._sessions.newest_turn(session, after=_last_event_id(request))
        if found is None:
            return web.Response(status=HTTPStatus.NO_CONTENT)
        turn, before = found
        response = web.StreamResponse(headers={**_STREAM_HEADERS, TURN_HEADER: turn})
        return await self._stream(request, response, session, turn, before)

    # -- sending

    async def _post(self, request: web.Request) -> web.StreamResponse:
        raw = await self._read_body(request)
        body = _chat_body(raw, self._config.session_field)
        if body is None or body.session is None:
            return await self._proxy.handle(request, body=raw)
        key = request.headers.get("Idempotency-Key")
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
            by=self._by(request),
            overlap=self._config.overlap,
            takes_answer=True,
        )
        accepted = await self._sessions.send(send)
        try:
            return await self._answer(request, accepted)
        except (asyncio.CancelledError, ConnectionError):
            if self._config.http_disconnect is HttpDisconnect.GRACE:
                self._sessions.abort_soon(send.session, send.turn, send.by)
            raise
        finally:
            _release(accepted)

    async def _read_body(self, request: web.Request) -> bytes:
        limit = self._config.max_body_bytes
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.content.iter_any():
                    size += len(piece)
                    if size > limit:
                        message = f"unable to read a body of more than {limit} bytes (GATEWAY_MAX_BODY)"
                        raise Refusal(ErrorCode.TOO_LARGE, message)
                    pieces.append(piece)
        except TimeoutError:
            raise web.HTTPRequestTimeout(text="unable to read the body; it came too slowly\n") from None
        return b"".join(pieces)

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
                return await self._pass_on(request, found, accepted)
            case NotOpened(end) if end is not None and end.error is not None:
                # Whoever is told now must not be told again after a reload.
                await self._sessions.was_read(accepted.session, accepted.turn)
                return failed_response(end.error, told)
            case Streaming(status, headers):
                passed = downstream_headers(headers, reframed=True)
                passed.popall("Content-Encoding", None)
                if accepted.duplicate:
                    passed.popall("Set-Cookie", None)
                passed.update(told)
                response = web.StreamResponse(status=status, headers=passed)
            case Answered():
                return await self._replay(request, accepted)
            case _:
                response = web.StreamResponse(headers={**_STREAM_HEADERS, **told})
        return await self._stream(request, response, accepted.session, accepted.turn, accepted.before)

    async def _replay(self, request: web.Request, accepted: Accepted) -> web.StreamResponse:
        """A send that was repeated: the ended turn, or the same refusal."""
        told = {TURN_HEADER: accepted.turn}
        known = await self._sessions.turn(accepted.session, accepted.turn)
        if known is not None and known.refusal:
            return _refused_again(known.refusal, told)
        response = web.StreamResponse(headers={**_STREAM_HEADERS, **told})
        return await self._stream(request, response, accepted.session, accepted.turn, accepted.before)

    async def _pass_on(
        self, request: web.Request, answered: Answered, accepted: Accepted
    ) -> web.StreamResponse:
        """An answer that is no stream, as it comes; nobody but the sender gets it."""
        headers = downstream_headers(answered.headers, reframed=False)
        headers[TURN_HEADER] = accepted.turn
        response = web.StreamResponse(status=answered.status, reason=answered.reason, headers=headers)
        await response.prepare(request)
        try:
            async for data in answered.body:
                with cut_when_stalled(request.transport):
                    await response.write(data)
        except GatewayError as error:
            log.info("answer.cut-off", session=accepted.session, turn=accepted.turn, error=str(error))
            _drop(request)
            return response
        await self._sessions.was_read(accepted.session, accepted.turn)
        await response.write_eof()
        return response

    # -- streaming

    async def _stream(
        self,
        request: web.Request,
        response: web.StreamResponse,
        session: SessionId,
        turn: TurnId,
        before: Cursor,
    ) -> web.StreamResponse:
        """Write a turn's chunks after a place, to its end."""
        pulse = Pulse(self._config.heartbeat_seconds, lambda: _drop(request))
        attached = None
        try:
            attached = await self._sessions.attach(session, before, pulse.wake, carrier=CARRIER)
            await response.prepare(request)
            end, chunks = await self._write_turn(response, attached.subscriber, turn, pulse)
            if end is None:
                _drop(request)
                return response
            if not (chunks or before.tag or end.draft.ai_sdk) and STREAM_HEADER in response.headers:
                # The backend never said a word, so the language is that of the headers, which are ours.
                await response.write(_sdk_end(end))
            elif not end.draft.ai_sdk and read_turn_end(end).error is not None:
                # Nothing in this stream's own language says that it broke off; its framing does.
                _drop(request)
                return response
            if request.transport is not None and not request.transport.is_closing():
                # Before the end of the body: who has seen that may ask for the stream at once.
                await self._sessions.was_read(session, turn)
            await response.write_eof()
        finally:
            pulse.close()
            if attached is not None:
                attached.subscriber.close()
        return response

    @staticmethod
    async def _write_turn(
        response: web.StreamResponse, subscriber: Subscriber, turn: TurnId, pulse: Pulse
    ) -> tuple[Record | None, int]:
        """Returns the ``turn-end`` (``None``: the client cannot get there), and how many chunks came."""
        chunks = 0
        while True:
            try:
                records = await subscriber.pull()
            except Resync as resync:
                log.info("stream.resync", session=subscriber.session, turn=turn, reason=resync.reason)
                return None, chunks
            ours = [record for record in records if record.turn == turn]
            chunks += sum(record.kind is RecordKind.CHUNK for record in ours)
            data = b"".join(map(encode_record, ours))
            if data:
                pulse.writing()
                await response.write(data)
                pulse.wrote()
            if ours and ours[-1].kind is RecordKind.TURN_END:
                return ours[-1], chunks
            if not subscriber.has_more and not await pulse.wait():
                pulse.writing()
                await response.write(_HEARTBEAT)
                pulse.wrote()

    def _by(self, request: web.Request) -> By:
        named = request.query.get("client")
        client = ClientId(f"http-{secrets.token_hex(6)}") if named is None else client_id(named)
        return By(client=client)


def _chat_body(raw: bytes, session_field: str) -> SendBody | None:
    """The body of a send; ``None`` for one of another kind, which is not ours to judge."""
    with contextlib.suppress(Refusal):
        return read_body(raw, session_field=session_field)
    return None


def _last_event_id(request: web.Request) -> Cursor | None:
    text = request.headers.get("Last-Event-ID")
    return None if not text else Cursor.parse(text)


def _release(accepted: Accepted) -> None:
    """Whatever became of the sender, the producer need not keep the backend's answer for it."""
    if accepted.duplicate or accepted.opening is None:
        return

    def release(opening: asyncio.Future[Opening]) -> None:
        if not opening.cancelled() and isinstance(found := opening.result(), Answered):
            found.released.set()

    accepted.opening.add_done_callback(release)


def _refused_again(kept: bytes, told: Mapping[str, str]) -> web.Response:
    refusal = _kept_refusal.decode(kept)
    headers = {**told, "Content-Type": refusal.contentType}
    if refusal.retryAfter is not None:
        headers["Retry-After"] = refusal.retryAfter
    return web.Response(status=refusal.status, body=refusal.body.encode(), headers=headers)


def _sdk_end(end: Record) -> bytes:
    """A turn's end in the language of the SDK, for a turn that has no chunk."""
    cursor = str(end.cursor)
    chunk = read_turn_end(end).chunk
    told = b"" if chunk is None else encode_event(chunk, identifier=cursor)
    return told + encode_event(DONE, identifier=cursor)


def _drop(request: web.Request) -> None:
    """End the connection without the framing that says: this was all."""
    if request.transport is not None:
        request.transport.abort()
