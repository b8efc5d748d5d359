"""Writes one turn to one HTTP response, to its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from gateway.core.httpwire import encode_record, read_turn_end
from gateway.core.model import Cursor, ErrorCode, GatewayError, Record, RecordKind, Refusal, SessionId, TurnId
from gateway.core.sse import encode_comment, encode_event
from gateway.core.uistream import DONE, STREAM_HEADER
from gateway.edge.commands import in_pieces
from gateway.edge.connection import cut_when_stalled
from gateway.edge.pulse import Pulse
from gateway.hub import Resync, Subscriber

if TYPE_CHECKING:
    from aiohttp import web

    from gateway.config import Config
    from gateway.opening import Answered
    from gateway.sessions import Sessions

log = structlog.get_logger(__name__)

CARRIER = "http"

GONE = "unable to tell the turn again; its records are not kept any more"

_HEARTBEAT = encode_comment("heartbeat")


class TurnStream:
    """Writes turns.

    Args:
        config: For the heartbeat.
        sessions: The verbs.
    """

    def __init__(self, config: Config, sessions: Sessions) -> None:
        self._heartbeat_seconds = config.heartbeat_seconds
        self._sessions = sessions

    async def write(
        self,
        request: web.Request,
        response: web.StreamResponse,
        session: SessionId,
        turn: TurnId,
        before: Cursor,
        *,
        resumes: bool = True,
    ) -> web.StreamResponse:
        """Write a turn's chunks after a place, to its end."""
        pulse = Pulse(self._heartbeat_seconds, lambda: _drop(request))
        attached = None
        try:
            attached = await self._sessions.attach(
                session, before, pulse.wake, carrier=CARRIER, resumes=resumes
            )
            if attached.resync is not None:
                # Waiting for an end that stands in a journal which is gone would be waiting for ever.
                raise Refusal(ErrorCode.CONFLICT, GONE)
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
            for data in in_pieces(filter(None, map(encode_record, ours))):
                pulse.writing()
                await response.write(data)
                pulse.wrote()
            if ours and ours[-1].kind is RecordKind.TURN_END:
                return ours[-1], chunks
            if not subscriber.has_more and not await pulse.wait():
                pulse.writing()
                await response.write(_HEARTBEAT)
                pulse.wrote()

    async def pass_on(
        self,
        request: web.Request,
        response: web.StreamResponse,
        answered: Answered,
        session: SessionId,
        turn: TurnId,
    ) -> web.StreamResponse:
        """An answer that is no stream, as it comes; nobody but the sender gets it."""
        await response.prepare(request)
        try:
            async for data in answered.body:
                with cut_when_stalled(request.transport):
                    await response.write(data)
        except GatewayError as error:
            log.info("answer.cut-off", session=session, turn=turn, error=str(error))
            _drop(request)
            return response
        await self._sessions.was_read(session, turn)
        await response.write_eof()
        return response


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
